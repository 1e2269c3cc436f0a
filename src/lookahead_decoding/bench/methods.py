"""The methods that a benchmark compares."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..config import PLAIN, LookaheadConfig
from ..hf.generate import LookaheadDecoding, generate
from ..price.stats import Stats
from ..ranks.group import Ranks
from ..ranks.torchrun import START
from . import METHODS
from .result import Row, distinct_share

PLAIN_METHODS = ("autoregressive", "hf-greedy", "hf-static")
OPTIONAL = ("hf-static", "hf-prompt-lookup")
"""Methods that do not run for every model, device or batch, and are then left out with the reason."""


class Replay(LogitsProcessor):  # type: ignore[misc]
    """Forces the tokens of a reference text, so that acceptance is measured on text that people wrote.

    Args:
        ids: the text, prompt included.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] >= len(self._ids):  # prompt lookup asks past the end
            return scores
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._ids[input_ids.shape[1]]] = 0.0
        return forced


@dataclass(frozen=True)
class Method:
    """A way to generate.

    Attributes:
        name: one of METHODS.
        dtype: of the weights, as torch names it.
        device: of the model.
        run: prompts (batch, length) and options of `generate` to the whole texts and, of ours, the counts.
        shared: whether all ranks run it; the others run on the first one, while the rest wait.
    """

    name: str
    dtype: str
    device: torch.device
    run: Callable[..., tuple[torch.Tensor, Stats | None]]
    shared: bool = False

    @property
    def label(self) -> str:
        return f"{self.name}@{self.dtype}"

    @property
    def plain(self) -> bool:
        return self.name in PLAIN_METHODS


def make(
    name: str,
    dtype: str,
    model: PreTrainedModel,
    config: LookaheadConfig,
    execution: str = "auto",
    ranks: Ranks | None = None,
) -> Method:
    """A method by its name.

    Args:
        config: of "lookahead", and of "paper" where it is the paper's algorithm.
        execution: of our methods, as `Target` takes it; with "compiled" hf-static is compiled on a CPU as well, which
            transformers leaves out by default.
        ranks: for "parallel", which is "lookahead" with every step shared by them. If they divide the model as well,
            all of ours run on all of them.

    Raises:
        ValueError: no such method, or no ranks for it.
    """
    divided = ranks is not None and ranks.tensor_parallel > 1

    def ours(settings: LookaheadConfig, shared: bool = divided) -> Callable[..., tuple[torch.Tensor, Stats | None]]:
        def run(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Stats | None]:
            seeds = options.pop("seeds", None)
            decoding = LookaheadDecoding(settings, seeds=seeds, execution=execution, parallel=ranks if shared else None)
            out = generate(model, ids, lookahead=decoding, **options)
            return out, decoding.stats

        return run

    def stock(**extra: Any) -> Callable[..., tuple[torch.Tensor, Stats | None]]:
        def run(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Stats | None]:
            if (seeds := options.pop("seeds", None)) is not None:
                torch.manual_seed(seeds[0])
            return model.generate(ids, **options, **extra), None

        return run

    static: dict[str, Any] = {"cache_implementation": "static"}
    if execution == "compiled" and model.device.type == "cpu":
        static["compile_config"] = CompileConfig(mode="default")
        static["compile_config"]._compile_all_devices = True
    runs = {
        "autoregressive": ours(PLAIN),
        "lookahead": ours(config),
        "paper": ours(config if not config.adaptive else LookaheadConfig.paper()),
        "hf-greedy": stock(),
        "hf-static": stock(**static),
        "hf-prompt-lookup": stock(prompt_lookup_num_tokens=10),
        "parallel": ours(config, shared=True),
    }
    if name not in runs:
        raise ValueError(f"no method {name!r}: choose from {', '.join(METHODS)}")
    if name == "parallel" and ranks is None:
        raise ValueError(f"'parallel' needs several ranks: {START}")
    return Method(name, dtype, model.device, runs[name], shared=name == "parallel" or divided)


