"""Weights of a CPU's matrix products, laid out once.

For products with few rows, as those of a step, PyTorch's libraries take long to lay out the weight: oneDNN in bfloat16
always, MKL in float32 from 3 rows on where the weight is large. A copy that is laid out already saves that time, at the
price of its memory. The model is left as it is: its layers use the copies only inside the `with` block of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

ROWS = 64
"""Rows of a product that the layout is made for; it serves any other number as well."""

LEAST_ROWS = 4
"""Rows from which a layout helps in float32."""

LEAST_WEIGHTS = 2**19
"""Weights of a layer from which a layout helps in float32; smaller ones are slower with it (docs/LOG.md)."""

SAMPLES = 256
"""Values of a tensor that are compared to notice a change that PyTorch does not count, made through `.data`."""


class PackedLinears:
    """The linear layers of a model with their weights laid out; inside a `with` block they are used.

    In bfloat16 most products are the same bit by bit, in float32 they are rounded in another order; few rows and small
    layers are multiplied there as without copies. Nested and concurrent blocks do no harm, since a layer outside of all
    blocks takes its own weight.

    Args:
        model: in bfloat16 or float32 on a CPU, one that `why_not` has nothing against.
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = []
        with torch.no_grad():
            for layer in linears(model):
                single = layer.weight.dtype == torch.float32
                lay_out = torch.ops.mkl._mkl_reorder_linear_weight if single else _reorder
                product = partial(_single if single else _half, lay_out(layer.weight.detach(), ROWS), layer)
                self._forwards.append((vars(layer), product))

    def __enter__(self) -> None:
        for attributes, product in self._forwards:
            attributes["forward"] = product

    def __exit__(self, *error: object) -> None:
        for attributes, _ in self._forwards:
            attributes.pop("forward", None)


def _reorder(weight: torch.Tensor, rows: int) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return packed


def _half(packed: torch.Tensor, layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, packed, layer.bias, "none", [], "")
    return product


def _single(packed: torch.Tensor, layer: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    rows = input.numel() // layer.in_features
    if rows < LEAST_ROWS:
        return nn.functional.linear(input, layer.weight, layer.bias)
    product: torch.Tensor = torch.ops.mkl._mkl_linear.default(input, packed, layer.weight, layer.bias, rows)
    return product


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers whose weights are worth it: plain ones, not quantised, nor with a forward that someone replaced."""
    least = {torch.float32: LEAST_WEIGHTS, torch.bfloat16: 0}
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype in least
        and layer.weight.numel() >= least[layer.weight.dtype]
        and layer.weight.device.type == "cpu"
        and _own_forward(layer)
    ]


def _own_forward(layer: nn.Linear) -> bool:
    """Whether nobody but a block of ours, in another thread, has replaced a layer's forward."""
    forward = vars(layer).get("forward")
    return forward is None or (isinstance(forward, partial) and forward.func in (_half, _single))


def copied_bytes(model: nn.Module) -> int:
    """What the copies of a model's weights take."""
    return sum(layer.weight.nbytes for layer in linears(model))


def why_not(model: nn.Module) -> str:
    """Why the weights of a model cannot be laid out; empty if they can."""
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or parameter.dtype not in (torch.float32, torch.bfloat16):
        return "weights are laid out on a CPU, in float32 and bfloat16"
    if parameter.dtype == torch.float32:
        able = hasattr(torch.ops.mkl, "_mkl_linear")
    else:
        able = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not able:
        return "this processor, or this build of PyTorch, has no products with weights that are laid out"
    return "" if linears(model) else "the model has no linear layers that gain by it"


def version_of(model: nn.Module) -> object:
    """Equal as long as the weights are: where they lie, the changes that PyTorch counts, and a sample of the values."""
    found: list[object] = [torch.get_num_threads()]  # which a layout is made for, too
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)].float().sum().item()
            found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, sample))
    return tuple(found)
