"""A transformers model as a program: the operations that a step of it consists of, with the weights laid out for them.

A recipe reads the modules of a model whose structure it knows. Whether the program then computes what the model
computes is not for the recipe to say: `why_not` holds the logits of both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .library import (
    ACTIVATIONS,
    ATTEND,
    ATTENDED,
    BEST,
    DTYPES,
    EMBED,
    GATE,
    INNER,
    NORM,
    NORMED,
    PROJECT,
    ROTATE,
    TO_HEADS,
    TO_LOGITS,
    TO_RESIDUAL,
    Op,
    Program,
)

PANEL = 32
"""Outputs of a product that are computed together."""

ACTIVATION_OF = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "ReLU": "relu",
}


class NoProgramError(ValueError):
    """A model that no recipe knows; the message says what is strange about it."""


def panels(weight: torch.Tensor) -> torch.Tensor:
    """A weight, (outputs, inputs), as [outputs / 32][inputs][32], and in bfloat16 [outputs / 32][inputs / 2][32][2]."""
    outputs, inputs = weight.shape
    missing = -outputs % PANEL
    if missing:
        weight = torch.cat([weight, weight.new_zeros(missing, inputs)])
    together = 2 if weight.dtype == torch.bfloat16 else 1
    laid = weight.view(-1, PANEL, inputs // together, together).transpose(1, 2)
    return laid.contiguous()


def alternating(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The panels of two weights, taking turns."""
    return torch.stack([panels(first), panels(second)], 1).contiguous()


@dataclass
class Made:
    """A program with everything that it points to.

    Attributes:
        layers: of the cache.
        rotary: the module that gives the angles of positions.
    """

    dtype: torch.dtype
    hidden: int
    heads: int
    key_heads: int
    size: int
    inner: int
    vocabulary: int
    scale: float
    rotary: nn.Module
    layers: int = 0
    ops: list[Op] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    cosines: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    sines: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def hold(self, tensor: torch.Tensor | None) -> int | None:
        """The place of a tensor, which lives as long as the program."""
        if tensor is None:
            return None
        self.held.append(tensor)
        return tensor.data_ptr()

    def add(self, kind: int, **fields: Any) -> None:
        self.ops.append(Op(kind=kind, **{"factor": 1.0, **fields}))

    def norm(self, module: nn.Module, kept: bool = False) -> None:
        """A root mean square norm of the residual stream."""
        weight, eps = norm_of(module)
        self.add(NORM, weight=self.hold(weight), eps=eps, kept=int(kept))

    def project(self, parts: Sequence[nn.Module], origin: int, to: int, kept: bool = False) -> None:
        """Linear layers side by side."""
        weight, bias = joined(parts)
        outputs, inputs = weight.shape
        places = {"weight": self.hold(panels(weight)), "bias": self.hold(bias)}
        self.add(PROJECT, origin=origin, to=to, outputs=outputs, inputs=inputs, kept=int(kept), **places)

    def angles(self, positions: int) -> None:
        """See that the angles of so many positions are known."""
        if len(self.cosines) >= positions:
            return
        count = max(positions, 2 * len(self.cosines), 512)
        with torch.no_grad():
            found = self.rotary(torch.zeros(1, 1, self.hidden), torch.arange(count)[None])
        half = found[0].shape[-1] // 2
        self.cosines, self.sines = (angle[0, :, :half].float().contiguous() for angle in found)

    def program(self) -> Program:
        """As the library takes it."""
        return Program(
            dtype=DTYPES[self.dtype],
            hidden=self.hidden,
            heads=self.heads,
            key_heads=self.key_heads,
            size=self.size,
            inner=self.inner,
            vocabulary=self.vocabulary,
            rotated=2 * self.cosines.shape[1],
            count=len(self.ops),
            scale=self.scale,
            cap=0.0,
            ops=(Op * len(self.ops))(*self.ops),
        )


def children(module: nn.Module, *names: str, optional: Sequence[str] = ()) -> list[Any]:
    """The parts of a module, which has these and no others.

    Raises:
        NoProgramError: it has not.
    """
    there = {name for name, _ in module.named_children()}
    unknown = there - set(names) - set(optional)
    if unknown or set(names) - there:
        strange = ", ".join(sorted(unknown or set(names) - there))
        raise NoProgramError(f"{type(module).__name__} {'has' if unknown else 'lacks'} {strange}")
    return [getattr(module, name, None) for name in (*names, *optional)]


