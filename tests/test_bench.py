from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lookahead_decoding as ld
import many
from lookahead_decoding.bench import METHODS
from lookahead_decoding.bench.methods import Job, Replay, make, measure, of_steps, warm_up
from lookahead_decoding.bench.result import About, Result, Row, distinct_share
from lookahead_decoding.bench.step import Limits, cache_bytes, commit_times, limits, step_times, tree_of
from lookahead_decoding.cli import main as cli
from lookahead_decoding.price.stats import Stats
from test_exactness import prompt_of

Tiny = Callable[..., torch.nn.Module]
ABOUT = About("lookahead bench m", "m", "p.jsonl", "greedy", "eager", "a cpu", 2)

SMALL = ld.LookaheadConfig.paper(3, 3, 3, ("window", "prompt", "output"))


def row(prompt: int, method: str, seconds: tuple[float, ...], share: float = 1.0, tokens: int = 100) -> Row:
    plain = not method.startswith("lookahead")
    return Row(prompt, method, plain, tokens, seconds, None if plain else 2.0, share, True)


def test_where_every_prompt_loops_the_best_plain_method_is_the_fastest_on_those() -> None:
    slow, fast = (
        row(0, name, (t,), share=0.1) for name, t in (("autoregressive@float32", 2.0), ("hf-greedy@float32", 1.0))
    )
    assert Result(ABOUT, [slow, fast]).best_plain == "hf-greedy@float32"


def test_answers_are_short_by_what_they_may_be() -> None:
    cut = row(0, "autoregressive@float32", (1.0,), tokens=16)
    assert not Result(ABOUT, [cut]).of("autoregressive@float32")
    assert Result(ABOUT, [cut], short=16).of("autoregressive@float32") == [cut]


def test_an_answer_without_a_step_says_nothing_of_steps() -> None:
    counts = of_steps(Stats(sequences=1, tokens=1, forwards=1, sequence_forwards=1))
    assert (counts["rows_per_step"], counts["plain_share"]) == (None, None)


def test_ratios_are_medians_over_prompts_to_the_best_plain_method_of_any_dtype() -> None:
    result = Result(ABOUT)
    for prompt, speed in enumerate((1.0, 2.0, 4.0)):
        result.rows += [
            row(prompt, "autoregressive@float32", (2.0,)),
            row(prompt, "hf-greedy@float32", (4.0, 5.0, 1000.0)),
            row(prompt, "autoregressive@bfloat16", (1.0,)),
            row(prompt, "lookahead@bfloat16", (1.0 / speed,)),
        ]
    assert result.best_plain == "autoregressive@bfloat16"
    assert result.speed("hf-greedy@float32") == 20.0
    assert result.ratio("lookahead@bfloat16", "autoregressive@bfloat16") == (2.0, 1.5, 3.0)
    last = result.summary()[-1]
    assert last["over_best_plain"] == [2.0, 1.5, 3.0]
    assert last["over_hf_greedy"] == [10.0, 7.5, 15.0]
    assert last["mean_acceptance_length"] == 2.0


def test_loops_and_short_texts_are_listed_apart() -> None:
    result = Result(ABOUT)
    result.rows = [
        row(0, "lookahead@x", (1.0,)),
        row(1, "lookahead@x", (1.0,), 0.4),
        row(2, "lookahead@x", (1.0,), 1.0, 9),
    ]
    assert [r.prompt for r in result.of("lookahead@x")] == [0]
    assert [r.prompt for r in result.of("lookahead@x", looping=True)] == [1, 2]
    assert [(line["looping"], line["prompts"]) for line in result.summary()] == [(False, 1), (True, 2)]


def test_share_of_distinct_ngrams() -> None:
    assert distinct_share([1, 2, 3, 4], 2) == 1.0
    assert distinct_share([1, 2, 1, 2, 1], 2) == 0.5
    assert distinct_share([1], 2) == 1.0


