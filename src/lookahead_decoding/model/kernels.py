"""Attention of a step on a GPU, as a Triton kernel.

Few queries meet many keys, so the keys are split over programs, as flash-decoding does, and the parts are joined
by log-sum-exp. One program takes a tile of the rows of all query heads that share a key head, so keys and values
are read once per key head and never expanded. The committed prefix needs no mask, only its length; the rows of the
tree behind it look up who sees whom.

Triton is imported here alone; on a machine without a GPU its interpreter runs the same kernel (TRITON_INTERPRET=1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .attention import additive_mask, reference


@dataclass(frozen=True)
class Tiling:
    """How much one program of the kernel holds at a time.

    Attributes:
        rows: of the query heads that share a key head.
        keys: of a block.
        warps: that work on it.
        shared: bytes of shared memory that Triton's compiler takes, at most over the architectures of `ARCHITECTURES`.
    """

    rows: int
    keys: int
    warps: int
    shared: int


STAGES = 2
"""Blocks of keys that are on their way at a time."""

HALF = {
    64: (Tiling(64, 64, 4, 58368), Tiling(32, 64, 4, 33024), Tiling(16, 64, 4, 24832)),
    128: (Tiling(64, 64, 4, 99328), Tiling(32, 64, 4, 53504), Tiling(16, 64, 4, 43264)),
    256: (Tiling(64, 32, 8, 107168), Tiling(32, 32, 8, 55424), Tiling(16, 32, 4, 44160)),
    512: (Tiling(16, 16, 8, 50752),),
}
"""By the largest head size, most rows first. Without spills in the loop over committed keys (benchmarks/ptx.py)."""

SINGLE = {
    64: (Tiling(16, 32, 4, 24768),),
    128: (Tiling(16, 16, 4, 26816),),
    256: (Tiling(16, 16, 8, 51392),),
    512: (Tiling(16, 16, 8, 100544),),
}
"""In float32, whose products are exact multiply-adds and take registers: larger tiles spill thousands of bytes."""

ARCHITECTURES = (80, 86, 90, 100)
"""Of Nvidia's cards, as compute capability times ten: the kernel is compiled for each by the tests."""


def tiling_for(rows: int, size: int, single: bool, shared: int) -> Tiling:
    """The tiling for so many rows of a key head.

    Args:
        rows: nodes times query heads per key head.
        size: of a head, the larger one of keys and values.
        single: float32 rather than half precision.
        shared: bytes of shared memory that a program may have on this card.

    Raises:
        ValueError: the heads are larger than any that the kernel has a tiling for, or than the card has room for.
    """
    table = SINGLE if single else HALF
    found = next((table[bound] for bound in table if size <= bound), ())
    fitting = [tiling for tiling in found if tiling.shared <= shared]
    if not fitting:
        raise ValueError(f"the attention kernel has no tiling for heads of {size} and {shared} bytes of shared memory")
    return next((tiling for tiling in reversed(fitting) if tiling.rows >= rows), fitting[0])


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; Triton's interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)  # type: ignore[attr-defined]


