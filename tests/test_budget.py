from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import Choice, Lookahead, LookaheadConfig
from lookahead_decoding.draft.grow import GrowingTree
from lookahead_decoding.price.budget import (
    Budget,
    Pace,
    StepTimes,
    WindowInvestment,
    best_rows,
    window_rows,
    window_shapes,
)
from test_grow import Scripted, growing

HALF = ((7, 1),)  # every node has one child, with a chance of a half


def test_times_lie_on_lines_between_those_that_are_known() -> None:
    times = StepTimes([(8, 3.0), (1, 2.0), (16, 7.0)])
    assert times.fixed
    assert [times(n) for n in (1, 8, 12, 16)] == [2.0, 3.0, 5.0, 7.0]
    assert times(31) == 7.0 + 15 * 0.5  # past the last, the price of a row from a quarter of it on
    assert [StepTimes([(1, 1.0)])(n) for n in (1, 64)] == [1.0, 1.0]


def test_rows_that_a_step_is_padded_with_cost_nothing() -> None:
    times = StepTimes(padded=(1, 16, 64))
    for time in (5.0, 1.0, 1.0):
        times.add(1, time)
    for time in (5.0, 2.0, 2.0):
        times.add(9, time)  # which is fed as 16
    assert [times(n) for n in (1, 2, 16)] == [1.0, 2.0, 2.0]
    tree = growing(Scripted(*HALF), depth=4)
    assert best_rows([tree], StepTimes([(1, 1.0), (2, 1.1), (16, 1.2)], padded=(1, 16)), 16)[0] == len(tree) == 5


def test_times_come_from_steps_of_which_the_first_of_a_size_does_not_count() -> None:
    times = StepTimes()
    assert times(64) > times(1)
    times.add(1, 900.0)  # compiled something
    assert times(1) < 900.0
    for time in (2.0, 50.0, 2.0, 2.0):
        times.add(1, time)
    assert times(1) == 2.0
    for time in (900.0, 9.0, 3.0, 3.0):
        times.add(7, time)
    for time in (900.0, 2.5):
        times.add(15, time)
    assert times(15) == 2.5
    assert times(7) == 2.5  # fewer rows never take more time
    assert times(4) == 2.25


def test_a_size_that_was_not_fed_for_long_is_forgotten() -> None:
    times = StepTimes()
    for rows, time in [(1, 1.0)] * 3 + [(8, 1.2)] * 3 + [(16, 90.0)] * 3:
        times.add(rows, time)
    assert times(16) == 90.0
    for _ in range(300):
        times.add(8, 1.2)
    assert times(16) == pytest.approx(1.2 + 0.2 * 8 / 7)


def test_fixed_times_do_not_learn() -> None:
    times = StepTimes([(1, 1.0), (3, 2.0)])
    for _ in range(3):
        times.add(1, 9.0)
    assert times(1) == 1.0


@pytest.mark.parametrize(
    ("times", "rows"),
    [
        ([(1, 1.0)], 5),  # free: all there are
        ([(1, 1.0), (2, 2.0)], 1),  # a row costs a whole step, and brings half a token
        ([(1, 1.0), (2, 1.2), (3, 1.5), (4, 1.9), (5, 2.5)], 2),  # 1, 1.25, 1.167, 0.987
        ([(1, 1.0), (2, 1.6), (4, 1.65)], 4),  # two do not pay, and four do: 0.94 and 1.14
    ],
)
def test_nodes_are_taken_while_tokens_per_time_rise(times: list[tuple[int, float]], rows: int) -> None:
    tree = growing(Scripted(*HALF), depth=4)
    assert best_rows([tree], StepTimes(times), 64)[0] == rows


def test_a_batch_has_one_size_for_all_and_pays_for_all_of_its_rows() -> None:
    times = StepTimes([(1, 1.0), (2, 1.3)])
    assert best_rows([growing(Scripted((7, 1)), depth=1)], times, 9)[0] == 2
    silent = [growing(Scripted(), depth=1) for _ in range(3)]
    assert best_rows([growing(Scripted((7, 1)), depth=1), *silent], times, 9)[0] == 1


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=3, unique_by=lambda p: p[0]),
    st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12),
)
def test_no_size_is_better_than_the_one_taken(proposals: list[tuple[int, int]], costs: list[float]) -> None:
    """Against every size there is."""
    points = [(1, 1.0)]
    for i, cost in enumerate(costs, 2):
        points.append((i, points[-1][1] + cost))
    times = StepTimes(points)
    _, rate = best_rows([growing(Scripted(*proposals))], times, 13)
    tree = growing(Scripted(*proposals))
    tree.grow(13)
    sizes = [n for n in (1, 2, 3, 4, 6, 8, 10, 12, 13) if n <= len(tree)]
    assert rate == pytest.approx(max(tree.expected[n - 1] / times(n) for n in sizes))


