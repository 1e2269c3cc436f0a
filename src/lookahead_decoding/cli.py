"""The command line: `lookahead generate | chat | verify | demo | bench | tune | doctor`."""

from __future__ import annotations

import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .bench.command import bench
from .bench.tune_command import doctor, tune
from .cli_common import (
    DTYPES,
    Problem,
    config_of,
    encode,
    first_line,
    keep_threads,
    load,
    read_prompts,
    room,
    sampling,
    shared_text,
    with_ranks,
)
from .config import COMPILE, MAX_ROWS, PLAIN, SOURCES, LookaheadConfig, LookaheadWarning
from .torchrun import speaks, started

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .hf import LookaheadDecoding, Run
    from .ranks import Ranks
    from .shared import Namespace

DEMO_PROMPTS = (
    'def has_close_elements(numbers, threshold):\n    """Check if any two numbers are closer than the threshold."""\n',
    'class Stack:\n    """A stack with push and pop."""\n\n    def __init__(self, items=None):\n',
    "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
)
WITH_RANKS = ("generate", "verify", "bench")
"""Commands that torchrun may start."""

STEP_COLOURS = ("cyan", "yellow", "magenta", "green")


@dataclass(frozen=True)
class Answer:
    """One prompt's result, as `--json` prints it; rows, sources and times are those of its batch."""

    output_ids: list[int]
    text: str
    prompt_tokens: int
    tokens: int
    steps: int
    mean_acceptance_length: float
    rows_per_step: float
    plain_share: float
    sources: dict[str, dict[str, float]]
    seconds: float
    tokens_per_second: float
    finish_reason: str


def batches(
    model: PreTrainedModel, prompts: Sequence[list[int]], size: int, max_new_tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Prompts in order, at most `size` at a time, with the new tokens that each of a batch has room for."""
    for length, group in groupby(prompts, lambda prompt: room(model, prompt, max_new_tokens)):
        same = list(group)
        for first in range(0, len(same), size):
            yield same[first : first + size], length


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    decoding: LookaheadDecoding,
    options: dict[str, Any],
    on_step: Callable[[tuple[int, ...]], None] = lambda tokens: None,
) -> list[Answer]:
    """Generate for a batch of prompts, counting each one's own steps."""
    import torch

    from .bench.methods import of_steps
    from .hf import call_generate
    from .text import decode_text

    longest = max(map(len, prompts))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[*[fill] * (longest - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], device=model.device)
    start = perf_counter()
    run: Run = call_generate(model, decoding, decoding.prepare, inputs=ids, attention_mask=mask, **options)
    outputs: list[list[int]] = [[] for _ in prompts]
    forwards = [0] * len(prompts)
    for choices in run.steps():
        for b, choice in enumerate(choices):
            if choice is not None:
                outputs[b] += choice.tokens
                forwards[b] += 1
        if choices[0] is not None:
            on_step(choices[0].tokens)
    seconds = perf_counter() - start
    return [
        Answer(
            output_ids=output,
            text=decode_text(tokenizer, output),
            prompt_tokens=len(prompt),
            tokens=len(output),
            steps=count - 1,
            mean_acceptance_length=round((len(output) - 1) / (count - 1), 4) if count > 1 else 1.0,
            **of_steps(run.stats),
            seconds=round(seconds, 4),
            tokens_per_second=round(len(output) / seconds, 2),
            finish_reason=reason,
        )
        for prompt, output, count, reason in zip(prompts, outputs, forwards, run.finish_reasons, strict=True)
    ]


def _model_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.argument("model"),
        click.option("--device", help="Such as cpu or cuda:0. Default: the first GPU if there is one."),
        click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model."),
        click.option(
            "--threads", type=click.IntRange(1), expose_value=False, callback=keep_threads, help="Of the processor."
        ),
    ):
        command = option(command)
    return command


