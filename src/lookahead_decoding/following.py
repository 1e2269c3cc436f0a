"""Which logits processors can follow the tokens of another rank's walk.

A rank that takes tokens which another one has chosen has no scores for them. Its processors are called all the same,
with the text and with scores that say nothing, so that what they remember goes on as on one device. That is right for
what depends on the text alone, which is tried here on copies.
"""

from __future__ import annotations

import copy
import dis
import types
from collections.abc import Sequence
from typing import Any

import torch

from .choose import Criterion, Processor


def refuse_what_cannot_follow(
    processors: Sequence[Processor], criteria: Sequence[Criterion], text: torch.Tensor, vocabulary: int
) -> None:
    """Refuse processors and criteria whose state cannot be that of one device.

    Args:
        text: the prompt, (1, length).
        vocabulary: scores of a token.

    Raises:
        ValueError: one cannot be copied, which is needed to go back, or its state depends on the scores.
    """
    for item in (*processors, *criteria):
        name = getattr(item, "__name__", type(item).__name__)
        if isinstance(item, types.FunctionType) and _rebinds(item):
            raise ValueError(f"{name} keeps state outside of itself, which ranks cannot follow: make it a class")
        try:
            copies: list[Any] = [copy.deepcopy(item), copy.deepcopy(item)]
        except Exception as error:
            raise ValueError(f"{name} cannot be copied ({error}), and ranks need to: decode on one device") from error
        if item not in processors:
            continue
        first, second = copies
        random = torch.random.get_rng_state()
        nothing = torch.zeros(1, vocabulary, device=text.device)
        scores = torch.linspace(0, 1, vocabulary, device=text.device)[None]
        try:
            first(text, nothing)
            second(text, scores)
        except Exception as error:
            raise ValueError(f"{name} fails on scores that say nothing ({error}): decode on one device") from error
        finally:
            torch.random.set_rng_state(random)
        if state_of(first) != state_of(second):
            raise ValueError(f"{name} remembers scores, which only one of the ranks has: decode on one device")


def _rebinds(function: types.FunctionType) -> bool:
    """Whether a function assigns to variables outside of itself."""
    outer = set(function.__code__.co_freevars)
    return any(
        (step.opname == "STORE_DEREF" and step.argval in outer) or step.opname == "STORE_GLOBAL"
        for step in dis.get_instructions(function)
    )


def state_of(item: Any, seen: dict[int, int] | None = None) -> Any:
    """What an object holds, all the way down, as values that can be compared."""
    if item is None or isinstance(item, (bool, int, float, complex, str, bytes)):
        return item
    seen = {} if seen is None else seen
    if id(item) in seen:
        return ("seen", seen[id(item)])
    seen[id(item)] = len(seen)
    if isinstance(item, torch.Tensor):
        flat = item.detach().cpu().contiguous().reshape(-1)
        return tuple(item.shape), str(item.dtype), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    if isinstance(item, torch.Generator):
        return bytes(item.get_state().tolist())
    if isinstance(item, dict):
        return tuple((state_of(key, seen), state_of(value, seen)) for key, value in item.items())
    if isinstance(item, (list, tuple)):
        return tuple(state_of(value, seen) for value in item)
    if isinstance(item, (set, frozenset)):
        return frozenset(map(repr, item))
    if isinstance(item, types.FunctionType):
        return tuple(state_of(cell.cell_contents, seen) for cell in item.__closure__ or ())
    return type(item).__name__, state_of(getattr(item, "__dict__", None), seen)
