from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import lookahead_decoding as ld
from lookahead_decoding.hf.stream import Detokenizer, decode_text

Pocket = tuple[torch.nn.Module, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is one byte, so that characters span tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_characters_come_whole_although_tokens_cut_them(byte_tokenizer: PreTrainedTokenizerFast, size: int) -> None:
    text = "naïve 日本 🙂!"
    ids = byte_tokenizer(text).input_ids
    assert len(ids) > len(text)
    detokenizer = Detokenizer(byte_tokenizer)
    parts = [detokenizer.add(ids[i : i + size], i + size >= len(ids)) for i in range(0, len(ids), size)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_an_unfinished_character_at_the_end_is_given_as_it_is(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer("é").input_ids[:1]
    detokenizer = Detokenizer(byte_tokenizer)
    assert detokenizer.add(ids) == ""
    assert detokenizer.add((), last=True) == "\ufffd"


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 3}])
def test_joined_steps_are_the_decoded_output(options: dict[str, object], pocket: Pocket) -> None:
    model, tokenizer = pocket
    steps = list(ld.stream(model, tokenizer, '"""Grüße 🙂', max_new_tokens=60, **options))
    ids = [t for step in steps for t in step.token_ids]
    assert "".join(step.text for step in steps) == decode_text(tokenizer, ids)
    assert [s.finish_reason for s in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason in ("stop", "length")
    assert steps[-1].stats.tokens == len(ids)
    assert steps[-1].stats.forwards == len(steps)


def test_a_stream_equals_generate(pocket: Pocket) -> None:
    model, tokenizer = pocket
    ids = tokenizer("class A:", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :].tolist()
    for prompt in ("class A:", ids[0].tolist()):
        steps = ld.stream(model, tokenizer, prompt, max_new_tokens=40, do_sample=False)
        assert [t for s in steps for t in s.token_ids] == plain


def test_stop_strings_work_in_a_stream(pocket: Pocket) -> None:
    model, tokenizer = pocket
    steps = list(ld.stream(model, tokenizer, "import os\n", max_new_tokens=60, do_sample=False, stop_strings="\n"))
    assert steps[-1].finish_reason == "stop"
    assert "\n" in "".join(s.text for s in steps)


def test_bad_input_is_refused_before_the_first_step(pocket: Pocket) -> None:
    model, tokenizer = pocket
    with pytest.raises(ValueError, match="the prompt is empty"):
        ld.stream(model, tokenizer, "", max_new_tokens=5)
    with pytest.raises(ValueError, match="num_beams=2"):
        ld.stream(model, tokenizer, "a", max_new_tokens=5, num_beams=2)
    for prompt in (["a", "b"], torch.ones(2, 3, dtype=torch.long)):
        with pytest.raises(TypeError, match="prompt must be one text"):
            ld.stream(model, tokenizer, prompt, max_new_tokens=5)
    for options in ({"streamer": object()}, {"return_dict_in_generate": True}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ld.stream(model, tokenizer, "a", max_new_tokens=5, **options)


def test_a_cache_that_was_passed_in_is_filled_at_the_end(pocket: Pocket) -> None:
    model, tokenizer = pocket
    cache = DynamicCache(config=model.config)
    steps = ld.stream(model, tokenizer, "class A:", max_new_tokens=9, do_sample=False, past_key_values=cache)
    length = len(tokenizer("class A:").input_ids) + sum(len(s.token_ids) for s in steps)
    assert cache.get_seq_length() == length - 1


def test_a_stream_of_wrong_things_is_not_made(tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ld.pocket_path())
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer, as AutoTokenizer gives, got str"):
        ld.stream(tiny(), "x", "def f")
    for messages in ([], {"role": "user"}, 3, ["hi"], "hi"):
        with pytest.raises(TypeError, match="messages must be a sequence of mappings"):
            ld.stream(tiny(), tokenizer, messages=messages)
    with pytest.raises(TypeError, match="seed must be an integer from 0"):
        ld.stream(tiny(), tokenizer, [5, 6], seed="3")
