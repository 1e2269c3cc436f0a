"""Every option of `generate`: honoured exactly, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.drafts import right_and_wrong
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)

import lookahead_decoding as ld
from lookahead_decoding.hf import generate as hf
from test_exactness import CONFIGS, batch_of, prompt_of

SMALL = CONFIGS["4/3/3"]
Tiny = Callable[..., torch.nn.Module]

HONOURED = {
    "temperature": {"do_sample": True, "temperature": 0.5},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "top_h": {"do_sample": True, "top_h": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.6},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.1},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[5], [7, 8]]},
    "sequence_bias": {"sequence_bias": [[[9], 5.0], [[4, 6], -3.0]]},
    "suppress_tokens": {"suppress_tokens": [5, 6, 7]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [5, 6, 7]},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "min_length": {"min_length": 30},
    "min_new_tokens": {"min_new_tokens": 30},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (5, 1.2)},
    "renormalize_logits": {"do_sample": True, "renormalize_logits": True, "top_k": 5},
    "remove_invalid_values": {"remove_invalid_values": True},
    "several ends": {"eos_token_id": [2, 11, 30, 40, 50]},
    "max_length": {"max_length": 25, "max_new_tokens": None},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + row, 40))},
}


def test_every_field_and_parameter_is_listed() -> None:
    fields = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    assert fields <= set(hf.GENERATION_CONFIG_FIELDS), fields - set(hf.GENERATION_CONFIG_FIELDS)
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self"}
    assert parameters <= set(hf.GENERATE_PARAMETERS), parameters - set(hf.GENERATE_PARAMETERS)


@pytest.mark.parametrize("name", HONOURED)
def test_option_alone(name: str, tiny: Tiny) -> None:
    options = {"max_new_tokens": 40, "do_sample": False, **HONOURED[name]}
    model, ids = tiny(), prompt_of(8)
    torch.manual_seed(2)
    plain = model.generate(ids, **options)[0].tolist()
    for propose in (None, right_and_wrong(plain)):
        torch.manual_seed(2)
        decoding = ld.LookaheadDecoding(SMALL, propose=propose)
        assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain


@pytest.mark.parametrize("name", [n for n, o in HONOURED.items() if not o.get("do_sample")])
def test_option_in_a_padded_batch(name: str, tiny: Tiny) -> None:
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, **HONOURED[name]}
    model = tiny()
    ids, mask = batch_of((8, 3, 5))
    plain = model.generate(ids, attention_mask=mask, **options).tolist()
    sources = {
        tuple(row[start : start + 3]): right_and_wrong(row[start:]) for row, start in zip(plain, (0, 5, 3), strict=True)
    }
    decoding = ld.LookaheadDecoding(SMALL, propose=lambda text: sources[tuple(text[:3])](text))
    assert ld.generate(model, ids, attention_mask=mask, lookahead=decoding, **options).tolist() == plain


@pytest.mark.parametrize("name", ["encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "repetition_penalty"])
def test_state_per_sequence_with_several_returns_of_several_prompts(name: str, tiny: Tiny) -> None:
    ids, mask = batch_of((8, 5))
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, **HONOURED[name]}
    plain = tiny().generate(ids, attention_mask=mask, **options)
    twice = ld.generate(
        tiny(),
        ids,
        attention_mask=mask,
        num_return_sequences=2,
        seeds=[1, 2, 3, 4],
        **{**options, "do_sample": True, "top_k": 1},
    )
    end = plain.shape[1]
    assert twice[[0, 2], :end].tolist() == twice[[1, 3], :end].tolist() == plain.tolist()


def test_num_return_sequences(tiny: Tiny) -> None:
    options = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 3, "eos_token_id": None}
    ours = ld.generate(tiny(), prompt_of(5), seeds=[1, 2, 3], lookahead=SMALL, **options)
    assert ours.shape == (3, 25)
    alone = ld.generate(tiny(), prompt_of(5), seeds=[2], lookahead=SMALL, **{**options, "num_return_sequences": 1})
    assert ours[1].tolist() == alone[0].tolist()


def test_generation_config_is_used_and_left_alone(tiny: Tiny) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    before = config.to_dict()
    plain = tiny().generate(prompt_of(4), generation_config=config)
    assert ld.generate(tiny(), prompt_of(4), generation_config=config).tolist() == plain.tolist()
    assert config.to_dict() == before


class Counting(LogitsProcessor):
    """Depends on how often it was called: one call per emitted token, or the output changes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return scores.index_fill(1, torch.tensor([self.calls % 60]), 40.0 if self.calls % 3 == 0 else -40.0)


