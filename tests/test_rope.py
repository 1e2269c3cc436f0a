"""Rotary scalings that change with the length of the text, up to their switch, across it and past it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.drafts import right_and_wrong
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import lookahead_decoding as ld
from conftest import ARCHITECTURES, FREE
from lookahead_decoding.model.evaluate import cache_name
from lookahead_decoding.model.rope import Switch, switch_of

SWITCH = 40
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
KINDS = {
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "longrope": ("llama", {"rope_parameters": LONG}),
    "longrope, computed anew": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH, "sliding_window": None},
    ),
    "longrope, computed anew, with a window": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": SWITCH, "sliding_window": 8},
    ),
}


def fresh(kind: str) -> Any:
    """A new model each time: the module remembers the largest length it has seen."""
    name, changes = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def prompt_of(length: int) -> torch.Tensor:
    return torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [10, SWITCH - 1, SWITCH, SWITCH + 1, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_generate_on_both_sides(kind: str, length: int) -> None:
    if length <= SWITCH and switch_of(fresh(kind)).forgets:
        pytest.skip("generate itself forgets the text here in this version")
    ids, options = prompt_of(length), {"max_new_tokens": 60, "eos_token_id": None, "do_sample": False}
    plain = fresh(kind).generate(ids, **options)[0].tolist()
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(step_times=FREE), propose=right_and_wrong(plain))
    assert ld.generate(fresh(kind), ids, lookahead=decoding, **options)[0].tolist() == plain
    if kind != "dynamic" or length < SWITCH - 1:
        assert decoding.stats.accepted > 10
    else:  # every token changes the frequencies
        assert decoding.stats.rows_per_step == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_the_prompt_does_not_cross(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookahead_decoding.model.trees.PREFILL_CHUNK", 7)
    ids, options = prompt_of(75), {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False}
    plain = fresh(kind).generate(ids, **options)
    assert torch.equal(ld.generate(fresh(kind), ids, **options), plain)


@pytest.mark.parametrize(("before", "more"), [(20, 5), (20, 40), (50, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_goes_on_across_the_switch(kind: str, before: int, more: int) -> None:
    if before <= SWITCH and switch_of(fresh(kind)).forgets:
        pytest.skip("generate itself forgets the text here in this version")
    ids, options = prompt_of(before + more), {"max_new_tokens": 30, "eos_token_id": None, "do_sample": False}
    texts = []
    for way in (lambda model, *a, **k: model.generate(*a, **k), ld.generate):
        model = fresh(kind)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :before], past_key_values=cache)
        texts.append(way(model, ids, past_key_values=cache, **options)[0].tolist())
    assert texts[0] == texts[1]


def test_a_model_that_forgets_its_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = fresh("longrope"), prompt_of(20)
    before = model.prepare_inputs_for_generation
    monkeypatch.setattr(  # as Phi-3 in transformers 5.16
        model,
        "prepare_inputs_for_generation",
        lambda ids, **kwargs: before(ids, **kwargs | ({cache_name(before): None} if ids.shape[1] > SWITCH else {})),
    )
    assert ld.generate(model, ids, max_new_tokens=10, eos_token_id=None).shape == (1, 30)
    with pytest.raises(ValueError, match="change at 40 tokens, where this version of transformers forgets the text"):
        ld.generate(model, ids, max_new_tokens=40)


def test_a_batch_that_comes_to_the_switch_is_refused() -> None:
    ids = prompt_of(20).repeat(2, 1)
    assert ld.generate(fresh("longrope"), ids, max_new_tokens=10, eos_token_id=None).shape == (2, 30)
    with pytest.raises(ValueError, match="frequencies change at 40 tokens, and a sequence of this batch can reach 60"):
        ld.generate(fresh("longrope"), ids, max_new_tokens=40)


def test_what_a_configuration_says_of_its_switch(tiny: Callable[..., torch.nn.Module]) -> None:
    assert switch_of(tiny("llama")) is None
    assert switch_of(fresh("dynamic")) == Switch(SWITCH, plain_after=True, renews=False)
    assert switch_of(fresh("longrope")) == Switch(SWITCH, plain_after=False, renews=False)
    anew = switch_of(fresh("longrope, computed anew"))
    assert anew == Switch(SWITCH, plain_after=False, renews=not anew.forgets, forgets=anew.forgets)


def test_no_tree_crosses() -> None:
    switch = Switch(10, plain_after=False, renews=False)
    assert [switch.reach(root) for root in (0, 8, 9)] == [9, 1, 0]
    assert switch.reach(10) > 100
    assert Switch(10, plain_after=False, renews=True).reach(10) == 0
    assert Switch(10, plain_after=True, renews=False).reach(50) == 0
