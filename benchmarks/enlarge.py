"""Enlarge a Llama-type model without changing its function, to time real sizes on real text.

Wider: the residual is padded with zeros and the norms are rescaled, and further heads and units are random but cannot
reach the output. Deeper: further layers write nothing. The outputs equal the small model's up to rounding, so
acceptance is the small model's and time is the large one's.

    python benchmarks/enlarge.py --size 134M --out build/pocket-134M
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lookahead_decoding as ld


@dataclass(frozen=True)
class Size:
    """Widths of an enlarged model; the size of a head stays."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    units: int


SIZES = {
    "134M": Size(768, 20, 12, 6, 2048),
    "0.5B": Size(1024, 30, 16, 8, 4096),
    "1.1B": Size(2048, 24, 32, 4, 5632),
    "7B": Size(4096, 32, 64, 64, 11008),
}


def enlarge(small: LlamaForCausalLM, size: Size, dtype: torch.dtype, device: str = "cpu") -> LlamaForCausalLM:
    """A model of `size` with the function of `small`.

    Args:
        small: at most as wide and deep in everything.
        dtype, device: of the new weights.

    Raises:
        ValueError: a width is smaller than the small model's, or heads do not divide evenly.
    """
    old = small.config
    group = size.heads // size.key_heads
    old_group = old.num_attention_heads // old.num_key_value_heads
    needed = old.num_key_value_heads * math.ceil(old_group / group)
    if size.heads % size.key_heads or size.key_heads < needed:
        raise ValueError(f"{size.heads} heads over {size.key_heads} key heads do not hold the small model's")
    if size.hidden < old.hidden_size or size.layers < old.num_hidden_layers or size.units < old.intermediate_size:
        raise ValueError(f"{size} is smaller than the model it should hold")
    config = copy.deepcopy(old)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size = size.hidden, size.layers, size.units
    config.num_attention_heads, config.num_key_value_heads = size.heads, size.key_heads
    config.rms_norm_eps = old.rms_norm_eps * old.hidden_size / size.hidden
    config.tie_word_embeddings = False
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            large = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    width, units, head = old.hidden_size, old.intermediate_size, old.head_dim
    shrink = math.sqrt(width / size.hidden)  # the padded residual has a smaller mean square

    # Where the small model's heads go: as many of a key head's queries as fit under one new key head, and so on.
    queries: list[int] = []
    keys: list[tuple[int, int]] = []  # (new key head, old key head)
    for old_key in range(old.num_key_value_heads):
        for first in range(0, old_group, group):
            keys.append((len(keys), old_key))
            queries += [keys[-1][0] * group + r for r in range(min(group, old_group - first))]

    def put(target: torch.nn.Linear, rows: torch.Tensor, at: list[int] | None = None) -> None:
        """Copy heads or units of a projection from the residual."""
        weight = target.weight
        for i, row in enumerate(at if at is not None else range(len(rows))):
            weight[row, :width] = rows[i].to(weight)

    with torch.no_grad():
        large.model.embed_tokens.weight.zero_()
        large.model.embed_tokens.weight[:, :width] = small.model.embed_tokens.weight.to(device, dtype)
        large.lm_head.weight[:, :width] = small.lm_head.weight.to(device, dtype)
        large.model.norm.weight.fill_(1.0)
        large.model.norm.weight[:width] = small.model.norm.weight.to(device, dtype) * shrink
        for number, layer in enumerate(large.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            attention.o_proj.weight.zero_()  # what does not come from the small model writes nothing
            mlp.down_proj.weight.zero_()
            if number >= old.num_hidden_layers:
                continue
            like = small.model.layers[number]
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(layer, name).weight[:width] = getattr(like, name).weight.to(device, dtype) * shrink
            q, k, v, o = (getattr(like.self_attn, f"{n}_proj").weight for n in "qkvo")
            wide = [h * head + i for h in queries for i in range(head)]
            put(attention.q_proj, q, wide)
            for new, old_key in keys:
                span = [new * head + i for i in range(head)]
                put(attention.k_proj, k[old_key * head : (old_key + 1) * head], span)
                put(attention.v_proj, v[old_key * head : (old_key + 1) * head], span)
            attention.o_proj.weight[:width, wide] = o.to(device, dtype)
            mlp.gate_proj.weight[:units, :width] = like.mlp.gate_proj.weight.to(device, dtype)
            mlp.up_proj.weight[:units, :width] = like.mlp.up_proj.weight.to(device, dtype)
            mlp.down_proj.weight[:width, :units] = like.mlp.down_proj.weight.to(device, dtype)
    large.generation_config = copy.deepcopy(small.generation_config)
    return large.eval()


def enlarged_pocket(size: str, dtype: torch.dtype, device: str = "cpu") -> LlamaForCausalLM:
    """`pocket` at one of `SIZES`."""
    small = AutoModelForCausalLM.from_pretrained(ld.pocket_path(), dtype=torch.float32)
    return enlarge(small, SIZES[size], dtype, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = enlarged_pocket(args.size, getattr(torch, args.dtype))
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(ld.pocket_path()).save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {args.out}")


if __name__ == "__main__":
    main()