class AfterCalls(StoppingCriteria):
    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.calls -= 1
        return torch.full((len(input_ids),), self.calls <= 0)


def test_a_stateful_processor_and_criterion_run_once_per_token(tiny: Tiny) -> None:
    outputs, calls = [], []
    for run in (tiny().generate, lambda *a, **k: ld.generate(tiny(), *a, lookahead=SMALL, **k)):
        counting = Counting()
        outputs.append(
            run(
                prompt_of(6),
                max_new_tokens=50,
                do_sample=False,
                eos_token_id=None,
                logits_processor=LogitsProcessorList([counting]),
                stopping_criteria=StoppingCriteriaList([AfterCalls(31)]),
            ).tolist()
        )
        calls.append(counting.calls)
    assert outputs[0] == outputs[1]
    assert calls == [31, 31]


def test_each_row_of_a_batch_has_its_own_processor_and_criterion(tiny: Tiny) -> None:
    ids, mask = batch_of((6, 4))
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    counting = Counting()
    ours = ld.generate(
        tiny(), ids, attention_mask=mask, logits_processor=LogitsProcessorList([counting]), lookahead=SMALL, **options
    )
    plain = tiny().generate(ids, attention_mask=mask, logits_processor=LogitsProcessorList([Counting()]), **options)
    assert ours.tolist() == plain.tolist()
    assert counting.calls == 0  # copies ran


class OfRow(LogitsProcessor):
    """Favours one token per sequence, by the sequence's number."""

    def __init__(self, wanted: list[int]) -> None:
        self.wanted = wanted

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, token in enumerate(self.wanted):
            scores[row, token] += 1000
        return scores

    def for_row(self, row: int) -> OfRow:
        return OfRow([self.wanted[row]])


def test_a_processor_may_say_what_it_is_for_each_sequence(tiny: Tiny) -> None:
    ids, mask = batch_of((3, 3))
    ours = ld.generate(
        tiny(), ids, attention_mask=mask, pad_token_id=0, max_new_tokens=2, do_sample=False,
        logits_processor=LogitsProcessorList([OfRow([10, 20])]),
    )  # fmt: skip
    assert ours[:, 3:].tolist() == [[10, 10], [20, 20]]


def test_the_shortest_of_several_length_limits_counts(tiny: Tiny) -> None:
    limits = StoppingCriteriaList([MaxLengthCriteria(20), MaxLengthCriteria(9)])
    assert ld.generate(tiny(), prompt_of(5), stopping_criteria=limits, eos_token_id=None).shape == (1, 9)


WATERMARKS = {
    "watermark": WatermarkingConfig(seeding_scheme="selfhash", context_width=2),
    "synthid": SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3),
}


@pytest.mark.parametrize("name", WATERMARKS)
def test_a_watermark_is_the_same(name: str, tiny: Tiny) -> None:
    outputs = []
    for run in (tiny().generate, lambda *a, **k: ld.generate(tiny(), *a, lookahead=SMALL, **k)):
        torch.manual_seed(5)
        options = {"max_new_tokens": 30, "do_sample": True, "watermarking_config": WATERMARKS[name]}
        outputs.append(run(prompt_of(6), eos_token_id=None, **options).tolist())
    assert outputs[0] == outputs[1]


class NotCopyable(LogitsProcessor):
    def __deepcopy__(self, memo: object) -> object:
        raise TypeError("holds a file")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


