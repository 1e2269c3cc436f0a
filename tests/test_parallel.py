"""Steps that are divided over ranks give what one device gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.drafts import right_and_wrong, watched
from benchmarks.tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

import lookahead_decoding as ld
import many
from conftest import ARCHITECTURES, FREE
from lookahead_decoding.model.probe import probe
from lookahead_decoding.ranks.group import Ranks

PROMPT = [5, 6, 7, 8, 9, 5, 6]
LONG = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}


def small(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


class Counting(LogitsProcessor):
    """Remembers the texts it was called with: what it does depends on how often that was."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, (self.calls * 7 + int(input_ids[0, -1])) % scores.shape[1]] += 30
        return scores


def both(model: Any, ids: list[list[int]], ranks: Ranks | None, seed: int = 1, **options: Any) -> Any:
    """Tokens of ours, and those of `generate` where no ranks are given."""
    tensor = torch.tensor(ids)
    mask = (tensor != 0).cumsum(1).clamp(max=1)
    torch.manual_seed(seed)
    if ranks is None:
        options.pop("decoding", None)
        return model.generate(tensor, attention_mask=mask, **options)[:, tensor.shape[1] :].tolist()
    decoding = ld.LookaheadDecoding(**({"config": ld.LookaheadConfig(step_times=FREE)} | options.pop("decoding", {})))
    decoding.parallel = ranks
    return ld.generate(model, tensor, attention_mask=mask, lookahead=decoding, **options)[:, tensor.shape[1] :].tolist()


def guessing(model: Any, ids: list[int], **options: Any) -> Callable[[Any], list[list[int]]]:
    """A source that knows the plain text and mixes wrong tokens in."""
    return right_and_wrong([*ids, *both(model, [ids], None, **options)[0]])


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
PAPER = {"config": ld.LookaheadConfig.paper(4, 3, 4)}
TINY_TREE = {"config": ld.LookaheadConfig(max_rows=2, step_times=FREE)}


def greedy(ranks: Ranks | None) -> Any:
    model = small()
    return both(model, [PROMPT], ranks, **LONG, do_sample=False, decoding={"propose": guessing(model, PROMPT, **LONG)})


def sampled(ranks: Ranks | None) -> Any:
    model = small()
    options = LONG | SAMPLED
    return both(model, [PROMPT], ranks, **options, decoding={"propose": guessing(model, PROMPT, **options)})


def with_a_window(ranks: Ranks | None) -> Any:
    return both(small(), [PROMPT], ranks, **LONG, do_sample=False, decoding=PAPER)


def tree_smaller_than_the_ranks(ranks: Ranks | None) -> Any:
    model = small()
    return [
        both(model, [PROMPT], ranks, **LONG, **mode, decoding=TINY_TREE) for mode in ({"do_sample": False}, SAMPLED)
    ]


def adaptive(ranks: Ranks | None) -> Any:
    return both(small(), [PROMPT], ranks, **LONG, **SAMPLED, decoding={"config": ld.LookaheadConfig()})


def penalties_and_a_processor_with_a_state(ranks: Ranks | None) -> Any:
    model = small()

    def options() -> dict[str, Any]:
        return LONG | SAMPLED | {"repetition_penalty": 1.2, "logits_processor": LogitsProcessorList([Counting()])}

    decoding = {"propose": guessing(model, PROMPT, **options())}
    return both(model, [PROMPT], ranks, **options(), decoding=decoding)


def ends_inside_an_accepted_run(ranks: Ranks | None) -> Any:
    model = small()
    plain = both(model, [PROMPT], None, **LONG, do_sample=False)[0]
    options = LONG | {"eos_token_id": plain[17], "do_sample": False}
    return both(model, [PROMPT], ranks, **options, decoding={"propose": right_and_wrong([*PROMPT, *plain])})


def batch(ranks: Ranks | None) -> Any:
    """Each sequence equals the same prompt run alone, with its own seed."""
    model = small()
    prompts = [PROMPT, [0, 0, 3, 4, 5, 3, 4], [0, 11, 12, 13, 11, 12, 13]]
    options = LONG | SAMPLED
    if ranks is None:
        alone = [[token for token in prompt if token] for prompt in prompts]
        return [both(model, [p], None, seed=4 + i, **options)[0] for i, p in enumerate(alone)]
    known = [[*p, *both(model, [[t for t in p if t]], None, seed=4 + i, **options)[0]] for i, p in enumerate(prompts)]
    sources = [right_and_wrong([t for t in text if t]) for text in known]

    def propose(text: Any) -> list[list[int]]:
        return next(
            source(text) for source, p in zip(sources, prompts, strict=True) if text[0] == next(t for t in p if t)
        )

    return both(model, prompts, ranks, **options, decoding={"seeds": [4, 5, 6], "propose": propose})


