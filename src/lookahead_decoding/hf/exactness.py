"""Comparison with plain decoding: is the output the same, and if not, is that a bug?

The contract is in docs/exactness.md. Where steps are row-invariant, plain decoding by the same steps must have the same
tokens. Otherwise only the first divergence counts, by its margin: how far apart plain decoding's two best tokens were.
When sampling, that is the margin of log p - log q, q being the exponential noise of the draw.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import PLAIN
from .generate import LookaheadDecoding, generate

NEAR_TIE = 1e-4
"""Largest margin, in logits, at which rounding in float32 may decide between two tokens."""


@dataclass(frozen=True)
class Divergence:
    """Where an output first differs from plain decoding's.

    Attributes:
        position: tokens generated before it.
        margin: of plain decoding's best token over its second best there, in units of logits.
        bound: the margin above which the contract calls it a bug.
        near_tie: the margin is below the bound and, in float32, the outputs agree in float64.
    """

    position: int
    margin: float
    bound: float
    near_tie: bool


def compare(
    model: PreTrainedModel, input_ids: torch.Tensor, decoding: LookaheadDecoding, seed: int = 0, **kwargs: Any
) -> Divergence | None:
    """Generate plainly with transformers and with lookahead from the same torch seed, and compare.

    Args:
        input_ids: one prompt, (1, length).
        decoding: its `stats` are those of this prompt afterwards.
        kwargs: what `model.generate` takes, such as `max_new_tokens` and `do_sample`.

    Returns:
        None where the outputs are identical.
    """
    plain, ours = _both(model, input_ids, decoding, seed, kwargs)
    if decoding.stats.row_invariant:
        own = _by_the_same_steps(model, input_ids, decoding, seed, kwargs)
        if own != ours:
            parted = (i for i, (a, b) in enumerate(zip(own, ours, strict=False)) if a != b)
            return Divergence(next(parted, min(len(own), len(ours))), 0.0, 0.0, False)
    if plain == ours:
        return None
    pairs = zip(plain, ours, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:  # one goes on where the other ends, which no rounding explains
        return Divergence(min(len(plain), len(ours)), math.inf, NEAR_TIE, False)
    margin = _margin(model, input_ids, seed, position, kwargs)
    if _dtype(model) in (torch.float32, torch.float64):
        wide = copy.deepcopy(model).double()
        again = LookaheadDecoding(decoding.config, propose=decoding.propose, shared=decoding.shared)
        again.parallel = decoding.parallel
        first, second = _both(wide, input_ids, again, seed, kwargs)
        return Divergence(position, margin, NEAR_TIE, margin < NEAR_TIE and first == second)
    bound = 2 * _teacher_forced_difference(model, input_ids, seed, kwargs)
    return Divergence(position, margin, bound, margin <= bound)


def _by_the_same_steps(
    model: PreTrainedModel, ids: torch.Tensor, decoding: LookaheadDecoding, seed: int, kwargs: dict[str, Any]
) -> list[int]:
    """The tokens of plain decoding, whose steps run as those of `decoding`."""
    plain = LookaheadDecoding(PLAIN, execution=decoding.execution, parallel=decoding.parallel)
    torch.manual_seed(seed)
    out = generate(model, ids, attention_mask=torch.ones_like(ids), lookahead=plain, **kwargs)
    assert isinstance(out, torch.Tensor)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


def _dtype(model: PreTrainedModel) -> torch.dtype:
    dtype: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return dtype


def _both(
    model: PreTrainedModel, ids: torch.Tensor, decoding: LookaheadDecoding, seed: int, kwargs: dict[str, Any]
) -> tuple[list[int], list[int]]:
    outputs = []
    for method in (model.generate, lambda *a, **k: generate(model, *a, lookahead=decoding, **k)):
        torch.manual_seed(seed)
        outputs.append(method(ids, attention_mask=torch.ones_like(ids), **kwargs)[0, ids.shape[1] :].tolist())
    if decoding.parallel is not None:  # whatever follows, all ranks do it, or none
        outputs[0] = json.loads(decoding.parallel.spoken(json.dumps(outputs[0])))
    return outputs[0], outputs[1]


def _plain(model: PreTrainedModel, ids: torch.Tensor, seed: int, kwargs: dict[str, Any], tokens: int | None) -> Any:
    torch.manual_seed(seed)
    if tokens is not None:
        kwargs = {**kwargs, "max_new_tokens": tokens}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **kwargs,
    )


def _margin(model: PreTrainedModel, ids: torch.Tensor, seed: int, position: int, kwargs: dict[str, Any]) -> float:
    """Plain decoding's top-2 margin for the token at `position`, in its processed scores."""
    scores = _plain(model, ids, seed, kwargs, position + 1).scores[position][0]
    ranked = scores
    if kwargs.get("do_sample"):
        # Leave torch's generator where plain decoding's draw of this token found it, and draw the same noise.
        torch.manual_seed(seed)
        if position:
            _plain(model, ids, seed, kwargs, position)
        probabilities = torch.nn.functional.softmax(scores[None], dim=-1)
        noise = torch.empty_like(probabilities).exponential_(1)
        ranked = (probabilities.log() - noise.log())[0]
    best = ranked.topk(2).values
    return float(best[0] - best[1])


def _teacher_forced_difference(model: PreTrainedModel, ids: torch.Tensor, seed: int, kwargs: dict[str, Any]) -> float:
    """Largest logit difference between plain steps and one forward of the same text."""
    plain = _plain(model, ids, seed, kwargs, None)
    with torch.no_grad():
        forced = model(plain.sequences).logits[0, ids.shape[1] - 1 : -1].float()  # (tokens, vocab)
    return float((torch.cat(plain.logits) - forced).abs().max())
