from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from lookahead_decoding import cli

KEYS = [
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
        monkeypatch.setattr("lookahead_decoding.decoding.perf_counter", lambda: base ** (next(ticks) % 60))  # noqa: B023
        one = json.loads(run(capsys, monkeypatch, *arguments)[1])
        answers.append((one["output_ids"], one["steps"], one["rows_per_step"], one["sources"]))
    assert answers[0][0]
    assert answers[0] == answers[1] == answers[2]


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
    for more in ([], ["--temperature", "0.8"], ["--field", "code", "--limit", "2"]):
        arguments = ["verify", "pocket", "--prompts", str(prompts), "--max-new-tokens", "30", *more]
        code, out, err = run(capsys, monkeypatch, *arguments)
        n = 2 if "--limit" in more else 3
        assert (code, out, err) == (0, f"identical {n}/{n} in float32\n", "")


def test_demo_shows_both_and_that_they_are_identical(capsys, monkeypatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "demo", "--max-new-tokens", "20")
    assert code == 0
    assert out.rstrip().endswith("identical: yes")
    assert "mean acceptance length" in out


def test_demo_exits_with_1_where_the_texts_differ(capsys, monkeypatch) -> None:
    right = cli.answer

    def wrong(model, tokenizer, prompts, decoding, *rest):  # type: ignore[no-untyped-def]
        answers = right(model, tokenizer, prompts, decoding, *rest)
        return [replace(a, output_ids=[*a.output_ids[:-1], 7]) if decoding.config.sources else a for a in answers]

    monkeypatch.setattr(cli, "answer", wrong)
    code, out, _ = run(capsys, monkeypatch, "demo", "--max-new-tokens", "6")
    assert code == 1
    assert out.rstrip().endswith("identical: no")


def test_chat_answers_until_the_input_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lookahead_decoding", "chat", "pocket", "--max-new-tokens", "12"]
    done = subprocess.run(command, input="import os\nimport re\n\n", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")  # also where torchao is installed, which has a lot to say
    assert done.stdout.strip()


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
        (["verify", "pocket"], "Missing option"),
        (["generate", "pocket", "-p", "a", "--top-k", "5"], "give a --temperature as well"),
        (["generate", "pocket", "-p", "a", "--stop", ""], "--stop needs a text"),
        (["generate", "pocket", "-p", "a", "--device", "nowhere"], "cannot use device 'nowhere'"),
        (["bench", "pocket"], "Missing option"),
        (["bench", "step", "pocket", "--rows", "x"], "takes numbers"),
        (["generate", "pocket", "-p", "a", "--plain", "-W", "5"], "--plain guesses nothing"),
        (["generate", "pocket", "-p", "a", "-W", "5", "--sources", "prompt"], "window_size is the window's"),
        (["nonsense"], "No such command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.setattr("lookahead_decoding.cli_common._reachable", lambda address: False)
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
    run = f"import sys; sys.argv = ['lookahead', *{arguments.split()}]\nfrom lookahead_decoding import cli\n"
    run += "try:\n    cli.main()\nfinally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
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
    code, out, err = run(capsys, monkeypatch, "generate", str(tmp_path), "-p", "a")
    assert (code, out) == (2, "")
    assert "cannot load a model from" in err
    assert err.count("\n") == 1


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
