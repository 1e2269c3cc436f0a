"""Compiled and captured steps against the plain ones."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lookahead_decoding as ld
from conftest import ARCHITECTURES
from lookahead_decoding.config import LookaheadWarning
from lookahead_decoding.draft.tree import TokenTree
from lookahead_decoding.model.attention import encode_rows
from lookahead_decoding.model.graphs import SIZES, Compiled, padded
from lookahead_decoding.model.memory import memory_of
from lookahead_decoding.model.trees import room_for
from test_exactness import CONFIGS, GREEDY, SAMPLED, WINDOW_ALONE, batch_of, prompt_of

Tiny = Callable[..., torch.nn.Module]
# torch.compile writes C++ for a CPU, and a compiler for it is nothing that this project's files can install.
NOT_HERE = "no C++ compiler" if not (shutil.which("g++") or shutil.which("clang++")) else ""
if not hasattr(torch._dynamo.config, "recompile_limit"):
    NOT_HERE = "torch before 2.7, which does not compile transformers' models"
needs_compiler = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)


def graphs() -> int:
    """Graphs compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture(autouse=True)
def _compiler_that_works() -> Iterator[None]:
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the step could not be compiled")
        yield


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_steps_are_exact(name: str, tiny: Tiny, accepted: Accepted) -> None:
    model, ids, before = tiny(name, attn_implementation="eager"), prompt_of(6), graphs()  # eager caps gemma2's scores
    for mode in (GREEDY, SAMPLED):
        options = {"max_new_tokens": 60, "eos_token_id": None, **mode}
        torch.manual_seed(1)
        plain = model.generate(ids, **options)[0].tolist()
        for config in (CONFIGS["plain"], CONFIGS["15/5/15"], WINDOW_ALONE):
            propose = right_and_wrong(plain) if config is WINDOW_ALONE else None
            decoding = ld.LookaheadDecoding(config, propose=propose, execution="compiled")
            torch.manual_seed(1)
            assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert graphs() == before + 2  # one of a single row and one of any number
    assert accepted.kinds == {"full", "partial", "none"}


@needs_compiler
def test_a_compiled_batch_is_exact(tiny: Tiny) -> None:
    ids, mask = batch_of((9, 1, 5))
    before = graphs()
    options = {"max_new_tokens": 40, "pad_token_id": 0, "attention_mask": mask, **GREEDY}
    stop = tiny().generate(ids, eos_token_id=None, **options)[0, 14].item()  # ends the first sequence early
    plain = tiny().generate(ids, eos_token_id=stop, **options)
    assert 0 in plain[0, 15:]
    decoding = ld.LookaheadDecoding(CONFIGS["4/3/3"], execution="compiled")
    assert ld.generate(tiny(), ids, eos_token_id=stop, lookahead=decoding, **options).tolist() == plain.tolist()
    assert graphs() > before


@needs_compiler
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_lengths_and_widths_do_not_compile_again(name: str, tiny: Tiny) -> None:
    model, counts = tiny(name), [graphs()]
    first = [(5, 20, "plain"), (5, 20, "4/3/3")]
    for length, new, config in [*first, (30, 50, "15/5/15"), (60, 30, "text only"), (9, 60, "4/3/3")]:
        decoding = ld.LookaheadDecoding(CONFIGS[config], execution="compiled")
        ld.generate(model, prompt_of(length), max_new_tokens=new, eos_token_id=None, lookahead=decoding, **GREEDY)
        counts.append(graphs())
    assert counts == [counts[0] + n for n in (0, 1, 2, 2, 2, 2)]


@needs_compiler
def test_packed_weights_follow_the_model(tiny: Tiny) -> None:
    ids = prompt_of(6)

    def logits(model: torch.nn.Module, execution: str) -> torch.Tensor:
        target = ld.Target(model, 40, execution=execution)
        target.prefill([ids[0].tolist()])
        target.commit([[0]])
        return target.forward([ld.build_tree(5, candidates=[(6, 7)])]).logits.float()

    first = tiny(dtype=torch.bfloat16, hidden_size=64)
    other = tiny(dtype=torch.bfloat16, hidden_size=64, initializer_range=0.4)  # of the same shapes
    for model in (first, other, first):
        plain, compiled = logits(model, "eager"), logits(model, "compiled")
        assert (compiled - plain).norm() / plain.norm() < 0.05  # those of the other model differ by 0.6
        assert not torch.equal(compiled, plain)  # other products, so the packed ones did run
    with torch.no_grad():
        first.lm_head.weight.neg_()
    assert (logits(first, "compiled") + compiled).norm() / compiled.norm() < 0.02


