"""The compiled part: `step.c`, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
import platform
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # first: the library uses the threads that torch has loaded, and none of its own

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of weights that there is code for, as `step.h` numbers them."""

EMBED, NORM, PROJECT, GATE, ACTIVATE, ROTATE, ATTEND, ADD_NORMED, NORM_HEADS, BEST = range(10)
"""Kinds of operations."""

ROOT_MEAN_SQUARE, LAYER_NORM, NO_NORM = range(3)
"""Kinds of norms."""

NORMED, ATTENDED, INNER = range(3)
"""Where an operation reads."""

TO_HEADS, TO_RESIDUAL, TO_LOGITS = range(3)
"""Where a projection writes."""

LARGE_PAGE = 1 << 21
"""Bytes."""

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu_squared")


class Op(ctypes.Structure):
    """An operation.

    Attributes:
        kind: one of the kinds above.
        origin, to: what a projection reads and writes.
        outputs, inputs: of a projection; of a norm of heads, how many numbers they have.
        layer: of the cache; of a norm of heads, where in a row they begin.
        option: of an embedding, 1 where its table lies in panels; of a norm, one of the kinds above; of a feed-forward
            network, the activation; of a rotation, 1 turns pairs that lie side by side and not halves; of attention,
            its window, or minus the size of its chunks, or 0.
        kept: only rows that need logits.
        span: of the layer's slots.
        table: of a rotation's angles.
        rotated: numbers of a head that are rotated, from the first on.
        eps: of norms.
        factor: of what an embedding or a projection gives; of attention, the cap of its scores, or 0.
        weight: panels, a table, or the weight of a norm; of a rotation, that of the queries' norm, or nothing.
        second: of a rotation, that of the keys' norm; of an embedding, the table of positions.
        bias: of a projection, or nothing.
    """

    _fields_ = [
        *((name, c_int32) for name in "kind origin to outputs inputs layer option kept span table rotated".split()),
        ("eps", c_float),
        ("factor", c_float),
        ("weight", c_void_p),
        ("second", c_void_p),
        ("bias", c_void_p),
    ]


class Program(ctypes.Structure):
    """A model: sizes, and the operations of a step."""

    _fields_ = [
        *((name, c_int32) for name in "dtype hidden heads key_heads size inner vocabulary count".split()),
        ("scale", c_float),
        ("cap", c_float),
        ("ops", POINTER(Op)),
    ]


class Step(ctypes.Structure):
    """What a step is given, and where it works; `step.h` says what each is."""

    _fields_ = [
        *((name, c_int32) for name in "rows kept threads best sequences".split()),
        *((name, c_void_p) for name in "ids angle prefix start path sequence keep keys values".split()),
        *((name, c_void_p) for name in "origin by_sequence by_head cosines sines".split()),
        *((name, c_void_p) for name in "residual heads logits scores normed attended inner".split()),
        ("scores_of_a_thread", c_int64),
        ("normed_of_a_thread", c_int64),
        ("partials", c_void_p),
        ("blocks", c_int64),
        ("found", c_void_p),
        ("next", c_void_p),
    ]


def huge(size: int) -> torch.Tensor:
    """At least so many bytes, in large pages where the system has them."""
    block = torch.empty(size + 2 * LARGE_PAGE, dtype=torch.uint8)
    block = block[-block.data_ptr() % LARGE_PAGE :]
    code = library()
    if code is not None:
        code.lookahead_large_pages(block.data_ptr(), size + -size % LARGE_PAGE)
    return block


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built, does not load, or has no code for this processor."""
    for path in sorted(Path(__file__).parent.glob("_step*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        found.lookahead_step.argtypes = [POINTER(Program), POINTER(Step), c_int32]
        found.lookahead_large_pages.argtypes = [c_void_p, c_int64]
        if found.lookahead_able():
            return found
    return None


@functools.cache
def kind() -> int:
    """Which code runs a step: 3 with AVX-512 and its products of bfloat16, 2 with AVX-512, 1 with AVX2.

    On an ARM processor 2 with products of bfloat16, 1 with NEON.
    """
    code = library()
    return 0 if code is None else int(code.lookahead_able())


def reads(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products read their rows, by that of the weights."""
    pairs = kind() == (2 if platform.machine() in ("aarch64", "arm64") else 3)
    return torch.bfloat16 if dtype == torch.bfloat16 and pairs else torch.float32


def why_no_library() -> str:
    """Why there is none; empty if there is."""
    if library() is not None:
        return ""
    if not any(Path(__file__).parent.glob("_step*.so")):
        return "the native step was not built with the package: install a C compiler and then the package again"
    return "the native step has no code for this processor"
