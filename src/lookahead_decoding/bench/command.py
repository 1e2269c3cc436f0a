"""`lookahead bench`: methods compared on prompts, and the cost of a step."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_common import DTYPES, Problem, config_of, encode, first_line, load, read_prompts, room, sampling, with_ranks
from ..config import COMPILE, LookaheadConfig
from ..stats import Stats
from ..torchrun import speaks, started
from . import METHODS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..hf import LookaheadDecoding
    from ..ranks import Ranks
    from .result import Result


class _Default(click.Group):
    """`bench MODEL` is `bench run MODEL`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args.insert(0, "run")
        return super().parse_args(ctx, args)


@click.group(cls=_Default)
def bench() -> None:
    """Compare methods on prompts (`bench MODEL ...`), or time a step (`bench step MODEL`).

    The options of the first are under `bench run --help`.
    """


@bench.command("run")
@click.argument("model")
@click.option("--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--field", default="prompt", show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Only the first prompts.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="Of methods that do not name their own.")
@click.option("--device")
@click.option(
    "--methods",
    default="autoregressive,lookahead,hf-greedy,hf-prompt-lookup",
    show_default=True,
    help=f"Of {', '.join(METHODS)}; with @dtype behind it a method runs in that dtype.",
)
@click.option("--config", default="auto", show_default=True, help="Of lookahead: auto, or the paper's with W,N,G.")
@click.option("--sources", help="Where lookahead takes candidates from. Default: all, or the paper's window.")
@click.option("--max-rows", type=click.IntRange(1), help="Rows of a step at most.")
@click.option(
    "--compile", type=click.Choice(COMPILE), default="auto", show_default=True, help="Of ours, and of hf-static."
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Prompts answered in one call."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--replay", help="Force the text in this field of the prompts' file.")
@click.option("--eos/--no-eos", default=True, show_default=True, help="Whether the end of text ends an answer.")
@click.option("--repeat", type=click.IntRange(1), default=1, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="A picture; needs matplotlib.")
@click.option("--trust-remote-code", is_flag=True)
@with_ranks
def run(
    model: str,
    prompts: Path,
    field: str,
    limit: int | None,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    methods: str,
    config: str,
    sources: str | None,
    max_rows: int | None,
    compile: str,
    batch_size: int,
    temperature: float,
    seed: int,
    replay: str | None,
    eos: bool,
    repeat: int,
    json_path: Path | None,
    plot: Path | None,
    trust_remote_code: bool,
    ranks: Ranks | None,
) -> None:
    """Methods take turns prompt by prompt, warmed up; the table has prompts that loop apart.

    Ratios are medians over the prompts with their quartiles: to the best plain baseline of the run, whatever its
    dtype, and to hf-greedy. Interrupting keeps what was measured.

    Started with torchrun, the method "parallel" shares every step among all ranks; the others run on the first rank
    while the rest wait.
    """
    import torch
    from rich.console import Console

    from ..profile import device_name
    from .methods import Job, make, measure, warm_up
    from .result import About, Result

    if plot is not None:
        _need_matplotlib()
    if replay is not None and (temperature or batch_size > 1):
        raise Problem("--replay forces the tokens of one prompt at a time: leave --temperature and --batch-size out")
    texts = read_prompts(prompts, field, limit)
    settings = _config(config, sources, max_rows)
    wanted = [name.strip().partition("@")[::2] for name in methods.split(",")]
    loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    made = []
    if len(set(wanted)) < len(wanted):
        raise Problem(f"--methods names one twice: {methods}")
    for name, own in wanted:
        kind = own or dtype
        if kind not in DTYPES:
            raise Problem(f"no dtype {kind!r}: choose from {', '.join(DTYPES)}")
        if kind not in loaded:
            loaded[kind] = load(model, kind, device, trust_remote_code, ranks)
        try:
            made.append(make(name, kind, loaded[kind][0], settings, compile, ranks))
        except ValueError as error:
            raise Problem(str(error)) from error
    if ranks is not None and not ranks.first:
        made = [method for method in made if method.shared]
    target, tokenizer = next(iter(loaded.values()))
    ids = [encode(target, tokenizer, text, f"prompt {i}") for i, text in enumerate(texts, 1)]
    options = sampling(temperature) | {"max_new_tokens": min(room(target, p, max_new_tokens) for p in ids)}
    stop, pad = target.generation_config.eos_token_id, target.generation_config.pad_token_id
    if pad is None:  # as transformers does
        pad = stop[0] if isinstance(stop, list) else stop
    options |= {"eos_token_id": stop if eos else None, "pad_token_id": pad}
    jobs = [Job(tuple(map(tuple, ids[i : i + batch_size]))) for i in range(0, len(ids), batch_size)]
    if replay is not None:
        references = [tokenizer(t).input_ids for t in read_prompts(prompts, replay, limit)]
        jobs = [
            Job((tuple(p),), tuple(r[: room(target, p, max_new_tokens)])) for p, r in zip(ids, references, strict=True)
        ]
        options = {"do_sample": False}
    mode = "replay" if replay else f"sampled at {temperature}" if temperature else "greedy"
    about = About(
        command=shlex.join(["lookahead", *sys.argv[1:]]),
        model=model if model == "pocket" else Path(model).name,
        prompts=prompts.name,
        mode=f"{mode}, {_named(config, sources, max_rows)}" + (f", batches of {batch_size}" if batch_size > 1 else ""),
        compile=compile,
        device=device_name(target.device),
        threads=torch.get_num_threads(),
    )
    result = Result(about)
    console = Console(stderr=True, quiet=not speaks())
    console.print("warming up" + (", which compiles every method first" if compile == "full" else ""))
    try:
        made, result.left_out = warm_up(made, jobs, options, seed if temperature else None)
        found = measure(made, jobs if made else [], options, repeat, seed if temperature else None)
        for number, rows in enumerate(found, 1):
            result.rows += rows
            if sys.stderr.isatty():
                console.print(f"{number}/{len(jobs)}", end="\r")
    except KeyboardInterrupt:
        result.interrupted = True
        console.print(f"interrupted: {len({r.prompt for r in result.rows})} of {len(jobs)} were measured")
    except (TypeError, ValueError) as error:
        raise Problem(first_line(error)) from error
    if ranks is not None and not ranks.first:
        return
    if not result.rows:
        reasons = "; ".join(f"{label} does not run here: {reason}" for label, reason in result.left_out.items())
        raise Problem(f"nothing was measured{': ' if reasons else ''}{reasons}")
    _show(result)
    if json_path is not None:
        result.write(json_path)
    if plot is not None:
        result.plot(plot)