def test_a_processor_that_cannot_be_copied_is_refused_for_a_batch_alone(tiny: Tiny) -> None:
    ids, mask = batch_of((3, 3))
    processors = LogitsProcessorList([NotCopyable()])
    ld.generate(tiny(), ids[:1], max_new_tokens=3, logits_processor=processors)
    with pytest.raises(ValueError, match="NotCopyable cannot be copied"):
        ld.generate(tiny(), ids, attention_mask=mask, max_new_tokens=3, pad_token_id=0, logits_processor=processors)


def test_max_time_ends_the_text(tiny: Tiny) -> None:
    out = ld.generate(tiny(), prompt_of(4), max_new_tokens=100, max_time=1e-9, eos_token_id=None, do_sample=False)
    assert out.shape[1] == 5


def test_stop_strings_end_inside_an_accepted_run(pocket: tuple[torch.nn.Module, object]) -> None:
    model, tokenizer = pocket
    ids = tokenizer("import os\nimport ", return_tensors="pt").input_ids
    options = {"max_new_tokens": 60, "do_sample": False, "tokenizer": tokenizer}
    whole = model.generate(ids, **{k: v for k, v in options.items() if k != "tokenizer"})[0].tolist()
    stop = tokenizer.decode(whole[ids.shape[1] + 9 : ids.shape[1] + 11])
    plain = model.generate(ids, stop_strings=[stop], **options)[0].tolist()
    assert len(plain) < len(whole)
    decoding = ld.LookaheadDecoding(SMALL, propose=lambda text: [whole[len(text) : len(text) + 8]])
    assert ld.generate(model, ids, stop_strings=[stop], lookahead=decoding, **options)[0].tolist() == plain
    assert decoding.finish_reasons == ["stop"]
    config = GenerationConfig(max_new_tokens=60, do_sample=False, stop_strings=stop, eos_token_id=0, pad_token_id=0)
    assert ld.generate(model, ids, generation_config=config, tokenizer=tokenizer)[0].tolist() == plain
    with pytest.raises(ValueError, match="stop_strings needs the tokenizer"):
        ld.generate(model, ids, stop_strings=[stop], max_new_tokens=9)


class Recorder:
    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.puts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_once_each_token_once_and_the_end(tiny: Tiny) -> None:
    records = []
    for run in (tiny().generate, lambda *a, **k: ld.generate(tiny(), *a, **k)):
        records.append(Recorder())
        run(prompt_of(5), max_new_tokens=30, do_sample=False, streamer=records[-1])
    assert records[0].puts == records[1].puts
    assert records[1].ended == 1
    through_object = Recorder()
    decoding = ld.LookaheadDecoding(SMALL, streamer=through_object)
    tiny().generate(prompt_of(5), max_new_tokens=30, do_sample=False, custom_generate=decoding)
    assert through_object.puts == records[0].puts


def test_a_streamer_takes_one_sequence(tiny: Tiny) -> None:
    ids, mask = batch_of((3, 3))
    recorder = Recorder()
    with pytest.raises(ValueError, match="a streamer takes one sequence, got 2"):
        ld.generate(tiny(), ids, attention_mask=mask, pad_token_id=0, max_new_tokens=3, streamer=recorder)
    assert recorder.puts == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens alone"])
def test_a_callers_cache_is_continued_and_left_as_generate_leaves_it(name: str, whole: bool, tiny: Tiny) -> None:
    model, ids = tiny(name), prompt_of(20)
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    caches, outputs = [], []
    for run in (model.generate, lambda *a, **k: ld.generate(model, *a, lookahead=SMALL, **k)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :12], past_key_values=cache, use_cache=True)
        new = ids if whole else ids[:, 12:]
        outputs.append(run(new, attention_mask=torch.ones_like(ids), past_key_values=cache, **options).tolist())
        caches.append(cache)
    assert outputs[0] == outputs[1]
    assert caches[0].get_seq_length() == caches[1].get_seq_length() == 34
    for plain, ours in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.allclose(plain.keys, ours.keys, atol=1e-4)
        assert torch.allclose(plain.values, ours.values, atol=1e-4)
    text = torch.tensor(outputs[0]) if whole else torch.cat([ids[:, :12], torch.tensor(outputs[0])], 1)
    more = [model.generate(text, past_key_values=c, **options).tolist() for c in caches]
    assert more[0] == more[1]


