"""Text in, text out: streams of decoded steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import LookaheadConfig
from ..draft.shared import Namespace
from ..draft.sources import Propose
from ..model.evaluate import device_of, unwrapped
from ..price.stats import Stats
from ..ranks.group import Ranks
from .generate import LookaheadDecoding, Run, call_generate, check_tokenizer


@dataclass(frozen=True)
class StreamStep:
    """What one step gave.

    Attributes:
        text: characters that became final; the texts of all steps joined are the decoded output.
        token_ids: tokens the step emitted, one or more. A character may span tokens, so text can lag behind them.
        stats: counts so far (one object, updated as the stream goes on).
        finish_reason: "stop" or "length" in the last step, None before.
    """

    text: str
    token_ids: tuple[int, ...]
    stats: Stats
    finish_reason: str | None


class Detokenizer:
    """Turns tokens into final text, as they come.

    Decodes the whole output each time, so that a tokenizer's own rules about spaces apply, and holds back the end
    while it may still change: an unfinished character decodes to U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = 0

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """Characters that became final with `ids`; with `last`, all that are left."""
        self._ids += ids
        text = decode_text(self._tokenizer, self._ids)
        end = len(text) if last else len(text.rstrip("\ufffd"))
        new = text[self._sent : end]
        self._sent = max(self._sent, end)
        return new


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of output tokens, special tokens left out and spaces as the model wrote them."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Token ids of a talk in the tokenizer's chat template, up to where the model's answer begins.

    Args:
        messages: mappings with "role" and "content", as `apply_chat_template` takes them.

    Raises:
        TypeError: messages are none.
        ValueError: there is no template, or it does not take these messages.
    """
    talk = isinstance(messages, Sequence) and all(isinstance(message, Mapping) for message in messages)
    if not talk or not messages:
        raise TypeError(f"messages must be a sequence of mappings with 'role' and 'content', got {messages!r}")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: give the prompt as text")
    try:
        found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # a template is a program of the model's makers, which raises what it likes
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    ids: list[int] = found["input_ids"]
    return ids


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | Sequence[int] | torch.Tensor | None = None,
    *,
    messages: Sequence[Mapping[str, Any]] | None = None,
    lookahead: LookaheadConfig | None = None,
    seed: int | None = None,
    propose: Propose | None = None,
    shared: Namespace | None = None,
    execution: str = "auto",
    release: bool = False,
    parallel: Ranks | None = None,
    **kwargs: Any,
) -> Iterator[StreamStep]:
    """Generate from one prompt, a step at a time.

    To cancel, stop asking: nothing runs between two steps, and several streams on one model may take turns.

    Args:
        model: any causal language model that can check candidates.
        tokenizer: its tokenizer.
        prompt: text, or token ids (a list, or a tensor of one sequence).
        messages: of a talk, in place of a prompt: mappings with "role" and "content", which the tokenizer's chat
            template puts into the form that an instruct model knows.
        lookahead: the sources, and what is fixed.
        seed: for sampling; torch's own generator is used if left out.
        propose, shared: further sources of candidates (see `LookaheadDecoding`).
        execution: how a step runs (see `Target`).
        release: the model gives up its own weights (see `LookaheadDecoding`).
        parallel: the ranks that share every step; each of them takes the same steps.
        kwargs: what `model.generate` takes, such as `max_new_tokens`, `do_sample` or `stop_strings`.

    Returns:
        A generator of steps; prefill is the first. A cache that was passed in is filled when the last one was taken.

    Raises:
        TypeError, ValueError: an argument that is wrong or cannot be honoured, before the first step.
    """
    for name in ("streamer", "return_dict_in_generate"):
        if kwargs.get(name):
            raise ValueError(f"{name}: a stream gives its steps itself; leave it out, or use generate")
    if kwargs.get("num_return_sequences", 1) not in (None, 1):
        raise ValueError("num_return_sequences: a stream has one sequence; start several")
    if not isinstance(lookahead, LookaheadConfig | None):
        raise TypeError(f"lookahead must be a LookaheadConfig, got {lookahead!r}; what else it takes are its arguments")
    if kwargs.pop("attention_mask", None) is not None:
        raise ValueError("attention_mask: a stream has one prompt without padding; leave it out")
    check_tokenizer(tokenizer)
    if (prompt is None) == (messages is None):
        raise TypeError("give a prompt or messages, one of them")
    model = unwrapped(model)
    if messages is not None:
        prompt = chat_ids(tokenizer, messages)
    if isinstance(prompt, torch.Tensor):
        if prompt.ndim > 1 and len(prompt) != 1:
            raise TypeError(f"prompt must be one text or the token ids of one, got shape {tuple(prompt.shape)}")
        prompt = prompt.flatten().tolist()
    if not isinstance(prompt, str | Sequence):
        raise TypeError(f"prompt must be one text or the token ids of one, got {prompt!r}")
    ids: list[int] = tokenizer(prompt).input_ids if isinstance(prompt, str) else list(prompt)
    if not all(isinstance(t, int) for t in ids):
        raise TypeError(f"prompt must be one text or the token ids of one, got {prompt!r}")
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    decoding = LookaheadDecoding(
        lookahead,
        tokenizer=tokenizer,
        seed=seed,
        propose=propose,
        shared=shared,
        execution=execution,
        release=release,
        parallel=parallel,
    )
    input_ids = torch.tensor([ids], device=device_of(model))
    run: Run = call_generate(
        model, decoding, decoding.prepare, inputs=input_ids, attention_mask=torch.ones_like(input_ids), **kwargs
    )
    return _stream(run, Detokenizer(tokenizer))


def _stream(run: Run, detokenizer: Detokenizer) -> Iterator[StreamStep]:
    for (choice,) in run.steps():
        assert choice is not None  # the one sequence runs until it ends
        reason = run.finish_reasons[0] or None
        if reason is not None:
            run.output()
        yield StreamStep(detokenizer.add(choice.tokens, reason is not None), choice.tokens, run.stats, reason)
