"""Lookahead decoding of one sequence, without a model: it says what to ask, and learns from the answer.

The rules, in the paper's terms:

* `plan()` gives the tree of the next step. Asking twice gives the same tree.
* The caller evaluates the tree, walks it, and hands `observe()` what came out, a `Choice`. The tokens in
  it are final; the one after them is never guessed here, only proposed.
* Window tokens enter the n-gram pool once N - 1 rows stand; every other source learns from the text and from what the
  target ranked best at each node.
* Every proposal at a node that the walk reached is judged, whether a node was spent on it or not.
* Nothing here affects which tokens are emitted, only how many steps they take.

No torch, no clock, no global random state: bring your own model, as `h11` asks for your own sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ..config import NGRAM_SIZE, LookaheadConfig
from .grow import GrowingTree
from .pool import NgramPool
from .shared import Namespace
from .sources import (
    Acceptance,
    NgramSource,
    OwnSource,
    Propose,
    RecycledSource,
    SharedSource,
    Source,
    SourceCount,
    SuffixSource,
)
from .tree import TokenTree, build_tree
from .window import Window

PROPOSED_ROWS = 128
"""Room for a source of one's own in a step; candidates that do not fit into it are left out."""

KEPT_NGRAMS = 8
"""G of a window of which it is not given."""


