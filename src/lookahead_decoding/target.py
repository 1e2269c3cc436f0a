"""The model being served: what we know about the inside of transformers is here and in the cache beside it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from . import profile
from .attention import LENGTH, attend, dense_mask, encode_rows
from .budget import StepTimes
from .cache import TreeCache
from .choose import StepLogits
from .config import LookaheadConfig
from .graphs import PACKED, Compiled, StepGraphs, padded, vary
from .packed import PackedLinears, copied_bytes, version_of, why_not
from .tree import TokenTree, build_tree

SINGLE = TokenTree((0,), (-1,))
"""The tree of a sequence's last prompt token, which prefill evaluates."""

OURS = "lookahead_tree"
"""The name of our attention in transformers' registries."""

STRANGE_WINDOW = re.compile(r"^(?!(use)?_?sliding_window|max_window_layers|chunk_size_feed_forward).*(window|chunk)")
"""Settings that say a layer does not see every position, other than those we read (docs/decisions/0001)."""

COMPILE = ("auto", "off", "packed", "graphs", "full")
"""How a step may run (see `Target`)."""
PREFILL_CHUNK = 2048
"""Tokens of a prompt in one forward."""

ROUND = 256
"""Slots that a captured cache is rounded up to, so that requests of similar length share it."""


Masks = dict[str, torch.Tensor]
"""A mask per kind of layer; none at all is causal attention."""

PACKED_UNASKED = 2**31
"""Bytes of weights that are held a second time without being asked for."""

KEPT = 4
"""Captured caches that wait for a request, of one model: each holds its keys and values and its graphs."""


class _Known:
    """What was found out about a model: it costs forwards or compilation, so each model pays once."""

    def __init__(self) -> None:
        self.probed: dict[object, tuple[str, str]] = {}
        self.free: list[_Room] = []
        self.compiled: tuple[object, Compiled] | None = None
        self.packed: tuple[object, PackedLinears] | None = None
        self.times: dict[object, StepTimes] = {}


_known: WeakKeyDictionary[PreTrainedModel, _Known] = WeakKeyDictionary()
"""Hangs on the model's life and on nothing else, which is why it is the one piece of global state."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Our attention with the signature of transformers; it is in force during our own steps alone."""
    ours = attention_mask is not None and (attention_mask.dtype == torch.int32 or attention_mask.is_floating_point())
    if not ours or position_bias is not None:
        raise ValueError("a step's attention needs our mask and takes no position bias")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return attend(query, key, value, attention_mask, scale, softcap or 0.0, s_aux), None


AttentionInterface.register(OURS, _attend)
AttentionMaskInterface.register(OURS, sdpa_mask)


