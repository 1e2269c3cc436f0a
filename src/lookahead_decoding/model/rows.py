"""Steps of a model that cannot evaluate a tree: every path of the tree is a row of its own.

A *chain* is one path. *Batch-expanded* are several: the prefix of the text is held once per path, and a path's tokens
are a plain row of the batch, so the model needs no mask and positions stay slots. That is exact for any model whose
forward of several tokens continues where the last one ended: attention with biases or windows of its own, and recurrent
layers.

The state of a recurrent layer cannot be cut back to the accepted tokens. So it is saved before a step with drafts, and
where not all of a row was accepted, the accepted tokens are fed again from the saved state: ahead of the next step's
tokens as long as there are few of them, and in a forward of their own when there are more than `REFED`.

`Lockstep` decodes several sequences of such a model plainly, as `generate` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..draft.tree import TokenTree
from ..verify.sampler import StepLogits
from .cache import TreeCache
from .evaluate import (
    as_written,
    cache_in,
    cache_name,
    device_of,
    evaluate,
    first_position,
    parameters_of,
    prepared,
    text_config,
)
from .trees import PREFILL_CHUNK, packed_weights

REFED = 16
"""Accepted tokens that are fed again ahead of a step's own; more of them go alone."""

PER_TOKEN = ("position_ids", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs that have a value per token of the text."""


class RowSteps:
    """Evaluates the paths of one sequence's trees as rows.

    Args:
        paths: that a tree has at most.
        room: nodes of the longest path and tokens fed again, for layers with a window.
        refed: accepted tokens that are fed again ahead of a step's own, at most.
        copies: all layers are transformers' own, and copied like states.
        execution: how a step runs, "eager" or "packed".

    Attributes:
        lengths: committed tokens of the sequence.
        refeeds: forwards in which accepted tokens were fed again alone.
        fed_again: accepted tokens that the last forward fed once more.
    """

    sizes: tuple[int, ...] = ()

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        paths: int,
        room: int,
        refed: int = REFED,
        copies: bool = False,
        execution: str = "eager",
    ) -> None:
        self.model = model
        self.execution = execution
        self._weights = packed_weights(model) if execution == "packed" else nullcontext()
        self.config = text_config(model)
        self.attention = self.config._attn_implementation
        self.cache = TreeCache(self.config, paths, capacity, room + refed, copies, cache_name(model.forward))
        self.refeeds = self.fed_again = 0
        self._refed = refed
        self._capacity = capacity
        names = parameters_of(model)
        self._keep_index, self._takes_positions = "logits_to_keep" in names, "position_ids" in names
        self._saved: list[dict[str, Any]] | None = None  # states as they were before the pending tokens
        self._pending: list[int] = []  # committed, and not yet in the states
        self._fed: list[list[int]] = []  # nodes of each row of the last forward
        self._tree = TokenTree((0,), (-1,))
        self._width = 0  # tokens of each row of the last forward
        self._shift = np.array(first_position(model))  # from slots to positions, () or (planes,)

    @property
    def lengths(self) -> list[int]:
        return [self.cache.lengths[0] + len(self._pending)]

    @property
    def capacity(self) -> int:
        """Slots of the sequence."""
        return self._capacity

    def prefill(self, prompts: Sequence[Sequence[int]]) -> StepLogits:
        """As `Target.prefill`."""
        self._catch_up()
        (prompt,) = prompts
        first = 0
        while len(prompt) - first > PREFILL_CHUNK:
            self._feed([list(prompt[first : first + PREFILL_CHUNK])], [0])
            self._advance(PREFILL_CHUNK)
            first += PREFILL_CHUNK
        rest = list(prompt[first:])
        logits = self._feed([rest], [len(rest) - 1])  # (1, 1, vocab)
        self._advance(len(rest) - 1)
        self._await_root()
        return StepLogits(logits, (0,))

    def resume(self, past: Cache, rows: Sequence[Sequence[int]], shifts: np.ndarray) -> None:
        """As after a prefill whose keys, values and states another cache holds."""
        self.load(past, rows)
        self.cache.lengths[:] = [length - 1 for length in self.cache.lengths]
        self._saved, self._pending, self._shift = None, [], shifts[..., 0]
        self._await_root()

    def _await_root(self) -> None:
        """The last token of a prompt was fed, and waits for `commit`."""
        self._fed, self._tree, self._width = [[0]], TokenTree((0,), (-1,)), 1

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """As `Target.forward`."""
        (tree,) = trees
        assert tree is not None
        self.fed_again = len(self._pending)
        if len(self._pending) > self._refed:
            self._catch_up()
        paths = tree.paths()
        if self.cache.stateful:
            if self._saved is not None:
                self.cache.restore(self._saved)
            elif len(tree) > 1:
                self._saved = self.cache.save()
            if len(paths) > 1:
                self.cache.select([0] * len(paths))
        before = len(self._pending)
        self._width = before + max(map(len, paths))
        rows = [self._pending + [tree.tokens[node] for node in path] for path in paths]
        with self._weights:
            logits = self._feed([row + row[-1:] * (self._width - len(row)) for row in rows], range(before, self._width))
        place = {node: (row, depth) for row, path in enumerate(paths) for depth, node in enumerate(path)}
        self._fed, self._tree = paths, tree
        at, depths = zip(*(place[node] for node in tree.scored), strict=True)
        return StepLogits(logits[list(at), list(depths)][None], tuple(tree.scored))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """As `Target.commit`."""
        path = list(paths[0])
        if not path:
            return
        row = next((i for i, nodes in enumerate(self._fed) if nodes[: len(path)] == path), None)
        if row is None:
            raise ValueError(f"path {path} was not in the last tree")
        fed = len(self._pending) + len(path)
        if not self.cache.stateful:
            self.cache.spread(row, len(path))
        elif fed == self._width:
            if len(self._fed) > 1:
                self.cache.select([row])
            self._advance(fed, row)
        else:
            self._pending += [self._tree.tokens[node] for node in path]

    def load(self, past: Cache, rows: Sequence[Sequence[int]]) -> None:
        """As `Target.load`."""
        self.cache.load(past, [rows[0]] * len(self.cache.lengths))

    def store(self, past: Cache, starts: Sequence[int]) -> None:
        """As `Target.store`."""
        self._catch_up()
        self.cache.store(past, starts)

    def _advance(self, rows: int, row: int = 0) -> None:
        """The first rows of the last forward are committed, and in the states."""
        self.cache.spread(row, rows)
        self._saved, self._pending = None, []

    def _catch_up(self) -> None:
        """Feed the pending tokens alone."""
        if self._saved is None:
            return
        self.cache.restore(self._saved)
        if self._pending:
            self._feed([self._pending], [0])
            self.refeeds += 1
        self._advance(len(self._pending))

    @torch.no_grad()
    def _feed(self, rows: Sequence[Sequence[int]], keep: Sequence[int]) -> torch.Tensor:
        """Logits behind what the states hold, (rows, len(keep), vocab)."""
        device = device_of(self.model)
        ids = torch.tensor(rows, device=device)
        self.cache.make_room(ids.shape[1])
        positions = None
        if self._takes_positions:
            row = np.arange(ids.shape[1]) + self.cache.lengths[0] + self._shift[..., None]  # (..., tokens)
            positions = torch.from_numpy(row).to(device).unsqueeze(-2).expand(*row.shape[:-1], *ids.shape)
        self.cache.take_rows(slice(0, len(rows)))
        kept = torch.tensor(list(keep))
        with as_written(self.model):
            if self._keep_index:
                return evaluate(self.model, self.cache, ids, positions, {}, kept)
            return evaluate(self.model, self.cache, ids, positions, {})[:, kept]


class Lockstep:
    """Plain steps of a batch, left-padded and with transformers' own cache, as `generate` makes them."""

    execution = "eager"
    sizes: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int) -> None:
        self.model = model
        self.config = text_config(model)
        self.attention = self.config._attn_implementation
        self.capacity = capacity
        self.lengths = [0] * batch
        self.refeeds = self.fed_again = 0
        self.cache = DynamicCache(config=self.config)
        self._mask = torch.zeros(batch, 0, dtype=torch.long)
        pad = model.generation_config.pad_token_id
        self._pad = pad if isinstance(pad, int) else 0
        self.shifts = np.zeros(batch, dtype=np.int64)  # from slots to the positions that the model is asked about
        self.seen = self.shifts  # and to those that it then uses, (batch,) or (planes, batch)

    def prefill(self, prompts: Sequence[Sequence[int]], inputs: Mapping[str, Any] | None = None) -> StepLogits:
        """As `Target.prefill`, in one forward."""
        width = max(map(len, prompts))
        missing = [width - len(p) for p in prompts]
        ids = [[self._pad] * n + list(p) for n, p in zip(missing, prompts, strict=True)]
        mask = torch.ones(len(prompts), width, dtype=torch.long)
        for row, n in enumerate(missing):
            mask[row, :n] = 0
        columns = self._mask.shape[1] + width  # padding in front of all prompts is left out
        own = {name: v[..., -columns:] if name in PER_TOKEN else v for name, v in (inputs or {}).items()}
        logits = self._feed(torch.tensor(ids), mask, own, first=True)
        self.lengths = [length + len(p) - 1 for length, p in zip(self.lengths, prompts, strict=True)]
        return logits

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """As `Target.forward`, of roots alone; a sequence that has ended is fed padding, as `generate` does."""
        ids = [[tree.tokens[0] if tree is not None else self._pad] for tree in trees]
        return self._feed(torch.tensor(ids), torch.ones(len(trees), 1, dtype=torch.long), {}, first=False)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """As `Target.commit`; nothing is ever dropped."""
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def load(self, past: Cache, rows: Sequence[Sequence[int]]) -> None:
        """As `Target.load`."""
        self.cache = past
        self.lengths = [len(slots) for slots in rows]
        self._mask = torch.zeros(len(rows), past.get_seq_length(), dtype=torch.long)
        for row, slots in enumerate(rows):
            self._mask[row, list(slots)] = 1

    def store(self, past: Cache, starts: Sequence[int]) -> None:
        """As `Target.store`."""
        if past is not self.cache:
            past.layers = self.cache.layers

    @torch.no_grad()
    def _feed(self, ids: torch.Tensor, mask: torch.Tensor, inputs: Mapping[str, Any], first: bool) -> StepLogits:
        device = device_of(self.model)
        self._mask = torch.cat([self._mask, mask], 1)
        slots = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        positions = slots + torch.from_numpy(self.shifts)[..., None]
        takes_positions = "position_ids" in parameters_of(self.model)
        ready = prepared(
            self.model,
            ids.to(device),
            self.cache,
            attention_mask=self._mask.to(device),
            is_first_iteration=first,
            **({"position_ids": positions.to(device)} if takes_positions else {}) | dict(inputs),
        )
        if takes_positions:
            self.seen = (ready["position_ids"][..., -1].cpu() - slots[:, -1]).numpy()
        if "position_ids" in inputs:
            self.shifts = (inputs["position_ids"][..., -1].cpu() - slots[:, -1]).numpy()
        with as_written(self.model):
            output = self.model(**ready, return_dict=True)
        self.cache = cache_in(output) or self.cache
        return StepLogits(output.logits[:, -1:], (0,))  # (batch, 1, vocab)
