"""Compiled and captured steps against the plain ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch

import lookahead_decoding as ld
from conftest import Accepted, right_and_wrong
from lookahead_decoding.graphs import Compiled, padded
from test_exactness import CONFIGS, GREEDY, SAMPLED, WINDOW_ALONE, batch_of, prompt_of

Tiny = Callable[..., torch.nn.Module]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_steps_are_exact(name: str, tiny: Tiny, accepted: Accepted) -> None:
    model, ids = tiny(name), prompt_of(6)
    for mode in (GREEDY, SAMPLED):
        options = {"max_new_tokens": 60, "eos_token_id": None, **mode}
        torch.manual_seed(1)
        plain = model.generate(ids, **options)[0].tolist()
        for config in (CONFIGS["plain"], CONFIGS["15/5/15"], WINDOW_ALONE):
            propose = right_and_wrong(plain) if config is WINDOW_ALONE else None
            decoding = ld.LookaheadDecoding(config, propose=propose, compile="full")
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="the step could not be compiled")
                assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}


def test_a_compiled_batch_is_exact(tiny: Tiny) -> None:
    ids, mask = batch_of((9, 1, 5))
    options = {"max_new_tokens": 40, "pad_token_id": 0, "attention_mask": mask, **GREEDY}
    plain = tiny().generate(ids, **options)
    decoding = ld.LookaheadDecoding(CONFIGS["4/3/3"], compile="full")
    assert ld.generate(tiny(), ids, lookahead=decoding, **options).tolist() == plain.tolist()


def test_other_lengths_and_widths_do_not_compile_again(tiny: Tiny) -> None:
    model = tiny()
    for length, new, config in ((5, 20, "4/3/3"), (30, 50, "15/5/15"), (60, 30, "text only")):
        decoding = ld.LookaheadDecoding(CONFIGS[config], compile="full")
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ld.generate(model, prompt_of(length), max_new_tokens=new, eos_token_id=None, lookahead=decoding, **GREEDY)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_packed_weights_follow_the_model(tiny: Tiny) -> None:
    model = tiny(dtype=torch.bfloat16, hidden_size=64)
    ids = prompt_of(6)

    def logits(compile: str) -> torch.Tensor:
        target = ld.Target(model, 40, compile=compile)
        target.prefill([ids[0].tolist()])
        target.commit([[0]])
        return target.forward([ld.build_tree(5, candidates=[(6, 7)])]).logits.float()

    for _ in range(2):
        plain, compiled = logits("off"), logits("full")
        assert (compiled - plain).norm() / plain.norm() < 0.02
        with torch.no_grad():
            model.lm_head.weight.neg_()


def test_a_compiler_that_fails_costs_one_warning(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **options: object) -> object:
        def fail(*args: object) -> object:
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="could not be compiled and runs uncompiled: no compiler here$"):
        assert double(torch.tensor(2)) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(torch.tensor(3)) == 6


def test_what_cannot_be_compiled_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookahead_decoding.target.kernel_found", lambda: False)
    with pytest.warns(UserWarning, match="compile='graphs' is left out: Triton"):
        ld.Target(tiny(), 20, compile="graphs")
    with pytest.raises(ValueError, match="compile must be one of"):
        ld.Target(tiny(), 20, compile="fast")


def test_rows_are_padded_to_a_few_sizes() -> None:
    assert [padded(n) for n in (1, 2, 8, 9, 128, 256, 257, 600)] == [1, 8, 8, 32, 128, 256, 512, 768]


def test_steps_of_fixed_shape(tiny: Tiny) -> None:
    """What a GPU runs, uncompiled and in the kernel's interpreter: padded rows, lengths on the device."""
    pytest.importorskip("triton")
    model, ids = tiny(), prompt_of(6)
    options = {"max_new_tokens": 6, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)[0].tolist()
    small = ld.LookaheadConfig(1, 3, 0)  # a few rows: the interpreter is slow
    decoding = ld.LookaheadDecoding(small, propose=lambda text: [plain[len(text) : len(text) + 2]], compile="graphs")
    for _ in range(2):  # the second time with the cache of the first
        assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
