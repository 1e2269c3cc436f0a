"""What pays for models whose candidates are rows of a batch: how many of them, how much is fed again, and a window.

    python -m benchmarks.rows --data FOLDER --type lfm2 --dtype bfloat16 --out FILE

A random model of a hybrid type, 74 or 91 million weights, replays reference solutions of HumanEval: every token
is forced, so drafts from the text are accepted as often as with a trained model, and what the model itself proposes is
noise. The settings take turns prompt by prompt, plain decoding among them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lookahead_decoding as ld
from lookahead_decoding.bench.methods import Replay
from lookahead_decoding.model import probe
from lookahead_decoding.model.rows import RowSteps
from lookahead_decoding.saved.profile import device_name

SIZES: dict[str, dict[str, Any]] = {
    "lfm2": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "layer_types": (["conv", "conv", "full_attention"] * 4),
    },
    "qwen3_5_text": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "linear_num_key_heads": 6,
        "linear_num_value_heads": 12,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
    },
}
PATHS = (1, 2, 4, 8)
REFED = (0, 8, 16, 32)


def hybrid(model_type: str, dtype: str) -> PreTrainedModel:
    """A random model with pocket's vocabulary."""
    torch.manual_seed(0)
    settings = {"vocab_size": 4096, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    config = AutoConfig.for_model(model_type, **settings, **SIZES[model_type])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(getattr(torch, dtype)).eval()


def run(
    model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int], paths: int, refed: int, window: bool
) -> tuple[float, ld.Stats]:
    """Seconds of the steps that replay a text behind a prompt; no paths at all is plain decoding."""
    config = ld.LookaheadConfig(max_paths=paths or None) if paths else ld.PLAIN
    limit = len(prompt) + len(text)
    target = ld.Target(model, limit + 128)
    if paths:  # a window of 4 columns and two rows has five paths of its own
        target.steps = RowSteps(model, limit + 128, paths + 5 * window, 64, refed=refed, execution=target.execution)
    ids = torch.tensor([list(prompt)])
    processor = Replay([*prompt, *text])
    request = ld.Request(tuple(prompt), ld.Sampler(ids, limit, processors=[processor]), limit)
    stats = ld.Stats()
    if window:
        config = ld.LookaheadConfig(4, 3, max_paths=paths)
        target.fit = lambda config: config  # type: ignore[method-assign]
    for _ in ld.decode(target, [request], config, stats):
        pass
    return stats.step_seconds, stats


def settings() -> Iterator[tuple[int, int, bool]]:
    """Paths, tokens fed again ahead of a step's own, and whether there is a window."""
    yield 0, 0, False
    yield from ((paths, 32, False) for paths in PATHS)
    yield from ((4, refed, False) for refed in REFED if refed != 32)
    yield 4, 32, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with data sets")
    parser.add_argument("--type", choices=SIZES, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    probe.PATHS = max(PATHS)
    model, tokenizer = hybrid(arguments.type, arguments.dtype), AutoTokenizer.from_pretrained(ld.pocket_path())
    lines = (arguments.data / "humaneval" / "HumanEval.jsonl").read_text().splitlines()[: arguments.limit]
    pairs = [(row["prompt"], row["canonical_solution"]) for row in map(json.loads, lines)]
    texts = [(tokenizer(a).input_ids, tokenizer(b).input_ids[:128]) for a, b in pairs]
    every = list(settings())
    taken: dict[tuple[int, int, bool], list[float]] = {one: [] for one in every}
    counts: dict[tuple[int, int, bool], list[ld.Stats]] = {one: [] for one in every}
    for turn, (prompt, text) in enumerate([texts[0], *texts]):  # the first is not counted
        for one in every:
            start = time.perf_counter()
            seconds, stats = run(model, prompt, text, *one)
            if turn:
                taken[one].append(seconds)
                counts[one].append(stats)
        print(turn, f"{time.perf_counter() - start:.1f} s", flush=True)
    rows = []
    for one in every:
        ratios = [plain / own for plain, own in zip(taken[every[0]], taken[one], strict=True)]
        stats_of = counts[one]
        rows.append(
            {
                "paths": one[0],
                "refed": one[1],
                "window": one[2],
                "speedup": round(median(ratios), 3),
                "total_speedup": round(sum(taken[every[0]]) / sum(taken[one]), 3),
                "mean_acceptance_length": round(
                    sum(s.tokens - 1 for s in stats_of) / max(1, sum(s.steps for s in stats_of)), 3
                ),
                "refeeds_per_step": round(sum(s.refeeds for s in stats_of) / max(1, sum(s.steps for s in stats_of)), 3),
                "plain_share": round(sum(s.plain_steps for s in stats_of) / sum(s.steps for s in stats_of), 3),
            }
        )
        print(rows[-1], flush=True)
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.rows", *sys.argv[1:]]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
