from __future__ import annotations

import copy
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from itertools import count
from pathlib import Path

import pytest
import torch
from rich.console import Console

import lookahead_decoding as ld
from lookahead_decoding.bench.methods import Job
from lookahead_decoding.bench.result import About, Result, Row
from lookahead_decoding.cli import demo
from lookahead_decoding.cli import main as cli
from lookahead_decoding.cli.chat import Talk, _until_interrupted
from lookahead_decoding.cli.doctor import Way
from lookahead_decoding.cli.loading import SAMPLES, Problem, first_line, load, read_prompts, samples
from lookahead_decoding.cli.printing import Column, in_width, show
from lookahead_decoding.model.native.library import why_no_library

KEYS = [
    "index",
    "prompt",
    "output_ids",
    "text",
    "prompt_tokens",
    "tokens",
    "steps",
    "mean_acceptance_length",
    "rows_per_step",
    "plain_share",
    "sources",
    "seconds",
    "tokens_per_second",
    "finish_reason",
]


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the `lookahead` command."""
    monkeypatch.setattr(sys, "argv", ["lookahead", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    texts = ["def add(a, b):\n", "import os\nimport sys\n", "class Stack:\n"]
    path.write_text("".join(json.dumps({"prompt": t, "code": t + "\n"}) + "\n" for t in texts))
    return path


def test_generate_prints_the_continuation(capsys, monkeypatch) -> None:
    code, out, err = run(
        capsys, monkeypatch, "generate", "pocket", "-p", "def add(a, b):\n", "--max-new-tokens", "20", "--json"
    )
    text = json.loads(out)["text"]
    code, out, err = run(capsys, monkeypatch, "generate", "pocket", "-p", "def add(a, b):\n", "--max-new-tokens", "20")
    assert (code, out, err) == (0, text + "\n", "")


def test_what_is_reproducible_does_not_follow_the_clock(capsys, monkeypatch) -> None:
    arguments = ["generate", "pocket", "-p", "class Stack:\n", "-n", "40", "--threads", "1", "--reproducible", "--json"]
    answers = []
    for base in (1.0, 1.5, 3.0):  # clocks that go ever faster
        ticks = count()
        monkeypatch.setattr("lookahead_decoding.engine.decode.perf_counter", lambda: base ** (next(ticks) % 60))  # noqa: B023
        one = json.loads(run(capsys, monkeypatch, *arguments)[1])
        answers.append((one["output_ids"], one["steps"], one["rows_per_step"], one["sources"]))
    assert answers[0][0]
    assert answers[0] == answers[1] == answers[2]


def test_the_papers_rows_cost_nothing_when_it_is_reproducible_too() -> None:
    paper = ld.LookaheadConfig.paper(5, 3, 5)
    assert replace(paper, reproducible=True).fixed_times == paper.fixed_times == ((1, 1.0),)
    fixed = ld.LookaheadConfig(reproducible=True)
    assert fixed.fixed_times is not None
    assert replace(fixed, reproducible=False).fixed_times is None


def test_threads_are_as_asked(capsys, monkeypatch) -> None:
    before = torch.get_num_threads()
    try:
        run(capsys, monkeypatch, "generate", "pocket", "-p", "a", "-n", "1", "--threads", str(before + 1))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_each_prompt_is_verified_with_a_seed_of_its_own(capsys, monkeypatch, prompts: Path) -> None:
    seeds = []
    monkeypatch.setattr("lookahead_decoding.hf.exactness.compare", lambda m, i, d, seed, **o: seeds.append(seed))
    run(capsys, monkeypatch, "verify", "pocket", "--prompts", str(prompts), "--temperature", "0.8", "--seed", "5")
    assert seeds == [5, 6, 7]


def test_messages_stand_in_for_the_prompt_and_not_for_a_field_that_is_misspelt(tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(json.dumps({"prompt": None, "messages": messages}) + "\n")
    assert read_prompts(path, "prompt")[0].content == messages
    with pytest.raises(Problem, match="no text in field 'promt'"):
        read_prompts(path, "promt")


def test_a_line_that_the_template_refuses_is_said_and_the_talk_goes_on(pocket, monkeypatch, capsys) -> None:
    model, tokenizer = pocket
    refusal = "{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{% endfor %}x"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr("lookahead_decoding.cli.chat.load", lambda *a: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr("sys.stdin", StringIO("no\n\udcff\nyes\n"))
    code, out, err = run(capsys, monkeypatch, "chat", "pocket", "-n", "4")
    assert code == 0
    assert "[the chat template does not take these messages: not that]" in err
    assert "[that line is not UTF-8]" in err
    assert out.strip()


def test_ctrl_c_stops_an_answer_and_a_second_one_the_command(request) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with _until_interrupted() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_message_breaks_between_words_on_a_terminal_alone(monkeypatch) -> None:
    out = StringIO()
    assert in_width("a line of several words", out) == "a line of several words"
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "12")
    assert in_width("one two three /a/folder/with-a-name\nfour", out).splitlines() == [
        "one two",
        "three",
        "/a/folder/with-a-name",
        "four",
    ]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("one of:\n(1) a file,\n(2) a class\nmore", "one of: (1) a file, (2) a class"),
        ("all of it\nnothing else", "all of it"),
        (f"First. {'x' * 400}", "First."),
        ("", "ValueError"),
    ],
)
def test_what_an_error_says_first_is_a_whole_sentence(message: str, said: str) -> None:
    assert first_line(ValueError(message)) == said


def test_the_doctor_recommends_what_was_fastest(monkeypatch, capsys) -> None:
    doctor = sys.modules["lookahead_decoding.cli.doctor"]  # the package has the command by that name
    speeds = {"autoregressive@float32 eager": 10, "lookahead@float32 eager": 14, "hf-greedy@float32": 9}
    speeds |= {"autoregressive@bfloat16 eager": 12, "lookahead@bfloat16 eager": 13, "hf-greedy@bfloat16": 8}

    def race(ways: Sequence[Way], jobs: Sequence[Job], length: int) -> Result:
        result = Result(About("", "", "", "", "", "", 1))
        for method, speed in speeds.items():
            counts = (2.0, 1.0, True) if method.startswith("lookahead") else (None, 1.0, True)
            plain = not method.startswith("lookahead")
            result.rows.append(Row(0, method, plain, 10 * speed, (10.0,), *counts, rows_per_step=2.0, plain_share=0.5))
        return result

    monkeypatch.setattr(doctor, "_race", race)
    both = ("float32", "bfloat16")
    monkeypatch.setattr(doctor, "_ways", lambda name, model, *a: [Way(dtype, "eager", model, 0.01) for dtype in both])
    said = json.loads(run(capsys, monkeypatch, "doctor", "pocket", "--threads", "2", "--dtype", "float32", "--json")[1])
    assert (said["dtype"], said["best_plain"]) == ("float32", "autoregressive@bfloat16 eager")
    assert said["expected_speedup"] == 1.17
    assert said["command"] == "lookahead generate pocket --dtype float32 --execution eager --threads 2 -p 'your prompt'"
    speeds |= {"autoregressive@bfloat16 eager": 20}
    said = json.loads(run(capsys, monkeypatch, "doctor", "pocket", "--dtype", "float32", "--json")[1])
    assert said["command"] == "lookahead generate pocket --dtype bfloat16 --execution eager --plain -p 'your prompt'"
    assert "ld.PLAIN" in said["python"]


def test_public_names_are_listed_before_they_are_used() -> None:
    code = "import lookahead_decoding as ld; print(dir(ld) == sorted([*ld.__all__, '__version__']))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "True\n"
    assert all(hasattr(ld, name) for name in ld.__all__)


def on_ranks(*arguments: str, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """The `lookahead` command on two ranks."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lookahead_decoding"]
    return subprocess.run([*start, *arguments], input=said, capture_output=True, text=True, timeout=120)


