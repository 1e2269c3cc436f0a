"""The n-gram pool: n-grams seen so far, under their first token (the paper's section 3.2)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class NgramPool:
    """At most `size` n-grams per first token; the one that was seen longest ago leaves first.

    Args:
        size: G, the verification set size. 0 keeps nothing.
        tails: of an n-gram that is added, keep the shorter ones it ends with as well, under their own first tokens.
    """

    def __init__(self, size: int, tails: bool = False) -> None:
        self._size = size
        self._tails = tails
        self._found: dict[int, OrderedDict[tuple[int, ...], None]] = {}

    def __len__(self) -> int:
        """First tokens that have n-grams."""
        return len(self._found)

    def add(self, ngram: Sequence[int]) -> None:
        """Remember an n-gram; one of fewer than two tokens says nothing and is passed over."""
        for start in range(len(ngram) - 1 if self._tails else 1):
            self._add(ngram[start:])

    def _add(self, ngram: Sequence[int]) -> None:
        if len(ngram) < 2 or not self._size:
            return
        entry = self._found.setdefault(ngram[0], OrderedDict())
        drafts = tuple(ngram[1:])
        entry[drafts] = None
        entry.move_to_end(drafts)
        if len(entry) > self._size:
            entry.popitem(last=False)

    def candidates(self, token: int) -> list[tuple[int, ...]]:
        """What was seen after `token`, latest first: the draft tokens of each candidate."""
        return list(reversed(self._found.get(token, ())))
