"""How a model can check candidates: found out by trying, once per model, and not by its name.

A prompt, a step with a long and a short candidate, commit of the short one, and one more step, against the same tokens
one at a time through transformers' own cache, as `generate` computes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..draft.tree import TokenTree, build_tree
from ..verify.sampler import StepLogits
from .cache import TreeCache, keeps_states_alone
from .evaluate import OURS, cache_name, device_of, parameters_of, text_config
from .memory import memory_of
from .rows import Lockstep, RowSteps
from .trees import TreeSteps

WINDOW = "window|chunk|index.*topk"
STRANGE_WINDOW = re.compile(rf"^(?!(use)?_?sliding_window|max_window_layers|chunk_size_feed_forward).*({WINDOW})")
"""Settings that say a layer does not see every position, other than those we read (docs/decisions/0001)."""

LONGEST = 256
"""Windows up to this size are passed by the probe's prompt."""

PATHS = 4
"""Candidates that are checked as rows."""

Steps = TreeSteps | RowSteps | Lockstep


@dataclass(frozen=True)
class Strategy:
    """How a model checks candidates.

    Attributes:
        name: "tree", one forward with a mask for any tree; "chain", one candidate in a row; or "batch-expanded", each
            candidate as a row of the batch.
        attention: that is in force in a step, by its name in transformers' registry.
        cached_heads: whether our attention meets as many key heads as are cached.
        reasons: why the strategies before it in this list are not taken, and why not our own attention.
        horizon: slots up to which candidates are checked; past a window that the probe could not pass, steps are plain.
        copies: the keys and values of every candidate are copied in every step, since the model wants transformers' own
            cache layers.
    """

    name: str
    attention: str
    cached_heads: bool = False
    reasons: tuple[str, ...] = ()
    copies: bool = False
    horizon: int | None = None

    @property
    def drawback(self) -> str:
        """What is slower than with a tree and our attention; empty if nothing is."""
        return "; ".join(self._drawbacks())

    def _drawbacks(self) -> Iterator[str]:
        if self.name == "tree" and self.attention != OURS:
            own = f"steps use the model's own attention ({self.attention}) with a dense mask, for which it may"
            yield f"{own} copy keys and values in every layer"
        if self.name == "chain":
            yield "a step checks one candidate, by the model's own attention, and a batch is decoded plainly"
        if self.name == "batch-expanded":
            copies = " and whose keys and values are copied in every step" if self.copies else ""
            yield f"candidates are up to {PATHS} rows of a batch{copies}, some accepted tokens are computed twice"
            yield "a batch is decoded plainly"
        if self.horizon is not None:
            yield f"candidates are checked up to {self.horizon} tokens, where a window of an unknown kind takes effect"

    @property
    def paths(self) -> int | None:
        """Candidates that a step checks at most; None is any number."""
        return {"tree": None, "chain": 1, "batch-expanded": PATHS}[self.name]


def probe(model: PreTrainedModel) -> Strategy:
    """Find out, once per model, how it checks candidates exactly.

    Raises:
        ValueError: it cannot; the message names the model's type and what failed.
    """
    config = text_config(model)
    own = config._attn_implementation
    if model.config.is_encoder_decoder:
        raise ValueError(_refusal(model, "it is an encoder-decoder"))
    known = memory_of(model).probed
    try:
        no_cache = cache_name(model.forward) is None or keeps_states_alone(config)
    except Exception as error:  # a configuration that transformers itself makes no cache from
        reason = f"transformers makes no cache for it ({type(error).__name__}: {error})"
        raise ValueError(_refusal(model, reason)) from error
    if no_cache:
        raise ValueError(_refusal(model, "its forward takes no cache of keys and values, to keep the text in"))
    key = (own, model.dtype, device_of(model))
    if key not in known:
        known[key] = found = _search(model)
        if isinstance(found, str) and model.training:
            del known[key]
            raise ValueError("the model is in training mode, where its outputs are random: call model.eval()")
    strategy: Strategy | str = known[key]
    if isinstance(strategy, str):
        raise ValueError(_refusal(model, strategy))
    return strategy