def run(budget: Budget, core: Lookahead, steps: int, token: int = 1, seconds: float = 0.0) -> list[int]:
    """Rows of each step; the target always says `token`."""
    rows = []
    for step in range(steps):
        (tree,) = budget.plan([core])
        assert tree is not None
        rows.append(len(tree))
        core.observe(Choice((token,), (0,), tuple(token for _ in tree.last_row)))
        budget.spent(seconds * (step + 1))
    return rows


def test_a_sequence_that_ended_stays_without_a_tree() -> None:
    config = LookaheadConfig(step_times=((1, 1.0),))
    first, last = Budget(StepTimes([(1, 1.0)]), config).plan([None, Lookahead([1, 2, 1, 2, 1], config)])
    assert first is None
    assert last is not None
    assert len(last) > 1


def test_max_rows_caps_every_tree() -> None:
    config = LookaheadConfig(max_rows=6, step_times=((1, 1.0),))
    core = Lookahead([1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2], config)
    assert max(run(Budget(StepTimes([(1, 1.0)]), config), core, 5)) == 6
    core = Lookahead([1, 2, 3], config, propose=lambda text: [[token] * 9 for token in range(9)])
    assert max(run(Budget(StepTimes([(1, 1.0)]), config, own_source=True), core, 5)) == 6


def test_plain_steps_are_timed_first() -> None:
    config = LookaheadConfig()
    core = Lookahead([1] * 20, config)
    rows = run(Budget(StepTimes(), config), core, 8, seconds=1.0)
    assert rows[:4] == [1] * 4  # the first does not count
    assert max(rows[4:]) > 1


def test_where_nothing_is_accepted_sources_rest_and_are_asked_again() -> None:
    config = LookaheadConfig(sources=("prompt",), step_times=((1, 1.0), (2, 1.2)))
    asked = 0

    class Counting(Lookahead):
        def grow(self, floor: float = 0.0) -> GrowingTree:
            nonlocal asked
            asked += 1
            return super().grow(floor)

    core = Counting(
        [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 1], config
    )  # what follows a 1 is never a 9, and a 9 never stood there
    budget = Budget(StepTimes(config.step_times or ()), config)
    rows = run(budget, core, 400, token=9)
    assert sum(n > 1 for n in rows) < 10
    assert 10 < asked < 60
    assert core.text[-1] == 9


def test_ranks_are_wanted_by_the_recycled_source_in_steps_that_are_learned_from() -> None:
    without = LookaheadConfig(sources=("prompt",))
    assert Budget(StepTimes(), without).ranks == 0
    budget, core = Budget(StepTimes(), LookaheadConfig()), Lookahead([1, 2], LookaheadConfig())
    assert budget.ranks > 0  # of prefill
    budget.plan([core])
    assert budget.ranks == 0  # a plain step for the clock


def test_a_fixed_window_is_the_only_size_and_one_without_fits_its_half() -> None:
    assert window_shapes(LookaheadConfig(window_size=7), 64) == [(7, 4)]
    assert window_shapes(LookaheadConfig(sources=("prompt",)), 64) == [(0, 0)]
    assert window_shapes(LookaheadConfig(), 64) == [(0, 0), (3, 3), (5, 4), (8, 4)]
    assert window_shapes(LookaheadConfig(), 120)[-1] == (15, 5)
    assert [window_rows(s) for s in ((0, 0), (3, 3), (15, 5))] == [0, 5, 59]


class Gained(Lookahead):
    """A sequence whose window brings what the test says."""

    window_gain = 0


@pytest.mark.parametrize(("gain", "kept"), [(1, True), (0, False)])
def test_a_window_stays_while_it_brings_more_than_its_rows_cost(gain: int, kept: bool) -> None:
    times = StepTimes([(1, 1.0), (64, 1.5)])
    window, core = WindowInvestment([(0, 0), (3, 3)]), Gained([1, 2, 3], LookaheadConfig(sources=("window",)))
    core.window_gain = gain
    tried = False
    for _ in range(400):
        window.apply([core])
        window.reconsider([core], [core.grow()], StepTimes([(1, 1.0)]) if not tried else times, 64)
        tried |= window.shape != (0, 0)
    assert tried
    assert (window.shape != (0, 0)) == kept


