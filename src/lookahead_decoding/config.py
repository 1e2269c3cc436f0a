"""The settings of lookahead decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

SOURCES = ("window", "prompt", "output")


@dataclass(frozen=True)
class LookaheadConfig:
    """How many tokens one step guesses and checks (W, N and G of the paper, arXiv 2402.02057, section 3).

    Attributes:
        window_size: W, columns of the window: how many future positions are guessed at once. At least 1.
        ngram_size: N, length of the n-grams in the pool: a candidate has N - 1 draft tokens. At least 2.
        verification_set_size: G, n-grams kept per first token, and so the most candidates checked in a step. At
            least 0, which checks none.
        sources: where candidates come from, any of "window", "prompt" and "output". None at all is plain decoding.
        window_seed: seeds the window's random first row. It changes how many steps the text takes, never the text.

    Raises:
        TypeError: a size is not an integer, or `sources` is not a sequence of names.
        ValueError: a size is out of range, or a source is unknown.
    """

    window_size: int = 15
    ngram_size: int = 5
    verification_set_size: int = 15
    sources: tuple[str, ...] = SOURCES
    window_seed: int = 0

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """`custom_generate=` passes over what it cannot call; a config would be ignored there without a word."""
        raise TypeError("custom_generate takes a LookaheadDecoding: pass LookaheadDecoding(config)")

    def __post_init__(self) -> None:
        least = {"window_size": 1, "ngram_size": 2, "verification_set_size": 0}
        for name in (*least, "window_seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")
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


PLAIN = LookaheadConfig(sources=())
"""Plain decoding: every step is the current token alone."""
