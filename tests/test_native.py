"""Steps as one call of native code: the model's numbers, and the same bits whatever is beside a row."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lookahead_decoding as ld
from lookahead_decoding.draft.tree import TokenTree, build_tree
from lookahead_decoding.model.native import library as native_library
from lookahead_decoding.model.native import steps as native_steps
from lookahead_decoding.model.native.library import why_no_library
from lookahead_decoding.model.native.program import NoProgramError
from lookahead_decoding.model.native.steps import NativeSteps, native_of
from lookahead_decoding.model.target import Target
from test_exactness import GREEDY, SAMPLED, batch_of, prompt_of

pytestmark = pytest.mark.skipif(bool(why_no_library()), reason=why_no_library())
Tiny = Callable[..., torch.nn.Module]
WIDE = {"hidden_size": 64, "intermediate_size": 96}  # heads of 16
COMMON = {
    **WIDE,
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.5,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SIXTEEN = {"head_dim": 16}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma": SIXTEEN,
    "gemma2": {**SIXTEEN, "sliding_window": 8},
    "gemma3_text": {**SIXTEEN, "sliding_window": 8, "num_hidden_layers": 6},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "gpt_neox": {},
    "falcon": {},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 256},
    "starcoder2": {"sliding_window": 8},
    "stablelm": {},
    "smollm3": {},
    "glm": SIXTEEN,
    "glm4": SIXTEEN,
    "helium": SIXTEEN,
    "exaone4": {},
    "nemotron": {},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def started(model: torch.nn.Module, prompt: list[int], capacity: int = 800, batch: int = 1) -> NativeSteps:
    steps = NativeSteps(native_of(model), model, capacity, batch, "sdpa", 64)
    steps.prefill([prompt] * batch)
    steps.commit([[0]] * batch)
    return steps


def family(name: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, **FAMILIES[name]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_program_computes_what_the_model_computes(name: str) -> None:
    ids, found = prompt_of(40), {}
    for dtype in DTYPES:
        model = family(name, dtype)
        steps = NativeSteps(native_of(model), model, 80, 1, "sdpa", 40)
        ours = steps._run(list(steps._rows_in(ids[0].tolist(), 0)), range(40))[0].clone()
        with torch.no_grad():
            found[dtype] = ours, model(ids).logits[0].float(), model.float()(ids).logits[0]
    ours, wanted, _ = found[torch.float32]
    assert (ours - wanted).norm() <= 2e-5 * wanted.norm()
    for dtype in DTYPES[1:]:  # nearer to the numbers of the same weights in float32
        ours, wanted, exact = found[dtype]
        assert (ours - exact).norm() <= 1.25 * (wanted - exact).norm()


@pytest.mark.parametrize("kind", range(1, 4))
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_every_set_of_instructions_computes_the_same(name: str, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind > native_library.kind():
        pytest.skip("this processor has no such instructions")
    monkeypatch.setattr(native_steps, "kind", lambda: kind)
    ids = prompt_of(13)
    for dtype in DTYPES:
        model = family(name, dtype)
        with torch.no_grad():
            wanted = model(ids).logits[0].float()
        steps = NativeSteps(native_of(model), model, 80, 1, "sdpa", 40)
        rows = list(steps._rows_in(ids[0].tolist(), 0))
        together = steps._run(rows, range(13))[0].clone()
        assert (together - wanted).norm() <= (2e-5 if dtype == torch.float32 else 0.1) * wanted.norm()
        alone = torch.cat([steps._run([row], [0])[0].clone() for row in rows])
        assert torch.equal(alone, together)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_every_family_are_exact(name: str) -> None:
    ids = prompt_of(13)
    for dtype in DTYPES:
        model = family(name, dtype)
        options = {"max_new_tokens": 40, "eos_token_id": None, **GREEDY}
        plain = ld.generate(model, ids, lookahead=ld.LookaheadDecoding(ld.PLAIN, execution="native"), **options)
        config = ld.LookaheadConfig(step_times=((1, 1.0),), max_rows=12)
        decoding = ld.LookaheadDecoding(config, execution="native")
        assert ld.generate(model, ids, lookahead=decoding, **options).tolist() == plain.tolist()
        if dtype == torch.float32:
            assert model.generate(ids, **options).tolist() == plain.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [ld.LookaheadConfig(step_times=((1, 1.0),), max_rows=n) for n in (4, 16, 64)])
def test_answers_are_those_of_plain_decoding(config: ld.LookaheadConfig, dtype: torch.dtype, tiny: Tiny) -> None:
    model, ids = tiny("llama", dtype, **WIDE), prompt_of(9)
    for mode in (GREEDY, SAMPLED):
        options = {"max_new_tokens": 60, "eos_token_id": None, **mode}
        torch.manual_seed(1)
        plain = ld.generate(model, ids, lookahead=ld.LookaheadDecoding(ld.PLAIN, execution="native"), **options)
        decoding = ld.LookaheadDecoding(config, execution="native")
        torch.manual_seed(1)
        assert ld.generate(model, ids, lookahead=decoding, **options).tolist() == plain.tolist()
        assert decoding.stats.rows_per_step > 2
        if dtype == torch.float32:
            torch.manual_seed(1)
            assert model.generate(ids, **options).tolist() == plain.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "length"), [(None, 37), (None, 253), (None, 511), (300, 600)])  # blocks have 256
def test_a_rows_bits_do_not_depend_on_its_neighbours_nor_on_where_its_keys_lie(
    dtype: torch.dtype, window: int | None, length: int, tiny: Tiny
) -> None:
    model = tiny("mistral", dtype, sliding_window=window, max_position_embeddings=800, **WIDE)
    prompt = prompt_of(length)[0].tolist()
    path = [11, 7, 5, 3, 2]
    alone = started(model, prompt)
    wanted = []
    for token in path:
        wanted.append(alone.forward([TokenTree((token,), (-1,))]).logits[0, 0].clone())
        alone.commit([[0]])
    for others in ([], [[1, 2, 3, 4], [9, 8, 7]], [[n, n + 1, n + 2] for n in range(13, 40, 3)]):
        steps = started(model, prompt)
        tree = build_tree(path[0], candidates=[*others, path[1:3]])
        found = steps.forward([tree])
        nodes = [0, tree.child(0, path[1])]
        nodes.append(tree.child(nodes[1], path[2]))
        row = found.rows(0)
        for node, logits in zip(nodes, wanted, strict=False):
            assert torch.equal(found.logits[0, row[node]], logits)
        steps.commit([nodes])
        tree = build_tree(path[3], candidates=[[1], [8, 3], path[4:]])
        found = steps.forward([tree])
        assert torch.equal(found.logits[0, 0], wanted[3])
        assert torch.equal(found.logits[0, found.rows(0)[tree.child(0, path[4])]], wanted[4])


def test_a_prompts_bits_do_not_depend_on_how_it_was_cut(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny("llama", torch.bfloat16, **WIDE), prompt_of(61)[0].tolist()
    tree = build_tree(5, candidates=[[3, 4]])
    wanted = started(model, prompt).forward([tree]).logits.clone()
    for chunk in (1, 7, 13):
        with monkeypatch.context() as patch:
            patch.setattr(native_steps, "CHUNK", chunk)
            assert torch.equal(started(model, prompt).forward([tree]).logits, wanted)


@pytest.mark.parametrize("window", [None, 300])
def test_blocks_of_positions_are_put_together(window: int | None, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("mistral", sliding_window=window, max_position_embeddings=800, **WIDE)
    ids = prompt_of(700)
    with torch.no_grad():
        wanted = model(ids).logits[0]
    for most in (1 << 24, 1):  # numbers of all blocks: a call with as many rows as it may have, and with few
        monkeypatch.setattr(native_steps, "PARTIALS", most)
        steps = NativeSteps(native_of(model), model, 800, 1, "sdpa", 700)
        steps.cache.make_room(700)
        found = steps._run(list(steps._rows_in(ids[0].tolist(), 0)), range(700))[0]
        assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_threads_do_not_change_a_bit(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        model = copy.deepcopy(tiny("llama", torch.bfloat16, **WIDE))
        found.append(started(model, prompt_of(30)[0].tolist()).forward([build_tree(5, candidates=[[3, 4]])]).logits)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_batch_is_each_of_its_sequences_alone(tiny: Tiny) -> None:
    model = tiny("llama", torch.bfloat16, **WIDE)
    ids, mask = batch_of((9, 1, 5))
    options = {"max_new_tokens": 40, "eos_token_id": None, **GREEDY}
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(step_times=((1, 1.0),), max_rows=9), execution="native")
    together = ld.generate(model, ids, attention_mask=mask, lookahead=decoding, **options)
    for row, (line, seen) in enumerate(zip(ids, mask, strict=True)):
        alone = line[seen.bool()][None]
        plain = ld.LookaheadDecoding(ld.PLAIN, execution="native")
        out = ld.generate(model, alone, lookahead=plain, **options)
        assert together[row, -40:].tolist() == out[0, -40:].tolist()


def test_the_best_tokens_come_back_in_order_and_the_first_of_equal_ones(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", torch.float32, **WIDE))
    with torch.no_grad():
        model.lm_head.weight[20] = model.lm_head.weight[40]
    step = started(model, [3, 5, 7]).forward([build_tree(5, candidates=[[3, 4]])])
    best, top = step.argmax()[0], step.top(6)[0]
    for row, logits in enumerate(step.logits[0]):
        order = torch.sort(logits, descending=True, stable=True).indices[:6].tolist()
        assert (best[row], top[row]) == (order[0], order)


def test_changed_weights_make_another_program(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", torch.float32, **WIDE))
    first = native_of(model)
    assert native_of(model) is first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 2
    second = native_of(model)
    assert second is not first
    options = {"max_new_tokens": 20, "eos_token_id": None, **GREEDY}
    assert ld.generate(model, prompt_of(5), **options).tolist() == model.generate(prompt_of(5), **options).tolist()


def test_what_has_no_program_says_why_and_runs_as_before(tiny: Tiny) -> None:
    experts = tiny("mixtral", **WIDE)
    with pytest.raises(NoProgramError, match=r"has experts|has gate"):
        native_of(experts)
    with pytest.raises(ValueError, match=r"execution='native' cannot be: .*Leave it out"):
        ld.Target(tiny("gpt2"), 20, execution="native")
    assert ld.Target(experts, 20).execution != "native"
    assert ld.Target(tiny("llama", **WIDE), 20).execution == "native"
    hooked = copy.deepcopy(tiny("llama", **WIDE))
    hooked.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert ld.Target(hooked, 20).execution != "native"


def test_more_rows_need_logits_than_fit_into_one_call(tiny: Tiny) -> None:
    model = tiny("llama", torch.float32, **WIDE)
    prompt = [3, 5, 7, 9]
    large = build_tree(5, candidates=[[i, i + 1, i + 2] for i in range(0, 60, 3)])
    wanted = started(model, prompt).forward([large]).logits[0].clone()
    steps = started(model, prompt, batch=8)
    for others in ([None] * 7, [TokenTree((5,), (-1,))] * 7, [large] * 7):
        found = steps.forward([large, *others])
        assert found.logits.shape[:2] == (8, len(wanted))
        assert torch.equal(found.logits[0], wanted)
    assert torch.equal(found.logits[7], wanted)


def test_what_hangs_on_a_model_later_is_seen(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", **WIDE))
    native_of(model)
    hook = model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(NoProgramError, match="hooks hang on its modules"):
        native_of(model)
    hook.remove()
    native_of(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_gives_up_its_weights_answers_as_before(tied: bool, dtype: torch.dtype, tiny: Tiny) -> None:
    model, ids = copy.deepcopy(tiny("llama", dtype, tie_word_embeddings=tied, **WIDE)), prompt_of(9)
    options = {"max_new_tokens": 30, "eos_token_id": None, **GREEDY}
    wanted = ld.generate(model, ids, lookahead=ld.LookaheadDecoding(execution="native"), **options).tolist()
    machine = Target(model, 8).machine
    decoding = ld.LookaheadDecoding(release=True)
    for _ in range(2):
        assert ld.generate(model, ids, lookahead=decoding, **options).tolist() == wanted
        assert sum(p.numel() for p in model.parameters()) == 0
        assert Target(model, 8).machine == machine  # a profile that was kept for it still serves
    assert ld.generate(model, ids, **options).tolist() == wanted
    eager = ld.LookaheadDecoding(execution="eager")
    with pytest.raises(ValueError, match="load the model again"):
        ld.generate(model, ids, lookahead=eager, **options)
    decoding.close()
    with pytest.raises(ValueError, match="load the model again"):
        ld.generate(model, ids, **options)


def test_a_released_model_may_have_other_threads(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    model, ids = copy.deepcopy(tiny("llama", **WIDE)), prompt_of(9)
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    first = ld.generate(model, ids, max_new_tokens=9, lookahead=ld.LookaheadDecoding(release=True), **GREEDY)
    torch.set_num_threads(2)
    assert ld.generate(model, ids, max_new_tokens=9, **GREEDY).tolist() == first.tolist()


def test_what_needs_the_models_own_weights_is_refused_before_they_are_given_up(tiny: Tiny) -> None:
    model, ids = copy.deepcopy(family("gpt2", torch.float32)), prompt_of(9)
    decoding = ld.LookaheadDecoding(release=True)
    with pytest.raises(ValueError, match="token_type_ids needs the model's own weights"):
        ld.generate(model, ids, token_type_ids=torch.zeros_like(ids), lookahead=decoding)
    assert all(p.numel() for p in model.parameters())


def test_a_model_without_a_program_keeps_its_weights(tiny: Tiny) -> None:
    model = tiny("llama", **WIDE)
    with pytest.raises(ValueError, match="leave release out"):
        ld.generate(model, prompt_of(9), lookahead=ld.LookaheadDecoding(execution="eager", release=True))
    assert all(p.numel() for p in model.parameters())


def test_an_adapter_has_no_program(tiny: Tiny) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(tiny("llama", torch.bfloat16, **WIDE)), settings).eval()
    with pytest.raises(NoProgramError, match="Linear is no plain linear layer"):
        native_of(model.get_base_model())


def test_learned_positions_end(tiny: Tiny) -> None:
    model = family("gpt2", torch.float32)
    steps = NativeSteps(native_of(model), model, 400, 1, "sdpa", 8)
    with pytest.raises(IndexError, match="has learned 256 positions"):
        steps.prefill([[3] * 300])
    with pytest.raises(IndexError, match="token ids must be from 0 to 63"):
        steps.prefill([[64]])


def test_a_layer_of_another_size_has_no_program(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", **WIDE))
    unit = model.model.layers[1].mlp
    unit.gate_proj, unit.up_proj = torch.nn.Linear(64, 416, bias=False), torch.nn.Linear(64, 416, bias=False)
    unit.down_proj = torch.nn.Linear(416, 64, bias=False)
    with pytest.raises(NoProgramError, match="other sizes than the first one"):
        native_of(model)


def test_a_model_without_a_program_is_freed() -> None:
    model = family("gpt2", torch.float64)
    with pytest.raises(NoProgramError):
        native_of(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_the_default_dtype_does_not_matter(tiny: Tiny, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    model, prompt = tiny("llama", torch.bfloat16, **WIDE), [3, 5, 7]
    wanted = started(model, prompt).forward([build_tree(5)]).logits.clone()
    torch.set_default_dtype(torch.bfloat16)
    again = copy.deepcopy(model)
    assert torch.equal(started(again, prompt).forward([build_tree(5)]).logits, wanted)


def test_a_program_that_computes_something_else_is_not_used(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny("llama", **WIDE))
    model.model.layers[1].self_attn.scaling *= 1.5  # in one layer alone, which no recipe expects
    with pytest.raises(NoProgramError, match=r"its logits differ from the program's.*, first in layer 1 of 2"):
        native_of(model)


def test_pocket_answers_as_generate_does() -> None:
    model = AutoModelForCausalLM.from_pretrained(ld.pocket_path(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(ld.pocket_path())("def fibonacci(n):\n", return_tensors="pt").input_ids
    options = {"max_new_tokens": 100, **GREEDY}
    decoding = ld.LookaheadDecoding(execution="native")
    assert ld.generate(model, ids, lookahead=decoding, **options).tolist() == model.generate(ids, **options).tolist()
