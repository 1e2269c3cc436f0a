"""How many rows a step has: as many as pay.

The rule (docs/design.md): a step of n rows takes t(n) and is expected to give 1 + the chances of its nodes. Nodes are
taken in order of their chance while tokens per second rise. Plain decoding is the case where none pays. The same rule
serves a batch, whose trees have a common size, since t depends on all rows together.

Times decide how many forwards a text takes, never which tokens it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median

from ..config import NGRAM_SIZE, LookaheadConfig
from ..draft.grow import GrowingTree
from ..draft.lookahead import Lookahead, max_rows
from ..draft.sources import RANKS
from ..draft.tree import TokenTree

SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
"""Rows per sequence that a step may have."""

KEPT = 9
"""Times remembered per size."""

SEEDED = 4
"""Steps of a size that are made up where it was timed before the first one; later steps push them out. As ever, the
first of them does not count."""

EVERY_STEP, SOMETIMES, FORGOTTEN = 64, 8, 256
"""Steps after each of which times are looked at; how often after that; and for how long a size is remembered."""

WORTH = 0.01
"""Tokens of later steps that a row brings, since the recycled source learns from it (docs/LOG.md)."""

SLOPE = 0.02
"""What a row is assumed to cost, as a share of a step of one row, until steps of two sizes were timed."""


def _usual(seen: Iterable[tuple[int, float]]) -> float:
    """The lower quartile of times: what disturbs a step makes it longer."""
    times = sorted(time for _, time in seen)
    return times[(len(times) - 1) // 4]


class StepTimes:
    """t(n): how long a step takes by the rows of a sequence, in any unit.

    Args:
        known: rows and times that were measured before, and hold; without them they come from the steps as they run.
        padded: rows that a step is padded to one of, where it is: in between, rows cost nothing.

    Attributes:
        fixed: whether they were given.
        sizes: rows that a step may have to be proposed.
        steps: that were timed so far.
    """

    def __init__(self, known: Iterable[tuple[int, float]] = (), padded: Sequence[int] = ()) -> None:
        self.sizes = padded or SIZES
        self._padded = padded
        self._points = sorted((float(rows), float(time)) for rows, time in known)
        self.fixed = bool(self._points)
        self._seen: dict[int, deque[tuple[int, float]]] = {}
        self._plain: deque[tuple[int, float]] = deque(maxlen=KEPT)
        self.steps = 0
        self._latest: dict[int, int] = {}
        self._table: dict[int, float] = {}
        self._paces: dict[object, Pace] = {}

    def pace(self, settings: object) -> Pace:
        """How guessing with some settings did in these steps, across requests.

        Where times are fixed each request begins anew, so that it feeds the same trees however often it is made.
        """
        return Pace() if self.fixed else self._paces.setdefault(settings, Pace())

    def add(self, rows: int, time: float) -> None:
        """A step of so many rows took so long. The first of each size does not count: it may have been made ready."""
        if self.fixed:
            return
        self.steps += 1
        rows = self._fed(rows)
        size = next((s for s in self.sizes if s >= rows), rows)
        self._latest[size] = self.steps
        if size not in self._seen:
            self._seen[size] = deque(maxlen=KEPT)
            return
        self._seen[size].append((rows, time))
        if self.steps <= EVERY_STEP or self.steps % SOMETIMES == 0:
            self._conclude()

    def _fed(self, rows: int) -> int:
        """Rows that a step of so many has once it is padded."""
        return next((size for size in self._padded if size >= rows), rows)

    def _conclude(self) -> None:
        """Make points of what was seen. A size that was not fed for long is forgotten, and then tried again."""
        for size in [s for s, step in self._latest.items() if s > 1 and self.steps - step > FORGOTTEN]:
            del self._latest[size], self._seen[size]
        points = sorted((median(rows for rows, _ in seen), _usual(seen)) for seen in self._seen.values() if seen)
        for i in reversed(range(len(points) - 1)):  # fewer rows never take more time, whatever disturbed them
            points[i] = points[i][0], min(points[i][1], points[i + 1][1])
        self._points = points
        self._table = {}

    def begin(self, times: Iterable[tuple[int, float]]) -> None:
        """Steps that were timed before the first one: as if each had been seen a few times."""
        for rows, time in times:
            for _ in range(SEEDED):
                self.add(rows, time)
                if rows == 1:
                    self._plain.append((1, time))
        self._conclude()

    def add_plain(self, time: float) -> None:
        """A plain step, for which nothing was learned or planned, took so long."""
        self.add(1, time)
        if not self.fixed and self._seen[1]:  # the first does not count
            self._plain.append((1, time))

    @property
    def plain(self) -> float:
        """The time of a step of plain decoding."""
        return _usual(self._plain) if self._plain else self(1)

    @property
    def plain_samples(self) -> int:
        """Plain steps whose times are remembered."""
        return len(self._plain)

    def __call__(self, rows: int) -> float:
        """The time of a step of so many rows: on a line between two that are known, or past the last one."""
        known = self._table.get(rows)
        if known is None:
            known = self._table[rows] = self._between(self._fed(rows))
        return known

    def _between(self, rows: int) -> float:
        points = self._points
        if not points:
            return 1 + SLOPE * (rows - 1)
        if len(points) == 1:
            base = points[0][1] / (1 + SLOPE * (points[0][0] - 1))
            return base * (1 + SLOPE * (rows - 1)) if not self.fixed else points[0][1]
        after = next((i for i, (at, _) in enumerate(points) if at >= rows), len(points) - 1) or 1
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        if rows > x1:
            return y1 + self._last_price * (rows - x1)
        return max(y0 + (y1 - y0) * (rows - x0) / (x1 - x0), 1e-9)

    @property
    def _last_price(self) -> float:
        """Of a row past the most that are known: what it costs from a quarter of that on.

        The step from one row to two may cost more than all later ones, since a tree needs a mask.
        """
        (x1, y1) = self._points[-1]
        x0, y0 = next((x, y) for x, y in self._points if x >= min(x1 / 4, self._points[-2][0]))
        return max(0.0, (y1 - y0) / (x1 - x0))


class Pace:
    """Whether guessing is faster than plain steps, by the clock, and when to rest from it.

    What a step gives and takes is compared with plain steps, all that is done for it included. Where it is slower, by
    more than the varying luck of its steps explains, the sources rest for 4, 8, ... 64 steps, and are then watched for
    a few.
    """

    _luck = 0.5  # deviations of what was given by which guessing may fall behind
    _watched = 8  # steps of a sequence before the first judgement, and half of that after a rest
    _memory = 0.95  # of what was given and taken, per step
    _shortest_rest = 4
    _longest_rest = 64

    def __init__(self) -> None:
        self._given = 0.0  # tokens, fading
        self._squares = 0.0  # of the tokens of a step, fading
        self._steps = 0.0
        self._taken = 0.0  # plain steps in the same time, fading
        self._rest = 0
        self._next_rest = self._shortest_rest
        self._patience = float(self._watched)

    def rests(self) -> bool:
        """Whether the next step is a plain one; asked once per step."""
        self._rest -= 1
        return self._rest >= 0

    def judge(self, given: float, taken: float, sequences: int) -> None:
        """Take note of a step that was not plain.

        Args:
            given: tokens by which the sequence that is furthest from its end came nearer to it.
            taken: its time, in plain steps.
            sequences: that it served, each of which is a witness.
        """
        self._given = self._memory * self._given + given
        self._squares = self._memory * self._squares + given**2
        self._steps = self._memory * self._steps + 1
        self._taken = self._memory * self._taken + taken
        self._patience -= sequences
        deviation = max(0.0, self._squares - self._given**2 / self._steps) ** 0.5
        if self._given >= self._taken:
            self._next_rest = self._shortest_rest
        elif self._patience <= 0 and self._given + self._luck * deviation < self._taken:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, self._longest_rest)
            self._given = self._taken = self._squares = self._steps = 0.0
            self._patience = self._watched / 2


SHAPES = ((0, 0), (3, 3), (5, 4), (8, 4), (15, 5))
"""Window and n-gram sizes that an adaptive window moves between; the first is no window."""


def window_rows(shape: tuple[int, int]) -> int:
    """Nodes of a window besides the root: N - 1 rows of W columns."""
    window_size, ngram_size = shape
    return max(0, (ngram_size - 1) * window_size - 1)


def window_shapes(config: LookaheadConfig, most_rows: int) -> list[tuple[int, int]]:
    """The sizes that the window may have, smallest first; one that the caller fixed is the only one."""
    if "window" not in config.sources:
        return [(0, 0)]
    if config.window_size is not None:
        return [(config.window_size, config.ngram_size or NGRAM_SIZE)]
    shapes = [(w, config.ngram_size or n) if w else (0, 0) for w, n in SHAPES]
    return [shape for shape in shapes if window_rows(shape) <= most_rows // 2]


class Budget:
    """Plans the trees of a step, of all sequences together.

    Args:
        times: t(n).
        config: the sources, and what is fixed.
        own_source: whether the sequences have a source of the caller's.

    Attributes:
        ranks: how many of the target's best tokens per node the planned step will be learned from.
    """

    _timed_first = 3  # plain steps that are timed before anything else, since all is compared with them
    _timed_again = 128  # steps after which a plain one is timed again
    _disturbed = 1.1  # times the usual time: what is above does not count against guessing
    _margin = 1.02  # what a step that asked in vain costs, where times are given and rows cost anything
    _hopeless = 0.25  # of the price of a row: drafts with a smaller chance are not looked at

    def __init__(self, times: StepTimes, config: LookaheadConfig, own_source: bool = False) -> None:
        self._times = times
        self._most = max_rows(config, own_source)
        self._idle = not config.sources and not own_source
        self._window = WindowInvestment(window_shapes(config, self._most))
        self._pace = times.pace((config, own_source))
        self._in_vain = self._margin if times(self._most) > times(1) else 1.0
        self._rows = 0
        self._running: list[Lookahead] = []
        self._guesses = False
        self._left = 0
        self._floor = 0.0
        self._before = 0.0
        self._worth = WORTH if "recycled" in config.sources else 0.0
        self._ranks = RANKS if "recycled" in config.sources else 0
        self.ranks = self._ranks

    def plan(self, lookaheads: Sequence[Lookahead | None]) -> list[TokenTree | None]:
        """One tree per sequence; None stays None."""
        running = [lookahead for lookahead in lookaheads if lookahead]
        self._running, self._left = running, most_left(running)
        self._guesses = not (self._idle or self._is_timing() or self._pace.rests())
        if not self._guesses:
            self._rows, self.ranks = 1, 0
            return [lookahead.plain() if lookahead else None for lookahead in lookaheads]
        self.ranks = self._ranks
        self._window.apply(running)
        growing = [lookahead.grow(self._floor) for lookahead in running]
        self._rows, rate = best_rows(growing, self._times, self._most, self._worth)
        self._floor = self._least_chance(rate / len(running))
        self._window.reconsider(running, growing, self._times, self._most)
        trees = iter(growing)
        return [next(trees).tree(self._rows) if lookahead else None for lookahead in lookaheads]

    def spent(self, seconds: float, fed_again: int = 0) -> None:
        """Take note of the time that all steps so far have taken; what was added is the planned one's.

        Args:
            fed_again: accepted tokens that it had to feed once more. The price of earlier guesses is in its time, so it
                says nothing about plain steps, and counts against guessing.
        """
        time, self._before = seconds - self._before, seconds
        if not self._rows:  # prefill
            return
        if self._guesses or fed_again:
            if self._guesses:
                self._times.add(self._rows, time)
            if self._times.fixed:  # which leaves out what it takes to ask in vain
                time = self._times(self._rows) * (self._in_vain if self._rows == 1 else 1.0)
            if not fed_again:  # as the time of plain steps leaves out what is above
                time = min(time, self._disturbed * self._times(self._rows))
            given = self._left - most_left(self._running)
            self._pace.judge(given, time / self._times.plain, len(self._running))
        else:
            self._times.add_plain(time)

    def _is_timing(self) -> bool:
        """Whether this step is plain for the clock's sake: first of all, and rarely later."""
        if self._times.fixed:
            return False
        return self._times.plain_samples < self._timed_first or self._times.steps % self._timed_again == 0

    def _least_chance(self, rate: float) -> float:
        """A part of what a node's chance must be to pay, at the mean price of a row and the rate of the last step."""
        if self._most == 1:
            return 0.0
        return self._hopeless * rate * (self._times(self._most) - self._times(1)) / (self._most - 1)


