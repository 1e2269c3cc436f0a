"""Where guessing cannot pay: the default settings against our own plain decoding, taking turns.

    python benchmarks/never_slower.py --data FOLDER --out FILE.json [--model build/pocket-134M] [--dtype bfloat16]

The cases are a randomly initialised model of the same shape, sampled (greedily it repeats itself, and nearly every
draft is accepted), temperature 1.5, batches of 16, and answers of 20 tokens. Each begins with a model of which nothing
is known yet. Ratios are of tokens per second, medians over the prompts with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lookahead_decoding as ld
from lookahead_decoding.saved.profile import device_name


def seconds(
    model: PreTrainedModel, prompts: list[list[int]], config: ld.LookaheadConfig, options: dict[str, Any]
) -> tuple[float, ld.Stats]:
    """One call of `generate` for a batch of prompts."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    decoding = ld.LookaheadDecoding(config)
    start = time.perf_counter()
    out = ld.generate(model, ids, attention_mask=mask, lookahead=decoding, seeds=list(range(len(prompts))), **options)
    taken = time.perf_counter() - start
    assert out.shape[1] == longest + options["max_new_tokens"]
    return taken, decoding.stats


def compare(model: PreTrainedModel, batches: list[list[list[int]]], options: dict[str, Any]) -> dict[str, Any]:
    """Both ways on every batch, each first every other time, after two turns that are not counted."""
    options = {"eos_token_id": None, "pad_token_id": 0, **options}
    ways = {"plain": ld.PLAIN, "default": ld.LookaheadConfig()}
    ratios, stats = [], []
    for turn, batch in enumerate([batches[0], batches[-1], *batches]):
        found = {}
        for name in list(ways) if turn % 2 else list(reversed(ways)):
            found[name], counted = seconds(model, batch, ways[name], options)
            if name == "default" and turn > 1:
                stats.append(counted)
        if turn > 1:
            ratios.append(found["plain"] / found["default"])
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "over_plain": [round(middle, 3), round(low, 3), round(high, 3)],
        "calls": len(ratios),
        "mean_acceptance_length": round(sum(s.mean_acceptance_length for s in stats) / len(stats), 3),
        "rows_per_step": round(sum(s.rows_per_step for s in stats) / len(stats), 2),
        "plain_share": round(sum(s.plain_share for s in stats) / len(stats), 3),
        "all": [round(r, 3) for r in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with data sets and models")
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = ld.pocket_path() if args.model == "pocket" else args.model
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(path)

    def trained() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def untrained() -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).to(dtype).eval()

    lines = (args.data / "data" / "humaneval" / "HumanEval.jsonl").read_text().splitlines()[: args.limit]
    prompts: list[list[int]] = [tokenizer(json.loads(line)["prompt"]).input_ids for line in lines]
    alone = [[prompt] for prompt in prompts]
    sixteen = [prompts[i : i + 16] for i in range(0, len(prompts) - 15, 2)]
    greedy, warm = {"do_sample": False}, {"do_sample": True, "temperature": 1.0, "top_k": 0}
    hot = {**warm, "temperature": 1.5}
    cases: dict[str, tuple[Callable[[], PreTrainedModel], list[list[list[int]]], dict[str, Any]]] = {
        "untrained": (untrained, alone, {**warm, "max_new_tokens": 128}),
        "untrained, 20 tokens": (untrained, alone, {**warm, "max_new_tokens": 20}),
        "temperature 1.5": (trained, alone, {**hot, "max_new_tokens": 128}),
        "temperature 1.5, 20 tokens": (trained, alone, {**hot, "max_new_tokens": 20}),
        "batch of 16": (trained, sixteen, {**greedy, "max_new_tokens": 64}),
        "batch of 16, temperature 1.5": (trained, sixteen, {**hot, "max_new_tokens": 64}),
        "20 tokens": (trained, alone, {**greedy, "max_new_tokens": 20}),
    }
    result: dict[str, Any] = {
        "command": "python benchmarks/never_slower.py --data FOLDER "
        f"--model {args.model} --dtype {args.dtype} --limit {args.limit}",
        "dtype": args.dtype,
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "cases": {},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (make, batches, options) in cases.items():
        result["cases"][name] = compare(make(), batches, options)
        print(name, {k: v for k, v in result["cases"][name].items() if k != "all"}, flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
