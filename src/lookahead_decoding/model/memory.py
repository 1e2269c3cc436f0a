"""What was found out about a model: it costs forwards or compilation, so each model pays once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from ..price.budget import StepTimes


class Memory:
    """Of one model.

    Attributes:
        probed: how it evaluates candidates, by what that depends on.
        times: of its steps, by what they depend on.
        free: caches with captured steps that wait for a request.
        told: what its user was warned of.
        made: copies of the weights and compiled steps, by what they are, each with what it was made from.
    """

    def __init__(self) -> None:
        self.probed: dict[object, Any] = {}
        self.times: dict[object, StepTimes] = {}
        self.free: list[Any] = []
        self.told: set[str] = set()
        self.made: dict[str, tuple[object, Any]] = {}

    def close(self) -> None:
        """Give back the memory of what is kept for later requests: captured steps with their caches, and copies."""
        self.free.clear()
        self.made.clear()


_memories: WeakKeyDictionary[PreTrainedModel, Memory] = WeakKeyDictionary()
"""Hangs on the models' lives and on nothing else, which is why it is the one piece of global state."""


def memory_of(model: PreTrainedModel) -> Memory:
    """What is known of a model; kept as long as the model lives."""
    return _memories.setdefault(model, Memory())
