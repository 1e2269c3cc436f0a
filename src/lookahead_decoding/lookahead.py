"""Lookahead decoding of one sequence, without a model: it says what to ask, and learns from the answer.

The rules, in the paper's terms:

* `plan()` gives the tree of the next step. It changes nothing, so asking twice gives the same tree.
* The caller evaluates the tree, walks it, and hands `observe()` what came out, a `Choice`. The tokens in
  it are final; the one after them is never guessed here, only proposed.
* Window tokens enter the n-gram pool once N - 1 rows stand; n-grams of the text enter it as the text grows.
* Nothing here affects which tokens are emitted, only how many steps they take.

No torch, no clock, no global random state: bring your own model, as `h11` asks for your own sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from .config import LookaheadConfig
from .pool import NgramPool
from .tree import TokenTree, build_tree
from .window import Window

PROPOSED_ROWS = 128
"""Room for a source of one's own in a step; candidates that do not fit into it are left out."""

Propose = Callable[[Sequence[int]], Iterable[Sequence[int]]]
"""A source of one's own: the text so far, prompt included, to the draft tokens of some candidates."""


@dataclass(frozen=True)
class Choice:
    """What the target chose in one step.

    The *accepted tokens* are the drafts that matched; the *bonus token* is the target's own choice after the last of
    them. Together they are the tokens that the step emits.

    Attributes:
        tokens: tokens emitted, at least one, cut where the text ended.
        path: nodes whose keys and values are kept, the root first; node `path[i]` gave `tokens[i]`.
        window_tokens: next tokens under the window's last row, left to right.
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]
    window_tokens: tuple[int, ...] = ()


def max_rows(config: LookaheadConfig, own_source: bool = False) -> int:
    """Rows of the largest tree that `plan` can give, with or without a source of one's own."""
    drafts = config.ngram_size - 1
    window = drafts * config.window_size if "window" in config.sources else 1
    candidates = drafts * config.verification_set_size if config.sources else 0
    return window + candidates + (PROPOSED_ROWS if own_source else 0)


class Lookahead:
    """Window, pool and text of one sequence.

    Args:
        prompt: token ids, at least one.
        config: W, N, G and the sources.
        limit: length the text can reach, prompt included. Plain decoding never feeds the last token, so no node
            stands at that position or past it.
        stop_ids: tokens that end the text; they are not worth guessing past.
        propose: a further source of candidates.

    Raises:
        ValueError: the prompt is empty.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: LookaheadConfig,
        *,
        limit: int = 1 << 30,
        stop_ids: Collection[int] = (),
        propose: Propose | None = None,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: lookahead decoding needs at least one token to continue")
        self.text = list(prompt)
        self._config = config
        self._limit = limit
        self._propose = propose
        self._max_rows = max_rows(config, own_source=propose is not None)
        self._pool = NgramPool(config.verification_set_size)
        self._window: Window | None = None
        if "window" in config.sources:
            self._window = Window(prompt, config.window_size, config.ngram_size, stop_ids, config.window_seed)
        if "prompt" in config.sources:
            self._learn(0)

    def _learn(self, start: int) -> None:
        """Put the n-grams of the text that end past `start` into the pool."""
        size = self._config.ngram_size
        for end in range(max(start, size - 1), len(self.text)):
            self._pool.add(self.text[end - size + 1 : end + 1])

    def plan(self) -> TokenTree:
        """The tree of the next step."""
        root = self.text[-1]
        candidates: list[Sequence[int]] = list(self._pool.candidates(root))
        if self._propose:
            candidates += self._propose(self.text)
        rows = self._window.rows if self._window else ()
        depth = max(0, self._limit - 1 - len(self.text))
        return build_tree(root, rows, candidates, max_depth=depth, max_rows=self._max_rows)

    def observe(self, choice: Choice) -> None:
        """Learn from a step: its tokens join the text, its window tokens the window and the pool."""
        known = len(self.text)
        if self._window and choice.window_tokens:
            for ngram in self._window.advance(self.text[-1], choice.window_tokens):
                self._pool.add(ngram)
        self.text += choice.tokens
        if "output" in self._config.sources:
            self._learn(known)
