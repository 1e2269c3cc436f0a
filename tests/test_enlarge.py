from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.enlarge import Size, enlarge


@pytest.mark.parametrize(
    "size",
    [Size(512, 9, 8, 4, 900), Size(320, 8, 8, 8, 800), Size(256, 10, 8, 2, 768)],
    ids=["wider", "no sharing of key heads", "more sharing of key heads"],
)
def test_an_enlarged_model_has_the_same_function(size: Size, pocket: tuple[torch.nn.Module, object]) -> None:
    small, tokenizer = pocket
    ids = tokenizer("def fibonacci(n):\n    if n < 2:\n        return n\n", return_tensors="pt").input_ids
    large = enlarge(small, size, torch.float32)
    with torch.no_grad():
        assert torch.allclose(large(ids).logits, small(ids).logits, atol=2e-3)
    plain = small.generate(ids, max_new_tokens=30, do_sample=False)
    assert large.generate(ids, max_new_tokens=30, do_sample=False).tolist() == plain.tolist()


def test_a_size_that_does_not_hold_the_model_is_refused(pocket: tuple[torch.nn.Module, object]) -> None:
    with pytest.raises(ValueError, match="smaller than the model"):
        enlarge(pocket[0], Size(128, 8, 4, 2, 768), torch.float32)
    with pytest.raises(ValueError, match="do not hold"):
        enlarge(pocket[0], Size(256, 8, 4, 1, 768), torch.float32)
