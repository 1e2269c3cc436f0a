"""What layers with a window keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong
from transformers import AutoConfig

import lookahead_decoding as ld
from conftest import ARCHITECTURES, FREE
from lookahead_decoding.cache import SLACK, TreeCache


def cache_of(name: str, capacity: int, room: int) -> TreeCache:
    return TreeCache(AutoConfig.for_model(name, **ARCHITECTURES[name]), 1, capacity, room)


def test_layers_with_a_window_keep_the_window_some_slack_and_one_tree() -> None:
    cache = cache_of("gemma2", 10_000, room=64)
    assert cache.slots(8).capacity == 7 + 64 + SLACK
    assert cache.slots(None).capacity == 10_000
    assert cache_of("gemma2", 50, room=64).slots(8).capacity == 50
    config = AutoConfig.for_model("mistral", **{**ARCHITECTURES["mistral"], "sliding_window": 4096})
    assert TreeCache(config, 1, 100_000, 64).slots(4096).capacity == 4095 + 64 + 1024


@pytest.mark.parametrize("length", [5, 400])
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_a_text_may_be_longer_than_they_hold(
    name: str, length: int, tiny: Callable[..., torch.nn.Module], accepted: Accepted
) -> None:
    model = tiny(name, max_position_embeddings=1024)
    ids = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 300, "eos_token_id": None, "do_sample": False}
    plain = model.generate(ids, **options)[0].tolist()
    config = ld.LookaheadConfig(sources=("window",), step_times=FREE, max_rows=16)
    decoding = ld.LookaheadDecoding(config, propose=right_and_wrong(plain))
    assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert accepted.kinds >= {"full", "partial"}


def test_sequences_of_a_batch_leave_the_window_each_in_its_time(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny("gemma3_text", max_position_embeddings=1024)
    ids = torch.randint(3, 60, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :290], mask[1, :290] = 0, 0
    options = {"max_new_tokens": 250, "eos_token_id": None, "do_sample": False, "attention_mask": mask}
    plain = model.generate(ids, **options)
    config = ld.LookaheadConfig(step_times=FREE, max_rows=16)
    assert torch.equal(ld.generate(model, ids, lookahead=config, **options), plain)


def test_a_cache_past_its_window_goes_in_and_comes_out(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny("gemma3_text", max_position_embeddings=1024)
    ids = torch.randint(3, 60, (1, 100), generator=torch.Generator().manual_seed(0))
    options = {"eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    plain = model.generate(ids, max_new_tokens=330, **options).sequences
    first = ld.generate(model, ids, max_new_tokens=110, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=110, **options)
    third = ld.generate(model, second.sequences, past_key_values=second.past_key_values, max_new_tokens=110, **options)
    assert torch.equal(third.sequences, plain)


def test_a_chunk_is_seen_from_its_beginning() -> None:
    from lookahead_decoding.attention import WINDOW, encode_rows
    from lookahead_decoding.tree import build_tree

    rows = encode_rows([build_tree(1, candidates=[(2, 3, 4)])], [6], 4, window=8, chunked=True, starts=[10])
    assert rows[0, 0, :, WINDOW].tolist() == [1, 2, 3, 4]  # positions 16 to 19
    rows = encode_rows([build_tree(1, candidates=[(2, 3, 4)])], [6], 4, window=8, chunked=True)
    assert rows[0, 0, :, WINDOW].tolist() == [7, 8, 1, 2]  # positions 6 to 9
