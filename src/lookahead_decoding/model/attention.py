"""Attention of a step: each node sees the committed prefix, its ancestors and itself.

`reference` is the obvious way to compute it, and the oracle of the fast ones: `folded` on a CPU, and the Triton kernel
of `kernels` on a GPU. Both take the query heads that share a key head as more rows of it, so keys and values are never
expanded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..draft.tree import TokenTree

NO_WINDOW = 1 << 30
LENGTH, DEPTH, WINDOW, SEEN = range(4)
"""Columns of the rows: committed tokens, depth in the tree, how far back a node sees, and then a column per node."""


def encode_rows(
    trees: Sequence[TokenTree | None],
    lengths: Sequence[int],
    nodes: int,
    window: int | None = None,
    chunked: bool = False,
    starts: Sequence[int] | None = None,
) -> np.ndarray:
    """What each node of a step sees, as integers whose shape does not depend on the context.

    Args:
        trees: one per sequence; None where the sequence has ended.
        lengths: committed tokens per sequence that have a slot; node j of its tree stands in slot length + j.
        nodes: rows of every sequence in this step; those past the end of a tree are padding and see the committed
            slots and themselves.
        window: how many positions back a node sees, itself included; None is all of them.
        chunked: a node sees back to the last multiple of `window` instead.
        starts: position of the first slot per sequence; 0 by default.

    Returns:
        (batch, 1, nodes, 3 + nodes) int32: length, depth, window, and a 1 for every node that is seen.
    """
    rows = np.zeros((len(trees), 1, nodes, SEEN + nodes), dtype=np.int32)
    rows[..., WINDOW] = window or NO_WINDOW
    for b, (row, tree, length) in enumerate(zip(rows[:, 0], trees, lengths, strict=True)):
        row[:, LENGTH] = length
        seen = row[:, SEEN:]
        np.fill_diagonal(seen, 1)
        if tree is not None:
            row[: len(tree), DEPTH] = tree.depths
            if window and chunked:
                row[:, WINDOW] = (row[:, DEPTH] + length + (starts[b] if starts else 0)) % window + 1
            for node, parent in enumerate(tree.parents[1:], 1):
                seen[node, :node] = seen[parent, :node]
    return rows


def dense_mask(rows: np.ndarray, dtype: torch.dtype, groups: int = 1) -> torch.Tensor:
    """The same as an additive mask over cache slots: 0 where a node sees one and the lowest number where not.

    Args:
        rows: as `encode_rows` gives it.
        dtype: of the queries.
        groups: query heads per key head; the mask is repeated for each.

    Returns:
        (batch, 1, groups x nodes, longest length + nodes)
    """
    batch, _, nodes, _ = rows.shape
    slots = int(rows[..., LENGTH].max()) + nodes
    hidden = np.ones((batch, nodes, slots), dtype=bool)
    for b, row in enumerate(rows[:, 0]):
        length, window = row[0, LENGTH], row[:, WINDOW]
        hidden[b, :, :length] = False
        hidden[b, :, length : length + nodes] = row[:, SEEN:] == 0
        if window[0] < NO_WINDOW:
            position = np.arange(slots)
            position[length : length + nodes] = length + row[:, DEPTH]
            hidden[b] |= (length + row[:, DEPTH])[:, None] - position >= window[:, None]
    folded = torch.from_numpy(np.tile(hidden, (1, groups, 1))[:, None])
    return torch.zeros(folded.shape, dtype=dtype).masked_fill_(folded, torch.finfo(dtype).min)


def additive_mask(rows: torch.Tensor, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """As `dense_mask` for one group, made on the device that the rows are on, in a shape that no number decides.

    Args:
        rows: (batch, 1, nodes, 3 + nodes), as `encode_rows` gives it.
        slots: of the mask, at least those in use; what lies behind them is hidden.

    Returns:
        (batch, 1, nodes, slots)
    """
    nodes = rows.shape[2]
    length, depth, window = (rows[..., column, None] for column in (LENGTH, DEPTH, WINDOW))  # (batch, 1, nodes, 1)
    slot = torch.arange(slots, device=rows.device, dtype=rows.dtype).expand(len(rows), 1, nodes, slots)
    other = slot - length  # node of the tree, negative in the prefix
    node = other.clamp(0, nodes - 1).long()
    told = rows[..., SEEN:].gather(-1, node) != 0
    place = torch.where(other < 0, slot, length + depth.transpose(2, 3).expand(-1, -1, nodes, -1).gather(-1, node))
    seen = (length + depth - place < window) & ((other < 0) | ((other < nodes) & told))
    return torch.zeros(seen.shape, dtype=dtype, device=rows.device).masked_fill_(~seen, torch.finfo(dtype).min)


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step, written down plainly: softmax over all slots with a dense mask.

    Args:
        query: (batch, heads, nodes, size).
        key, value: (batch, key heads, slots, size): the committed slots, then the step's own.
        mask: (batch, 1, nodes, slots), as `dense_mask` gives it.
        scale: of the scores.
        softcap: scores are capped at this by a tanh; 0 does not cap.
        sinks: (heads,), a score per head that takes weight and gives nothing.

    Returns:
        (batch, nodes, heads, size), in the dtype of the queries.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ends = None if sinks is None else sinks[None, :, None, None].expand(1, -1, query.shape[2], 1)
    return _weighed(query, key, value, mask, scale, softcap, ends).transpose(1, 2).contiguous()


def _weighed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax over all slots; as many heads of queries as of keys, and sinks per row, (1, heads, rows, 1)."""
    scores = query @ key.transpose(2, 3) * scale  # (batch, heads, rows, slots)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).expand(len(scores), -1, -1, 1)], -1)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=wide)[..., : key.shape[2]].to(value.dtype)
    return weights @ value


def folded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step, query heads folded into rows of their key head: by PyTorch's fused kernel where that can.

    Args:
        mask: (batch, 1, groups x nodes, slots), as `dense_mask` gives it for all groups.

    The other arguments and the result are those of `reference`.
    """
    batch, heads, nodes, size = query.shape
    rows = query.reshape(batch, key.shape[1], -1, size)  # (batch, key heads, groups x nodes, size)
    if softcap or sinks is not None:
        ends = None if sinks is None else sinks.reshape(1, key.shape[1], -1, 1).repeat_interleave(nodes, 2)
        out = _weighed(rows, key, value, mask, scale, softcap, ends)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, nodes, -1).transpose(1, 2).contiguous()  # some models take a view of it


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step by the fastest way there is for these inputs.

    Args:
        key, value: may have more slots than are in use.
        mask: integer rows as `encode_rows` gives them, for the kernel; otherwise dense, for all groups.

    The other arguments and the result are those of `reference`.
    """
    if not mask.is_floating_point():
        from .kernels import tree_attention  # Triton is there where there is a GPU

        out: torch.Tensor = tree_attention(query, key, value, mask, scale, softcap, sinks)
        return out
    slots = mask.shape[-1]
    return folded(query, key[:, :, :slots], value[:, :, :slots], mask, scale, softcap, sinks)