def sliding_windows(ranks: Ranks | None) -> Any:
    """Long enough for what has left the window to make way."""
    model, options = small("mistral", max_position_embeddings=512), LONG | {"max_new_tokens": 250, "do_sample": False}
    config = ld.LookaheadConfig(step_times=FREE, max_rows=8)
    decoding = {"config": config, "propose": guessing(model, PROMPT, **options)}
    return both(model, [PROMPT], ranks, **options, decoding=decoding)


def candidates_as_a_chain(ranks: Ranks | None) -> Any:
    model = tiny_model("bloom")
    return both(model, [PROMPT], ranks, **LONG, do_sample=False, decoding={"propose": guessing(model, PROMPT, **LONG)})


def candidates_as_rows(ranks: Ranks | None) -> Any:
    model = tiny_model("lfm2")
    return both(model, [PROMPT], ranks, **LONG, do_sample=False, decoding={"propose": guessing(model, PROMPT, **LONG)})


def a_batch_that_is_decoded_plainly(ranks: Ranks | None) -> Any:
    return both(tiny_model("lfm2"), [PROMPT, PROMPT[::-1]], ranks, **LONG, do_sample=False)


def continued_from_a_cache(ranks: Ranks | None) -> Any:
    """What a call leaves in the caller's cache goes on as it should."""
    from transformers import DynamicCache

    model = small()
    past = DynamicCache(config=model.config)
    first = both(model, [PROMPT], ranks, **LONG | {"max_new_tokens": 20}, do_sample=False, past_key_values=past)
    text = [PROMPT + first[0]]
    return first, both(model, text, ranks, **LONG | {"max_new_tokens": 20}, do_sample=False, past_key_values=past)


CASES = [
    greedy,
    sampled,
    with_a_window,
    tree_smaller_than_the_ranks,
    adaptive,
    penalties_and_a_processor_with_a_state,
    ends_inside_an_accepted_run,
    batch,
    sliding_windows,
    candidates_as_a_chain,
    candidates_as_rows,
    a_batch_that_is_decoded_plainly,
    continued_from_a_cache,
]


def all_cases(ranks: Ranks) -> dict[str, Any]:
    with watched() as seen:
        found = {case.__name__: case(ranks) for case in CASES}
    assert seen.kinds == {"full", "partial", "none"}
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """What `generate` gives on one device."""
    return {case.__name__: case(None) for case in CASES}


@pytest.mark.parametrize(("size", "exchange"), [(1, "auto"), (2, "refeed"), (2, "send"), (3, "auto"), (4, "send")])
def test_ranks_emit_the_tokens_of_generate(size: int, exchange: str, alone: dict[str, Any]) -> None:
    for found in many.run(size, all_cases, exchange=exchange):
        assert found == alone


def noisy(ranks: Ranks) -> tuple[Any, Any]:
    """Each rank's logits are a little other ones, as if rounding were coarse: their walks go apart again and again."""
    model = small()
    probe(model)
    noise = torch.Generator().manual_seed(ranks.rank)
    model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits + 0.5 * torch.randn(logits.shape, generator=noise)
    )
    counting = Counting()
    options = LONG | SAMPLED | {"logits_processor": LogitsProcessorList([counting])}
    found = both(model, [PROMPT], ranks, **options, decoding={"propose": guessing(small(), PROMPT, **LONG | SAMPLED)})
    return found, torch.get_rng_state().tolist()


@pytest.mark.parametrize("exchange", ["refeed", "send"])
def test_ranks_whose_walks_go_apart_come_to_one_text_and_one_random_state(exchange: str) -> None:
    first, *others = many.run(3, noisy, exchange=exchange)
    assert others == [first, first]
    assert len(first[0][0]) == 40


def divided_model(ranks: Ranks) -> Any:
    logging.disable_progress_bar()
    whole, part = small(num_key_value_heads=4), ld.divide(small(num_key_value_heads=4), ranks)
    assert part.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 32 // ranks.tensor_parallel
    found = []
    for mode in ({"do_sample": False}, SAMPLED):
        known = guessing(whole, PROMPT, **LONG | mode)
        found.append(both(part, [PROMPT], ranks, **LONG | mode, decoding={"propose": known}))
        assert found[-1] == both(whole, [PROMPT], None, **LONG | mode)
    with pytest.raises(ValueError, match="divided over ranks"):
        ld.generate(part, torch.tensor([PROMPT]), max_new_tokens=2)
    return found


@pytest.mark.parametrize("exchange", ["refeed", "send"])
def test_two_groups_of_two_that_divide_the_model(exchange: str) -> None:
    found = many.run(4, divided_model, tensor_parallel=2, exchange=exchange)
    assert found[1:] == found[:-1]


