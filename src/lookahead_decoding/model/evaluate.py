"""One forward of the model: the only place that calls it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import sdpa_mask

from .attention import attend
from .cache import TreeCache

OURS = "lookahead_tree"
"""The name of our attention in transformers' registries."""

Masks = Mapping[str, torch.Tensor]
"""A mask per kind of layer; none at all is causal attention."""


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


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the model's text decoder."""
    return model.config.get_text_config(decoder=True)


def parameters_of(model: PreTrainedModel) -> Collection[str]:
    """Names that the model's forward takes."""
    return inspect.signature(model.forward).parameters.keys()


CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls a cache: the first since 5.24, which takes the second with a warning, the second before."""


def cache_name(function: Callable[..., Any]) -> str | None:
    """The name by which a model's function takes its cache; None where it takes none."""
    return next((name for name in CACHE_NAMES if name in inspect.signature(function).parameters), None)


def cache_in(named: Any) -> Any:
    """The cache among a function's arguments (a mapping), or in what a model returned; None if there is none."""
    return next((named[name] for name in CACHE_NAMES if name in named), None)


def prepared(model: PreTrainedModel, ids: torch.Tensor, cache: Any, **inputs: Any) -> dict[str, Any]:
    """What the model's own preparation for a step of `generate` makes of its inputs, (batch, rows) ids among them."""
    prepare = model.prepare_inputs_for_generation
    name = cache_name(prepare) or cache_name(GenerationMixin.prepare_inputs_for_generation)
    found: dict[str, Any] = prepare(ids, use_cache=True, **{str(name): cache}, **inputs)
    return found


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside what PEFT or torch.compile made of it.

    Raises:
        TypeError: it is none, or an adapter works on the prompt and not in the layers.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile(model)
    if hasattr(inner, "get_base_model") and hasattr(inner, "active_peft_config"):
        if inner.active_peft_config.is_prompt_learning:
            kind = inner.active_peft_config.peft_type.value
            raise TypeError(f"an adapter of type {kind} adds to the prompt what only its own generate knows: use that")
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}: load it first")
    return inner


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs; of weights that are loaded when they are needed, where they are computed with."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in devices if device is not None), "meta"))


def as_written(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Run a model that its owner compiled as it is written: each step of ours would be compiled anew."""
    compiled = model._compiled_call_impl is not None or hasattr(model.forward, "_torchdynamo_orig_callable")
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def first_position(model: PreTrainedModel) -> int:
    """The position of a text's first token; a few models count from 1."""
    if "position_ids" not in parameters_of(model):
        return 0
    zero = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    cache = DynamicCache(config=text_config(model))
    inputs = prepared(model, zero, cache, attention_mask=zero + 1, position_ids=zero, is_first_iteration=True)
    positions = inputs.get("position_ids")
    return 0 if positions is None else int(positions.max())


@contextmanager
def attention_in_force(config: Any, attention: str) -> Iterator[None]:
    """Let a model of this configuration use an attention inside the `with` block."""
    before = config._attn_implementation
    config._attn_implementation = attention
    try:
        yield
    finally:
        config._attn_implementation = before


def evaluate(
    model: PreTrainedModel,
    cache: TreeCache,
    ids: torch.Tensor,
    positions: torch.Tensor | None,
    masks: Masks,
    keep: torch.Tensor | None = None,
    indices: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits of one forward, (batch, kept rows, vocab).

    Args:
        ids, positions: (batch, nodes); no positions for a model that takes none.
        keep: rows that need logits; all by default.
        indices: for each of the cache's slots, those of the rows, (batch, nodes); by default they stand behind each
            sequence's committed tokens.
    """
    if indices is not None:
        sequences = torch.arange(len(ids), device=ids.device)[:, None]
        for slots, index in zip(cache.all_slots, indices, strict=True):
            slots.index = sequences, index
    for slots in cache.all_slots:
        slots.causal = not masks
    options: dict[str, Any] = {str(cache.name): cache}
    if keep is not None:
        options["logits_to_keep"] = keep
    if positions is not None:
        options["position_ids"] = positions
    logits: torch.Tensor = model(
        input_ids=ids,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values()), None),
        use_cache=True,
        return_dict=True,
        **options,
    ).logits
    for slots in cache.all_slots:
        slots.index = None
    return logits
