from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import lookahead_decoding as ld
from lookahead_decoding.saved import profile

Tiny = Callable[..., torch.nn.Module]
TIMES = [(1, 0.002), (64, 0.003)]


def test_a_profile_serves_the_machine_it_was_made_on_and_no_other(tiny: Tiny) -> None:
    machine = profile.machine_of(tiny(), "eager")
    assert profile.load(machine) is None
    assert profile.save(machine, TIMES) == machine.path
    assert profile.load(profile.machine_of(tiny(), "eager")) == TIMES
    others = [
        profile.machine_of(tiny("qwen2"), "eager"),
        profile.machine_of(tiny(dtype=torch.float64), "eager"),
        profile.machine_of(tiny(), "compiled"),
        profile.machine_of(tiny(), "eager", batch=2),
        replace(machine, torch="1.0"),
        replace(machine, device="another"),
        replace(machine, threads=99),
    ]
    assert [profile.load(other) for other in others] == [None] * len(others)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 1}', "truncated", None],
    ids=["empty", "cut", "a list", "no times", "not JSON", "another format"],
)
def test_a_profile_that_cannot_be_read_is_none(text: str | None, tiny: Tiny) -> None:
    machine = profile.machine_of(tiny(), "eager")
    path = profile.save(machine, TIMES)
    if text is None:
        text = json.dumps(json.loads(path.read_text()) | {"format": 0})
    path.write_text(text)
    assert profile.load(machine) is None


@pytest.mark.parametrize("times", [[], [[1, -1.0]], [[0, 1.0]], [[1, float("nan")]], [[1]], [["x", 1.0]]])
def test_times_that_cannot_be_are_none(times: list[object], tiny: Tiny) -> None:
    machine = profile.machine_of(tiny(), "eager")
    path = profile.save(machine, TIMES)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"times": times}))
    assert profile.load(machine) is None


def test_decoding_reads_the_profile_at_a_models_first_use(tiny: Tiny) -> None:
    model = tiny(vocab_size=32)
    target = ld.Target(model, 64)
    profile.save(target.machine, TIMES)
    times = target.step_times(ld.LookaheadConfig())
    assert times.fixed
    assert times(64) == 0.003
    assert target.step_times(ld.LookaheadConfig(step_times=((1, 5.0),)))(1) == 5.0


def test_without_a_profile_times_are_the_models_own_and_grow_with_its_steps(tiny: Tiny) -> None:
    model = tiny(vocab_size=48)
    times = ld.Target(model, 64).step_times(ld.LookaheadConfig())
    assert not times.fixed
    ld.generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert times.plain_samples >= 3
    assert ld.Target(model, 64).step_times(ld.LookaheadConfig()) is times
    assert ld.Target(model, 64, batch=2).step_times(ld.LookaheadConfig()) is not times