def norm_of(module: nn.Module) -> tuple[torch.Tensor, float]:
    """Weight in float32, and epsilon, of a root mean square norm."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or not isinstance(eps, float):
        raise NoProgramError(f"{type(module).__name__} is no norm that is known")
    return weight.detach().float().contiguous(), eps


def joined(parts: Sequence[nn.Module]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight of linear layers side by side, and their bias in float32, padded to whole panels."""
    for part in parts:
        if type(part) is not nn.Linear or "forward" in vars(part):
            raise NoProgramError(f"{type(part).__name__} is no plain linear layer")
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    weight = torch.cat([part.weight.detach() for part in linears])
    if all(part.bias is None for part in linears):
        return weight, None
    biases = [weight.new_zeros(part.out_features) if part.bias is None else part.bias.detach() for part in linears]
    bias = torch.cat(biases).float()
    return weight, torch.cat([bias, bias.new_zeros(-len(bias) % PANEL)])


def llama(model: Any, config: Any) -> Made:
    """The layer of Llama, which Mistral, Qwen2, Qwen3, SmolLM and many others have as well."""
    body, head = children(model, "model", "lm_head")
    embedding, layers, last, rotary = children(body, "embed_tokens", "layers", "norm", "rotary_emb")
    attention = layers[0].self_attn
    query, key = attention.q_proj, attention.k_proj
    size = attention.head_dim
    made = Made(
        dtype=embedding.weight.dtype,
        hidden=embedding.embedding_dim,
        heads=query.out_features // size,
        key_heads=key.out_features // size,
        size=size,
        inner=layers[0].mlp.gate_proj.out_features,
        vocabulary=head.out_features,
        scale=float(attention.scaling),
        rotary=rotary,
    )
    made.add(EMBED, weight=made.hold(embedding.weight.detach()))
    for number, layer in enumerate(layers):
        before, attention, between, unit = children(
            layer, "input_layernorm", "self_attn", "post_attention_layernorm", "mlp"
        )
        query, key, value, output, query_norm, key_norm = children(
            attention, "q_proj", "k_proj", "v_proj", "o_proj", optional=("q_norm", "k_norm")
        )
        gate, up, down, activation = children(unit, "gate_proj", "up_proj", "down_proj", optional=("act_fn",))
        made.norm(before)
        made.project([query, key, value], NORMED, TO_HEADS)
        norms = [norm_of(module) if module is not None else (None, 0.0) for module in (query_norm, key_norm)]
        places = {"weight": made.hold(norms[0][0]), "second": made.hold(norms[1][0])}
        made.add(ROTATE, layer=number, eps=norms[0][1], **places)
        made.add(ATTEND, layer=number, factor=0.0)
        made.project([output], ATTENDED, TO_RESIDUAL)
        made.norm(between)
        made.hold(alternating(joined([gate])[0], joined([up])[0]))
        biases = [joined([part])[1] for part in (gate, up)]
        bias = None if biases[0] is None or biases[1] is None else torch.cat([biases[0], biases[1]])
        kind = ACTIVATION_OF.get(type(activation if activation is not None else unit.act_fn).__name__)
        if kind is None:
            raise NoProgramError(f"{type(activation).__name__} is no activation that is known")
        made.add(
            GATE,
            origin=NORMED,
            outputs=gate.out_features,
            inputs=gate.in_features,
            option=ACTIVATIONS.index(kind),
            weight=made.held[-1].data_ptr(),
            bias=made.hold(bias),
        )
        made.project([down], INNER, TO_RESIDUAL)
    made.layers = len(layers)
    made.norm(last, kept=True)
    made.project([head], NORMED, TO_LOGITS, kept=True)
    made.add(BEST)
    return made


RECIPES = (llama,)


def program_of(model: Any, config: Any) -> Made:
    """The program of a model.

    Raises:
        NoProgramError: it has none; the message says why.
    """
    why = []
    for recipe in RECIPES:
        try:
            made = recipe(model, config)
        except (NoProgramError, AttributeError) as error:
            why.append(str(error))
            continue
        _check(made)
        return made
    raise NoProgramError("; ".join(why))


def _check(made: Made) -> None:
    """Refuse what the library has no code for."""
    if made.dtype not in DTYPES:
        raise NoProgramError(f"there is no native code for {made.dtype}")
    if made.hidden % PANEL or made.inner % PANEL or made.size % 16 or made.heads % made.key_heads:
        raise NoProgramError("its sizes are no multiples of what the native code computes together")
    if any(tensor.device.type != "cpu" for tensor in made.held):
        raise NoProgramError("its weights are not on the CPU")


def pointer(array: np.ndarray | torch.Tensor) -> int:
    """Where an array lies."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()
