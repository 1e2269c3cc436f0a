"""Ranks for tests: processes of this machine that talk through gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import lookahead_decoding as ld

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["torch", "transformers.models.llama", "lookahead_decoding"])


def start(size: int, function: Callable[..., Any], *args: Any, **options: Any) -> tuple[list[BaseProcess], Any]:
    """Start ranks that call `function(ranks, *args)`, and give their processes and a queue of (rank, result)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    results = START.SimpleQueue()
    processes = [
        START.Process(target=_rank, args=(rank, size, port, results, function, args, options)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run(size: int, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
    """What `function(ranks, *args)` gives on every rank.

    Args:
        options: of `ld.parallel`.
    """
    processes, results = start(size, function, *args, **options)
    found: dict[int, Any] = {}
    while len(found) < size and (any(process.is_alive() for process in processes) or not results.empty()):
        if results.empty():
            time.sleep(0.02)
            continue
        rank, result = results.get()
        found[rank] = result
    for process in processes:
        process.join(60)
    failed = [result for result in found.values() if isinstance(result, Failure)]
    assert not failed, failed[0].text
    assert [process.exitcode for process in processes] == [0] * size
    return [found[rank] for rank in range(size)]


class Failure:
    """An error of a rank."""

    def __init__(self, text: str) -> None:
        self.text = text


def _rank(
    rank: int, size: int, port: int, results: Any, function: Callable[..., Any], args: Any, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    errors = options.pop("errors", None)
    if errors is not None:
        sys.stderr = (Path(errors) / f"{rank}.txt").open("w", buffering=1)
    try:
        with ld.parallel(device="cpu", **options) as ranks:
            result = function(ranks, *args)
        results.put((rank, result))
    except Exception:
        results.put((rank, Failure(traceback.format_exc())))
        raise
