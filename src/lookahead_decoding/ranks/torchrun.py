"""What torchrun tells a process that it starts; read without importing torch."""

from __future__ import annotations

import os

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torchrun sets."""

PATIENCE = 600.0
"""Seconds that a rank waits for another one which is alive, such as one whose prompt takes longer."""

START = "start the program with torchrun --nproc-per-node RANKS"


def started() -> bool:
    """Whether this process is one of several that torchrun started, or the only one."""
    return all(name in os.environ for name in VARIABLES)


def speaks() -> bool:
    """Whether this process is the one that speaks to the user."""
    return not started() or os.environ["RANK"] == "0"
