"""What a step costs by its rows, ours and the same rows through the model's own attention with a mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from transformers import PreTrainedModel

from ..target import Target
from ..tree import TokenTree, build_tree

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
CONTEXTS = (256, 1024, 4096)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one forward of `rows` rows behind `context` committed tokens, medians of runs taking turns."""

    rows: int
    context: int
    ours: float
    stock: float


def tree_of(rows: int) -> TokenTree:
    """A tree of exactly so many rows: a window of up to 15 columns and four rows, and candidates of four tokens."""
    width = min(15, rows // 8)
    window = [[10 + 20 * row + column for column in range(width)] for row in range(4)] if width else []
    drafts = [[200 + 7 * i + depth for depth in range(4)] for i in range(rows)]
    tree = build_tree(5, window, drafts, max_rows=rows)
    # Tokens that any vocabulary has: only the shape of the tree matters here.
    return TokenTree(tuple(t % 50 for t in tree.tokens), tree.parents, tree.last_row, tree.first_candidate)


def seconds(runs: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median time of each, taking turns, after one turn that is not counted."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for times, run in zip(taken, runs, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                times.append(time.perf_counter() - start)
    return [median(times) for times in taken]


def step_times(
    model: PreTrainedModel, rows: Sequence[int] = ROWS, contexts: Sequence[int] = CONTEXTS, repeats: int = 15
) -> Iterator[StepTime]:
    """t(n): the time of a step by rows, at several contexts.

    Args:
        contexts: committed tokens; they may pass the model's trained context, which does not matter for time.
    """
    for context in contexts:
        targets = [Target(model, context + max(rows)), Target.with_attention(model, context + max(rows))]
        for target in targets:
            for first in range(0, context, 512):
                target.prefill([[7] * min(512, context - first)])
                target.commit([[0]])
        for n in rows:
            tree = tree_of(n)

            def forward(target: Target, tree: TokenTree = tree) -> None:
                target.forward([tree]).argmax()

            both = [lambda t=target: forward(t) for target in targets]
            ours, stock = seconds(both, repeats)
            yield StepTime(n, context, 1e3 * ours, 1e3 * stock)
        del targets, target


def commit_times(model: PreTrainedModel, contexts: Sequence[int] = (256, 8192), repeats: int = 50) -> dict[int, float]:
    """Milliseconds to commit four accepted rows out of 64, by committed tokens."""
    tree = tree_of(64)
    path = [0, len(tree) - 9, len(tree) - 7, len(tree) - 3]
    targets = {context: Target(model, context + 64 + 1) for context in contexts}
    runs = []
    for context, target in targets.items():
        target.prefill([[7] * 4])
        target.commit([[0]])
        target.forward([tree])

        def commit(target: Target = target, context: int = context) -> None:
            target.cache.slots.lengths[0] = context - len(path)
            target.commit([path])

        runs.append(commit)
    return dict(zip(contexts, (1e3 * s for s in seconds(runs, repeats)), strict=True))


def outside_share(seconds_by_phase: dict[str, float]) -> dict[str, float]:
    """Share of each part of a step, prefill left out."""
    parts = {name: taken for name, taken in seconds_by_phase.items() if name != "prefill"}
    total = sum(parts.values()) or 1.0
    return {name: taken / total for name, taken in parts.items()}
