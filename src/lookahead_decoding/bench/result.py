"""What a benchmark measured: one type that is printed, written and drawn."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
import transformers

LOOP = 0.5
"""A text of which at most this share of 8-grams is distinct is a loop: it flatters every speculative method."""

SHORT = 32
"""A text of fewer tokens is too short to tell, and is listed with the loops; in a batch, on average."""


def distinct_share(ids: Sequence[int], n: int = 8) -> float:
    """Share of distinct n-grams among all n-grams of a text; 1.0 for one too short to have any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def added(counts: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Counts by source and name, added up."""
    total: dict[str, dict[str, float]] = {}
    for one in counts:
        for source, count in one.items():
            into = total.setdefault(source, dict.fromkeys(count, 0))
            for name, value in count.items():
                into[name] = round(into[name] + value, 1)
    return total


@dataclass(frozen=True)
class Row:
    """One method on one prompt, or on one batch of prompts.

    Attributes:
        prompt: its number in the file, from 0, or the batch's.
        method: name, with its dtype behind an `@`.
        plain: whether the method is plain decoding, and so a baseline.
        tokens: tokens emitted, of all sequences.
        seconds: of each repetition, prefill included.
        mean_acceptance_length: tokens per step; None for methods that do not say.
        distinct_8_grams: share of distinct 8-grams of the plain text; of a batch, the smallest.
        agrees: whether the tokens are those of the run's first method of the same dtype.
        sequences: of the batch.
        rows_per_step: nodes fed per step, all sequences and padding included; None for methods that do not say.
        plain_share: share of steps that fed the current tokens alone.
        sources: drafts by source: proposed, accepted, rows (see `SourceCount`).
        ranks: that shared the steps, their rows, bytes and collectives per step, and the share of a step that
            communication takes; empty for a single device.
    """

    prompt: int
    method: str
    plain: bool
    tokens: int
    seconds: tuple[float, ...]
    mean_acceptance_length: float | None
    distinct_8_grams: float
    agrees: bool
    sequences: int = 1
    rows_per_step: float | None = None
    plain_share: float | None = None
    sources: dict[str, dict[str, float]] = field(default_factory=dict)
    ranks: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """At the median of the repetitions."""
        return self.tokens / median(self.seconds)


@dataclass(frozen=True)
class About:
    """Where and on what a benchmark ran."""

    command: str
    model: str
    prompts: str
    mode: str
    execution: str
    device: str
    threads: int
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    python: str = platform.python_version()


@dataclass
class Result:
    """All rows of a run, and what follows from them.

    Attributes:
        short: texts of fewer tokens are too short to tell: SHORT, or where answers are cut before that, their limit.
        left_out: methods that do not run here, with the reason.
        interrupted: before all prompts were measured.
    """

    about: About
    rows: list[Row] = field(default_factory=list)
    short: int = SHORT
    left_out: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def methods(self) -> list[str]:
        """Names in the order they ran."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def of(self, method: str, looping: bool = False) -> list[Row]:
        """A method's rows on prompts whose text loops, or does not."""
        loops = {
            row.prompt for row in self.rows if row.distinct_8_grams <= LOOP or row.tokens < self.short * row.sequences
        }
        return [row for row in self.rows if row.method == method and (row.prompt in loops) == looping]

    def speed(self, method: str, looping: bool = False) -> float:
        """Median over the prompts of tokens per second."""
        rows = self.of(method, looping)
        return median(row.tokens_per_second for row in rows) if rows else 0.0

    @property
    def best_plain(self) -> str | None:
        """The fastest plain method, of any dtype."""
        plain = list(dict.fromkeys(row.method for row in self.rows if row.plain))
        return max(plain, key=lambda method: (self.speed(method), self.speed(method, looping=True)), default=None)

    def ratio(self, method: str, to: str, looping: bool = False) -> tuple[float, float, float] | None:
        """Median, lower and upper quartile over the prompts of the speed of one method over another's."""
        others = {row.prompt: row.tokens_per_second for row in self.of(to, looping)}
        ratios = [r.tokens_per_second / others[r.prompt] for r in self.of(method, looping) if r.prompt in others]
        if not ratios:
            return None
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else (ratios[0],) * 3
        return middle, low, high

    def summary(self) -> list[dict[str, object]]:
        """A line per method: the table, and the first part of the file."""
        best = self.best_plain
        lines: list[dict[str, object]] = []
        for looping in (False, True):
            for method in self.methods:
                rows = self.of(method, looping)
                if not rows:
                    continue
                lengths = [r.mean_acceptance_length for r in rows if r.mean_acceptance_length is not None]
                line: dict[str, object] = {"method": method, "looping": looping, "prompts": len(rows)}
                line["tokens_per_second"] = round(self.speed(method, looping), 2)
                line["mean_acceptance_length"] = round(sum(lengths) / len(lengths), 3) if lengths else None
                for name in ("rows_per_step", "plain_share"):
                    found = [v for row in rows if (v := getattr(row, name)) is not None]
                    line[name] = round(sum(found) / len(found), 3) if found else None
                line["sources"] = added(row.sources for row in rows)
                shared = [row.ranks for row in rows if row.ranks]
                line["ranks"] = {
                    name: round(mean(one[name] for one in shared), 4) for name in (shared[0] if shared else ())
                }
                for name, to in (("over_best_plain", best), ("over_hf_greedy", self._like(method, "hf-greedy"))):
                    ratio = self.ratio(method, to, looping) if to else None
                    line[name] = [round(x, 3) for x in ratio] if ratio else None
                line["agrees"] = f"{sum(r.agrees for r in rows)}/{len(rows)}"
                lines.append(line)
        return lines

    def _like(self, method: str, name: str) -> str | None:
        """A method of that name in the same dtype, or in any."""
        same = f"{name}@{method.rpartition('@')[2]}"
        found = [m for m in self.methods if m.startswith(f"{name}@")]
        return same if same in found else found[0] if found else None

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "about": asdict(self.about),
            "best_plain": self.best_plain,
            "summary": self.summary(),
        }
        content |= {
            "left_out": self.left_out,
            "interrupted": self.interrupted,
            "rows": [asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def plot(self, path: Path) -> None:
        """Draw tokens per second of every method; needs matplotlib.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 0.6 * len(self.methods) + 1.5))
        values = [[row.tokens_per_second for row in self.of(m)] for m in self.methods]
        axes.boxplot(values, orientation="horizontal", tick_labels=self.methods)
        axes.set_xlabel("tokens per second, prompts that do not loop")
        axes.set_xlim(left=0)
        axes.set_title(f"{self.about.model}, {self.about.mode}, {self.about.device}")
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
