"""A token tree that grows by its most likely node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

from .sources import Acceptance, Source
from .tree import TokenTree


class GrowingTree:
    """The tree of a step in the making.

    Each source is asked at each node. The chance of a node is the chance of its parent times that of its evidence (and,
    under the root, the scale of all chances). The most likely node comes next, so a parent stands before its children,
    and the first nodes of the tree are the best tree of that size.

    Args:
        start: the root, and the window under it.
        text: whose end the root is.
        sources: what is asked.
        acceptance: the chance of a draft by its evidence.
        max_depth: no node stands deeper.
        floor: drafts whose chance is not above this are left out.
        max_paths: candidates at most; None is any number.

    Attributes:
        tokens, parents: of all nodes so far, as in a `TokenTree`.
        expected: tokens that the step is expected to give, by the number of candidate nodes: `expected[0]` is 1.
        proposals: of every node that was asked, tokens with their evidence.
        evidence: of every candidate node.
    """

    def __init__(
        self,
        start: TokenTree,
        text: Sequence[int],
        sources: Sequence[Source],
        acceptance: Acceptance,
        max_depth: int,
        floor: float = 0.0,
        max_paths: int | None = None,
    ) -> None:
        self._start = start
        shifts = accumulate((source.bits for source in sources), initial=0)
        self._asked = [(source, shift) for source, shift in zip(sources, shifts, strict=False) if not source.silent]
        self._means, self._assume = acceptance.means, acceptance.assume
        self._max_depth = max_depth
        self._floor = floor
        self._paths_left = max_paths
        self._continued = {0}  # nodes a further child of which begins a new path
        self.tokens = list(start.tokens)
        self.parents = list(start.parents)
        self._heap: list[tuple[float, int, int, int, int]] = []  # -chance, age, parent, token, evidence
        self._age = 0
        self._planned = 0
        self._nodes: dict[int, tuple[int, float, list[Any]]] = {}  # depth, chance and states of those asked
        self.expected = [1.0]
        self.evidence: list[int] = []
        self.proposals: dict[int, dict[int, int]] = {}
        self._ask(0, 0, acceptance.scale, [source.root(text) for source, _ in self._asked])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def next_chance(self) -> float:
        """Of the node that comes next; 0 where there is none."""
        return -self._heap[0][0] if self._heap else 0.0

    def grow(self, rows: int) -> float:
        """Grow to so many nodes, as far as there are candidates; returns the expected tokens."""
        while self._heap and len(self.tokens) < rows:
            chance, _, parent, token, evidence = heappop(self._heap)
            if self._paths_left is not None and not self._may_stand(parent):
                continue
            depth, _, states = self._nodes[parent]
            node = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(parent)
            self.evidence.append(evidence)
            self.expected.append(self.expected[-1] - chance)
            below = [source.follow(state, token) for (source, _), state in zip(self._asked, states, strict=True)]
            self._ask(node, depth + 1, -chance, below)
        return self.expected[-1]

    def _may_stand(self, parent: int) -> bool:
        """Whether there is a path left for one more node; if so it is taken."""
        if parent in self._continued:
            if not self._paths_left:
                return False
            self._paths_left -= 1
        self._continued.add(parent)
        return True

    def _ask(self, node: int, depth: int, chance: float, states: list[Any]) -> None:
        found: dict[int, int] = {}
        known = found.get
        for (source, shift), state in zip(self._asked, states, strict=True):
            for token, mark in source.propose(state):
                found[token] = known(token, 0) + (mark << shift)
        self.proposals[node] = found
        self._nodes[node] = depth, chance, states
        if depth >= self._max_depth:
            return
        means, assume, floor, heap, age = self._means, self._assume, self._floor, self._heap, self._age
        for token, evidence in found.items():
            likely = chance * (means[evidence] if evidence in means else assume(evidence))
            if likely > floor:
                age += 1
                heappush(heap, (-likely, age, node, token, evidence))
        self._age = age

    @property
    def window_rows(self) -> int:
        """Nodes of the window besides the root."""
        return len(self._start) - 1

    def tree(self, rows: int) -> TokenTree:
        """The first nodes, the root and the window among them: the tree that is planned."""
        size = max(rows, len(self._start))
        self._planned = size - len(self._start)
        return TokenTree(
            tuple(self.tokens[:size]), tuple(self.parents[:size]), self._start.last_row, self._start.first_candidate
        )

    def planned(self) -> Iterator[tuple[int, int]]:
        """The candidate nodes of the tree that is planned, with their evidence."""
        return enumerate(self.evidence[: self._planned], len(self._start))
