"""What pays on this machine: the time of a step by its rows, and what rows bring on some prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import LookaheadConfig
from ..hf.generate import LookaheadDecoding, generate
from ..model.target import Target
from ..price.budget import StepTimes
from ..price.stats import PHASES, Stats
from .step import tree_of

TUNED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Rows of the steps that are timed."""

GRID = (
    (3, 3, 3),
    (5, 3, 5),
    (5, 5, 5),
    (7, 4, 7),
    (7, 5, 7),
    (10, 4, 10),
    (10, 5, 10),
    (15, 4, 15),
    (15, 5, 15),
    (20, 5, 20),
)
"""W, N and G of the paper's algorithm that are compared."""


@dataclass(frozen=True)
class Trial:
    """One configuration on the prompts.

    Attributes:
        name: of the configuration.
        stats: counts of each prompt.
        speedup: expected over plain decoding: tokens per step over the time of such a step, in plain steps.
    """

    name: str
    stats: tuple[Stats, ...]
    speedup: float

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step, over all prompts."""
        return sum(s.tokens - s.sequences for s in self.stats) / max(1, sum(s.sequence_steps for s in self.stats))

    @property
    def plain_share(self) -> float:
        """Share of steps that fed the current tokens alone, over all prompts."""
        return sum(s.plain_steps for s in self.stats) / max(1, sum(s.steps for s in self.stats))

    @property
    def rows_per_step(self) -> float:
        """Rows per step, over all prompts."""
        return sum(s.rows for s in self.stats) / max(1, sum(s.steps for s in self.stats))


def forward_times(
    model: PreTrainedModel, sizes: Sequence[int], execution: str, context: int = 256, repeats: int = 9
) -> Iterator[list[tuple[int, float]]]:
    """Seconds of a forward by rows, sizes taking turns: after every turn, the medians so far.

    Args:
        context: committed tokens; more do not matter much to a short step.
    """
    target = Target(model, context + max(sizes), execution=execution)
    target.prefill([[7] * context])
    target.commit([[0]])
    trees = [tree_of(size, target.strategy.paths) for size in sizes]
    taken: list[list[float]] = [[] for _ in sizes]
    for turn in range(repeats + 1):
        for times, tree in zip(taken, trees, strict=True):
            start = time.perf_counter()
            target.forward([tree]).argmax()
            if turn:  # the first may compile
                times.append(time.perf_counter() - start)
        if turn:
            yield [(size, median(times)) for size, times in zip(sizes, taken, strict=True)]


def run(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: LookaheadConfig, new_tokens: int, execution: str
) -> list[Stats]:
    """Answer the prompts greedily, to their full length."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        decoding = LookaheadDecoding(config, execution=execution)
        options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
        generate(model, ids, attention_mask=torch.ones_like(ids), lookahead=decoding, **options)
        found.append(decoding.stats)
    return found


def outside(stats: Sequence[Stats]) -> float:
    """Seconds of a step that are not its forward."""
    steps = max(1, sum(s.steps for s in stats))
    return sum(s.seconds[phase] for s in stats for phase in PHASES if phase != "forward") / steps


class Tuning:
    """Compares configurations by what they are expected to bring here.

    Args:
        forwards: seconds of a forward by rows.
        plain: counts of plain decoding on the prompts.
    """

    def __init__(self, forwards: Sequence[tuple[int, float]], plain: Sequence[Stats]) -> None:
        self._sizes = [rows for rows, _ in forwards]
        self._forward = StepTimes(forwards)
        self._plain = outside(plain)
        self._outside = [(1.0, self._plain)]

    def times(self) -> list[tuple[int, float]]:
        """t(n) with what is done outside the forward, which grows with the rows: what a profile holds."""
        wide = [(rows, taken) for rows, taken in self._outside if rows > 1]
        per_row = median([(taken - self._plain) / rows for rows, taken in wide]) if wide else 0.0
        return [(n, self._forward(n) + self._plain + max(0.0, per_row) * (n if n > 1 else 0)) for n in self._sizes]

    def judge(self, name: str, stats: Sequence[Stats]) -> Trial:
        """What a configuration's counts are worth at the measured times."""
        trial = Trial(name, tuple(stats), 0.0)
        taken = outside(stats)
        self._outside.append((trial.rows_per_step, taken))
        plain = self._forward(1) + self._plain
        share = trial.plain_share
        fed = (trial.rows_per_step - share) / (1 - share) if share < 1 else 1.0  # rows of the steps that are not plain
        mean = share * self._forward(1) + (1 - share) * self._forward(max(1, round(fed)))
        return Trial(name, trial.stats, trial.mean_acceptance_length * plain / (mean + taken))


def trials(
    tuning: Tuning,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    execution: str,
    grid: Sequence[tuple[int, int, int]] = GRID,
) -> Iterator[Trial]:
    """The paper's algorithm at every point of a grid and then the adaptive default."""
    for w, n, g in grid:
        stats = run(model, prompts, LookaheadConfig.paper(w, n, g), new_tokens, execution)
        yield tuning.judge(f"{w},{n},{g}", stats)
    # Wide trees first, so that the adaptive one knows what is done outside the forward.
    wide = LookaheadConfig(step_times=((1, 1.0),), max_rows=32)
    tuning.judge("wide", run(model, prompts, wide, new_tokens, execution))
    adaptive = LookaheadConfig(step_times=tuple(tuning.times()))
    yield tuning.judge("adaptive", run(model, prompts, adaptive, new_tokens, execution))
