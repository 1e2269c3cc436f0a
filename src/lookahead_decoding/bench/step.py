"""What a step costs by its rows, ours and the same rows through the model's own attention with a mask."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from ..draft.tree import TokenTree, build_tree
from ..model.target import Target

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
CONTEXTS = (256, 1024, 4096)


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of one forward of `rows` rows behind `context` committed tokens, medians of runs taking turns.

    Attributes:
        stock: of the same tree through the model's own attention; None for a model that takes no tree.
    """

    rows: int
    context: int
    ours: float
    stock: float | None


def tree_of(rows: int, paths: int | None = None) -> TokenTree:
    """A tree of exactly so many rows: a window of up to 15 columns and four rows, and candidates of four tokens.

    Args:
        paths: candidates at most, which are then as long as it takes; there is no window.
    """
    if paths is not None:
        lengths = [(rows - 1 + i) // paths for i in range(paths)]
        drafts = [[200 + 97 * i + depth for depth in range(length)] for i, length in enumerate(lengths)]
        tree = build_tree(5, (), drafts)
        return TokenTree(tuple(t % 50 for t in tree.tokens), tree.parents)
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


@dataclass(frozen=True)
class Limits:
    """What the machine allows, roughly: a step takes the time to read its weights, or to compute its products.

    For a dense model that no processor's cache holds. Attention is left out, and every row has logits.

    Attributes:
        weight_bytes: of all weights but the embedding, of which a step looks up a few rows.
        bytes_per_s: read by a sum over 512 MiB.
        operations_per_s: of a linear layer of 256 to 4,096 features with as many rows in the model's dtype, two per
            multiply-add: the largest before one takes 50 ms.
        products: multiply-adds of a row.
    """

    weight_bytes: int
    bytes_per_s: float
    operations_per_s: float
    products: int

    def milliseconds(self, rows: int) -> float:
        """What a forward of so many rows takes at these rates."""
        read = self.weight_bytes / self.bytes_per_s
        return 1e3 * max(read, 2 * rows * self.products / self.operations_per_s)


def limits(model: PreTrainedModel) -> Limits:
    """Measure the machine for a model."""
    looked_up = {id(model.get_input_embeddings().weight)} - {id(getattr(model.get_output_embeddings(), "weight", None))}
    weights = [p for p in model.parameters() if id(p) not in looked_up]
    memory = torch.ones(1 << 27, device=model.device)
    (read,) = seconds([lambda: memory.sum().item()], 7)
    size, product = 128, 0.0
    while size < 4096 and product < 0.05:
        size *= 2
        square = torch.randn(size, size, device=model.device).to(model.dtype)
        (product,) = seconds([lambda: linear(square, square)[0, 0].item()], 5)  # noqa: B023  # called at once
    return Limits(
        weight_bytes=sum(p.nbytes for p in weights),
        bytes_per_s=memory.nbytes / read,
        operations_per_s=2 * size**3 / product,
        products=sum(p.numel() for p in weights if p.ndim > 1),
    )


def cache_bytes(model: PreTrainedModel, capacity: int = 300) -> tuple[int, int]:
    """Bytes that the keys and values of a request hold, and those that its capacity in tokens needs."""
    target = Target(model, capacity, execution="eager")  # a captured cache is larger, since it serves later requests
    target.prefill([[7, 7]])
    attending = [layer for layer in target.cache.layers if getattr(layer, "keys", None) is not None]
    needed = sum(b[:1, :, :1].nbytes for layer in attending for b in (layer.keys, layer.values))
    return sum(stack.nbytes for slots in target.cache.all_slots for stack in slots.stacks), needed * capacity


def step_times(
    model: PreTrainedModel,
    rows: Sequence[int] = ROWS,
    contexts: Sequence[int] = CONTEXTS,
    repeats: int = 15,
    execution: str = "auto",
) -> Iterator[StepTime]:
    """t(n): the time of a step by rows, at several contexts.

    Args:
        contexts: committed tokens; they may pass the model's trained context, which does not matter for time.
        execution: of our step, as `Target` takes it.
    """
    for context in contexts:
        capacity = context + max(rows)
        ours = Target(model, capacity, execution=execution)
        paths = ours.strategy.paths
        targets = [ours]
        if paths is None:
            targets.append(Target.with_attention(model, capacity, packed=ours.execution == "packed"))
        for target in targets:
            for first in range(0, context, 512):
                target.prefill([[7] * min(512, context - first)])
                target.commit([[0]])
        for n in rows:
            tree = tree_of(n, paths)

            def forward(target: Target, tree: TokenTree = tree) -> None:
                target.forward([tree]).argmax()

            runs = [partial(forward, target) for target in targets]
            taken = [1e3 * s for s in seconds(runs, repeats)]
            yield StepTime(n, context, taken[0], taken[1] if len(taken) > 1 else None)
        del targets, target, ours


def commit_times(model: PreTrainedModel, contexts: Sequence[int] = (256, 8192), repeats: int = 50) -> dict[int, float]:
    """Milliseconds to commit four accepted rows out of 64, by committed tokens; of a model that takes trees."""
    tree = tree_of(64)
    path = [0, len(tree) - 9, len(tree) - 7, len(tree) - 3]
    targets = {context: Target(model, context + 64 + 1) for context in contexts}
    runs = []
    for context, target in targets.items():
        target.prefill([[7] * 4])
        target.commit([[0]])
        target.forward([tree])

        def commit(target: Target = target, context: int = context) -> None:
            target.lengths[0] = context - len(path)
            for slots in target.cache.all_slots:
                slots.starts[0] = max(0, context - slots.window) if slots.window else 0
            target.commit([path])

        runs.append(commit)
    return dict(zip(contexts, (1e3 * s for s in seconds(runs, repeats)), strict=True))


def outside_share(seconds_by_phase: dict[str, float]) -> dict[str, float]:
    """Share of each part of a step, prefill left out."""
    parts = {name: taken for name, taken in seconds_by_phase.items() if name != "prefill"}
    total = sum(parts.values()) or 1.0
    return {name: taken / total for name, taken in parts.items()}
