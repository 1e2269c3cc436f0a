"""No rank is waited for in vain."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lookahead_decoding as ld
import many
from conftest import FREE
from lookahead_decoding.ranks.group import Ranks
from lookahead_decoding.ranks.watch import DONE, ENDED, FAILED, RUNNING, SILENCE, Sign, fault_of
from test_parallel import LONG, PROMPT, small


def sign(collectives: int = 5, state: str = RUNNING, problem: str = "") -> Sign:
    return Sign(1, state, collectives, "here", 77, problem)


def fault(signs: list[Sign], silent: list[float], waits: float = 0.0) -> Any:
    found = fault_of(0, dict(enumerate(signs)), dict(enumerate(silent)), waits, patience=60.0, silence=15.0)
    return (found.ranks, found.problem) if found else None


def test_ranks_that_beat_are_well() -> None:
    assert fault([sign(), sign(), sign(state=DONE)], [0.0, 14.0, 99.0], waits=59.0) is None


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    problem = "rank 2 (process 77 on here) died or was stopped: no sign of life for 16 s"
    assert fault([sign(), sign(), sign()], [0.0, 0.0, 16.0]) == ((2,), problem)


def test_a_rank_that_failed_is_named_with_its_error_after_a_while() -> None:
    failed = sign(state=FAILED, problem="no such model")
    assert fault([sign(), failed], [0.0, 3.0]) is None
    assert fault([sign(), failed], [0.0, 4.5]) == ((1,), "rank 1 (process 77 on here) failed: no such model")


def test_a_rank_that_was_told_to_end_is_named_at_once() -> None:
    told = sign(state=ENDED, problem="was told to end (SIGTERM)")
    assert fault([sign(), told], [0.0, 0.1]) == ((1,), "rank 1 (process 77 on here) was told to end (SIGTERM)")
    assert fault([sign(), sign(state=ENDED)], [0.0, 60.0]) is None


def test_ranks_that_do_not_come_to_a_collective_are_named() -> None:
    assert fault([sign(6), sign(5), sign(6)], [0.0] * 3, waits=59.0) is None
    ranks, problem = fault([sign(6), sign(5), sign(6)], [0.0] * 3, waits=61.0)
    assert ranks == (1,)
    assert problem.startswith("rank 0 has waited for 61 s for rank 1 (process 77 on here)")


def test_a_rank_that_has_left_is_not_waited_for() -> None:
    ranks, problem = fault([sign(6), sign(5, DONE)], [0.0] * 2, waits=3.0)
    assert ranks == (1,)
    assert problem.startswith("rank 1 has left where rank 0 waits for it")


def forever(ranks: Ranks, folder: Path, what: str) -> None:
    model = small()
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(step_times=FREE), parallel=ranks)
    for number in range(100_000):
        if number == 3:
            (folder / f"ready-{ranks.rank}").write_text(str(os.getpid()))
            if what == "raises" and ranks.rank == 1:
                raise ValueError("this rank alone")
            if what == "leaves" and ranks.rank == 1:
                return
            if what == "hangs" and ranks.rank == 1:
                time.sleep(600)
        ld.generate(model, torch.tensor([PROMPT]), **LONG, do_sample=False, lookahead=decoding)


@pytest.mark.parametrize(
    ("what", "limit", "said"),
    [
        ("SIGKILL", 10, "rank 1 (process {} on"),
        ("SIGSTOP", SILENCE + 10, "rank 1 (process {} on"),
        ("SIGTERM", 10, "was told to end (SIGTERM)"),
        ("raises", 10, "failed: this rank alone"),
        ("leaves", 10, "rank 1 has left where rank"),
        ("hangs", 20, "rank 1 (process {} on"),
    ],
)
def test_all_end_with_one_message_where_one_rank(what: str, limit: float, said: str, tmp_path: Path) -> None:
    options = {"errors": str(tmp_path), "patience": 8.0}
    processes, _ = many.start(3, forever, tmp_path, what, **options)
    try:
        while len(list(tmp_path.glob("ready-*"))) < 3:
            assert all(process.exitcode is None for process in processes)
            time.sleep(0.05)
        victim = processes[1]
        if what.startswith("SIG"):
            os.kill(victim.pid, getattr(signal, what))
        end = time.monotonic() + limit
        for process in (processes[0], processes[2]):
            process.join(max(0.0, end - time.monotonic()))
        assert [processes[0].exitcode, processes[2].exitcode] == [1, 1]
    finally:
        for process in processes:
            process.kill()
    lines = [
        line
        for rank in (0, 2)
        for line in (tmp_path / f"{rank}.txt").read_text().splitlines()
        if line.startswith("lookahead: ")
    ]
    assert len(lines) == 1
    assert said.format(victim.pid) in lines[0]
