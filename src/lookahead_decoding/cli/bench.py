"""`lookahead bench`: methods compared on prompts, and the cost of a step."""

from __future__ import annotations

import json
import shlex
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench import METHODS
from ..config import EXECUTIONS, LookaheadConfig
from ..ranks.torchrun import started
from .loading import DTYPES, Problem, check_file, encode, first_line, load, read_prompts, room, samples, sampling
from .options import config_of, dtype_option, model_options, prompt_options, with_ranks
from .printing import Column, console, progress, say, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..bench.result import Result
    from ..hf.generate import LookaheadDecoding
    from ..price.stats import Stats
    from ..ranks.group import Ranks


class _Default(click.Group):
    """`bench MODEL` is `bench run MODEL`, and `bench --help` that command's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands:
            meant = get_close_matches(args[0], self.commands, cutoff=0.7)
            if meant and not Path(args[0]).exists():
                raise click.UsageError(f"no model {args[0]!r}: did you mean `bench {meant[0]}`?", ctx)
            args.insert(0, "run")
        return super().parse_args(ctx, args)


@click.group(cls=_Default)
def bench() -> None:
    """Compare methods on prompts (`bench MODEL ...`), or time a step (`bench step MODEL`)."""


@bench.command("run")
@model_options
@prompt_options()
@click.option("--chat", is_flag=True, help="Put prompts into the model's chat template.")
@click.option(
    "-n", "--max-new-tokens", "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="At most."
)
@click.option("--dtype", default="auto", show_default=True, help="Of methods that do not name their own.")
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
    "--execution", type=click.Choice(EXECUTIONS), default="auto", show_default=True, help="Of ours, and of hf-static."
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
@with_ranks
def run(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompts: Path | None,
    field: str,
    limit: int | None,
    chat: bool,
    max_new_tokens: int,
    dtype: str,
    methods: str,
    config: str,
    sources: str | None,
    max_rows: int | None,
    execution: str,
    batch_size: int,
    temperature: float,
    seed: int,
    replay: str | None,
    eos: bool,
    repeat: int,
    json_path: Path | None,
    plot: Path | None,
    ranks: Ranks | None,
) -> None:
    """Methods take turns prompt by prompt, warmed up; the table has prompts that loop apart.

    Ratios are medians over the prompts with their quartiles: to the best plain baseline of the run, whatever its
    dtype, and to hf-greedy. Interrupting keeps what was measured.

    Started with torchrun, the method "parallel" shares every step among all ranks; the others run on the first rank
    while the rest wait.

    `lookahead bench step MODEL` times a step by its rows instead: `lookahead bench step --help`.
    """
    if plot is not None:
        _need_matplotlib(plot)
    if replay is not None and (temperature or batch_size > 1):
        raise Problem("--replay forces the tokens of one prompt at a time: leave --temperature and --batch-size out")
    check_file(json_path, "--json")
    check_file(plot, "--plot")
    if replay is not None and prompts is None:
        raise Problem("--replay names a field of --prompts: give that as well")
    asked = read_prompts(prompts, field, limit) if prompts else []
    settings = _config(config, sources, max_rows)
    wanted = [name.strip().partition("@")[::2] for name in methods.split(",")]
    for name, own in wanted:
        if name not in METHODS:
            raise Problem(f"no method {name!r}: choose from {', '.join(METHODS)}")
        if (own or dtype) not in DTYPES:
            raise Problem(f"no dtype {own or dtype!r}: choose from {', '.join(DTYPES)}")
    loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    for kind in dict.fromkeys(own or dtype for _, own in wanted):
        found = load(model, kind, device, trust_remote_code, ranks)
        loaded[kind] = loaded.setdefault(_name_of(found[0].dtype), found)
    wanted = [(name, _name_of(loaded[own or dtype][0].dtype)) for name, own in wanted]
    if len(set(wanted)) < len(wanted):
        raise Problem(f"--methods names one twice: {methods}")
    import torch

    from ..bench.methods import Job, make, measure, warm_up
    from ..bench.result import SHORT, About, Result
    from ..saved.profile import device_name

    made = []
    for name, kind in wanted:
        try:
            made.append(make(name, kind, loaded[kind][0], settings, execution, ranks))
        except ValueError as error:
            raise Problem(str(error)) from error
    if ranks is not None and not ranks.first:
        made = [method for method in made if method.shared]
    target, tokenizer = next(iter(loaded.values()))
    asked = [one.in_chat() if chat else one for one in asked] or samples(tokenizer, limit)
    ids = [encode(target, tokenizer, one, f"prompt {i}") for i, one in enumerate(asked, 1)]
    options = sampling(temperature) | {"max_new_tokens": min(room(target, p, max_new_tokens) for p in ids)}
    stop, pad = target.generation_config.eos_token_id, target.generation_config.pad_token_id
    if pad is None:  # as transformers does
        pad = stop[0] if isinstance(stop, list) else stop
    options |= {"eos_token_id": stop if eos else None, "pad_token_id": pad}
    jobs = [Job(tuple(map(tuple, ids[i : i + batch_size]))) for i in range(0, len(ids), batch_size)]
    if replay is not None and prompts is not None:
        written = enumerate(read_prompts(prompts, replay, limit), 1)
        references = [encode(target, tokenizer, one, f"--replay {replay}, prompt {i}") for i, one in written]
        jobs = [
            Job((tuple(p),), tuple(r[: room(target, p, max_new_tokens)])) for p, r in zip(ids, references, strict=True)
        ]
        options = {"do_sample": False}
    mode = "replay" if replay else f"sampled at {temperature}" if temperature else "greedy"
    about = About(
        command=shlex.join(["lookahead", *sys.argv[1:]]),
        model=model if model == "pocket" else Path(model).name,
        prompts=prompts.name if prompts else "samples",
        mode=f"{mode}, {_named(config, sources, max_rows)}" + (f", batches of {batch_size}" if batch_size > 1 else ""),
        execution=execution,
        device=device_name(target.device),
        threads=torch.get_num_threads(),
    )
    result = Result(about, short=min(SHORT, options.get("max_new_tokens", SHORT)))
    try:
        with progress() as bar:
            task = bar.add_task("compiling and warming up" if execution == "compiled" else "warming up", total=None)
            made, result.left_out = warm_up(made, jobs, options, seed if temperature else None)
            bar.update(task, description="measuring", total=len(jobs))
            for rows in measure(made, jobs if made else [], options, repeat, seed if temperature else None):
                result.rows += rows
                bar.advance(task)
    except KeyboardInterrupt:
        result.interrupted = True
        say(f"interrupted: {len({r.prompt for r in result.rows})} of {len(jobs)} were measured")
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


def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


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


def _need_matplotlib(plot: Path) -> None:
    """See that a picture of this kind can be drawn, before anything is measured."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise Problem("--plot needs matplotlib: pip install 'lookahead-decoding[plot]'") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if plot.suffix[1:].lower() not in kinds:
        raise Problem(f"--plot: no picture of kind {plot.suffix!r}: choose from {', '.join(sorted(kinds))}")