@dataclass(frozen=True)
class Job:
    """Prompts that every method answers in one call.

    Attributes:
        prompts: token ids of each.
        reference: tokens that are forced to follow, for a single prompt; None lets the model choose.
    """

    prompts: tuple[tuple[int, ...], ...]
    reference: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.reference is not None and len(self.prompts) > 1:
            raise ValueError("replay takes one prompt at a time: use a batch size of 1")

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt, reference included."""
        return max(map(len, self.prompts)) + len(self.reference or ())


def answer(method: Method, job: Job, options: dict[str, Any]) -> tuple[list[list[int]], Stats | None, float]:
    """The tokens that a method emits for each prompt, its counts, and the seconds it took."""
    longest = max(map(len, job.prompts))
    pad = options.get("pad_token_id") or 0
    ids = torch.tensor([[*[pad] * (longest - len(p)), *p] for p in job.prompts], device=method.device)
    mask = torch.tensor([[*[0] * (longest - len(p)), *[1] * len(p)] for p in job.prompts], device=method.device)
    own = dict(options)
    if job.reference is not None:
        text = [*job.prompts[0], *job.reference]
        own |= {"max_new_tokens": len(job.reference), "eos_token_id": None}
        own["logits_processor"] = LogitsProcessorList([Replay(text)])
    start = time.perf_counter()
    out, stats = method.run(ids, attention_mask=mask, **own)
    rows = out[:, longest:].tolist()  # waits for a device
    seconds = time.perf_counter() - start
    stops = own.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    return [_until(row, stops) for row in rows], stats, seconds


def of_steps(stats: Stats) -> dict[str, Any]:
    """What a `Row` says of the steps: rows and plain ones, and the drafts of each source."""
    return {
        "rows_per_step": round(stats.rows_per_step, 2) if stats.steps else None,
        "plain_share": round(stats.plain_share, 3) if stats.steps else None,
        "sources": {
            name: {"proposed": c.proposed, "accepted": c.accepted, "rows": round(c.rows, 1)}
            for name, c in stats.sources.items()
        },
    }


def of_ranks(stats: Stats) -> dict[str, float]:
    """What a `Row` says of several ranks."""
    if stats.ranks == 1 or not stats.steps:
        return {}
    return {
        "ranks": stats.ranks,
        "rows_per_step": round(stats.shard_rows / stats.steps, 2),
        "message_bytes_per_step": round(stats.message_bytes / stats.forwards, 1),
        "sent_bytes_per_step": round(stats.sent_bytes / stats.forwards, 1),
        "collectives_per_step": round(stats.collectives / stats.forwards, 4),
        "communication_share": round(stats.communication_seconds / stats.step_seconds, 5),
    }


def _until(row: list[int], stops: Collection[int]) -> list[int]:
    """A row without the padding behind its end."""
    end = next((i for i, token in enumerate(row) if token in stops), len(row))
    return row[: end + 1]


def warm_up(
    methods: Sequence[Method], jobs: Sequence[Job], options: dict[str, Any], seed: int | None = None
) -> tuple[list[Method], dict[str, str]]:
    """Let every method answer the longest job of each batch size, so that none starts colder than another.

    What is compiled or allocated for a length is so for the longest; and all of it twice, since a method may make way
    for another's larger cache. The arguments are those of `measure`.

    Returns:
        The methods that run here, and of the others (stock ones that fail) the reason by name.
    """
    kept: list[Method] = []
    failed: dict[str, str] = {}
    longest = {len(job.prompts): job for job in sorted(jobs, key=lambda job: job.longest)}  # the last of a size stays
    for method in methods:
        try:
            for job in longest.values():
                answer(method, job, _seeded(options, job, seed))
            kept.append(method)
        except Exception as error:
            if method.name not in OPTIONAL:
                raise
            failed[method.label] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    for method in kept:
        for job in longest.values():
            answer(method, job, _seeded(options, job, seed))
    return kept, failed


def _seeded(options: dict[str, Any], job: Job, seed: int | None, number: int = 0) -> dict[str, Any]:
    """Options of `generate` with a seed per sequence; `number` counts the prompts before the job's."""
    return options if seed is None else options | {"seeds": [seed + number + i for i in range(len(job.prompts))]}


def measure(
    methods: Sequence[Method], jobs: Sequence[Job], options: dict[str, Any], repeat: int = 1, seed: int | None = None
) -> Iterator[list[Row]]:
    """Run every method on every job, taking turns, and give the rows of each job as they come.

    Args:
        methods: what to compare, warmed up.
        jobs: the prompts.
        options: of `generate`, the same for all.
        repeat: times each method runs on a job.
        seed: when sampling.
    """
    for number, job in enumerate(jobs):
        own = _seeded(options, job, seed, number * len(jobs[0].prompts))
        seconds: dict[str, list[float]] = {m.label: [] for m in methods}
        outputs: dict[str, tuple[list[list[int]], Stats | None]] = {}
        for turn in range(repeat):
            for method in methods if turn % 2 == 0 else list(reversed(methods)):
                texts, stats, took = answer(method, job, own)
                seconds[method.label].append(took)
                outputs[method.label] = texts, stats
        first: dict[str, list[list[int]]] = {}
        rows = []
        share = round(min(map(distinct_share, outputs[methods[0].label][0])), 3)
        for method in methods:
            texts, stats = outputs[method.label]
            wanted = first.setdefault(method.dtype, texts)
            times = tuple(round(s, 5) for s in seconds[method.label])
            tokens = sum(map(len, texts))
            same = texts == wanted
            length = stats.mean_acceptance_length if stats and stats.steps else None
            row = Row(number, method.label, method.plain, tokens, times, length, share, same, len(texts))
            rows.append(row if stats is None else replace(row, **of_steps(stats), ranks=of_ranks(stats)))
        yield rows