def most_left(lookaheads: Iterable[Lookahead]) -> int:
    """Tokens to the end of the sequence that is furthest from it: a batch is done when that one is."""
    return max(lookahead.left for lookahead in lookaheads)


def best_rows(growing: Sequence[GrowingTree], times: StepTimes, most: int, worth: float = 0.0) -> tuple[int, float]:
    """The size at which a step gives the most tokens per time, and that rate.

    The trees grow while a larger size could still be better: no node is likelier than the one before it.

    Args:
        growing: the trees of all sequences.
        most: rows of a tree at most.
        worth: tokens of later steps that a row brings by what is learned from it.
    """
    best, rate = 0, 0.0
    smallest = max(map(len, growing))
    sizes = [smallest, *(s for s in times.sizes if smallest < s < most), *([most] if most > smallest else [])]
    prices = [times(size) for size in sizes]
    for i, size in enumerate(sizes):
        expected = sum([tree.grow(size) + worth * len(tree) for tree in growing])
        rows = max([len(tree) for tree in growing])
        price = prices[i] if rows == size else times(rows)
        if expected > rate * price:
            best, rate = rows, expected / price
        chance = sum([tree.next_chance + worth for tree in growing if tree.next_chance])
        if not chance:
            break
        for larger in range(i + 1, len(sizes)):
            if expected + chance * (sizes[larger] - size) > rate * prices[larger]:
                break
        else:
            break
    return best, rate


