"""A program: the operations that a step of a model consists of, with its weights laid out for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .library import (
    ATTENDED,
    DTYPES,
    INNER,
    LAYER_NORM,
    NO_NORM,
    NORM,
    NORMED,
    PROJECT,
    ROOT_MEAN_SQUARE,
    TO_HEADS,
    TO_LOGITS,
    TO_RESIDUAL,
    Op,
    Program,
    huge,
)

PANEL = 32
"""Outputs of a product that are computed together."""

Angles = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""How many positions to the cosines and sines of them, (positions, half of what is rotated) each, in float32."""


class NoProgramError(ValueError):
    """A model has no program; the message says what is strange about it."""


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A weight, (outputs, inputs), as [outputs / 32][inputs][32], in bfloat16 [outputs / 32][inputs / 2][32][2]."""
    outputs, inputs = weight.shape
    missing = -outputs % PANEL
    if missing:
        weight = torch.cat([weight, weight.new_zeros(missing, inputs)])
    together = 2 if weight.dtype == torch.bfloat16 else 1
    return weight.view(-1, PANEL, inputs // together, together).transpose(1, 2).contiguous()


def alternating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The panels of two weights, taking turns."""
    return torch.stack([panels(first), panels(second)], 1)


def padded(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias in float32, as long as whole panels."""
    if bias is None:
        return None
    bias = bias.detach().float()
    return torch.cat([bias, bias.new_zeros(-len(bias) % PANEL)])


class Arena:
    """Memory for weights in large pages: with small ones, finding them takes a fifth of the time of reading them."""

    _block = 1 << 28
    _aligned = 64

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor."""
        size = tensor.nbytes
        if len(self._rest) < size:
            self._rest = huge(max(size, self._block))
        place, self._rest = self._rest[:size], self._rest[size + -size % self._aligned :]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


@dataclass(frozen=True)
class Norm:
    """A norm that is known.

    Attributes:
        kind: ROOT_MEAN_SQUARE, LAYER_NORM, or NO_NORM, which passes on what it is given.
        weight, bias: in float32, as they are multiplied and added.
    """

    kind: int = NO_NORM
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Linear:
    """A linear layer: its weight, (outputs, inputs), and its bias, (outputs,), or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    @property
    def outputs(self) -> int:
        return len(self.weight)


def beside(parts: Sequence[Linear]) -> Linear:
    """Linear layers of the same inputs as one."""
    if all(part.bias is None for part in parts):
        return Linear(torch.cat([part.weight for part in parts]))
    biases = [part.weight.new_zeros(part.outputs) if part.bias is None else part.bias for part in parts]
    return Linear(torch.cat([part.weight for part in parts]), torch.cat(biases))


@dataclass
class Made:
    """A program in the making, with everything that it points to.

    Attributes:
        hidden, heads, key_heads, size, inner, vocabulary: sizes; `size` is that of a head, `inner` of a feed-forward
            network.
        scale: of the scores of attention.
        tokens, positions: that there are embeddings of; no positions where they are not learned.
        cap: of the logits, by a tanh; 0 is none.
        tables: of angles, that rotations name by number.
        spans: of each layer, the number of its slots among those of the cache.
        layers: the model's own layers, each with how many operations come before its end.
    """

    dtype: torch.dtype
    hidden: int
    heads: int
    key_heads: int
    size: int
    inner: int
    vocabulary: int
    scale: float
    tokens: int = 0
    positions: int = 0
    cap: float = 0.0
    tables: list[Angles] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    layers: list[tuple[nn.Module, int]] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    _held: list[torch.Tensor] = field(default_factory=list)
    _arena: Arena = field(default_factory=Arena)

    def known(self, module: nn.Module | None) -> Norm:
        """What norm a module is, as `norm_of`."""
        return norm_of(module, self.dtype)

    def hold(self, tensor: torch.Tensor | None) -> int | None:
        """The place of a tensor, which lives as long as the program."""
        if tensor is None:
            return None
        self._held.append(tensor.detach())
        return tensor.data_ptr()

    def lay(self, weight: torch.Tensor) -> int | None:
        """The place of panels, in large pages."""
        return self.hold(self._arena.put(weight))

    def add(self, kind: int, **fields: Any) -> None:
        """An operation."""
        self.ops.append(Op(kind=kind, **{"factor": 1.0, **fields}))

    def norm(self, norm: Norm, kind: int = NORM, **fields: Any) -> None:
        """A norm of the residual stream, or another operation that norms."""
        places = {"weight": self.hold(norm.weight), "bias": self.hold(norm.bias)}
        self.add(kind, option=norm.kind, eps=norm.eps, **places, **fields)

    def project(self, linear: Linear, kind: int = PROJECT, **fields: Any) -> None:
        """A linear layer, or another operation with the same weight."""
        self.check(linear, kind, fields["origin"], fields.get("to", TO_HEADS))
        outputs, inputs = linear.weight.shape
        places = {"weight": self.lay(panels(linear.weight)), "bias": self.hold(padded(linear.bias))}
        self.add(kind, outputs=outputs, inputs=inputs, **places, **fields)

    def check(self, linear: Linear, kind: int, origin: int, to: int) -> None:
        """See that a linear layer has the sizes that this place has room for.

        Raises:
            NoProgramError: it has others, or another dtype than the model's embeddings.
        """
        outputs, inputs = linear.weight.shape
        given = {NORMED: self.hidden, ATTENDED: self.heads * self.size, INNER: self.inner}[origin]
        heads = (self.heads + 2 * self.key_heads) * self.size
        wanted = {
            TO_RESIDUAL: self.hidden,
            TO_LOGITS: self.vocabulary,
            TO_HEADS: heads if origin == NORMED else self.hidden,
        }
        if inputs != given or outputs != (self.inner if kind != PROJECT else wanted[to]):
            raise NoProgramError("a layer has other sizes than the first one, or than its configuration says")
        if linear.weight.dtype != self.dtype or inputs % 2:
            raise NoProgramError("its weights are of several dtypes, or of an odd size")

    def program(self) -> Program:
        """As the library takes it.

        Raises:
            NoProgramError: the library has no code for it.
        """
        if self.dtype not in DTYPES:
            raise NoProgramError(f"there is no native code for {self.dtype}")
        if any(tensor.device.type != "cpu" for tensor in self._held):
            raise NoProgramError("its weights are not on the CPU")
        if (
            self.hidden % PANEL
            or self.inner % PANEL
            or self.size % 16
            or self.heads % self.key_heads
            or self.size > 512
        ):
            raise NoProgramError("its sizes are no multiples of what the native code computes together")
        return Program(
            dtype=DTYPES[self.dtype],
            hidden=self.hidden,
            heads=self.heads,
            key_heads=self.key_heads,
            size=self.size,
            inner=self.inner,
            vocabulary=self.vocabulary,
            count=len(self.ops),
            scale=self.scale,
            cap=self.cap,
            ops=(Op * len(self.ops))(*self.ops),
        )


def norm_of(module: nn.Module | None, like: torch.dtype = torch.float32) -> Norm:
    """What norm a module is, found out by what it gives; none where there is no module.

    Args:
        like: what a norm without a weight is given.

    Raises:
        NoProgramError: it is none that is known.
    """
    if module is None:
        return Norm()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
    shape = getattr(module, "normalized_shape", None)
    if weight is None and shape is not None and len(shape) == 1 and not list(module.parameters()):
        weight = torch.ones(shape[0], dtype=like)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        raise NoProgramError(f"{type(module).__name__} is no norm that is known")
    plain = weight.detach().float().contiguous()
    added = None if bias is None else bias.detach().float().contiguous()
    known = [
        Norm(ROOT_MEAN_SQUARE, plain, added, eps),
        Norm(ROOT_MEAN_SQUARE, plain + 1, added, eps),
        Norm(LAYER_NORM, plain, added, eps),
        Norm(LAYER_NORM, plain + 1, added, eps),
    ]
    x = torch.sin(torch.arange(2 * len(weight), dtype=torch.float32) * 1.7 + 0.3).view(2, -1).to(weight.dtype) + 0.5
    with torch.no_grad():
        wanted = module(x).float()
    for norm, factor in zip(known, (plain, plain + 1) * 2, strict=True):
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True) if norm.kind == LAYER_NORM else wide
        found = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * factor
        found = found if added is None else found + added
        if (found - wanted).norm() <= (1e-5 if weight.dtype == torch.float32 else 1e-2) * wanted.norm():
            return norm
    raise NoProgramError(f"{type(module).__name__} is no norm that is known")


def linear_of(module: nn.Module) -> Linear:
    """A linear layer, also where its weight is stored the other way round.

    Raises:
        NoProgramError: it is none, or somebody has changed what it does.
    """
    kind = type(module).__name__
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    falcon = kind == "FalconLinear" and type(module).__module__.startswith("transformers.")
    if not (type(module) in (nn.Linear, Conv1D) or falcon) or type(weight) is not nn.Parameter:
        raise NoProgramError(f"{kind} is no plain linear layer")
    weight = weight.detach()
    return Linear(weight.t() if type(module) is Conv1D else weight, None if bias is None else bias.detach())
