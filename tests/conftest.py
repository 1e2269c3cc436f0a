from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

if not shutil.which("nvidia-smi"):  # before anything imports triton: without a GPU its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from benchmarks.drafts import Accepted, watched
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lookahead_decoding as ld

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
settings.register_profile("default", deadline=None, max_examples=60)
settings.load_profile("default")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.5}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ARCHITECTURES = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "mistral": {**COMMON, "sliding_window": 8},
    "mixtral": {**COMMON, "num_local_experts": 4},
    "gemma": {**COMMON, "head_dim": 8},
    "gemma2": {**COMMON, "head_dim": 8, "sliding_window": 8},
    "gemma3_text": {**COMMON, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 6},
    "phi": COMMON,
    "phi3": {**COMMON, "sliding_window": 8},
    "olmo2": COMMON,
    "gpt2": {**GPT2, **ENDS},
    "gptj": {**GPT2, **ENDS, "rotary_dim": 4},
    "gpt_neox": COMMON,
    "falcon": {k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")},
    "starcoder2": {**COMMON, "sliding_window": 8},
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.5},
}


FREE = ((1, 1.0),)
"""Step times by which rows cost nothing: trees are as large as they may be, and the same in every run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", type=Path, help="the folder with data sets and models; tests that need it are skipped")


@pytest.fixture(autouse=True)
def _a_cache_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user's own has measured must not matter."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *args, **kwargs: str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs --data")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., torch.nn.Module]:
    """Random models, large enough in their weights to make varied text; one per name, dtype and settings."""
    made: dict[tuple[object, ...], torch.nn.Module] = {}

    def make(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
        key = (name, dtype, *sorted(changes.items()))
        if key not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], **changes})
            made[key] = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype).eval()
        return made[key]

    return make


@pytest.fixture(scope="session")
def pocket() -> tuple[torch.nn.Module, object]:
    path = ld.pocket_path()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def stories(data: Path) -> tuple[torch.nn.Module, object]:
    path = data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture
def accepted() -> Iterator[Accepted]:
    """Watches every walk of the test."""
    with watched() as seen:
        yield seen
