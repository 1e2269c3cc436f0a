"""`lookahead demo`: a race of plain and lookahead decoding on the model that ships with the package."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ..config import PLAIN, LookaheadConfig
from .loading import load
from .options import lookahead_options, threads_option
from .printing import console, item

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    'def has_close_elements(numbers, threshold):\n    """Check if any two numbers are closer than the threshold."""\n',
    'class Stack:\n    """A stack with push and pop."""\n\n    def __init__(self, items=None):\n',
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
)
COLOURS = ("cyan", "yellow", "magenta", "green")
SIDE_BY_SIDE = 100
"""Columns of a terminal that has room for two texts beside each other."""


class Runner:
    """One method's way through a prompt. Its clock runs while it takes a step, and stands while the other one does."""

    def __init__(
        self,
        title: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: LookaheadConfig,
        execution: str,
        ids: Sequence[int],
        max_new_tokens: int,
    ) -> None:
        from ..hf.stream import stream

        self.title = title
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        """Text that each step gave."""
        self.seconds = 0.0
        start = perf_counter()
        self._steps: Iterator[Any] = stream(
            model, tokenizer, ids, lookahead=config, execution=execution, max_new_tokens=max_new_tokens, do_sample=False
        )
        self.seconds = perf_counter() - start
        self.ended = False

    def step(self) -> None:
        """Take one step; prefill is the first."""
        start = perf_counter()
        one = next(self._steps)
        self.seconds += perf_counter() - start
        self.tokens += one.token_ids
        self.pieces.append(one.text)
        self.ended = one.finish_reason is not None

    @property
    def steps(self) -> int:
        """Steps after prefill."""
        return max(0, len(self.pieces) - 1)

    @property
    def heading(self) -> str:
        speed = len(self.tokens) / self.seconds if self.seconds else 0.0
        done = f"{len(self.tokens)} tokens in {self.steps} steps"
        return f"{self.title}: {done}, {self.seconds:.1f} s, {speed:.0f} tokens/s"


@click.command()
@click.option(
    "-n",
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Tokens of each answer.",
)
@threads_option
@lookahead_options
def demo(max_new_tokens: int, config: LookaheadConfig, execution: str) -> None:
    """Watch pocket write Python, plain and with lookahead decoding, in float32 on the CPU.

    A race: the method whose clock is behind takes the next step, and each clock counts its own steps alone. Exit code 1
    if the two texts differ.
    """
    model, tokenizer = load("pocket", "float32", "cpu", False)
    out = console()
    item("Each colour is one step: one run of the model. Plain decoding gets one token from it.\n", out)
    for settings in (PLAIN, config):  # neither starts colder than the other
        warm = Runner("", model, tokenizer, settings, execution, tokenizer(PROMPTS[0]).input_ids, 32)
        while not warm.ended:
            warm.step()
    pairs = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        pair = [
            Runner(title, model, tokenizer, settings, execution, ids, max_new_tokens)
            for title, settings in (("plain", PLAIN), ("lookahead", config))
        ]
        _race(pair, prompt, out)
        pairs.append(pair)
    plain, ours = ([pair[i] for pair in pairs] for i in (0, 1))
    identical = all(one.tokens == other.tokens for one, other in pairs)
    for runners in (plain, ours):
        tokens, seconds = sum(len(r.tokens) for r in runners), sum(r.seconds for r in runners)
        steps = sum(r.steps for r in runners)
        each = (tokens - len(runners)) / max(1, steps)
        done = f"{tokens} tokens in {steps} steps, {each:.2f} tokens per step, {tokens / seconds:.0f} tokens/s"
        item(f"{runners[0].title}: {done}", out)
    ratio = sum(r.seconds for r in plain) / sum(r.seconds for r in ours)
    item(f"lookahead decoding was {ratio:.2f} times as fast; identical: {'yes' if identical else 'no'}", out)
    item("pocket repeats itself more than a large model, which flatters it: `lookahead doctor MODEL` tries yours", out)
    if not identical:
        raise SystemExit(1)


def _race(pair: Sequence[Runner], prompt: str, out: Console) -> None:
    """Let two runners take turns by their clocks, in sight of who watches."""
    if not out.is_terminal:
        _run(pair)
        for runner in pair:
            out.print(_text(runner, prompt), soft_wrap=True)
        return
    from rich.live import Live

    shown = perf_counter()
    with Live(console=out, auto_refresh=False, vertical_overflow="crop") as live:
        for _ in _turns(pair):
            if perf_counter() - shown > 0.05:
                live.update(_picture(pair, prompt, out), refresh=True)
                shown = perf_counter()
        live.update(_picture(pair, prompt, out), refresh=True)


def _turns(pair: Sequence[Runner]) -> Iterator[None]:
    while running := [runner for runner in pair if not runner.ended]:
        min(running, key=lambda runner: runner.seconds).step()
        yield


def _run(pair: Sequence[Runner]) -> None:
    for _ in _turns(pair):
        pass


def _picture(pair: Sequence[Runner], prompt: str, out: Console) -> RenderableType:
    """Both texts as they stand, beside each other where there is room, and otherwise one below the other."""
    from rich.console import Group
    from rich.table import Table

    beside = out.width >= SIDE_BY_SIDE
    lines = max(4, (out.height - 4) // (1 if beside else 2) - 2)
    width = out.width // 2 - 2 if beside else out.width
    texts = [_last_lines(_text(runner, prompt), lines, width) for runner in pair]
    if not beside:
        return Group(*texts)
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in texts:
        table.add_column(ratio=1)
    table.add_row(*texts)
    return table


def _text(runner: Runner, prompt: str) -> Any:
    from rich.text import Text

    text = Text(f"── {runner.heading}\n", style="bold")
    text.append(prompt, style="dim not bold")
    for number, piece in enumerate(runner.pieces):
        text.append(piece, style=f"{COLOURS[number % len(COLOURS)]} not bold")
    text.append("\n")
    return text


def _last_lines(text: Any, lines: int, width: int) -> Any:
    """The heading, and the end of a text that is too long to show whole."""
    from rich.console import Console

    wrapped = text.wrap(Console(width=width), width)
    if len(wrapped) <= lines:
        wrapped = list(wrapped) + [type(text)("")] * (lines - len(wrapped))
    else:
        wrapped = [wrapped[0], *wrapped[len(wrapped) - lines + 1 :]]
    return type(text)("\n").join(wrapped)
