"""Where candidates come from.

Every source is asked at every node of the growing tree what may follow there. It answers with tokens, and with each a
*mark*: how it knows, as a small integer (the rank among its answers, the length of a match). The marks of all sources
that name the same token are its *evidence*, under which its acceptance is counted. A source keeps a state per node, so
that asking one node further down costs no new search.

Verification does not care who proposed what, so a source can be wrong and never changes the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .pool import NgramPool
from .shared import Namespace, SharedText
from .suffix import NOWHERE, Match, SuffixAutomaton

Propose = Callable[[Sequence[int]], Iterable[Sequence[int]]]
"""A source of one's own: the text so far, prompt included, to the draft tokens of some candidates."""

RANKS = 6
"""Choices of the target that the recycled source keeps per context."""

CONTEXTS = 1 << 17
"""Contexts that the recycled source remembers, of one token and of two each; the oldest leave."""


@dataclass
class SourceCount:
    """Drafts of one source.

    Attributes:
        proposed: draft tokens that were fed and that it had proposed, alone or with others.
        accepted: those of them that matched.
        rows: nodes fed for it: a draft that several proposed counts in equal parts, and the window's own nodes count
            for the window.
    """

    proposed: int = 0
    accepted: int = 0
    rows: float = 0.0


class Source(Protocol):
    """What the growing tree asks.

    Attributes:
        name: under which its drafts are counted.
        bits: of a mark.
        silent: it knows nothing yet, and need not be asked.
    """

    name: str
    bits: int

    @property
    def silent(self) -> bool: ...

    def root(self, text: Sequence[int]) -> Any:
        """The state at the root: the end of the text."""

    def follow(self, state: Any, token: int) -> Any:
        """The state one node further down."""

    def propose(self, state: Any) -> Iterable[tuple[int, int]]:
        """Tokens that may follow, best first and each once, with their marks, from 1 on."""

    def prior(self, mark: int) -> float:
        """The chance of a draft with this mark, before anything is known about it."""