@needs_compiler
def test_a_compiler_that_fails_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: object, **options: object) -> object:
        def fail(*args: object) -> object:
            raise RuntimeError("no compiler here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    double = Compiled(lambda x: 2 * x)
    with pytest.warns(UserWarning, match="could not be compiled and runs uncompiled: no compiler here$"):
        assert double(torch.tensor(2)) == 4
    assert double(torch.tensor(3)) == 6  # a second warning would be an error here


def test_what_cannot_be_compiled_says_so(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lookahead_decoding.model.trees.kernel_found", lambda: False)
    with pytest.raises(ValueError, match=r"execution='captured' cannot be: Triton.*Leave it out"):
        ld.Target(tiny(), 20, execution="captured")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="captured on a GPU only"):
        ld.Target(tiny(), 20, execution="captured")
    with pytest.raises(ValueError, match="execution must be one of"):
        ld.Target(tiny(), 20, execution="fast")


def test_rows_are_padded_to_a_few_sizes() -> None:
    assert [padded(n) for n in (1, 2, 8, 9, 128, 256, 257, 600)] == [1, 16, 16, 16, 128, 256, 512, 768]


def test_captured_caches_do_not_pile_up(tiny: Tiny) -> None:
    pytest.importorskip("triton")
    model = tiny(hidden_size=64)
    for capacity in (20, 600, 1200):
        ld.Target(model, capacity, execution="captured")
    kept = memory_of(model).free
    assert [room.cache.capacity for room in kept] == [1536]
    for batch in range(2, 9):
        ld.Target(model, 20, batch, execution="captured")
    assert [len(room.cache.lengths) for room in kept] == [5, 6, 7, 8]


def test_closing_gives_back_what_was_kept_and_the_next_call_makes_it_anew(tiny: Tiny) -> None:
    pytest.importorskip("triton")
    model, ids = copy.deepcopy(tiny()), prompt_of(6)
    options = {"max_new_tokens": 5, "eos_token_id": None, **GREEDY}
    decoding = ld.LookaheadDecoding(ld.PLAIN, execution="captured")
    first = ld.generate(model, ids, lookahead=decoding, **options)
    assert memory_of(model).free
    decoding.close()
    assert not memory_of(model).free
    assert torch.equal(ld.generate(model, ids, lookahead=decoding, **options), first)


def test_the_budget_proposes_captured_sizes(tiny: Tiny) -> None:
    pytest.importorskip("triton")
    target = ld.Target(copy.deepcopy(tiny()), 200, execution="captured")
    times = target.step_times(ld.LookaheadConfig(step_times=((1, 1.0), (64, 2.0))))
    assert times.sizes == SIZES
    assert times(2) == times(16) < times(17) == times(64)
    assert ld.Target(tiny(), 200, execution="eager").step_times(ld.LookaheadConfig()).sizes != SIZES


def test_steps_of_fixed_shape(tiny: Tiny) -> None:
    """What a GPU runs, uncompiled and in the kernel's interpreter: padded rows, lengths on the device."""
    pytest.importorskip("triton")
    model, ids = tiny(), prompt_of(6)
    options = {"max_new_tokens": 6, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)[0].tolist()
    small = ld.LookaheadConfig.paper(1, 3, 0)  # a few rows: the interpreter is slow
    decoding = ld.LookaheadDecoding(
        small, propose=lambda text: [plain[len(text) : len(text) + 2]], execution="captured"
    )
    for _ in range(2):  # the second time with the cache of the first
        assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain


@needs_compiler
def test_a_captured_step_compiles_without_a_break(tiny: Tiny) -> None:
    pytest.importorskip("triton")
    model = copy.deepcopy(tiny())
    room = room_for(model, 64, 1, "compiled", 16)
    torch._dynamo.utils.counters.clear()
    ids, rows = np.zeros((1, 16), dtype=np.int64), encode_rows([TokenTree((1, 2), (-1, 0))], [0], 16)
    with torch.no_grad():
        room.graphs.run(model, ids, ids, [rows], [0, 1])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs() == 1


class Tape:
    """A recorder for a machine without a GPU: it replays by running anew, and sees that this does the same.

    What a GPU would replay is a list of operations on memory that stays where it is. So operations, shapes and dtypes
    must be those of the recording, and nothing may be read back.
    """

    READS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        run()  # buffers that are made at the first use
        self.recorded += 1
        wanted = self._listed(run)

        def replay() -> None:
            self.replayed += 1
            assert self._listed(run) == wanted

        return replay

    def _listed(self, run: Callable[[], None]) -> list[tuple[str, list[tuple[object, ...]]]]:
        found: list[tuple[str, list[tuple[object, ...]]]] = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                name = str(function)
                assert not any(name.startswith(f"aten.{read}.") for read in Tape.READS), f"{name} reads a number back"
                out = function(*args, **(kwargs or {}))
                tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
                found.append((name, [(tuple(t.shape), t.dtype) for t in tensors]))
                return out

        with torch.inference_mode(False), torch.no_grad(), Mode():  # inference mode takes operations apart elsewhere
            run()
        return found


@pytest.fixture
def tape(monkeypatch: pytest.MonkeyPatch) -> Tape:
    made = Tape()
    monkeypatch.setattr("lookahead_decoding.model.graphs.recorder_for", lambda device: made)
    return made


# falcon adds its mask itself: on a GPU, where the mask is our rows, its probe finds that and captures nothing.
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "falcon"])
def test_a_replayed_step_does_what_was_recorded(name: str, tiny: Tiny, tape: Tape) -> None:
    pytest.importorskip("triton")
    model, ids = copy.deepcopy(tiny(name)), prompt_of(6)  # which has captured nothing yet
    options = {"max_new_tokens": 6, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)[0].tolist()
    small = ld.LookaheadConfig.paper(1, 3, 0)
    for _ in range(2):
        decoding = ld.LookaheadDecoding(small, propose=lambda t: [plain[len(t) : len(t) + 2]], execution="captured")
        assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert tape.recorded <= 2  # a step of one row, and one of several
    assert tape.replayed > tape.recorded


