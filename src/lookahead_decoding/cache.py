"""Keys and values of a batch whose sequences grow by different amounts.

Every layer's buffers are allocated once, for the length that the request can reach plus one tree. A step writes its
rows behind each sequence's committed tokens, and `commit` moves the accepted rows to the front of them. Nothing
is concatenated, and no cost grows with the context.

Sequences are stored without their left padding: slot and position are the same number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


class Slots:
    """Where this step's rows go, and the buffers they go to: shared by all layers.

    Attributes:
        lengths: committed tokens of each sequence.
        capacity: slots per sequence.
        index: in a compiled step, the slot of every row, (batch, rows); otherwise None.
        stacks: buffers of layers of one shape, (layers, batch, key heads, capacity, size).
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.lengths = [0] * batch
        self.capacity = capacity
        self.index: torch.Tensor | None = None
        self.stacks: list[torch.Tensor] = []
        self._layers = layers
        self._free: dict[str, Iterator[torch.Tensor]] = {}

    def take(self, kind: str, like: torch.Tensor) -> torch.Tensor:
        """A layer's buffer of a kind ("keys" or "values") for rows like these.

        Layers of one shape lie in one stack, so that one copy serves them all; the first layer says which shape that
        is, and a layer of another gets a buffer of its own.
        """
        batch, heads, _, size = like.shape
        shape = (batch, heads, self.capacity, size)
        if kind not in self._free:
            self.stacks.append(like.new_zeros(self._layers, *shape))
            self._free[kind] = iter(self.stacks[-1])
        own = next(self._free[kind], None)
        if own is None or own.shape != shape or own.dtype != like.dtype or own.device != like.device:
            self.stacks.append(like.new_zeros(1, *shape))
            own = self.stacks[-1][0]
        return own

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def level(self) -> bool:
        """Whether all sequences are equally long."""
        return self.lengths.count(self.lengths[0]) == len(self.lengths)


class TreeCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values, (batch, key heads, capacity, head size) each."""

    is_sliding = False

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self.slots.take("keys", key_states), self.slots.take("values", value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's rows, (batch, key heads, rows, head size), and return all slots in use.

        In a compiled step that is every slot there is: how many are in use is for the mask to say.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.slots.index is not None:
            sequence = torch.arange(len(key_states), device=key_states.device)[:, None]
            self.keys[sequence, :, self.slots.index] = key_states.transpose(1, 2)
            self.values[sequence, :, self.slots.index] = value_states.transpose(1, 2)
            return self.keys, self.values
        rows = key_states.shape[2]
        end = self.slots.longest + rows
        if self.slots.level:
            self.keys[:, :, end - rows : end] = key_states
            self.values[:, :, end - rows : end] = value_states
            return self.keys[:, :, :end], self.values[:, :, :end]
        for b, length in enumerate(self.slots.lengths):
            self.keys[b, :, length : length + rows] = key_states[b]
            self.values[b, :, length : length + rows] = value_states[b]
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.longest + query_length, 0

    def get_seq_length(self) -> int:
        return self.slots.longest

    def get_max_length(self) -> int:
        return self.slots.capacity


class TreeCache(Cache):  # type: ignore[misc]
    """The cache that the target hands to the model.

    Args:
        layers: layers of the model.
        batch: sequences.
        capacity: slots per sequence: its final length plus one tree.
    """

    def __init__(self, layers: int, batch: int, capacity: int) -> None:
        self.slots = Slots(layers, batch, capacity)
        super().__init__(layers=[TreeCacheLayer(self.slots) for _ in range(layers)])

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return self.slots.lengths

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the keys and values of each sequence's path, root first, and drop the rest of the step.

        An empty path keeps nothing, for a sequence that has ended.
        """
        for sequence, path in enumerate(paths):
            length = self.lengths[sequence]
            if list(path) != list(range(len(path))):
                nodes = torch.tensor(path) + length
                for stack in self.slots.stacks:
                    kept = stack[:, sequence].index_select(2, nodes.to(stack.device, non_blocking=True))
                    stack[:, sequence, :, length : length + len(path)] = kept
            self.slots.lengths[sequence] += len(path)

    def load(self, past: Cache, rows: Sequence[Sequence[int]]) -> None:
        """Take over the keys and values of another cache.

        Args:
            past: a cache as `generate` leaves it; a layer that kept its last positions only is placed at its end.
            rows: for each sequence, the slots of `past` that hold its tokens, padding left out.
        """
        for layer, other in zip(self.layers, past.layers, strict=True):
            if not other.is_initialized:
                continue
            layer.lazy_initialization(other.keys, other.values)
            missing = other.get_seq_length() - other.keys.shape[2]
            for b, slots in enumerate(rows):
                kept = [s for s in slots if s >= missing]
                source = torch.tensor(kept, dtype=torch.long, device=layer.keys.device) - missing
                target = slice(len(slots) - len(kept), len(slots))
                layer.keys[b, :, target] = other.keys[b][:, source]
                layer.values[b, :, target] = other.values[b][:, source]
        self.slots.lengths[:] = [len(slots) for slots in rows]

    def store(self, past: Cache, starts: Sequence[int], share: bool = True) -> None:
        """Write everything committed into another cache, as `generate` would have left it.

        Args:
            past: a dynamic cache of the same model.
            starts: left padding of each sequence, whose slots of `past` hold zeros. A single sequence without padding
                is handed over without a copy if `share`.
            share: nobody writes into this cache any more.
        """
        if len(past.layers) < len(self.layers):  # a cache without a configuration makes its layers as they come
            past.layers += [DynamicLayer() for _ in range(len(self.layers) - len(past.layers))]
        length = max(start + own for start, own in zip(starts, self.lengths, strict=True))
        for layer, other in zip(self.layers, past.layers, strict=True):
            first = max(0, length - other.sliding_window + 1) if getattr(other, "is_sliding", False) else 0
            if not other.is_initialized:
                other.lazy_initialization(layer.keys, layer.values)
            other.keys = self._padded(layer.keys, starts, length, share)[:, :, first:]
            other.values = self._padded(layer.values, starts, length, share)[:, :, first:]
            if hasattr(other, "cumulative_length"):
                other.cumulative_length = length

    def _padded(self, buffer: torch.Tensor, starts: Sequence[int], length: int, share: bool) -> torch.Tensor:
        if share and len(starts) == 1 and not starts[0]:
            return buffer[:, :, :length]
        batch, heads, _, size = buffer.shape
        padded = buffer.new_zeros(batch, heads, length, size)
        for b, (start, own) in enumerate(zip(starts, self.lengths, strict=True)):
            padded[b, :, start : start + own] = buffer[b, :, :own]
        return padded
