"""Tiny random models of every causal language model type of the installed transformers.

    model = tiny_model("qwen3")
    model = tiny_model("mistral", sliding_window=None)

A model is the type's default configuration made small: a few layers in which every kind of layer occurs, grouped
queries, windows and chunks of 16 tokens, four experts. Weights are random but large, so that the greedy text of a
model is varied and depends on all that its cache holds: an error in a cache changes the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

NOT_MADE: dict[str, str] = {
    "gemma3n": "its image encoder needs timm",
    "gemma4_assistant": "its configuration demands that all layers share keys and values, which its layers then refuse",
    "musicgen": "AutoModelForCausalLM hands its decoder the configuration of the whole, which that cannot use",
    "musicgen_melody": "AutoModelForCausalLM hands its decoder the configuration of the whole, which that cannot use",
}

WIDER = {8: 32, 32: 64, 48: 96, 24: 32}
"""Sizes of heads, layers and feed-forward networks that native code computes together, for those that are tiny."""

STD = 0.3
LAYERS = 4
WIDTH = 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Fields by the names that configurations share. A field that a type does not have, or that it leaves None, stays away.
SHRUNK: dict[str, Any] = {
    name: value
    for value, names in (
        # widths
        (64, "vocab_size vocab_size_per_layer_input mamba_d_ssm"),
        (
            WIDTH,
            "hidden_size d_model n_embd embed_dim emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width",
        ),
        (WIDTH, "input_embedding_size output_embedding_size"),
        (
            48,
            "intermediate_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size ffn_hidden_size",
        ),
        (48, "ffn_dim dim_ff d_ff dff d_inner n_inner mlp_dim feed_forward_size decoder_ffn_dim encoder_ffn_dim"),
        (24, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
        (24, "moe_shared_expert_intermediate_size expert_ffn_hidden_size"),
        # layers; an encoder has as many as its decoder, as the cache of some decoders is made for those of the encoder
        (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers"),
        (LAYERS, "num_encoder_layers depth"),
        (1, "first_k_dense_replace num_dense_layers"),
        # heads
        (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
        (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
        (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
        (8, "head_dim attention_head_dim attention_head_size swa_head_dim dim_head kv_channels d_kv rotary_dim"),
        (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
        (16, "q_lora_rank kv_lora_rank o_lora_rank qk_head_dim"),
        # experts
        (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
        (2, "num_experts_per_tok moe_k moe_topk moe_top_k"),
        (1, "n_group topk_group"),
        # how far back is seen
        (1024, "max_position_embeddings max_target_positions max_seq_len n_positions n_ctx context_length"),
        (16, "sliding_window sliding_window_size attention_window_size window_size keep_window_size"),
        (
            16,
            "attention_chunk_size local_attn_chunk_length lsh_attn_chunk_length block_size local_attention_window_len",
        ),
        (32, "local_attention"),  # the window's two sides together
        # what an index selects; many heads, as with few of them scores of 0 are frequent, and a choice among equals
        # depends on how many keys there are
        (8, "index_topk"),
        (16, "index_n_heads index_head_dim"),
        # recurrent layers
        (8, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_n_heads mamba_num_heads"),
        (4, "time_step_rank mamba_dt_rank linear_num_value_heads linear_num_heads"),
        (2, "linear_num_key_heads"),
        (8, "linear_key_head_dim linear_value_head_dim linear_head_dim hidden_size_per_layer_input"),
        (16, "chunk_size mamba_chunk_size"),
        (1, "mamba_n_groups n_groups"),
        # the rest
        (STD, "initializer_range init_std"),
        (True, "is_decoder"),
        (False, "tie_word_embeddings"),  # a random model whose head is its embedding repeats the last token
    )
    for name in names.split()
}

WIDTHS = frozenset(
    "hidden_size d_model n_embd embed_dim intermediate_size ffn_hidden_size ffn_dim d_ff n_inner head_dim".split()
)
"""Of these, what a layer is computed with."""

HALF_SLIDING = ["sliding_attention", "full_attention"] * 2
HALF_RECURRENT = ["linear_attention", "full_attention"] * 2

# What the table above or the kinds of layers of the default configuration get wrong, by the configuration's type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus": {"initializer_range": 1.0},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bart": {"d_model": 64},
    "blenderbot-small": {"init_std": 1.0, "scale_embedding": True},
    "bloom": {"initializer_range": 1.0},
    "blt_local_decoder": {"hidden_size_global": WIDTH},
    "blt_local_encoder": {"hidden_size_global": WIDTH},
    "blt": {"vocab_size": 260, "encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "layer_types": HALF_SLIDING,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in HALF_SLIDING},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},
    },
    "data2vec-text": {"hidden_size": 64},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 0.5,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2,
        "mlp_layer_types": ["hash_moe"] + ["moe"] * 5,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "o_groups": 2,
    },
    "dots1": {"layer_types": HALF_SLIDING, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim")},
        **{f"swa_{name}": 8 for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")},
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
    "dots3_note_audio_encoder": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    "exaone4": {"hidden_size": 64},
    "flint": {"hidden_size": 64},
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 2, "laurel_rank": 8},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_assistant": {"backbone_hidden_size": WIDTH},
    "got_ocr2_vision": {"output_channels": 16, "image_size": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HALF_RECURRENT},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hrm_text": {"num_hidden_layers": 2},  # each runs eight times, and makes much of a difference of rounding
    "inkling2_text": {"rel_extent": 64, "n_layers_per_attn_res_block": 2, "unpadded_vocab_size": 64},
    "inkling2_loop_text": {"rel_extent": 64, "unpadded_vocab_size": 64},
    "inkling_text": {"rel_extent": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 0},
    "laguna": {"layer_types": HALF_SLIDING},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "marian": {"d_model": 64, "init_std": 1.0},
    "mellum": {"layer_types": HALF_SLIDING},
    "minicpm3": {"dim_model_base": WIDTH},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": {"head_dim": 8},
    "mpt": {"use_cache": True},
    "mvp": {"d_model": 64},
    "nanochat": {"initializer_range": 1.0},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"hybrid_override_pattern": "ME*-ME*-", "time_step_min": 1e-9, "initializer_range": 0.1},
    "olmo2": {"hidden_size": 64},
    "pegasus": {"d_model": 64},
    "phi4_multimodal": {"eos_token_id": 2},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
        "bias_max_distance": 10,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "hc_lowrank": 8,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
        "ple_embed_dim": 32,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"hash_seed": 0, "axial_pos_shape": (32, 32), "axial_pos_embds_dim": (16, 16)},
    "roberta": {"hidden_size": 64},
    "roc_bert": {
        **dict.fromkeys(("pronunciation_embed_dim", "shape_embed_dim"), 16),
        **dict.fromkeys(("pronunciation_vocab_size", "shape_vocab_size"), 64),
    },
    "trocr": {"d_model": 64},
    "xlm": {"causal": True, "mask_token_id": 5},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"time_step_min": 1e-9},  # a prompt's steps are not made shorter than this, but those of one token are
    "zaya": {
        "initializer_range": 1.0,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "sliding_window": 16,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
}

# What multiplies the matrices of a configuration's type whose text repeats itself with weights of that size, or whose
# weights are made by another field.
FACTORS: dict[str, float] = {
    name: factor
    for factor, names in (
        (0.5, "bloom camembert flint mpt xlm-roberta"),
        (0.6, "bert bert-generation big_bird electra ernie roc_bert"),
        (0.7, "git"),
        (1.5, "cohere2 cpmant mamba2 olmo3"),
        (2.0, "bart biogpt exaone4 fuyu marian minicpm3 mvp olmo2 phi rembert trocr xmod zaya"),
        (3.0, "codegen flex_olmo gemma2 modernbert-decoder pegasus persimmon prophetnet recurrent_gemma roformer rwkv"),
        (3.0, "starcoder2 xlm-roberta-xl"),
        (5.0, "apertus bigbird_pegasus megatron-bert nemotron_h plbart reformer"),
        (8.0, "data2vec-text openai-gpt roberta xlm xlnet"),
        (0.7, "xglm"),  # with larger ones rounding decides
    )
    for name in names.split()
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The small configuration of a type. `changes` are fields of it, or of its text configuration where it has one."""
    default = CONFIG_MAPPING[model_type]()
    names = {field.name for field in fields(default)}
    inner = {name: changes.pop(name) for name in set(changes) - names} if "text_config" in names else {}
    return _shrunk(default, {**changes, "text_config": inner} if inner else changes)


