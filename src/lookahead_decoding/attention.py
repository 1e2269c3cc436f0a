"""Attention masks of a step: which cached slot each node may see."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .tree import TokenTree


def tree_mask(
    trees: Sequence[TokenTree | None],
    lengths: Sequence[int],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    window: int | None = None,
) -> torch.Tensor:
    """The additive mask of a step over cache slots, 0 where a node sees and the lowest number where not.

    Sequence b's committed tokens fill slots 0 to `lengths[b]`, and node j of its tree slot `lengths[b] + j`. A node
    sees the committed slots, its ancestors and itself. Rows past the end of a tree are padding: they see the
    committed slots and themselves.

    Args:
        trees: one per sequence; None where the sequence has ended.
        lengths: committed tokens per sequence.
        rows: rows of every sequence in this step, padding included.
        dtype: of the queries.
        device: where the mask goes.
        window: how many positions back a node sees, itself included; None is all of them.

    Returns:
        (batch, 1, rows, max(lengths) + rows)
    """
    seen = torch.zeros(len(trees), rows, max(lengths) + rows, dtype=torch.bool)  # (batch, rows, slots)
    for b, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
        seen[b, :, :length] = True
        inside = torch.eye(rows, dtype=torch.bool)  # (rows, rows)
        if tree is not None:
            for node, parent in enumerate(tree.parents[1:], 1):
                inside[node] |= inside[parent]
        seen[b, :, length : length + rows] = inside
        if window is not None:
            depths = torch.zeros(rows, dtype=torch.long)
            if tree is not None:
                depths[: len(tree)] = torch.tensor(tree.depths)
            slots = torch.arange(seen.shape[-1])
            slots[length : length + rows] = length + depths
            seen[b] &= (length + depths)[:, None] - slots[None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
    return mask[:, None].to(device)  # (batch, 1, rows, slots)
