"""The model being served: everything we know about the inside of transformers is here and in the cache beside it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from .attention import tree_mask
from .cache import TreeCache
from .choose import StepLogits
from .tree import TokenTree

_probed: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""Models that the probe has seen, with why they failed or ''. It costs a few forwards, so each model pays once."""

SINGLE = TokenTree((0,), (-1,))
"""The tree of a sequence's last prompt token, which prefill evaluates."""

STRANGE_WINDOW = re.compile(r"^(?!(use)?_?sliding_window|max_window_layers|chunk_size_feed_forward).*(window|chunk)")
"""Names of settings that say a layer does not see every position, other than those we read."""

WINDOWS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
}


class Target:
    """A causal language model that evaluates token trees, for a batch of sequences of their own lengths.

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` gives.
        prompts: token ids of each sequence, without padding, at least one each.
        capacity: longest length a sequence can reach, plus the rows of the largest tree.

    Raises:
        ValueError: the model cannot take a token tree; the message says why.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int = 1) -> None:
        self.model = model
        self._config = model.config.get_text_config(decoder=True)
        check(model)
        _check_length(self._config, capacity)
        self._keep_index = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._kinds = mask_kinds(self._config)
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.cache = TreeCache(len(DynamicCache(config=self._config).layers), batch, capacity)

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return self.cache.lengths

    def prefill(self, prompts: Sequence[Sequence[int]]) -> StepLogits:
        """Evaluate the prompts behind what is committed, and return the logits after the last token of each.

        All but the last token is committed. That one is the step's root and waits for `commit`, as after any forward.
        """
        longest = max(map(len, prompts))
        same = len(set(self.lengths)) == 1
        past = self.lengths[0]
        ids = torch.tensor([[*p, *[p[-1]] * (longest - len(p))] for p in prompts], device=self.model.device)
        if same and not past:  # causal attention, as the model has it; padding on the right is never seen
            mask: Any = None
        else:
            chains = [TokenTree(tuple(p), tuple(range(-1, len(p) - 1))) for p in prompts]
            mask = self._masks(chains, longest)
        starts = torch.tensor(self.lengths, device=ids.device)
        positions = starts[:, None] + torch.arange(longest, device=ids.device)
        last = [len(p) - 1 for p in prompts]
        hidden = self._call(ids, positions, mask, sorted(set(last)))
        rows = {node: row for row, node in enumerate(sorted(set(last)))}
        logits = torch.stack([hidden[b, rows[node]] for b, node in enumerate(last)])[:, None]  # (batch, 1, vocab)
        self.cache.commit([range(n) for n in last])
        return StepLogits(logits, (0,))

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """Evaluate one tree per sequence behind its committed tokens; None where the sequence has ended."""
        rows = max(len(t) for t in trees if t is not None)
        ids, positions = [], []
        for tree, length in zip(trees, self.lengths, strict=True):
            tree = tree or SINGLE
            padding = rows - len(tree)
            ids.append([*tree.tokens, *[tree.tokens[0]] * padding])
            positions.append([*(length + d for d in tree.depths), *[length] * padding])
        keep = sorted({node for tree in trees if tree is not None for node in tree.scored})
        device = self.model.device
        logits = self._call(
            torch.tensor(ids, device=device), torch.tensor(positions, device=device), self._masks(trees, rows), keep
        )
        return StepLogits(logits, tuple(keep))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the keys and values of each path, root first, and drop the rest of the last forward."""
        self.cache.commit(paths)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, keep: list[int]) -> torch.Tensor:
        """Logits of the rows in `keep`, (batch, len(keep), vocab)."""
        options: dict[str, Any] = {}
        if self._keep_index:
            options["logits_to_keep"] = torch.tensor(keep, device=ids.device)
        with torch.no_grad():
            logits: torch.Tensor = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **options,
            ).logits
        return logits if self._keep_index else logits[:, keep]

    def _masks(self, trees: Sequence[TokenTree | None], rows: int) -> Any:
        masks = {
            kind: tree_mask(trees, self.lengths, rows, self._dtype, self.model.device, window)
            for kind, window in self._kinds.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def mask_kinds(config: Any) -> dict[str, int | None]:
    """The kinds of attention mask that a model's layers want, each with its window.

    Raises:
        ValueError: a kind of layer that has no key for every position.
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not types:
        return {"sliding_attention" if window else "full_attention": window}
    unknown = sorted(set(types) - set(WINDOWS))
    if unknown:
        raise ValueError(
            f"a model of type {config.model_type!r} cannot take a token tree: it has layers of kind "
            f"{', '.join(unknown)}. Use model.generate"
        )
    return {kind: window if WINDOWS[kind] else None for kind in sorted(set(types))}


def _check_length(config: Any, capacity: int) -> None:
    """Refuse lengths at which a rotary scaling changes its frequencies for tokens it already placed."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [parameters, *(v for v in parameters.values() if isinstance(v, dict))]:
        if entry.get("rope_type") in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings") or config.max_position_embeddings
            if capacity > original:
                raise ValueError(
                    f"{entry['rope_type']} rotary scaling changes past {original} tokens, and this request can reach "
                    f"{capacity} (length plus one tree): shorten it or use model.generate"
                )


def check(model: PreTrainedModel) -> None:
    """Find out, once per model, whether it evaluates token trees exactly.

    A prompt of four tokens, two branches of two nodes, commit of the second branch, and one more step, against forwards
    of the same texts without a cache.

    Raises:
        ValueError: it does not; the message names the model's type and what failed.
    """
    if model not in _probed:
        _probed[model] = _probe(model)
    if _probed[model]:
        name = model.config.model_type
        raise ValueError(f"a model of type {name!r} cannot take a token tree: {_probed[model]}. Use model.generate")


def _probe(model: PreTrainedModel) -> str:
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder"
    config = model.config.get_text_config(decoder=True)
    strange = sorted(n for n, v in vars(config).items() if STRANGE_WINDOW.search(n) and isinstance(v, int) and v > 1)
    if strange:
        return f"its configuration has {', '.join(strange)}, an attention window of a kind that is not understood"
    if config._attn_implementation not in ("eager", "sdpa"):
        return (
            f"its attention is {config._attn_implementation!r}, which takes no mask; load it with "
            "attn_implementation='sdpa'"
        )
    prompt = [t % config.vocab_size for t in (3, 5, 7, 11)]
    a, b, c, d, e, f = (t % config.vocab_size for t in (13, 17, 19, 23, 29, 31))
    _probed[model] = ""  # so that the target below does not probe again
    try:
        target = Target(model, capacity=16)
        target.prefill([prompt])
        target.commit([[0]])
        first = target.forward([TokenTree((a, b, c, d), (-1, 0, 0, 2), (), 1)])  # a -> b and a -> c -> d
        target.commit([[0, 2, 3]])
        second = target.forward([TokenTree((e, f), (-1, 0), (), 1)])
        texts = [[*prompt, a, b], [*prompt, a, c, d], [*prompt, a, c, d, e, f]]
        ours = [first.logits[0, [0, 1]], first.logits[0, [0, 2, 3]], second.logits[0]]
        for text, logits in zip(texts, ours, strict=True):
            with torch.no_grad():
                plain = model(input_ids=torch.tensor([text], device=model.device), use_cache=False).logits[0]
            wanted = plain[-len(logits) :].float()
            tolerance = 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.1
            if not (logits.float() - wanted).abs().max() <= tolerance * wanted.abs().max():
                return "a branch of a small tree gives other logits than the same tokens in a row"
    except Exception as error:
        return f"the probe raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
