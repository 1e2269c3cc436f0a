"""The compiled part: `step.c`, loaded with ctypes."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # first: the library uses the threads that torch has loaded, and none of its own

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of weights that there is code for, as `step.c` numbers them."""

EMBED, NORM, PROJECT, GATE, ROTATE, ATTEND, BEST = range(7)
"""Kinds of operations."""

NORMED, ATTENDED, INNER = range(3)
"""Where an operation reads."""

TO_HEADS, TO_RESIDUAL, TO_LOGITS = range(3)
"""Where a projection writes."""

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


class Op(ctypes.Structure):
    """An operation.

    Attributes:
        kind: one of the kinds above.
        origin, to: what a projection reads and writes.
        outputs, inputs: of a projection.
        layer: of the cache.
        option: of a norm, 1 takes the mean away first; of a gate, the activation; of attention, the window, or 0.
        kept: only rows that need logits.
        eps: of norms.
        factor: of what an embedding or a projection gives; of attention, the cap of its scores, or 0.
        weight: panels, a table, or the weight of a norm; of a rotation, that of the queries' norm, or nothing.
        second: of a rotation, that of the keys' norm.
        bias: of a projection, or nothing.
    """

    _fields_ = [
        *((name, c_int32) for name in "kind origin to outputs inputs layer option kept".split()),
        ("eps", c_float),
        ("factor", c_float),
        ("weight", c_void_p),
        ("second", c_void_p),
        ("bias", c_void_p),
    ]


class Program(ctypes.Structure):
    """A model: sizes, and the operations of a step."""

    _fields_ = [
        *((name, c_int32) for name in "dtype hidden heads key_heads size inner vocabulary rotated count".split()),
        ("scale", c_float),
        ("cap", c_float),
        ("ops", POINTER(Op)),
    ]


class Step(ctypes.Structure):
    """What a step is given, and where it works; `step.c` says what each is."""

    _fields_ = [
        *((name, c_int32) for name in "rows kept threads best".split()),
        *((name, c_void_p) for name in "ids position slot prefix start path sequence keep keys values".split()),
        ("by_sequence", c_int64),
        ("by_head", c_int64),
        *((name, c_void_p) for name in "cosines sines residual heads logits scores normed attended inner".split()),
        ("scores_of_a_thread", c_int64),
        ("normed_of_a_thread", c_int64),
        ("found", c_void_p),
        ("next", c_void_p),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library; None where it was not built, does not load, or has no code for this processor."""
    for path in sorted(Path(__file__).parent.glob("_step*.so")):
        try:
            found = ctypes.CDLL(str(path))
        except OSError:
            continue
        found.lookahead_step.argtypes = [POINTER(Program), POINTER(Step)]
        if found.lookahead_able():
            return found
    return None


def why_no_library() -> str:
    """Why there is none; empty if there is."""
    if library() is not None:
        return ""
    if not any(Path(__file__).parent.glob("_step*.so")):
        return "the native step was not built, for want of a C compiler when the package was"
    return "the native step has no code for this processor"
