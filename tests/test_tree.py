from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import TokenTree, build_tree
from lookahead_decoding.model.attention import encode_rows

THE, CAT, SAT, ON, DOG, RAN = range(10, 16)


def bits(tree: TokenTree) -> list[str]:
    """The mask as text: row i shows what node i sees, from the root on."""
    return ["".join(str(row >> j & 1) for j in range(len(tree))) for row in tree.mask]


def test_candidates_share_their_common_prefix() -> None:
    tree = build_tree(THE, candidates=[(CAT, SAT, ON), (CAT, RAN), (DOG, RAN)])
    assert tree.tokens == (THE, CAT, SAT, ON, RAN, DOG, RAN)
    assert tree.parents == (-1, 0, 1, 2, 1, 0, 5)


def test_a_node_sees_its_ancestors_and_itself() -> None:
    tree = build_tree(THE, candidates=[(CAT, SAT), (DOG,)])
    assert bits(tree) == ["1000", "1100", "1110", "1001"]
    assert tree.depths == [0, 1, 2, 1]


def test_window_columns_are_chains_at_consecutive_positions() -> None:
    tree = build_tree(1, window=[[0, 2, 3], [4, 5, 6]])
    #            root 2  3  4  5  6
    assert tree.tokens == (1, 2, 3, 4, 5, 6)
    assert tree.parents == (-1, 0, 1, 0, 1, 2)
    assert tree.depths == [0, 1, 2, 1, 2, 3]
    assert tree.last_row == (3, 4, 5)
    assert bits(tree) == ["100000", "110000", "111000", "100100", "110010", "111001"]


def test_a_window_of_one_row_has_the_root_in_its_last_row() -> None:
    tree = build_tree(1, window=[[0, 2, 3]])
    assert tree.last_row == (0, 1, 2)
    assert tree.scored == [0, 1, 2]


def test_window_nodes_are_not_walked() -> None:
    tree = build_tree(1, window=[[0, 2], [4, 5]], candidates=[(4, 7)])
    assert tree.child(0, 2) is None
    assert tree.child(1, 5) is None
    assert tree.child(0, 4) == 4
    assert tree.child(4, 7) == 5
    assert tree.child(5, 7) is None


def test_no_node_is_deeper_than_allowed() -> None:
    tree = build_tree(1, window=[[0, 2, 3], [4, 5, 6]], candidates=[(7, 8, 9)], max_depth=1)
    assert tree.tokens == (1, 2, 4, 7)
    assert tree.last_row == (2,)
    assert build_tree(1, window=[[0, 2], [4, 5]], candidates=[(7,)], max_depth=0).tokens == (1,)


def test_candidates_stop_at_the_row_limit() -> None:
    assert build_tree(1, candidates=[(2, 3), (4, 5)], max_rows=4).tokens == (1, 2, 3, 4)


def test_logits_are_needed_for_root_last_row_and_candidates() -> None:
    tree = build_tree(1, window=[[0, 2], [3, 4]], candidates=[(5,)])
    assert tree.scored == [0, 2, 3, 4]


@pytest.mark.parametrize(("last_row", "first"), [((), 0), ((), 3), ((1,), 1), ((2,), 2)])
def test_window_and_candidates_do_not_overlap(last_row: tuple[int, ...], first: int) -> None:
    with pytest.raises(ValueError, match="stand before the first candidate"):
        TokenTree((1, 2), (-1, 0), last_row, first)


@pytest.mark.parametrize("parents", [(0, 0), (-1, 1), (-1, 2), (-1,), (-1, -1)])
def test_a_malformed_tree_does_not_construct(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"parent"):
        TokenTree((1, 2), parents)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=6))
def test_paths_from_the_root_are_the_prefixes_of_the_candidates(candidates: list[list[int]]) -> None:
    tree = build_tree(9, candidates=candidates)
    paths = []
    for node in range(1, len(tree)):
        path, at = [], node
        while at:
            path.append(tree.tokens[at])
            at = tree.parents[at]
        paths.append(tuple(reversed(path)))
    assert len(set(paths)) == len(paths)
    assert set(paths) == {tuple(c[: i + 1]) for c in candidates for i in range(len(c))}


