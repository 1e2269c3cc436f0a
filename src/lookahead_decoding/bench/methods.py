"""The methods that a benchmark compares."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..config import PLAIN, LookaheadConfig
from ..hf import LookaheadDecoding, generate
from .result import Row, distinct_share

METHODS = ("autoregressive", "lookahead", "hf-greedy", "hf-static", "hf-prompt-lookup")
PLAIN_METHODS = ("autoregressive", "hf-greedy", "hf-static")


class Replay(LogitsProcessor):  # type: ignore[misc]
    """Forces the tokens of a reference text, so that acceptance is measured on text that people wrote.

    Args:
        ids: the text, prompt included.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
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
        run: prompt (1, length) and options of `generate` to the whole text (1, length) and the mean acceptance length.
    """

    name: str
    dtype: str
    device: torch.device
    run: Callable[..., tuple[torch.Tensor, float | None]]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.dtype}"

    @property
    def plain(self) -> bool:
        return self.name in PLAIN_METHODS


def make(name: str, dtype: str, model: PreTrainedModel, config: LookaheadConfig) -> Method:
    """A method by its name.

    Raises:
        ValueError: no such method.
    """

    def ours(settings: LookaheadConfig) -> Callable[..., tuple[torch.Tensor, float | None]]:
        def run(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, float | None]:
            seeds = options.pop("seeds", None)
            decoding = LookaheadDecoding(settings, seeds=seeds)
            out = generate(model, ids, lookahead=decoding, **options)
            return out, decoding.stats.mean_acceptance_length

        return run

    def stock(**extra: Any) -> Callable[..., tuple[torch.Tensor, float | None]]:
        def run(ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, float | None]:
            if (seeds := options.pop("seeds", None)) is not None:
                torch.manual_seed(seeds[0])
            return model.generate(ids, **options, **extra), None

        return run

    runs = {
        "autoregressive": ours(PLAIN),
        "lookahead": ours(config),
        "hf-greedy": stock(),
        "hf-static": stock(cache_implementation="static"),
        "hf-prompt-lookup": stock(prompt_lookup_num_tokens=10),
    }
    if name not in runs:
        raise ValueError(f"no method {name!r}: choose from {', '.join(METHODS)}")
    return Method(name, dtype, model.device, runs[name])


def measure(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    options: dict[str, Any],
    repeat: int = 1,
    replays: Sequence[Sequence[int]] | None = None,
    seed: int | None = None,
) -> Iterator[list[Row]]:
    """Run every method on every prompt, taking turns, and give the rows of each prompt as they come.

    All methods run once on the first prompt before anything is timed, so none starts colder than another.

    Args:
        methods: what to compare.
        prompts: token ids of each prompt.
        options: of `generate`, the same for all.
        repeat: times each method runs on a prompt.
        replays: for each prompt the tokens of the reference that follow it; they are forced.
        seed: when sampling.
    """

    def run(method: Method, number: int) -> tuple[list[int], float | None, float]:
        prompt = list(prompts[number])
        ids = torch.tensor([prompt], device=method.device)
        own = dict(options)
        if seed is not None:
            own["seeds"] = [seed + number]
        if replays is not None:
            text = [*prompt, *replays[number]]
            own |= {"max_new_tokens": len(replays[number]), "eos_token_id": None}
            own["logits_processor"] = LogitsProcessorList([Replay(text)])
        start = time.perf_counter()
        out, length = method.run(ids, attention_mask=torch.ones_like(ids), **own)
        tokens = out[0, ids.shape[1] :].tolist()  # waits for a device
        return tokens, length, time.perf_counter() - start

    for method in methods:
        run(method, 0)
    for number in range(len(prompts)):
        seconds: dict[str, list[float]] = {m.label: [] for m in methods}
        outputs: dict[str, tuple[list[int], float | None]] = {}
        for turn in range(repeat):
            for method in methods if turn % 2 == 0 else list(reversed(methods)):
                tokens, length, took = run(method, number)
                seconds[method.label].append(took)
                outputs[method.label] = tokens, length
        first: dict[str, list[int]] = {}
        rows = []
        for method in methods:
            tokens, length = outputs[method.label]
            wanted = first.setdefault(method.dtype, tokens)
            times = tuple(round(s, 5) for s in seconds[method.label])
            share = round(distinct_share(outputs[methods[0].label][0]), 3)
            rows.append(Row(number, method.label, method.plain, len(tokens), times, length, share, tokens == wanted))
        yield rows