def test_every_method_gives_the_same_greedy_tokens(tiny: Tiny) -> None:
    model = tiny()
    methods = [make(name, "float32", model, SMALL) for name in METHODS if name != "parallel"]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    jobs = [Job((tuple(prompt_of(n)[0].tolist()),)) for n in (5, 9)]
    kept, failed = warm_up(methods, jobs, options)
    assert (kept, failed) == (methods, {})
    found = list(measure(methods, jobs, options, repeat=2))
    assert [[r.agrees for r in rows] for rows in found] == [[True] * 6] * 2
    assert [len(r.seconds) for r in found[0]] == [2] * 6
    assert [r.tokens for r in found[1]] == [20] * 6
    with pytest.raises(ValueError, match="no method 'magic': choose from"):
        make("magic", "float32", model, ld.LookaheadConfig())


def bench_on_ranks(ranks: ld.Ranks) -> list[list[Row]]:
    model = AutoModelForCausalLM.from_pretrained(ld.pocket_path(), dtype=torch.float32)
    methods = [make(name, "float32", model, SMALL, ranks=ranks) for name in ("autoregressive", "lookahead", "parallel")]
    mine = [method for method in methods if ranks.first or method.shared]
    jobs = [Job((tuple(prompt_of(n)[0].tolist()),)) for n in (5, 9)]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None}
    kept, failed = warm_up(mine, jobs, options)
    assert (kept, failed) == (mine, {})
    return list(measure(mine, jobs, options, repeat=2))


def test_ranks_share_one_method_and_wait_during_the_others() -> None:
    first, second = many.run(2, bench_on_ranks)
    for rows, others in zip(first, second, strict=True):
        assert [row.method for row in rows] == ["autoregressive@float32", "lookahead@float32", "parallel@float32"]
        assert [row.agrees for row in rows] == [True] * 3
        assert [row.ranks != {} for row in rows] == [False, False, True]
        assert rows[2].ranks["ranks"] == 2
        assert 0 < rows[2].ranks["message_bytes_per_step"] <= 2048
        assert 0 < rows[2].ranks["communication_share"] < 1
        assert [row.method for row in others] == ["parallel@float32"]


def test_parallel_needs_ranks(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="'parallel' needs several ranks"):
        make("parallel", "float32", tiny(), SMALL)


def test_sampled_methods_start_from_the_same_seed(tiny: Tiny) -> None:
    methods = [make(name, "float32", tiny(), ld.LookaheadConfig()) for name in ("hf-greedy", "lookahead")]
    options = {"do_sample": True, "max_new_tokens": 15, "eos_token_id": None}
    (rows,) = measure(methods, [Job(((5, 6),))], options, seed=4)
    assert [r.agrees for r in rows] == [True, True]


def test_replay_forces_the_reference(tiny: Tiny) -> None:
    methods = [make(name, "float32", tiny(), SMALL) for name in ("autoregressive", "lookahead", "hf-prompt-lookup")]
    reference = (7, 8, 9, 7, 8, 9, 7, 8, 9, 7, 8, 9)
    (rows,) = measure(methods, [Job(((5, 6),), reference)], {"do_sample": False})
    assert [r.tokens for r in rows] == [12, 12, 12]
    assert rows[1].mean_acceptance_length > 1.0
    forced = Replay([5, 6, 7])(torch.tensor([[5, 6]]), torch.zeros(1, 10))
    assert forced.argmax().item() == 7
    assert forced.isneginf().sum() == 9


def test_batches_count_tokens_up_to_each_end(tiny: Tiny) -> None:
    names = ("hf-greedy", "lookahead", "hf-prompt-lookup")
    methods = [make(name, "float32", tiny(), SMALL) for name in names]
    jobs = [Job((tuple(prompt_of(6)[0].tolist()), (5, 6, 7)))]
    alone = [
        tiny().generate(torch.tensor([p]), do_sample=False, max_new_tokens=30, eos_token_id=None)[0].tolist()
        for p in jobs[0].prompts
    ]
    stop = alone[0][10]  # ends the first sequence early
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": stop, "pad_token_id": 0}
    kept, failed = warm_up(methods, jobs, options)
    assert [m.name for m in kept] == ["hf-greedy", "lookahead"]
    assert list(failed) == ["hf-prompt-lookup@float32"]
    (rows,) = measure(kept, jobs, options)
    first, second = (text[len(p) :] for text, p in zip(alone, jobs[0].prompts, strict=True))
    wanted = first.index(stop) + 1 + (second.index(stop) + 1 if stop in second else 30)
    assert [r.tokens for r in rows] == [wanted] * 2
    assert [r.agrees for r in rows] == [True] * 2
    with pytest.raises(ValueError, match="replay takes one prompt at a time"):
        Job(((1,), (2,)), (3,))