def wide_model(model_type: str) -> PreTrainedModel:
    """As `tiny_model`, of sizes that native code can take."""
    names = {field.name for field in fields(CONFIG_MAPPING[model_type]())}
    wider = {n: WIDER[v] for n, v in SHRUNK.items() if n in names and v in WIDER and type(v) is int and n in WIDTHS}
    return tiny_model(model_type, **wider)


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model of a type, the same one every time, in float32 and ready to run.

    Raises ValueError with the reason for a type of which none can be made.
    """
    if model_type in NOT_MADE:
        raise ValueError(f"no tiny model of {model_type} can be made: {NOT_MADE[model_type]}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), dtype=torch.float32).eval()
        _stir(model, FACTORS.get(model.config.model_type, 1.0))
    return model


@torch.no_grad()
def _stir(model: PreTrainedModel, factor: float) -> None:
    """Multiply the matrices but the embeddings by a factor, and give random values to what starts as zeros.

    Zeros make ties: a random model's text may hold the padding token, whose embedding is zero, and then all keys of
    an index score the same, and which are chosen depends on how many there are.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in embeddings:
            parameter *= factor
        parameter += (parameter == 0) * torch.randn_like(parameter) * 0.1


def _shrunk(default: PreTrainedConfig, changes: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of the class of `default`; configurations inside it are made small likewise."""
    given = {field.name: _stored(default, field.name) for field in fields(default)}
    values: dict[str, Any] = {name: value for name, value in SPECIAL.items() if name in given}
    values |= {name: value for name, value in SHRUNK.items() if isinstance(given.get(name), int | float)}
    for name, value in given.items():
        by_layer = isinstance(value, list | tuple) and len(value) == _stored(default, "num_hidden_layers")
        if by_layer and all(isinstance(kind, str) for kind in value):
            values[name] = _cut(value, alternate="mlp" not in name)
    if "kv_lora_rank" in given:
        values["num_key_value_heads"] = values["num_attention_heads"]  # the latent makes a key for every query head
    values |= OVERRIDES.get(default.model_type, {}) | changes
    if "num_hidden_layers" in changes:
        kinds = {name: value for name, value in values.items() if name.endswith("_types") and isinstance(value, list)}
        layers = values["num_hidden_layers"]
        values |= {name: (value * layers)[:layers] for name, value in kinds.items() if name not in changes}
    elif "layer_types" in values and "num_hidden_layers" in given:
        values["num_hidden_layers"] = len(values["layer_types"])
    parts = {name: part for name, part in given.items() if isinstance(part, PreTrainedConfig)}
    values |= {name: _shrunk(part, values.get(name, {})) for name, part in parts.items()}
    return type(default)(**values)


def _stored(config: PreTrainedConfig, name: str) -> Any:
    """A field's value, also where the attribute is not to be read as it may differ by layer."""
    return vars(config).get(config.attribute_map.get(name, name))


def _cut(kinds: Sequence[str], alternate: bool) -> list[str]:
    """Few layers in which every kind of layer occurs: in turn, or each once and then the last kind again."""
    different = list(dict.fromkeys(kinds))
    length = max(LAYERS, 2 * len(different) if alternate else len(different))
    return (different * length)[:length] if alternate else (different + different[-1:] * length)[:length]
