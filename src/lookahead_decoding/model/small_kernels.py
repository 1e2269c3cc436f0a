"""Kernels for the small operations of a layer, in Triton; `fused` says where they stand.

Each rounds where the operations that it replaces round, so that only the order of a norm's sum differs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _norm(x, weight, out, size, eps, SHIFT: tl.constexpr, SIZE_P: tl.constexpr):
    """A row."""
    row, places = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE_P)
    inside = places < size
    wide = tl.load(x + row * size + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.math.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    by = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    made = wide * scale
    if not SHIFT:  # the model rounds before it multiplies as well
        made = made.to(out.dtype.element_ty).to(tl.float32)
    made = made * (by + SHIFT)
    tl.store(out + row * size + places, made.to(out.dtype.element_ty), mask=inside)


def launch_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, shift: float) -> torch.Tensor:
    """As `fused.norm`."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    padded = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        _norm[(x.numel() // size,)](
            x,
            weight,
            out,
            size,
            eps,
            SHIFT=shift,
            SIZE_P=padded,
            num_warps=max(1, min(8, padded // 512)),
            enable_fp_fusion=False,
        )
    return out


@triton.jit
def _rotate(
    x, cosines, sines, out, heads, nodes,
    x_batch, x_head, x_row, out_batch, out_head, out_row, angle_batch, angle_row,
    HALF: tl.constexpr, HALF_P: tl.constexpr,
):  # fmt: skip
    """A head of a row."""
    which = tl.program_id(0)
    head, place = which % heads, which // heads
    row, batch = place % nodes, place // nodes
    low = tl.arange(0, HALF_P)
    inside = low < HALF
    kind = out.dtype.element_ty
    at, to = (
        x + batch * x_batch + head * x_head + row * x_row,
        out + batch * out_batch + head * out_head + row * out_row,
    )
    angle = batch * angle_batch + row * angle_row + low
    first, second = tl.load(at + low, mask=inside, other=0.0), tl.load(at + HALF + low, mask=inside, other=0.0)
    for half in tl.static_range(2):
        cosine = tl.load(cosines + angle + half * HALF, mask=inside, other=0.0).to(tl.float32)
        sine = tl.load(sines + angle + half * HALF, mask=inside, other=0.0).to(tl.float32)
        own = first.to(tl.float32) if half == 0 else second.to(tl.float32)
        other = -second.to(tl.float32) if half == 0 else first.to(tl.float32)
        turned = (own * cosine).to(kind).to(tl.float32) + (other * sine).to(kind).to(tl.float32)
        tl.store(to + half * HALF + low, turned.to(kind), mask=inside)


def launch_rotation(
    query: torch.Tensor, key: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `fused.rotated`."""
    cosines, sines = cosines.contiguous(), sines.contiguous()
    found = []
    half = query.shape[-1] // 2
    for x in (query, key):
        batch, heads, nodes, _ = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()
        out = torch.empty_like(x)
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            _rotate[(batch * nodes * heads,)](
                x, cosines, sines, out, heads, nodes, *x.stride()[:3], *out.stride()[:3],
                cosines.stride(0) if len(cosines) > 1 else 0, cosines.stride(1),
                HALF=half, HALF_P=triton.next_power_of_2(half), num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        found.append(out)
    return found[0], found[1]


@triton.jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr):
    """A block of numbers."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < count
    wide = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(out.dtype.element_ty).to(tl.float32)
    made = opened * tl.load(up + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + places, made.to(out.dtype.element_ty), mask=inside)


def launch_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `fused.gated`."""
    gate, up = gate.contiguous(), up.contiguous()
    out, block = torch.empty_like(gate), 1024
    with torch.cuda.device_of(gate):  # type: ignore[no-untyped-call]
        _gate[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), BLOCK=block, num_warps=4)
    return out
