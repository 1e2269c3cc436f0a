"""The settings of lookahead decoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NoReturn

SOURCES = ("window", "prompt", "output", "recycled", "shared")

EXECUTIONS = ("auto", "eager", "packed", "native", "captured", "compiled")
"""How a step may run (see `Target`)."""

MAX_ROWS = 64
"""Rows of a step at most, where the caller says nothing; a window of a fixed size comes on top."""

NGRAM_SIZE = 4
"""N of a window of which it is not given."""


TYPICAL_TIMES = ((1, 26.5), (2, 27.5), (8, 29.0), (16, 31.3), (32, 37.4), (64, 44.8))
"""Milliseconds of a step by its rows: pocket with 134 M parameters, bfloat16, two cores of an Intel Xeon
(benchmarks/results/cpu-2-cores/2026-11-25-step-134M-bfloat16-packed.json, context 256)."""


class LookaheadWarning(UserWarning):
    """Something that makes decoding slower than it could be."""


@dataclass(frozen=True)
class LookaheadConfig:
    """What one step may guess and check. Nothing has to be given: what is left out adapts while decoding.

    Attributes:
        window_size: W, columns of the window (arXiv 2402.02057, section 3): how many future positions are guessed at
            once. At least 1. Left out, the window has the size that pays, which may be none.
        ngram_size: N, length of the window's n-grams. At least 2.
        verification_set_size: G, n-grams kept per first token. At least 0, which keeps none.
        sources: where candidates come from, any of "window", "prompt", "output", "recycled" and, where a shared pool
            is given, "shared". None at all is plain decoding.
        max_rows: nodes of one sequence's tree at most, root and window included; left out, 64, and a window of a fixed
            size comes on top. A fixed window must fit.
        max_paths: candidates of one sequence's tree at most, window left out; those with a common beginning count each.
            1 is a chain. Left out, as many as the rows allow and the model can check (see `Target`).
        step_times: t(n) as pairs of rows and time, in any unit, between which lines are drawn; one pair says that rows
            cost nothing. Left out, times are measured. The tokens do not depend on them, only the trees do.
        adaptive: False is the paper's algorithm, with all three sizes given: a fixed window, n-grams of the
            window, prompt and output in one pool that is asked at the root, and every candidate taken. See `paper`.
        window_seed: seeds the window's random first row. It changes how many steps the text takes, never the text.
        reproducible: True keeps the clock out of it: where `step_times` are not given they are those of a typical CPU,
            so every run feeds the same trees. In bfloat16 the last bits of a forward depend on how many rows it has,
            and so the text is then the same from run to run; plain decoding's may still be another.

    Raises:
        TypeError: a size is not an integer, or a sequence is not one.
        ValueError: a value is out of range, or a source is unknown.
    """

    window_size: int | None = None
    ngram_size: int | None = None
    verification_set_size: int | None = None
    sources: tuple[str, ...] = SOURCES
    max_rows: int | None = None
    max_paths: int | None = None
    step_times: tuple[tuple[int, float], ...] | None = None
    adaptive: bool = True
    window_seed: int = 0
    reproducible: bool = False

    @classmethod
    def paper(
        cls,
        window_size: int = 15,
        ngram_size: int = 5,
        verification_set_size: int = 15,
        sources: Sequence[str] = ("window",),
        window_seed: int = 0,
    ) -> LookaheadConfig:
        """The paper's algorithm with a fixed (W, N, G), for comparison; also with the n-grams of prompt and output."""
        return cls(
            window_size, ngram_size, verification_set_size, tuple(sources), adaptive=False, window_seed=window_seed
        )

    @property
    def fixed_times(self) -> tuple[tuple[int, float], ...] | None:
        """t(n) that no clock changes; None where it is to be measured."""
        if self.step_times is None and not self.adaptive:
            return ((1, 1.0),)  # the paper's rows cost nothing
        return TYPICAL_TIMES if self.step_times is None and self.reproducible else self.step_times

    @property
    def most_rows(self) -> int:
        """Nodes of the largest tree."""
        if self.max_rows is not None:
            return self.max_rows
        if not self.sources:
            return 1
        drafts = (self.ngram_size or NGRAM_SIZE) - 1
        window = drafts * (self.window_size or 0) if "window" in self.sources else 0
        if self.adaptive:
            return MAX_ROWS + window
        return max(1, window) + drafts * (self.verification_set_size or 0)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """`custom_generate=` passes over what it cannot call; a config would be ignored there without a word."""
        raise TypeError("custom_generate takes a LookaheadDecoding: pass LookaheadDecoding(config)")

    def __post_init__(self) -> None:
        least = {"window_size": 1, "ngram_size": 2, "verification_set_size": 0, "max_rows": 1, "max_paths": 1}
        for name in (*least, "window_seed"):
            value = getattr(self, name)
            if (not isinstance(value, int) or isinstance(value, bool)) and not (value is None and name in least):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        if (
            isinstance(self.sources, str)
            or not isinstance(self.sources, Sequence)
            or not all(isinstance(s, str) for s in self.sources)
        ):
            raise TypeError(f"sources must be a sequence of names, such as ('window',), got {self.sources!r}")
        object.__setattr__(self, "sources", tuple(self.sources))
        for name in self.sources:
            if name not in SOURCES:
                raise ValueError(f"unknown source {name!r}: choose from {', '.join(SOURCES)}")
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"sources names one twice: {', '.join(self.sources)}")
        if self.step_times is not None:
            object.__setattr__(self, "step_times", _step_times(self.step_times))
        if not isinstance(self.reproducible, bool):
            raise TypeError(f"reproducible must be True or False, got {self.reproducible!r}")
        if not self.adaptive:
            for name in ("window_size", "ngram_size", "verification_set_size"):
                if getattr(self, name) is None:
                    raise ValueError(f"adaptive=False needs {name}: use LookaheadConfig.paper(W, N, G)")
            for name in ("recycled", "shared"):
                if name in self.sources:
                    raise ValueError(
                        f"adaptive=False is the paper's algorithm, which has no source {name!r}: leave it out"
                    )
        elif "window" not in self.sources:
            for name in ("window_size", "ngram_size", "verification_set_size"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is the window's, which sources leave out: add 'window' or leave it out")
        if self.window_size is not None and "window" in self.sources:
            rows = ((self.ngram_size or NGRAM_SIZE) - 1) * self.window_size
            if rows > self.most_rows:
                raise ValueError(f"the window has {rows} rows and max_rows is {self.most_rows}: make one fit the other")


def _step_times(pairs: Iterable[Sequence[Any]]) -> tuple[tuple[int, float], ...]:
    try:
        times = tuple((index(rows), float(time)) for rows, time in pairs)
    except (TypeError, ValueError):
        raise TypeError(
            f"step_times must be pairs of rows, an integer, and time, such as ((1, 2.0), (64, 3.5)), got {pairs!r}"
        ) from None
    if not times or any(rows < 1 or not 0 < time < float("inf") for rows, time in times):
        raise ValueError(f"step_times needs rows of at least 1 and times above 0, got {times}")
    if len({rows for rows, _ in times}) < len(times):
        raise ValueError(f"step_times names a number of rows twice, got {times}")
    return times


PLAIN = LookaheadConfig(sources=())
"""Plain decoding: every step is the current token alone."""
