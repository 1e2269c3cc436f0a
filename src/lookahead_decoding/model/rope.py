"""Rotary scalings whose frequencies depend on how long the text is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .evaluate import cache_in, prepared, text_config


@dataclass(frozen=True)
class Switch:
    """A position from which on a model turns its queries and keys by other frequencies.

    What was computed before keeps the old ones, so no forward may hold positions of both sides.

    Attributes:
        position: the first one on the far side.
        plain_after: the frequencies change with every token there (dynamic NTK), so that each needs its own forward.
        renews: the model computes all keys and values anew when it comes to `position` (as Phi-3 does).
        forgets: it drops all keys and values there and does not compute them anew (Phi-3 in transformers 5.16):
            `generate` goes on as if there were no text.
    """

    position: int
    plain_after: bool
    renews: bool
    forgets: bool = False

    def reach(self, root: int) -> int:
        """How deep a tree may be whose root stands at a position."""
        if root < self.position:
            return self.position - 1 - root
        return 0 if self.plain_after or (self.renews and root == self.position) else 1 << 30

    def splits(self, start: int, end: int) -> bool:
        """Whether tokens of the positions from `start` to `end` must be fed in one forward, as `generate` does."""
        return end > self.position and (self.plain_after or start < self.position)


def frequencies_change(model: PreTrainedModel) -> bool:
    """Whether a model's rotary frequencies depend on how long the text is."""
    return next(_changing(text_config(model)), None) is not None


def _changing(config: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings of a configuration whose frequencies change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            yield entry


def switch_of(model: PreTrainedModel) -> Switch | None:
    """The switch that a model's configuration speaks of, if there is one."""
    config = text_config(model)
    entry = next(_changing(config), None)
    if entry is None:
        return None
    kind = entry["rope_type"]
    position = entry.get("original_max_position_embeddings") or config.max_position_embeddings
    fed = _fed_at(model, position) if kind == "longrope" else None
    return Switch(position, kind == "dynamic", renews=fed == position + 1, forgets=fed == 1)


class _Full:
    """A stand-in for a cache that holds so many tokens."""

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, *args: Any) -> int:
        return self._length


def _fed_at(model: PreTrainedModel, position: int) -> int | None:
    """Tokens that a model is fed at a position without a cache; None if it keeps its cache, as most do.

    It says so where `generate` asks for its inputs.
    """
    ids = torch.zeros(1, position + 1, dtype=torch.long)
    inputs = prepared(model, ids, _Full(position), attention_mask=None, next_sequence_length=1)
    return None if cache_in(inputs) is not None else int(inputs["input_ids"].shape[1])
