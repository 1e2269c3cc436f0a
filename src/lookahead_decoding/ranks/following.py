"""Which logits processors and stopping criteria can follow the tokens of another rank's walk.

A rank that takes tokens which another one has chosen has no scores for them. Its processors are called all the same,
with the text and with scores that say nothing, so that what they remember goes on as on one device. That is right for
what depends on the text alone, which is tried here on copies.
"""

from __future__ import annotations

import copy
import types
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from ..verify.sampler import Criterion, Processor

TRIALS = 3
"""Calls of a trial, each with a text that is one token longer: some begin to remember with the second."""

ALONE = "decode on one device, or make it depend on the text alone"


def refuse_what_cannot_follow(
    processors: Sequence[Processor], criteria: Sequence[Criterion], text: torch.Tensor, vocabulary: int
) -> None:
    """Refuse processors and criteria whose state cannot be that of one device.

    Args:
        processors, criteria: of one sequence; they are left as they are.
        text: its prompt, (1, length).
        vocabulary: scores of a token.

    Raises:
        ValueError: one cannot be copied, keeps state where copies share it, or has a state that depends on the scores.
    """
    nothing = torch.zeros(1, vocabulary, device=text.device)
    scores = torch.linspace(0, 1, vocabulary, device=text.device)[None]
    random = torch.random.get_rng_state()
    try:
        for processor in processors:
            _try(processor, text, [nothing, scores])
        for criterion in criteria:
            _try(criterion, text, [None])
    finally:
        torch.random.set_rng_state(random)


def _try(item: Any, text: torch.Tensor, scores: Sequence[torch.Tensor | None]) -> None:
    """Call a copy with each of some scores; afterwards they have to be alike, and the original as it was."""
    name = getattr(item, "__name__", type(item).__name__)
    try:
        before = state_of(item)
        copies = [copy.deepcopy(item) for _ in scores]
    except Exception as error:
        raise ValueError(f"{name} cannot be copied ({error}), and ranks need to: {ALONE}") from error
    try:
        for one, given in zip(copies, scores, strict=True):
            for longer in range(TRIALS):
                grown = torch.cat([text, text[:, :1].expand(1, longer)], 1)
                one(grown, given if given is None else given.clone())
    except Exception as error:
        raise ValueError(f"{name} fails where it is tried with scores that say nothing ({error}): {ALONE}") from error
    if state_of(item) != before:
        raise ValueError(f"{name} keeps state outside of itself, which copies share: make it a class, with a copy each")
    if any(state_of(one) != state_of(copies[0]) for one in copies):
        raise ValueError(f"{name} remembers scores, which only one of the ranks has: {ALONE}")


def state_of(item: Any, seen: dict[int, int] | None = None) -> Any:
    """What an object holds, all the way down, as values that can be compared.

    Raises:
        TypeError: there is something in it that cannot be looked into.
    """
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes, type, types.ModuleType)):
        return item
    seen = {} if seen is None else seen
    if id(item) in seen:
        return "seen", seen[id(item)]
    seen[id(item)] = len(seen)
    if isinstance(item, torch.Tensor):
        flat = item.detach().cpu().contiguous().reshape(-1)
        content = zlib.crc32(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else 0
        return tuple(item.shape), str(item.dtype), content
    if isinstance(item, torch.Generator):
        return state_of(item.get_state(), seen)
    if isinstance(item, dict):
        return tuple((state_of(key, seen), state_of(value, seen)) for key, value in item.items())
    if isinstance(item, (list, tuple)):
        return tuple(state_of(value, seen) for value in item)
    if isinstance(item, (set, frozenset)):
        return frozenset(map(repr, item))
    if isinstance(item, types.FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or ()]
        used = [item.__globals__.get(name) for name in item.__code__.co_names]
        kept = [value for value in used if isinstance(value, (int, float, list, dict, set))]
        return tuple(state_of(value, seen) for value in (*cells, *kept, vars(item)))
    if isinstance(item, types.MethodType):
        return state_of(item.__self__, seen)
    if hasattr(item, "__dict__") and not hasattr(type(item), "__slots__") and type(item).__module__ != "numpy":
        return type(item).__name__, state_of(vars(item), seen)
    if isinstance(item, types.BuiltinFunctionType):
        return item.__name__
    parts = item.__reduce_ex__(2)
    return type(item).__name__, parts if isinstance(parts, str) else state_of(
        [*parts[1:3], *map(list, _rest(parts))], seen
    )


def _rest(parts: tuple[Any, ...]) -> list[Any]:
    """The items of a list or dict that a reduced object is."""
    return [part for part in parts[3:5] if part is not None]