def test_two_ranks_print_what_one_process_prints(capsys, monkeypatch) -> None:
    arguments = ["generate", "pocket", "--dtype", "float32", "--max-new-tokens", "20", "--temperature", "0.8"]
    _, alone, _ = run(capsys, monkeypatch, *arguments, "-p", "def add(a, b):\n")
    together = on_ranks(*arguments, said="def add(a, b):\n")
    assert (together.returncode, together.stdout) == (0, alone)


def test_a_problem_on_ranks_is_one_line() -> None:
    done = on_ranks("chat", "pocket")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("lookahead: ")]
    assert lines == ["lookahead: chat is for one process: start it without torchrun"]


def test_json_is_one_object_per_prompt_and_nothing_else(capsys, monkeypatch, prompts: Path) -> None:
    arguments = ["generate", "pocket", "--prompts", str(prompts), "--max-new-tokens", "30", "--dtype", "float32"]
    code, out, err = run(capsys, monkeypatch, *arguments, "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(answers)) == (0, "", 3)
    for one in answers:
        assert list(one) == KEYS
        assert one["tokens"] == len(one["output_ids"])
        assert one["steps"] < one["tokens"]
        assert one["rows_per_step"] >= 1.0 >= one["plain_share"]
        assert one["mean_acceptance_length"] == round((one["tokens"] - 1) / one["steps"], 4)
    for more in (
        ["--plain"],
        ["--batch-size", "2"],
        ["-W", "3", "-N", "3", "-G", "0", "--sources", "window"],
        ["--paper"],
    ):
        _, out, _ = run(capsys, monkeypatch, *arguments, "--json", *more)
        assert [json.loads(line)["output_ids"] for line in out.splitlines()] == [a["output_ids"] for a in answers]


def test_sampling_depends_on_the_seed_and_not_on_the_batch(capsys, monkeypatch, prompts: Path) -> None:
    arguments = ["generate", "pocket", "--prompts", str(prompts), "--temperature", "0.8", "--top-k", "30", "--top-p"]
    arguments += ["0.95", "--max-new-tokens", "20", "--dtype", "float32", "--json"]
    outputs = []
    for more in (["--seed", "1"], ["--seed", "1", "--batch-size", "3"], ["--seed", "9"]):
        _, out, _ = run(capsys, monkeypatch, *arguments, *more)
        outputs.append([json.loads(line)["output_ids"] for line in out.splitlines()])
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_stop_ends_the_answer(capsys, monkeypatch) -> None:
    arguments = ["generate", "pocket", "-p", "import os\n\n\ndef ", "--max-new-tokens", "60", "--json"]
    _, out, _ = run(capsys, monkeypatch, *arguments, "--stop", "(", "--stop", ":")
    one = json.loads(out)
    assert one["finish_reason"] == "stop"
    assert re.search(r"[(:]", one["text"])
    assert not re.search(r"[(:]", one["text"][:-8])


def test_an_answer_ends_with_the_context(capsys, monkeypatch) -> None:
    prompt = "x = 1\n" * 200
    arguments = ["generate", "pocket", "-p", prompt, "--max-new-tokens", "900", "--json", "--dtype", "float32"]
    _, out, _ = run(capsys, monkeypatch, *arguments)
    one = json.loads(out)
    assert one["finish_reason"] == "stop" or one["prompt_tokens"] + one["tokens"] == 1024


def test_verify_counts_identical_outputs(capsys, monkeypatch, prompts: Path) -> None:
    also = "" if why_no_library() else "identical to plain decoding by the same steps, which are row-invariant: all\n"
    for more in ([], ["--temperature", "0.8"], ["--field", "code", "--limit", "2"]):
        arguments = ["verify", "pocket", "--prompts", str(prompts), "--max-new-tokens", "30", *more]
        code, out, err = run(capsys, monkeypatch, *arguments)
        n = 2 if "--limit" in more else 3
        assert (code, out, err) == (0, f"identical to model.generate {n}/{n} in float32\n{also}", "")


def test_demo_shows_both_and_that_they_are_identical(capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "demo", "--max-new-tokens", "20")
    assert code == 0
    assert "identical: yes" in out
    assert "tokens per step" in out


def test_demo_exits_with_1_where_the_texts_differ(capsys, monkeypatch) -> None:
    right = demo.Runner.step

    def wrong(runner: demo.Runner) -> None:
        right(runner)
        if runner.title == "lookahead":
            runner.tokens[-1] = 7

    monkeypatch.setattr(demo.Runner, "step", wrong)
    code, out, _ = run(capsys, monkeypatch, "demo", "--max-new-tokens", "6")
    assert code == 1
    assert "identical: no" in out


def test_chat_answers_until_the_input_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lookahead_decoding", "chat", "pocket", "--max-new-tokens", "12"]
    said = "import os\n\n/help\n/reset\n/wrong\nimport re\n/exit\nimport no\n"
    done = subprocess.run(command, input=said, capture_output=True, text=True)
    cut = "[cut after 12 tokens: --max-new-tokens]"
    *_, forgotten, wrong, last = notes = done.stderr.splitlines()  # no warning, also where torchao is installed
    untaught = "[pocket has no chat template: it goes on with the text so far]"
    assert (done.returncode, *notes[:2], notes[2][:6]) == (0, untaught, cut, "/reset")
    assert (forgotten, wrong, last) == ("[forgotten]", "no command /wrong: /help lists them", cut)
    assert done.stdout.strip()


def test_a_talk_drops_its_oldest_turns_where_the_context_is_full(pocket, capsys) -> None:
    talk = Talk(*pocket, None)
    for _ in range(3):
        ids, length = talk.ask("x = 1\n" * 100, 20)
        assert (len(ids) + length <= 1024, length) == (True, 20)
        talk.answer("y = 2\n" * 40)
    assert "the oldest 1 turns were dropped" in capsys.readouterr().err
    with pytest.raises(Problem, match="say less"):
        talk.ask("x = 1\n" * 2000, 20)


def test_a_prompt_of_messages_is_put_into_the_template(tmp_path: Path, capsys, monkeypatch) -> None:
    model, tokenizer = load("pocket", "float32", "cpu", False)
    template = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}{% endfor %}# answer\n"
    model.save_pretrained(tmp_path / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "import os\n"}]}) + "\n")
    arguments = ["generate", str(tmp_path / "model"), "-n", "8", "--json", "--dtype", "float32"]
    given = ["-p", "# user\nimport os\n# answer"], ["-p", "import os\n", "--chat"], ["--prompts", str(path)]
    answers = [json.loads(run(capsys, monkeypatch, *arguments, *more)[1]) for more in given]
    assert answers[0]["output_ids"] == answers[1]["output_ids"] == answers[2]["output_ids"]
    assert answers[1]["prompt"] == answers[2]["prompt"] == [{"role": "user", "content": "import os\n"}]
    messages = [{"role": "user", "content": "import os\n"}]
    steps = ld.stream(model, tokenizer, messages=messages, max_new_tokens=8, do_sample=False)
    assert [t for step in steps for t in step.token_ids] == answers[0]["output_ids"]
    systematic = json.loads(run(capsys, monkeypatch, *arguments, "-p", "import os\n", "--system", "be brief\n")[1])
    assert systematic["prompt_tokens"] > answers[0]["prompt_tokens"]
    code, _, err = run(capsys, monkeypatch, "generate", "pocket", "-p", "a", "--chat")
    assert (code, err) == (2, "lookahead: the prompt: the tokenizer has no chat template: give the prompt as text\n")