def _lookahead_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of lookahead decoding, which the command gets as `config`, and `compile`."""

    @functools.wraps(command)
    def configured(
        window_size: int | None,
        ngram_size: int | None,
        verification_set_size: int | None,
        sources: str | None,
        max_rows: int | None,
        paper: bool,
        reproducible: bool,
        **rest: Any,
    ) -> None:
        sizes = (window_size, ngram_size, verification_set_size)
        command(config=config_of(sizes, sources, max_rows, paper, reproducible), **rest)

    wrapped: Callable[..., None] = configured
    for option in (
        click.option("-W", "--window-size", type=int, help="Of the window. Default: what pays, which may be none."),
        click.option("-N", "--ngram-size", type=int, help="Of the window's n-grams."),
        click.option("-G", "--verification-set-size", type=int, help="N-grams kept per first token."),
        click.option("--sources", help=f"Separated by commas. Default: {','.join(SOURCES)}."),
        click.option("--max-rows", type=int, help=f"Rows of a step at most.  [default: {MAX_ROWS}]"),
        click.option(
            "--paper", is_flag=True, help="The paper's algorithm with a fixed W, N, G (15, 5, 15), no prices."
        ),
        click.option(
            "--reproducible", is_flag=True, help="The same text in every run, in bfloat16 too: no clock decides."
        ),
        click.option(
            "--compile",
            type=click.Choice(COMPILE),
            default="auto",
            show_default=True,
            help="How a step runs; packed holds the weights twice, full compiles it, which takes minutes on a CPU.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a shared pool, which the command gets as `shared`; the file is written when the command ends."""

    @functools.wraps(command)
    def opened(shared_pool: Path | None, namespace: str | None, **rest: Any) -> None:
        with shared_text(shared_pool, namespace) as shared:
            command(shared=shared, **rest)

    wrapped: Callable[..., None] = opened
    for option in (
        click.option(
            "--shared-pool",
            type=click.Path(dir_okay=False, path_type=Path),
            help="A file with text of earlier requests, where candidates come from as well; answers are added to it.",
        ),
        click.option("--namespace", help="The part of --shared-pool that is read and added to.  [default: default]"),
    ):
        wrapped = option(wrapped)
    return wrapped