def real_models(ranks: Ranks, folder: str, texts: list[str]) -> list[Any]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = model.float().eval()
    found = []
    for text in texts:
        ids = [tokenizer(text).input_ids]
        for mode in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
            found.append(both(model, ids, ranks, max_new_tokens=24, **mode, decoding={"config": ld.LookaheadConfig()}))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_real_models_on_ranks(size: int, pocket: Any, data: Path) -> None:
    for folder in (ld.pocket_path(), str(data / "models" / "stories260K")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = ["def add(a, b):\n", "Once upon a time", "import os\n\n"]
        plain = [
            both(model, [tokenizer(text).input_ids], None, max_new_tokens=24, **mode)
            for text in texts
            for mode in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8})
        ]
        for found in many.run(size, real_models, folder, texts):
            assert found == plain


def counts(ranks: Ranks) -> ld.Stats:
    model = small()
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(step_times=FREE, max_rows=32), parallel=ranks)
    decoding.propose = guessing(model, PROMPT, **LONG)
    ld.generate(model, torch.tensor([PROMPT]), **LONG, do_sample=False, lookahead=decoding)
    return decoding.stats


def test_one_collective_per_step_where_accepted_tokens_are_fed_again() -> None:
    for stats in many.run(2, counts, exchange="refeed"):
        assert stats.ranks == 2
        assert stats.collectives == stats.forwards
        assert stats.sent_bytes == 0
        assert stats.message_bytes <= 2048 * stats.forwards
        assert stats.shard_rows < stats.rows
        assert 0 < stats.communication_seconds < stats.step_seconds
    sent = [stats.sent_bytes for stats in many.run(2, counts, exchange="send")]
    assert max(sent) > 0


def streamed(ranks: Ranks) -> list[tuple[int, ...]]:
    path = ld.pocket_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).float(), AutoTokenizer.from_pretrained(path)
    steps = ld.stream(model, tokenizer, "def add(a, b):\n", max_new_tokens=24, do_sample=False, parallel=ranks)
    return [step.token_ids for step in steps]


def test_all_ranks_stream_the_same_steps(pocket: Any) -> None:
    first, second = many.run(2, streamed)
    assert first == second
    model, tokenizer = pocket
    inputs = tokenizer("def add(a, b):\n", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    assert [token for step in first for token in step] == plain


def differing(ranks: Ranks, what: str) -> str:
    odd = ranks.rank == 1
    prompt = PROMPT[:-1] if odd and what == "prompt" else PROMPT
    rows = 9 if odd and what == "lookahead configuration" else 8
    config = ld.LookaheadConfig(max_rows=rows, step_times=FREE)
    model = small(dtype=torch.bfloat16 if odd and what == "dtype" else torch.float32)
    if odd and what == "weights":
        torch.nn.init.ones_(model.model.layers[0].mlp.up_proj.weight)
    if odd and what == "type of model":
        model = small("qwen2")
    options: dict[str, Any] = {"max_new_tokens": 5}
    if odd and what == "max_length":
        options["max_new_tokens"] = 6
    if odd and what == "generation config":
        options["repetition_penalty"] = 1.1
    decoding = ld.LookaheadDecoding(config, parallel=ranks)
    if what == "candidates":
        decoding.propose = lambda text: [[1 + ranks.rank, 2]]
    try:
        ld.generate(model, torch.tensor([prompt]), **options, do_sample=False, lookahead=decoding)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "what",
    [
        "prompt",
        "max_length",
        "generation config",
        "dtype",
        "weights",
        "type of model",
        "lookahead configuration",
        "candidates",
    ],
)
def test_what_differs_between_ranks_is_refused_by_name(what: str) -> None:
    for message in many.run(2, differing, what):
        assert message.startswith("rank 1 has")
        assert what in message


def refusals(ranks: Ranks) -> list[str]:
    class Remembers(LogitsProcessor):
        def __init__(self) -> None:
            self.best = 0.0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.best = float(scores.max())
            return scores

    found = []
    for options in (
        {"logits_processor": LogitsProcessorList([Remembers()])},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        try:
            both(small(), [PROMPT], ranks, **LONG, **options)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_ranks_cannot_honour_is_refused() -> None:
    for remembers, scores in many.run(2, refusals):
        assert "remembers scores" in remembers
        assert scores.startswith("output_scores: only the rank that chose a token has its scores")


def twice(ranks: Ranks) -> str:
    with ld.parallel(device="cpu", tensor_parallel=2) as inner:
        assert inner.tensor_parallel == 2
        inner.gather(torch.zeros(1))
    try:
        inner.gather(torch.zeros(1))
    except ValueError as error:
        return str(error)
    return ""


def test_a_program_may_join_its_ranks_more_than_once() -> None:
    for message in many.run(4, twice, tensor_parallel=2):
        assert message.startswith("these ranks have left")


def test_without_torchrun_it_says_how_to_start() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node"), ld.parallel():
        pass