def test_a_step_that_cannot_be_captured_runs_as_it_is(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def broken(run: Callable[[], None]) -> Callable[[], None]:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("lookahead_decoding.model.graphs.recorder_for", lambda device: broken)
    model, ids = copy.deepcopy(tiny()), prompt_of(6)
    options = {"max_new_tokens": 5, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)[0].tolist()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", LookaheadWarning)
        for _ in range(2):
            decoding = ld.LookaheadDecoding(ld.PLAIN, execution="captured")
            assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    ours = [str(one.message) for one in said if one.category is LookaheadWarning]
    assert ours == [
        "a step of 1 rows could not be captured and runs as it is: operation not permitted when stream is capturing"
    ]


def test_what_was_captured_in_another_state_of_the_model_is_not_replayed(tiny: Tiny, tape: Tape) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("triton")
    settings = peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(copy.deepcopy(tiny()), settings).eval()
    options = {"max_new_tokens": 5, "eos_token_id": None, **GREEDY}

    def both() -> list[int]:
        plain = model.generate(input_ids=prompt_of(6), **options)[0].tolist()
        decoding = ld.LookaheadDecoding(ld.PLAIN, execution="captured")
        assert ld.generate(model, prompt_of(6), lookahead=decoding, **options)[0].tolist() == plain
        return plain

    with_adapter = both()
    with model.disable_adapter():
        assert both() != with_adapter
    assert both() == with_adapter
    assert tape.recorded > 1


def test_a_request_in_inference_mode_leaves_buffers_that_others_can_use(tiny: Tiny, tape: Tape) -> None:
    pytest.importorskip("triton")
    model, ids = copy.deepcopy(tiny()), prompt_of(6)
    options = {"max_new_tokens": 4, "eos_token_id": None, **GREEDY}
    plain = model.generate(ids, **options)[0].tolist()
    for mode in (True, False):
        with torch.inference_mode(mode):
            decoding = ld.LookaheadDecoding(ld.PLAIN, execution="captured")
            assert ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain
    assert tape.recorded == 1


def test_frequencies_that_change_with_the_length_are_not_captured(tiny: Tiny) -> None:
    pytest.importorskip("triton")
    model = copy.deepcopy(tiny())
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(
        ValueError, match="execution='captured' cannot be: its rotary frequencies change with the length"
    ):
        ld.Target(model, 20, execution="captured")
