from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding.draft.suffix import NOWHERE, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 2), max_size=30)


def longest_earlier(text: list[int], suffix_of: list[int]) -> int:
    """How many of the last tokens of `suffix_of` occur in `text`."""
    for length in range(len(suffix_of), 0, -1):
        tail = suffix_of[-length:]
        if any(text[i : i + length] == tail for i in range(len(text) - length + 1)):
            return length
    return 0


def test_the_longest_earlier_occurrence_comes_first_and_the_newest_of_one_length() -> None:
    automaton = SuffixAutomaton([5, 1, 2, 7, 1, 2, 8, 9, 2, 6, 1, 2])
    state, length = automaton.end()
    assert length == 2
    assert automaton.continuations((state, length), 9) == [(8, 2), (7, 2), (6, 1)]
    assert automaton.continuations((state, length), 2) == [(8, 2), (7, 2)]


def test_a_text_without_a_repeated_token_has_no_match() -> None:
    for text in ([], [4], [1, 2, 3]):
        automaton = SuffixAutomaton(text)
        assert automaton.end()[1] == 0
        assert automaton.continuations(automaton.end(), 3) == []


@given(TEXTS)
def test_the_end_and_what_followed_it_against_a_scan_of_the_text(text: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    assert len(automaton) == len(text)
    match = automaton.end()
    assert match[1] == longest_earlier(text[:-1], text)
    wanted: list[tuple[int, int]] = []
    for length in range(match[1], 0, -1):
        for start in range(len(text) - length - 1, -1, -1):
            follower = text[start + length]
            if text[start : start + length] == text[-length:] and follower not in [t for t, _ in wanted]:
                wanted.append((follower, length))
    assert automaton.continuations(match, 99) == wanted


@given(TEXTS, st.lists(st.integers(0, 3), max_size=8))
def test_following_a_match_against_a_scan_of_the_text(text: list[int], further: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    match = NOWHERE
    for i, token in enumerate(further, 1):
        match = automaton.follow(match, token)
        assert match[1] == longest_earlier(text, further[:i])


def test_work_per_token_does_not_grow_with_the_text() -> None:
    """Counted, not timed: calls of the interpreter's line tracer while tokens are added."""

    def lines(text: list[int]) -> float:
        count = 0

        def trace(frame, event, arg):  # type: ignore[no-untyped-def]
            nonlocal count
            count += event == "line"
            return trace

        sys.settrace(trace)
        try:
            automaton = SuffixAutomaton(text)
            for _ in range(50):
                automaton.continuations(automaton.end(), 3)
        finally:
            sys.settrace(None)
        return count / len(text)

    for pattern in ([1], [1, 2, 3, 4, 5, 6, 7, 8, 9] * 3 + [5, 1], list(range(60))):
        short, long = (lines((pattern * 20_000)[:n]) for n in (2_000, 20_000))
        assert long < 1.3 * short
