"""What lookahead parallelism should give on several devices, from what was measured on one.

    python benchmarks/predict.py accept --data FOLDER --out ACCEPTANCE.json
    python benchmarks/predict.py table ACCEPTANCE.json --steps STEP.json --link 1e-3,4e-5
    python benchmarks/predict.py table ACCEPTANCE.json --weights 13.5e9 --bandwidth 2e12 --flops 312e12 --link 1e-4,3e-6

`accept` runs `pocket` with so many rows per step, rows costing nothing, and notes the tokens that a step gives and
the time that planning takes on the host. `table` puts that together with t(n), which is either measured (a file of
`lookahead bench step`) or follows from a device's memory bandwidth and arithmetic, and with a link: seconds of a
collective, and of one token's keys and values.

The model: a step that R ranks share takes t(rows of the largest shard) + link + host(rows of the tree), and R is worth
what the best size of tree gives. A small tree is little more than a chain, which cannot be divided, so the largest
shards are measured as well.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList

import lookahead_decoding as ld
from benchmarks.ablation import FREE
from benchmarks.drafts import watched
from lookahead_decoding.bench.methods import Replay
from lookahead_decoding.bench.result import LOOP, SHORT, distinct_share
from lookahead_decoding.price.budget import StepTimes

ROWS = (1, 4, 8, 16, 32, 64, 120, 240, 480)
RANKS = (1, 2, 4, 8)
REACHED = 0.8, 0.5
"""Of a device's memory bandwidth and of its arithmetic, what a forward is assumed to reach."""


class Shards:
    """The largest shards of the trees of a run, by the number of ranks."""

    def __init__(self) -> None:
        self.largest: dict[int, list[int]] = {ranks: [] for ranks in RANKS}

    def watch(self, tree: ld.TokenTree, choice: ld.Choice) -> None:
        for ranks, sizes in self.largest.items():
            sizes.append(max(len(part.nodes) for part in tree.shards([0] * ranks)))


def accept(data: Path, limit: int, tokens: int) -> dict[str, Any]:
    """Tokens per step and seconds of planning per step by rows, on HumanEval: greedy and replayed solutions."""
    path = ld.pocket_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    lines = (data / "humaneval" / "HumanEval.jsonl").read_text().splitlines()[: 3 * limit]
    result: dict[str, Any] = {"model": "pocket", "set": "HumanEval", "modes": {}}
    for mode in ("greedy", "replay"):
        kept = []
        for line in lines:
            record = json.loads(line)
            ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
            reference = tokenizer(record["canonical_solution"]).input_ids[:tokens]
            text = reference
            if mode == "greedy":
                text = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist()
            if len(text) >= SHORT and distinct_share(text) > LOOP:
                kept.append((ids, text))
        found: dict[int, Any] = {}
        for rows in ROWS:
            config = ld.LookaheadConfig(max_rows=rows, step_times=FREE) if rows > 1 else ld.PLAIN
            stats, shards = [], Shards()
            for ids, text in kept[:limit]:
                decoding = ld.LookaheadDecoding(config)
                forced = LogitsProcessorList([Replay([*ids[0].tolist(), *text])])
                options: dict[str, Any] = {"max_new_tokens": len(text), "eos_token_id": None, "do_sample": False}
                with watched(shards):
                    out = ld.generate(model, ids, logits_processor=forced, lookahead=decoding, **options)
                assert out[0, ids.shape[1] :].tolist() == text
                stats.append(decoding.stats)
            host = sum(s.seconds["plan"] + s.seconds["observe"] for s in stats) / sum(s.steps for s in stats)
            found[rows] = {
                "tokens_per_step": round(mean(s.mean_acceptance_length for s in stats), 3),
                "rows_per_step": round(mean(s.rows_per_step for s in stats), 1),
                "host_ms": round(1e3 * host, 3),
                "largest_shard": {ranks: round(mean(sizes), 1) for ranks, sizes in shards.largest.items()},
            }
            print(mode, rows, found[rows], flush=True)
        result["modes"][mode] = {"prompts": len(kept[:limit]), "rows": found}
    return result


def roofline(weights: float, bandwidth: float, flops: float) -> StepTimes:
    """t(n) of a device that reads all weights, of two bytes each, and multiplies n rows by them."""
    read = weights / (REACHED[0] * bandwidth)
    row = weights / (REACHED[1] * flops)  # two operations a weight of two bytes
    return StepTimes([(1, read + row), (1000, read + 1000 * row)])


def measured(path: Path) -> StepTimes:
    """t(n) of a file of `lookahead bench step`, at its shortest context."""
    steps = json.loads(path.read_text())["steps"]
    least = min(step["context"] for step in steps)
    return StepTimes([(step["rows"], step["ours"] / 1e3) for step in steps if step["context"] == least])


def table(acceptance: dict[str, Any], times: StepTimes, link: tuple[float, float], host: float) -> list[dict[str, Any]]:
    """For each number of ranks, the best rows and the speed over plain decoding on one device.

    Args:
        link: seconds of a collective, and of a token's keys and values.
        host: how long planning takes here, over what was measured.
    """
    lines = []
    for mode, found in acceptance["modes"].items():
        for ranks in RANKS:
            best: dict[str, Any] = {}
            for rows, one in found["rows"].items():
                given = one["tokens_per_step"]
                step = times(round(one["largest_shard"][str(ranks)])) + host * one["host_ms"] / 1e3
                if ranks > 1:
                    step += 2 * link[0] + (given - 1) * link[1]
                speed = given / step * times(1)
                if speed > best.get("over_plain", 0):
                    best = {"mode": mode, "ranks": ranks, "rows": int(rows), "tokens_per_step": given}
                    best |= {"step_ms": round(1e3 * step, 2), "over_plain": round(speed, 2)}
            lines.append(best)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("accept")
    first.add_argument("--data", type=Path, required=True)
    first.add_argument("--limit", type=int, default=12)
    first.add_argument("--max-new-tokens", type=int, default=128)
    first.add_argument("--out", type=Path, required=True)
    second = commands.add_parser("table")
    second.add_argument("acceptance", type=Path)
    second.add_argument("--steps", type=Path, help="t(n), measured")
    second.add_argument("--weights", type=float, help="bytes of the weights, where t(n) is not measured")
    second.add_argument("--bandwidth", type=float, help="of the device's memory, bytes per second")
    second.add_argument("--flops", type=float, help="of the device, per second")
    second.add_argument("--link", required=True, help="seconds of a collective, and of a token's keys and values")
    second.add_argument("--host", type=float, default=1.0, help="time of planning over what was measured")
    args = parser.parse_args()
    if args.command == "accept":
        args.out.write_text(json.dumps(accept(args.data, args.limit, args.max_new_tokens), indent=1) + "\n")
        return
    times = measured(args.steps) if args.steps else roofline(args.weights, args.bandwidth, args.flops)
    latency, token = (float(part) for part in args.link.split(","))
    for line in table(json.loads(args.acceptance.read_text()), times, (latency, token), args.host):
        print(json.dumps(line))


if __name__ == "__main__":
    main()
