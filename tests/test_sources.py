from __future__ import annotations

import pytest

from lookahead_decoding import NgramPool
from lookahead_decoding.draft import sources as module
from lookahead_decoding.draft.sources import Acceptance, NgramSource, OwnSource, RecycledSource, SuffixSource


def test_the_suffix_source_gives_longer_matches_other_marks() -> None:
    source = SuffixSource([1, 2, 3, 9, 2, 4, 1, 2], ("prompt", "output"))
    (first, long), (second, short) = source.propose(source.root([1, 2, 3, 9, 2, 4, 1, 2]))
    assert (first, second) == (3, 4)
    assert source.prior(long) > source.prior(short)


@pytest.mark.parametrize(
    ("searched", "found"), [(("prompt",), [3]), (("output",), [4]), (("prompt", "output"), [4, 3])]
)
def test_prompt_and_output_are_searched_as_asked(searched: tuple[str, ...], found: list[int]) -> None:
    prompt = [7, 2, 3]
    source = SuffixSource(prompt, searched)
    assert [token for token, _ in source.propose(source.root([*prompt, 2, 4, 5, 2]))] == found


def test_the_suffix_source_follows_a_path_that_is_not_in_the_text() -> None:
    text = [1, 2, 3, 4, 1]
    source = SuffixSource(text, ("prompt", "output"))
    state = source.root(text)
    assert [t for t, _ in source.propose(source.follow(state, 2))] == [3]
    assert [t for t, _ in source.propose(source.follow(source.follow(state, 8), 3))] == [4]


def test_recycled_answers_by_two_tokens_and_by_one() -> None:
    source = RecycledSource()
    source.learn(1, 2, [5, 6])
    source.learn(9, 2, [6, 7])  # the newest after 2 alone
    marks = dict(source.propose((1, 2)))
    assert list(marks) == [5, 6, 7]
    assert marks == {5: 16, 6: 33, 7: 2}  # rank after two tokens x 16 + rank after one
    assert dict(source.propose((3, 2))) == {6: 1, 7: 2}


def test_a_first_token_has_none_before_it() -> None:
    assert RecycledSource().root([4]) == (-1, 4)
    assert RecycledSource().root([4, 5]) == (4, 5)


def test_about_an_unknown_token_recycled_answers_across_the_gap_and_then_with_what_is_frequent() -> None:
    source = RecycledSource()
    for _ in range(33):
        source.learn(1, 2, [5, 6])
    source.learn(8, 9, [7])
    assert dict(source.propose((1, 4))) == {5: 7, 6: 8}  # as after 1 and 2
    assert dict(source.propose((3, 4))) == {5: 13}
    assert source.prior(7) > source.prior(13) > source.prior(14)


def test_recycled_forgets_the_oldest_context_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTEXTS", 2)
    source = RecycledSource()
    for token in (1, 2, 1, 3):
        source.learn(0, token, [9])
    assert [dict(source.propose((0, token))) for token in (1, 2, 3)] == [{9: 17}, {9: 7}, {9: 17}]


def test_ngrams_begin_at_every_node_or_at_the_root_alone() -> None:
    pool = NgramPool(4)
    pool.add((1, 2, 3))
    pool.add((2, 8))
    everywhere, at_root = NgramSource(pool, at_root=False), NgramSource(pool, at_root=True)
    assert [t for t, _ in everywhere.propose(everywhere.follow(everywhere.root([1]), 2))] == [3, 8]
    assert [t for t, _ in at_root.propose(at_root.follow(at_root.root([1]), 2))] == [3]


def test_drafts_of_ones_own_share_their_beginning() -> None:
    source = OwnSource(lambda text: [[1, 2], [1, 3], [], [4]])
    state = source.root([0])
    assert source.propose(state) == [(1, 1), (4, 2)]
    assert source.propose(source.follow(state, 1)) == [(2, 1), (3, 2)]
    assert source.propose(source.follow(source.follow(state, 1), 2)) == []


def test_acceptance_moves_from_what_is_assumed_to_what_was_seen() -> None:
    source = NgramSource(NgramPool(1), at_root=True)
    acceptance = Acceptance([source])
    assumed = acceptance(1)
    assert assumed == pytest.approx(source.prior(1))
    for _ in range(8):
        acceptance.judge({5: 1}, token=5)
    assert acceptance(1) == pytest.approx((8 * assumed + 8) / 16)
    for _ in range(2000):
        acceptance.judge({5: 1}, token=6)
    assert acceptance(1) < 0.01
    for _ in range(256):  # counts fade, so that a text may change
        acceptance.judge({5: 1}, token=5)
    assert acceptance(1) > 0.4


def test_a_text_that_accepts_less_than_was_assumed_scales_all_chances() -> None:
    acceptance = Acceptance([RecycledSource()])
    for _ in range(30):
        acceptance.judge({5: 16}, token=5)
    assert acceptance.scale == 1.0
    for mark in range(1, 30):  # every time of a kind that was never seen
        acceptance.judge({5: 16 + mark % 6, 6: 32 + mark % 6, 7: 48 + mark % 6}, token=8)
    assert acceptance.scale < 0.7


def test_evidence_of_two_sources_is_worth_more_than_of_one() -> None:
    recycled, ngrams = RecycledSource(), NgramSource(NgramPool(1), at_root=True)
    acceptance = Acceptance([recycled, ngrams])
    both = 16 + (1 << recycled.bits)
    assert acceptance.marks(both) == [(recycled, 16), (ngrams, 1)]
    assert acceptance.names(both) == ("recycled", "window")
    assert acceptance(both) > max(acceptance(16), acceptance(1 << recycled.bits))