def _show(result: Result) -> None:
    out = console()
    counted = "batches" if any(row.sequences > 1 for row in result.rows) else "prompts"
    lines = result.summary()
    loops = any(line["looping"] for line in lines)

    def numbers(name: str, form: str, which: int | None = None) -> list[str]:
        found = [line[name] for line in lines]
        values: list[Any] = [value if which is None or value is None else value[which] for value in found]  # type: ignore[index]
        return ["" if value is None else form.format(value) for value in values]

    def quartiles(name: str) -> list[str]:
        return [f"{v[1]:.2f}-{v[2]:.2f}" if isinstance(v := line[name], list) else "" for line in lines]

    best = result.best_plain
    show(
        [
            Column("method", [f"{line['method']}{'*' if line['looping'] else ''}" for line in lines]),
            Column("tokens/s", numbers("tokens_per_second", "{:.1f}"), "median over the prompts"),
            Column("speedup", numbers("over_best_plain", "{:.2f}x", 0), f"over {best}, the best plain decoding here"),
            Column("quartiles", quartiles("over_best_plain"), "of the speedup, over the prompts"),
            Column("per step", numbers("mean_acceptance_length", "{:.2f}"), "tokens that a step gives"),
            Column("rows", numbers("rows_per_step", "{:.1f}"), "tokens that a step feeds to the model"),
            Column("agrees", [str(line["agrees"]) for line in lines], "outputs like the first method's of that dtype"),
            Column("plain", numbers("plain_share", "{:.0%}"), "steps that guess nothing"),
            Column("over hf-greedy", numbers("over_hf_greedy", "{:.2f}x", 0), "over model.generate"),
            Column(counted, [str(line["prompts"]) for line in lines]),
        ],
        out,
    )
    for line in lines:
        if line["sources"] and not line["looping"]:
            out.print(f"{line['method']}: {sources_line(line['sources'])}")
        if line["ranks"] and not line["looping"]:
            out.print(f"{line['method']}: {ranks_line(line['ranks'])}")
    if loops:
        out.print(
            f"* answers that repeat themselves (half of the 8-grams or more), or of fewer than {result.short} tokens"
        )
    for label, reason in result.left_out.items():
        out.print(f"{label} does not run here: {reason}")
    out.print(f"{result.about.mode}; {result.about.device}, {result.about.threads} threads")
    for method in result.methods:
        differs = [row.prompt for looping in (False, True) for row in result.of(method, looping) if not row.agrees]
        if differs and not result.about.mode.startswith("sampled"):
            out.print(
                f"warning: {method} gives other tokens on {len(differs)} prompts ({', '.join(map(str, differs[:5]))}): "
                "`lookahead verify` says whether that is rounding"
            )