def test_samples_are_put_into_the_template_of_a_model_that_has_one() -> None:
    _, tokenizer = load("pocket", "float32", "cpu", False)
    assert samples(tokenizer, 2) == list(SAMPLES[:2])
    tokenizer.chat_template = "{{ messages }}"
    assert samples(tokenizer) == [sample.in_chat() for sample in SAMPLES]


def test_a_terminal_without_a_prompt_is_told_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, err = run(capsys, monkeypatch, "generate", "pocket")
    assert code == 2
    assert err == "lookahead: no prompt: give one with -p, a file of them with --prompts, or text on standard input\n"


@pytest.mark.parametrize(("width", "shown"), [(80, "abcdefg"), (20, "abc")])
def test_a_table_has_the_first_columns_that_fit(width: int, shown: str) -> None:
    out = Console(width=width, file=StringIO())
    empty = Column("empty", ["", ""])
    columns = [
        Column("", ["x", "y"]),
        empty,
        *(Column(name, ["1.0", "2.0"], f"what {name} says") for name in "abcdefg"),
    ]
    show(columns, out)
    lines = out.file.getvalue().splitlines()
    assert lines[0].split() == list(shown)
    assert lines[4] == "a: what a says"
    hidden = " ".join(" ".join(lines).split()).partition("a wider terminal also shows: ")[2]
    assert "".join(hidden.split()).replace(",", "") == "abcdefg".removeprefix(shown)
    assert max(map(len, lines)) <= width


