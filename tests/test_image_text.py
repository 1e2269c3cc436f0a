"""Models that read images: the same text as stock `model.generate`, the image given with the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import lookahead_decoding as ld

VOCAB, IMAGE, VIDEO, START, END = 99, 90, 91, 92, 93
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {"model_type": "llama", **TEXT}
PLANES = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
CLIP = {"model_type": "clip_vision_model", **TOWER, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
MLLAMA_TOWER = {
    **{k: v for k, v in TOWER.items() if k != "num_attention_heads"},
    "attention_heads": 4,
    "num_global_layers": 1,
    "vision_output_dim": 64,
    "intermediate_layers_indices": [1],
}
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GRID = {"hidden_size": 32, "num_heads": 4, "depth": 2, "patch_size": 2}
QWEN2 = {**GRID, "embed_dim": 32, "mlp_ratio": 2}
QWEN25 = {**GRID, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 8, "fullatt_block_indexes": [1]}
QWEN3 = {**GRID, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
GEMMA = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END, "tie_word_embeddings": False}
PALIGEMMA = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32, "tie_word_embeddings": False}

Inputs = dict[str, torch.Tensor]


def pixels(*shape: int) -> Callable[[torch.Tensor, torch.Generator], Inputs]:
    """One image of a shape for each prompt."""
    return lambda ids, rng: {"pixel_values": torch.randn(len(ids), *shape, generator=rng)}


PICTURE = pixels(3, 16, 16)


def grid(ids: torch.Tensor, rng: torch.Generator) -> Inputs:
    """Four by eight patches, of which four make a token."""
    pixel_values = torch.randn(len(ids) * 32, 24, generator=rng)
    return {"pixel_values": pixel_values, "image_grid_thw": torch.tensor([[1, 4, 8]] * len(ids))}


def tiles(ids: torch.Tensor, rng: torch.Generator) -> Inputs:
    """Two tiles of four, side by side."""
    pixel_values = torch.randn(len(ids), 1, 4, 3, 16, 16, generator=rng)
    ratio, tiles = torch.full((len(ids), 1), 6), torch.tensor([[[1, 1, 0, 0]]] * len(ids))
    return {"pixel_values": pixel_values, "aspect_ratio_ids": ratio, "aspect_ratio_mask": tiles}


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        config: of a tiny one.
        tokens: that an image has in the prompt.
        image: the images of a batch of prompts, random.
        aligned: inputs that have a value per token of the prompt.
        token: of an image.
    """

    config: dict[str, object]
    tokens: int
    image: Callable[[torch.Tensor, torch.Generator], Inputs] = PICTURE
    aligned: Callable[[torch.Tensor], Inputs] = lambda ids: {}
    token: int = IMAGE


def modalities(ids: torch.Tensor) -> Inputs:
    return {"mm_token_type_ids": (ids == IMAGE).long()}


def bidirectional(ids: torch.Tensor) -> Inputs:
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix(ids: torch.Tensor) -> Inputs:
    return {"token_type_ids": torch.zeros_like(ids)}


def cross(ids: torch.Tensor) -> Inputs:
    seen = (ids == VOCAB).cumsum(1).clamp(max=1)
    return {"cross_attention_mask": seen[:, :, None, None] * torch.tensor([1, 1, 0, 0])}


def of(text: dict[str, object], vision: dict[str, object], **others: object) -> dict[str, object]:
    return {"text_config": text, "vision_config": vision, **others}