class MatchMarks:
    """Marks of continuations by the length of their match, in classes, and their rank."""

    bits = 5
    silent = False
    _continuations = 3
    # Matches of 20 tokens and more are of one class.
    _classes = (0, 0, 1, 2, 3, 3, 4, 4, 4, 4, *[5] * 10, 6)

    def _marked(self, found: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Tokens and their marks, from tokens and the lengths of their matches."""
        classes = self._classes
        return [
            (token, 1 + 3 * classes[length if length < 20 else 20] + rank) for rank, (token, length) in enumerate(found)
        ]

    def prior(self, mark: int) -> float:
        length, rank = divmod(mark - 1, 3)
        return (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)[length] * (1.0, 0.4, 0.2)[rank]


class SuffixSource(MatchMarks):
    """The longest earlier occurrence of the text's end, and what followed it.

    Args:
        prompt: tokens of the prompt.
        sources: "prompt" and "output", or one of them: what is searched.
    """

    name = "suffix"

    def __init__(self, prompt: Sequence[int], sources: Sequence[str]) -> None:
        self._automaton = SuffixAutomaton()
        self._match: Match = NOWHERE
        self._read = 0
        self._learned = range(
            0 if "prompt" in sources else len(prompt), 1 << 62 if "output" in sources else len(prompt)
        )

    def root(self, text: Sequence[int]) -> Match:
        for position in range(self._read, len(text)):
            if position in self._learned:
                self._automaton.add(text[position])
                self._match = self._automaton.end()
            else:
                self._match = self._automaton.follow(self._match, text[position])
        self._read = len(text)
        return self._match

    def follow(self, state: Match, token: int) -> Match:
        return self._automaton.follow(state, token)

    def propose(self, state: Match) -> list[tuple[int, int]]:
        return self._marked(self._automaton.continuations(state, self._continuations))


class SharedSource(MatchMarks):
    """The longest occurrence of the text's end in what earlier requests of a namespace have left.

    Args:
        namespace: of a shared pool.
    """

    name = "shared"
    _longest = 64  # tokens of the prompt's end that are matched

    def __init__(self, namespace: Namespace) -> None:
        self._text = SharedText(namespace)
        self._matches = self._text.start()
        self._read = 0

    def root(self, text: Sequence[int]) -> tuple[Match, ...]:
        start = len(text) - self._longest
        if start > self._read:  # some tokens are passed over, so nothing that ends before them matches
            self._matches, self._read = self._text.start(), start
        self._matches = self._text.follow(self._matches, text[self._read :])
        self._read = len(text)
        return self._matches

    def follow(self, state: tuple[Match, ...], token: int) -> tuple[Match, ...]:
        return self._text.follow(state, (token,))

    def propose(self, state: tuple[Match, ...]) -> list[tuple[int, int]]:
        return self._marked(self._text.continuations(state, self._continuations))


class RecycledSource:
    """The target's best tokens the last time a token, or two in a row, stood anywhere in a step.

    Costs nothing: the logits were computed. Two tables answer, by the last two tokens and by the last one. About
    a token that never stood in a step they know nothing, which is so in a third of all steps (docs/LOG.md); then the
    token before it answers, with what the target ranked best one token after that, and then the target's most frequent
    choices.
    """

    name = "recycled"
    bits = 8
    silent = False
    # Marks: 16 x the rank after two tokens, plus one of these by the rank after one token, across a gap, or anywhere.
    _after_two_marks = range(16, 16 * (RANKS + 1), 16)
    _after_one_marks = range(1, 7)
    _gap_marks = range(7, 13)
    _usual_marks = (13, 14, 15)
    _counted_again = 32  # contexts learned between two looks at what is frequent

    def __init__(self) -> None:
        self._after_two: dict[tuple[int, int], Sequence[int]] = {}
        self._after_one: dict[int, Sequence[int]] = {}
        self._across_gap: dict[int, Sequence[int]] = {}
        self._counts: Counter[int] = Counter()
        self._usual: list[int] = []
        self._learned = 0

    def learn(self, before: int, token: int, best: Sequence[int]) -> None:
        """The target's best tokens, best first, after `token`, which followed `before`."""
        two, one = self._after_two, self._after_one
        two.pop((before, token), None)
        two[before, token] = best
        one.pop(token, None)
        one[token] = best
        if len(two) > CONTEXTS:
            del two[next(iter(two))]
        if len(one) > CONTEXTS:
            gone = next(iter(one))
            del one[gone]
            self._across_gap.pop(gone, None)
        self._across_gap[before] = best
        self._counts[best[0]] += 1
        if self._learned % self._counted_again == 0:
            self._usual = [token for token, _ in self._counts.most_common(len(self._usual_marks))]
        self._learned += 1

    def root(self, text: Sequence[int]) -> tuple[int, int]:
        return (text[-2] if len(text) > 1 else -1, text[-1])

    def follow(self, state: tuple[int, int], token: int) -> tuple[int, int]:
        return (state[1], token)

    def propose(self, state: tuple[int, int]) -> Iterable[tuple[int, int]]:
        before, token = state
        marks = dict(zip(self._after_two.get(state, ()), self._after_two_marks, strict=False))
        known = marks.get
        for mark, draft in enumerate(self._after_one.get(token, ()), 1):
            marks[draft] = known(draft, 0) + mark
        if not marks:
            marks = dict(zip(self._usual, self._usual_marks, strict=False))
            marks.update(zip(self._across_gap.get(before, ()), self._gap_marks, strict=False))
        return marks.items()

    def prior(self, mark: int) -> float:
        two, other = divmod(mark, 16)
        chance: float = 0.6 / two**1.7 if two else 0.0
        if other in self._after_one_marks:
            after_one: float = 0.3 / other**1.3
            return max(chance, after_one)
        if other in self._gap_marks:
            across: float = 0.2 / (other - 6) ** 1.3
            return across
        return (0.1, 0.06, 0.03)[other - 13] if other else chance


class DraftSource:
    """Drafts that are known whole at the root, and asked node by node.

    Args:
        name: in the counts.
        best: the chance of the first draft, until it is known better.
    """

    bits = 3
    silent = False

    def __init__(self, name: str, best: float) -> None:
        self.name = name
        self._best = best

    def follow(self, state: Sequence[Sequence[int]], token: int) -> list[Sequence[int]]:
        return [drafts[1:] for drafts in state if drafts[0] == token and len(drafts) > 1]

    def propose(self, state: Sequence[Sequence[int]]) -> Iterable[tuple[int, int]]:
        return [(token, min(rank, 7)) for rank, token in enumerate(dict.fromkeys(d[0] for d in state), 1)]

    def prior(self, mark: int) -> float:
        return self._best / mark


class NgramSource(DraftSource):
    """N-grams of a pool, by their first token.

    Args:
        pool: that somebody fills.
        at_root: asked at the root only, as in the paper; otherwise further n-grams begin at every node.
        name: in the counts.
    """

    def __init__(self, pool: NgramPool, at_root: bool, name: str = "window") -> None:
        super().__init__(name, best=0.3)
        self._pool = pool
        self._at_root = at_root

    @property
    def silent(self) -> bool:  # type: ignore[override]
        return not len(self._pool)

    def root(self, text: Sequence[int]) -> list[Sequence[int]]:
        return list(self._pool.candidates(text[-1]))

    def follow(self, state: Sequence[Sequence[int]], token: int) -> list[Sequence[int]]:
        rest = super().follow(state, token)
        return rest if self._at_root else [*rest, *self._pool.candidates(token)]


class OwnSource(DraftSource):
    """Drafts of the caller's function, which is asked once per step."""

    def __init__(self, propose: Propose) -> None:
        super().__init__("own", best=0.5)
        self._propose = propose

    def root(self, text: Sequence[int]) -> list[Sequence[int]]:
        return [drafts for drafts in self._propose(text) if drafts]


class Acceptance:
    """The chance that a draft is accepted, by its evidence: Beta means, whose counts fade.

    Args:
        sources: in the order of their marks in the evidence, lowest bits first.

    What is assumed about evidence that was never seen may be wrong for a whole text (hot sampling, say). So the hits of
    the likeliest proposals are compared with what their means said, and a tree's chances are scaled down by that.

    Attributes:
        means: the chances that were asked for so far, by evidence, unscaled.
        scale: of all chances, at most 1.
    """

    _weight = 8.0  # of what is assumed, in drafts
    _most = 256.0  # drafts remembered per evidence
    _trust = 4.0  # hits for which the assumption stands in the scale
    _fading = 0.98  # of hits, per node that is judged

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._counts: dict[int, list[float]] = {}
        self.means: dict[int, float] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        self._hits = 0.0
        self._said = 0.0
        self.scale = 1.0

    def __call__(self, evidence: int) -> float:
        """The chance of a draft, given that the walk reaches its parent."""
        known = self.means.get(evidence)
        return self.assume(evidence) if known is None else known

    def assume(self, evidence: int) -> float:
        """For evidence that was never seen: halfway between sources that always agree and independent ones."""
        best, none = 0.0, 1.0
        for source, mark in self.marks(evidence):
            chance = source.prior(mark)
            best, none = max(best, chance), none * (1 - chance)
        mean = self.means[evidence] = (best + 1 - none) / 2
        self._counts[evidence] = [mean * self._weight, self._weight]
        return mean

    def marks(self, evidence: int) -> list[tuple[Source, int]]:
        """The sources that speak for a draft, with their marks."""
        found = []
        for source in self._sources:
            mark = evidence & ((1 << source.bits) - 1)
            evidence >>= source.bits
            if mark:
                found.append((source, mark))
        return found

    def names(self, evidence: int) -> tuple[str, ...]:
        """The sources that speak for a draft, by name."""
        known = self._names.get(evidence)
        if known is None:
            known = self._names[evidence] = tuple(source.name for source, _ in self.marks(evidence))
        return known

    def judge(self, proposals: Mapping[int, int], token: int) -> None:
        """Count a node's proposals, token to evidence, now that the token that follows is known."""
        means, best, likeliest = self.means, 0.0, -1
        for draft, evidence in proposals.items():
            mean = means[evidence] if evidence in means else self.assume(evidence)
            if mean > best:
                best, likeliest = mean, draft
            count = self._counts[evidence]
            count[1] += 1.0
            if draft == token:
                count[0] += 1.0
            if count[1] > self._most:
                count[0] /= 2
                count[1] /= 2
            means[evidence] = count[0] / count[1]
        self._hits = self._fading * self._hits + (token == likeliest)
        self._said = self._fading * self._said + best
        self.scale = min(1.0, (self._hits + self._trust) / (self._said + self._trust))