@dataclass(frozen=True)
class Choice:
    """What the target chose in one step.

    The *accepted tokens* are the drafts that matched; the *bonus token* is the target's own choice after the last of
    them. Together they are the tokens that the step emits.

    Attributes:
        tokens: tokens emitted, at least one, cut where the text ended.
        path: nodes whose keys and values are kept, the root first; node `path[i]` gave `tokens[i]`.
        window_tokens: next tokens under the window's last row, left to right.
        ranked: the target's best tokens after a node, best first, for the nodes that have logits; empty where nobody
            asked for them.
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]
    window_tokens: tuple[int, ...] = ()
    ranked: Mapping[int, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Walk:
    """How far one sequence's tree matched.

    Attributes:
        tokens: that were emitted.
        path: nodes that gave them, the root first.
        finish_reason: of the sequence, if it ended there.
        ranked: the target's best tokens after a node, best first, for the nodes that have logits.
    """

    tokens: tuple[int, ...]
    path: tuple[int, ...]
    finish_reason: str | None
    ranked: Mapping[int, Sequence[int]]


def max_rows(config: LookaheadConfig, own_source: bool = False) -> int:
    """Rows of the largest tree that `plan` can give, with or without a source of one's own, for which there is more
    room unless the caller has capped the rows."""
    return config.most_rows + (PROPOSED_ROWS if own_source and config.max_rows is None else 0)


class Lookahead:
    """Sources, window and text of one sequence.

    Args:
        prompt: token ids, at least one.
        config: the sources, and what is fixed of the window.
        limit: length the text can reach, prompt included. Plain decoding never feeds the last token, so no node
            stands at that position or past it.
        stop_ids: tokens that end the text; they are not worth guessing past.
        propose: a further source of candidates.
        shared: text of earlier requests, if there is any.
        reach: how deep a tree may be whose root stands at a position; any depth by default.
        counts: where drafts are counted by source.

    Attributes:
        text: tokens so far, prompt included.
        window_gain: accepted tokens of the last step that only the window had proposed, and those behind them.

    Raises:
        ValueError: the prompt is empty, or text of earlier requests is given and not among the sources.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        config: LookaheadConfig,
        *,
        limit: int = 1 << 30,
        stop_ids: Collection[int] = (),
        propose: Propose | None = None,
        shared: Namespace | None = None,
        reach: Callable[[int], int] | None = None,
        counts: dict[str, SourceCount] | None = None,
    ) -> None:
        if not prompt:
            raise ValueError("the prompt is empty: lookahead decoding needs at least one token to continue")
        if shared is not None and "shared" not in config.sources:
            raise ValueError("a shared namespace was given, and the config's sources leave out 'shared': name it there")
        self.text = list(prompt)
        self.window_gain = 0
        self._prompt = tuple(prompt)
        self._shared = shared
        self._config = config
        self._limit = limit
        self._reach = reach
        self._stop_ids = stop_ids
        self._most_rows = max_rows(config, own_source=propose is not None)
        self._pool = NgramPool(
            KEPT_NGRAMS if config.verification_set_size is None else config.verification_set_size, tails=config.adaptive
        )
        self._shape = (0, 0)
        self._window: Window | None = None
        self._recycled = RecycledSource() if "recycled" in config.sources else None
        self._sources: list[Source] = [OwnSource(propose)] if propose else []
        searched = [name for name in config.sources if name in ("prompt", "output")]
        self._pooled = not config.adaptive and bool(searched)
        if searched and config.adaptive:
            self._sources.append(SuffixSource(prompt, searched))
        if self._recycled:
            self._sources.append(self._recycled)
        if shared is not None:
            self._sources.append(SharedSource(shared))
        if "window" in config.sources or self._pooled:
            name = "pool" if self._pooled else "window"
            self._sources.append(NgramSource(self._pool, at_root=not config.adaptive, name=name))
        self._acceptance = Acceptance(self._sources)
        self._counts = counts if counts is not None else {}
        self._growing: GrowingTree | None = None
        if config.window_size is not None and "window" in config.sources:
            self.resize(config.window_size, config.ngram_size or NGRAM_SIZE)
        if self._pooled and "prompt" in config.sources:
            self._learn(0)

    @property
    def left(self) -> int:
        """Tokens to the limit."""
        return self._limit - len(self.text)

    def resize(self, window_size: int, ngram_size: int) -> None:
        """Give the window another size and a fresh first row, unless it has that size; 0 takes it away."""
        if self._shape == (window_size, ngram_size):
            return
        self._shape = window_size, ngram_size
        self._window = None
        if window_size:
            self._window = Window(self.text, window_size, ngram_size, self._stop_ids, self._config.window_seed)

    def _learn(self, start: int) -> None:
        """Put the n-grams of the text that end past `start` into the pool."""
        size = self._config.ngram_size or NGRAM_SIZE
        for end in range(max(start, size - 1), len(self.text)):
            self._pool.add(self.text[end - size + 1 : end + 1])

    def grow(self, floor: float = 0.0) -> GrowingTree:
        """The tree of the next step, to be grown to the size that pays.

        Args:
            floor: drafts whose chance is not above this are left out.
        """
        rows = self._window.rows if self._window else ()
        depth = max(0, self._limit - 1 - len(self.text))
        if self._reach is not None:
            depth = min(depth, self._reach(len(self.text) - 1))
        start = build_tree(self.text[-1], rows, max_depth=depth)
        self._growing = GrowingTree(
            start, self.text, self._sources, self._acceptance, depth, floor, self._config.max_paths
        )
        return self._growing

    def plan(self) -> TokenTree:
        """The tree of the next step, as large as it may be."""
        growing = self.grow()
        growing.grow(self._most_rows)
        return growing.tree(self._most_rows)

    def plain(self) -> TokenTree:
        """The tree of a plain step, from which nothing is learned but its token."""
        self._growing = None
        return TokenTree((self.text[-1],), (-1,))

    def observe(self, choice: Choice, ended: bool = False) -> None:
        """Learn from a step: its tokens join the text, its window tokens the window and the pool.

        Args:
            choice: what came out.
            ended: whether the text has ended with it; then it joins the shared text.
        """
        known = len(self.text)
        if self._window and choice.window_tokens:
            for ngram in self._window.advance(self.text[-1], choice.window_tokens):
                self._pool.add(ngram)
        if self._growing is not None:
            self._judge(self._growing, choice)
        if self._recycled is not None and choice.ranked:
            self._recycle(self._recycled, choice.ranked)
        self._growing = None
        self.text += choice.tokens
        if self._pooled and "output" in self._config.sources:
            self._learn(known)
        if ended and self._shared is not None:
            self._shared.keep(self.text, len(self._prompt))

    def _judge(self, growing: GrowingTree, choice: Choice) -> None:
        """Count what was proposed at the nodes of the path, and whose drafts were fed and accepted."""
        for node, token in zip(choice.path, choice.tokens, strict=True):
            if node in growing.proposals:
                self._acceptance.judge(growing.proposals[node], token)
        accepted = set(choice.path[1:])
        self.window_gain = 0
        for node, evidence in growing.planned():
            speakers = self._acceptance.names(evidence)
            for name in speakers:
                count = self._counts.setdefault(name, SourceCount())
                count.proposed += 1
                count.accepted += node in accepted
                count.rows += 1 / len(speakers)
            if node in accepted and (self.window_gain or speakers == ("window",)):
                self.window_gain += 1
        if growing.window_rows:
            self._counts.setdefault("window", SourceCount()).rows += growing.window_rows

    def _recycle(self, recycled: RecycledSource, ranked: Mapping[int, Sequence[int]]) -> None:
        """Remember what the target ranked best after each node."""
        before, root = (self.text[-2] if len(self.text) > 1 else -1), self.text[-1]
        growing = self._growing
        for node, best in ranked.items():
            if node == 0:
                recycled.learn(before, root, best)
            elif growing is not None:
                recycled.learn(growing.tokens[growing.parents[node]], growing.tokens[node], best)
