"""Looking after the other ranks: none of them is waited for in vain.

Every rank has a thread that leaves a sign of life in a store twice a second, and looks at those of the others. Where
one has died, has stopped, has failed or does not come to a collective that the others wait in, the thread says so and
ends its process, whatever the rest of it waits for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

BEAT = 0.5
"""Seconds between two signs of life."""

SILENCE = 15.0
"""Seconds without one after which a rank is given up."""

SUSPICION = 3.0
"""The same once a connection broke, or this process was told to end: somebody has gone."""

GRACE = 2.0
"""Seconds for a rank to come to the same end by itself, where another one has left; twice that where it has failed."""

RUNNING, DONE, GONE, FAILED, ENDED = "running", "done", "gone", "failed", "ended"


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself.

    Attributes:
        beat: grows as long as its process runs.
        state: "running"; "done" where it waits for the others to leave with them, "gone" where it has; "failed";
            "ended" where it was made to end.
        collectives: that it has come to.
        host, process: where it is.
        problem: why it failed.
    """

    beat: int
    state: str
    collectives: int
    host: str
    process: int
    problem: str = ""

    @property
    def place(self) -> str:
        return f"process {self.process} on {self.host}"


@dataclass(frozen=True)
class Fault:
    """What is wrong with other ranks, in words, and which ones."""

    ranks: tuple[int, ...]
    problem: str


def fault_of(
    rank: int, signs: Mapping[int, Sign], silent: Mapping[int, float], waits: float, patience: float, silence: float
) -> Fault | None:
    """What is wrong with the other ranks; None if they are well.

    Args:
        rank: of the one who asks.
        signs: the last one of each rank.
        silent: seconds since then, by rank.
        waits: seconds that the one who asks has waited in a collective.
        patience: seconds after which a rank that does not come to a collective is given up.
        silence: seconds after which a rank without a sign of life is.
    """
    others = {other: sign for other, sign in signs.items() if other != rank}
    for other, sign in others.items():
        if sign.state == ENDED and sign.problem:
            return Fault((other,), f"rank {other} ({sign.place}) {sign.problem}")
        if sign.state == FAILED and silent[other] > 2 * GRACE:
            return Fault((other,), f"rank {other} ({sign.place}) failed: {sign.problem}")
    for other, sign in others.items():
        if sign.state == RUNNING and silent[other] > silence:
            what = f"died or was stopped: no sign of life for {silent[other]:.0f} s"
            return Fault((other,), f"rank {other} ({sign.place}) {what}")
    behind = {other: sign for other, sign in others.items() if sign.collectives < signs[rank].collectives}
    left = [other for other, sign in behind.items() if sign.state in (DONE, GONE)]
    if left and waits > GRACE:
        return Fault(tuple(left), f"rank {left[0]} has left where rank {rank} waits for it: {ALIKE}")
    if behind and waits > patience:
        names = ", ".join(f"rank {other} ({sign.place})" for other, sign in behind.items())
        return Fault(tuple(behind), f"rank {rank} has waited for {waits:.0f} s for {names}: {ALIKE}")
    return None


TOLD = "was told to end (SIGTERM)"
ALIKE = "all ranks must make the same calls, or one hangs"