def _sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "-n",
            "--max-new-tokens",
            "--max-tokens",
            type=click.IntRange(1),
            default=128,
            show_default=True,
            help="At most; fewer where the context ends.",
        ),
        click.option(
            "--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0 is greedy."
        ),
        click.option("--top-k", type=click.IntRange(0), help="When sampling."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="When sampling."),
        click.option(
            "--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Prompt n has seed + n."
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(command: click.Context) -> None:
    """Exact lookahead decoding: the same text in fewer steps.

    MODEL is 'pocket' (a small model that ships with the package), a local folder, or a hub id.
    """
    if started() and command.invoked_subcommand not in WITH_RANKS:
        raise Problem(f"{command.invoked_subcommand} is for one process: start it without torchrun")


@cli.command()
@_model_options
@click.option("-p", "--prompt", help="One prompt. Standard input if neither this nor --prompts is given.")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A JSONL file.")
@click.option("--field", default="prompt", show_default=True, help="The field of --prompts that holds the text.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--stop", multiple=True, help="Text that ends the answer, which it is part of; may be repeated.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@_sampling_options
@_lookahead_options
@_shared_options
@click.option("--plain", is_flag=True, help="Decode plainly, for comparison.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt, and nothing else.")
@with_ranks
def generate(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompt: str | None,
    prompts: Path | None,
    field: str,
    batch_size: int,
    stop: tuple[str, ...],
    dtype: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    compile: str,
    shared: Namespace | None,
    plain: bool,
    as_json: bool,
    ranks: Ranks | None,
) -> None:
    """Continue one prompt, or every prompt of a file.

    Started with torchrun, all ranks share every step, and the first one prints.
    """
    if plain and config != LookaheadConfig():
        raise Problem("--plain guesses nothing: leave out what is set for lookahead decoding")
    config = PLAIN if plain else config
    if prompt is not None and prompts is not None:
        raise Problem("--prompt and --prompts exclude each other: give one of them")
    if prompt is None and prompts is None:
        prompt = _standard_input() if ranks is None or ranks.first else ""
        prompt = prompt if ranks is None else ranks.spoken(prompt)
    texts = read_prompts(prompts, field) if prompts else [prompt or ""]
    target, tokenizer = load(model, dtype, device, trust_remote_code, ranks)
    from rich.console import Console
    from rich.progress import Progress

    from .hf import LookaheadDecoding

    encoded = [
        encode(target, tokenizer, text, f"prompt {i}" if prompts else "the prompt") for i, text in enumerate(texts, 1)
    ]
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise Problem("--top-k and --top-p are for sampling: give a --temperature as well")
    options = sampling(temperature, top_k, top_p)
    if "" in stop:
        raise Problem("--stop needs a text, got an empty one")
    if stop:
        options["stop_strings"] = list(stop)
    watching = sys.stderr.isatty() and len(encoded) > 1 and speaks()
    with Progress(console=Console(stderr=True), disable=not watching) as progress:
        task = progress.add_task("prompts", total=len(encoded))
        first = 0
        for batch, length in batches(target, encoded, batch_size, max_new_tokens):
            seeds = [seed + first + i for i in range(len(batch))]
            printer = _Printer(tokenizer, enabled=not as_json and len(encoded) == 1 and speaks())
            try:
                decoding = LookaheadDecoding(
                    config, tokenizer=tokenizer, seeds=seeds, shared=shared, compile=compile, parallel=ranks
                )
                answers = answer(
                    target, tokenizer, batch, decoding, {**options, "max_new_tokens": length}, printer.step
                )
            except (TypeError, ValueError) as error:
                raise Problem(first_line(error)) from error
            progress.advance(task, len(batch))
            first += len(batch)
            for text, one in zip(texts[first - len(batch) :], answers, strict=False):
                if as_json:
                    print(json.dumps(vars(one), ensure_ascii=False), flush=True)
                elif printer.enabled:
                    printer.end(one)
                else:
                    print(f"{text}{one.text}\n", flush=True)


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem("standard input is not UTF-8") from error


class _Printer:
    """Shows one answer while it comes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, enabled: bool) -> None:
        from .text import Detokenizer

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


@cli.command()
@_model_options
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@_sampling_options
@_lookahead_options
@_shared_options
def chat(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    dtype: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    compile: str,
    shared: Namespace | None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer, Ctrl-D or an empty line ends the talk.

    Uses the tokenizer's chat template; without one, the model continues the text so far.
    """
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    from .hf import context_of
    from .text import stream

    messages: list[dict[str, str]] = []
    plain_text = ""
    for line in _lines():
        messages.append({"role": "user", "content": line})
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True).input_ids
        else:
            ids = tokenizer(plain_text + line).input_ids
        context = context_of(target)
        if context is not None and len(ids) >= context:
            print(f"[the talk has {len(ids):,} tokens, and the model's context is {context:,}: starting afresh]")
            messages, plain_text = [], ""
            continue
        length = room(target, ids, max_new_tokens)
        said = ""
        try:
            options = sampling(temperature, top_k, top_p)
            options |= {"max_new_tokens": length, "compile": compile, "shared": shared}
            for step in stream(target, tokenizer, ids, lookahead=config, seed=seed, **options):
                said += step.text
                print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
        print(flush=True)
        messages.append({"role": "assistant", "content": said})
        plain_text += line + said


def _lines() -> Iterator[str]:
    """What the user says, until an empty line or the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line


@cli.command()
@_model_options
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--field", default="prompt", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts.")
@click.option("--dtype", type=click.Choice(DTYPES[1:]), default="float32", show_default=True)
@_sampling_options
@_lookahead_options
@with_ranks
def verify(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompts: Path,
    field: str,
    limit: int | None,
    dtype: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    compile: str,
    ranks: Ranks | None,
) -> None:
    """Compare with plain decoding, token by token, prompt by prompt.

    Prints how many outputs are identical to `model.generate`, and each first divergence with its margin. Exit code 1
    where one is a bug by the contract in docs/exactness.md.
    """
    texts = read_prompts(prompts, field, limit)
    target, tokenizer = load(model, dtype, device, trust_remote_code, ranks)
    import torch
    from rich.console import Console
    from rich.progress import track

    from .exactness import compare
    from .hf import LookaheadDecoding

    encoded = [encode(target, tokenizer, text, f"prompt {i}") for i, text in enumerate(texts, 1)]
    divergences = []
    console = Console(stderr=True, quiet=not speaks())
    for i, ids in enumerate(track(encoded, "verifying", console=console, disable=not sys.stderr.isatty()), 1):
        options = sampling(temperature, top_k, top_p) | {"max_new_tokens": room(target, ids, max_new_tokens)}
        decoding = LookaheadDecoding(config, compile=compile, parallel=ranks)
        try:
            found = compare(target, torch.tensor([ids], device=target.device), decoding, seed + i - 1, **options)
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
        if found is not None:
            divergences.append(found)
            verdict = "near-tie" if found.near_tie else "BUG"
            print(
                f"prompt {i}: differs after {found.position} tokens, margin {found.margin:.2e} "
                f"(bound {found.bound:.2e}): {verdict}"
            )
    print(f"identical {len(encoded) - len(divergences)}/{len(encoded)} in {dtype}")
    if not all(d.near_tie for d in divergences):
        raise SystemExit(1)


@cli.command()
@click.option("--max-new-tokens", type=click.IntRange(1), default=120, show_default=True)
@_lookahead_options
def demo(max_new_tokens: int, config: LookaheadConfig, compile: str) -> None:
    """Watch pocket write Python, plain and with lookahead decoding, in float32 on the CPU.

    Exit code 1 if the two texts differ.
    """
    model, tokenizer = load("pocket", "float32", "cpu", False)
    from rich.console import Console
    from rich.table import Table

    from .hf import LookaheadDecoding

    console = Console(highlight=False)
    console.print("Each colour is one step: one forward of the model. Plain decoding gives one token per step.\n")
    prompts = [tokenizer(p).input_ids for p in DEMO_PROMPTS]
    options = {"do_sample": False, "max_new_tokens": max_new_tokens}
    for warm in (PLAIN, config):
        answer(
            model, tokenizer, prompts[:1], LookaheadDecoding(warm, compile=compile), {**options, "max_new_tokens": 16}
        )
    totals = {"plain": [0, 0, 0.0], "lookahead": [0, 0, 0.0]}
    identical = True
    for prompt, ids in zip(DEMO_PROMPTS, prompts, strict=True):
        outputs = []
        for name, settings in (("plain", PLAIN), ("lookahead", config)):
            painter = _Painter(console, tokenizer, name)
            painter.begin(prompt)
            (one,) = answer(
                model, tokenizer, [ids], LookaheadDecoding(settings, compile=compile), options, painter.step
            )
            painter.end()
            outputs.append(one.output_ids)
            totals[name][0] += one.tokens
            totals[name][1] += one.steps
            totals[name][2] += one.seconds - painter.seconds
        identical &= outputs[0] == outputs[1]
    table = Table("", "tokens", "steps", "mean acceptance length", "tokens/s", "speedup")
    for name, (tokens, steps, seconds) in totals.items():
        speed = tokens / seconds
        ratio = speed / (totals["plain"][0] / totals["plain"][2])
        length = (tokens - len(prompts)) / steps
        table.add_row(name, str(tokens), str(steps), f"{length:.2f}", f"{speed:.0f}", f"{ratio:.2f}x")
    console.print(table)
    console.print(f"identical: {'yes' if identical else 'no'}")
    if not identical:
        raise SystemExit(1)


class _Painter:
    """Shows an answer while it comes, one colour per step; its own time is counted apart."""

    def __init__(self, console: Console, tokenizer: PreTrainedTokenizerBase, title: str) -> None:
        from .text import Detokenizer

        self._console = console
        self._detokenizer = Detokenizer(tokenizer)
        self._title = title
        self._count = 0
        self.seconds = 0.0

    def begin(self, prompt: str) -> None:
        from rich.text import Text

        self._console.print(Text(f"── {self._title} ", style="bold"))
        self._console.print(Text(prompt, style="dim"), end="", soft_wrap=True)

    def step(self, tokens: tuple[int, ...]) -> None:
        from rich.text import Text

        start = perf_counter()
        text = Text(self._detokenizer.add(tokens), style=STEP_COLOURS[self._count % len(STEP_COLOURS)])
        self._console.print(text, end="", soft_wrap=True)
        self._count += 1
        self.seconds += perf_counter() - start

    def end(self) -> None:
        from rich.text import Text

        self._console.print(Text(self._detokenizer.add((), last=True)))
        self._console.print()


for command in (bench, tune, doctor):
    cli.add_command(command)


def main() -> None:
    """The `lookahead` command: problems in one line on stderr, exit code 2."""
    try:
        with _our_warnings_alone():
            cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help(), file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _complain(first_line(Exception(error.format_message())))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        _complain(f"{error.strerror or error}{place}")
        sys.exit(1)


@contextmanager
def _our_warnings_alone() -> Iterator[None]:
    """Inside, warnings of ours are one line each, and those of other packages, which a user cannot mend, are none."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", LookaheadWarning)
            warnings.showwarning = lambda message, *others: _complain(str(message))
            yield
    finally:
        logging.disable(logging.NOTSET)


def _complain(message: str) -> None:
    """One line on stderr; of several ranks, the first one's."""
    if speaks():
        print(f"lookahead: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
