"""The small operations of a layer as one kernel each, for captured steps on a GPU.

A model that is written to be read starts some fifty kernels per layer: seven for a norm, ten for the rotation of
queries and keys, two for a gated unit. Each takes microseconds whatever it computes, while a step of a few rows should
take the time of reading the weights. Here each of these is one kernel, rounded where the model rounds.

What a model's modules compute is found out by trying: a module keeps its own way unless ours gives the same numbers.
On a CPU the same code runs through PyTorch, so that all of it but the kernels is tested without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import nn

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Difference of two results, as a share of their size, up to which they count as the same."""

ROTATION = "apply_rotary_pos_emb"
"""The function in a model's file that rotates queries and keys."""


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> torch.Tensor:
    """Root mean square norm over the last dimension, computed in float32.

    Args:
        weight: (size,).
        shift: 0 multiplies the rounded result by the weight, as Llama does; 1 multiplies by one plus the weight and
            rounds then, as Gemma does.
    """
    if x.is_cuda:
        from .small_kernels import launch_norm

        return launch_norm(x, weight, eps, shift)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (shift + weight.float())).to(x.dtype) if shift else weight * wide.to(x.dtype)


def rotated(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, (batch, heads, rows, size), rotated by the angles of their rows, (batch, rows, size)."""
    if query.is_cuda:
        from .small_kernels import launch_rotation

        return launch_rotation(query, key, cosines, sines)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cosines[:, None] + torch.cat((-second, first), -1) * sines[:, None]

    return turned(query), turned(key)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """SiLU of the gate, rounded, times the other."""
    if gate.is_cuda:
        from .small_kernels import launch_gate

        return launch_gate(gate, up)
    return nn.functional.silu(gate) * up


class Fused:
    """Inside a `with` block, the modules of a model that were found to compute these operations run them so.

    Args:
        model: whose step is captured inside.

    Attributes:
        kinds: the classes of modules, and functions, that ours stand in for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[MutableMapping[str, Any], str, Any]] = []
        self._before: list[Any] = []
        self.kinds: set[str] = set()
        tried: dict[object, float | None] = {}
        for module in model.modules():
            if "forward" in vars(module):  # somebody else's way
                continue
            made = _for_norm(module, tried) or _for_unit(module, tried)
            if made is not None:
                self._put(vars(module), "forward", made, type(module).__name__)
        self._add_rotation(model)

    def _put(self, names: MutableMapping[str, Any], name: str, ours: Any, kind: str) -> None:
        self._places.append((names, name, ours))
        self.kinds.add(kind)

    def _add_rotation(self, model: nn.Module) -> None:
        for file in dict.fromkeys(type(module).__module__ for module in model.modules()):
            names = vars(sys.modules[file])
            theirs = names.get(ROTATION)
            parameter = next(model.parameters())
            if callable(theirs) and _rotates(theirs, parameter):
                self._put(names, ROTATION, partial(_rotation, theirs), ROTATION)

    def __enter__(self) -> None:
        self._before = [names.get(name, self) for names, name, _ in self._places]
        for names, name, ours in self._places:
            names[name] = ours

    def __exit__(self, *error: object) -> None:
        for (names, name, _), before in zip(self._places, self._before, strict=True):
            if before is self:
                del names[name]
            else:
                names[name] = before


def _sample(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Numbers that no result depends on by chance, without the caller's generator."""
    count = torch.arange(torch.Size(shape).numel(), device=like.device, dtype=torch.float32)
    return torch.sin(count * 1.7 + 0.3).view(shape).to(like.dtype)


def _same(theirs: Callable[..., Any], ours: Callable[..., Any], *inputs: torch.Tensor) -> bool:
    """Whether two functions give the same numbers."""
    try:
        with torch.no_grad():
            wanted, found = theirs(*inputs), ours(*inputs)
    except Exception:  # whatever the module's own way needs beside these inputs
        return False
    pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
    return all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and float((a.double() - b.double()).norm()) <= TOLERANCE.get(a.dtype, 0.0) * float(a.double().norm())
        for a, b in pairs
    )


def _for_norm(module: nn.Module, tried: dict[object, float | None]) -> Callable[..., Any] | None:
    """Ours in place of a root mean square norm; None where it is no such."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "Norm" not in type(module).__name__ or not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
        return None
    if weight.ndim != 1 or weight.dtype not in TOLERANCE or getattr(module, "bias", None) is not None:
        return None
    kind = type(module), weight.shape, weight.dtype
    if kind not in tried:
        x = _sample(weight, 3, len(weight))
        tried[kind] = next(
            (shift for shift in (0.0, 1.0) if _same(module, partial(norm, weight=weight, eps=eps, shift=shift), x)),
            None,
        )
    shift, theirs = tried[kind], module.forward
    if shift is None:
        return None

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != weight.dtype:
            out: torch.Tensor = theirs(hidden_states)
            return out
        return norm(hidden_states, weight, eps, shift)

    return forward


def _for_unit(module: nn.Module, tried: dict[object, float | None]) -> Callable[..., Any] | None:
    """Ours in place of a gated unit with SiLU; None where it is no such."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = parts
    if not all(isinstance(part, nn.Linear) for part in parts) or gate is None or up is None or down is None:
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = down(gated(gate(x), up(x)))
        return out

    kind = type(module), gate.weight.shape, gate.weight.dtype, type(getattr(module, "act_fn", None))
    if kind not in tried:
        x = _sample(gate.weight, 1, 2, gate.in_features)
        tried[kind] = 0.0 if _same(module, forward, x) else None
    return None if tried[kind] is None else forward


def _rotation(theirs: Callable[..., Any], q: Any, k: Any, cos: Any, sin: Any, *others: Any, **named: Any) -> Any:
    """Ours, for what it is made for."""
    if others or named or cos.ndim != 3 or cos.shape[-1] != q.shape[-1] or cos.dtype != q.dtype:
        return theirs(q, k, cos, sin, *others, **named)
    return rotated(q, k, cos, sin)


def _rotates(theirs: Callable[..., Any], like: torch.Tensor) -> bool:
    """Whether a function rotates as ours does."""
    angles = _sample(like, 1, 3, 4).repeat(1, 1, 2)
    query, key = _sample(like, 1, 4, 3, 8), _sample(like, 1, 2, 3, 8) * 0.5
    return _same(theirs, rotated, query, key, torch.cos(angles), torch.sin(angles))
