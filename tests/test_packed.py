"""Weights that are laid out, against the model's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong

import lookahead_decoding as ld
from conftest import FREE
from lookahead_decoding.model import packed
from test_exactness import GREEDY, SAMPLED, WINDOW_ALONE, batch_of, prompt_of

Tiny = Callable[..., torch.nn.Module]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TREE = ld.build_tree(5, candidates=[(6, 7, 8), (9, 10)])


def able(model: torch.nn.Module) -> torch.nn.Module:
    if reason := packed.why_not(model):
        pytest.skip(reason)  # of this processor or build of PyTorch: elsewhere weights are never packed
    return model


def logits(model: torch.nn.Module, execution: str) -> torch.Tensor:
    target = ld.Target(model, 40, execution=execution)
    target.prefill([[3, 4, 5]])
    target.commit([[0]])
    return target.forward([TREE]).logits.float()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi"])  # phi's layers have biases
@pytest.mark.parametrize("mode", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_packed_steps_are_exact(name: str, mode: dict[str, object], tiny: Tiny, accepted: Accepted) -> None:
    model, ids = able(tiny(name, attn_implementation="eager")), prompt_of(6)
    options = {"max_new_tokens": 60, "eos_token_id": None, **mode}
    torch.manual_seed(1)
    plain = model.generate(ids, **options)[0].tolist()
    decoding = ld.LookaheadDecoding(WINDOW_ALONE, propose=right_and_wrong(plain), execution="packed")
    torch.manual_seed(1)
    assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}


def test_a_packed_batch_is_exact(tiny: Tiny) -> None:
    model = able(tiny())
    ids, mask = batch_of((9, 1, 5))
    options = {"max_new_tokens": 40, "pad_token_id": 0, "attention_mask": mask, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(step_times=FREE), execution="packed")
    assert torch.equal(ld.generate(model, ids, lookahead=decoding, **options), plain)
    assert decoding.stats.rows_per_step > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layers_use_the_copies_inside_a_step_only(dtype: torch.dtype, tiny: Tiny) -> None:
    model = able(tiny(dtype=dtype))
    layers = packed.linears(model)
    copies = packed.PackedLinears(model)
    assert len(layers) == 15  # seven of each of two layers, and the head
    assert packed.copied_bytes(model) == sum(layer.weight.nbytes for layer in layers)
    with copies, copies:
        assert all("forward" in vars(layer) for layer in layers)
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(RuntimeError, match="stop"), copies:
        raise RuntimeError("stop")
    assert not any("forward" in vars(layer) for layer in layers)


def test_a_forward_that_somebody_has_replaced_is_used_and_stays(tiny: Tiny) -> None:
    model = able(tiny(dtype=torch.bfloat16, hidden_size=48))
    before = logits(model, "packed")
    head = model.lm_head
    own = head.forward
    head.forward = lambda rows: -own(rows)
    try:
        assert apart(-before, logits(model, "packed")) < 0.05
        assert vars(head)["forward"](torch.ones(1, 48, dtype=torch.bfloat16)).shape == (1, 64)
    finally:
        del head.forward
    assert apart(before, logits(model, "packed")) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 64, 200])
def test_a_product_is_that_of_the_layer(dtype: torch.dtype, rows: int) -> None:
    model = able(torch.nn.Sequential(torch.nn.Linear(96, 80), torch.nn.Linear(80, 48, bias=False)).to(dtype))
    rows_of_two = torch.randn(2, rows, 96, dtype=dtype)
    with torch.no_grad():
        plain = model(rows_of_two)
        with packed.PackedLinears(model):
            product = model(rows_of_two)
    assert product.shape == plain.shape
    assert apart(product.float(), plain.float()) < 4 * torch.finfo(dtype).eps
    with torch.no_grad(), packed.PackedLinears(model):  # a row alone, and among others
        assert rows > packed.ROWS / 2 or torch.equal(model(rows_of_two[1:, :1]), product[1:, :1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_copies_follow_the_model(dtype: torch.dtype, tiny: Tiny) -> None:
    model = able(tiny(dtype=dtype, hidden_size=64))
    before = logits(model, "packed")
    assert apart(before, logits(model, "eager")) < 8 * torch.finfo(dtype).eps
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert apart(-before, logits(model, "packed")) == 0
    model.lm_head.weight.data.neg_()  # which PyTorch does not count
    assert apart(before, logits(model, "packed")) == 0


def test_automatic_mixed_precision_is_left_to_the_layers(tiny: Tiny) -> None:
    model, ids = able(tiny(hidden_size=64)), prompt_of(6)
    options = {"max_new_tokens": 30, "eos_token_id": None, **GREEDY}
    with torch.autocast("cpu", torch.bfloat16):
        plain = logits(model, "eager")
        assert apart(logits(model, "packed"), plain) == 0
        texts = [
            ld.generate(model, ids, lookahead=ld.LookaheadDecoding(ld.PLAIN, execution=how), **options).tolist()
            for how in ("eager", "packed")
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("shape", [(64, 64), (8, 96), (96, 8), (1, 40), (40, 1), (7, 64), (40,), (3, 5, 16)])
def test_an_edited_row_or_column_is_noticed(shape: tuple[int, ...]) -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(shape))
    before, matrix = packed.version_of(module), module.weight.data.view(-1, shape[-1])
    for line in (*matrix, *matrix.t()):
        line += 1
        assert packed.version_of(module) != before
        line -= 1
        before = packed.version_of(module)  # of rounding


def test_where_nobody_says_how_a_step_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = able(tiny(dtype=torch.bfloat16))
    assert ld.Target(model, 20).execution == "packed"
    monkeypatch.setattr("lookahead_decoding.model.trees.PACKED_UNASKED", packed.copied_bytes(model) - 1)
    assert ld.Target(model, 20).execution == "eager"
    assert ld.Target(model, 20, execution="packed").execution == "packed"
    assert ld.Target(tiny(dtype=torch.float64), 20).execution == "eager"


def test_what_cannot_be_packed_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no linear layers that native code could multiply"):
        ld.Target(tiny(dtype=torch.float64), 20, execution="packed")
    monkeypatch.setattr(packed, "why_no_library", lambda: "no code for this processor")
    with pytest.raises(ValueError, match=r"execution='packed' cannot be: no code for this processor\. Leave it out"):
        ld.Target(tiny(), 20, execution="packed")
