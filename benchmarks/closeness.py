"""How near a step's logits in bfloat16 are to those of the same weights in float32: native steps, and the model's own.

    python benchmarks/closeness.py MODEL [MODEL ...] --prompts FILE [--field prompt] [--positions 2000] [--json FILE]

For each position of the prompts the Kullback-Leibler divergence, in nats, from the float32 distribution to the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.executions import ids_of
from lookahead_decoding.model.native.steps import NativeSteps, native_of
from lookahead_decoding.saved.profile import device_name


def divergence(exact: torch.Tensor, logits: torch.Tensor) -> list[float]:
    """Of each row."""
    p, q = exact.double().log_softmax(-1), logits.double().log_softmax(-1)
    found: list[float] = (p.exp() * (p - q)).sum(-1).tolist()
    return found


def native_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of every position, (length, vocab)."""
    steps = NativeSteps(native_of(model), model, ids.shape[1], 1, "sdpa", ids.shape[1])
    steps.cache.make_room(ids.shape[1])
    return steps._run(list(steps._rows_in(ids[0].tolist(), 0)), range(ids.shape[1]))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--field", default="prompt")
    parser.add_argument("--positions", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = [json.loads(line)[args.field] for line in args.prompts.read_text().splitlines() if line.strip()]
    result: dict[str, Any] = {"prompts": args.prompts.name, "device": device_name(torch.device("cpu")), "models": {}}
    for path in args.models:
        tokenizer = AutoTokenizer.from_pretrained(path)
        narrow = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        found: dict[str, list[float]] = {"native": [], "own": []}
        same = {"native": 0, "own": 0}
        for text in texts:
            ids = ids_of(tokenizer, text, chat=False)
            with torch.inference_mode():
                wanted = exact(ids).logits[0]
                for name, logits in (("native", native_logits(narrow, ids)), ("own", narrow(ids).logits[0].float())):
                    found[name] += divergence(wanted, logits)
                    same[name] += int((wanted.argmax(-1) == logits.argmax(-1)).sum())
            if len(found["own"]) >= args.positions:
                break
        count = len(found["own"])
        line = {
            name: {"divergence": round(fmean(found[name]), 6), "same_best": f"{same[name]}/{count}"} for name in found
        }
        result["models"][Path(path).name] = {"positions": count, **line}
        print(Path(path).name, json.dumps(result["models"][Path(path).name]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
