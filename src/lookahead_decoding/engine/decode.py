"""The decoding loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from ..config import LookaheadConfig
from ..draft.lookahead import Choice, Lookahead, max_rows
from ..draft.shared import Namespace
from ..draft.sources import Propose
from ..draft.tree import TokenTree
from ..model.target import SINGLE, Target
from ..price.budget import Budget
from ..price.stats import Stats
from ..verify.sampler import Sampler, choose


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
        prompt: its token ids, without padding.
        sampler: picks its tokens and knows where it ends.
        limit: length its text can reach, prompt included, padding not.
        barred: tokens not worth guessing past: those that end it, and padding.
        propose: a further source of candidates.
        shared: text of earlier requests that candidates may come from.
        cached: tokens of the prompt that the target has committed already.
    """

    prompt: tuple[int, ...]
    sampler: Sampler
    limit: int
    barred: frozenset[int] = frozenset()
    propose: Propose | None = None
    shared: Namespace | None = None
    cached: int = 0


@contextmanager
def _timed(stats: Stats, phase: str) -> Iterator[None]:
    start = perf_counter()
    yield
    stats.seconds[phase] += perf_counter() - start


def decode(
    target: Target,
    requests: Sequence[Request],
    config: LookaheadConfig,
    stats: Stats,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[list[Choice | None]]:
    """Lookahead decoding: a generator of steps, each with what every sequence got from it.

    Prefill is the first step. A sequence that has ended gets None. To cancel, stop asking.

    Args:
        target: with room for the requests; what it has committed already comes before the prompts' own tokens.
        requests: one per sequence of the target.
        config: the sources, and what is fixed.
        stats: counts, updated before each step is given out.
        inputs: of the model's own, such as images, that belong to the prompts.

    Raises:
        ValueError: the target has no room for a request or no place for a window that the config asks for, or a shared
            namespace is for another model or not among the sources.
    """
    config = target.fit(config)
    if target.plain and (config.sources or any(r.propose for r in requests)):
        yield from _in_lockstep(target, requests, config, stats, inputs)
        return
    for request, length in zip(requests, target.lengths, strict=True):
        needed = length + request.limit - request.cached + max_rows(config, own_source=request.propose is not None)
        if needed > target.capacity:
            raise ValueError(f"the target's capacity is {target.capacity} slots, and a request needs {needed}")
    for request in requests:
        if request.shared is not None:
            request.shared.bind(target.config.vocab_size)
    lookaheads = [
        Lookahead(
            r.prompt,
            config,
            limit=r.limit,
            stop_ids=r.barred,
            propose=r.propose,
            shared=r.shared,
            reach=target.reach,
            counts=stats.sources,
        )
        for r in requests
    ]
    budget = Budget(target.step_times(config), config, own_source=any(r.propose for r in requests))
    samplers = [r.sampler for r in requests]
    trees: list[TokenTree | None] = [SINGLE] * len(requests)
    with _timed(stats, "prefill"):
        logits = target.prefill([r.prompt[r.cached :] for r in requests], inputs)
    while True:
        with _timed(stats, "choose"):
            choices = choose(logits, trees, samplers, ranks=budget.ranks)
        with _timed(stats, "observe"):
            for lookahead, choice, sampler in zip(lookaheads, choices, samplers, strict=True):
                if choice is not None:
                    lookahead.observe(choice, ended=sampler.finish_reason is not None)
            stats.count(trees, choices)
        with _timed(stats, "commit"):
            target.commit([choice.path if choice else () for choice in choices])
            target.report(stats)
        budget.spent(stats.step_seconds, target.fed_again)
        yield choices
        if all(s.finish_reason for s in samplers):
            return
        with _timed(stats, "plan"):
            pairs = zip(lookaheads, samplers, strict=True)
            trees = budget.plan([None if sampler.finish_reason else lookahead for lookahead, sampler in pairs])
        with _timed(stats, "forward"):
            logits = target.forward(trees)


def autoregressive(
    target: Target,
    requests: Sequence[Request],
    config: LookaheadConfig,
    stats: Stats,
    inputs: Mapping[str, Any] | None = None,
) -> Iterator[list[Choice | None]]:
    """Plain decoding, with the signature of `decode`: every step is the current token alone."""
    plain = [replace(r, propose=None, shared=None) for r in requests]
    return decode(target, plain, replace(config, sources=()), stats, inputs)


def _in_lockstep(
    target: Target, requests: Sequence[Request], config: LookaheadConfig, stats: Stats, inputs: Mapping[str, Any] | None
) -> Iterator[list[Choice | None]]:
    """Plain decoding of a batch that takes no trees: its answers join the shared text all the same."""
    texts = [list(r.prompt) for r in requests]
    for choices in autoregressive(target, requests, config, stats, inputs):
        for text, choice in zip(texts, choices, strict=True):
            text += choice.tokens if choice else ()
        yield choices
    for request, text in zip(requests, texts, strict=True):
        if request.shared is not None:
            request.shared.bind(target.config.vocab_size)
            request.shared.keep(text, len(request.prompt))
