"""Products of a CPU's few rows with weights that are laid out once.

PyTorch's libraries take long to lay out a weight for the few rows of a step: oneDNN in bfloat16 always, MKL in float32
from 3 rows on where the weight is large. Here a copy is laid out in panels once, and the native step's code multiplies
it, at the price of its memory. The model is left as it is: its layers use the copies only inside the `with` block of a
step.
"""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from .native.library import DTYPES, INNER, PROJECT, TO_HEADS, Op, Program, Step, kind, library, reads, why_no_library
from .native.program import Arena, padded, panels

ROWS = 64
"""Rows up to which a product is native; PyTorch's libraries lay out a weight for more in little of their time."""


class PackedLinears:
    """The linear layers of a model with their weights laid out; inside a `with` block they are used.

    A weight is laid out when a product first needs it. A row of a product does not depend on those beside it, bit by
    bit; in float32 it is rounded in another order than the layer's own.

    Args:
        model: on a CPU, one that `why_not` has nothing against.
    """

    def __init__(self, model: nn.Module) -> None:
        arena = Arena()
        self._products = [(vars(layer), _Product(layer, arena)) for layer in linears(model)]

    def __enter__(self) -> None:
        for attributes, product in self._products:
            attributes.setdefault("forward", product)  # one that somebody put there goes first

    def __exit__(self, *error: object) -> None:
        for attributes, product in self._products:
            if attributes.get("forward") is product:
                del attributes["forward"]


class _Product:
    """A layer's forward, with its weight laid out once it is needed: a program of one operation."""

    def __init__(self, layer: nn.Linear, arena: Arena) -> None:
        self._layer = layer
        self._arena = arena
        self._panels: torch.Tensor | None = None

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        rows = input.numel() // max(1, layer.in_features)
        mixed = input.dtype != layer.weight.dtype or torch.is_autocast_enabled("cpu")
        if not 0 < rows <= ROWS or mixed:
            return nn.functional.linear(input, layer.weight, layer.bias)
        if self._panels is None:
            self._panels = self._arena.put(panels(layer.weight.detach()))
            self._bias = padded(layer.bias)
            bias = None if self._bias is None else self._bias.data_ptr()
            sizes = {"outputs": layer.out_features, "inputs": layer.in_features}
            places = {"origin": INNER, "to": TO_HEADS, "weight": self._panels.data_ptr(), "bias": bias}
            op = Op(kind=PROJECT, factor=1.0, **sizes, **places)
            self._program = Program(dtype=DTYPES[layer.weight.dtype], count=1, ops=ctypes.pointer(op))
        given = input.to(reads(layer.weight.dtype)).contiguous()
        found = torch.empty(rows, layer.out_features, dtype=torch.float32)
        step = Step(rows=rows, threads=torch.get_num_threads())
        taken = torch.zeros(8, dtype=torch.int64)
        step.inner, step.heads, step.next = given.data_ptr(), found.data_ptr(), taken.data_ptr()
        code = library()
        assert code is not None
        code.lookahead_step(ctypes.byref(self._program), ctypes.byref(step), kind())
        return found.to(layer.weight.dtype).view(*input.shape[:-1], layer.out_features)


def linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that have native products: plain ones, not quantised, nor with a forward that someone replaced."""
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.dtype in DTYPES
        and layer.weight.device.type == "cpu"
        and layer.in_features % 2 == 0  # pairs of bfloat16 are multiplied together
        and "forward" not in vars(layer)
    ]


def copied_bytes(model: nn.Module) -> int:
    """What the copies of a model's weights take."""
    return sum(layer.weight.nbytes for layer in linears(model))


def why_not(model: nn.Module) -> str:
    """Why the weights of a model cannot be laid out; empty if they can."""
    if next(model.parameters()).device.type != "cpu":
        return "weights are laid out on a CPU"
    if reason := why_no_library():
        return reason
    return "" if linears(model) else "the model has no linear layers that native code could multiply"


def version_of(model: nn.Module) -> object:
    """Equal as long as the weights are: where they lie, the changes that PyTorch counts, and a sample of the values.

    The sample has a value of every row and of every column, so that rows and columns that were edited through `.data`,
    which PyTorch does not count, are noticed.
    """
    found: list[object] = []
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if type(tensor) not in (torch.Tensor, nn.Parameter):  # quantised: never packed, and not to be looked into
                found.append(id(tensor))
                continue
            found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, _sample(tensor.detach())))
    return tuple(found)


def _sample(tensor: torch.Tensor) -> int:
    """A hash of some values: one of every row and of every column of the last dimension at least."""
    flat = tensor.reshape(-1)
    columns = tensor.shape[-1] if tensor.ndim else 1
    parts = (
        [flat[:: max(1, columns - 1)], flat[:columns]] if columns else []
    )  # the first steps one column back each row
    if 1 < len(flat) // max(1, columns) < columns:  # fewer rows than columns: further diagonals
        rows = len(flat) // columns
        parts += [tensor.reshape(rows, columns)[:, at : at + rows].diagonal() for at in range(0, columns, rows)]
    return hash(torch.cat(parts).view(torch.uint8).numpy().tobytes()) if parts else 0
