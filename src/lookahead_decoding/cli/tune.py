"""`lookahead tune`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import MAX_ROWS, PLAIN
from .loading import Problem, encode, first_line, load, read_prompts, room, samples
from .options import dtype_option, execution_option, model_options, prompt_options
from .printing import Column, console, progress, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..bench.tune import Trial, Tuning


@click.command()
@model_options
@prompt_options(many=4)
@click.option(
    "-n",
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(16),
    default=64,
    show_default=True,
    help="Of each answer.",
)
@dtype_option
@execution_option
@click.option("--save/--no-save", default=True, show_default=True, help="Keep t(n) for later runs on this machine.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="A file for the figures.")
def tune(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompts: Path | None,
    field: str,
    limit: int,
    max_new_tokens: int,
    dtype: str,
    execution: str,
    save: bool,
    json_path: Path | None,
) -> None:
    """Measure t(n), compare the paper's fixed settings with the adaptive default, and keep t(n) for later runs.

    t(n) is the time of a step that feeds n tokens to the model. Expected speedups are tokens per step at the measured
    times of such steps, over plain decoding of the same model in the same dtype; `lookahead bench` measures real ones.
    """
    asked = read_prompts(prompts, field, limit) if prompts else []
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    from ..bench.methods import of_steps
    from ..bench.result import added
    from ..bench.tune import GRID
    from ..model.target import Target
    from ..saved import profile

    ids = [encode(target, tokenizer, one, f"prompt {i}") for i, one in enumerate(asked or samples(tokenizer, limit), 1)]
    length = min(room(target, p, max_new_tokens) for p in ids)
    forwards, tuning, found = measured(target, ids, length, execution, GRID)
    machine = Target(target, 8, execution=execution).machine
    times = tuning.times()
    out = console()
    shown = [(n, seconds) for n, seconds in times if n <= MAX_ROWS]
    show(
        [
            Column("rows", [str(n) for n, _ in shown], "tokens that a step feeds to the model"),
            Column("ms", [f"{1e3 * seconds:.1f}" for _, seconds in shown], "of a step"),
            Column("t(n)/t(1)", [f"{seconds / shown[0][1]:.2f}" for _, seconds in shown], "in steps of one row"),
        ],
        out,
    )
    ordered = sorted(found, key=lambda t: t.speedup, reverse=True)
    show(
        [
            Column("settings", [one.name for one in ordered], "W,N,G of the paper's algorithm, or ours"),
            Column("speedup", [f"{one.speedup:.2f}x" for one in ordered], "expected, over plain decoding"),
            Column("per step", [f"{one.mean_acceptance_length:.2f}" for one in ordered], "tokens that a step gives"),
            Column("rows", [f"{one.rows_per_step:.1f}" for one in ordered]),
        ],
        out,
    )
    *fixed, adaptive = found
    best = max(fixed, key=lambda t: t.speedup)
    out.print(f"best fixed W,N,G: {best.name}, {best.speedup:.2f}x; the adaptive default: {adaptive.speedup:.2f}x")
    if save:
        out.print(f"saved for this model, dtype, device and versions: {profile.save(machine, times)}")
    if json_path is not None:
        content = {
            "command": shlex.join(["lookahead", *sys.argv[1:]]),
            "machine": vars(machine),
            "seconds": times,
            "forward_seconds": forwards,
            "settings": [
                {
                    "settings": trial.name,
                    "mean_acceptance_length": round(trial.mean_acceptance_length, 3),
                    "rows_per_step": round(trial.rows_per_step, 2),
                    "expected_speedup": round(trial.speedup, 3),
                    "sources": added(of_steps(s)["sources"] for s in trial.stats),
                }
                for trial in found
            ],
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def measured(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    length: int,
    execution: str,
    grid: Sequence[tuple[int, int, int]],
) -> tuple[list[tuple[int, float]], Tuning, list[Trial]]:
    """The seconds of forwards by rows, t(n), and what settings bring: those of a grid, and the adaptive default."""
    from ..bench.tune import TUNED, Tuning, forward_times, run, trials

    found: list[Any] = []
    with progress() as bar:
        task = bar.add_task("time of a step", total=9)
        try:
            for forwards in forward_times(model, TUNED, execution):  # noqa: B007  # the last is the best
                bar.advance(task)
            task = bar.add_task("acceptance", total=len(grid) + 2)
            tuning = Tuning(forwards, run(model, prompts, PLAIN, length, execution))
            bar.advance(task)
            for trial in trials(tuning, model, prompts, length, execution, grid):
                found.append(trial)
                bar.advance(task)
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
    return forwards, tuning, found
