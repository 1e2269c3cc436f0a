from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import Window

EOS = 0


def window(size: int, ngram: int, prompt: tuple[int, ...] = (5, 6, 7)) -> Window:
    return Window(prompt, size, ngram, {EOS}, seed=0)


def test_the_first_row_is_drawn_from_the_prompt_and_its_own_seed() -> None:
    random.seed(1)
    first = window(20, 3)
    random.seed(2)
    assert first.rows == window(20, 3).rows
    assert set(first.rows[0]) <= {5, 6, 7}
    assert first.rows != Window((5, 6, 7), 20, 3, {EOS}, seed=1).rows


def test_while_filling_every_row_drops_its_first_column_and_nothing_is_learned() -> None:
    w = window(3, 4)
    _, b, c = w.rows[0]
    assert w.advance(1, [10, 11, 12]) == []
    assert [row[:2] for row in w.rows] == [[b, c], [11, 12]]
    assert w.advance(2, [20, 21, 22]) == []
    assert [row[:1] for row in w.rows] == [[c], [12], [21]]


def test_a_full_window_gives_one_ngram_per_column_and_drops_its_oldest_row() -> None:
    w = window(2, 3)
    w.rows = [[1, 2], [3, 4]]
    assert w.advance(9, [5, 6]) == [(9, 3, 5), (2, 4, 6)]
    assert w.rows == [[3, 4], [5, 6]]


def test_bigrams_need_one_row_and_are_learned_from_the_first_step_on() -> None:
    w = window(3, 2)
    w.rows = [[1, 2, 3]]
    assert w.advance(9, [4, 5, 6]) == [(9, 4), (2, 5), (3, 6)]
    assert w.rows == [[4, 5, 6]]


def test_an_end_of_sequence_cuts_its_ngram_and_never_stays_in_a_row() -> None:
    w = window(2, 3)
    w.rows = [[1, 2], [3, 4]]
    assert w.advance(9, [EOS, 6]) == [(9, 3), (2, 4, 6)]
    assert EOS not in w.rows[1]
    assert w.rows[1][1] == 6


def test_columns_that_the_text_may_not_reach_are_drawn() -> None:
    w = window(3, 2)
    w.rows = [[1, 2, 3]]
    assert w.advance(9, [4]) == [(9, 4)]
    assert w.rows[0][0] == 4
    assert len(w.rows[0]) == 3


def test_a_prompt_of_stop_tokens_alone_still_gives_a_window() -> None:
    assert window(2, 3, prompt=(EOS,)).rows == [[EOS, EOS]]


@given(st.integers(1, 5), st.integers(2, 5), st.integers(1, 8), st.randoms(use_true_random=False))
def test_row_l_column_i_is_the_guess_for_l_plus_i_positions_on(
    size: int, ngram: int, steps: int, rng: random.Random
) -> None:
    """Against a window that writes each guess down with the position it is for."""
    w = window(size, ngram)
    rows = [[(i, token) for i, token in enumerate(w.rows[0])]]  # position of every guess, None for drawn ones
    for position in range(steps):
        new = [100 + rng.randrange(1000) for _ in range(size)]
        height = len(rows)
        ngrams = w.advance(50 + position, new)
        rows.append([(position + height + i, token) for i, token in enumerate(new)])
        if height == ngram - 1:
            assert [g[-1] for g in ngrams] == new
            assert all(len(g) == ngram for g in ngrams)
            del rows[0]
        else:
            assert ngrams == []
            rows = [[*row[1:], (row[-1][0] + 1, None)] for row in rows]
        for depth, row in enumerate(rows):
            for column, (at, token) in enumerate(row):
                assert at == position + 1 + depth + column
                assert token is None or w.rows[depth][column] == token