@triton.jit
def _block(
    q, best, total, mean, keys_at, values_at, base, node, depth, window, live, first, length, stop,
    scale, softcap, k_slot, v_slot, r_row,
    COMMITTED: tl.constexpr, HAS_CAP: tl.constexpr, SIZE: tl.constexpr, V_SIZE: tl.constexpr, SIZE_P: tl.constexpr,
    V_SIZE_P: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """The running softmax of a tile after one more block of keys.

    A block of committed slots that all rows see (COMMITTED) needs no mask; any other looks up who sees whom.
    """
    keys = tl.arange(0, KEYS)
    dims, v_dims = tl.arange(0, SIZE_P), tl.arange(0, V_SIZE_P)
    slot = first + keys
    inside = slot < stop
    far = tl.zeros([], tl.int64) + first  # the offset of a slot may pass 31 bits, that within a block does not
    k_at = keys_at + far * k_slot + keys[None, :] * k_slot + dims[:, None]
    v_at = values_at + far * v_slot + keys[:, None] * v_slot + v_dims[None, :]
    if not COMMITTED:
        k = tl.load(k_at, mask=inside[None, :] & (dims < SIZE)[:, None], other=0.0)
    elif SIZE == SIZE_P:
        k = tl.load(k_at)
    else:
        k = tl.load(k_at, mask=(dims < SIZE)[:, None], other=0.0)
    scores = (tl.dot(q, k, input_precision="ieee") if PRECISE else tl.dot(q, k)) * scale
    if HAS_CAP:
        scaled = scores / softcap
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scaled)) - 1.0)
    if not COMMITTED:
        other = slot - length  # node of the tree, negative in the prefix
        in_tree = inside & (other >= 0)
        told = tl.load(
            base + node[:, None] * r_row + 3 + other[None, :], mask=live[:, None] & in_tree[None, :], other=0
        )
        other_depth = tl.load(base + other * r_row + 1, mask=in_tree, other=0)
        position = tl.where(other >= 0, length + other_depth, slot)
        near = (length + depth)[:, None] - position[None, :] < window[:, None]
        seen = inside[None, :] & near & ((other < 0)[None, :] | (told != 0))
        scores = tl.where(seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    safe = new_best if COMMITTED else tl.where(new_best == float("-inf"), 0.0, new_best)
    weight = tl.exp(scores - safe[:, None])
    shrink = tl.exp(best - safe)
    total = total * shrink + tl.sum(weight, 1)
    if not COMMITTED:
        v = tl.load(v_at, mask=inside[:, None] & (v_dims < V_SIZE)[None, :], other=0.0)
    elif V_SIZE == V_SIZE_P:
        v = tl.load(v_at)
    else:
        v = tl.load(v_at, mask=(v_dims < V_SIZE)[None, :], other=0.0)
    if PRECISE:
        mean = mean * shrink[:, None] + tl.dot(weight, v, input_precision="ieee")
    else:
        mean = mean * shrink[:, None] + tl.dot(weight.to(v.dtype), v)
    return new_best, total, mean


@triton.jit
def _part(
    query, key, value, rows, out, lse,
    scale, softcap,
    nodes, groups, key_heads, splits,
    q_batch, q_head, q_row, k_batch, k_head, k_slot, v_batch, v_head, v_slot, r_batch, r_row,
    HAS_CAP: tl.constexpr, SIZE: tl.constexpr, V_SIZE: tl.constexpr, SIZE_P: tl.constexpr, V_SIZE_P: tl.constexpr,
    TILE: tl.constexpr, KEYS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one key head, one part of the keys."""
    tile, pair, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = pair // key_heads, pair % key_heads
    lane = tile * TILE + tl.arange(0, TILE)  # row of a query head that shares this key head: group-major
    live = lane < nodes * groups
    node, group = lane % nodes, lane // nodes
    dims, v_dims = tl.arange(0, SIZE_P), tl.arange(0, V_SIZE_P)

    base = rows + batch * r_batch
    length = tl.load(base)  # the same for all rows
    depth = tl.load(base + node * r_row + 1, mask=live, other=0)
    window = tl.load(base + node * r_row + 2, mask=live, other=0)
    end = length + nodes
    chunk = tl.cdiv(tl.cdiv(end, splits), KEYS) * KEYS
    start = part * chunk
    stop = tl.minimum(start + chunk, end)

    q = tl.load(
        query + batch * q_batch + (head * groups + group)[:, None] * q_head + node[:, None] * q_row + dims[None, :],
        mask=live[:, None] & (dims < SIZE)[None, :],
        other=0.0,
    )
    best = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mean = tl.zeros([TILE, V_SIZE_P], tl.float32)
    keys_at, values_at = key + batch * k_batch + head * k_head, value + batch * v_batch + head * v_head

    # Slots that no row sees, then some that a window shows to some rows, then those that all see, then the tree.
    unseen = length + depth - window  # the last position that a row does not see
    first = start + tl.maximum(tl.min(tl.where(live, unseen, end), 0) + 1 - start, 0) // KEYS * KEYS
    all_see = start + tl.cdiv(tl.maximum(tl.max(tl.where(live, unseen, -1), 0) + 1 - start, 0), KEYS) * KEYS
    whole = tl.maximum(first, start + tl.maximum(tl.minimum(stop, length) - start, 0) // KEYS * KEYS)
    open = tl.minimum(whole, tl.maximum(first, all_see))
    for at in range(first, open, KEYS):
        best, total, mean = _block(
            q, best, total, mean, keys_at, values_at, base, node, depth, window, live, at, length, stop,
            scale, softcap, k_slot, v_slot, r_row, False, HAS_CAP, SIZE, V_SIZE, SIZE_P, V_SIZE_P, KEYS, PRECISE,
        )  # fmt: skip
    for at in range(open, whole, KEYS):
        best, total, mean = _block(
            q, best, total, mean, keys_at, values_at, base, node, depth, window, live, at, length, stop,
            scale, softcap, k_slot, v_slot, r_row, True, HAS_CAP, SIZE, V_SIZE, SIZE_P, V_SIZE_P, KEYS, PRECISE,
        )  # fmt: skip
    for at in range(whole, stop, KEYS):
        best, total, mean = _block(
            q, best, total, mean, keys_at, values_at, base, node, depth, window, live, at, length, stop,
            scale, softcap, k_slot, v_slot, r_row, False, HAS_CAP, SIZE, V_SIZE, SIZE_P, V_SIZE_P, KEYS, PRECISE,
        )  # fmt: skip
    alive = total > 0
    mean = mean / tl.where(alive, total, 1.0)[:, None]
    sums = tl.where(alive, best + tl.log(tl.where(alive, total, 1.0)), float("-inf"))
    place = (pair * splits + part) * nodes * groups + lane
    tl.store(out + place[:, None] * V_SIZE + v_dims[None, :], mean, mask=live[:, None] & (v_dims < V_SIZE)[None, :])
    tl.store(lse + place, sums, mask=live)


@triton.jit
def _join(
    part, lse, sinks, out,
    nodes, groups, key_heads, splits,
    HAS_SINKS: tl.constexpr, V_SIZE: tl.constexpr, V_SIZE_P: tl.constexpr, SPLITS_P: tl.constexpr,
):  # fmt: skip
    """One row of one query head: its parts, weighed by their log-sum-exp, into (batch, rows, heads, size)."""
    lane, pair = tl.program_id(0), tl.program_id(1)
    node, group = lane % nodes, lane // nodes
    batch, head = pair // key_heads, (pair % key_heads) * groups + group
    which, dims = tl.arange(0, SPLITS_P), tl.arange(0, V_SIZE_P)
    place = (pair * splits + which) * nodes * groups + lane
    sums = tl.load(lse + place, mask=which < splits, other=float("-inf"))
    best = tl.max(sums, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32)
        best = tl.maximum(best, sink)
    weight = tl.exp(sums - best)
    total = tl.sum(weight, 0)
    if HAS_SINKS:
        total += tl.exp(sink - best)
    values = tl.load(
        part + place[:, None] * V_SIZE + dims[None, :],
        mask=(which < splits)[:, None] & (dims < V_SIZE)[None, :],
        other=0.0,
    )
    mean = tl.sum(values * weight[:, None], 0) / total
    row = (batch * nodes + node) * key_heads * groups + head
    tl.store(out + row * V_SIZE + dims, mean.to(out.dtype.element_ty), mask=dims < V_SIZE)


def splits_for(device: torch.device, capacity: int, programs: int, keys: int) -> int:
    """Parts of the keys: enough programs for two per multiprocessor, and none with fewer than two blocks of keys."""
    processors = 4 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(2 * processors // max(1, programs), triton.cdiv(capacity, 2 * keys), 64))


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of tree rows over a cache.

    Args:
        query: (batch, heads, nodes, size), last dimension contiguous.
        key, value: (batch, key heads, capacity, size): committed slots, then the step's own rows, then anything.
        rows: (batch, 1, nodes, 3 + nodes) int32, as `attention.encode_rows` gives it.
        scale: of the scores.
        softcap: scores are capped at this by a tanh; 0 does not cap.
        sinks: (heads,), a score per head that takes weight and gives nothing.

    Returns:
        (batch, nodes, heads, size), in the dtype of the queries.

    Raises:
        ValueError: the card has no room for heads of this size, or the dtype is none of its own.
    """
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the attention kernel takes float32, bfloat16 and float16, got {query.dtype}")
    batch, heads, nodes, size = query.shape
    key_heads, capacity, v_size = key.shape[1], key.shape[2], value.shape[3]
    groups = heads // key_heads
    single = query.dtype == torch.float32
    tiling = tiling_for(nodes * groups, max(size, v_size), single, shared_memory(query.device))
    tiles = triton.cdiv(nodes * groups, tiling.rows)
    splits = splits_for(query.device, capacity, tiles * batch * key_heads, tiling.keys)
    part = torch.empty(batch * key_heads, splits, nodes * groups, v_size, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch * key_heads, splits, nodes * groups, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, nodes, heads, v_size, dtype=query.dtype, device=query.device)
    v_size_p = triton.next_power_of_2(v_size)
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _part[(tiles, batch * key_heads, splits)](
            query, key, value, rows, part, lse, scale, softcap, nodes, groups, key_heads, splits,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], rows.stride(0), rows.stride(2),
            HAS_CAP=softcap > 0, SIZE=size, V_SIZE=v_size, SIZE_P=max(16, triton.next_power_of_2(size)),
            V_SIZE_P=max(16, v_size_p), TILE=tiling.rows, KEYS=tiling.keys, PRECISE=single,
            num_warps=tiling.warps, num_stages=STAGES,
        )  # fmt: skip
        _join[(nodes * groups, batch * key_heads)](
            part, lse, sinks if sinks is not None else lse, out, nodes, groups, key_heads, splits,
            HAS_SINKS=sinks is not None, V_SIZE=v_size, V_SIZE_P=max(16, v_size_p),
            SPLITS_P=triton.next_power_of_2(splits), num_warps=1,
        )  # fmt: skip
    return out


tree_attention = torch.library.custom_op("lookahead_decoding::tree_attention", launch, mutates_args=())
"""`launch` as an operation that torch.compile takes as it is."""


@tree_attention.register_kernel("cpu")
def _(query, key, value, rows, scale, softcap=0.0, sinks=None):
    """The same by PyTorch, for tests of captured steps: Triton's interpreter takes seconds."""
    return reference(query, key, value, additive_mask(rows, key.shape[2], query.dtype), scale, softcap, sinks)


@tree_attention.register_fake
def _(query, key, value, rows, scale, softcap=0.0, sinks=None):
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
