"""Answers to prompts, as the commands print them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter
from typing import TYPE_CHECKING, Any

from .loading import Problem, Prompt, first_line, room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..hf.generate import LookaheadDecoding, Run


@dataclass(frozen=True)
class Answer:
    """One prompt's result, as `--json` prints it; rows, sources and times are those of its batch.

    Attributes:
        index: of the prompt in its file, from 0.
        prompt: the text, or the messages.
    """

    index: int
    prompt: str | list[dict[str, Any]]
    output_ids: list[int]
    text: str
    prompt_tokens: int
    tokens: int
    steps: int
    mean_acceptance_length: float
    rows_per_step: float | None
    plain_share: float | None
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


def releases(model: PreTrainedModel, execution: str, ranks: object = None) -> bool:
    """Whether a model that a command has loaded for itself can give up its own weights, for those of its program.

    Raises:
        Problem: its steps cannot run as asked.
    """
    from ..model.target import Target

    try:
        return ranks is None and Target(model, 8, execution=execution).execution == "native"
    except ValueError as error:
        raise Problem(first_line(error)) from error


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Prompt],
    decoding: LookaheadDecoding,
    options: dict[str, Any],
    on_step: Callable[[tuple[int, ...]], None] = lambda tokens: None,
    first: int = 0,
) -> list[Answer]:
    """Generate for a batch of prompts, counting each one's own steps.

    Args:
        prompts: token ids of each.
        asked: what the user wrote.
        options: of `generate`.
        on_step: gets the tokens of the first sequence as they come.
        first: index of the batch's first prompt.
    """
    import torch

    from ..bench.methods import of_steps
    from ..hf.generate import call_generate
    from ..hf.stream import decode_text

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
            index=first + b,
            prompt=asked[b].content,
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
        for b, (prompt, output, count, reason) in enumerate(
            zip(prompts, outputs, forwards, run.finish_reasons, strict=True)
        )
    ]