class Watch:
    """Of one rank over all others.

    Args:
        rank, size: of the ranks.
        host, port: of the store, as torchrun names them: its agent's, or rank 0's where there is none.
        patience: seconds after which a rank that others wait for in a collective is given up.
        name: of what is watched, which is one run of all ranks.
    """

    def __init__(self, rank: int, size: int, host: str, port: int, patience: float, name: str) -> None:
        self._rank = rank
        self._patience = patience
        limit = timedelta(seconds=5)
        self._store = dist.TCPStore(host, port, is_master=False, timeout=limit, wait_for_workers=False)  # type: ignore[attr-defined]
        self._keys = [f"{name}/{other}" for other in range(size)]
        self._state = RUNNING
        self._sign = Sign(0, RUNNING, 0, socket.gethostname(), os.getpid())
        self._signs: dict[int, Sign] = {}
        self._seen: dict[int, float] = {}  # when each rank's last sign was
        self._collectives = 0
        self._waits_since: float | None = None
        self._suspicious_since: float | None = None
        self._told_since: float | None = None
        self._blind = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch over other ranks", daemon=True)
        self._signals: int | None = None
        self._passed_on = -1

    def start(self) -> None:
        """Wait for all ranks, and watch them from here on.

        Raises:
            TimeoutError: a rank did not come.
        """
        self._leave()
        end = time.monotonic() + self._patience
        while missing := [rank for rank, key in enumerate(self._keys) if not self._store.check([key])]:
            if time.monotonic() > end:
                raise TimeoutError(f"rank {missing[0]} did not start within {self._patience:.0f} s")
            time.sleep(BEAT / 10)
        self._look()
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether this rank has left."""
        return self._over.is_set()

    def stop(self, error: BaseException | None = None) -> None:
        """This rank leaves, in order or with an error; in order, once all others have come to that as well."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # a connection broke: the thread finds out whose
            self._suspicious_since = time.monotonic()
            self._waits_since = time.monotonic() - 2 * GRACE  # it did, when that happened
            self._over.wait(SUSPICION + GRACE)
        self._state = DONE if error is None else FAILED
        if error is None:
            self._wait_for_others((DONE, GONE, FAILED, ENDED), self._patience)
            if self._rank == 0:  # the store may be this process's, and the others have to see that all are done
                self._wait_for_others((GONE, FAILED, ENDED), GRACE)
        self._over.set()
        self._thread.join()
        self._state = GONE if error is None else FAILED
        problem = "" if error is None else (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not self._blind:
            with suppress(Exception):
                self._leave(problem)
        if error is not None and self._rank:
            time.sleep(GRACE / 2)  # the first rank speaks to the user; whoever ends first has all others ended

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a collective."""
        self._collectives += 1
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    @contextmanager
    def told_to_end(self) -> Iterator[None]:
        """Inside, SIGTERM, which torchrun sends to all ranks where one has died, waits until the reason is known."""
        if threading.current_thread() is not threading.main_thread():  # only that one can receive signals
            yield
            return
        signals, wakeup = os.pipe()
        os.set_blocking(signals, False)
        os.set_blocking(wakeup, False)
        handler = signal.signal(signal.SIGTERM, lambda number, frame: None)
        self._signals, self._passed_on = signals, signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        try:
            yield
        finally:
            self._signals = None
            signal.set_wakeup_fd(self._passed_on)
            signal.signal(signal.SIGTERM, signal.SIG_DFL if handler is None else handler)
            os.close(signals)
            os.close(wakeup)
            if self._told_since is not None:
                signal.raise_signal(signal.SIGTERM)

    def _hear(self, now: float) -> None:
        """Look for SIGTERM, whatever the main thread waits for; what else there is goes to who listened before."""
        with suppress(OSError):
            heard = os.read(self._signals, 64) if self._signals is not None else b""
            if signal.SIGTERM in heard:
                self._told_since = self._told_since or now
            if heard and self._passed_on >= 0:
                os.write(self._passed_on, heard)

    def _wait_for_others(self, states: Collection[str], seconds: float) -> None:
        """Until all of them are in one of some states, or the store has gone with its owner."""
        end = time.monotonic() + seconds
        while not self._blind and time.monotonic() < end:
            if all(sign.state in states for rank, sign in self._signs.items() if rank != self._rank):
                return
            time.sleep(BEAT / 10)

    def _run(self) -> None:
        while not self._over.wait(BEAT if self._state == RUNNING else BEAT / 10):
            try:
                self._leave()
                self._look()
                self._blind = False
            except Exception:  # the store has gone with its owner, rank 0 or torchrun; what was seen until then counts
                self._blind = True
            self._judge(time.monotonic())

    def _judge(self, now: float) -> None:
        self._hear(now)
        suspicious = self._blind or (self._suspicious_since or self._told_since) is not None
        if self._blind and self._state == DONE:
            return
        fault = fault_of(
            self._rank,
            self._signs,
            {rank: now - seen for rank, seen in self._seen.items()},
            now - self._waits_since if self._waits_since is not None else 0.0,
            self._patience,
            SUSPICION if suspicious else SILENCE,
        )
        if fault is not None:
            self._end(fault)
        if self._told_since is not None and now - self._told_since > SUSPICION + GRACE / 2:
            self._end(None)  # by the user, then

    def _leave(self, problem: str = "") -> None:
        """A sign of life."""
        last = self._sign
        self._sign = Sign(last.beat + 1, self._state, self._collectives, last.host, last.process, problem)
        self._store.set(self._keys[self._rank], json.dumps(asdict(self._sign)))

    def _look(self) -> None:
        """At the signs of all ranks."""
        now = time.monotonic()
        for rank, value in enumerate(self._store.multi_get(self._keys)):
            sign = Sign(**json.loads(value))
            if rank not in self._signs or self._signs[rank].beat != sign.beat:
                self._signs[rank], self._seen[rank] = sign, now

    def _end(self, fault: Fault | None) -> NoReturn:
        """End this process. Of the ranks on one machine, the first that is well says why."""
        if fault is not None:
            well = [
                rank
                for rank, sign in self._signs.items()
                if sign.host == self._sign.host and sign.state in (RUNNING, ENDED) and rank not in fault.ranks
            ]
            if self._rank == min(well, default=self._rank):
                print(f"lookahead: {fault.problem}", file=sys.stderr, flush=True)
        self._state = ENDED
        with suppress(Exception):
            self._leave("" if fault is not None else TOLD)
        if self._rank == 0:  # the store may be this process's: the others read in it why they end, too
            time.sleep(2 * BEAT)
        os._exit(1 if fault is not None else 128 + signal.SIGTERM)
