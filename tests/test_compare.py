"""`compare` finds a divergence and judges it by the contract."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lookahead_decoding as ld
from lookahead_decoding.cli import main as cli
from lookahead_decoding.cli.loading import load
from lookahead_decoding.hf import exactness
from lookahead_decoding.hf.exactness import compare
from test_exactness import prompt_of

GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
SAMPLED = {**GREEDY, "do_sample": True}
Tiny = Callable[..., torch.nn.Module]


def wrong(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor, torch.nn.Module], torch.Tensor]) -> None:
    """Let lookahead decoding return something else than it found."""
    right = ld.generate
    monkeypatch.setattr(exactness, "generate", lambda model, *a, **k: change(right(model, *a, **k), model))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_identical_outputs_have_no_divergence(options: dict[str, object], tiny: Tiny) -> None:
    assert compare(tiny(), prompt_of(5), ld.LookaheadDecoding(), seed=3, **options) is None


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_another_token_is_a_bug_with_its_position_and_margin(
    options: dict[str, object], tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong(monkeypatch, lambda out, model: torch.cat([out[:, :9], (out[:, 9:10] + 1) % 64, out[:, 10:]], 1))
    found = compare(tiny(), prompt_of(5), ld.LookaheadDecoding(), seed=3, **options)
    assert found is not None
    assert (found.position, found.near_tie, found.bound) == (4, False, 1e-4)
    assert found.margin > 1e-4


def test_the_margin_of_a_draw_is_that_of_the_noise(tiny: Tiny) -> None:
    """The largest log p - log q is the token that torch.multinomial draws."""
    torch.manual_seed(7)
    probabilities = torch.randn(1, 64).softmax(-1)
    torch.manual_seed(8)
    drawn = torch.multinomial(probabilities, 1)
    torch.manual_seed(8)
    noise = torch.empty_like(probabilities).exponential_(1)
    assert int((probabilities.log() - noise.log()).argmax()) == int(drawn)


def test_an_output_that_goes_on_past_the_end_is_a_bug(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, lambda out, model: torch.cat([out, out[:, :1]], 1))
    found = compare(tiny(), prompt_of(5), ld.LookaheadDecoding(), **GREEDY)
    assert found == exactness.Divergence(12, math.inf, 1e-4, False)


def tied(tiny: Tiny) -> tuple[torch.nn.Module, int, int]:
    """A model that gives its first token and another one the same logits."""
    model = copy.deepcopy(tiny(tie_word_embeddings=False))
    first = int(model.generate(prompt_of(5), **{**GREEDY, "max_new_tokens": 1})[0, 5])
    other = 63 if first != 63 else 62
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[first]
    return model, min(first, other), max(first, other)


def test_a_tie_that_float64_decides_alike_is_a_near_tie(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first, other = tied(tiny)

    def swap(out: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
        narrow = model.dtype == torch.float32
        return torch.where(out == first, other, out) if narrow else out

    wrong(monkeypatch, swap)
    found = compare(model, prompt_of(5), ld.LookaheadDecoding(), **GREEDY)
    assert found == exactness.Divergence(0, 0.0, 1e-4, True)
    wrong(monkeypatch, lambda out, model: torch.where(out == first, other, out))  # in float64 as well
    found = compare(model, prompt_of(5), ld.LookaheadDecoding(), **GREEDY)
    assert found == exactness.Divergence(0, 0.0, 1e-4, False)


def test_in_half_precision_the_bound_is_what_plain_ways_differ_by(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, first, other = tied(tiny)
    model = model.to(torch.bfloat16)
    wrong(monkeypatch, lambda out, model: torch.where(out == first, other, out))
    found = compare(model, prompt_of(5), ld.LookaheadDecoding(), **GREEDY)
    assert found is not None
    assert found.near_tie
    assert found.bound > 0
    wrong(monkeypatch, lambda out, model: torch.cat([out[:, :7], (out[:, 7:8] + 1) % 64, out[:, 8:]], 1))
    found = compare(tiny(dtype=torch.bfloat16), prompt_of(5), ld.LookaheadDecoding(), **GREEDY)
    assert found is not None
    assert found.near_tie == (found.margin <= found.bound)


def test_verify_says_bug_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong(monkeypatch, lambda out, model: out.flip(1)[:, : out.shape[1]])
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "def f(x):"}) + "\n")
    monkeypatch.setattr("sys.argv", ["lookahead", "verify", "pocket", "--prompts", str(path), "--max-new-tokens", "8"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "prompt 1: differs after" in out
    assert out.rstrip().endswith("identical to model.generate 0/1 in float32")


@pytest.mark.parametrize("prompt", ["def fibonacci(n):\n", "import os\nimport sys\n\n\ndef main():\n"])
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8}])
def test_pocket_in_bfloat16_keeps_the_contract(prompt: str, options: dict[str, object]) -> None:
    model, tokenizer = load("pocket", "bfloat16", "cpu", False)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    found = compare(model, ids, ld.LookaheadDecoding(), max_new_tokens=60, **options)
    assert found is None or found.near_tie