def _refusal(model: PreTrainedModel, reason: str) -> str:
    return f"a model of type {model.config.model_type!r} cannot check candidates: {reason}. Use model.generate"


def _search(model: PreTrainedModel) -> Strategy | str:
    """The first strategy that is exact, or why none is."""
    config = text_config(model)
    own = config._attn_implementation
    reasons = []
    reason = _no_tree(model)
    if reason:
        reasons.append(f"no tree: {reason}")
    else:
        # Where a version of transformers gives a model with capped scores to sdpa, the cap is left out.
        uncapped = own == "sdpa" and getattr(config, "attn_logit_softcapping", None)
        for attention, cached_heads in ((own, False),) if uncapped else ((OURS, False), (OURS, True), (own, False)):

            def trees(attention: str = attention, cached_heads: bool = cached_heads) -> TreeSteps:
                return TreeSteps(model, _capacity(model), 1, attention, "eager", 64, cached_heads)

            reason = _try(model, trees)
            if not reason:
                kept = () if attention == OURS else tuple(reasons)
                return Strategy("tree", attention, cached_heads, kept, horizon=_horizon(model))
            reasons.append(f"{'no tree with ' + attention if attention == own else 'not our attention'}: {reason}")
    for copies in (False, True):

        def rows(copies: bool = copies) -> RowSteps:
            return RowSteps(model, _capacity(model), 2, 64, copies=copies)

        reason = _try(model, rows)
        if not reason:
            name = "batch-expanded" if TreeCache(config, 1, 8, copies=copies).stateful else "chain"
            return Strategy(name, own, reasons=tuple(reasons), copies=copies, horizon=_horizon(model))
    return "; ".join([*dict.fromkeys(reasons), reason])


def _windows(model: PreTrainedModel) -> dict[str, int]:
    """Settings that say how far layers see."""
    config = text_config(model)
    return {n: v for n, v in vars(config).items() if re.search(WINDOW, n) and type(v) is int and v > 1}


def _no_tree(model: PreTrainedModel) -> str:
    """Why a model cannot take a tree, as far as one can tell without trying."""
    config = text_config(model)
    try:
        cache = TreeCache(config, 1, 8)
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        return f"its cache cannot be made ({error})"
    if cache.stateful:
        return "it has layers whose state cannot fork"
    if not cache.kinds:
        return "none of its layers is known to attend"
    if not {"position_ids", "kwargs"} & set(parameters_of(model)):
        return "its forward takes no position_ids, so that positions are slots"
    if config._attn_implementation not in ("eager", "sdpa"):
        name = config._attn_implementation
        return f"its attention is {name!r}, which takes no mask; with attn_implementation='sdpa' it may"
    return ""


def _horizon(model: PreTrainedModel) -> int | None:
    """The smallest window that is too long for the probe and of a kind that is not known."""
    kinds = getattr(text_config(model), "layer_types", None) or ()
    read = {"chunked_attention": "attention_chunk_size", "indexed_attention": "index_topk"}
    known = [name for kind, name in read.items() if kind in kinds]
    strange = [v for n, v in _windows(model).items() if STRANGE_WINDOW.search(n) and n not in known]
    return min([v for v in strange if v > LONGEST], default=None)


def _prompt(model: PreTrainedModel) -> list[int]:
    """Longer than any window that is short enough, and with tokens that repeat, which must not matter."""
    length = max([v for v in _windows(model).values() if v <= LONGEST], default=0) + 4
    vocab = text_config(model).vocab_size
    return [(3 + 2 * (i % 7 if i % 2 else i)) % vocab for i in range(length)]


def _capacity(model: PreTrainedModel) -> int:
    return len(_prompt(model)) + 64