@given(st.lists(st.integers(0, 5), min_size=0, max_size=12))
def test_mask_is_the_transitive_closure_of_parents(choices: list[int]) -> None:
    parents = (-1, *(c % (i + 1) for i, c in enumerate(choices)))
    tree = TokenTree(tuple(range(len(parents))), parents)
    encoded = encode_rows([tree], [0], len(tree))[0, 0]
    for node, row in enumerate(tree.mask):
        ancestors, at = {node}, node
        while at:
            at = parents[at]
            ancestors.add(at)
        assert {j for j in range(len(parents)) if row >> j & 1} == ancestors
        assert {j for j in range(len(parents)) if encoded[node, 3 + j]} == ancestors
        assert tree.depths[node] == len(ancestors) - 1


def test_paths_lead_from_the_root_to_the_leaves() -> None:
    assert build_tree(1).paths() == [[0]]
    assert build_tree(1, candidates=[(2, 3), (2, 4), (5,)]).paths() == [[0, 1, 2], [0, 1, 3], [0, 4]]


def test_shards_hold_their_ancestors_and_are_runs_of_leaves() -> None:
    tree = build_tree(THE, candidates=[(CAT, SAT, ON), (CAT, RAN), (DOG, RAN)])
    first, second = tree.shards([0, 0])
    assert first.nodes == (0, 1, 2, 3, 4)
    assert first.tree == TokenTree((THE, CAT, SAT, ON, RAN), (-1, 0, 1, 2, 1))
    assert second.nodes == (0, 5, 6)
    assert second.tree == TokenTree((THE, DOG, RAN), (-1, 0, 1))
    assert tree.shard(1, 2) == second


def test_a_shard_of_the_window_has_its_columns_and_their_last_row() -> None:
    tree = build_tree(1, window=[[0, 2, 3], [4, 5, 6]], candidates=[(7,)])
    parts = tree.shards([0, 0])
    assert [part.nodes for part in parts] == [(0, 1, 2, 4, 5), (0, 3, 6)]
    assert [part.tree.last_row for part in parts] == [(3, 4), (1,)]
    assert [part.tree.first_candidate for part in parts] == [5, 2]


def test_a_rank_with_more_to_do_besides_gets_less_of_the_tree() -> None:
    tree = build_tree(1, candidates=[(n,) for n in range(2, 10)])
    assert [len(part.nodes) for part in tree.shards([0, 0])] == [5, 5]
    assert [len(part.nodes) for part in tree.shards([0, 4])] == [7, 3]


def test_a_tree_smaller_than_the_ranks_leaves_some_with_the_root() -> None:
    tree = build_tree(1, candidates=[(2, 3)])
    assert [part.nodes for part in tree.shards([0] * 4)] == [(0, 1, 2), (0,), (0,), (0,)]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=20),
    st.integers(0, 4),
    st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
def test_every_path_of_a_tree_is_whole_in_a_shard(
    candidates: list[list[int]], columns: int, burdens: list[int]
) -> None:
    tree = build_tree(9, [[5] * columns, [6] * columns], candidates)
    parts = tree.shards(burdens)
    assert len(parts) == len(burdens)
    for path in tree.paths():
        assert any(set(path) <= set(part.nodes) for part in parts)
    for part in parts:
        assert [part.tree.tokens[i] for i in range(len(part.nodes))] == [tree.tokens[n] for n in part.nodes]
        assert all(part.nodes[p] == tree.parents[n] for n, p in zip(part.nodes[1:], part.tree.parents[1:], strict=True))
        assert [part.nodes[i] for i in part.tree.last_row] == [n for n in tree.last_row if n in part.nodes]
        assert set(part.nodes[part.tree.first_candidate :]) <= set(range(tree.first_candidate, len(tree)))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=2, max_size=3),
)
def test_no_other_runs_have_a_smaller_largest_shard(candidates: list[list[int]], burdens: list[int]) -> None:
    tree = build_tree(9, candidates=candidates)
    order = tree._depth_first()

    def rows(run: list[int]) -> int:
        return len({0} | {above for node in run for above in tree.path(node)})

    def largest(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(order)]
        return max(rows(order[a:b]) + more for (a, b), more in zip(pairwise(ends), burdens, strict=True))

    cuts = combinations_with_replacement(range(len(order) + 1), len(burdens) - 1)
    found = max(len(part.nodes) + more for part, more in zip(tree.shards(burdens), burdens, strict=True))
    assert found == min(map(largest, cuts))
