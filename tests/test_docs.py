"""What the documents show is what the code does."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks import gpu

import lookahead_decoding as ld
import many

ROOT = Path(__file__).parents[1]


def test_the_worked_example_of_the_algorithm() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "algorithm.md"), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


def test_the_readmes_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where one of them writes a file
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert any("assert" in block for block in blocks)
    names: dict[str, object] = {}
    for block in blocks:
        if "ld.parallel(" not in block:
            exec(compile(block, "README.md", "exec"), names)


def readme_on_ranks(ranks: ld.Ranks, blocks: list[str]) -> tuple[list[int], list[int]]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    return names["ids"].tolist(), names["plain"].tolist()


def test_the_readmes_example_of_ranks_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (of_ranks,) = [block for block in blocks if "ld.parallel(" in block]
    greedy = of_ranks.replace("max_new_tokens=64", "max_new_tokens=64, do_sample=False")
    for ids, plain in many.run(2, readme_on_ranks, [blocks[0], greedy]):
        assert ids == plain


def test_the_gpus_chapter_is_what_the_command_makes(tmp_path: Path) -> None:
    made = (ROOT / "docs" / "performance.md").read_text().partition(gpu.BEGIN)[2].partition(gpu.END)[0]
    assert made == gpu.chapter_of(sorted(gpu.GPU_RESULTS.glob("*.jsonl")))
    lines: list[dict[str, Any]] = [
        {"stage": "env", "card": "A card"},
        {"stage": "env", "read_tb_per_s": 2.0},
        {"stage": "step", "shape": "Llama-3-8B", "weights_gb": 16.0},
        {"stage": "step", "shape": "Llama-3-8B", "context": 1024, "rows": 1, "mode": "captured", "captured_ms": 10.0},
        {"stage": "tiny", "identical": [True, True]},
        {"stage": "tiny", "identical": [True, False]},
        {"stage": "answers", "warm_up": False, "method": "lookahead", "tokens_per_s": 90.0},
        {"stage": "answers", "warm_up": False, "method": "hf-greedy", "tokens_per_s": 30.0},
        {"stage": "answers", "warm_up": True, "method": "hf-greedy", "tokens_per_s": 1.0},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = gpu.chapter_of([tmp_path / "a.jsonl"])
    assert "| [A card](../benchmarks/results/gpu/a.jsonl) |" in table
    cells = [line.split("|")[3].strip() for line in table.splitlines()[2:]]
    assert cells == ["not measured", "1.25", "not measured", "3.00", *["not measured"] * 5, "0.50"]


@pytest.mark.parametrize("path", [*sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("*.md")), "docs"])
def test_links_lead_somewhere(path: str) -> None:
    for document in [ROOT / path] if path.endswith(".md") else sorted((ROOT / path).rglob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert link.startswith("http") or (document.parent / link).exists(), (document, link)