class WindowInvestment:
    """How large the window is: its rows cost now, and its n-grams may be accepted later.

    A window brings the accepted tokens that only its n-grams proposed; its rows cost the time they take, and the
    candidates that they leave no room for. Another size is taken when it was better by a margin for a while.

    Args:
        shapes: the sizes it may have, smallest first.
    """

    _assumed = 0.045  # tokens per step that the smallest window is assumed to bring, until it was tried
    _memory = 0.03  # share of the newest step in what a window brings
    _looked_at = 8  # steps between two comparisons
    _weight = 0.25  # of the newest comparison
    _margin = 1.02
    _forgotten = 1024  # steps after which what was tried is assumed anew

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        self._shapes = list(shapes)
        self._at = 0
        self._steps = 0
        self._forget()

    def _forget(self) -> None:
        rows = [window_rows(shape) for shape in self._shapes]
        least = min((r for r in rows if r), default=1)
        # A larger window brings more, but less per row.
        self._brings = [self._assumed * (r / least) ** 0.5 for r in rows]
        self._better = [1.0] * len(rows)

    @property
    def shape(self) -> tuple[int, int]:
        """W and N for the moment."""
        return self._shapes[self._at]

    def apply(self, lookaheads: Iterable[Lookahead]) -> None:
        """Give every sequence the window of the moment."""
        for lookahead in lookaheads:
            lookahead.resize(*self.shape)

    def reconsider(
        self, lookaheads: Sequence[Lookahead], growing: Sequence[GrowingTree], times: StepTimes, most: int
    ) -> None:
        """Learn what the last step's window brought and, now and then, compare with the next smaller and larger one.

        Args:
            growing: the trees of the step being planned, grown as far as they paid.
        """
        if len(self._shapes) == 1:
            return
        self._steps += 1
        if self._at:
            gain = sum(lookahead.window_gain for lookahead in lookaheads) / len(lookaheads)
            self._brings[self._at] += self._memory * (gain - self._brings[self._at])
        if self._steps % self._forgotten == 0:
            self._forget()
        if self._steps % self._looked_at:
            return
        here = self._rate(self._at, growing, times, most)
        for other in (self._at - 1, self._at + 1):
            if 0 <= other < len(self._shapes):
                ratio = self._rate(other, growing, times, most) / here
                self._better[other] += self._weight * (ratio - self._better[other])
                if self._better[other] > self._margin:
                    self._at, self._better = other, [1.0] * len(self._shapes)
                    return

    def _rate(self, shape: int, growing: Sequence[GrowingTree], times: StepTimes, most: int) -> float:
        """Tokens per time with a window of another shape and the candidates there are."""
        rows = 1 + window_rows(self._shapes[shape])
        now = self._brings[self._at] if self._at else 0.0
        brings = len(growing) * ((self._brings[shape] if shape else 0.0) - now)
        best = 0.0
        for candidates in range(max(len(tree.expected) for tree in growing)):
            if rows + candidates > most:
                break
            expected = sum(tree.expected[min(candidates, len(tree.expected) - 1)] for tree in growing)
            best = max(best, (expected + brings) / times(rows + candidates))
        return best or 1e-9
