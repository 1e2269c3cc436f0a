"""`lookahead doctor`: what is fastest here, by how much, and why not more."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import LookaheadConfig
from .loading import THREADS, Problem, encode, first_line, load, read_prompts, room, samples
from .options import dtype_option, execution_option, model_options, prompt_options
from .printing import Column, command_line, console, item, progress, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..bench.methods import Job
    from ..bench.result import Result
    from ..model.target import Target

LITTLE = 1.05
"""A speedup below this is not worth the name."""

NOISE = 0.97
"""A ratio from here up to 1 may be chance: lookahead decoding, which then costs nothing, is still recommended."""

ENOUGH = 128
"""Tokens on which a recommendation may rest."""

TOKENS = 128
"""Of an answer, where all answers take no longer than `SECONDS`."""

FEWEST = 32
"""Tokens of an answer, however long they take."""

SECONDS = 180

LARGEST = 8 << 30
"""Bytes of a model that is loaded a second time, in another dtype, to compare."""

RUNS = {
    "eager": "as the model is",
    "packed": "packed weights",
    "native": "native code",
    "captured": "captured",
    "compiled": "compiled",
}
"""How steps run, in words, by what `--execution` takes."""


@dataclass(frozen=True)
class Way:
    """A dtype and how its steps run.

    Attributes:
        seconds: of a token in plain decoding, roughly.
    """

    dtype: str
    execution: str
    model: PreTrainedModel
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.execution}"


@click.command()
@model_options
@prompt_options(many=4)
@click.option("--chat", is_flag=True, help="Put prompts into the model's chat template.")
@click.option(
    "-n",
    "--max-new-tokens",
    "--max-tokens",
    type=click.IntRange(16),
    help="Of each answer.  [default: 128, or as few as 32 where that takes more than three minutes]",
)
@dtype_option
@execution_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, and nothing else.")
def doctor(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompts: Path | None,
    field: str,
    limit: int,
    chat: bool,
    max_new_tokens: int | None,
    dtype: str,
    execution: str,
    as_json: bool,
) -> None:
    """What is fastest here, how much lookahead decoding brings, and if little, why.

    Plain decoding, lookahead decoding and `model.generate` take turns on a few prompts, in the dtypes and ways to run a
    step that this machine has, unless --dtype and --execution choose. Ends with one recommendation to copy.
    """
    asked = read_prompts(prompts, field, limit) if prompts else []
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    from ..bench.methods import Job

    asked = [one.in_chat() if chat else one for one in asked] or samples(tokenizer, limit)
    ids = [encode(target, tokenizer, one, f"prompt {i}") for i, one in enumerate(asked, 1)]
    jobs = [Job((tuple(p),)) for p in ids]
    length = min(room(target, p, max_new_tokens or TOKENS) for p in ids)
    try:
        ways = _ways(model, target, dtype, execution, device, trust_remote_code, jobs)
        if max_new_tokens is None:  # the race is that of every way, and of a warm-up of two answers, three times
            token = 3 * (len(jobs) + 2) * sum(way.seconds for way in ways)
            length = min(length, max(FEWEST, int(SECONDS / token)))
        result = _race(ways, jobs, length)
    except (TypeError, ValueError) as error:
        raise Problem(first_line(error)) from error
    looping = not result.of(result.methods[0])  # where all answers are so, they have to do
    ours = [method for method in result.methods if method.startswith("lookahead@")]
    fastest = max(ours, key=lambda method: result.speed(method, looping))
    way = next(way for way in ways if f"lookahead@{way.name}" == fastest)
    talk = chat or (prompts is None and bool(tokenizer.chat_template))
    given = {"--device": device, "--threads": click.get_current_context().meta.get(THREADS)}
    options = [f"{name} {value}" for name, value in given.items() if value is not None]
    options += ["--trust-remote-code"] * trust_remote_code + ["--chat"] * talk
    _report(model, ways, way, fastest, result, looping, as_json, options, prompts is not None)


def _ways(
    name: str, model: PreTrainedModel, dtype: str, execution: str, device: str | None, trust: bool, jobs: Sequence[Job]
) -> list[Way]:
    """A way per dtype that can be compared: for each the execution whose plain steps are the fastest."""
    import torch

    from ..model.packed import copied_bytes, why_not
    from ..model.target import Target
    from ..model.trees import PACKED_UNASKED, best_way

    models = [model]
    both = model.device.type == "cpu" and dtype == "auto" and model.dtype in (torch.float32, torch.bfloat16)
    if both and 2 * model.num_parameters() * model.dtype.itemsize <= LARGEST:
        other = "bfloat16" if model.dtype == torch.float32 else "float32"
        models.append(load(name, other, device, trust)[0])
    found = []
    with progress() as bar:
        task = bar.add_task("comparing how a step runs", total=None)
        for one in models:
            kinds = [execution]
            if execution == "auto":
                kinds = [best_way(one)]
                if not why_not(one) and copied_bytes(one) <= PACKED_UNASKED:
                    kinds = ["eager", "packed"]
                if Target(one, 8).execution == "native":
                    kinds = ["native", kinds[-1]]
            of_dtype = str(one.dtype).removeprefix("torch.")
            ways = [_timed(Way(of_dtype, kind, one), jobs[0]) for kind in kinds]
            found.append(min(ways, key=lambda way: way.seconds))
            bar.advance(task)
    return found


def _timed(way: Way, job: Job, tokens: int = 24) -> Way:
    """The way with the time of its tokens: of a short plain answer, the third time."""
    from ..bench.methods import answer, make

    method = make("autoregressive", way.dtype, way.model, LookaheadConfig(), way.execution)
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return replace(way, seconds=[answer(method, job, options)[2] for _ in range(3)][-1] / tokens)


def _race(ways: Sequence[Way], jobs: Sequence[Job], length: int) -> Result:
    """Plain, lookahead and `model.generate` in every way, taking turns."""
    from ..bench.methods import make, measure, warm_up
    from ..bench.result import About, Result

    methods = []
    for way in ways:
        for name in ("autoregressive", "lookahead", "hf-greedy"):
            method = make(name, way.dtype, way.model, LookaheadConfig(), way.execution)
            methods.append(replace(method, dtype=way.name if name != "hf-greedy" else way.dtype))
    generation = ways[0].model.generation_config
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False}
    stop = generation.eos_token_id
    first = stop[0] if isinstance(stop, list) else stop
    options["pad_token_id"] = first if generation.pad_token_id is None else generation.pad_token_id
    options["eos_token_id"] = stop
    result = Result(About("lookahead doctor", "", "", "greedy", "", "", 0))
    with progress() as bar:
        task = bar.add_task("warming up", total=None)
        kept, result.left_out = warm_up(methods, jobs, options)
        bar.update(task, description="measuring", total=len(jobs))
        for rows in measure(kept, jobs, options):
            result.rows += rows
            bar.advance(task)
    return result


def _report(
    model: str,
    ways: Sequence[Way],
    way: Way,
    fastest: str,
    result: Result,
    looping: bool,
    as_json: bool,
    options: Sequence[str],
    own_prompts: bool,
) -> None:
    """Facts, advice and the recommendation.

    Args:
        way: the one of `ways` in which lookahead decoding was fastest, and `fastest` its method.
        options: of the command line that go on to the recommendation.
        own_prompts: whether the user gave them.
        looping: whether it is prompts whose answers loop, or are short, that count.
    """
    import torch

    from ..bench.result import added
    from ..bench.tune import forward_times
    from ..model.target import Target
    from ..saved import profile

    place = Target(way.model, 8, execution=way.execution)
    with progress() as bar:
        task = bar.add_task("time of a step", total=9)
        for forwards in forward_times(way.model, (1, 2, 4, 8, 16, 32), way.execution):  # noqa: B007  # the last is best
            bar.advance(task)
    times = dict(forwards)
    rows = result.of(fastest, looping)
    mean = {}
    for name in ("mean_acceptance_length", "rows_per_step", "plain_share"):
        found = [value for row in rows if (value := getattr(row, name)) is not None]
        mean[name] = sum(found) / len(found) if found else 1.0  # which is what plain steps have, in all three
    speeds = {method: result.speed(method, looping) for method in result.methods}
    best = max((method for method in speeds if not method.startswith("lookahead@")), key=speeds.__getitem__)
    speedup, over_generate = (
        (result.ratio(fastest, to, looping) or (1.0,))[0] for to in (best, f"hf-greedy@{way.dtype}")
    )
    sources = added(row.sources for row in rows)
    facts: dict[str, Any] = {
        "device": profile.device_name(way.model.device),
        "threads": torch.get_num_threads(),
        "dtype": way.dtype,
        "steps_run": RUNS[place.execution],
        "row_invariant": "yes: the tokens of plain decoding"
        if place.row_invariant
        else "no: near-ties may fall otherwise",
        "checked_as": place.strategy.name,
        "attention": _attention(place),
        "profile": "saved by `lookahead tune`"
        if profile.load(place.machine)
        else "none: times come from the first steps",
        "step_ms": round(1e3 * times[1], 2),
        "t8_over_t1": round(times[8] / times[1], 2),
        "t32_over_t1": round(times[32] / times[1], 2),
        "mean_acceptance_length": round(mean["mean_acceptance_length"], 2),
        "rows_per_step": round(mean["rows_per_step"], 1),
        "plain_share": round(mean["plain_share"], 2),
        "tokens_per_second": {method: round(speed, 1) for method, speed in speeds.items()},
        "best_plain": best,
        "expected_speedup": round(speedup, 2),
        "over_generate": round(over_generate, 2),
    }
    advice = advise(way.model, place, times, mean["mean_acceptance_length"], own_prompts)
    small = sum(row.tokens for row in rows)
    if small < ENOUGH:
        advice.insert(0, f"{small} tokens decide little: give more prompts, or longer answers (-n)")
    if speedup < NOISE:  # the best plain decoding, in whichever way that was
        fastest, (_, _, ran) = best, best.partition("@")
        way = next(one for one in ways if ran in (one.name, one.dtype))
    command, python = _to_copy(model, way, options, fastest.partition("@")[0])
    if as_json:
        print(
            json.dumps(facts | {"sources": sources, "advice": advice, "command": " ".join(command), "python": python})
        )
        return
    out = console()
    labels = {"t8_over_t1": "time of 8 rows", "t32_over_t1": "time of 32 rows", "step_ms": "time of one row"}
    values = facts | {
        "step_ms": f"{facts['step_ms']} ms",
        "t8_over_t1": f"{facts['t8_over_t1']} times that of one",
        "t32_over_t1": f"{facts['t32_over_t1']} times that of one",
        "mean_acceptance_length": f"{facts['mean_acceptance_length']} tokens per step",
        "plain_share": f"{facts['plain_share']:.0%} of the steps",
    }
    for hidden in ("tokens_per_second", "best_plain", "expected_speedup", "over_generate"):
        del values[hidden]
    pairs = [(labels.get(name, name.replace("_", " ")), str(value)) for name, value in values.items()]
    for name, count in sources.items():
        share = count["accepted"] / count["proposed"] if count["proposed"] else 0.0
        pairs.append(
            (f"guesses from {name}", f"{count['accepted']:.0f} of {count['proposed']:.0f} accepted ({share:.0%})")
        )
    wide = max(len(name) for name, _ in pairs) + 2
    for name, value in pairs:
        item(f"{name.ljust(wide)}{value}", out)
    out.print()
    methods = sorted(speeds, key=speeds.__getitem__, reverse=True)
    show([Column("method", methods), Column("tokens/s", [f"{speeds[method]:.1f}" for method in methods])], out)
    for line in advice:
        item(f"* {line}", out)
    out.print()
    out.print(verdict(speedup, best), style="bold", markup=False)
    out.print()
    if command:
        out.print(command_line(command, out.width), "", sep="\n", markup=False, soft_wrap=True)
    out.print(python, markup=False, soft_wrap=True)


def verdict(speedup: float, best: str) -> str:
    """Whether it pays, in a sentence."""
    if speedup >= LITTLE:
        return f"It pays here: about {speedup:.2f} times the best plain decoding ({best}) on the sample."
    if speedup < NOISE:
        return f"It does not pay here: about {speedup:.2f} times the best plain decoding ({best}) on the sample."
    return f"It hardly pays here: about {speedup:.2f} times the best plain decoding ({best}) on the sample."


def _to_copy(model: str, way: Way, options: Sequence[str], method: str) -> tuple[list[str], str]:
    """The recommendation as the words of a command, none where no command does it, and as Python."""
    path = "ld.pocket_path()" if model == "pocket" else repr(model)
    loading = f"model = AutoModelForCausalLM.from_pretrained(\n    {path}, dtype=torch.{way.dtype}\n)\n"
    arguments = "**inputs, max_new_tokens=128, do_sample=False"
    if method == "hf-greedy":
        return [], f"{loading}ids = model.generate({arguments})"
    plain = method == "autoregressive"
    parts = [f"--dtype {way.dtype}", f"--execution {way.execution}", *["--plain"] * plain, *options]
    command = ["lookahead generate", shlex.quote(model), *parts, "-p 'your prompt'"]
    decoding = f"decoding = ld.LookaheadDecoding({'ld.PLAIN, ' * plain}execution={way.execution!r})\n"
    return command, f"{loading}{decoding}ids = ld.generate(\n    model, {arguments}, lookahead=decoding\n)"


def _attention(target: Target) -> str:
    from ..model.evaluate import OURS
    from ..model.trees import kernel_found

    if target.attention != OURS:
        return f"the model's own ({target.attention})"
    if target.model.device.type == "cuda" and kernel_found():
        return "ours, in Triton"
    return "ours, in PyTorch"


def advise(
    model: PreTrainedModel,
    target: Target,
    times: dict[int, float],
    mean_acceptance_length: float,
    own_prompts: bool = False,
) -> list[str]:
    """What could be changed, most useful first.

    Args:
        own_prompts: whether the sample is the user's.
        times: seconds of a step by its rows, those of 1 and 8 among them.
        mean_acceptance_length: tokens per step on the sample.
    """
    import torch

    from ..bench.step import limits
    from ..model.native.steps import why_no_native
    from ..model.packed import copied_bytes, why_not
    from ..model.trees import PACKED_UNASKED, not_unasked

    advice = []
    cost = times[8] / times[1]
    if model.device.type == "cpu" and model.dtype == torch.float32 and cost > 1.3:
        advice.append(
            f"a step that feeds 8 tokens takes {cost:.1f} times as long as one that feeds 1, so few are guessed; in "
            "bfloat16 it takes less on processors that have instructions for it"
        )
    elif cost > 1.3:
        advice.append(
            f"a step that feeds 8 tokens takes {cost:.1f} times as long as one that feeds 1: this device has little "
            "idle arithmetic, so few are guessed"
        )
    if model.device.type == "cpu" and target.execution in ("eager", "packed") and target.strategy.name == "tree":
        reason = why_no_native(model)
        if reason:
            advice.append(f"a native step would be faster, and this model has none: {reason}")
        elif not_unasked(model):
            size = sum(p.nbytes for p in model.parameters()) / 2**30
            advice.append(f"--execution native makes a step faster; its copy of the weights takes {size:.1f} GiB")
    size = 0 if why_not(model) else copied_bytes(model)
    if target.execution == "eager" and size > PACKED_UNASKED:  # a smaller copy was compared
        advice.append(
            f"--execution packed may make a step faster; its copy of the weights takes {size / 2**30:.1f} GiB"
        )
    if model.device.type == "cpu" and target.execution in ("eager", "packed") and target.strategy.name == "tree":
        outside = times[1] - limits(model).milliseconds(1) / 1e3
        if outside > 0.5 * times[1]:
            advice.append(
                "more than half of a step's time goes to starting many small operations: --execution compiled joins "
                "them, at the price of minutes per process"
            )
    if mean_acceptance_length < 1.2:
        advice.append(
            f"few guesses are accepted on the sample{'' if own_prompts else ': try --prompts with texts like yours'}; "
            "text that never repeats a phrase, and high temperatures, gain little"
        )
    if target.strategy.drawback:
        advice.append(f"{target.strategy.drawback}, because: {'; '.join(dict.fromkeys(target.strategy.reasons))}")
    return advice