def _config(text: str, sources: str | None, max_rows: int | None = None) -> LookaheadConfig:
    if text == "auto":
        return config_of((None, None, None), sources, max_rows)
    try:
        w, n, g = (int(part) for part in text.split(","))
    except ValueError as error:
        raise Problem(f"--config takes auto, or three numbers W,N,G such as 15,5,15; got {text!r}") from error
    return config_of((w, n, g), sources, max_rows, paper=True)


def _named(config: str, sources: str | None, max_rows: int | None = None) -> str:
    """The settings of lookahead in words."""
    parts = [config, f"from {sources}" if sources else "", f"at most {max_rows} rows" if max_rows else ""]
    return " ".join(part for part in parts if part)


def _numbers(option: str, text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise Problem(f"{option} takes numbers of at least 1, separated by commas; got {text!r}")
    return numbers


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401  # only to know before anything is measured
    except ModuleNotFoundError as error:
        raise Problem("--plot needs matplotlib: pip install 'lookahead-decoding[plot]'") from error


def _show(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from .result import SHORT

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    counted = "batches" if any(row.sequences > 1 for row in result.rows) else "prompts"
    table = Table(
        "method", counted, "tokens/s", "per step", "rows", "plain", "over best plain", "over hf-greedy", "agrees"
    )
    for line in result.summary():
        ratios = []
        for name in ("over_best_plain", "over_hf_greedy"):
            found = line[name]
            ratios.append(f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})" if isinstance(found, list) else "")
        length = line["mean_acceptance_length"]
        name = f"{line['method']}{' (loops, short)' if line['looping'] else ''}"
        speed = f"{line['tokens_per_second']:.1f}"
        rows, plain = line["rows_per_step"], line["plain_share"]
        fed = ["" if rows is None else f"{rows:.1f}", "" if plain is None else f"{plain:.0%}"]
        table.add_row(name, str(line["prompts"]), speed, str(length or ""), *fed, *ratios, str(line["agrees"]))
    console.print(table)
    for line in result.summary():
        if line["sources"] and not line["looping"]:
            console.print(f"{line['method']}: {sources_line(line['sources'])}")
        if line["ranks"] and not line["looping"]:
            console.print(f"{line['method']}: {ranks_line(line['ranks'])}")
    if any(line["looping"] for line in result.summary()):
        console.print(f"(loops, short): half of the 8-grams or more are repeats, or fewer than {SHORT} tokens")
    for label, reason in result.left_out.items():
        console.print(f"{label} does not run here: {reason}")
    if result.best_plain:
        console.print(f"best plain baseline: {result.best_plain}; {result.about.mode}; {result.about.device}")
    for method in result.methods:
        differs = [row.prompt for looping in (False, True) for row in result.of(method, looping) if not row.agrees]
        if differs and not result.about.mode.startswith("sampled"):
            console.print(
                f"warning: {method} gives other tokens on {len(differs)} prompts ({', '.join(map(str, differs[:5]))}): "
                "`lookahead verify` says whether that is rounding"
            )


def sources_line(sources: Any) -> str:
    """Drafts by source, in words."""
    return "; ".join(
        f"{name} {count['accepted']:.0f} of {count['proposed']:.0f} drafts accepted, {count['rows']:.0f} rows"
        for name, count in sources.items()
    )


def ranks_line(counts: Any) -> str:
    """What several ranks did, in words; rows and bytes are those of the first."""
    return (
        f"{counts['ranks']:.0f} ranks, {counts['rows_per_step']:.1f} rows each; per step "
        f"{counts['collectives_per_step']:.2f} collectives, {counts['message_bytes_per_step']:,.0f} bytes to agree and "
        f"{counts['sent_bytes_per_step']:,.0f} of keys and values, {counts['communication_share']:.1%} of the time in "
        "communication"
    )


@bench.command("step")
@click.argument("model")
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device")
@click.option("--rows", default="1,2,4,8,16,32,48,64,96,128", show_default=True)
@click.option("--contexts", default="256,1024,4096", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=15, show_default=True)
@click.option("--compile", type=click.Choice(COMPILE), default="auto", show_default=True, help="Of our step.")
@click.option("--config", default="auto", show_default=True, help="Of the shares: auto, or the paper's with W,N,G.")
@click.option("--sources", help="Of the shares. Default: all, or the paper's window.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--trust-remote-code", is_flag=True)
def step(
    model: str,
    dtype: str,
    device: str | None,
    rows: str,
    contexts: str,
    repeat: int,
    compile: str,
    config: str,
    sources: str | None,
    json_path: Path | None,
    trust_remote_code: bool,
) -> None:
    """t(n): the time of a step by its rows, ours and through the model's own attention with a mask."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..hf import LookaheadDecoding
    from ..profile import device_name
    from ..target import Target
    from .step import cache_bytes, commit_times, limits, outside_share, step_times

    if started():
        raise Problem("bench step is for one process: start it without torchrun")
    settings = _config(config, sources)
    sizes, lengths = _numbers("--rows", rows), _numbers("--contexts", contexts)
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    times = []
    table = Table("context", "rows", "ms", "t(n)/t(1)", "own attention, ms", "speedup")
    for one in step_times(target, sizes, lengths, repeat, compile):
        times.append(one)
        first = next(t.ours for t in times if t.context == one.context)
        table.add_row(
            str(one.context),
            str(one.rows),
            f"{one.ours:.2f}",
            f"{one.ours / first:.2f}",
            "-" if one.stock is None else f"{one.stock:.2f}",
            "-" if one.stock is None else f"{one.stock / one.ours:.2f}x",
        )
    console = Console(highlight=False)
    console.print(table)
    machine = limits(target)
    stats = _stats(target, tokenizer, LookaheadDecoding(settings, compile=compile))
    shares = outside_share(stats.seconds)
    outside = 1e3 * sum(s for name, s in stats.seconds.items() if name not in ("prefill", "forward")) / stats.steps
    place = Target(target, 8, compile=compile)
    commits = commit_times(target) if place.strategy.name == "tree" else {}
    held, needed = cache_bytes(target)
    least = ", ".join(f"{machine.milliseconds(n):.2f} ms for {n} rows" for n in sizes)
    console.print(
        f"candidates: {place.strategy.name}; attention: {place.attention}; {place.strategy.drawback}".rstrip("; ")
    )
    console.print(f"the machine allows, roughly (weights read, products computed): {least}")
    console.print("share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    console.print(f"outside the forward: {outside:.2f} ms per step of {stats.rows_per_step:.1f} rows")
    if commits:
        console.print("commit: " + ", ".join(f"{ms:.3f} ms at {length}" for length, ms in commits.items()))
    console.print(f"keys and values: {held:,} bytes for a capacity that needs {needed:,}")
    if json_path is not None:
        content: dict[str, Any] = {
            "command": shlex.join(["lookahead", *sys.argv[1:]]),
            "model": Path(model).name,
            "parameters": sum(p.numel() for p in target.parameters()),
            "dtype": dtype,
            "compile": compile,
            "strategy": vars(place.strategy),
            "config": _named(config, sources),
            "device": device_name(target.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "steps": [vars(t) for t in times],
            "shares": shares,
            "outside_forward_ms": outside,
            "rows_per_step": stats.rows_per_step,
            "limits": vars(machine) | {"milliseconds": {n: machine.milliseconds(n) for n in sizes}},
            "cache_bytes": {"held": held, "needed": needed},
            "commit_ms": commits,
        }
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def _stats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, decoding: LookaheadDecoding) -> Stats:
    """Counts and times of a hundred tokens, warmed up."""
    import torch

    from ..hf import generate

    ids = torch.tensor([tokenizer("def fibonacci(n):\n").input_ids], device=model.device)
    for _ in range(2):
        generate(model, ids, max_new_tokens=100, do_sample=False, eos_token_id=None, lookahead=decoding)
    return decoding.stats
