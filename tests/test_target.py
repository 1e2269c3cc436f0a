from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lookahead_decoding as ld
from conftest import ARCHITECTURES
from lookahead_decoding import Target, TokenTree, build_tree
from lookahead_decoding.model.evaluate import OURS

PROMPT = [3, 5, 7, 11, 13]


def plain_logits(model: torch.nn.Module, text: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([text]), use_cache=False).logits[0]


def test_every_node_has_the_logits_of_its_path(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny()
    target = Target(model, capacity=40)
    target.prefill([PROMPT])
    target.commit([[0]])
    tree = build_tree(20, window=[[0, 21, 22], [23, 24, 25]], candidates=[(30, 31), (30, 32), (33,)])
    step = target.forward([tree])
    assert step.nodes == tuple(tree.scored)
    for row, node in enumerate(step.nodes):
        path, at = [], node
        while at >= 0:
            path.append(tree.tokens[at])
            at = tree.parents[at]
        wanted = plain_logits(model, PROMPT + path[::-1])[-1]
        assert torch.allclose(step.logits[0, row], wanted, atol=1e-4, rtol=1e-4)


def test_commit_keeps_the_path_and_drops_the_rest(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny()
    target = Target(model, capacity=40)
    target.prefill([PROMPT])
    target.commit([[0]])
    tree = build_tree(20, candidates=[(30, 31), (32, 33, 34)])
    target.forward([tree])
    target.commit([[0, 3, 4]])
    assert target.lengths == [len(PROMPT) + 3]
    step = target.forward([TokenTree((40,), (-1,))])
    wanted = plain_logits(model, [*PROMPT, 20, 32, 33, 40])[-1]
    assert torch.allclose(step.logits[0, 0], wanted, atol=1e-4, rtol=1e-4)


def test_sequences_of_a_batch_have_their_own_lengths(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny()
    target = Target(model, capacity=40, batch=3)
    prompts = [PROMPT, PROMPT[:1], PROMPT[:3]]
    first = target.prefill(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.allclose(first.logits[row, 0], plain_logits(model, prompt)[-1], atol=1e-4, rtol=1e-4)
    target.commit([[0], [0], [0]])
    trees = [build_tree(20, candidates=[(21, 22), (23, 24)]), None, build_tree(30)]
    target.forward(trees)
    target.commit([[0, 3, 4], [], [0]])
    assert target.lengths == [8, 1, 4]
    step = target.forward([build_tree(50), build_tree(51), build_tree(52)])
    texts = [[*PROMPT, 20, 23, 24, 50], [PROMPT[0], 51], [*PROMPT[:3], 30, 52]]
    for row, text in enumerate(texts):
        assert torch.allclose(step.logits[row, 0], plain_logits(model, text)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prompt_may_go_in_chunks(
    name: str, tiny: Callable[..., torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    monkeypatch.setattr("lookahead_decoding.model.trees.PREFILL_CHUNK", 5)
    for lengths in ((11,), (15, 15), (13, 1, 5, 6)):  # chunks of all begin together, or do not
        prompts = [[3 + (7 * i + n) % 60 for i in range(n)] for n in lengths]
        target = Target(model, capacity=40, batch=len(prompts))
        first = target.prefill(prompts)
        assert target.lengths == [n - 1 for n in lengths]
        target.commit([[0]] * len(prompts))
        second = target.forward([build_tree(20)] * len(prompts))
        for row, prompt in enumerate(prompts):
            wanted = plain_logits(model, [*prompt, 20])[-2:]
            assert torch.allclose(
                torch.stack([first.logits[row, 0], second.logits[row, 0]]), wanted, atol=1e-4, rtol=1e-4
            )


def test_buffers_are_allocated_once(tiny: Callable[..., torch.nn.Module]) -> None:
    target = Target(tiny(), capacity=40)
    target.prefill([PROMPT])
    before = [layer.keys.data_ptr() for layer in target.cache.layers]
    assert [tuple(layer.keys.shape) for layer in target.cache.layers] == [(1, 2, 40, 8)] * 2
    for _ in range(3):
        target.commit([[0]])
        target.forward([build_tree(20, candidates=[(21, 22)])])
    assert [layer.keys.data_ptr() for layer in target.cache.layers] == before


def made(name: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()


def test_a_model_without_a_cache_of_text_is_refused_by_name() -> None:
    model = made("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    for _ in range(2):  # the second time from memory
        with pytest.raises(
            ValueError, match="'mamba' cannot check candidates: its forward takes no cache of keys and values"
        ):
            Target(model, capacity=40)


NEO = {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.3}
NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512}


def test_a_short_window_of_an_unknown_kind_is_passed_by_the_probe() -> None:
    assert Target(made("gpt_neo", **NEO, window_size=16), capacity=40).strategy.name == "chain"


def test_past_a_long_window_of_an_unknown_kind_steps_are_plain() -> None:
    model = made("gpt_neo", **NEO, window_size=300)
    ids, options = torch.arange(3, 43)[None], {"max_new_tokens": 400, "eos_token_id": None, "do_sample": False}
    plain = model.generate(ids, **options)
    config = ld.LookaheadConfig(sources=(), step_times=((1, 1.0),), max_rows=8)
    decoding = ld.LookaheadDecoding(config, propose=lambda text: [plain[0, len(text) : len(text) + 4].tolist()])
    with pytest.warns(UserWarning, match="candidates are checked up to 300 tokens"):
        assert torch.equal(ld.generate(model, ids, lookahead=decoding, **options), plain)
    assert Target(model, capacity=40).strategy.horizon == 300
    assert 100 < decoding.stats.accepted < 300 - 40
    batch = ids.repeat(2, 1)
    assert torch.equal(ld.generate(model, batch, **options), model.generate(batch, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_half_precision_hides_no_model_that_cannot_take_a_tree(dtype: torch.dtype, scale: float) -> None:
    """MPT biases attention by slot, so that a node's bias is not its path's."""
    settings = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "initializer_range": scale}
    assert Target(made("mpt", **settings).to(dtype), capacity=40).strategy.name == "chain"
    llama = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = made("llama", **llama, num_attention_heads=4, initializer_range=scale).to(dtype)
    assert Target(model, capacity=40).strategy.name == "tree"


@pytest.mark.parametrize(("noise", "way"), [(0.12, "tree"), (0.5, "refused")])
def test_one_row_may_be_rounded_otherwise_than_several_in_half_precision(
    noise: float, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bfloat16 on processors without instructions for it: some rows of a real model came out 8 % off."""
    llama = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = made("llama", **llama, num_attention_heads=4, initializer_range=0.3).to(torch.bfloat16)
    forward = model.lm_head.forward

    def noisy(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] > 1 or x[0, 0, 2] < 0:  # of some tokens only
            return forward(x)
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        return forward(x + noise * direction * (x.norm() / direction.norm()))

    monkeypatch.setattr(model.lm_head, "forward", noisy)
    if way == "refused":
        with pytest.raises(ValueError, match="other logits than one at a time"):
            Target(model, capacity=40)
    else:
        assert Target(model, capacity=40).strategy.name == way


def test_a_model_in_training_mode_is_not_condemned_for_good() -> None:
    model = made("gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.5).train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        Target(model, capacity=40)
    Target(model.eval(), capacity=40)


def test_an_encoder_decoder_is_refused() -> None:
    config = AutoConfig.for_model("t5", vocab_size=64, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16)
    with pytest.raises(ValueError, match="'t5' cannot check candidates: it is an encoder-decoder"):
        Target(AutoModelForSeq2SeqLM.from_config(config), capacity=40)


def test_our_attention_is_used_where_it_is_exact_and_only_during_our_steps(
    tiny: Callable[..., torch.nn.Module],
) -> None:
    assert Target(tiny("llama"), capacity=40).attention == OURS
    model = tiny("gemma3_text")
    before = model.config._attn_implementation
    target = Target(model, capacity=60)
    target.prefill([PROMPT])
    target.commit([[0]])
    target.forward([build_tree(20, candidates=[(30, 31)])])
    assert target.attention == OURS
    assert model.config._attn_implementation == before != OURS


def test_the_probe_notices_a_model_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    model = made("llama", **settings, initializer_range=0.5)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: forward(*a, **{**k, "attention_mask": None}))
    target = Target(model, capacity=40)
    assert target.strategy.name == "chain"
    assert "a candidate beside others" in target.strategy.reasons[-1]


def test_the_probe_notices_a_model_whose_rows_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where activations are quantised by one scale for all rows: nothing but one token at a time is exact then."""
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    model = made("llama", **settings, initializer_range=0.5)
    layer = model.model.layers[0].mlp
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x: forward((x / x.abs().max() * 7).round() * x.abs().max() / 7))
    with pytest.raises(ValueError, match="what one row of a forward gives depends on the others"):
        Target(model, capacity=40)
