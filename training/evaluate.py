"""Measure a trained `pocket`: bits per byte on held-out modules, and how much its greedy answers loop.

    python training/evaluate.py --model build/pocket/model --data build/pocket --humaneval HumanEval.jsonl

Writes `evaluation.json` and the model card beside the model.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lookahead_decoding.bench.result import distinct_share

CONTEXT = 1024
ANSWER_TOKENS = 150


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, modules: list[dict[str, str]]) -> float:
    """Mean over all bytes of the modules, each cut into non-overlapping windows of the context.

    A window's first token has nothing before it; it is predicted from the end-of-text token.
    """
    nats, size = 0.0, 0
    for module in modules:
        ids = tokenizer(module["text"]).input_ids
        size += len(module["text"].encode())
        for start in range(0, len(ids), CONTEXT - 1):
            window = ids[start : start + CONTEXT - 1]
            logits = model(torch.tensor([[tokenizer.eos_token_id, *window]])).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum").item()
    return nats / math.log(2) / size


CARD = """# pocket

A language model of {parameters:.1f} M parameters that writes Python, made to try and to test lookahead decoding without
downloading anything. It is of the Llama type: {layers} layers of width {width}, {heads} query and {kv_heads} key heads, a byte-level BPE
tokenizer of {vocab:,} pieces, context {context:,}, trained at that length at the end. Weights are in bfloat16, {megabytes:.1f} MB.

**Not for** writing code that anybody relies on. It knows what Python looks like, not what a task asks for, and its text
is much simpler than a large model's: it repeats itself more, so it accepts more drafts. A speedup measured with it
says what the decoder does, not what it will give on a large model.

## Measured

| what | figure |
|---|---|
| bits per byte on {held_out_modules} modules kept out of training (non-overlapping windows of the context) | {bits_per_byte:.3f} |
| greedy answers of {answer} tokens (the end of text does not end them) to the {prompts} HumanEval prompts in which more than half of the 8-grams are distinct | {answers_above_half} |
| of the {prompts} answers, those in which the model ended the text at some point | {answers_that_end} |
| mean share of distinct 8-grams | {mean_share:.2f} |

## Training

{story}

Trained with the scripts in `training/`. Some of the windows are documented functions on their own. Held-out modules are chosen by a hash of their names, one in a hundred of each package.

## Text

{megabytes_text:.0f} MB of Python from CPython's standard library and these packages, each as released on PyPI, without tests, copies of other
packages, tables and generated code. The weights are under Apache-2.0; no text is shipped.

| package | version | licence | modules | MB |
|---|---|---|---|---|
{sources}
"""


def card(folder: Path, data: Path, parameters: int) -> str:
    """The model card, from what was measured and recorded."""
    values: dict[str, object] = {}
    values |= json.loads((folder / "evaluation.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    sources = json.loads((data / "sources.json").read_text())
    rows = [
        f"| {s['package']} | {s['version']} | {s['licence']} | {s['modules']} | {s['bytes'] / 1e6:.1f} |"
        for s in sources
    ]
    parts = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    story = "\n".join(
        f"{i}. {p['steps']:,} steps of {p['batch']} windows of {CONTEXT:,} tokens (or as many at {p['short_context']:,}), "
        f"{p['tokens'] / 1e6:,.1f} M tokens, in {p['minutes']} minutes on {p['device']}, torch {p['torch']}, learning rate "
        f"{p['lr']}, {p['functions_share']:.0%} functions. {p.get('note', '')}"
        for i, p in enumerate(parts, 1)
    )
    return CARD.format(
        **values,
        story=story,
        parameters=parameters / 1e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        vocab=config["vocab_size"],
        context=CONTEXT,
        answer=ANSWER_TOKENS,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        megabytes_text=sum(s["bytes"] for s in sources) / 1e6,
        sources="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare.py wrote")
    parser.add_argument("--humaneval", type=Path, required=True, help="a JSONL file with a prompt per line")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    modules = json.loads((args.data / "held_out.json").read_text())
    result: dict[str, float] = {
        "held_out_modules": len(modules),
        "bits_per_byte": bits_per_byte(model, tokenizer, modules),
    }
    print(result, flush=True)
    shares, ended = [], 0
    for line in args.humaneval.read_text().splitlines():
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=None)[
            0, ids.shape[1] :
        ].tolist()
        ended += tokenizer.eos_token_id in answer
        shares.append(distinct_share(answer))
    result |= {
        "prompts": len(shares),
        "answers_above_half": sum(s > 0.5 for s in shares),
        "answers_that_end": ended,
        "mean_share": sum(shares) / len(shares),
    }
    print(result)
    (args.model / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.model / "README.md").write_text(card(args.model, args.data, sum(p.numel() for p in model.parameters())))


if __name__ == "__main__":
    main()
