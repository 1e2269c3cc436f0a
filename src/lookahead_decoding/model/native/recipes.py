"""From the modules of a transformers model to its program.

A recipe goes by the names that modules have in most models, whatever the model is called: what a layer's norms are
called says how they are wired. A module that is not known ends it. Whether the program then computes what the model
computes is found out by computing; that is not for the recipe to say.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .library import (
    ACTIVATE,
    ACTIVATIONS,
    ADD_NORMED,
    ATTEND,
    ATTENDED,
    BEST,
    EMBED,
    GATE,
    INNER,
    NORM_HEADS,
    NORMED,
    ROOT_MEAN_SQUARE,
    ROTATE,
    TO_HEADS,
    TO_LOGITS,
    TO_RESIDUAL,
)
from .program import Angles, Linear, Made, NoProgramError, Norm, alternating, beside, linear_of, padded

ACTIVATION_OF = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu_squared",
}

BODY = {
    "embedding": "embed_tokens embed_in wte word_embeddings",
    "positions": "wpe",
    "layers": "layers h",
    "last": "norm final_layer_norm final_layernorm ln_f",
    "rotary": "rotary_emb",
}
LAYER = {
    "attention": "self_attn attention self_attention attn",
    "unit": "mlp",
    "first": "input_layernorm ln_1",
    "second": "post_attention_layernorm ln_2",
    "third": "pre_feedforward_layernorm",
    "fourth": "post_feedforward_layernorm",
    "fifth": "post_self_attn_layernorm",
    "sixth": "post_mlp_layernorm",
}
NORMS = ("first", "second", "third", "fourth", "fifth", "sixth")
ATTENTION = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "joined": "qkv_proj c_attn",
    "by_head": "query_key_value",
    "output": "o_proj dense c_proj out_proj",
    "query_norm": "q_norm q_layernorm",
    "key_norm": "k_norm k_layernorm",
}
UNIT = {
    "gate": "gate_proj",
    "up": "up_proj",
    "both": "gate_up_proj",
    "inner": "fc1 c_fc dense_h_to_4h",
    "down": "down_proj fc2 c_proj dense_4h_to_h",
    "activation": "act_fn activation_fn act",
}
"""The roles of a module's parts, with the names that they go by."""


def parts(module: nn.Module, roles: Mapping[str, str]) -> dict[str, Any]:
    """The parts of a module by their roles; None where it has none of that role.

    Raises:
        NoProgramError: it has a part of no known role, or weights of its own.
    """
    role_of = {name: role for role, names in roles.items() for name in names.split()}
    found: dict[str, Any] = dict.fromkeys(roles)
    for name, part in module.named_children():
        if isinstance(part, nn.Dropout | nn.Identity):
            continue
        if name not in role_of:
            raise NoProgramError(f"{type(module).__name__} has {name}, which is not known")
        found[role_of[name]] = part
    for name, _ in module.named_parameters(recurse=False):
        raise NoProgramError(f"{type(module).__name__} has {name}, which is not known")
    return found


