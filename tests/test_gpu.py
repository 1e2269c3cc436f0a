"""Answers on a GPU, by every way to run a step, against `generate`. They run where CUDA is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from benchmarks.drafts import right_and_wrong

import lookahead_decoding as ld
from conftest import ARCHITECTURES
from lookahead_decoding.config import LookaheadWarning
from test_exactness import CONFIGS, GREEDY, SAMPLED, prompt_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Tiny = Callable[..., torch.nn.Module]
COMPILED = ("llama", "gemma2", "qwen3")


def answers_are_the_same(model: torch.nn.Module, execution: str, length: int = 40) -> list[str]:
    """Hold greedy and sampled answers against `generate`; returns what was warned of."""
    ids = prompt_of(9).to("cuda")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LookaheadWarning)
        for mode in (GREEDY, SAMPLED):
            options = {"max_new_tokens": length, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **mode}
            torch.manual_seed(1)
            plain = model.generate(ids, **options)[0].tolist()
            for config in (CONFIGS["plain"], CONFIGS["15/5/15"], ld.LookaheadConfig(step_times=((1, 1.0),))):
                for _ in range(2):  # the second time with what was captured
                    propose = right_and_wrong(plain) if config is CONFIGS["15/5/15"] else None
                    decoding = ld.LookaheadDecoding(config, propose=propose, execution=execution)
                    torch.manual_seed(1)
                    assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    return [str(one.message) for one in said if one.category is LookaheadWarning]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eager_steps_are_exact(name: str, tiny: Tiny) -> None:
    answers_are_the_same(copy.deepcopy(tiny(name)).to("cuda"), "eager")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_default_is_exact_and_says_where_it_captures_nothing(name: str, tiny: Tiny) -> None:
    said = answers_are_the_same(copy.deepcopy(tiny(name)).to("cuda"), "auto")
    assert not any("could not be captured" in line for line in said), said


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_are_exact(name: str, tiny: Tiny) -> None:
    said = answers_are_the_same(copy.deepcopy(tiny(name)).to("cuda"), "compiled", length=20)
    assert not any("could not be compiled" in line for line in said), said


def test_a_batch_is_exact(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny()).to("cuda")
    ids = torch.stack([prompt_of(9)[0], prompt_of(9)[0] + 1]).to("cuda")
    options = {"max_new_tokens": 30, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **GREEDY}
    plain = model.generate(ids, **options).tolist()
    assert ld.generate(model, ids, **options).tolist() == plain


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_device_is_captured_there(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny()).to("cuda:1")
    ids = prompt_of(9).to("cuda:1")
    options = {"max_new_tokens": 20, "eos_token_id": None, "attention_mask": torch.ones_like(ids), **GREEDY}
    plain = model.generate(ids, **options).tolist()
    assert ld.generate(model, ids, **options).tolist() == plain
