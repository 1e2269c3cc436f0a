"""Tables that are readable in a terminal of any width."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, TextIO

from ..ranks.torchrun import speaks

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

ENOUGH = 4
"""Columns that a table should have, the names of its rows among them."""

UNKNOWN_WIDTH = 100
"""Columns where the output goes to a file, and nobody knows how wide it will be shown."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its heading, short.
        meaning: what it says, where the heading does not; printed below the table.
        cells: of every row; empty ones have nothing to say.
    """

    name: str
    cells: Sequence[str]
    meaning: str = ""

    @property
    def width(self) -> int:
        return max(len(self.name), *map(len, self.cells))


def console(stderr: bool = False) -> Console:
    """Where tables go; without colours for numbers."""
    from rich.console import Console

    known = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(highlight=False, stderr=stderr, width=None if known else UNKNOWN_WIDTH)


def say(message: str) -> None:
    """One line beside the answers; of several ranks, the first one's."""
    if speaks():
        print(in_width(f"lookahead: {message}", sys.stderr), file=sys.stderr)


def in_width(text: str, to: TextIO) -> str:
    """A text whose lines break between words where they go to a terminal, and stay as they are elsewhere.

    A word that is wider than the terminal, such as a path, stays whole.
    """
    if not to.isatty():
        return text
    width = get_terminal_size().columns
    return "\n".join(fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())


def command_line(words: Sequence[str], width: int) -> str:
    """A command of a shell, over several lines where it is wider than a terminal."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines[-1] += " \\"
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def progress() -> Progress:
    """What shows that something goes on, on a terminal; everything over two seconds wants one."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), disable=not sys.stderr.isatty() or not speaks(), transient=True)


def item(text: str, to: Console) -> None:
    """Print an item of a list, whose further lines are set in."""
    to.print(fill(text, to.width, subsequent_indent="  ", break_long_words=False), markup=False)


def _that_fit(columns: Sequence[Column], width: int) -> list[Column]:
    """The first columns, as many as fit beside each other."""
    ends = accumulate(column.width + 2 for column in columns)
    return [column for column, end in zip(columns, ends, strict=True) if end - 2 <= width]


def show(columns: Sequence[Column], to: Console) -> None:
    """Print as many columns as fit, the first ones first, and below what their headings mean.

    Columns without a cell that says something are left out. Where fewer than `ENOUGH` fit, the rows are numbered, and
    their names stand below. Columns that do not fit are named, so that nobody misses them unknowingly.
    """
    names, *others = [column for column in columns if any(column.cells)]
    shown = _that_fit([names, *others], to.width)
    numbered = len(shown) < min(ENOUGH, 1 + len(others))
    if numbered:
        numbers = Column("", [str(number) for number in range(1, len(names.cells) + 1)])
        shown = _that_fit([numbers, *others], to.width)
    for row in range(-1, len(shown[0].cells)):
        cells = [column.name if row < 0 else column.cells[row] for column in shown]
        line = [
            cell.ljust(c.width) if c is shown[0] else cell.rjust(c.width) for c, cell in zip(shown, cells, strict=True)
        ]
        to.print("  ".join(line).rstrip(), style="bold" if row < 0 else "", markup=False, soft_wrap=True)
    explained = [f"{column.name}: {column.meaning}" for column in shown if column.meaning]
    if numbered:
        explained = [f"{number}: {name}" for number, name in enumerate(names.cells, 1)] + explained
    hidden = [column.name for column in others if column not in shown]
    if hidden:
        explained.append(f"a wider terminal also shows: {', '.join(hidden)}")
    if explained:
        to.print()
        for words in explained:
            to.print(words, style="dim", markup=False)
    to.print()