def read(model: Any, config: Any, spans: Sequence[int], windows: Sequence[int], pairs: bool = False) -> Made:
    """The program of a model.

    Args:
        config: of the text model.
        pairs: numbers that lie side by side are rotated together, although the model's angles do not say so.
        spans: of each layer, the number of its slots among those of the cache.
        windows: of each layer, how many positions it sees; 0 is all.

    Raises:
        NoProgramError: it has none; the message says why.
    """
    outside = dict(model.named_children())
    head = outside.pop("lm_head", None) or outside.pop("embed_out", None)
    if head is None or len(outside) != 1:
        raise NoProgramError(f"{type(model).__name__} is no body with a head")
    (body,) = outside.values()
    inside = parts(body, BODY)
    layers, embedding = inside["layers"][: config.num_hidden_layers], inside["embedding"]
    first = parts(layers[0], LAYER)
    heads = config.num_attention_heads
    size = getattr(first["attention"], "head_dim", None) or config.hidden_size // heads
    logits = linear_of(head)
    made = Made(
        dtype=embedding.weight.dtype,
        hidden=embedding.embedding_dim,
        heads=heads,
        key_heads=_key_heads(first["attention"], heads, size),
        size=size,
        inner=_inner(parts(first["unit"], UNIT)),
        vocabulary=logits.outputs,
        scale=float(getattr(first["attention"], "scaling", None) or size**-0.5),
        tokens=embedding.num_embeddings,
        positions=0 if inside["positions"] is None else inside["positions"].num_embeddings,
        cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        spans=list(spans),
    )
    shared = head.weight is embedding.weight
    table = embedding.weight if inside["positions"] is None else inside["positions"].weight
    made.add(
        EMBED,
        weight=None if shared else made.hold(embedding.weight),
        second=None if inside["positions"] is None else made.hold(table),
        factor=_embedding_factor(model, body, embedding, config),
    )
    rotations = dict(_rotations(made, inside["rotary"], config, len(layers), pairs))
    for number, layer in enumerate(layers):
        _layer(made, layer, number, windows[number], rotations, config)
        made.layers.append((layer, len(made.ops)))
    made.norm(made.known(inside["last"]), kept=1)
    factor = float(getattr(model, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1))
    made.project(logits, origin=NORMED, to=TO_LOGITS, kept=1, factor=factor)
    if shared:  # the head's panels serve both
        made.ops[0].weight, made.ops[0].option = made.ops[-1].weight, 1
    made.add(BEST)
    return made


def _key_heads(attention: nn.Module, heads: int, size: int) -> int:
    """Heads of keys, by what is projected."""
    roles = parts(attention, ATTENTION)
    if roles["key"] is not None:
        return linear_of(roles["key"]).outputs // size
    joined = roles["joined"] if roles["joined"] is not None else roles["by_head"]
    return (linear_of(joined).outputs // size - heads) // 2


def _inner(unit: Mapping[str, Any]) -> int:
    """Inputs of the projection down."""
    if unit["down"] is None:
        raise NoProgramError("its feed-forward network has no projection down")
    return int(linear_of(unit["down"]).weight.shape[1])


def _layer(
    made: Made, layer: nn.Module, number: int, window: int, rotations: Mapping[int, dict[str, int]], config: Any
) -> None:
    """One layer, wired as the names of its norms say.

    A norm after a part, and not before the next one, is a name of its own: "post_attention_layernorm" stands before the
    feed-forward network where it is the second of two, and behind attention where there are more, or no first.
    """
    roles = parts(layer, LAYER)
    norms = {name: roles[name] for name in NORMS if roles[name] is not None}
    attention, unit = roles["attention"], parts(roles["unit"], UNIT)
    factor = float(getattr(layer, "residual_multiplier", 1.0))
    parallel = bool(getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False))
    kinds = tuple(norms)
    if kinds == ("first",) or (kinds == ("first", "second") and parallel):
        made.norm(made.known(norms["first"]))
        _heads(made, attention)
        if "second" in norms:
            made.norm(made.known(norms["second"]))
        _unit(made, unit)
        _attend(made, attention, number, window, rotations, config)
        _output(made, attention, factor)
        made.project(linear_of(unit["down"]), origin=INNER, to=TO_RESIDUAL, factor=factor)
        return
    wiring = {
        ("first", "second"): ("first", None, "second", None),
        ("first", "second", "third", "fourth"): ("first", "second", "third", "fourth"),
        ("second", "fourth"): (None, "second", None, "fourth"),
        ("first", "second", "fifth", "sixth"): ("first", "fifth", "second", "sixth"),
    }
    if kinds not in wiring:
        raise NoProgramError(f"{type(layer).__name__} has norms that are wired in no known way")
    before, behind, between, after = wiring[kinds]
    made.norm(made.known(norms[before] if before else None))
    _heads(made, attention)
    _attend(made, attention, number, window, rotations, config)
    _output(made, attention, factor, norms.get(behind or ""))
    made.norm(made.known(norms[between] if between else None))
    _unit(made, unit)
    _added(made, linear_of(unit["down"]), INNER, factor, norms.get(after or ""))


