"""The small operations of a layer: kernels against PyTorch, and where they stand in for a model's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from lookahead_decoding.model import fused
from test_exactness import prompt_of

Tiny = Callable[..., torch.nn.Module]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = (1e-6, 5e-4, 1e-2)  # Triton's interpreter cuts to bfloat16 where a GPU rounds


@pytest.fixture
def kernels():
    return pytest.importorskip("lookahead_decoding.model.small_kernels", reason="needs triton")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    bound = dict(zip(DTYPES, BOUNDS, strict=True))[wanted.dtype]
    return found.shape == wanted.shape and bool((found.double() - wanted.double()).norm() <= bound * wanted.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 3, 48), (2, 4, 3, 64), (5, 17)])
def test_the_norm_is_pytorchs(kernels, shape: tuple[int, ...], shift: float, dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    assert close(kernels.launch_norm(x, weight, 1e-5, shift), fused.norm(x, weight, 1e-5, shift))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_rotation_is_pytorchs(kernels, batch: int, dtype: torch.dtype) -> None:
    query = torch.randn(batch, 5, 4, 24, dtype=dtype).transpose(1, 2)  # as a projection leaves it
    key = torch.randn(batch, 2, 5, 24, dtype=dtype)
    angles = torch.randn(1, 5, 12, dtype=dtype).repeat(batch, 1, 2) * torch.arange(1, batch + 1)[:, None, None]
    inputs = query, key, torch.cos(angles).to(dtype), torch.sin(angles).to(dtype)
    for found, wanted in zip(kernels.launch_rotation(*inputs), fused.rotated(*inputs), strict=True):
        assert torch.equal(found, wanted) or (dtype == torch.bfloat16 and close(found, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_is_pytorchs(kernels, dtype: torch.dtype) -> None:
    gate, up = torch.randn(2, 3, 700, dtype=dtype), torch.randn(2, 3, 700, dtype=dtype)
    assert close(kernels.launch_gate(gate, up), fused.gated(gate, up))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", {"LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"}),
        ("qwen3", {"Qwen3RMSNorm", "Qwen3MLP", "apply_rotary_pos_emb"}),
        ("gemma2", {"Gemma2RMSNorm", "apply_rotary_pos_emb"}),  # whose unit is gated by GELU
        ("gpt2", set()),
    ],
)
def test_ours_stand_in_for_what_computes_the_same(name: str, kinds: set[str], tiny: Tiny) -> None:
    model, ids = copy.deepcopy(tiny(name)), prompt_of(9)
    made = fused.Fused(model)
    assert made.kinds == kinds
    before = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        wanted = model(ids).logits
        with made:
            assert any("forward" in vars(module) for module in model.modules()) == bool(kinds)
            assert torch.allclose(model(ids).logits, wanted, atol=1e-5)
        assert torch.equal(model(ids).logits, wanted)
    assert [dict(vars(module)) for module in model.modules()] == before


def test_a_module_that_computes_something_else_keeps_its_way(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny())
    kind = type(model.model.norm)
    other = type("OtherRMSNorm", (kind,), {"forward": lambda self, x: kind.forward(self, x) * 1.01})
    model.model.norm.__class__ = other
    assert "OtherRMSNorm" not in fused.Fused(model).kinds
    model.model.norm.forward = lambda x: x
    with fused.Fused(model):
        assert model.model.norm(3) == 3