def test_a_table_that_is_too_wide_numbers_its_rows() -> None:
    out = Console(width=20, file=StringIO())
    columns = [Column("method", ["a long name", "another"]), *(Column(name, ["1.0", "2.0"]) for name in "abcdefg")]
    show(columns, out)
    lines = out.file.getvalue().splitlines()
    assert lines[0].split() == ["a", "b", "c"]
    assert lines[1].split() == ["1", "1.0", "1.0", "1.0"]
    assert lines[4:6] == ["1: a long name", "2: another"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "/no/such/folder", "-p", "a"], "no model folder at '/no/such/folder'"),
        (["generate", "nobody/nothing", "-p", "a"], "the hub cannot be reached"),
        (["generate", __file__, "-p", "a"], "is a file: give the folder that it lies in"),
        (["generate", str(Path(__file__).parent), "-p", "a"], "there is no config.json in that folder"),
        (["generate", "pocket", "-p", ""], "the prompt is empty"),
        (["generate", "pocket", "-p", "a", "-W", "0"], "window_size must be at least 1, got 0"),
        (["generate", "pocket", "-p", "a", "-N", "1"], "ngram_size must be at least 2, got 1"),
        (["generate", "pocket", "-p", "a", "-G", "-1"], "verification_set_size must be at least 0, got -1"),
        (["generate", "pocket", "-p", "a", "--sources", "magic"], "unknown source 'magic'"),
        (["generate", "pocket", "-p", "a", "--windw", "3"], "No such option"),
        (["generate", "pocket", "-p", "x = 1\n" * 2000], "the model's context is 1,024"),
        (["generate", "pocket", "-p", "a", "--temperature", "-1"], "-1"),
        (["generate", "pocket", "-p", "a", "--prompts", "/no/file.jsonl"], "does not exist"),
        (["bench", "pocket", "--replay", "code"], "--replay names a field of --prompts"),
        (["generate", "pocket", "-p", "a", "--top-k", "5"], "give a --temperature as well"),
        (["generate", "pocket", "-p", "a", "--stop", ""], "--stop needs a text"),
        (["generate", "pocket", "-p", "a", "--device", "nowhere"], "cannot use device 'nowhere'"),
        (["bench", "pocket", "--methods", "magic"], "no method 'magic'"),
        (["bench", "step", "pocket", "--rows", "x"], "takes numbers"),
        (["generate", "pocket", "-p", "a", "--plain", "-W", "5"], "--plain guesses nothing"),
        (["generate", "pocket", "-p", "a", "-W", "5", "--sources", "prompt"], "window_size is the window's"),
        (["nonsense"], "No such command"),
        (["generate", "pocket", "-p", "a", "--threads", "99999"], "99999 is more than the processor has"),
        (["generate", "pocket", "-p", "a", "--device", "mps"], "cannot use device 'mps'"),
        (["generate", "Pockt", "-p", "a"], "did you mean 'pocket'?"),
        (["generate", "some/model.gguf", "-p", "a"], "GGUF files are not read"),
        (["bench", "stp", "pocket"], "did you mean `bench step`?"),
        (["chat", "pocket", "--plain", "-W", "5"], "--plain guesses nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lookahead_decoding.cli.loading._reachable", lambda address: False)
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lookahead: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "--version",
        "--help",
        "generate --help",
        "bench run --help",
        "doctor --help",
        "tune pocket --nonsense",
        "nonsense",
    ],
)
def test_help_and_wrong_options_do_not_wait_for_torch(arguments: str) -> None:
    run = f"import sys; sys.argv = ['lookahead', *{arguments.split()}]\nfrom lookahead_decoding.cli.main import main\n"
    run += "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["False False"]


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_a_command_alone_shows_its_help(arguments: list[str], capsys, monkeypatch) -> None:
    code, out, err = run(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert "Commands:" in err


def test_a_method_is_measured_once(prompts: Path, capsys, monkeypatch) -> None:
    arguments = ("bench", "pocket", "--prompts", str(prompts), "--methods", "lookahead,lookahead")
    assert run(capsys, monkeypatch, *arguments)[::2] == (
        2,
        "lookahead: --methods names one twice: lookahead,lookahead\n",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ('{"text": "a"}', "line 2: no text in field 'prompt'"),
        ("[1]", "line 2: no text in field"),
        ('{"prompt": ""}', "prompt 2 is empty"),
        ('{"messages": "hi"}', "line 2: messages must be a list of objects"),
        ('{"messages": []}', "line 2: messages must be a list of objects"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path, capsys, monkeypatch) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    code, out, err = run(capsys, monkeypatch, "generate", "pocket", "--prompts", str(path), "--json")
    assert (code, out) == (2, "")
    assert message in err
    path.write_bytes(b"\xff\xfe")
    code, _, err = run(capsys, monkeypatch, "generate", "pocket", "--prompts", str(path))
    assert code == 2
    assert "not UTF-8" in err


def test_a_broken_model_folder_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{")
    for wanted in ("no tokenizer in", "cannot load a model from"):
        code, out, err = run(capsys, monkeypatch, "generate", str(tmp_path), "-p", "a")
        assert (code, out) == (2, "")
        assert wanted in err
        assert err.count("\n") == 1
        (tmp_path / "tokenizer.json").write_text("{")


def test_a_model_that_cannot_take_a_tree_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from lookahead_decoding import pocket_path

    settings = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(pocket_path()).save_pretrained(tmp_path)
    code, _, err = run(capsys, monkeypatch, "generate", str(tmp_path), "-p", "a = 1")
    assert code == 2
    assert "a model of type 'mamba' cannot check candidates" in err
    assert err.count("\n") == 1