def sources_line(sources: Any) -> str:
    """Guesses by source, in words."""
    return "; ".join(
        f"{name} {count['accepted']:.0f} of {count['proposed']:.0f} guesses accepted, {count['rows']:.0f} rows"
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
@model_options
@dtype_option
@click.option("--rows", default="1,2,4,8,16,32,48,64,96,128", show_default=True)
@click.option("--contexts", default="256,1024,4096", show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=15, show_default=True)
@click.option("--execution", type=click.Choice(EXECUTIONS), default="auto", show_default=True, help="Of our step.")
@click.option("--config", default="auto", show_default=True, help="Of the shares: auto, or the paper's with W,N,G.")
@click.option("--sources", help="Of the shares. Default: all, or the paper's window.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def step(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    dtype: str,
    rows: str,
    contexts: str,
    repeat: int,
    execution: str,
    config: str,
    sources: str | None,
    json_path: Path | None,
) -> None:
    """t(n): the time of a step by its rows, ours and through the model's own attention with a mask."""
    import torch

    from ..bench.step import cache_bytes, commit_times, limits, outside_share, step_times
    from ..hf.generate import LookaheadDecoding
    from ..model.target import Target
    from ..saved.profile import device_name

    if started():
        raise Problem("bench step is for one process: start it without torchrun")
    settings = _config(config, sources)
    sizes, lengths = _numbers("--rows", rows), _numbers("--contexts", contexts)
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    times = []
    with progress() as bar:
        task = bar.add_task("time of a step", total=len(sizes) * len(lengths))
        for one in step_times(target, sizes, lengths, repeat, execution):
            times.append(one)
            bar.advance(task)
    first = {one.context: one.ours for one in reversed(times)}
    stock = ["" if one.stock is None else f"{one.stock:.2f}" for one in times]
    out = console()
    show(
        [
            Column("context", [str(one.context) for one in times]),
            Column("rows", [str(one.rows) for one in times], "tokens that the step feeds to the model"),
            Column("ms", [f"{one.ours:.2f}" for one in times]),
            Column("t(n)/t(1)", [f"{one.ours / first[one.context]:.2f}" for one in times], "in steps of one row"),
            Column("own, ms", stock, "with the model's own attention and a mask"),
            Column("speedup", ["" if one.stock is None else f"{one.stock / one.ours:.2f}x" for one in times]),
        ],
        out,
    )
    machine = limits(target)
    stats = _stats(target, tokenizer, LookaheadDecoding(settings, execution=execution))
    shares = outside_share(stats.seconds)
    outside = 1e3 * sum(s for name, s in stats.seconds.items() if name not in ("prefill", "forward")) / stats.steps
    place = Target(target, 8, execution=execution)
    commits = commit_times(target) if place.strategy.name == "tree" else {}
    held, needed = cache_bytes(target)
    least = ", ".join(f"{machine.milliseconds(n):.2f} ms for {n} row{'s' if n > 1 else ''}" for n in sizes)
    checked = f"guesses are checked as: {place.strategy.name}; attention: {place.attention}"
    out.print(f"{checked}; {place.strategy.drawback}".rstrip("; "))
    out.print(f"the machine allows, roughly (weights read, products computed): {least}")
    out.print("share of a step: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    out.print(f"outside the forward: {outside:.2f} ms per step of {stats.rows_per_step:.1f} rows")
    if commits:
        out.print("commit: " + ", ".join(f"{ms:.3f} ms at {length}" for length, ms in commits.items()))
    out.print(f"keys and values: {held:,} bytes for a capacity that needs {needed:,}")
    if json_path is not None:
        content: dict[str, Any] = {
            "command": shlex.join(["lookahead", *sys.argv[1:]]),
            "model": Path(model).name,
            "parameters": sum(p.numel() for p in target.parameters()),
            "dtype": _name_of(target.dtype),
            "execution": execution,
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

    from ..hf.generate import generate

    ids = torch.tensor([tokenizer("def fibonacci(n):\n").input_ids], device=model.device)
    for _ in range(2):
        generate(model, ids, max_new_tokens=100, do_sample=False, eos_token_id=None, lookahead=decoding)
    return decoding.stats
