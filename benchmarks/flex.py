"""A step's attention by PyTorch's FlexAttention: the second opinion on what our kernel computes, and how fast."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lookahead_decoding.model.attention import DEPTH, LENGTH, SEEN, WINDOW


def block_mask(rows: torch.Tensor, slots: int) -> BlockMask:
    """What each node sees, for FlexAttention.

    Args:
        rows: (batch, 1, nodes, 3 + nodes), as `encode_rows` gives them.
        slots: of the cache.
    """
    batch, _, nodes, _ = rows.shape
    length, depth, window = (rows[:, 0, :, column] for column in (LENGTH, DEPTH, WINDOW))  # (batch, nodes)
    seen = rows[:, 0, :, SEEN:].bool()

    def sees(b: torch.Tensor, h: torch.Tensor, node: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        other = (slot - length[b, node]).clamp(0, nodes - 1)
        in_tree = (slot >= length[b, node]) & (slot < length[b, node] + nodes) & seen[b, node, other]
        position = torch.where(slot < length[b, node], slot, length[b, node] + depth[b, other])
        return ((slot < length[b, node]) | in_tree) & (length[b, node] + depth[b, node] - position < window[b, node])

    return create_block_mask(sees, batch, None, nodes, slots, device=str(rows.device))


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float, softcap: float = 0.0
) -> torch.Tensor:
    """Attention of a step; the arguments and the result are those of `reference`, but for the mask."""

    def cap(score: torch.Tensor, *where: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    out = flex_attention(
        query, key, value, cap if softcap else None, block_mask=mask, scale=scale, enable_gqa=True
    )  # (batch, heads, nodes, size)
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2)