def test_an_empty_cache_without_a_configuration_is_filled(tiny: Tiny) -> None:
    cache = DynamicCache()
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    ours = ld.generate(tiny(), prompt_of(5), past_key_values=cache, **options)
    assert cache.get_seq_length() == 13
    more = tiny().generate(ours, past_key_values=cache, **options)
    assert more.tolist() == tiny().generate(prompt_of(5), **{**options, "max_new_tokens": 18}).tolist()


def test_a_criterion_may_answer_with_a_bool(tiny: Tiny) -> None:
    criteria = StoppingCriteriaList([lambda ids, scores, **k: ids.shape[1] > 10])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    assert ld.generate(tiny(), prompt_of(5), stopping_criteria=criteria, **options).shape == (1, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ["a"]}, "seeds must be integers"),
        ({"seeds": 1}, "seeds must be integers"),
        ({"generation_config": {"max_new_tokens": 3}}, "must be a GenerationConfig, got dict"),
        ({"lookahead": True}, "lookahead must be a LookaheadConfig"),
        ({"attention_mask": "x"}, "attention_mask must be a tensor"),
        ({"logits_processor": len}, "logits_processor must be a LogitsProcessorList"),
        ({"stopping_criteria": len}, "stopping_criteria must be a StoppingCriteriaList"),
    ],
)
def test_wrong_types_are_named(options: dict[str, object], message: str, tiny: Tiny) -> None:
    with pytest.raises(TypeError, match=message):
        ld.generate(tiny(), prompt_of(5), **options)
    with pytest.raises(TypeError, match="model must be a transformers model, got str"):
        ld.generate("gpt2", prompt_of(5))


def test_a_config_as_custom_generate_is_not_ignored(tiny: Tiny) -> None:
    with pytest.raises(TypeError, match="custom_generate takes a LookaheadDecoding"):
        tiny().generate(prompt_of(5), max_new_tokens=3, custom_generate=SMALL)


def test_a_padded_batch_continues_from_a_cache(tiny: Tiny) -> None:
    model = tiny()
    ids, mask = batch_of((9, 4))
    options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    outputs = []
    for run in (model.generate, lambda *a, **k: ld.generate(model, *a, lookahead=SMALL, **k)):
        cache = DynamicCache(config=model.config)
        first = run(ids, attention_mask=mask, past_key_values=cache, **options)
        longer = torch.cat([mask, torch.ones(2, 15, dtype=mask.dtype)], 1)
        outputs.append(run(first, attention_mask=longer, past_key_values=cache, **options).tolist())
    assert outputs[0] == outputs[1]


def test_a_returned_cache_continues_in_generate(tiny: Tiny) -> None:
    model = tiny()
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    result = ld.generate(model, prompt_of(5), return_dict_in_generate=True, **options)
    assert result.past_key_values.get_seq_length() == result.sequences.shape[1] - 1
    more = model.generate(result.sequences, past_key_values=result.past_key_values, **options)
    assert more.tolist() == model.generate(prompt_of(5), **{**options, "max_new_tokens": 20}).tolist()


def test_scores_and_logits_are_those_of_plain_decoding(tiny: Tiny) -> None:
    ids, mask = batch_of((5, 3))
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = tiny().generate(ids, attention_mask=mask, **options)
    ours = ld.generate(tiny(), ids, attention_mask=mask, lookahead=SMALL, **options)
    assert type(ours) is type(plain)
    assert len(ours.scores) == len(ours.logits) == 12
    for name in ("scores", "logits"):
        for a, b in zip(plain[name], ours[name], strict=True):
            assert torch.allclose(a, b, atol=1e-3)


