"""Candidates as rows of a batch: chains, recurrent states, and tokens that are fed again."""

from __future__ import annotations

import warnings

import pytest
import torch
from benchmarks.tiny import tiny_model

import lookahead_decoding as ld
from conftest import FREE
from lookahead_decoding.draft.tree import TokenTree, build_tree
from lookahead_decoding.model.rows import Lockstep, RowSteps

PROMPT = [3, 5, 7, 11, 13, 17]


def plain_logits(model: torch.nn.Module, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text]), use_cache=False).logits[0]


def close(ours: torch.Tensor, plain: torch.Tensor) -> bool:
    return torch.allclose(ours, plain, atol=1e-3, rtol=1e-3)


def started(name: str, **settings: int) -> tuple[torch.nn.Module, RowSteps]:
    model = tiny_model(name)
    steps = RowSteps(model, 200, 3, 32, **settings)
    first = steps.prefill([PROMPT])
    assert close(first.logits[0, 0], plain_logits(model, PROMPT)[-1])
    steps.commit([[0]])
    return model, steps


@pytest.mark.parametrize("name", ["bloom", "qwen3_next", "falcon_h1", "lfm2"])
def test_every_node_has_the_logits_of_its_path(name: str) -> None:
    model, steps = started(name)
    tree = build_tree(20, candidates=[(30, 31), (30, 32), (33,)])
    step = steps.forward([tree])
    assert step.nodes == tuple(tree.scored)
    for row, node in enumerate(step.nodes):
        path = next(p for p in tree.paths() if node in p)
        text = PROMPT + [tree.tokens[n] for n in path[: path.index(node) + 1]]
        assert close(step.logits[0, row], plain_logits(model, text)[-1])


@pytest.mark.parametrize("refed", [0, 3, 100])
@pytest.mark.parametrize("name", ["bloom", "qwen3_next", "falcon_h1", "lfm2"])
def test_what_was_accepted_stays_and_the_rest_goes(name: str, refed: int) -> None:
    model, steps = started(name, refed=refed)
    text = list(PROMPT)
    rounds = [  # candidates, and how many tokens of which of them are accepted
        ([(21, 22, 23), (24, 25)], 1, 1),
        ([(26,), (27, 28)], 0, 0),
        ([(29, 30), (31, 32)], 1, 2),
        ([], 0, 0),
        ([(33, 34, 35, 36)], 0, 2),
        ([(37, 38)], 0, 2),
    ]
    for root, (candidates, which, accepted) in enumerate(rounds, 40):
        tree = build_tree(root, candidates=candidates)
        step = steps.forward([tree])
        assert close(step.logits[0, 0], plain_logits(model, [*text, root])[-1])
        path = tree.paths()[which][: accepted + 1]
        steps.commit([path])
        text += [tree.tokens[node] for node in path]
        assert steps.lengths == [len(text)]
    assert (steps.refeeds > 0) == (bool(steps.cache.stateful) and refed < 3)


def test_a_path_that_was_accepted_whole_is_not_fed_again() -> None:
    _, steps = started("qwen3_next", refed=0)
    for _ in range(3):
        steps.forward([build_tree(20, candidates=[(21, 22), (23, 24)])])
        steps.commit([[0, 3, 4]])
    assert steps.refeeds == 0


def test_sequences_in_lockstep_are_those_of_generate() -> None:
    model = tiny_model("qwen3_next")
    steps = Lockstep(model, 40, 2)
    first = steps.prefill([PROMPT, PROMPT[:2]])
    for row, prompt in enumerate((PROMPT, PROMPT[:2])):
        assert close(first.logits[row, 0], plain_logits(model, prompt)[-1])
    steps.commit([[0], [0]])
    steps.forward([TokenTree((20,), (-1,)), None])
    steps.commit([[0], ()])
    assert steps.lengths == [len(PROMPT) + 1, 2]
    step = steps.forward([TokenTree((21,), (-1,)), None])
    assert close(step.logits[0, 0], plain_logits(model, [*PROMPT, 20, 21])[-1])


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj", "codegen", "biogpt", "ctrl", "bert", "roberta", "bart"])
def test_no_draft_is_past_a_models_table_of_positions(name: str) -> None:
    ids = torch.tensor([[5, 9, 7, 30, 12, 44] * 7])
    table = ids.shape[1] + 21
    sizes = {"max_position_embeddings": table + 2 * (name in ("roberta", "opt"))}
    model = tiny_model(name, **({"n_positions": table} if name in ("gpt2", "gptj", "codegen", "ctrl") else sizes))
    free = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    options = {
        "max_new_tokens": 100,
        "do_sample": False,
        "eos_token_id": int(free[-2]),
        "pad_token_id": 0,
    }  # bart forces its last
    plain = model.generate(ids, **options)
    found = ld.generate(model, ids, lookahead=ld.LookaheadConfig(step_times=FREE, max_rows=40), **options)
    assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("name", ["bloom", "qwen3_next"])
def test_a_window_that_has_no_place_is_refused(name: str) -> None:
    ids = torch.tensor([PROMPT])
    with pytest.raises(ValueError, match=r"window_size=15: a model of type .* has no window"):
        ld.generate(tiny_model(name), ids, max_new_tokens=5, lookahead=ld.LookaheadConfig.paper())
    with pytest.raises(ValueError, match="execution='compiled' cannot be"):
        ld.generate(tiny_model(name), ids, max_new_tokens=5, lookahead=ld.LookaheadDecoding(execution="compiled"))


@pytest.mark.filterwarnings("default:.*doctor")
def test_what_is_slower_is_said_once() -> None:
    model, ids = tiny_model("lfm2"), torch.tensor([PROMPT])
    with pytest.warns(UserWarning, match="lfm2: candidates are up to .* rows of a batch.*`lookahead doctor` says why"):
        ld.generate(model, ids, max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ld.generate(model, ids, max_new_tokens=5)


def test_a_cache_goes_in_and_comes_out_with_its_states() -> None:
    model, ids = tiny_model("qwen3_next"), torch.tensor([PROMPT])
    options = {"max_new_tokens": 20, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    config = ld.LookaheadConfig(step_times=FREE)
    plain, ours = model.generate(ids, **options), ld.generate(model, ids, lookahead=config, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    for _ in range(2):  # each goes on with what the other has left
        text, caches = ours.sequences, (ours.past_key_values, plain.past_key_values)
        options["attention_mask"] = torch.ones_like(text)
        plain = model.generate(text, past_key_values=caches[0], **options)
        ours = ld.generate(model, text, past_key_values=caches[1], lookahead=config, **options)
        assert torch.equal(ours.sequences, plain.sequences)
