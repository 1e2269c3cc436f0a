"""Model types: a fixed selection decoded beside `generate`, and the page of all types as the code has it now."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from benchmarks import models
from benchmarks.tiny import NOT_MADE, TYPES, tiny_model

from lookahead_decoding.model.evaluate import OURS
from lookahead_decoding.model.probe import probe

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

# Every kind of attention, state and position has at least one type here.
SELECTION = {
    "grouped queries": "llama qwen2 qwen3 mistral internlm3 olmo2 granite",
    "one key head": "gpt_bigcode falcon",
    "latent attention": "deepseek_v2 deepseek_v3 minicpm3 longcat_flash",
    "windows": "gemma2 gemma3_text cohere2 exaone4 mimo_v2_flash modernbert-decoder moshi",
    "chunks": "llama4_text",
    "capped scores": "gemma2 vaultgemma",
    "sinks": "gpt_oss",
    "an index": "deepseek_v32 glm_moe_dsa axk2",
    "biases by distance": "bloom mpt",
    "learned positions": "gpt2 opt biogpt bart",
    "rotary positions": "phi gptj gpt_neox stablelm persimmon",
    "shared keys and values": "gemma3n_text gemma4_text",
    "experts": "mixtral qwen3_moe dbrx jetmoe olmoe",
    "recurrent and attending": "qwen3_next kimi_linear nemotron_h lfm2 bamba falcon_h1 granitemoehybrid zamba2",
    "windows of their own": "gpt_neo",
    "images": "gemma3",
}
NAMES = sorted({name for names in SELECTION.values() for name in names.split()})
KNOWN = [name for name in NAMES if name in TYPES]
"""Of the selection, what this version of transformers has."""


def test_the_selection_is_large_enough() -> None:
    assert len(NAMES) >= 40


@pytest.mark.filterwarnings("ignore:.*doctor")
@pytest.mark.parametrize("name", KNOWN)
def test_a_type_decodes_as_generate_does(name: str) -> None:
    result = models.check(name, new_tokens=80)
    if result.strategy == "refused" and not is_of_this_version():
        pytest.skip(f"an older transformers: {result.note}")  # the index of sparse attention, in 5.16
    assert result.exact, result


def rows() -> dict[str, list[str]]:
    """The page's table: the cells behind each type."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


def is_of_this_version() -> bool:
    return f"transformers {transformers.__version__}," in PAGE.read_text()


@pytest.mark.skipif(not is_of_this_version(), reason="the page is of another version of transformers")
def test_the_page_has_every_type() -> None:
    assert sorted(rows()) == sorted(TYPES)


@pytest.mark.skipif(not is_of_this_version(), reason="the page is of another version of transformers")
@pytest.mark.parametrize("name", [name for name in TYPES if name not in NOT_MADE])
def test_the_page_has_the_strategy_that_the_code_takes(name: str) -> None:
    try:
        strategy = probe(tiny_model(name))
    except ValueError:
        assert rows()[name][0] == "refused"
    else:
        attention = "ours" if strategy.attention == OURS else strategy.attention
        assert rows()[name][:2] == [strategy.name, attention]


def test_what_the_page_promises() -> None:
    """No type whose text differs, a reason for each refusal, and as many exact ones as the project set out for."""
    table = rows()
    assert not [name for name, (_, _, *modes, _, _) in table.items() if any("WRONG" in mode for mode in modes)]
    assert all(cells[-1] for cells in table.values() if cells[0] in ("refused", "-"))
    exact = [name for name, (_, _, *modes, _, _) in table.items() if all(mode.startswith("exact") for mode in modes)]
    assert len(exact) >= 115
    assert len([name for name in exact if table[name][0] == "batch-expanded"]) >= 5
    assert sum(cells[-2] == "yes" for cells in table.values()) >= 30