def test_a_whole_text_model_generate_call_uses_the_loop(tiny: Tiny) -> None:
    decoding = ld.LookaheadDecoding(SMALL)
    options = {"max_new_tokens": 30, "do_sample": False}
    ours = tiny().generate(prompt_of(5), custom_generate=decoding, **options)
    assert ours.tolist() == tiny().generate(prompt_of(5), **options).tolist()
    assert decoding.stats.tokens == ours.shape[1] - 5
    assert decoding.stats.forwards <= decoding.stats.tokens
    assert sum(decoding.stats.seconds.values()) > 0


def test_a_pipeline_works(pocket: tuple[torch.nn.Module, object]) -> None:
    model, tokenizer = pocket
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 25, "do_sample": False}
    decoding = ld.LookaheadDecoding(SMALL)
    assert run("def f(x):", custom_generate=decoding, **options) == run("def f(x):", **options)
    assert decoding.stats.steps > 0


def test_a_folder_works_as_custom_generate(pocket: tuple[torch.nn.Module, object]) -> None:
    model, tokenizer = pocket
    folder = str(Path(__file__).parents[1] / "integrations" / "custom_generate")
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    options = {"max_new_tokens": 25, "do_sample": False}
    ours = model.generate(ids, custom_generate=folder, trust_remote_code=True, window_size=5, ngram_size=3, **options)
    assert ours.tolist() == model.generate(ids, **options).tolist()
    longer = {**options, "max_new_tokens": 60, "eos_token_id": None}
    ours = model.generate(ids, custom_generate=folder, trust_remote_code=True, **longer)
    assert ours.tolist() == model.generate(ids, **longer).tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2: beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6: contrastive search"),
        ({"dola_layers": "high"}, "DoLa"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3: another assisted"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0: guidance"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        ({"assistant_model": object()}, "assistant_model: another assisted"),
        ({"synced_gpus": True}, "synced_gpus: synchronised ranks"),
        ({"negative_prompt_ids": torch.ones(1, 3)}, "negative_prompt_ids: guidance"),
        ({"negative_prompt_attention_mask": torch.ones(1, 3)}, "negative_prompt_attention_mask: guidance"),
        ({"custom_generate": print}, "custom_generate: lookahead decoding is a custom_generate"),
        ({"seeds": [1, 2]}, "seeds must have one entry per sequence, 1 here, got 2"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, 7]])}, "position_ids"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "pad on the left only"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, object], message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        ld.generate(tiny(attn_implementation="eager"), prompt_of(5), **{"max_new_tokens": 4, **options})


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("text", "got str: text needs a tokenizer"),
        ([1, 2], "got list"),
        ({"input_ids": 1}, r"goes in as \*\*inputs"),
        (torch.ones(1, 3), "must be integers, got torch.float32"),
        (torch.ones(3, dtype=torch.long), r"must be \(batch, length\), got shape \(3,\)"),
        (torch.ones(1, 1, 3, dtype=torch.long), r"got shape \(1, 1, 3\)"),
        (torch.tensor([[1, 64]]), "has token 64, and the model's go from 0 to 63"),
        (torch.tensor([[-1, 6]]), "has token -1"),
    ],
)
def test_what_are_no_token_ids_is_said_plainly(ids: object, message: str, tiny: Tiny) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ld.generate(tiny(), ids, max_new_tokens=4)


def test_stop_strings_and_lengths_of_another_type_are_named(tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ld.pocket_path())
    for stops in (3, [3], [""]):
        with pytest.raises(TypeError, match="stop_strings must be a text or several"):
            ld.LookaheadDecoding(tokenizer=tokenizer, stop_strings=stops)
    for length in (4.5, True, "4"):
        with pytest.raises(TypeError, match="max_new_tokens must be an integer"):
            ld.generate(tiny(), prompt_of(5), max_new_tokens=length)
    assert ld.LookaheadDecoding(seed=np.int64(3)).seed == 3


