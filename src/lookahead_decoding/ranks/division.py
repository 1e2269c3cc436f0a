"""How ranks share a step: who evaluates which part of the trees, and what they tell each other about it.

Integers only. A message has the same size in all steps of a request, whatever the trees are.
"""

from __future__ import annotations

import functools
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..draft.lookahead import Walk
from ..draft.tree import Shard, TokenTree

REASONS = (None, "stop", "length")
"""Why a sequence ends, as a message says it."""


class Header(NamedTuple):
    """What a rank says of a step.

    Attributes:
        step: its number.
        text: checksum of all committed tokens.
        trees: checksum of the step's trees.
        fed_again: accepted tokens that the rank's forward fed once more.
        time: microseconds of its own work for the step.
        gathering, sending: microseconds that the last step's message, and its keys and values, took.
    """

    step: int
    text: int
    trees: int
    fed_again: int
    time: int
    gathering: int
    sending: int


@dataclass(frozen=True)
class Said:
    """What a rank says of one sequence.

    Attributes:
        last: node at which its walk ended.
        bonus: token that it emitted there.
        reason: whether and why the sequence ended with that.
        best: the target's best tokens, best first, after the nodes that are the rank's to tell of.
    """

    last: int = 0
    bonus: int = 0
    reason: str | None = None
    best: Sequence[Sequence[int]] = field(default=())


@dataclass(frozen=True)
class Layout:
    """Of a message, in integers of 4 bytes.

    Attributes:
        sequences: of the batch.
        nodes: of each sequence of whose best tokens one rank tells; nobody learns from what is more.
        width: best tokens per node.
    """

    sequences: int
    nodes: int
    width: int

    @property
    def _each(self) -> int:
        return 3 + self.nodes * self.width

    def write(self, header: Header, said: Sequence[Said]) -> list[int]:
        """A message."""
        numbers = list(header)
        for one in said:
            own = [one.last, one.bonus, REASONS.index(one.reason)]
            for best in one.best[: self.nodes]:
                own += [*best[: self.width], *[-1] * (self.width - len(best))]
            numbers += own + [-1] * (self._each - len(own))
        return numbers

    def read(self, numbers: Sequence[int]) -> tuple[Header, list[Said]]:
        """What a message says; behind the nodes that a rank tells of, `best` has empty entries."""
        header, rest = Header(*numbers[: len(Header._fields)]), numbers[len(Header._fields) :]
        found = []
        for start in range(0, self.sequences * self._each, self._each):
            last, bonus, reason, *best = rest[start : start + self._each]
            rows = [best[i : i + self.width] for i in range(0, len(best), self.width)]
            known = [[token for token in row if token >= 0] for row in rows]
            found.append(Said(last, bonus, REASONS[reason], known))
        return header, found


