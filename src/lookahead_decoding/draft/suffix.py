"""A suffix automaton: every place where the end of a text has occurred before, found without looking again.

The automaton of a text (Blumer et al., 1985) has a state for each set of substrings that end at the same places.
Appending a token takes amortised constant time, and so does following the longest match from one token to the next, so
a text of 100,000 tokens is no slower to continue than one of a hundred.
"""

from __future__ import annotations

from collections.abc import Iterable

REFRESHED = 8
"""Contexts of a new token in which it becomes the newest continuation, longest first: a bound on the work per token."""

STATE_BYTES = 350
"""Memory of a state with its transitions, rounded up; a token makes one or two states."""

Match = tuple[int, int]
"""A state, and how many of the last tokens match there."""

NOWHERE: Match = (0, 0)


class SuffixAutomaton:
    """All substrings of a text that grows, or of several, one after the other.

    Continuations of a state are in the order in which they were last seen, newest last; of the contexts that a token
    follows at once, the longest `REFRESHED` take note of it.
    """

    def __init__(self, text: Iterable[int] = ()) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._last = 0
        for token in text:
            self.add(token)

    def __len__(self) -> int:
        """Tokens of the text, the last one if there are several."""
        return self._length[self._last]

    @property
    def nbytes(self) -> int:
        """Memory, as an upper estimate."""
        return STATE_BYTES * len(self._next)

    def begin(self) -> None:
        """Begin another text: its first token follows nothing."""
        self._last = 0

    def add(self, token: int) -> None:
        """Append a token."""
        following, link, length = self._next, self._link, self._length
        before = state = self._last
        known = following[before].get(token)
        if known is not None:  # only where an earlier text begins with the same tokens
            self._last = known if length[known] == length[before] + 1 else self._split(before, token, known)
            self._refresh(before, token)
            return
        new = len(following)
        following.append({})
        length.append(length[before] + 1)
        link.append(0)
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state >= 0:
            other = following[state][token]
            if length[other] > length[state] + 1:  # it stands for longer substrings as well: split it
                other = self._split(state, token, other)
            link[new] = other
            self._refresh(state, token)
        self._last = new

    def _refresh(self, state: int, token: int) -> None:
        """Make a token the newest continuation of a state and of the shorter contexts that it ends with."""
        for _ in range(REFRESHED):
            contexts = self._next[state]
            contexts[token] = contexts.pop(token)
            state = self._link[state]
            if state < 0:
                break

    def _split(self, state: int, token: int, other: int) -> int:
        """A state of its own for the substrings of `other` that are not longer than those of `state` and a token."""
        short = len(self._next)
        self._next.append(dict(self._next[other]))
        self._link.append(self._link[other])
        self._length.append(self._length[state] + 1)
        while state >= 0 and self._next[state].get(token) == other:
            self._next[state][token] = short
            state = self._link[state]
        self._link[other] = short
        return short

    def end(self) -> Match:
        """The longest suffix of the text that occurs earlier in it."""
        state = max(0, self._link[self._last])
        return state, self._length[state]

    def follow(self, match: Match, token: int) -> Match:
        """The longest suffix of what matched and one more token that occurs in the text."""
        state, length = match
        while token not in self._next[state]:
            state = self._link[state]
            if state < 0:
                return NOWHERE
            length = self._length[state]
        return self._next[state][token], length + 1

    def continuations(self, match: Match, most: int) -> list[tuple[int, int]]:
        """What followed a match.

        Args:
            match: as `end` or `follow` gives it.
            most: continuations at most.

        Returns:
            Distinct tokens, each with the length of the longest suffix of the match that it followed; longest first,
            and of one length the newest first.
        """
        found: list[tuple[int, int]] = []
        seen: set[int] = set()
        state, length = match
        while length > 0:
            for token in reversed(self._next[state]):
                if token not in seen:
                    seen.add(token)
                    found.append((token, length))
                    if len(found) == most:
                        return found
            state = self._link[state]
            length = self._length[state]
        return found