def test_what_one_request_learned_about_the_pace_the_next_one_knows() -> None:
    config = LookaheadConfig(sources=("prompt",))
    times = StepTimes()
    ranks = []
    for _ in range(8):
        budget, core, seconds = Budget(times, config), Lookahead([1, 2, 3, 1, 2, 4, 1, 1], config), 0.0
        for _ in range(20):
            (tree,) = budget.plan([core])
            ranks.append(core._growing is not None)  # asked
            core.observe(Choice((9,), (0,)))
            seconds += 1.1 if ranks[-1] or len(tree) > 1 else 1.0
            budget.spent(seconds)
    assert sum(ranks[:40]) > 12
    assert sum(ranks[-80:]) < 12
    fixed = StepTimes([(1, 1.0)])
    assert fixed.pace(("prompt",)) is not fixed.pace(("prompt",))


def test_a_rest_is_longer_each_time_until_guessing_is_faster_again() -> None:
    pace = Pace()
    rests = []
    for _ in range(7):
        while True:
            pace.judge(1, 1.3, 1)
            if pace.rests():
                break
        rest = 1
        while pace.rests():
            rest += 1
        rests.append(rest)
    assert rests == [4, 8, 16, 32, 64, 64, 64]
    pace.judge(3, 1.3, 1)
    for _ in range(8):
        pace.judge(1, 1.9, 1)
        if pace.rests():
            break
    assert [pace.rests() for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(("wrong", "plain"), [(None, range(5)), (8, range(181, 201))])
def test_a_batch_is_judged_by_the_sequence_that_is_furthest_from_its_end(wrong: int | None, plain: range) -> None:
    """One of two accepts a draft in every step; the other one may never do so, and the batch ends with it."""
    config = LookaheadConfig(sources=("prompt",), max_rows=4, step_times=((1, 1.0), (8, 1.3)))
    budget = Budget(StepTimes(config.step_times or ()), config)
    cores = [Lookahead([7, 1] * 9, config, limit=1000), Lookahead([7, 1] * 9, config, limit=1000)]
    single = 0
    for step in range(200):
        trees = budget.plan(cores)
        single += max(len(tree) for tree in trees if tree) == 1
        for core, tree, instead in zip(cores, trees, (None, wrong), strict=True):
            after, second = (7, 1) if core.text[-1] == 1 else (1, 7)
            deep = instead is None and len(tree) > 1 and tree.tokens[1] == after
            core.observe(Choice((after, second), (0, 1)) if deep else Choice((instead or after,), (0,)))
        budget.spent(float(step))
    assert single in plain


def test_a_step_that_was_disturbed_does_not_make_the_sources_rest() -> None:
    config = LookaheadConfig(sources=("prompt",), max_rows=4)
    budget, core, seconds, asked = Budget(StepTimes(), config), Lookahead([7, 1] * 9, config), 0.0, 0
    for step in range(120):
        (tree,) = budget.plan([core])
        after = 7 if core.text[-1] == 1 else 1
        accepted = len(tree) > 1 and tree.tokens[1] == after
        core.observe(Choice((after, 8 - after), (0, 1)) if accepted else Choice((after,), (0,)))
        seconds += 60.0 if step % 10 == 9 else 1.0 + 0.1 * (len(tree) - 1)
        budget.spent(seconds)
        asked += len(tree) > 1
    assert asked > 100


def test_bad_luck_alone_is_no_reason_to_rest() -> None:
    def rests(tokens: Sequence[int]) -> bool:
        pace = Pace()
        for came in 10 * list(tokens):
            pace.judge(came, taken=2.05, sequences=1)
            if pace.rests():
                return True
        return False

    assert not rests([1, 3])  # every other step pays for the one before, or nearly
    assert rests([2, 2, 2, 2])
    assert rests([1, 1, 1, 3])


def test_sources_never_rest_where_rows_cost_nothing() -> None:
    config = LookaheadConfig(sources=("prompt", "output"), step_times=((1, 1.0),))
    budget = Budget(StepTimes(config.step_times or ()), config)
    core = Lookahead([7], config, limit=1000)
    for token in range(8, 40):  # of which none stood before
        budget.plan([core])
        core.observe(Choice((token,), (0,)))
        budget.spent(float(token))
    core.observe(Choice((7,), (0,)))
    (tree,) = budget.plan([core])
    assert tree is not None
    assert tree.tokens[1:3] == (8, 9)
