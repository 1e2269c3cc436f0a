from __future__ import annotations

import json
import pickle
import random
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from benchmarks.tiny import tiny_model
from hypothesis import given
from hypothesis import strategies as st

import lookahead_decoding as ld
from conftest import FREE
from lookahead_decoding.draft.shared import CONTEXT, SharedText
from lookahead_decoding.draft.sources import SharedSource, SourceCount
from lookahead_decoding.draft.suffix import NOWHERE, SuffixAutomaton

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=6)


def space(name: str = "one", vocab_size: int = 10, **bounds: int) -> ld.shared.Namespace:
    namespace = ld.SharedPool(**bounds).namespace(name)
    namespace.bind(vocab_size)
    return namespace


def followers(namespace: ld.shared.Namespace, text: list[int], most: int = 9) -> list[tuple[int, int]]:
    reader = SharedText(namespace)
    return reader.continuations(reader.follow(reader.start(), text), most)


@given(TEXTS, st.lists(st.integers(0, 3), max_size=8))
def test_an_automaton_of_several_texts_against_a_scan_of_each(texts: list[list[int]], query: list[int]) -> None:
    automaton = SuffixAutomaton()
    for text in texts:
        automaton.begin()
        for token in text:
            automaton.add(token)
    match = NOWHERE
    for token in query:
        match = automaton.follow(match, token)
    wanted: dict[int, int] = {}  # next tokens, with the longest suffix of the query that they followed
    longest = 0
    for length in range(len(query), 0, -1):
        for text in texts:
            for start in range(len(text) - length + 1):
                if text[start : start + length] == query[-length:]:
                    longest = max(longest, length)
                    if start + length < len(text):
                        wanted.setdefault(text[start + length], length)
    assert match[1] == longest
    assert dict(automaton.continuations(match, 99)) == wanted


def test_texts_do_not_run_into_each_other() -> None:
    namespace = space()
    namespace.learn([1, 2, 3])
    namespace.learn([4, 5])
    assert followers(namespace, [1, 2]) == [(3, 2)]
    assert followers(namespace, [3]) == []


def test_the_younger_text_of_two_comes_first_and_the_longer_match_before_it() -> None:
    namespace = space()
    namespace.learn([1, 2, 3])
    namespace.learn([7, 2, 4])
    assert followers(namespace, [2]) == [(4, 1), (3, 1)]
    assert followers(namespace, [1, 2]) == [(3, 2), (4, 1)]
    namespace.turn()
    namespace.learn([2, 5])
    assert followers(namespace, [1, 2]) == [(3, 2), (5, 1), (4, 1)]
    assert followers(namespace, [1, 2], most=2) == [(3, 2), (5, 1)]


def test_one_namespace_never_proposes_what_another_has_learned() -> None:
    pool = ld.SharedPool()
    for name, text in (("one", [1, 2, 3]), ("two", [1, 2, 4])):
        pool.namespace(name).bind(10)
        pool.namespace(name).learn(text)
    assert followers(pool.namespace("one"), [1, 2]) == [(3, 2)]
    assert followers(pool.namespace("two"), [1, 2]) == [(4, 2)]
    assert followers(pool.namespace("three"), [1, 2]) == []
    pool.remove("one")
    assert followers(pool.namespace("one"), [1, 2]) == []


def test_a_namespace_that_was_removed_forgets_and_learns_no_more() -> None:
    pool = ld.SharedPool()
    held = pool.namespace("one")
    held.bind(10)
    held.learn([1, 2, 3])
    pool.remove("one")
    assert followers(held, [1, 2]) == []
    held.learn([1, 2, 3])
    assert held.tokens == pool.nbytes == 0
    assert pool.namespace("one") is not held


def test_many_namespaces_without_text_take_no_room() -> None:
    pool = ld.SharedPool(max_bytes=1 << 16)
    for i in range(300):
        namespace = pool.namespace(str(i))
        namespace.bind(10)
        namespace.learn([1, 2, 3])
        assert namespace.tokens == 3
    assert 0 < pool.nbytes <= 1 << 16


def test_a_long_text_does_not_drive_out_what_there_is_room_for() -> None:
    namespace = space(max_bytes=1 << 17, vocab_size=5000)
    draw, kept = random.Random(0), 0
    for i in range(30):
        namespace.learn([draw.randrange(5000) for _ in range(80 if i % 5 == 0 else 10)])
        kept = max(kept, namespace.nbytes)
        assert namespace.nbytes >= kept / 3