def _added(made: Made, linear: Linear, origin: int, factor: float, norm: nn.Module | None) -> None:
    """A projection that joins the residual stream, through a norm of its own if there is one."""
    if norm is None:
        made.project(linear, origin=origin, to=TO_RESIDUAL, factor=factor)
    else:
        made.project(linear, origin=origin, to=TO_HEADS)
        made.norm(made.known(norm), kind=ADD_NORMED, factor=factor)


def _heads(made: Made, attention: nn.Module) -> None:
    """Queries, keys and values side by side."""
    roles = parts(attention, ATTENTION)
    if roles["joined"] is not None:
        joined = linear_of(roles["joined"])
    elif roles["by_head"] is not None:
        joined = _sorted(linear_of(roles["by_head"]), made)
    else:
        joined = beside([linear_of(roles[name]) for name in ("query", "key", "value")])
    if joined.outputs != (made.heads + 2 * made.key_heads) * made.size:
        raise NoProgramError("its queries, keys and values have other sizes than its configuration says")
    made.project(joined, origin=NORMED, to=TO_HEADS)


def _sorted(linear: Linear, made: Made) -> Linear:
    """A projection whose outputs are, of each key head in turn, its queries, key and value, as all of each kind.

    Where there is one key head, or none is joined to another, that is so already.
    """
    groups = made.heads // made.key_heads

    def kinds(tensor: torch.Tensor) -> torch.Tensor:
        of_heads = tensor.view(made.key_heads, groups + 2, made.size, -1)
        ends = of_heads[:, :groups], of_heads[:, groups : groups + 1], of_heads[:, groups + 1 :]
        return torch.cat([end.flatten() for end in ends]).view(tensor.shape)

    return Linear(kinds(linear.weight), None if linear.bias is None else kinds(linear.bias))


def _attend(
    made: Made,
    attention: nn.Module,
    number: int,
    window: int,
    rotations: Mapping[int, dict[str, int]],
    config: Any,
) -> None:
    """Rotation and attention of a layer."""
    roles = parts(attention, ATTENTION)
    norms = [made.known(roles[name]) for name in ("query_norm", "key_norm")]
    of_heads = [norm for norm in norms if norm.weight is not None and len(norm.weight) == made.size]
    if any(norm.kind != ROOT_MEAN_SQUARE or norm.bias is not None or norm.eps != norms[0].eps for norm in of_heads):
        raise NoProgramError("its norms of queries and keys are not of one kind that is known")
    for i, (norm, heads) in enumerate(zip(norms, (made.heads, made.key_heads), strict=True)):
        if norm.weight is None or len(norm.weight) == made.size:
            continue
        if len(norm.weight) != heads * made.size:
            raise NoProgramError("its norms of queries and keys are neither of a head nor of all")
        made.norm(norm, kind=NORM_HEADS, layer=i * made.heads * made.size, outputs=heads * made.size)
        norms[i] = Norm()
    places = {"weight": made.hold(norms[0].weight), "second": made.hold(norms[1].weight), "eps": norms[0].eps}
    at = {"layer": number, "span": made.spans[number]}
    turns = rotations.get(number, {}) if getattr(attention, "use_rope", True) else {}
    made.add(ROTATE, **at, **places, **turns)
    cap = float(getattr(attention, "attn_logit_softcapping", None) or 0.0)
    made.add(ATTEND, **at, option=window, factor=cap)


def _output(made: Made, attention: nn.Module, factor: float, norm: nn.Module | None = None) -> None:
    """The projection of what attention gives."""
    _added(made, linear_of(parts(attention, ATTENTION)["output"]), ATTENDED, factor, norm)