def _try(model: PreTrainedModel, start: Callable[[], TreeSteps | RowSteps]) -> str:
    """What went wrong with a few small steps; empty if they were exact."""
    vocab = text_config(model).vocab_size
    prompt = _prompt(model)
    root, *rest, last = ((len(prompt) * 2 + 3 + 2 * i) % vocab for i in range(10))
    long, short, more = rest[:4], rest[4:6], rest[6:]
    try:
        plain = _plain(model, prompt, [root, *short, *more, last])
        wanted, end = plain[:-1], plain[-1]
        other = _plain(model, prompt, [root, *long])
        steps = _started(start, prompt)
        first = steps.forward([build_tree(root, candidates=[long, short])])
        path = [0, *range(1 + len(long), 1 + len(long) + len(short))]
        aside = _logits(first, range(1 + len(long)))
        accepted = _logits(first, path)
        steps.commit([path])
        second = steps.forward([build_tree(more[0], candidates=[more[1:]])])
        ours = torch.cat([accepted, _logits(second, range(len(more)))])
        steps.commit([range(len(more))])
        single = _logits(steps.forward([build_tree(last)]), [0])[0]
        chain = _logits(_started(start, prompt).forward([build_tree(root, candidates=[[*short, *more]])]), range(5))
        again = _started(start, prompt).forward([build_tree(root, candidates=[long])])
        beside = _logits(again, range(5))
        mixed = (chain - beside)[0].norm()  # of two forwards of one shape and one first row
        if _quantised(model) and model.dtype == torch.float32:  # which shows in some tokens only
            text = [(root + 5 * i) % vocab for i in range(48)]
            several = _logits(_started(start, prompt).forward([build_tree(text[0], candidates=[text[1:]])]), range(48))
            aside, other = several, _plain(model, prompt, text)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the model, or of the compiler of our kernel, which has errors of its own
        return f"the probe raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    # A chain through our cache differs from plain decoding by rounding alone. In half precision that may be more than
    # what tells a wrong tree from a right one: some processors round one row and several in other ways. So there the
    # rows of a tree are held against those of a chain, which rounds as they do, and the chain against plain decoding.
    half = model.dtype in (torch.bfloat16, torch.float16)
    rounding = (chain - wanted).norm()
    furthest = max(rounding / wanted.norm(), (beside - other).norm() / other.norm() if half else torch.tensor(0.0))
    if half:
        wanted, other = chain, beside
    # Where activations are quantised too, a difference of rounding can become one of a level, in some prompts only.
    bound = (1e-4 if _quantised(model) else 1e-3) * wanted.norm()
    if half:
        bound += rounding + 4 * torch.finfo(model.dtype).eps * wanted.norm()
    if mixed > max(1e-5, torch.finfo(model.dtype).eps) * wanted[0].norm():
        return (
            "what one row of a forward gives depends on the others, as where activations are quantised together; with "
            "weights quantised alone (for LLM.int8: llm_int8_threshold=0) it may not"
        )
    if not furthest <= (0.15 if half else 0.1):  # a token that is lost, or should not be seen, makes 0.17 and more
        return "several tokens in one forward have other logits than one at a time"
    if not (ours - wanted).norm() + (single - end).norm() + (aside - other).norm() <= bound:
        return "a candidate beside others, or after a commit, has other logits than the same tokens one at a time" + (
            "; it is quantised, and what is computed for several rows is rounded otherwise: half precision may do"
            if _quantised(model)
            else ""
        )
    return ""


def _quantised(model: PreTrainedModel) -> bool:
    return any(type(p) is not torch.nn.Parameter or p.element_size() == 1 for p in model.parameters())


def _started(start: Callable[[], TreeSteps | RowSteps], prompt: Sequence[int]) -> TreeSteps | RowSteps:
    steps = start()
    steps.prefill([prompt])
    steps.commit([[0]])
    return steps


def _logits(step: StepLogits, nodes: Sequence[int]) -> torch.Tensor:
    """Of these nodes, (nodes, vocab)."""
    row = {node: i for i, node in enumerate(step.nodes)}
    return step.logits[0, [row[node] for node in nodes]].double()


def _plain(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int]) -> torch.Tensor:
    """Logits after each token of a text, fed one at a time, (tokens, vocab)."""
    steps = Lockstep(model, 0, 1)
    steps.prefill([prompt])
    found = [steps.forward([TokenTree((token,), (-1,))]).logits[0, 0] for token in text]
    return torch.stack(found).double()
