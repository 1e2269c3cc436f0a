from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import ablation


def test_the_papers_formula_is_fitted_to_what_it_gives() -> None:
    alpha, f, drafts = 0.42, 3.1, 4
    points = []
    for b in (5, 10, 15):
        expected = (drafts + 1) - sum((1 - alpha**i) ** b for i in range(1, drafts + 1))
        points.append((b, (f - 1 + expected) / f))
    found = ablation.fit(points)
    assert found is not None
    assert found == (pytest.approx(alpha), pytest.approx(f, rel=1e-6))
    assert ablation.fit(points[:1]) is None


def test_sources_are_compared_and_drawn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    arguments = [
        "ablation",
        "--data",
        data,
        "--model",
        "stories260K",
        "--set",
        "stories",
        "--limit",
        1,
        "--rows",
        "4,16",
    ]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--max-new-tokens", "60", "--out", str(out)])
    ablation.main()
    found = json.loads(out.read_text())["settings"]
    assert found["all @16"]["step_compression"] > 1.0
    assert found["all @16"]["rows_per_step"] <= 16
    assert {"without window @4", "suffix @4", "recycled @4", "paper 15,5,15", "paper 30,5,1"} <= set(found)
    monkeypatch.setattr(sys, "argv", ["ablation", "--plot", str(picture), str(out)])
    ablation.main()
    assert picture.stat().st_size > 1000
