"""What layers with a window keep."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong
from transformers import AutoConfig

import lookahead_decoding as ld
from conftest import ARCHITECTURES, FREE
from lookahead_decoding.model.cache import SLACK, TreeCache
from lookahead_decoding.model.rows import RowSteps


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
    from lookahead_decoding.draft.tree import build_tree
    from lookahead_decoding.model.attention import WINDOW, encode_rows

    rows = encode_rows([build_tree(1, candidates=[(2, 3, 4)])], [6], 4, window=8, chunked=True, starts=[10])
    assert rows[0, 0, :, WINDOW].tolist() == [1, 2, 3, 4]  # positions 16 to 19
    rows = encode_rows([build_tree(1, candidates=[(2, 3, 4)])], [6], 4, window=8, chunked=True)
    assert rows[0, 0, :, WINDOW].tolist() == [7, 8, 1, 2]  # positions 6 to 9


def test_a_batch_may_be_shorter_than_the_window(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny("mistral", sliding_window=4096)
    ids, mask = torch.randint(3, 60, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    ids[1, :15], mask[1, :15] = 0, 0
    options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False, "attention_mask": mask}
    assert torch.equal(ld.generate(model, ids, **options), model.generate(ids, **options))


def test_a_sequence_may_end_more_than_a_window_before_the_others(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny("mistral", max_position_embeddings=1024)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 150, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, eos_token_id=None, **options)
    ends = next(int(t) for t in plain[0, 6:26] if t not in plain[1])
    assert torch.equal(
        ld.generate(model, ids, eos_token_id=ends, **options), model.generate(ids, eos_token_id=ends, **options)
    )


def test_sequences_are_level_only_if_their_slots_are() -> None:
    config = AutoConfig.for_model("mistral", **{**ARCHITECTURES["mistral"], "sliding_window": 16})
    cache = TreeCache(config, 2, 1000, 32)
    cache.lengths[:] = [84, 84]
    assert cache.level
    cache.slots(16).starts[:] = [69, 0]
    assert not cache.level


def test_what_is_left_of_a_long_chunk_is_given_to_every_row(
    tiny: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("mistral", sliding_window=200, max_position_embeddings=1024)
    monkeypatch.setattr("lookahead_decoding.model.rows.PREFILL_CHUNK", 150)
    prompt = torch.randint(3, 60, (450,), generator=torch.Generator().manual_seed(0)).tolist()
    steps = RowSteps(model, 600, 2, 16)
    steps.prefill([prompt])
    steps.commit([[0]])
    tree = ld.build_tree(20, candidates=[(21, 22), (23, 24)])
    step = steps.forward([tree])
    for path in tree.paths():
        with torch.no_grad():
            wanted = model(torch.tensor([[*prompt, *(tree.tokens[n] for n in path)]]), use_cache=False).logits[0, -1]
        assert torch.allclose(step.logits[0, step.nodes.index(path[-1])], wanted, atol=1e-3, rtol=1e-3)