class Target:
    """A causal language model that evaluates token trees, for a batch of sequences of their own lengths.

    While a target works, nothing else may use its model, in another thread least of all.

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` gives.
        capacity: slots per sequence: the longest length one can reach, plus the rows of the largest tree.
        batch: sequences.
        compile: how a step runs. "off": as the model is. "packed": as the model is, with a second copy of the weights
            of its linear layers that is laid out for few rows, in float32 and bfloat16 on a CPU. "graphs":
            padded to fixed shapes and, on a GPU, captured once per size. "full": compiled with torch.compile, and
            captured too on a GPU; a CPU takes minutes for it, and in bfloat16 holds a second copy of the weights as
            well. "auto": "full" on a GPU, or "off" with a warning if that cannot be; elsewhere "packed" where that can
            be and the copy takes at most 2 GiB, or "off". A copy is kept for the model's life, and made anew when the
            weights have changed; of changes made through `.data`, a sample is looked at.

    Raises:
        ValueError: the model cannot take a token tree, or its step cannot be compiled as asked; the message says why.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int = 1, compile: str = "auto") -> None:
        if compile not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {compile!r}")
        attention = probe(model)
        wanted = _best_way(model) if compile == "auto" else compile
        reason = _not_ready(model, attention, wanted)
        if reason and compile != "auto":
            raise ValueError(f"compile={compile!r} cannot be: {reason}. Leave it out")
        if reason:
            warnings.warn(f"steps run uncompiled: {reason}", stacklevel=2)
        self._start(model, capacity, batch, attention, "off" if reason else wanted)

    @classmethod
    def with_attention(
        cls, model: PreTrainedModel, capacity: int, attention: str | None = None, packed: bool = False
    ) -> Target:
        """A target for one sequence with a given attention, unprobed; the model's own by default."""
        target = cls.__new__(cls)
        own: str = model.config.get_text_config(decoder=True)._attn_implementation
        target._start(model, capacity, 1, attention or own, "packed" if packed else "off")
        return target

    def _start(self, model: PreTrainedModel, capacity: int, batch: int, attention: str, compile: str) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.attention = attention
        self.how = compile
        self._room: _Room | None = None
        self._compiled: Compiled | None = None
        self._weights: AbstractContextManager[None] = _packed(model) if compile == "packed" else nullcontext()
        if compile in ("off", "packed") or (compile == "full" and model.device.type != "cuda"):
            self.cache = TreeCache(len(DynamicCache(config=self.config).layers), batch, capacity)
            if compile == "full":
                self._compiled = _compiled(model)
        else:  # what was captured for an earlier request serves this one as well
            self._room = _room(model, self.config, capacity + ROUND, batch, compile)
            self.cache = self._room.cache
            self.cache.slots.lengths[:] = [0] * batch
            weakref.finalize(self, _keep, _known[model].free, self._room)
        self._keep_index = "logits_to_keep" in parameters_of(model)
        self._kinds = mask_kinds(self.config)
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        heads = self.config.num_attention_heads
        key_heads = getattr(self.config, "num_key_value_heads", None) or heads
        self._groups = heads // key_heads if attention == OURS else 1

    def step_times(self, config: LookaheadConfig) -> StepTimes:
        """t(n) of this model, by rows per sequence: as the caller has it, or as steps like this one have shown."""
        if config.step_times is not None:
            return StepTimes(config.step_times)
        if not config.adaptive:
            return StepTimes([(1, 1.0)])
        known = _known.setdefault(self.model, _Known()).times
        key = len(self.lengths), self.how, self.model.dtype, self.model.device, torch.get_num_threads()
        if key not in known:
            known[key] = StepTimes(profile.load(self.machine) or ())
        return known[key]

    @property
    def machine(self) -> profile.Machine:
        """What the time of a step depends on, besides its rows."""
        return profile.machine_of(self.model, self.how, len(self.lengths))

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return self.cache.lengths

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.cache.slots.capacity

    def prefill(self, prompts: Sequence[Sequence[int]]) -> StepLogits:
        """Evaluate the prompts behind what is committed, and return the logits after the last token of each.

        All but the last token is committed. That one is the step's root and waits for `commit`, as after any forward.
        Long prompts go in chunks, which are counted from the end: the last one holds the last token of each.

        Args:
            prompts: token ids of each sequence, without padding, at least one each.
        """
        chunks = -(-max(map(len, prompts)) // PREFILL_CHUNK)
        for left in reversed(range(chunks)):
            ends = [max(0, len(p) - left * PREFILL_CHUNK) for p in prompts]
            parts = [p[max(0, end - PREFILL_CHUNK) : end] for p, end in zip(prompts, ends, strict=True)]
            last = [max(0, len(part) - 1) for part in parts]
            logits = self._prefill(parts, sorted(set(last)))
            self.cache.commit([range(len(part) if left else n) for part, n in zip(parts, last, strict=True)])
        row = {node: i for i, node in enumerate(sorted(set(last)))}
        logits = torch.stack([logits[b, row[node]] for b, node in enumerate(last)])[:, None]  # (batch, 1, vocab)
        if self._compiled:  # the next request has other buffers
            vary(*(b for layer in self.cache.layers for b in (layer.keys, layer.values)), dimensions=(0, 2))
        return StepLogits(logits, (0,))

    def _prefill(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of the rows in `keep`, by the model's own attention where all sequences are equally far."""
        if self.cache.slots.level:
            return self._causal(parts, keep)
        chains = [TokenTree(tuple(p), tuple(range(-1, len(p) - 1))) if p else None for p in parts]
        return self._forward(chains, max(map(len, parts)), keep, None)

    def _causal(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of tokens in a row, by the model's own attention; all sequences are equally far."""
        nodes = max(map(len, parts))
        ids = np.array([[*p, *[0] * (nodes - len(p))] for p in parts])  # padding on the right is never seen
        positions = np.broadcast_to(np.arange(nodes) + self.lengths[0], ids.shape)
        return self._call(ids, positions, {}, keep)

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """Evaluate one tree per sequence behind its committed tokens; None where the sequence has ended."""
        keep = sorted({node for tree in trees if tree is not None for node in tree.scored})
        nodes = max(len(t) for t in trees if t is not None)
        if nodes == 1 and self.cache.slots.level and self._room is None and self._compiled is None:
            # Roots alone need no mask, which saves a tenth of a small model's step (docs/LOG.md).
            roots = [tree.tokens if tree is not None else () for tree in trees]
            with self._weights:
                return StepLogits(self._causal(roots, keep), tuple(keep))
        if self._room is None:
            with self._weights:
                return StepLogits(self._forward(trees, nodes, keep, self._compiled), tuple(keep))
        ids, positions = self._inputs(trees, padded(nodes))
        rows = [encode_rows(trees, self.lengths, padded(nodes), window) for window in self._kinds.values()]
        with self._our_attention(), torch.no_grad():
            logits, best = self._room.graphs.run(self.model, ids, positions, rows, keep)
        return StepLogits(logits, tuple(keep), best)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the keys and values of each path, root first, and drop the rest of the last forward."""
        self.cache.commit(paths)

    def store(self, past: DynamicCache, starts: Sequence[int]) -> None:
        """Fill `past` as `generate` would have left it; a captured cache serves further requests, so it is copied."""
        self.cache.store(past, starts, share=self._room is None)

    def _inputs(self, trees: Sequence[TokenTree | None], nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """Token and position ids, (batch, nodes)."""
        ids = np.zeros((len(trees), nodes), dtype=np.int64)
        positions = np.array(self.lengths)[:, None].repeat(nodes, 1)
        for b, tree in enumerate(trees):
            if tree is not None:
                ids[b, : len(tree)] = tree.tokens
                positions[b, : len(tree)] += tree.depths
        return ids, positions

    def _forward(
        self, trees: Sequence[TokenTree | None], nodes: int, keep: list[int], compiled: Compiled | None
    ) -> torch.Tensor:
        ids, positions = self._inputs(trees, nodes)
        masks = {kind: self._mask(trees, nodes, window) for kind, window in self._kinds.items()}
        with self._our_attention():
            return self._call(ids, positions, masks, keep, compiled)

    def _mask(self, trees: Sequence[TokenTree | None], nodes: int, sliding_window: int | None) -> torch.Tensor:
        rows = encode_rows(trees, self.lengths, nodes, sliding_window)
        if self.attention == OURS and self.model.device.type == "cuda" and kernel_found():
            return torch.from_numpy(rows).to(self.model.device)
        return dense_mask(rows, self._dtype, self._groups).to(self.model.device)

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        before = self.config._attn_implementation
        self.config._attn_implementation = self.attention
        try:
            yield
        finally:
            self.config._attn_implementation = before

    @torch.no_grad()
    def _call(
        self, ids: np.ndarray, positions: np.ndarray, masks: Masks, keep: list[int], compiled: Compiled | None = None
    ) -> torch.Tensor:
        """Logits of the rows in `keep`, (batch, len(keep), vocab)."""
        device = self.model.device
        tensors = torch.from_numpy(ids).to(device), torch.tensor(positions).to(device)
        if not self._keep_index:
            return _evaluate(self.model, self.cache, *tensors, masks)[:, keep]
        kept = torch.tensor(keep)
        if compiled is None:
            return _evaluate(self.model, self.cache, *tensors, masks, kept)
        if len(keep) == 1 < ids.shape[1]:  # a size of 1 would compile anew
            kept = kept.repeat(2)
        index = torch.tensor(self.lengths)[:, None] + torch.arange(ids.shape[1])  # (batch, nodes)
        vary(*tensors, *masks.values(), kept, index)
        return compiled(self.model, self.cache, *tensors, masks, kept, index)


def _evaluate(
    model: PreTrainedModel,
    cache: TreeCache,
    ids: torch.Tensor,
    positions: torch.Tensor,
    masks: Masks,
    keep: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of one forward, (batch, kept rows, vocab).

    Args:
        ids, positions: (batch, nodes).
        keep: rows that need logits; all by default.
        index: the slot of every row, (batch, nodes); by default they stand behind each sequence's committed tokens.
    """
    cache.slots.index = index
    options = {} if keep is None else {"logits_to_keep": keep}
    logits: torch.Tensor = model(
        input_ids=ids,
        position_ids=positions,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values()), None),
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **options,
    ).logits
    cache.slots.index = None
    return logits


@dataclass
class _Room:
    """A cache whose steps are captured: it outlives the request it was made for."""

    cache: TreeCache
    graphs: StepGraphs
    compile: str
    weights: object

    @property
    def kind(self) -> tuple[int, str, object]:
        """Sequences, how it runs, and where the weights were that its graphs read."""
        return len(self.cache.lengths), self.compile, self.weights


def _keep(free: list[_Room], room: _Room) -> None:
    """A room waits for another request; the oldest go, since each holds memory."""
    free.append(room)
    del free[:-KEPT]


def _room(model: PreTrainedModel, config: Any, capacity: int, batch: int, compile: str) -> _Room:
    """A free room that is large enough, or a new one, which smaller ones then make way for."""
    free = _known[model].free
    kind = (batch, compile, tuple(p.data_ptr() for p in model.parameters()))
    for room in free:
        if room.kind == kind and room.cache.slots.capacity >= capacity:
            free.remove(room)
            return room
    free[:] = [room for room in free if room.kind[:2] != kind[:2]]
    capacity = -(-capacity // ROUND) * ROUND
    cache = TreeCache(len(DynamicCache(config=config).layers), batch, capacity)
    kinds = list(mask_kinds(config))

    def forward(
        model: Any, ids: torch.Tensor, positions: torch.Tensor, rows: list[torch.Tensor], keep: torch.Tensor
    ) -> torch.Tensor:
        index = rows[0][:, 0, :, LENGTH].long() + torch.arange(ids.shape[1], device=ids.device)
        return _evaluate(model, cache, ids, positions, dict(zip(kinds, rows, strict=True)), keep, index)

    return _Room(cache, StepGraphs(forward, model.device, compile == "full"), compile, kind[2])


def _compiled(model: PreTrainedModel) -> Compiled:
    """The compiled step of a model; compiled anew for changed weights, which a packed copy would not follow."""
    known = _known[model]
    packed = model.device.type == "cpu" and model.dtype == torch.bfloat16
    weights = packed and version_of(model)
    if known.compiled is None or known.compiled[0] != weights:
        if known.compiled is not None:
            torch.compiler.reset()
        known.compiled = weights, Compiled(_evaluate, PACKED if packed else None)
    return known.compiled[1]


def _packed(model: PreTrainedModel) -> PackedLinears:
    """The packed weights of a model; packed anew when they have changed."""
    known = _known.setdefault(model, _Known())
    weights = version_of(model)
    if known.packed is None or known.packed[0] != weights:
        known.packed = None  # gives its memory back first
        known.packed = weights, PackedLinears(model)
    return known.packed[1]


def _best_way(model: PreTrainedModel) -> str:
    """How a step runs where nobody says so."""
    if model.device.type == "cuda":
        return "full"
    return "off" if why_not(model) or copied_bytes(model) > PACKED_UNASKED else "packed"


def _not_ready(model: PreTrainedModel, attention: str, compile: str) -> str:
    """Why a step cannot be compiled or captured; empty if it can, or need not."""
    if compile == "off":
        return ""
    if compile == "packed":
        return why_not(model)
    if attention != OURS:
        return "the model takes no attention but its own"
    if "logits_to_keep" not in parameters_of(model):
        return "the model's forward has no logits_to_keep"
    device = model.device.type
    if device not in ("cpu", "cuda"):
        return f"a device of type {device!r} is not supported"
    if compile == "graphs" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "steps are captured on a GPU only"
    if not kernel_found() and (compile == "graphs" or device == "cuda"):
        return "Triton, which the attention kernel is written in, is not installed"
    return ""


@functools.cache
def kernel_found() -> bool:
    """Whether Triton, which our kernel is written in, can be imported."""
    return importlib.util.find_spec("triton") is not None


def parameters_of(model: PreTrainedModel) -> Collection[str]:
    """Names that the model's forward takes."""
    return inspect.signature(model.forward).parameters.keys()


def mask_kinds(config: Any) -> dict[str, int | None]:
    """The kinds of attention mask that a model's layers want, each with its sliding window.

    Raises:
        ValueError: a kind of layer that has no key for every position.
    """
    types = getattr(config, "layer_types", None)
    sliding_window = getattr(config, "sliding_window", None)
    if not types:
        return {"sliding_attention" if sliding_window else "full_attention": sliding_window}
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(f"it has layers of kind {', '.join(unknown)}")
    return {kind: sliding_window if kind == "sliding_attention" else None for kind in sorted(set(types))}


def check_length(model: PreTrainedModel, length: int) -> None:
    """Refuse a length at which a rotary scaling changes its frequencies for tokens it already placed.

    Raises:
        ValueError: a sequence of `length` tokens would cross such a point.
    """
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings") or config.max_position_embeddings
            if length > original:
                raise ValueError(
                    f"{entry['rope_type']} rotary scaling changes past {original} tokens, and this request can reach "
                    f"{length}: shorten it or use model.generate"
                )


def probe(model: PreTrainedModel) -> str:
    """Find out, once per model, whether and how it evaluates token trees exactly.

    A prompt, a tree with a long branch and a short one, commit of the short one, and one more step, against forwards of
    the same texts without a cache. Our attention is tried first, then the model's own with a dense mask.

    Returns:
        The name of the attention to use, as `config._attn_implementation` takes it.

    Raises:
        ValueError: it does not; the message names the model's type and what failed.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    reason = _unsuitable(model, config)
    if not reason:
        known = _known.setdefault(model, _Known()).probed
        key = (own, model.dtype, model.device)
        if key not in known:
            found = ("", "")
            # Where a version of transformers gives a model with capped scores to sdpa, the cap is left out.
            uncapped = own == "sdpa" and getattr(config, "attn_logit_softcapping", None)
            for attention in (own,) if uncapped else (OURS, own):
                reason = _try(model, attention)
                if not reason:
                    found = (attention, "")
                    break
                found = ("", reason)
            if found[1] and model.training:
                raise ValueError("the model is in training mode, where its outputs are random: call model.eval()")
            known[key] = found
        attention, reason = known[key]
        if not reason:
            return attention
    raise ValueError(
        f"a model of type {model.config.model_type!r} cannot take a token tree: {reason}. Use model.generate"
    )


def _unsuitable(model: PreTrainedModel, config: Any) -> str:
    """Why a model cannot take a tree, as far as its configuration says."""
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "its attention has ALiBi biases, which go by slot and not by position"
    strange = sorted(n for n, v in vars(config).items() if STRANGE_WINDOW.search(n) and isinstance(v, int) and v > 1)
    if strange:
        return f"its configuration has {', '.join(strange)}, which says that layers are windowed in an unknown way"
    if config._attn_implementation not in ("eager", "sdpa"):
        name = config._attn_implementation
        return f"its attention is {name!r}, which takes no mask; load it with attn_implementation='sdpa'"
    try:
        mask_kinds(config)
    except ValueError as error:
        return str(error)
    return ""


def _try(model: PreTrainedModel, attention: str) -> str:
    """What went wrong with a small tree; empty if it was exact."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    prompt, long, short, more = (
        [t % vocab for t in range(a, b, 2)] for a, b in ((3, 11), (13, 27), (29, 33), (35, 39))
    )
    root = prompt.pop()

    def started() -> Target:
        target = Target.with_attention(model, 64, attention)
        target.prefill([[*prompt]])
        target.commit([[0]])
        return target

    def plain(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        return logits.double()

    try:
        target = started()
        first = target.forward([build_tree(root, candidates=[long, short])]).logits[0].double()
        branch = range(1 + len(long), 1 + len(long) + len(short))
        target.commit([[0, *branch]])
        second = target.forward([build_tree(more[0], candidates=[more[1:]])]).logits[0].double()
        chain = started().forward([build_tree(root, candidates=[[*short, *more]])]).logits[0].double()
        ours = torch.cat([first[[0, *branch]], second])
        wanted = plain([*prompt, root, *short, *more])[len(prompt) :]
        other = plain([*prompt, root, *long])[len(prompt) :]
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        return f"the probe raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    # A chain through our cache differs from plain decoding by rounding alone; in half precision that is a yardstick,
    # beside the precision itself, since a chain may happen to be computed exactly as plain decoding is.
    rounding = (chain - wanted).norm()
    bound = 1e-3 * wanted.norm()
    if model.dtype in (torch.bfloat16, torch.float16):
        bound += 3 * rounding + 4 * torch.finfo(model.dtype).eps * wanted.norm()
    if rounding > 0.1 * wanted.norm():
        return "a row of tokens through a cache of ours gives other logits than without one"
    if not ((ours - wanted).norm() <= bound and (first[: 1 + len(long)] - other).norm() <= bound):
        return "a branch of a small tree gives other logits than the same tokens in a row"
    return ""
