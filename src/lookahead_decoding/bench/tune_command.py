"""`lookahead tune` and `lookahead doctor`: what pays here, and why something does not."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_common import DTYPES, Problem, encode, first_line, load, read_prompts, room
from ..config import COMPILE, MAX_ROWS, PLAIN

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..target import Target
    from .tune import Trial, Tuning

SAMPLES = (
    'def mean(numbers):\n    """The mean of a list of numbers."""\n',
    "Question: A train runs 60 miles in an hour. How far does it run in 3 hours?\nAnswer:",
    "Once upon a time there was a small town by the sea.",
)
"""Prompts for who gives none."""

LITTLE = 1.05
"""A speedup below this is not worth the name."""


def _prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path | None, field: str, limit: int
) -> list[list[int]]:
    texts = read_prompts(path, field, limit) if path else list(SAMPLES)[:limit]
    return [encode(model, tokenizer, text, f"prompt {i}") for i, text in enumerate(texts, 1)]


@click.command()
@click.argument("model")
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A JSONL file of your own."
)
@click.option("--field", default="prompt", show_default=True)
@click.option("--limit", type=click.IntRange(1), default=4, show_default=True, help="Prompts used.")
@click.option("--max-new-tokens", type=click.IntRange(16), default=64, show_default=True, help="Of each.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device")
@click.option("--compile", type=click.Choice(COMPILE), default="auto", show_default=True)
@click.option("--save/--no-save", default=True, show_default=True, help="Keep t(n) for later runs on this machine.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--trust-remote-code", is_flag=True)
def tune(
    model: str,
    prompts: Path | None,
    field: str,
    limit: int,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    compile: str,
    save: bool,
    json_path: Path | None,
    trust_remote_code: bool,
) -> None:
    """Measure t(n), compare the paper's fixed settings with the adaptive default, and keep t(n) for later runs.

    Expected speedups are tokens per step at the measured times of such steps, over plain decoding of the same model in
    the same dtype; `lookahead bench` measures real ones.
    """
    from rich.console import Console
    from rich.table import Table

    from .. import profile
    from ..target import Target

    target, tokenizer = load(model, dtype, device, trust_remote_code)
    ids = _prompts(target, tokenizer, prompts, field, limit)
    length = min(room(target, p, max_new_tokens) for p in ids)
    forwards, tuning, found = _measure(target, ids, length, compile, grid=True)
    machine = Target(target, 8, compile=compile).machine
    times = tuning.times()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(_steps_table(times))
    table = Table("settings", "rows", "tokens per step", "expected speedup")
    for one in sorted(found, key=lambda t: t.speedup, reverse=True):
        table.add_row(one.name, f"{one.rows_per_step:.1f}", f"{one.mean_acceptance_length:.2f}", f"{one.speedup:.2f}x")
    console.print(table)
    *fixed, adaptive = found
    best = max(fixed, key=lambda t: t.speedup)
    console.print(f"best fixed W,N,G: {best.name}, {best.speedup:.2f}x; the adaptive default: {adaptive.speedup:.2f}x")
    if save:
        console.print(f"saved for this model, dtype, device and versions: {profile.save(machine, times)}")
    if json_path is not None:
        content = {
            "command": shlex.join(["lookahead", *sys.argv[1:]]),
            "machine": vars(machine),
            "seconds": times,
            "forward_seconds": forwards,
            "settings": [_trial(t) for t in found],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def _trial(trial: Trial) -> dict[str, Any]:
    from .methods import of_steps
    from .result import added

    return {
        "settings": trial.name,
        "mean_acceptance_length": round(trial.mean_acceptance_length, 3),
        "rows_per_step": round(trial.rows_per_step, 2),
        "expected_speedup": round(trial.speedup, 3),
        "sources": added(of_steps(s)["sources"] for s in trial.stats),
    }


def _steps_table(times: Sequence[tuple[int, float]]) -> Table:
    from rich.table import Table

    table = Table("rows", *(str(n) for n, _ in times if n <= MAX_ROWS))
    shown = [t for n, t in times if n <= MAX_ROWS]
    table.add_row("step, ms", *(f"{1e3 * t:.1f}" for t in shown))
    table.add_row("t(n) / t(1)", *(f"{t / shown[0]:.2f}" for t in shown))
    return table


def _measure(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], length: int, compile: str, grid: bool
) -> tuple[list[tuple[int, float]], Tuning, list[Trial]]:
    from rich.console import Console
    from rich.progress import Progress

    from .tune import GRID, TUNED, Tuning, forward_times, run, trials

    settings = GRID if grid else ()
    found = []
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("time of a step", total=9)
        try:
            for forwards in forward_times(model, TUNED, compile):  # noqa: B007  # the last is the best
                progress.advance(task)
            task = progress.add_task("acceptance", total=len(settings) + 2)
            tuning = Tuning(forwards, run(model, prompts, PLAIN, length, compile))
            for trial in trials(tuning, model, prompts, length, compile, settings):
                found.append(trial)
                progress.advance(task)
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
    return forwards, tuning, found


@click.command()
@click.argument("model")
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A JSONL file of your own."
)
@click.option("--field", default="prompt", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--device")
@click.option("--compile", type=click.Choice(COMPILE), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True)
@click.option("--trust-remote-code", is_flag=True)
def doctor(
    model: str,
    prompts: Path | None,
    field: str,
    dtype: str,
    device: str | None,
    compile: str,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Will it pay here, and if not, why: step cost, acceptance by source on a short sample, and what to change."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from .. import profile
    from ..target import Target
    from .methods import of_steps
    from .result import added

    target, tokenizer = load(model, dtype, device, trust_remote_code)
    ids = _prompts(target, tokenizer, prompts, field, 3)
    length = min(room(target, p, 64) for p in ids)
    _, tuning, found = _measure(target, ids, length, compile, grid=False)
    times = dict(tuning.times())
    adaptive = found[-1]
    place = Target(target, 8, compile=compile)
    sources = added(of_steps(s)["sources"] for s in adaptive.stats)
    facts: dict[str, Any] = {
        "device": profile.device_name(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "steps_run": {"off": "as the model is", "packed": "packed weights", "graphs": "captured", "full": "compiled"}[
            place.how
        ],
        "candidates": place.strategy.name,
        "attention": _attention(place),
        "profile": "saved by `lookahead tune`"
        if profile.load(place.machine)
        else "none: times come from the first steps",
        "step_ms": round(1e3 * times[1], 2),
        "t8_over_t1": round(times[8] / times[1], 2),
        "t32_over_t1": round(times[32] / times[1], 2),
        "mean_acceptance_length": round(adaptive.mean_acceptance_length, 2),
        "rows_per_step": round(adaptive.rows_per_step, 1),
        "plain_share": round(adaptive.plain_share, 2),
        "expected_speedup": round(adaptive.speedup, 2),
    }
    advice = advise(target, place, times, adaptive)
    if as_json:
        print(json.dumps(facts | {"sources": sources, "advice": advice}))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), str(value))
    for name, count in sources.items():
        share = count["accepted"] / count["proposed"] if count["proposed"] else 0.0
        table.add_row(
            f"drafts from {name}", f"{count['accepted']:.0f} of {count['proposed']:.0f} accepted ({share:.0%})"
        )
    console.print(table)
    console.print(verdict(adaptive.speedup))
    for line in advice:
        console.print(f"* {line}")


def verdict(speedup: float) -> str:
    """Whether it pays, in a sentence."""
    if speedup >= LITTLE:
        return f"It pays here: about {speedup:.2f} times plain decoding on the sample."
    return f"It hardly pays here: about {speedup:.2f} times plain decoding on the sample; longer texts are then plain."


def _attention(target: Target) -> str:
    from ..evaluate import OURS
    from ..trees import kernel_found

    if target.attention != OURS:
        return f"the model's own ({target.attention})"
    if target.model.device.type == "cuda" and kernel_found():
        return "ours, in Triton"
    return "ours, in PyTorch"


def advise(model: PreTrainedModel, target: Target, times: dict[int, float], adaptive: Trial) -> list[str]:
    """What could be changed, most useful first."""
    import torch

    from ..packed import copied_bytes, why_not
    from .step import limits

    advice = []
    cost = times[8] / times[1]
    if model.device.type == "cpu" and model.dtype == torch.float32 and cost > 1.3:
        advice.append(
            f"8 rows take {cost:.1f} times as long as one in float32: try --dtype bfloat16, where rows are cheaper on "
            "processors that have instructions for it"
        )
    elif cost > 1.3:
        advice.append(
            f"8 rows take {cost:.1f} times as long as one: this device has little idle arithmetic, so trees stay small"
        )
    if target.how == "off" and not why_not(model):
        size = copied_bytes(model) / 2**30
        advice.append(f"--compile packed makes a step faster; its second copy of the weights takes {size:.1f} GiB")
    if model.device.type == "cpu" and target.how in ("off", "packed") and target.strategy.name == "tree":
        outside = times[1] - limits(model).milliseconds(1) / 1e3
        if outside > 0.5 * times[1]:
            advice.append(
                "more than half of a step is not arithmetic: --compile full helps, at the price of minutes per process"
            )
    if adaptive.mean_acceptance_length < 1.2:
        advice.append(
            "few drafts are accepted on the sample: try --prompts with texts like yours; text that never repeats a "
            "phrase, and high temperatures, gain little"
        )
    if target.strategy.drawback:
        advice.append(f"{target.strategy.drawback}, because: {'; '.join(dict.fromkeys(target.strategy.reasons))}")
    return advice
