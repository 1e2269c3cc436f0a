"""Weights of a CPU's matrix products, laid out once.

For products with few rows, as those of a step, PyTorch's libraries take long to lay out the weight: oneDNN in bfloat16
always, MKL in float32 from 3 rows on where the weight is large. A copy that is laid out already saves that time, at the
price of its memory. The model is left as it is: its layers use the copies only inside the `with` block of a step.
"""

from __future__ import annotations

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

    A weight is laid out when a product first needs it. In bfloat16 most products are the same bit by bit, in float32
    they are rounded in another order; few rows and small layers are multiplied there as without copies.

    Args:
        model: in bfloat16 or float32 on a CPU, one that `why_not` has nothing against.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = {torch.float32: _SinglePrecision, torch.bfloat16: _HalfPrecision}
        self._products = [(vars(layer), kinds[layer.weight.dtype](layer)) for layer in linears(model)]

    def __enter__(self) -> None:
        for attributes, product in self._products:
            attributes.setdefault("forward", product)  # one that somebody put there goes first

    def __exit__(self, *error: object) -> None:
        for attributes, product in self._products:
            if attributes.get("forward") is product:
                del attributes["forward"]


class _Product:
    """A layer's forward, with its weight laid out once it is needed."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._packed: torch.Tensor | None = None


class _HalfPrecision(_Product):
    """In bfloat16, by oneDNN."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._layer.weight.detach(), ROWS)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            input, self._packed, self._layer.bias, "none", [], ""
        )
        return product


class _SinglePrecision(_Product):
    """In float32, by MKL."""

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        rows = input.numel() // layer.in_features
        if rows < LEAST_ROWS:
            return nn.functional.linear(input, layer.weight, layer.bias)
        if self._packed is None:
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(layer.weight.detach(), ROWS)
        product: torch.Tensor = torch.ops.mkl._mkl_linear.default(input, self._packed, layer.weight, layer.bias, rows)
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
        and "forward" not in vars(layer)
    ]


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
            if type(tensor) not in (torch.Tensor, nn.Parameter):  # quantised: never packed, and not to be looked into
                found.append(id(tensor))
                continue
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)].float().sum().item()
            found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, sample))
    return tuple(found)