def test_a_token_outside_of_the_vocabulary_is_named_in_every_way_in(tiny: Tiny) -> None:
    for more in ({}, {"token_type_ids": torch.zeros(1, 2, dtype=torch.long)}):
        with pytest.raises(ValueError, match="input_ids has token 64, and the model's go from 0 to 63"):
            ld.generate(tiny(), torch.tensor([[5, 64]]), max_new_tokens=4, **more)
    with pytest.raises(ValueError, match="input_ids has token 64"):
        tiny().generate(torch.tensor([[5, 64]]), max_new_tokens=4, custom_generate=ld.LookaheadDecoding())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streamer": "x"}, "streamer must have put and end"),
        ({"tokenizer": "x"}, "tokenizer must be a tokenizer"),
        ({"propose": 3}, "propose must be a function"),
        ({"parallel": 2}, r"parallel must be what ld.parallel\(\) gives"),
        ({"execution": True}, "execution must be one of auto"),
        ({"seed": "3"}, r"seed must be an integer from 0 to 2\*\*63 - 1, got '3'"),
        ({"seed": 2**70}, "seed must be an integer from 0"),
        ({"seeds": [True]}, "seeds must be integers, one per sequence"),
        ({"seeds": 3}, "seeds must be integers, one per sequence"),
        ({"seed": 3, "seeds": [3]}, "seed and seeds exclude each other"),
        ({"shared": ld.SharedPool()}, "shared must be a namespace"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_decoding_of_wrong_things_is_not_made(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ld.LookaheadDecoding(**options)


def test_one_seed_counts_up_over_a_batch(tiny: Tiny) -> None:
    ids, options = prompt_of(5).repeat(3, 1), {"max_new_tokens": 9, "do_sample": True, "eos_token_id": None}
    wanted = ld.generate(tiny(), ids, seeds=[4, 5, 6], **options).tolist()
    assert ld.generate(tiny(), ids, seed=4, **options).tolist() == wanted
    assert ld.generate(tiny(), ids, lookahead=ld.LookaheadDecoding(seed=4), **options).tolist() == wanted
    assert ld.generate(tiny(), ids, lookahead=ld.LookaheadDecoding(seed=1), seed=4, **options).tolist() == wanted


def test_a_cache_of_another_kind_is_refused(tiny: Tiny) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="must be a DynamicCache, got StaticCache"):
        ld.generate(
            model, prompt_of(5), max_new_tokens=4, past_key_values=StaticCache(config=model.config, max_cache_len=20)
        )


def test_what_the_models_file_only_defaults_is_overridden(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    plain = model.generate(prompt_of(5), max_new_tokens=9, do_sample=False).tolist()
    monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    assert ld.generate(model, prompt_of(5), max_new_tokens=9, do_sample=False).tolist() == plain
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    with pytest.raises(ValueError, match="num_beams=3"):
        ld.generate(model, prompt_of(5), max_new_tokens=9)


def test_a_prompt_past_the_context_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="input_ids: the prompt has 129 tokens and the model's context is 128"):
        ld.generate(tiny(), prompt_of(129), max_new_tokens=1)


def test_an_empty_prompt_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="empty"):
        ld.generate(tiny(), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)


@pytest.mark.parametrize("config", [(4, 3, 3), {"window_size": 4}, "4/3/3"])
def test_a_config_of_another_type_is_refused(config: object, tiny: Tiny) -> None:
    with pytest.raises(TypeError, match="lookahead must be a LookaheadConfig"):
        ld.generate(tiny(), prompt_of(5), max_new_tokens=1, lookahead=config)


def test_an_unknown_argument_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="windw_size"):
        ld.generate(tiny(), prompt_of(5), max_new_tokens=1, windw_size=3)


def test_a_text_streamer_prints_the_text(pocket: tuple[torch.nn.Module, object], capsys: pytest.CaptureFixture) -> None:
    model, tokenizer = pocket
    ids = tokenizer("def f(x):", return_tensors="pt").input_ids
    printed = []
    for run in (model.generate, lambda *a, **k: ld.generate(model, *a, **k)):
        run(ids, max_new_tokens=20, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
        printed.append(capsys.readouterr().out)
    assert printed[0]
    assert printed[1] == printed[0]