def test_of_the_prompt_only_its_end_is_kept() -> None:
    namespace = space(vocab_size=1000)
    prompt = list(range(100))
    namespace.learn([*prompt, 500, 501], start=len(prompt))
    assert namespace.tokens == CONTEXT + 2
    assert followers(namespace, [98, 99]) == [(500, 2)]
    assert followers(namespace, [10, 11]) == []


def test_a_text_that_is_known_takes_no_memory() -> None:
    namespace = space()
    namespace.learn([1, 2, 3, 4])
    before = namespace.nbytes
    namespace.learn([2, 3, 4])
    assert namespace.nbytes == before
    assert namespace.younger.requests == 2


def test_a_text_has_left_after_max_age_requests_unless_it_was_learned_again() -> None:
    namespace = space(max_age=6, vocab_size=100)
    namespace.learn([1, 2])
    for i in range(3):
        namespace.learn([10 + i, 20 + i])
    assert followers(namespace, [1]) == [(2, 1)]
    for i in range(3, 6):
        namespace.learn([10 + i, 20 + i])
    assert followers(namespace, [1]) == []
    for i in range(20):
        namespace.learn([1, 2])
        namespace.learn([50 + i, 20])
    assert followers(namespace, [1]) == [(2, 1)]


def test_memory_stays_below_the_cap_and_the_newest_text_stays() -> None:
    pool = ld.SharedPool(max_bytes=1 << 17)
    draw = random.Random(0)
    for i in range(60):
        namespace = pool.namespace(f"tenant {i % 3}")
        namespace.bind(5000)
        text = [draw.randrange(5000) for _ in range(draw.randrange(1, 400))]
        namespace.learn(text)
        assert pool.nbytes <= 1 << 17
        assert dict(followers(namespace, text[-3:-1]))[text[-1]] if len(text) > 2 else True
    assert len([n for n in pool.namespaces.values() if n.tokens]) > 1


def test_the_namespace_that_learned_longest_ago_forgets_first() -> None:
    pool = ld.SharedPool(max_bytes=1 << 18)
    texts = (range(80 * i, 80 * i + 80) for i in range(10))
    for name in ("a", "b", "c"):
        namespace = pool.namespace(name)
        namespace.bind(5000)
        for _ in range(3):
            namespace.learn(next(texts))
    assert [pool.namespace(name).tokens for name in ("a", "b", "c")] == [240, 240, 240]
    pool.namespace("b").learn(next(texts))
    assert [pool.namespace(name).tokens for name in ("a", "b", "c")] == [0, 320, 240]


@pytest.mark.parametrize("alphabet", [2, 50, 5000])
def test_the_estimate_of_memory_is_not_below_what_is_used(alphabet: int) -> None:
    draw = random.Random(0)
    text = [draw.randrange(alphabet) for _ in range(5000)]
    namespace = space(vocab_size=5000)
    tracemalloc.start()
    namespace.learn(text)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used <= 1.05 * namespace.nbytes
    assert namespace.nbytes < 2 * used


def test_bounds_names_and_tokens_are_checked() -> None:
    with pytest.raises(ValueError, match="max_bytes must be at least 65,536, got 10"):
        ld.SharedPool(max_bytes=10)
    with pytest.raises(TypeError, match="max_age must be an integer"):
        ld.SharedPool(max_age=2.5)
    with pytest.raises(ValueError, match="needs a name"):
        ld.SharedPool().namespace("")
    with pytest.raises(ValueError, match="from 0 to 9"):
        space().learn([3, 10])
    with pytest.raises(ValueError, match="is for a model with 10 tokens, and this one has 32,000"):
        space().bind(32_000)


