"""Who evaluates what, and what ranks tell each other."""

from __future__ import annotations

import lookahead_decoding as ld
from lookahead_decoding.draft.lookahead import Walk
from lookahead_decoding.ranks.division import Division, Header, Layout, Said, behind, checksum, divided

HEADER = Header(3, 11, 12, 0, 500, 20, 0)


def test_the_chain_in_front_of_a_tree_holds_what_is_fed_again() -> None:
    tree = ld.build_tree(1, window=[[0, 2], [4, 5]], candidates=[(7, 8)])
    longer = behind([30, 31], tree)
    assert longer.tokens == (30, 31, 1, 2, 4, 5, 7, 8)
    assert longer.parents == (-1, 0, 1, 2, 2, 3, 2, 6)
    assert longer.scored == [0, 2, 4, 5, 6, 7]
    assert longer.child(2, 7) == 6
    assert behind([], tree) is tree


def test_each_node_is_said_by_the_first_rank_that_has_it() -> None:
    tree = ld.build_tree(1, candidates=[(2, 3), (2, 4), (5, 6)])
    division = Division([tree], [[[]], [[]]])
    assert [part.nodes for (part,) in division.shards] == [(0, 1, 2, 3), (0, 4, 5)]
    assert division.tellers == [[[0, 1, 2, 3]], [[4, 5]]]
    assert [division.held(rank, 0, [0, 1, 3]) for rank in (0, 1)] == [3, 1]


def test_a_path_is_kept_as_far_as_a_rank_evaluated_it_behind_what_it_was_fed_again() -> None:
    tree = ld.build_tree(1, candidates=[(2, 3), (2, 4), (5, 6)])
    division = Division([tree, None], [[[], []], [[30], [31]]])
    assert [part.tokens if part else None for part in division.fed(1)] == [(30, 1, 5, 6), None]
    assert division.local(0, 0, [0, 1, 3]) == [0, 1, 3]
    assert division.local(1, 0, [0, 1, 3]) == [0, 1]
    assert division.local(1, 0, [0, 4, 5]) == [0, 1, 2, 3]
    assert division.local(1, 0, []) == []


def test_a_message_says_what_was_written_and_has_one_size() -> None:
    layout = Layout(sequences=2, nodes=2, width=3)
    said = [Said(4, 70_000, "stop", [[9, 8], [7, 6, 5, 4], [3]]), Said()]
    numbers = layout.write(HEADER, said)
    assert len(numbers) == len(layout.write(HEADER, [Said(), Said()])) == 7 + 2 * (3 + 2 * 3)
    header, read = layout.read(numbers)
    assert header == HEADER
    assert read == [Said(4, 70_000, "stop", [[9, 8], [7, 6, 5]]), Said(0, 0, None, [[], []])]


def test_the_longest_walk_is_taken_and_of_equal_ones_the_first_ranks() -> None:
    tree = ld.build_tree(1, candidates=[(2, 3), (2, 4), (5, 6)])
    division = Division([tree, None], [[[], []], [[], []]])
    best = {node: [node + 10] for node in range(6)}
    first = division.said(0, [Walk((2, 9), (0, 1), None, best), None])
    second = division.said(1, [Walk((5, 6, 7), (0, 4, 5), "stop", best), None])
    assert division.longest(0, [first, second]) == Walk((5, 6, 7), (0, 4, 5), "stop", best)
    assert division.longest(1, [first, second]) is None
    as_long = division.said(1, [Walk((5, 8), (0, 4), None, best), None])
    assert division.longest(0, [first, as_long]).tokens == (2, 9)
    assert division.longest(0, [first, first, as_long, as_long], per_shard=2).ranked == best


def test_trees_and_texts_that_differ_have_other_checksums() -> None:
    one, other = ld.build_tree(1, candidates=[(2, 3)]), ld.build_tree(1, candidates=[(2,), (3,)])
    assert Division([one], [[[]]]).digest != Division([other], [[[]]]).digest
    assert checksum([1, 2]) != checksum([2, 1])
    assert checksum([2], checksum([1])) != checksum([2], checksum([3]))


def test_a_divided_step_takes_as_long_as_its_part() -> None:
    assert divided([(1, 3.0), (8, 4.0), (60, 9.0)], 2) == [(1, 3.0), (16, 4.0), (120, 9.0)]
