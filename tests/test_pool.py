from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import NgramPool


def test_ngrams_are_found_under_their_first_token_latest_first() -> None:
    pool = NgramPool(5)
    for ngram in [(1, 2, 3), (1, 4, 5), (2, 3, 4)]:
        pool.add(ngram)
    assert pool.candidates(1) == [(4, 5), (2, 3)]
    assert pool.candidates(2) == [(3, 4)]
    assert pool.candidates(3) == []


def test_the_one_seen_longest_ago_leaves_first() -> None:
    pool = NgramPool(2)
    for ngram in [(1, 2), (1, 3), (1, 2), (1, 4)]:
        pool.add(ngram)
    assert pool.candidates(1) == [(4,), (2,)]


def test_a_pool_of_size_zero_keeps_nothing() -> None:
    pool = NgramPool(0)
    pool.add((1, 2))
    assert pool.candidates(1) == []


def test_a_single_token_says_nothing() -> None:
    pool = NgramPool(2)
    pool.add((1,))
    pool.add(())
    assert pool.candidates(1) == []


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=40), st.integers(0, 4))
def test_pool_is_a_list_with_moves_to_the_front(ngrams: list[tuple[int, int]], size: int) -> None:
    pool, slow = NgramPool(size), {0: [], 1: [], 2: []}
    for first, second in ngrams:
        pool.add((first, second))
        slow[first] = [(second,), *(d for d in slow[first] if d != (second,))][:size]
    assert {t: pool.candidates(t) for t in slow} == slow