def test_an_answer_that_a_namespace_cannot_take_is_not_lost(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny(vocab_size=72)
    model.config.vocab_size = 64  # as image-text models have it: more embeddings than the text's vocabulary
    ids, options = torch.tensor([[3, 9, 64, 4, 44, 59]]), {"max_new_tokens": 10, "do_sample": False}
    namespace = ld.SharedPool().namespace("a")
    try:
        found = ld.generate(model, ids, lookahead=ld.LookaheadDecoding(shared=namespace), **options)
        assert found.tolist() == model.generate(ids, **options).tolist()
    finally:
        model.config.vocab_size = 72
    assert namespace.tokens == 0


def test_answers_of_a_batch_without_trees_join_the_pool() -> None:
    namespace, ids = ld.SharedPool().namespace("a"), torch.tensor([[3, 5, 7], [11, 13, 17]])
    decoding = ld.LookaheadDecoding(shared=namespace)
    found = ld.generate(tiny_model("bloom"), ids, lookahead=decoding, max_new_tokens=9, eos_token_id=None)
    assert [list(text) for text in namespace.younger.texts] == found.tolist()


def test_a_source_follows_the_text_also_past_tokens_that_it_was_not_asked_about() -> None:
    namespace = space()
    namespace.learn([1, 2, 3, 4])
    source = SharedSource(namespace)
    assert [t for t, _ in source.propose(source.root([9, 1]))] == [2]
    assert [t for t, _ in source.propose(source.follow(source.root([9, 1, 2]), 3))] == [4]
    text = [9, 1, 2, *[0] * 100, 3]
    ((token, mark),) = source.propose(source.root(text))
    assert token == 4
    assert source.prior(mark) == source.prior(1)  # of one token: what stood before the gap does not count


def test_threads_may_learn_and_ask_at_once() -> None:
    namespace = space(vocab_size=50)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(60):
                source = SharedSource(namespace)
                state = source.root([draw.randrange(50) for _ in range(5)])
                for _ in range(20):
                    found = list(source.propose(state))
                    state = source.follow(state, found[0][0] if found else 1)
                namespace.learn([draw.randrange(50) for _ in range(40)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class TestFile:
    def pool(self) -> ld.SharedPool:
        pool = ld.SharedPool(max_age=6)
        for name, vocab_size in (("one", 10), ("zwei ü", 300)):
            pool.namespace(name).bind(vocab_size)
        for i in range(5):
            pool.namespace("one").learn([i, i + 1, 9])
        pool.namespace("one").learn([4, 5, 9])
        pool.namespace("zwei ü").learn([1, 2, 299])
        return pool

    def test_what_was_saved_is_loaded(self, tmp_path: Path) -> None:
        pool = self.pool()
        ld.save_pool(pool, tmp_path / "pool")
        again = ld.load_pool(tmp_path / "pool", max_age=6)
        assert list(again.namespaces) == ["one", "zwei ü"]
        for name, namespace in pool.namespaces.items():
            other = again.namespace(name)
            assert other.vocab_size == namespace.vocab_size
            for mine, its in ((namespace.younger, other.younger), (namespace.older, other.older)):
                assert [list(t) for t in mine.texts] == [list(t) for t in its.texts]
                assert mine.requests == its.requests
        assert followers(again.namespace("one"), [4]) == followers(pool.namespace("one"), [4])

    @pytest.mark.parametrize(("bounds", "length"), [({"max_age": 6}, 3), ({"max_bytes": 1 << 16}, 20)])
    def test_a_generation_that_is_full_stays_whole(self, tmp_path: Path, bounds: dict[str, int], length: int) -> None:
        pool = ld.SharedPool(**bounds)
        namespace = pool.namespace("one")
        namespace.bind(50_000)
        sizes = []
        for i in range(40):
            namespace.learn(range(100 * i, 100 * i + length))
            ld.save_pool(pool, tmp_path / "pool")
            again = ld.load_pool(tmp_path / "pool").namespace("one")
            assert [list(t) for t in again.older.texts] == [list(t) for t in namespace.older.texts]
            assert [list(t) for t in again.younger.texts] == [list(t) for t in namespace.younger.texts]
            sizes.append(len(again.older.texts))
        assert sizes[0] == 0
        assert max(sizes) > 1

    def test_the_bounds_are_kept_with_it_unless_others_are_given(self, tmp_path: Path) -> None:
        ld.save_pool(ld.SharedPool(1 << 20, 50), tmp_path / "pool")
        again, other = ld.load_pool(tmp_path / "pool"), ld.load_pool(tmp_path / "pool", max_bytes=1 << 21)
        assert (again.max_bytes, again.max_age) == (1 << 20, 50)
        assert (other.max_bytes, other.max_age) == (1 << 21, 50)

    def test_what_has_no_room_when_loading_is_left_out_oldest_first(self, tmp_path: Path) -> None:
        pool = ld.SharedPool()
        namespace = pool.namespace("one")
        namespace.bind(50_000)
        for i in range(100):
            namespace.learn(range(400 * i, 400 * i + 400))
        ld.save_pool(pool, tmp_path / "pool")
        small = ld.load_pool(tmp_path / "pool", max_bytes=1 << 20)
        assert 0 < small.nbytes <= 1 << 20
        assert followers(small.namespace("one"), [39_998]) == [(39_999, 1)]
        assert followers(small.namespace("one"), [1]) == []

    def test_an_empty_pool_can_be_saved(self, tmp_path: Path) -> None:
        ld.save_pool(ld.SharedPool(), tmp_path / "pool")
        assert ld.load_pool(tmp_path / "pool").namespaces == {}

    @pytest.mark.parametrize("length", [0, 3, 20, -1])
    def test_a_file_that_was_cut_short_is_refused(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "pool"
        ld.save_pool(self.pool(), path)
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match="is no shared pool, or was cut short"):
            ld.load_pool(path)

    @pytest.mark.parametrize("content", [pickle.dumps({"a": 1}), b"{}", b"\x00" * 4096])
    def test_a_foreign_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "pool").write_bytes(content)
        with pytest.raises(ValueError, match="is no shared pool"):
            ld.load_pool(tmp_path / "pool")

    def test_safetensors_of_something_else_another_format_and_damage_are_told_apart(self, tmp_path: Path) -> None:
        path = tmp_path / "pool"
        path.write_bytes(safetensors.numpy.save({"weight": np.zeros(3)}))
        with pytest.raises(ValueError, match="is no shared pool of lookahead-decoding"):
            ld.load_pool(path)
        meta = {"name": "lookahead-decoding shared pool", "format": "2"}
        path.write_bytes(safetensors.numpy.save({}, meta))
        with pytest.raises(ValueError, match="has format 2, and this version reads 1"):
            ld.load_pool(path)
        ld.save_pool(self.pool(), path)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged \(its checksum is wrong\)"):
            ld.load_pool(path)
        path.write_bytes(safetensors.numpy.save({}, {**meta, "format": "1", "crc32": "0", "content": "[{}]"}))
        with pytest.raises(ValueError, match="is damaged"):
            ld.load_pool(path)
        ld.save_pool(self.pool(), path)
        tensors = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, "numpy") as file:
            meta = file.metadata()
        tensors["0.older.lengths"][:2] += (1, -1)
        path.write_bytes(safetensors.numpy.save(tensors, meta))
        with pytest.raises(ValueError, match=r"is damaged \(its checksum is wrong\)"):
            ld.load_pool(path)

    def test_weights_in_a_dtype_that_numpy_does_not_know_are_no_pool(self, tmp_path: Path) -> None:
        safetensors.torch.save_file({"weight": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "pool")
        with pytest.raises(ValueError, match="is no shared pool of lookahead-decoding"):
            ld.load_pool(tmp_path / "pool")

    def test_a_missing_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            ld.save_pool(self.pool(), tmp_path / "nowhere" / "pool")

    def test_a_missing_file_is_an_error_of_the_system(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            ld.load_pool(tmp_path / "pool")

    def test_the_old_file_stays_where_saving_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "pool"
        ld.save_pool(self.pool(), path)
        before = path.read_bytes()

        def fail(*args: object) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="no space"):
            ld.save_pool(ld.SharedPool(), path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


class TestDecoding:
    def ids(self, seed: int = 0, length: int = 12) -> torch.Tensor:
        return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(seed))

    def run(self, model: torch.nn.Module, decoding: ld.LookaheadDecoding, ids: torch.Tensor) -> list[int]:
        options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        ours = ld.generate(model, ids, attention_mask=torch.ones_like(ids), lookahead=decoding, **options)
        assert ours.tolist() == plain.tolist()
        return ours[0].tolist()

    def test_a_question_that_is_asked_again_is_answered_in_few_steps(
        self, tiny: Callable[..., torch.nn.Module]
    ) -> None:
        model, pool = tiny(), ld.SharedPool()
        config = ld.LookaheadConfig(sources=("shared",), step_times=FREE)
        steps, shares = [], []
        for _ in range(2):
            decoding = ld.LookaheadDecoding(config, shared=pool.namespace("one"))
            self.run(model, decoding, self.ids())
            steps.append(decoding.stats.steps)
            shares.append(decoding.stats.sources.get("shared", SourceCount()).accepted)
        assert steps[0] == 39
        assert shares[0] == 0
        assert steps[1] <= 10
        assert shares[1] == 39 - steps[1]
        other = ld.LookaheadDecoding(config, shared=pool.namespace("two"))
        self.run(model, other, self.ids())
        assert other.stats.steps == 39

    def test_every_sequence_of_a_batch_leaves_its_text(self, tiny: Callable[..., torch.nn.Module]) -> None:
        model, namespace = tiny(), ld.SharedPool().namespace("one")
        ids = torch.cat([self.ids(1), self.ids(2)])
        decoding = ld.LookaheadDecoding(shared=namespace)
        out = ld.generate(
            model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, lookahead=decoding
        )
        texts = [list(t) for t in namespace.younger.texts]
        for row in out.tolist():
            assert any(text == row[: len(text)] for text in texts)

    def test_a_cancelled_answer_is_not_learned(self, pocket: tuple[torch.nn.Module, object]) -> None:
        model, tokenizer = pocket
        namespace = ld.SharedPool().namespace("one")
        steps = ld.stream(model, tokenizer, "def f(", max_new_tokens=20, do_sample=False, shared=namespace)
        next(steps)
        steps.close()
        assert namespace.tokens == 0
        for step in ld.stream(model, tokenizer, "def f(", max_new_tokens=20, do_sample=False, shared=namespace):
            last = step
        assert last.finish_reason
        assert namespace.tokens > 20

    def test_the_last_step_of_a_stream_need_not_be_followed_by_another_question(
        self, pocket: tuple[torch.nn.Module, object]
    ) -> None:
        model, tokenizer = pocket
        namespace = ld.SharedPool().namespace("one")
        for step in ld.stream(model, tokenizer, "def f(", max_new_tokens=20, do_sample=False, shared=namespace):
            if step.finish_reason:
                break
        assert namespace.tokens > 20

    def test_what_cannot_be_honoured_is_refused(self, tiny: Callable[..., torch.nn.Module]) -> None:
        namespace = ld.SharedPool().namespace("one")
        with pytest.raises(ValueError, match="'shared' alone needs a shared pool"):
            ld.LookaheadDecoding(ld.LookaheadConfig(sources=("shared",)))
        for config in (ld.PLAIN, ld.LookaheadConfig.paper(), ld.LookaheadConfig(sources=("window",))):
            with pytest.raises(ValueError, match="sources leave out 'shared'"):
                ld.LookaheadDecoding(config, shared=namespace)
        with pytest.raises(ValueError, match="has no source 'shared'"):
            ld.LookaheadConfig.paper(sources=("window", "shared"))
        with pytest.raises(TypeError, match="must be a namespace"):
            ld.LookaheadDecoding(shared=ld.SharedPool())
        namespace.bind(10)
        with pytest.raises(ValueError, match="a namespace per tokenizer"):
            self.run(tiny(), ld.LookaheadDecoding(shared=namespace), self.ids())


def test_the_command_line_keeps_a_pool_in_a_file(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from lookahead_decoding.cli.main import cli

    path = tmp_path / "a folder" / "pool"  # which is made
    command = ["generate", "pocket", "-p", "def fib(n):", "--max-new-tokens", "40", "--json", "--dtype", "float32"]
    shared = [*command, "--shared-pool", str(path)]
    answers = [json.loads(CliRunner().invoke(cli, shared, catch_exceptions=False).output) for _ in range(2)]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    assert answers[1]["sources"]["shared"]["accepted"] > 0
    assert "shared" not in answers[0]["sources"]
    other = json.loads(CliRunner().invoke(cli, [*shared, "--namespace", "other"], catch_exceptions=False).output)
    assert "shared" not in other["sources"]
    assert sorted(ld.load_pool(path).namespaces) == ["default", "other"]
    path.write_bytes(b"mine, and no pool")
    for wrong, message in (
        (shared, "is no shared pool"),
        ([*command, "--namespace", "x"], "give that as well"),
        ([*command, "--shared-pool", str(path / "pool")], "cannot write to"),
        ([*command, "--shared-pool", str(tmp_path / "new"), "--plain"], "leave out 'shared'"),
    ):
        result = CliRunner().invoke(cli, wrong)
        assert result.exit_code == 2
        assert message in result.output
    assert path.read_bytes() == b"mine, and no pool"
    assert not (tmp_path / "new").exists()
