"""`lookahead generate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..config import LookaheadConfig
from ..ranks.torchrun import speaks
from .answers import Answer, answer, batches, releases
from .loading import Problem, Prompt, encode, first_line, load, read_prompts, sampling
from .options import (
    dtype_option,
    lookahead_options,
    model_options,
    plain_option,
    sampling_options,
    shared_options,
    with_ranks,
)
from .printing import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..draft.shared import Namespace
    from ..ranks.group import Ranks


@click.command()
@model_options
@click.option("-p", "--prompt", help="One prompt. Standard input if neither this nor --prompts is given.")
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A JSONL file of prompts."
)
@click.option(
    "--field", default="prompt", show_default=True, help="Field of --prompts that holds the text, or messages."
)
@click.option("--chat", is_flag=True, help="Put prompts into the model's chat template, as its makers meant.")
@click.option("--system", help="A system message before each prompt; means --chat.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Prompts answered at once.")
@click.option("--stop", multiple=True, help="Text that ends the answer, which it is part of; may be repeated.")
@dtype_option
@sampling_options()
@lookahead_options
@shared_options
@plain_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt, and nothing else.")
@with_ranks
def generate(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompt: str | None,
    prompts: Path | None,
    field: str,
    chat: bool,
    system: str | None,
    batch_size: int,
    stop: tuple[str, ...],
    dtype: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    execution: str,
    shared: Namespace | None,
    as_json: bool,
    ranks: Ranks | None,
) -> None:
    """Continue one prompt, or every prompt of a file.

    Started with torchrun, all ranks share every step, and the first one prints.
    """
    options = sampling(temperature, top_k, top_p)
    if "" in stop:
        raise Problem("--stop needs a text, got an empty one")
    asked = _asked(prompt, prompts, field, ranks)
    if chat or system is not None:
        asked = [one.in_chat(system) for one in asked]
    target, tokenizer = load(model, dtype, device, trust_remote_code, ranks)
    from rich.console import Console
    from rich.progress import Progress

    from ..hf.generate import LookaheadDecoding

    encoded = [
        encode(target, tokenizer, one, f"prompt {i}" if prompts else "the prompt") for i, one in enumerate(asked, 1)
    ]
    if stop:
        options["stop_strings"] = list(stop)
    watching = sys.stderr.isatty() and len(encoded) > 1 and speaks()
    bare = 0
    release = releases(target, execution, ranks)
    with Progress(console=Console(stderr=True), disable=not watching) as progress:
        task = progress.add_task("prompts", total=len(encoded))
        first = 0
        for batch, length in batches(target, encoded, batch_size, max_new_tokens):
            seeds = [seed + first + i for i in range(len(batch))]
            printer = _Printer(tokenizer, enabled=not as_json and len(encoded) == 1 and speaks())
            try:
                decoding = LookaheadDecoding(
                    config,
                    tokenizer=tokenizer,
                    seeds=seeds,
                    shared=shared,
                    execution=execution,
                    release=release,
                    parallel=ranks,
                )
                answers = answer(
                    target,
                    tokenizer,
                    batch,
                    asked[first : first + len(batch)],
                    decoding,
                    options | {"max_new_tokens": length},
                    printer.step,
                    first,
                )
            except (TypeError, ValueError) as error:
                raise Problem(first_line(error)) from error
            progress.advance(task, len(batch))
            for one in answers:
                bare += isinstance(one.prompt, str) and not one.text.strip() and one.finish_reason == "stop"
                _show(one, printer, as_json, len(encoded))
            first += len(batch)
    if bare and tokenizer.chat_template:
        say(f"{model} ends {bare} of {len(encoded)} answers at once: it is made for a chat template, try --chat")


def _asked(prompt: str | None, prompts: Path | None, field: str, ranks: Ranks | None) -> list[Prompt]:
    """What was asked on the command line, in a file, or on standard input."""
    if prompt is not None and prompts is not None:
        raise Problem("--prompt and --prompts exclude each other: give one of them")
    if prompts is not None:
        return read_prompts(prompts, field)
    if prompt is None:
        prompt = _standard_input() if ranks is None or ranks.first else ""
        prompt = prompt if ranks is None else ranks.spoken(prompt)
    return [Prompt(prompt)]


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise Problem("no prompt: give one with -p, a file of them with --prompts, or text on standard input")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem("standard input is not UTF-8") from error


def _show(one: Answer, printer: _Printer, as_json: bool, answers: int) -> None:
    if as_json:
        plain = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
        print(json.dumps(vars(one), ensure_ascii=plain), flush=True)
    elif printer.enabled:
        printer.end(one)
    else:
        print(f"── {one.index + 1} of {answers}\n{one.text}\n", flush=True)


class _Printer:
    """Shows one answer while it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enabled: bool) -> None:
        from ..hf.stream import Detokenizer

        self.enabled = enabled
        self._detokenizer = Detokenizer(tokenizer)

    def step(self, tokens: tuple[int, ...]) -> None:
        if self.enabled:
            print(self._detokenizer.add(tokens), end="", flush=True)

    def end(self, one: Answer) -> None:
        print(self._detokenizer.add((), last=True), flush=True)
        if sys.stderr.isatty():
            line = f"{one.tokens} tokens in {one.steps} steps, {one.tokens_per_second:.1f} tokens/s"
            print(f"[{line}, {one.finish_reason}]", file=sys.stderr)
