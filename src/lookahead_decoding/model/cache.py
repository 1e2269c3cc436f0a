"""Keys and values of a batch whose sequences grow by different amounts, and the states of recurrent layers.

Every attention layer's buffers are allocated once, for the length that the request can reach plus one tree; those of a
layer with a window for the window, some slack and one tree. A step writes its rows behind each sequence's committed
tokens, and `commit` moves the accepted rows to the front of them. Nothing is concatenated, and no cost grows with the
context.

Sequences are stored without their left padding: slot and position are the same number, or differ by what a window has
left behind.

Recurrent layers keep transformers' own cache layers. Their states cannot be cut back; `save` and `restore` copy them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

ROOM = 256
"""Rows of a tree that layers with a window keep room for, beside the window."""

SLACK = 64
"""Slots of such layers that are filled before what has left the window makes way; a quarter of a large window."""


@dataclass(frozen=True)
class Span:
    """How far back the rows of a layer see.

    Attributes:
        window: positions, their own included; None is all of them.
        chunked: the positions are those since the last multiple of `window`, and not the last ones.
    """

    window: int | None = None
    chunked: bool = False


class Slots:
    """Where a step's rows go, and the buffers they go to: shared by all layers of one window.

    Attributes:
        lengths: committed tokens of each sequence.
        starts: position of the first slot of each sequence; 0 without a window.
        capacity: slots per sequence.
        window: positions that are kept at least.
        causal: this forward has no mask of ours, so a layer with a window gives out no more than that.
        rows: the sequences of this forward; None is all of them.
        index: in a compiled step, the sequences, (batch, 1), and the slot of every row, (batch, rows); otherwise None.
        stacks: buffers of layers of one shape, (layers, batch, key heads, capacity, size).
    """

    def __init__(self, lengths: list[int], capacity: int, window: int | None = None) -> None:
        self.lengths = lengths
        self.starts = [0] * len(lengths)
        self.capacity = capacity
        self.window = window
        self.causal = False
        self.rows: slice | None = None
        self.index: tuple[torch.Tensor, torch.Tensor] | None = None
        self.stacks: list[torch.Tensor] = []
        self._layers = 0
        self._passed = 0  # slots that the rows of this forward leave behind at once
        self._free: dict[str, Iterator[torch.Tensor]] = {}

    def expect(self) -> None:
        """One more layer will take a buffer of each kind."""
        self._layers += 1

    @torch.inference_mode(False)  # the caller's may end before the next request
    def take(self, kind: str, like: torch.Tensor) -> torch.Tensor:
        """A layer's buffer of a kind ("keys" or "values") for rows like these.

        Layers of one shape lie in one stack, so that one copy serves them all; the first layer says which shape that
        is, and a layer of another gets a buffer of its own.
        """
        heads, size = like.shape[1], like.shape[3]
        shape = (len(self.lengths), heads, self.capacity, size)
        if kind not in self._free:
            self.stacks.append(like.new_zeros(self._layers, *shape))
            self._free[kind] = iter(self.stacks[-1])
        own = next(self._free[kind], None)
        if own is None or own.shape != shape or own.dtype != like.dtype or own.device != like.device:
            self.stacks.append(like.new_zeros(1, *shape))
            own = self.stacks[-1][0]
        return own

    @property
    def held(self) -> list[int]:
        """Committed tokens of each sequence that are still in their slots."""
        return [length - start for length, start in zip(self.lengths, self.starts, strict=True)]

    @property
    def _now(self) -> list[int]:
        """`held`, of the sequences of this forward."""
        return self.held[self.rows] if self.rows else self.held

    @property
    def longest(self) -> int:
        """The most that a sequence of this forward holds."""
        return max(self._now)

    @property
    def level(self) -> bool:
        """Whether all sequences of this forward hold equally much."""
        held = self._now
        return held.count(held[0]) == len(held)

    @property
    def unseen(self) -> int:
        """Slots that have left the window of every row of this forward."""
        return max(0, self.longest - (self.window - 1)) if self.window and self.causal else 0

    @property
    def chunk(self) -> int:
        """Rows that always have room."""
        return self.capacity - min(self.window - 1 if self.window else 0, self.capacity)

    def make_room(self, rows: int) -> None:
        """Let go of what has left the window, for sequences that have no slots left for so many rows.

        Of more rows than have room, which may be a prompt's in sequences that are equally long, the last ones are kept.
        """
        self._passed = 0
        if self.window is None or (max(self.held) + rows <= self.capacity):
            return
        if rows > self.chunk:
            self._passed = self.held[0] + rows - self.window
            return
        for b, held in enumerate(self.held):
            if held + rows > self.capacity:
                left = held - (self.window - 1)
                for stack in self.stacks:
                    stack[:, b, :, : self.window - 1] = stack[:, b, :, left:held].clone()
                self.starts[b] += left

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Write the step's rows, (batch, key heads, rows, size), into a buffer, and return its slots in use."""
        if self.index is not None:
            sequence, slots = self.index
            buffer[sequence, :, slots] = states.transpose(1, 2)
            return buffer
        if self.rows is not None:
            buffer = buffer[self.rows]
        every, rows = self._now, states.shape[2]
        end = max(every) + rows
        if self._passed:
            whole = torch.cat([buffer[:, :, : end - rows], states], 2)
            buffer[:, :, : end - self._passed] = whole[:, :, self._passed :]
            return whole[:, :, self.unseen :]
        if every.count(end - rows) == len(every):
            buffer[:, :, end - rows : end] = states
            return buffer[:, :, self.unseen : end]
        for b, held in enumerate(every):
            buffer[b, :, held : held + rows] = states[b]
        return buffer[:, :, :end]

    def settle(self) -> None:
        """To be called after each forward, before anything of it is committed."""
        self.starts[:] = [start + self._passed for start in self.starts]
        self._passed = 0

    def keep(self, sequence: int, path: Sequence[int]) -> None:
        """Move the rows of a path to the front of the step's rows."""
        if list(path) == list(range(len(path))):
            return
        held = self.lengths[sequence] - self.starts[sequence]
        nodes = torch.tensor(path) + held
        for stack in self.stacks:
            kept = stack[:, sequence].index_select(2, nodes.to(stack.device, non_blocking=True))
            stack[:, sequence, :, held : held + len(path)] = kept

    def spread(self, row: int, rows: int) -> None:
        """Give every sequence the first `rows` rows of the step that one of them has, and settle."""
        anew = self._passed > 0  # then all that is held was moved, in that sequence alone
        self.settle()
        held = self.held[row]
        new = slice(0 if anew else held, held + rows)
        for stack in self.stacks:
            stack[:, :, :, new] = stack[:, row : row + 1, :, new].clone()


class TreeCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not typed
    """One layer's keys and values, (batch, key heads, capacity, head size) each."""

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self.slots = slots
        self.is_sliding = slots.window is not None
        slots.expect()

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
        return self.slots.write(self.keys, key_states), self.slots.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        slots = self.slots
        return slots.longest - slots.unseen + query_length, slots.starts[0] + slots.unseen

    def get_seq_length(self) -> int:
        return max(self.slots.lengths)

    def get_max_length(self) -> int:
        return self.slots.capacity


class IndexedTreeCacheLayer(TreeCacheLayer):
    """A layer of indexed sparse attention, which keeps a key per position for its indexer as well."""

    def update_indexer(self, states: torch.Tensor) -> torch.Tensor:
        """Write the indexer's keys of the step, (batch, rows, size), and return all slots in use."""
        if not hasattr(self, "indexer"):
            self.indexer = self.slots.take("indexer", states[:, None])
        return self.slots.write(self.indexer, states[:, None])[:, 0]


class HybridTreeCacheLayer(TreeCacheLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A layer with a recurrent state beside its keys and values."""

    def __init__(self, slots: Slots, number_of_states: int) -> None:
        TreeCacheLayer.__init__(self, slots)
        LinearAttentionLayer.__init__(self, number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        half: Any = TreeCacheLayer if args else LinearAttentionLayer
        half.lazy_initialization(self, *args, **kwargs)


class TreeCache(Cache):  # type: ignore[misc]
    """The cache that the target hands to the model.

    Args:
        config: of the text model.
        batch: sequences.
        capacity: slots per sequence: its final length plus one tree.
        room: rows of the largest tree, for layers with a window.
        copies: keep transformers' own layers, as if all were recurrent.
        name: by which the model's forward takes it, if it is to go into one.

    Attributes:
        lengths: committed tokens of each sequence.
        kinds: of layers that attend, by the name that the model's masks go by, each with its span.
        stateful: layers whose state cannot be cut back.
    """

    def __init__(
        self,
        config: Any,
        batch: int,
        capacity: int,
        room: int = ROOM,
        copies: bool = False,
        name: str | None = None,
    ) -> None:
        self.name = name
        self.lengths = [0] * batch
        self.capacity = capacity
        self.room = room
        self._slots: dict[int | None, Slots] = {}
        stock = DynamicCache(config=config).layers
        super().__init__(layers=stock if copies else [self._layer(layer) for layer in stock])
        self.kinds = kinds_of(config, stock)
        self.stateful = [layer for layer in self.layers if not _is_sliced(layer)]

    def _layer(self, stock: Any) -> Any:
        """A layer of ours that does what a layer of transformers does; that layer itself where it is recurrent."""
        window = getattr(stock, "sliding_window", None)
        kind = type(stock).__name__
        if kind in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            return TreeCacheLayer(self.slots(window))
        if kind == "DynamicIndexedLayer":
            return IndexedTreeCacheLayer(self.slots(None))
        if kind.startswith("LinearAttentionAnd"):
            return HybridTreeCacheLayer(self.slots(window), stock.number_of_states)
        return stock

    def slots(self, window: int | None) -> Slots:
        """The slots of all layers with a window."""
        if window not in self._slots:
            capacity = self.capacity
            if window is not None:
                capacity = min(capacity, window - 1 + self.room + max(SLACK, window // 4))
            self._slots[window] = Slots(self.lengths, capacity, window)
        return self._slots[window]

    @property
    def all_slots(self) -> list[Slots]:
        return list(self._slots.values())

    @property
    def chunk(self) -> int:
        """Rows of the largest forward that all layers have room for."""
        return min([s.chunk for s in self.all_slots if s.capacity < self.capacity], default=self.capacity)

    @property
    def level(self) -> bool:
        """Whether all sequences are equally long, and have left equally much behind."""
        return self.lengths.count(self.lengths[0]) == len(self.lengths) and all(s.level for s in self.all_slots)

    def clear(self) -> None:
        """Forget what is committed."""
        self.lengths[:] = [0] * len(self.lengths)
        for slots in self._slots.values():
            slots.starts[:] = [0] * len(self.lengths)

    def make_room(self, rows: int) -> None:
        """To be called before each forward of so many rows."""
        for slots in self._slots.values():
            slots.make_room(rows)

    def settle(self) -> None:
        """To be called after each forward; `commit` and `spread` do."""
        for slots in self._slots.values():
            slots.settle()

    def take_rows(self, rows: slice | None) -> None:
        """The sequences of the next forwards; None is all of them."""
        for slots in self._slots.values():
            slots.rows = rows

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the keys and values of each sequence's path, root first, and drop the rest of the step.

        An empty path keeps nothing, for a sequence that has ended.
        """
        self.settle()
        for sequence, path in enumerate(paths):
            for slots in self._slots.values():
                slots.keep(sequence, path)
            self.lengths[sequence] += len(path)

    def spread(self, row: int, rows: int) -> None:
        """Commit the first `rows` rows of one sequence's step for all sequences."""
        for slots in self._slots.values():
            slots.spread(row, rows)
        self.lengths[:] = [length + rows for length in self.lengths]

    @property
    def bytes_per_token(self) -> int:
        """That `taken` gives, once a forward has shown what they are."""
        return sum(stack[:, 0, :, 0].nbytes for slots in self.all_slots for stack in slots.stacks)

    def taken(self, sequence: int, first: int, tokens: int) -> torch.Tensor:
        """Keys and values of committed tokens from a position on, as bytes."""
        found = []
        for slots in self.all_slots:
            at = first - slots.starts[sequence]
            found += [stack[:, sequence, :, at : at + tokens] for stack in slots.stacks]
        return torch.cat([rows.contiguous().view(torch.uint8).flatten() for rows in found])

    def put(self, sequence: int, first: int, tokens: int, content: torch.Tensor) -> None:
        """Commit tokens whose keys and values another cache of this kind gave; those that are committed stay.

        Args:
            first: position of the first one, at most the committed length.
            content: what `taken` gave there.
        """
        new = first + tokens - self.lengths[sequence]
        if new <= 0:
            return
        self.make_room(new)
        for slots in self.all_slots:
            at = slots.held[sequence]
            for stack in slots.stacks:
                place = stack[:, sequence, :, at : at + new]
                rows = stack[:, 0, :, :1].expand(-1, -1, tokens, -1)
                size = rows.numel() * rows.element_size()
                part, content = content[:size], content[size:]
                place.copy_(part.clone().view(stack.dtype).view(rows.shape)[:, :, tokens - new :])
        self.lengths[sequence] += new

    def save(self) -> list[dict[str, Any]]:
        """A copy of the states of recurrent layers."""
        return [copy.deepcopy(_state(layer)) for layer in self.stateful]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Put saved states back."""
        for layer, state in zip(self.stateful, states, strict=True):
            vars(layer).update(copy.deepcopy(state))

    def select(self, rows: Sequence[int]) -> None:
        """Let the states of recurrent layers be those of these sequences, in this order."""
        index = torch.tensor(rows)
        for layer in self.stateful:
            if isinstance(layer, HybridTreeCacheLayer):
                LinearAttentionLayer.reorder_cache(layer, index)
            else:
                layer.reorder_cache(index)

    def load(self, past: Cache, rows: Sequence[Sequence[int]]) -> None:
        """Take over the keys, values and states of another cache.

        Args:
            past: a cache as `generate` leaves it; a layer that kept its last positions only is placed at its end.
            rows: for each sequence, the slots of `past` that hold its tokens, padding left out. If there are more than
                sequences in `past`, that one is held several times.
        """
        self.lengths[:] = [len(slots) for slots in rows]
        for window, slots in self._slots.items():
            room = slots.capacity < self.capacity
            slots.starts[:] = [max(0, n - window) if window and room else 0 for n in self.lengths]
        for layer, other in zip(self.layers, past.layers, strict=True):
            if layer in self.stateful:
                vars(layer).update(copy.deepcopy(_state(other)))
            if not isinstance(layer, TreeCacheLayer) or not other.is_initialized:
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(other.keys, other.values)
            missing = other.get_seq_length() - other.keys.shape[2]
            indexer = getattr(other, "indexer_keys", None)
            if indexer is not None and not hasattr(layer, "indexer"):
                layer.indexer = layer.slots.take("indexer", indexer[:, None])
            for b, sources in enumerate(rows):
                first = max(missing - (sources[0] if sources else 0), layer.slots.starts[b])
                source = torch.tensor(sources[first:], dtype=torch.long, device=layer.keys.device) - missing
                target = slice(first - layer.slots.starts[b], len(sources) - layer.slots.starts[b])
                layer.keys[b, :, target] = other.keys[b % len(other.keys)][:, source]
                layer.values[b, :, target] = other.values[b % len(other.keys)][:, source]
                if indexer is not None:
                    layer.indexer[b, 0, target] = indexer[b % len(indexer)][source]

    def store(self, past: Cache, starts: Sequence[int], share: bool = True) -> None:
        """Write everything committed into another cache, as `generate` would have left it.

        Args:
            past: a dynamic cache of the same model.
            starts: left padding of each sequence, whose slots of `past` hold zeros; as many of the first sequences are
                written. A single one without padding is handed over without a copy if `share`.
            share: nobody writes into this cache any more.
        """
        if len(past.layers) < len(self.layers):  # a cache without a configuration makes its layers as they come
            past.layers += [DynamicLayer() for _ in range(len(self.layers) - len(past.layers))]
        length = max(start + own for start, own in zip(starts, self.lengths, strict=False))
        for layer, other in zip(self.layers, past.layers, strict=True):
            if layer in self.stateful:
                vars(other).update(copy.deepcopy(_state(layer)))
            if not isinstance(layer, TreeCacheLayer) or not layer.is_initialized:
                continue
            first = max(0, length - other.sliding_window + 1) if getattr(other, "is_sliding", False) else 0
            if not other.is_initialized:
                DynamicLayer.lazy_initialization(other, layer.keys, layer.values)
            other.keys = self._padded(layer.slots, layer.keys, starts, first, length, share)
            other.values = self._padded(layer.slots, layer.values, starts, first, length, share)
            if hasattr(layer, "indexer"):
                other.lazy_initialization_indexer(layer.indexer[:, 0])
                other.indexer_keys = self._padded(layer.slots, layer.indexer, starts, first, length, share)[:, 0]
            if hasattr(other, "cumulative_length"):
                other.cumulative_length = length

    def _padded(
        self, slots: Slots, buffer: torch.Tensor, starts: Sequence[int], first: int, length: int, share: bool
    ) -> torch.Tensor:
        """Positions from `first` to `length`, with left padding."""
        if share and len(starts) == 1 and not starts[0]:
            return buffer[:1, :, first - slots.starts[0] : length - slots.starts[0]]
        _, heads, _, size = buffer.shape
        padded = buffer.new_zeros(len(starts), heads, length - first, size)
        for b, (start, own) in enumerate(zip(starts, self.lengths, strict=False)):
            begin = max(first - start, slots.starts[b])
            if begin < own:  # otherwise it ended a window ago
                held = buffer[b, :, begin - slots.starts[b] : own - slots.starts[b]]
                padded[b, :, start + begin - first : start + own - first] = held
        return padded


def kinds_of(config: Any, stock: Sequence[Any]) -> dict[str, Span]:
    """The kinds of layers that attend, by the names that masks go by in transformers, with their spans.

    Args:
        config: of the text model.
        stock: the layers of its dynamic cache.
    """
    types = getattr(config, "layer_types", None)
    if not types:
        windowed = "sliding_attention" if getattr(config, "sliding_window", None) else "chunked_attention"
        windows = {getattr(layer, "sliding_window", None) for layer in stock}
        types = [windowed if window else "full_attention" for window in windows]
    kinds = {}
    for kind in sorted(set(types)):
        if kind in ("full_attention", "indexed_attention"):
            kinds[kind] = Span()
        elif kind == "sliding_attention":
            kinds[kind] = Span(config.sliding_window)
        elif kind == "chunked_attention":
            kinds[kind] = Span(config.attention_chunk_size, chunked=True)
    return kinds


def keeps_states_alone(config: Any) -> bool:
    """Whether every layer of a text model is recurrent, so that its cache does not know how long the text is."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and not any(isinstance(layer, CacheLayerMixin) for layer in layers)


def is_dummy(layer: Any) -> bool:
    """Whether a layer keeps nothing: it has no attention, or uses another layer's keys and values."""
    return type(layer).__name__ == "DummyLayer"  # not in every supported version


def _is_sliced(layer: Any) -> bool:
    """Whether a layer's cache is nothing but slots of ours, or nothing at all."""
    return (isinstance(layer, TreeCacheLayer) and not isinstance(layer, HybridTreeCacheLayer)) or is_dummy(layer)


STATE = {
    "conv_states",
    "recurrent_states",
    "has_previous_state",
    "conv_kernel_size",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
}
"""What the recurrent half of a layer keeps."""


def _state(layer: Any) -> dict[str, Any]:
    """What a layer keeps besides slots of ours."""
    both = hasattr(layer, "conv_states") and isinstance(layer, CacheLayerMixin)
    return {name: value for name, value in vars(layer).items() if not both or name in STATE}
