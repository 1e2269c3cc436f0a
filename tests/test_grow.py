from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import build_tree
from lookahead_decoding.draft.grow import GrowingTree
from lookahead_decoding.draft.sources import Acceptance, OwnSource


class Scripted:
    """Proposes the same tokens everywhere; a mark of 1 means a chance of a half, and of 2 a quarter."""

    name = "scripted"
    bits = 2
    silent = False

    def __init__(self, *proposals: tuple[int, int]) -> None:
        self.proposals = proposals

    def root(self, text: Sequence[int]) -> None: ...

    def follow(self, state: None, token: int) -> None: ...

    def propose(self, state: None) -> Iterable[tuple[int, int]]:
        return self.proposals

    def prior(self, mark: int) -> float:
        return 0.5**mark


def growing(*sources: object, depth: int = 9, floor: float = 0.0, window: Sequence[Sequence[int]] = ()) -> GrowingTree:
    start = build_tree(0, window, max_depth=depth)
    return GrowingTree(start, [0], sources, Acceptance(sources), depth, floor)  # type: ignore[arg-type]


def test_the_most_likely_node_comes_next_whatever_its_depth() -> None:
    tree = growing(Scripted((7, 1), (8, 2)))
    assert tree.grow(5) == 1 + 0.5 + 0.25 + 0.25 + 0.125
    assert tree.tree(5).tokens == (0, 7, 8, 7, 8)
    assert tree.tree(5).parents == (-1, 0, 0, 1, 1)
    assert tree.next_chance == 0.125
    assert tree.expected == [1, 1.5, 1.75, 2.0, 2.125]


def test_the_first_nodes_are_the_best_tree_of_their_size() -> None:
    large, small = growing(Scripted((7, 1), (8, 2))), growing(Scripted((7, 1), (8, 2)))
    large.grow(20)
    small.grow(6)
    assert large.tree(6) == small.tree(6)


def test_no_more_candidates_than_allowed() -> None:
    source = Scripted((7, 1), (8, 2))
    tree = GrowingTree(build_tree(0), [0], [source], Acceptance([source]), 9, max_paths=1)
    tree.grow(5)
    assert tree.tree(5).paths() == [[0, 1, 2, 3, 4]]
    tree = GrowingTree(build_tree(0), [0], [source], Acceptance([source]), 2, max_paths=2)
    tree.grow(100)
    assert [[tree.tokens[n] for n in path] for path in tree.tree(100).paths()] == [[0, 7, 7], [0, 8, 7]]


def test_no_node_is_deeper_than_allowed_or_less_likely_than_the_floor() -> None:
    tree = growing(Scripted((7, 1)), depth=3)
    tree.grow(100)
    assert len(tree) == 4
    tree = growing(Scripted((7, 1)), floor=0.2)
    tree.grow(100)
    assert len(tree) == 3  # a half and a quarter; an eighth is below
    assert len(growing(Scripted((7, 1)), depth=0)) == 1


def test_a_token_of_two_sources_is_one_node_with_the_evidence_of_both() -> None:
    tree = growing(Scripted((7, 1)), OwnSource(lambda text: [[7, 9]]))
    tree.grow(2)
    assert tree.tree(2).tokens == (0, 7)
    assert dict(tree.planned()) == {1: 1 + (1 << 2)}
    assert tree.proposals[1] == {7: 1, 9: 1 << 2}


def test_candidates_stand_behind_the_window_and_under_the_root() -> None:
    tree = growing(OwnSource(lambda text: [[5]]), window=[[0, 1], [2, 3]])
    tree.grow(9)
    plan = tree.tree(9)
    assert plan.tokens == (0, 1, 2, 3, 5)
    assert (plan.parents[4], plan.first_candidate, plan.last_row) == (0, 4, (2, 3))
    assert tree.window_rows == 3
    assert len(tree.tree(1)) == 4  # the window is not cut


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=4, unique_by=lambda p: p[0]), st.integers(1, 40)
)
def test_expected_tokens_rise_by_less_and_less(proposals: list[tuple[int, int]], rows: int) -> None:
    tree = growing(Scripted(*proposals))
    tree.grow(rows)
    gains = [b - a for a, b in zip(tree.expected, tree.expected[1:], strict=False)]
    assert gains == sorted(gains, reverse=True)
    assert all(g > 0 for g in gains)
    assert len(tree.expected) == len(tree)
    assert tree.grow(rows) == pytest.approx(sum(gains) + 1)
