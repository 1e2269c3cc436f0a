"""Steps of a model that can evaluate token trees: one forward with the tree's own mask."""

from __future__ import annotations

import functools
import importlib.util
import os
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..draft.tree import TokenTree
from ..verify.sampler import StepLogits
from .attention import LENGTH, dense_mask, encode_rows
from .cache import Span, TreeCache
from .evaluate import (
    OURS,
    Masks,
    as_written,
    attention_in_force,
    cache_name,
    device_of,
    evaluate,
    first_position,
    parameters_of,
    text_config,
)
from .graphs import PACKED, SIZES, Compiled, StepGraphs, padded, state_of, vary
from .memory import memory_of
from .packed import PackedLinears, copied_bytes, version_of, why_not
from .rope import frequencies_change

PREFILL_CHUNK = 2048
"""Tokens of a prompt in one forward."""

ROUND = 256
"""Slots that a captured cache is rounded up to, so that requests of similar length share it."""

PACKED_UNASKED = 2**31
"""Bytes of weights that are held a second time without being asked for."""

KEPT = 4
"""Captured caches that wait for a request, of one model: each holds its keys and values and its graphs."""


class TreeSteps:
    """Evaluates token trees, for a batch of sequences of their own lengths.

    Args:
        attention: that the model uses in a step, by its name in transformers' registry.
        execution: how a step runs, one of `config.EXECUTIONS` but "auto".
        room: rows of the largest tree.
        cached_heads: our attention meets as many key heads as are cached; otherwise as the configuration says.

    Attributes:
        lengths: committed tokens of each sequence.
        how: as `compile`.
        captured: the cache with its captures, where steps are captured.
    """

    refeeds = fed_again = 0

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        batch: int,
        attention: str,
        execution: str,
        room: int,
        cached_heads: bool = False,
    ) -> None:
        self.model = model
        self.config = text_config(model)
        self.attention = attention
        self.execution = execution
        self.captured: Room | None = None
        self._compiled: Compiled | None = None
        self._weights: AbstractContextManager[None] = packed_weights(model) if execution == "packed" else nullcontext()
        if execution in ("eager", "packed") or (execution == "compiled" and device_of(model).type != "cuda"):
            self.cache = TreeCache(self.config, batch, capacity, room, name=cache_name(model.forward))
            if execution == "compiled":
                self._compiled = _compiled(model)
        else:  # what was captured for an earlier request serves this one as well
            self.captured = room_for(model, capacity + ROUND, batch, execution, room)
            self.cache = self.captured.cache
            self.cache.clear()
            weakref.finalize(self, _keep, memory_of(model).free, self.captured)
        self._keep_index = "logits_to_keep" in parameters_of(model)
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._cached_heads = cached_heads
        self._shifts = np.full(batch, first_position(model))  # from slots to positions, (batch,) or (planes, batch)
        self._folds: dict[str, int] = {}

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.cache.capacity

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows that a step is padded to one of; none where it has the rows of its trees."""
        return SIZES if self.captured else ()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> StepLogits:
        """As `Target.prefill`."""
        size = self._chunk(prompts)
        chunks = -(-max(map(len, prompts)) // size)
        for left in reversed(range(chunks)):
            ends = [max(0, len(p) - left * size) for p in prompts]
            parts = [p[max(0, end - size) : end] for p, end in zip(prompts, ends, strict=True)]
            last = [max(0, len(part) - 1) for part in parts]
            logits = self._prefill(parts, sorted(set(last)))
            self.cache.commit([range(len(part) if left else n) for part, n in zip(parts, last, strict=True)])
        row = {node: i for i, node in enumerate(sorted(set(last)))}
        logits = torch.stack([logits[b, row[node]] for b, node in enumerate(last)])[:, None]  # (batch, 1, vocab)
        if self._compiled:  # the next request has other buffers
            vary(*(b for layer in self.cache.layers for b in (layer.keys, layer.values)), dimensions=(0, 2))
        return StepLogits(logits, (0,))

    def _chunk(self, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens of each prompt that go in one forward."""
        even = self.cache.level and len(set(map(len, prompts))) == 1
        return PREFILL_CHUNK if even else min(PREFILL_CHUNK, self.cache.chunk)

    def _prefill(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of the rows in `keep`, by the model's own attention where all sequences are equally far."""
        if self.cache.level:
            return self._causal(parts, keep)
        chains = [TokenTree(tuple(p), tuple(range(-1, len(p) - 1))) if p else None for p in parts]
        return self._forward(chains, max(map(len, parts)), keep, None)

    def _causal(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of tokens in a row, by the model's own attention; all sequences are equally far."""
        nodes = max(map(len, parts))
        ids = np.array([[*p, *[0] * (nodes - len(p))] for p in parts])  # padding on the right is never seen
        positions = np.arange(nodes) + np.array(self.lengths)[:, None] + self._shifts[..., None]
        self.cache.make_room(nodes)
        return self._call(ids, positions, {}, keep)

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """As `Target.forward`."""
        keep = sorted({node for tree in trees if tree is not None for node in tree.scored})
        nodes = max(len(t) for t in trees if t is not None)
        if nodes == 1 and self.cache.level and self.captured is None and self._compiled is None:
            # Roots alone need no mask, which saves a tenth of a small model's step (docs/LOG.md).
            roots = [tree.tokens if tree is not None else () for tree in trees]
            with self._weights:
                return StepLogits(self._causal(roots, keep), tuple(keep))
        if self.captured is None or self._shifts.ndim > 1:  # what is captured has one plane of positions
            with self._weights:
                return StepLogits(self._forward(trees, nodes, keep, self._compiled), tuple(keep))
        self.cache.make_room(padded(nodes))
        ids, positions = self._inputs(trees, padded(nodes))
        rows = [self._rows(trees, padded(nodes), span) for span in self.cache.kinds.values()]
        with torch.no_grad():
            logits, best = self.captured.graphs.run(self.model, ids, positions, rows, keep)
        return StepLogits(logits, tuple(keep), best)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """As `Target.commit`."""
        self.cache.commit(paths)

    def resume(self, past: Cache, rows: Sequence[Sequence[int]], shifts: np.ndarray) -> None:
        """As after a prefill whose keys and values another cache holds."""
        self.cache.load(past, rows)
        self.cache.lengths[:] = [length - 1 for length in self.lengths]
        self._shifts = shifts

    def load(self, past: Cache, rows: Sequence[Sequence[int]]) -> None:
        """As `Target.load`."""
        self.cache.load(past, rows)

    def store(self, past: Cache, starts: Sequence[int]) -> None:
        """As `Target.store`."""
        self.cache.store(past, starts, share=self.captured is None)

    def _inputs(self, trees: Sequence[TokenTree | None], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, (batch, nodes), and positions, of a model with several planes of them (planes, batch, nodes)."""
        ids = np.zeros((len(trees), nodes), dtype=np.int64)
        positions = np.array(self.lengths)[:, None].repeat(nodes, 1)
        for b, tree in enumerate(trees):
            if tree is not None:
                ids[b, : len(tree)] = tree.tokens
                positions[b, : len(tree)] += tree.depths
        return ids, positions + self._shifts[..., None]

    def _forward(
        self, trees: Sequence[TokenTree | None], nodes: int, keep: list[int], compiled: Compiled | None
    ) -> torch.Tensor:
        self.cache.make_room(nodes)
        ids, positions = self._inputs(trees, nodes)
        masks = {kind: self._mask(trees, nodes, kind, span) for kind, span in self.cache.kinds.items()}
        with attention_in_force(self.config, self.attention):
            return self._call(ids, positions, masks, keep, compiled)

    def _rows(self, trees: Sequence[TokenTree | None], nodes: int, span: Span) -> np.ndarray:
        slots = self.cache.slots(span.window)
        return encode_rows(trees, slots.held, nodes, span.window, span.chunked, slots.starts)

    def _mask(self, trees: Sequence[TokenTree | None], nodes: int, kind: str, span: Span) -> torch.Tensor:
        rows = self._rows(trees, nodes, span)
        if self.attention == OURS and device_of(self.model).type == "cuda" and kernel_found():
            return torch.from_numpy(rows).to(device_of(self.model))
        return dense_mask(rows, self._dtype, self._fold(kind, span)).to(device_of(self.model))

    def _fold(self, kind: str, span: Span) -> int:
        """Query heads per key head of a kind of layer, if they are folded into rows; known after the prefill."""
        if self.attention != OURS:
            return 1
        if not self._cached_heads:
            heads = self.config.num_attention_heads
            return int(heads // (getattr(self.config, "num_key_value_heads", None) or heads))
        if kind not in self._folds:
            slots = self.cache.slots(span.window)
            types = getattr(self.config, "layer_types", None) or [kind] * len(self.cache.layers)
            found = {
                layer.keys.shape[1]
                for layer, name in zip(self.cache.layers, types, strict=False)
                if name == kind and getattr(layer, "slots", None) is slots and layer.is_initialized
            }
            key_heads = found.pop() if len(found) == 1 else self.config.num_attention_heads
            self._folds[kind] = self.config.num_attention_heads // key_heads
        return self._folds[kind]

    @torch.no_grad()
    def _call(
        self, ids: np.ndarray, positions: np.ndarray, masks: Masks, keep: list[int], compiled: Compiled | None = None
    ) -> torch.Tensor:
        """Logits of the rows in `keep`, (batch, len(keep), vocab)."""
        device = device_of(self.model)
        tensors = torch.from_numpy(ids).to(device), torch.tensor(positions).to(device)
        kept = torch.tensor(keep)
        if compiled is None:
            with as_written(self.model):
                if not self._keep_index:
                    return evaluate(self.model, self.cache, *tensors, masks)[:, keep]
                return evaluate(self.model, self.cache, *tensors, masks, kept)
        if len(keep) == 1 < ids.shape[1]:  # a size of 1 would compile anew
            kept = kept.repeat(2)
        step = torch.arange(ids.shape[1])
        indices = [torch.tensor(slots.held)[:, None] + step for slots in self.cache.all_slots]  # (batch, nodes) each
        vary(*tensors, *masks.values(), kept, *indices)
        return compiled(self.model, self.cache, *tensors, masks, kept, indices)


@dataclass
class Room:
    """A cache whose steps are captured: it outlives the request it was made for."""

    cache: TreeCache
    graphs: StepGraphs
    execution: str
    state: object

    @property
    def kind(self) -> tuple[int, str, object]:
        """Sequences, how it runs, and the state of the model that its graphs were made in."""
        return len(self.cache.lengths), self.execution, self.state


def _keep(free: list[Room], room: Room) -> None:
    """A room waits for another request; the oldest go, since each holds memory."""
    free.append(room)
    del free[:-KEPT]


def room_for(model: PreTrainedModel, capacity: int, batch: int, execution: str, rows: int) -> Room:
    """A free room that is large enough, or a new one, which smaller ones then make way for."""
    free = memory_of(model).free
    kind = (batch, execution, state_of(model))
    for room in free:
        if room.kind == kind and room.cache.capacity >= capacity and room.cache.room >= padded(rows):
            free.remove(room)
            found: Room = room
            return found
    free[:] = [room for room in free if room.kind[:2] != kind[:2]]
    slots, name = -(-capacity // ROUND) * ROUND, cache_name(model.forward)
    config = text_config(model)
    cache = TreeCache(config, batch, slots, padded(rows), name=name)
    kinds = list(cache.kinds)
    windows = [span.window for span in cache.kinds.values()]

    def forward(
        model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, rows: list[torch.Tensor], keep: torch.Tensor
    ) -> torch.Tensor:
        step = torch.arange(ids.shape[1], device=ids.device)
        held = {cache.slots(window): row[:, 0, :, LENGTH].long() for window, row in zip(windows, rows, strict=True)}
        indices = [held[slots] + step for slots in cache.all_slots]
        return evaluate(model, cache, ids, positions, dict(zip(kinds, rows, strict=True)), keep, indices)

    around = functools.partial(attention_in_force, config, OURS)
    return Room(cache, StepGraphs(forward, device_of(model), execution == "compiled", around), execution, kind[2])


def _compiled(model: PreTrainedModel) -> Compiled:
    """The compiled step of a model; compiled anew for changed weights, which a packed copy would not follow."""
    made = memory_of(model).made
    packed = device_of(model).type == "cpu" and model.dtype == torch.bfloat16
    weights = packed and (torch.get_num_threads(), version_of(model))
    if "compiled" not in made or made["compiled"][0] != weights:
        if "compiled" in made:
            torch.compiler.reset()
        made["compiled"] = weights, Compiled(evaluate, PACKED if packed else None)
    compiled: Compiled = made["compiled"][1]
    return compiled


def packed_weights(model: PreTrainedModel) -> PackedLinears:
    """The packed weights of a model; packed anew when they have changed."""
    made = memory_of(model).made
    weights = version_of(model)
    if "packed" not in made or made["packed"][0] != weights:
        made.pop("packed", None)  # gives its memory back first
        made["packed"] = weights, PackedLinears(model)
    packed: PackedLinears = made["packed"][1]
    return packed


def best_way(model: PreTrainedModel) -> str:
    """How a step runs where nobody says so."""
    if device_of(model).type == "cuda":
        return "captured"
    return "eager" if why_not(model) or copied_bytes(model) > PACKED_UNASKED else "packed"


def not_unasked(model: PreTrainedModel) -> bool:
    """Whether a copy of the weights is too large to be made where nobody asks for it."""
    return int(sum(p.nbytes for p in model.parameters())) > PACKED_UNASKED


def not_ready(model: PreTrainedModel, attention: str, execution: str) -> str:
    """Why a step cannot be compiled or captured; empty if it can, or need not."""
    if execution == "eager":
        return ""
    if execution == "packed":
        return why_not(model)
    if attention != OURS:
        return "the model takes no attention but its own"
    if "logits_to_keep" not in parameters_of(model):
        return "the model's forward has no logits_to_keep"
    if len({p.device for p in model.parameters()}) > 1 or model.device.type == "meta":
        return "its weights are on several devices, or loaded when they are needed"
    device = device_of(model).type
    if (execution == "captured" or device == "cuda") and frequencies_change(model):
        return "its rotary frequencies change with the length of the text, which its forward reads back"
    if device not in ("cpu", "cuda"):
        return f"a device of type {device!r} is not supported"
    if execution == "captured" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "steps are captured on a GPU only"
    if not kernel_found() and (execution == "captured" or device == "cuda"):
        return "Triton, which the attention kernel is written in, is not installed"
    return ""


@functools.cache
def kernel_found() -> bool:
    """Whether Triton, which our kernel is written in, can be imported."""
    return importlib.util.find_spec("triton") is not None
