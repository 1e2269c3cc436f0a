"""Models that others have wrapped, quantised, offloaded or compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.drafts import Accepted, right_and_wrong
from benchmarks.tiny import tiny_model
from transformers import AutoModelForCausalLM

import lookahead_decoding as ld
from conftest import FREE

WIDE = {"hidden_size": 256, "intermediate_size": 512}
OPTIONS = {"max_new_tokens": 60, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
IDS = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(1))


def compare(model: Any, accepted: Accepted) -> None:
    plain = model.generate(input_ids=IDS, **OPTIONS)[0].tolist()
    decoding = ld.LookaheadDecoding(ld.LookaheadConfig(sources=(), step_times=FREE), propose=right_and_wrong(plain))
    assert ld.generate(model, IDS, lookahead=decoding, **OPTIONS)[0].tolist() == plain
    assert accepted.kinds == {"full", "partial", "none"}


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_weights_are_exact(bits: int, accepted: Accepted) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", **WIDE)
    weights = getattr(torch, f"int{bits}")
    quantization.quantize_(model, quantization.IntxWeightOnlyConfig(weight_dtype=weights))
    compare(model, accepted)


def saved(folder: Path) -> Path:
    tiny_model("llama", **WIDE).save_pretrained(folder)
    return folder


def loaded(folder: Path, **settings: Any) -> Any:
    bitsandbytes = pytest.importorskip("transformers").BitsAndBytesConfig(load_in_8bit=True, **settings)
    pytest.importorskip("bitsandbytes")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=bitsandbytes, device_map="cpu").eval()


def test_bitsandbytes_without_outliers_is_exact(tmp_path: Path, accepted: Accepted) -> None:
    compare(loaded(saved(tmp_path), llm_int8_threshold=0.0), accepted)


def test_outliers_that_depend_on_other_rows_are_found(tmp_path: Path) -> None:
    """LLM.int8 takes the columns out in which any row is large, so one row changes another's rounding."""
    model = loaded(saved(tmp_path), llm_int8_threshold=1.0)
    with pytest.raises(ValueError, match=r"gives depends on the others.*llm_int8_threshold=0"):
        ld.generate(model, IDS, **OPTIONS)


def test_an_adapter_goes_with_its_model(accepted: Accepted) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama").generate(IDS, **OPTIONS)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    assert not torch.equal(model.generate(input_ids=IDS, **OPTIONS), plain)
    compare(model, accepted)
    model.disable_adapter_layers()
    assert torch.equal(ld.generate(model, IDS, **OPTIONS), plain)


def test_an_adapter_that_adds_to_the_prompt_is_refused() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(TypeError, match="an adapter of type PROMPT_TUNING adds to the prompt"):
        ld.generate(peft.get_peft_model(tiny_model("llama"), config), IDS, **OPTIONS)


def test_weights_may_lie_elsewhere(accepted: Accepted, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    cpu = torch.device("cpu")
    compare(accelerate.dispatch_model(tiny_model("llama"), {"": "cpu"}, main_device="cpu"), accepted)
    offloaded = accelerate.cpu_offload(tiny_model("llama"), execution_device=cpu)
    assert offloaded.device.type == "meta"
    compare(offloaded, accepted)
    compare(accelerate.disk_offload(tiny_model("qwen3_next"), str(tmp_path), execution_device=cpu), accepted)


def test_a_compiled_model_is_not_compiled_anew_at_every_step(accepted: Accepted) -> None:
    torch.compiler.reset()
    model = tiny_model("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    plain = model.generate(IDS, **OPTIONS)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(ld.generate(model, IDS, **OPTIONS), plain)
    assert not torch._dynamo.utils.counters["stats"]
    compare(torch.compile(tiny_model("qwen2"), backend="eager"), accepted)
    inside = tiny_model("qwen3")
    inside.compile(backend="eager")
    compare(inside, accepted)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a transformers model, got Linear: load it first"):
        ld.generate(torch.nn.Linear(2, 2), IDS)


def test_a_model_of_remote_code_works_if_it_passes_the_probe(tmp_path: Path, accepted: Accepted) -> None:
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
    code += "class MyConfig(LlamaConfig):\n    model_type = 'mine'\n\n\n"
    code += "class MyModel(LlamaForCausalLM):\n    config_class = MyConfig\n"
    tiny_model("llama").save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules")
    compare(model, accepted)