def test_a_batch_of_short_answers_is_short() -> None:
    result = Result(ABOUT)
    result.rows = [Row(0, "hf-greedy@x", True, 8 * 5, (1.0,), None, 1.0, True, sequences=8)]
    assert result.of("hf-greedy@x") == []


def test_a_tree_of_every_size() -> None:
    for rows in (1, 2, 7, 8, 33, 64, 128):
        assert len(tree_of(rows)) == rows


def test_step_and_commit_times_are_positive(tiny: Tiny) -> None:
    times = list(step_times(tiny(), (1, 8), (20, 40), repeats=2))
    assert [(t.context, t.rows) for t in times] == [(20, 1), (20, 8), (40, 1), (40, 8)]
    assert all(t.ours > 0 and t.stock > 0 for t in times)
    assert set(commit_times(tiny(), (70, 200), repeats=3)) == {70, 200}


def test_the_least_time_of_a_step_is_reading_or_multiplying(tiny: Tiny) -> None:
    machine = Limits(weight_bytes=1000, bytes_per_s=1e5, operations_per_s=1e6, products=500)
    assert [machine.milliseconds(n) for n in (1, 10, 20)] == [10.0, 10.0, 20.0]
    measured = limits(tiny())
    embedding = tiny().get_input_embeddings().weight.numel()
    assert measured.weight_bytes == 4 * (sum(p.numel() for p in tiny().parameters()) - embedding)
    assert measured.bytes_per_s > 0
    assert measured.operations_per_s > 0


def test_keys_and_values_hold_the_capacity_and_no_more(tiny: Tiny) -> None:
    assert cache_bytes(tiny(), 77) == (2 * 2 * 2 * 77 * 8 * 4,) * 2  # layers, keys and values, heads, slots, size


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["step", "pocket", "--rows", "0,1"], "--rows takes numbers of at least 1"),
        (["step", "pocket", "--contexts", "x"], "--contexts takes numbers of at least 1"),
        (["pocket", "--config", "5,5"], "--config takes auto, or three numbers W,N,G such as 15,5,15; got '5,5'"),
        (["pocket", "--sources", "magic"], "unknown source 'magic'"),
        (["pocket", "--methods", "lookahead@float16x"], "no dtype 'float16x': choose from auto, float32"),
        (["pocket", "--methods", "magic"], "no method 'magic'"),
        (["pocket", "--replay", "prompt", "--batch-size", "2"], "leave --temperature and --batch-size out"),
        (["pocket", "--methods", "hf-prompt-lookup", "--batch-size", "2"], "nothing was measured: hf-prompt-lookup@"),
    ],
)
def test_a_wrong_option_is_one_clear_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "def f(x):\\n"}\n{"prompt": "import os\\n"}\n')
    more = [] if arguments[0] == "step" else ["--prompts", str(prompts), "--max-new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["lookahead", "bench", *arguments, *more])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert problem in capsys.readouterr().err


def test_the_command_prints_a_table_and_writes_file_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        '{"prompt": "def f(x):\\n", "code": "    return x + 1\\n"}\n{"prompt": "import os\\n", "code": "x"}\n'
    )
    out, picture = tmp_path / "r" / "out.json", tmp_path / "out.png"
    methods = "autoregressive,lookahead,autoregressive@bfloat16"
    arguments = [
        "lookahead",
        "bench",
        "pocket",
        "--prompts",
        str(prompts),
        *("--dtype", "float32", "--max-new-tokens", "40", "--methods", methods),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--no-eos", "--json", str(out), "--plot", str(picture)])
    cli.main()
    assert "speedup: over autoregressive@" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert [r["method"] for r in content["rows"][:3]] == [
        "autoregressive@float32",
        "lookahead@float32",
        "autoregressive@bfloat16",
    ]
    assert content["about"]["command"].startswith("lookahead bench pocket")
    assert picture.stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", [*arguments, "--replay", "code"])
    cli.main()
    assert "replay" in capsys.readouterr().out
