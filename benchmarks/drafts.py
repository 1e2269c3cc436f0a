"""A source of drafts for tests of exactness: it knows the plain text, and mixes wrong tokens and wrong siblings in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import lookahead_decoding as ld


def right_and_wrong(text: Sequence[int], vocab: int = 64) -> Callable[[Sequence[int]], list[list[int]]]:
    """A source that knows the plain continuation and mixes it with wrong tokens and wrong siblings.

    By the position it proposes a full match, one that goes wrong after some tokens, or nothing that matches.
    """

    def propose(so_far: Sequence[int]) -> list[list[int]]:
        true = list(text[len(so_far) : len(so_far) + 5])
        wrong = [(t + 1) % vocab for t in true]
        kind = random.Random(len(so_far)).randrange(3)
        if kind == 0:
            return [true, wrong]
        if kind == 1:
            good = max(1, len(true) // 2)
            return [true[:good] + wrong[good:], wrong]
        return [wrong, [*wrong[:1], *true[1:]]]

    return propose


class Accepted:
    """Which kinds of acceptance the steps of a run had: full, partial, none."""

    def __init__(self) -> None:
        self.kinds: set[str] = set()

    def watch(self, tree: ld.TokenTree, choice: ld.Choice) -> None:
        depths = tree.depths
        deepest = max((depths[n] for n in range(tree.first_candidate, len(tree))), default=0)
        accepted = len(choice.path) - 1
        if deepest:
            self.kinds.add("none" if not accepted else "full" if accepted == deepest else "partial")


@contextmanager
def watched(seen: Any = None) -> Iterator[Any]:
    """Shows every walk inside the `with` block to `seen.watch(tree, choice)`; by default, to an `Accepted`."""
    seen = Accepted() if seen is None else seen
    module = import_module("lookahead_decoding.engine.decode")
    plain = module.choose

    def choose(step: Any, trees: Any, samplers: Any, ranks: int = 0) -> Any:
        choices = plain(step, trees, samplers, ranks)
        for tree, choice in zip(trees, choices, strict=True):
            if tree is not None and choice is not None:
                seen.watch(tree, choice)
        return choices

    vars(module)["choose"] = choose
    try:
        yield seen
    finally:
        vars(module)["choose"] = plain
