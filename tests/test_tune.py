from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lookahead_decoding import Stats
from lookahead_decoding.bench.tune import Tuning
from lookahead_decoding.cli import doctor
from lookahead_decoding.cli import main as cli
from lookahead_decoding.cli.printing import command_line
from lookahead_decoding.model.evaluate import OURS
from lookahead_decoding.model.probe import Strategy
from lookahead_decoding.saved import profile


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["lookahead", *map(str, arguments)])
    cli.main()


def counts(tokens: int, steps: int, rows: int, outside: float = 0.0, plain: int = 0) -> Stats:
    stats = Stats(1, tokens + 1, steps + 1, steps + 1, rows=rows, plain_steps=plain)
    stats.seconds["observe"] = outside * steps
    return stats


def test_an_expected_speedup_is_tokens_per_step_over_the_price_of_a_step() -> None:
    tuning = Tuning([(1, 1.0), (9, 2.0)], [counts(10, 10, 10)])
    assert tuning.judge("all fed", [counts(30, 10, 90)]).speedup == pytest.approx(3 / 2)
    assert tuning.judge("half plain", [counts(30, 10, 50, plain=5)]).speedup == pytest.approx(3 / 1.5)
    assert tuning.judge("slow to plan", [counts(30, 10, 90, outside=1.0)]).speedup == pytest.approx(3 / 3)


def test_times_hold_what_is_done_outside_the_forward() -> None:
    tuning = Tuning([(1, 1.0), (8, 1.0)], [counts(10, 10, 10, outside=0.5)])
    tuning.judge("wide", [counts(10, 10, 80, outside=0.5 + 8 * 0.01)])
    times = dict(tuning.times())
    assert list(times) == [1, 8]  # what was timed, and nothing beyond
    assert times[1] == 1.5
    assert times[8] == pytest.approx(1.5 + 8 * 0.01)


def test_tune_compares_settings_and_saves_the_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("lookahead_decoding.bench.tune.GRID", ((2, 3, 2), (3, 3, 3)))
    out = tmp_path / "tune.json"
    run(
        monkeypatch,
        "tune",
        "pocket",
        "--dtype",
        "float32",
        "--limit",
        2,
        "-n",
        16,
        "--execution",
        "packed",
        "--json",
        out,
    )
    printed = capsys.readouterr().out
    assert "best fixed W,N,G: " in printed
    assert "the adaptive default: " in printed
    written = json.loads(out.read_text())
    assert [s["settings"] for s in written["settings"]] == ["2,3,2", "3,3,3", "adaptive"]
    saved = profile.load(profile.Machine(**written["machine"]))
    assert saved == [(rows, seconds) for rows, seconds in written["seconds"]]
    capsys.readouterr()
    run(monkeypatch, "doctor", "pocket", "--dtype", "float32", "--execution", "packed", "-n", 16, "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["profile"] == "saved by `lookahead tune`"
    assert facts["mean_acceptance_length"] >= 1.0
    assert facts["dtype"] == "float32"


def test_doctor_says_whether_it_pays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "doctor", "pocket", "--dtype", "float32", "-n", 16)
    printed = capsys.readouterr().out
    assert "attention" in printed
    assert doctor.verdict(0.99, "hf-greedy@float32") == (
        "It hardly pays here: about 0.99 times the best plain decoding (hf-greedy@float32) on the sample."
    )
    assert doctor.verdict(0.9, "hf-greedy@float32").startswith("It does not pay here: about 0.90 times ")
    assert doctor.verdict(1.5, "hf-greedy@float32") == (
        "It pays here: about 1.50 times the best plain decoding (hf-greedy@float32) on the sample."
    )
    assert any(f"It {word} here: about " in printed for word in ("pays", "hardly pays", "does not pay"))
    assert "model = AutoModelForCausalLM.from_pretrained(\n    ld.pocket_path(), dtype=torch.float32\n)" in printed


def test_the_fastest_method_is_the_one_to_copy() -> None:
    way = doctor.Way("float32", "packed", model=None)  # type: ignore[arg-type]
    command, python = doctor._to_copy("my model", way, ["--chat"], "lookahead")
    assert command == [
        "lookahead generate",
        "'my model'",
        "--dtype float32",
        "--execution packed",
        "--chat",
        "-p 'your prompt'",
    ]
    assert "decoding = ld.LookaheadDecoding(execution='packed')" in python
    command, python = doctor._to_copy("m", way, [], "autoregressive")
    assert "--plain" in command
    assert "decoding = ld.LookaheadDecoding(ld.PLAIN, execution='packed')" in python
    command, python = doctor._to_copy("m", way, [], "hf-greedy")
    assert command == []
    assert python.endswith("ids = model.generate(**inputs, max_new_tokens=128, do_sample=False)")


def test_a_command_breaks_between_its_words() -> None:
    words = ["lookahead generate", "pocket", "--dtype float32", "-p 'your prompt'"]
    assert command_line(words, 80) == " ".join(words)
    assert command_line(words, 30).splitlines() == [
        "lookahead generate pocket \\",
        "  --dtype float32 \\",
        "  -p 'your prompt'",
    ]


def test_advice_depends_on_what_was_found() -> None:
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    model.dtype, model.device = torch.bfloat16, torch.device("cpu")
    place = SimpleNamespace(model=model, execution="compiled", strategy=Strategy("tree", OURS))
    dear, cheap = {1: 1e-3, 8: 2e-3}, {1: 1e-9, 8: 1e-9}
    chained = SimpleNamespace(
        model=model, execution="compiled", strategy=Strategy("chain", "sdpa", reasons=("its own mask",))
    )
    assert doctor.advise(model, chained, cheap, 3.0)[0].endswith("because: its own mask")
    wanted_of = (
        (cheap, 3.0, []),
        (dear, 3.0, ["a step that feeds 8 tokens takes 2.0"]),
        (cheap, 1.0, ["few guesses"]),
    )
    for times, length, wanted in wanted_of:
        advice = doctor.advise(model, place, times, length)
        assert [line[: len(start)] for line, start in zip(advice, wanted, strict=True)] == wanted
