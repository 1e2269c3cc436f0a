"""The window: the 2-D state of the lookahead branch (the paper's section 3.1).

Row l, column i is the guess for l + i positions after the current token. Each step the target's next tokens under the
last row become a new row, and the oldest row leaves, so that every row is one position further on. Until N - 1
rows stand, none leaves: all drop their first column instead and gain a drawn token on the right.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence


class Window:
    """W columns and up to N - 1 rows of guessed tokens.

    Args:
        prompt: tokens that the first row, and every other guess that nobody made, is drawn from.
        window_size: W.
        ngram_size: N.
        stop_ids: tokens that end a text: an n-gram is cut before one, and a row never keeps one.
        seed: of the window's own random generator; global random state is neither read nor changed.
    """

    def __init__(
        self, prompt: Sequence[int], window_size: int, ngram_size: int, stop_ids: Collection[int], seed: int
    ) -> None:
        self._random = random.Random(seed)
        self._drawn_from = [t for t in prompt if t not in stop_ids] or list(prompt[-1:])
        self._height = ngram_size - 1
        self._stop_ids = frozenset(stop_ids)
        self.rows: list[list[int]] = [[self._draw() for _ in range(window_size)]]

    def _draw(self) -> int:
        return self._random.choice(self._drawn_from)

    def advance(self, root: int, new: Sequence[int]) -> list[tuple[int, ...]]:
        """Take the next tokens under the last row and move one position on.

        Args:
            root: the current token of the step, which stood in row 0, column 0.
            new: next tokens under the last row, left to right; fewer than W where the text may not go that far.

        Returns:
            The n-grams that became complete, cut before the first stop token; none while the window is filling.
        """
        self.rows[0][0] = root
        full = len(self.rows) == self._height
        ngrams = [self._cut((*column, token)) for *column, token in zip(*self.rows, new, strict=False)] if full else []
        kept = [self._draw() if token in self._stop_ids else token for token in new]
        kept += [self._draw() for _ in range(len(self.rows[0]) - len(kept))]
        self.rows.append(kept)
        if full:
            del self.rows[0]
        else:
            self.rows = [[*row[1:], self._draw()] for row in self.rows]
        return ngrams

    def _cut(self, ngram: tuple[int, ...]) -> tuple[int, ...]:
        for i, token in enumerate(ngram):
            if token in self._stop_ids:
                return ngram[:i]
        return ngram