DEEP = {**TEXT, "num_hidden_layers": 6, "sliding_window": 8}
CROSS = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
FAMILIES = {
    "llava": Family(of(LLAMA, CLIP, image_token_index=IMAGE, vision_feature_layer=-1), 16),
    "idefics3": Family(of(LLAMA, TOWER, image_token_id=IMAGE, pad_token_id=0), 4, pixels(1, 3, 16, 16)),
    "smolvlm": Family(of(LLAMA, TOWER, image_token_id=IMAGE, pad_token_id=0), 4, pixels(1, 3, 16, 16)),
    "internvl": Family(of({**LLAMA, "model_type": "qwen2"}, TOWER, image_token_id=IMAGE, image_seq_length=4), 4),
    "qwen2_vl": Family(of(PLANES, QWEN2, **QWEN), 8, grid, modalities),
    "qwen2_5_vl": Family(of(PLANES, QWEN25, **QWEN), 8, grid, modalities),
    "qwen3_vl": Family(of(PLANES, {**QWEN3, "deepstack_visual_indexes": [0, 1]}, **QWEN), 8, grid, modalities),
    "gemma3": Family(  # an image is longer than the window
        of(DEEP, {**SIGLIP, "image_size": 32}, mm_tokens_per_image=16, **GEMMA), 16, pixels(3, 32, 32), bidirectional
    ),
    "paligemma": Family(of({**LLAMA, "model_type": "gemma"}, SIGLIP, **PALIGEMMA), 16, aligned=prefix),
    "mllama": Family(of(CROSS, MLLAMA_TOWER, image_token_index=VOCAB), 1, tiles, cross, token=VOCAB),
}
WORKING = tuple(name for name in FAMILIES if name != "mllama")
PLAIN = {"max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
MODES = {"greedy": PLAIN, "sampled": {**PLAIN, "do_sample": True, "temperature": 0.8}}
WINDOW_ALONE = ld.LookaheadConfig.paper(4, 3, 0)  # so that all candidates are the test's own


@cache
def model_of(name: str) -> torch.nn.Module:
    """Random, with weights large enough for text that is varied and depends on the image."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **FAMILIES[name].config)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for weight_name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, 0, 0.3)
        elif "gate" in weight_name:  # closed in a new model
            torch.nn.init.ones_(weight)
    return model


def prompts_of(name: str, rows: Sequence[Sequence[int]], seed: int = 0) -> Inputs:
    """Padded on the left; -1 stands for an image."""
    family = FAMILIES[name]
    filled = [[t for token in row for t in ([family.token] * family.tokens if token < 0 else [token])] for row in rows]
    width = max(map(len, filled))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in filled])
    images = family.image(ids, torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), **family.aligned(ids), **images}


ONE = [5, 12, 19, START, -1, END, 40, 47]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORKING)
def test_an_image_goes_in_with_the_prompt(name: str, mode: str, accepted: Accepted) -> None:
    model, inputs, options = model_of(name), prompts_of(name, [ONE]), MODES[mode]
    torch.manual_seed(3)
    plain = model.generate(**inputs, **options)[0].tolist()
    torch.manual_seed(3)
    assert model.generate(**prompts_of(name, [ONE], seed=1), **options)[0].tolist() != plain
    assert len(set(plain[-60:])) > 10
    decoding = ld.LookaheadDecoding(WINDOW_ALONE, propose=right_and_wrong(plain, VOCAB))
    torch.manual_seed(3)
    assert ld.generate(model, **inputs, lookahead=decoding, **options)[0].tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}
    assert decoding.stats.mean_acceptance_length > 1.5


def test_an_input_that_every_step_would_need_is_refused() -> None:
    with pytest.raises(ValueError, match="cross_attention_mask: lookahead decoding gives its steps no such input"):
        ld.generate(model_of("mllama"), **prompts_of("mllama", [ONE]), **PLAIN)


@pytest.mark.parametrize("name", WORKING)
def test_text_alone_needs_no_image(name: str, accepted: Accepted) -> None:
    model, ids = model_of(name), torch.tensor([[5, 9, 33, 21, 60]])
    model.generate(**prompts_of(name, [ONE]), **PLAIN)  # nothing of which may stay behind
    plain = model.generate(input_ids=ids, **PLAIN)[0].tolist()
    decoding = ld.LookaheadDecoding(WINDOW_ALONE, propose=right_and_wrong(plain, VOCAB))
    assert ld.generate(model, input_ids=ids, lookahead=decoding, **PLAIN)[0].tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}


@pytest.mark.parametrize("name", WORKING)
def test_prompts_of_a_batch_have_an_image_each(name: str, accepted: Accepted) -> None:
    model, inputs = model_of(name), prompts_of(name, [ONE, [3, 4, 5, 6, 7, *ONE, 8]])
    plain = model.generate(**inputs, **PLAIN).tolist()
    short, long = plain[0][6:], plain[1]

    def propose(text: Sequence[int]) -> list[list[int]]:
        return right_and_wrong(short if text[0] == ONE[0] else long, VOCAB)(text)

    decoding = ld.LookaheadDecoding(WINDOW_ALONE, propose=propose)
    assert ld.generate(model, **inputs, lookahead=decoding, **PLAIN).tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}


@pytest.mark.parametrize("name", WORKING)
def test_padding_in_front_of_all_prompts_changes_nothing(name: str) -> None:
    model, inputs = model_of(name), prompts_of(name, [[0, 0, 0, *ONE]])
    assert ld.generate(model, **inputs, **PLAIN).tolist() == model.generate(**inputs, **PLAIN).tolist()


@pytest.mark.parametrize("name", WORKING)
def test_a_prompt_may_end_with_its_image(name: str) -> None:
    model, inputs = model_of(name), prompts_of(name, [[5, 12, -1]])
    assert ld.generate(model, **inputs, **PLAIN).tolist() == model.generate(**inputs, **PLAIN).tolist()


def conversation(name: str, generate: Callable[..., torch.Tensor], turn: Sequence[int]) -> list[list[int]]:
    """An answer about an image, and one to a second turn, from the cache that the first has left."""
    past = DynamicCache(config=model_of(name).config.get_text_config(decoder=True))
    first = generate(**prompts_of(name, [ONE]), past_key_values=past, **{**PLAIN, "max_new_tokens": 5})[0].tolist()
    inputs = prompts_of(name, [[*first, *turn]], seed=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if -1 not in turn:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return generate(**inputs, past_key_values=past, **PLAIN).tolist()


@pytest.mark.parametrize("turn", [(11, 12, 13), (11, START, -1, END, 13)], ids=["text", "another image"])
@pytest.mark.parametrize("name", WORKING)
def test_a_conversation_goes_on_behind_its_image(name: str, turn: tuple[int, ...]) -> None:
    if -1 in turn and FAMILIES[name].image is grid:
        pytest.skip("generate itself wants the grids of all images, and then the pixels of all")
    model = model_of(name)
    try:
        plain = conversation(name, model.generate, turn)
    except RuntimeError:  # gemma3 in older versions
        pytest.skip("generate itself fails on a second image")
    assert conversation(name, lambda **inputs: ld.generate(model, **inputs), turn) == plain
