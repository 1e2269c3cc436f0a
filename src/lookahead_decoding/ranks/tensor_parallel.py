"""One copy of a model divided over several ranks, by the plan that transformers has for it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from transformers import PreTrainedModel

from .group import Ranks


def divide(model: PreTrainedModel, ranks: Ranks) -> PreTrainedModel:
    """Keep this rank's part of a model's weights, on the rank's device, where a copy is divided over several.

    Every rank loads the whole model first, which the memory of its machine has to hold; its device only ever holds the
    part.

    Args:
        model: on the CPU.

    Returns:
        The same model, changed.

    Raises:
        ValueError: transformers has no plan for such a model, or cannot divide it so.
    """
    if not isinstance(ranks, Ranks):
        raise TypeError(f"ranks must be what ld.parallel() gives, got {type(ranks).__name__}")
    if ranks.tensor_parallel == 1:
        return model.to(ranks.device)
    kind = model.config.model_type
    if not model.supports_tp_plan:
        raise ValueError(f"tensor_parallel={ranks.tensor_parallel}: transformers has no plan for type {kind!r}")
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    assert ranks.mesh is not None
    _untie(model)
    arguments: list[Any] = [model, ranks.mesh["tp"]]
    if "tp_plan" in inspect.signature(apply_tensor_parallelism).parameters:  # older versions read it from the model
        arguments.append(names_in(model))
    try:
        apply_tensor_parallelism(*arguments)
    except Exception as error:
        raise ValueError(f"tensor_parallel={ranks.tensor_parallel} cannot divide a {kind!r}: {error}") from error
    return model.to(ranks.device)  # what the plan leaves whole


def _untie(model: PreTrainedModel) -> None:
    """Let weights that are one, as those of many a model's first and last layers, be divided one by one."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad))
            seen.add(id(parameter))


def names_in(model: PreTrainedModel) -> dict[str, str]:
    """The plan by the names of modules and of their parameters, which come first."""
    plan: dict[str, str] = model.tp_plan
    found = {}
    for name, module in model.named_modules():
        own = plan.get(_any_layer(name))
        for parameter, _ in module.named_parameters(recurse=False):
            whole = f"{name}.{parameter}".lstrip(".")
            style = plan.get(_any_layer(whole), own)
            if style is not None:
                found[whole] = style
        if own is not None:
            found[name] = own
    return found


def _any_layer(name: str) -> str:
    """A name as plans have it, with stars for numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)