def _unit(made: Made, unit: Mapping[str, Any]) -> None:
    """A feed-forward network up to its activations."""
    name = ACTIVATION_OF.get(type(unit["activation"]).__name__)
    if name is None:
        raise NoProgramError(f"{type(unit['activation']).__name__} is no activation that is known")
    fields = {"origin": NORMED, "option": ACTIVATIONS.index(name)}
    alone = unit["inner"] if unit["gate"] is not None or unit["both"] is not None else unit["inner"] or unit["up"]
    if alone is not None:
        made.project(linear_of(alone), kind=ACTIVATE, **fields)
        return
    if unit["both"] is not None:
        both = linear_of(unit["both"])
        half = both.outputs // 2
        gate, up = (
            Linear(both.weight[of], None if both.bias is None else both.bias[of])
            for of in (slice(half), slice(half, None))
        )
    else:
        gate, up = linear_of(unit["gate"]), linear_of(unit["up"])
    if (gate.bias is None) != (up.bias is None):
        raise NoProgramError("its feed-forward network has one bias of two")
    biases = padded(gate.bias), padded(up.bias)
    bias = None if biases[0] is None or biases[1] is None else torch.cat([biases[0], biases[1]])
    for linear in (gate, up):
        made.check(linear, GATE, NORMED, TO_HEADS)
    sizes = {"outputs": gate.outputs, "inputs": gate.weight.shape[1]}
    made.add(GATE, weight=made.lay(alternating(gate.weight, up.weight)), bias=made.hold(bias), **sizes, **fields)


def _embedding_factor(model: Any, body: nn.Module, embedding: Any, config: Any) -> float:
    """What the model multiplies its embeddings by: of the numbers that models say, the one that is so.

    Raises:
        NoProgramError: it does something else with them.
    """
    seen: list[torch.Tensor] = []
    layer = parts(body, BODY)["layers"][0]
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float()[0, -1]))
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1]]), use_cache=False)
    finally:
        hook.remove()
    row = embedding.weight[1].detach().float()
    positions = parts(body, BODY)["positions"]
    found = seen[0] if positions is None else seen[0] - positions.weight[0].detach().float()
    root = float(torch.tensor(config.hidden_size**0.5, dtype=embedding.weight.dtype))
    said = getattr(body, "embedding_multiplier", None) or getattr(embedding, "scalar_embed_scale", None)
    for factor in (1.0, root, float(said or 1.0)):
        if (found - factor * row).norm() <= 1e-2 * found.norm():
            return factor
    raise NoProgramError("it does something unknown with its embeddings")


def _rotations(
    made: Made, rotary: nn.Module | None, config: Any, layers: int, pairs: bool
) -> Iterator[tuple[int, dict[str, int]]]:
    """Of each layer, what its rotation is; none where the model has learned positions."""
    if rotary is None:
        return
    by_type = "layer_type" in inspect.signature(rotary.forward).parameters
    types = config.layer_types if by_type else [None] * layers
    tables: dict[Any, dict[str, int]] = {}
    for number, kind in enumerate(types):
        if kind not in tables:
            tables[kind] = _table(made, rotary, {"layer_type": kind} if by_type else {}, pairs)
        yield number, tables[kind]


def _table(made: Made, rotary: nn.Module, named: Mapping[str, Any], side_by_side: bool) -> dict[str, int]:
    """The angles of a kind of layer, as a table of the program's."""

    hidden = made.hidden  # or the program would hold itself

    def whole(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cosines, sines = rotary(
                torch.zeros(1, 1, hidden, dtype=torch.float32), torch.arange(positions)[None], **named
            )
        return cosines[0].float(), sines[0].float()

    cosines, _ = whole(8)
    half = cosines.shape[-1] // 2
    pairs = not torch.equal(cosines[:, :half], cosines[:, half:])  # numbers that lie side by side turn together
    if pairs and not torch.equal(cosines[:, ::2], cosines[:, 1::2]):
        raise NoProgramError("its rotary embedding is not known")

    def angles(positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = whole(positions)
        first = (slice(None), slice(0, None, 2) if pairs else slice(half))
        return cosines[first].contiguous(), sines[first].contiguous()

    table: Angles = angles
    made.tables.append(table)
    return {"table": len(made.tables) - 1, "rotated": 2 * half, "option": int(pairs or side_by_side)}