@dataclass(frozen=True)
class Division:
    """How the trees of a step are divided.

    Attributes:
        trees: of all sequences; None where one has ended.
        leads: of each rank, per sequence, the accepted tokens that it is fed again, in front of its shard.
    """

    trees: Sequence[TokenTree | None]
    leads: Sequence[Sequence[Sequence[int]]]

    @functools.cached_property
    def shards(self) -> list[list[Shard | None]]:
        """Of each rank, one per sequence; a rank that is fed much again has a smaller one."""
        columns: list[Sequence[Shard | None]] = [
            tree.shards([len(own[b]) for own in self.leads]) if tree is not None else [None] * len(self.leads)
            for b, tree in enumerate(self.trees)
        ]
        return [[column[rank] for column in columns] for rank in range(len(self.leads))]

    def fed(self, rank: int) -> list[TokenTree | None]:
        """What a rank is fed: for each sequence its shard, behind a chain of what is fed again."""
        pairs = zip(self.leads[rank], self.shards[rank], strict=True)
        return [behind(lead, part.tree) if part is not None else None for lead, part in pairs]

    def places(self, rank: int, sequence: int) -> dict[int, int]:
        """For each node of a sequence's tree that a rank evaluates, its node in what the rank is fed."""
        part, lead = self.shards[rank][sequence], len(self.leads[rank][sequence])
        return {node: lead + i for i, node in enumerate(part.nodes)} if part is not None else {}

    def held(self, rank: int, sequence: int, path: Sequence[int]) -> int:
        """How many nodes of a path, from the root on, a rank evaluates."""
        own = self.places(rank, sequence)
        return next((i for i, node in enumerate(path) if node not in own), len(path))

    def local(self, rank: int, sequence: int, path: Sequence[int]) -> list[int]:
        """A path in what a rank is fed, as far as it evaluates it, with what it was fed again; empty if that is."""
        own = self.places(rank, sequence)
        lead = range(len(self.leads[rank][sequence]) if path else 0)
        return [*lead, *(own[node] for node in path[: self.held(rank, sequence, path)])]

    @functools.cached_property
    def tellers(self) -> list[list[list[int]]]:
        """Of each rank and sequence, the nodes it tells of: those with logits that no rank before it has."""
        left = [set(tree.scored) if tree is not None else set() for tree in self.trees]
        found = []
        for parts in self.shards:
            pairs = list(zip(parts, left, strict=True))
            found.append([[n for n in part.nodes if n in rest] if part is not None else [] for part, rest in pairs])
            for rest, nodes in zip(left, found[-1], strict=True):
                rest.difference_update(nodes)
        return found

    def said(self, rank: int, walks: Sequence[Walk | None]) -> list[Said]:
        """What a rank says of its walks."""
        return [
            Said(walk.path[-1], walk.tokens[-1], walk.finish_reason, [walk.ranked[node] for node in nodes])
            if walk is not None
            else Said()
            for walk, nodes in zip(walks, self.tellers[rank], strict=True)
        ]

    def longest(self, sequence: int, said: Sequence[Sequence[Said]], per_shard: int = 1) -> Walk | None:
        """The longest walk of a sequence, the first of several, with what all ranks tell of its nodes.

        Args:
            said: of each rank, per sequence.
            per_shard: ranks that evaluate the same shard, one behind the other.
        """
        tree = self.trees[sequence]
        if tree is None:
            return None
        depths = tree.depths
        farthest = max((own[sequence] for own in said), key=lambda one: depths[one.last])
        path = tree.path(farthest.last)
        ranked: dict[int, Sequence[int]] = {}
        for own, nodes in zip(said[::per_shard], self.tellers, strict=True):
            ranked.update(zip(nodes[sequence], own[sequence].best, strict=False))
        tokens = (*(tree.tokens[node] for node in path[1:]), farthest.bonus)
        return Walk(tokens, tuple(path), farthest.reason, ranked)

    @property
    def digest(self) -> int:
        """Equal where the trees are."""
        return checksum([n for t in self.trees for n in ((*t.tokens, *t.parents, *t.last_row, -2) if t else (-1,))])


def checksum(numbers: Sequence[int], before: int = 0) -> int:
    """Of integers, and of those before them, in 31 bits."""
    return zlib.crc32(array("q", numbers).tobytes(), before) >> 1


def behind(lead: Sequence[int], tree: TokenTree) -> TokenTree:
    """A tree with a chain of tokens in front of its root, whose logits are wanted still."""
    n = len(lead)
    if not n:
        return tree
    parents = (*range(-1, n - 1), *(parent + n for parent in tree.parents))
    last_row = (n, *(node + n for node in tree.last_row if node))
    return TokenTree((*lead, *tree.tokens), parents, last_row, tree.first_candidate + n)


def rows_of(nodes: Sequence[int], places: Mapping[int, int]) -> dict[int, int]:
    """For each node of a tree that has logits, its row.

    Args:
        nodes: of what was fed, whose logits there are, in the order of the rows.
        places: for nodes of the tree, those of what was fed.
    """
    row_of = {node: row for row, node in enumerate(nodes)}
    return {node: row_of[place] for node, place in places.items() if place in row_of}


def divided(times: Sequence[tuple[int, float]], shards: int) -> list[tuple[int, float]]:
    """t(n) of steps that are divided over ranks, from t(n) of one rank: a step of one row is none the faster."""
    return [(rows if rows == 1 else rows * shards, time) for rows, time in times]
