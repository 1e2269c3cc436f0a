"""How much faster ranks are than one of them: lookahead parallelism, and tensor parallelism beside it.

torchrun --nproc-per-node 2 benchmarks/parallel.py --model build/pocket-134M --prompts FOLDER/humaneval/prompts.jsonl \
    --out FILE

All methods take turns on every prompt. Those of one rank run on the first, with one thread, while the others wait;
those of several ranks have one thread each, and "threads" is one process with as many threads as there are ranks. "120
rows" are as many as the candidates fill, whatever they cost; the other settings are the default ones, under which a
step has as many rows as pay. Beside it the same processes multiply matrices, alone and at once, which says how far the
machine lets them scale.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import lookahead_decoding as ld
from lookahead_decoding.bench.methods import Job, Method, make, measure, warm_up
from lookahead_decoding.bench.result import LOOP, SHORT, Row
from lookahead_decoding.cli.loading import read_prompts
from lookahead_decoding.saved.profile import device_name

FULL = ld.LookaheadConfig(max_rows=120, step_times=((1, 1.0),))
"""As many rows as the candidates fill."""

DEFAULT = ld.LookaheadConfig()

RATIOS = {
    "two ranks over one, 120 rows": ("parallel, 120 rows", "lookahead, 120 rows"),
    "two ranks over one, as many rows as pay": ("parallel", "lookahead"),
    "tensor parallelism over one rank, plain": ("tensor parallel, plain", "plain"),
    "tensor parallelism over one rank, 120 rows": ("tensor parallel, 120 rows", "lookahead, 120 rows"),
    "tensor parallelism over one rank, as many rows as pay": ("tensor parallel", "lookahead"),
    "one rank over plain": ("lookahead", "plain"),
    "two ranks over plain": ("parallel", "plain"),
    "threads over one rank, 120 rows": ("threads, 120 rows", "lookahead, 120 rows"),
    "threads over one rank, as many rows as pay": ("threads", "lookahead"),
    "threads over plain": ("threads", "plain"),
    "plain on threads over plain": ("threads, plain", "plain"),
}


def products(ranks: ld.Ranks, rows: int, dtype: torch.dtype, seconds: float = 3.0) -> dict[str, float]:
    """Products per second of one-thread matrix products: of the first rank alone, and of all ranks at once."""
    x = torch.randn(rows, 768).to(dtype)
    weights = [torch.randn(2048, 768).to(dtype) for _ in range(40)]  # more than a cache holds

    def rate() -> float:
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            for weight in weights:
                torch.nn.functional.linear(x, weight)
            count += len(weights)
        return count / (time.perf_counter() - start)

    nothing = torch.zeros(1, dtype=torch.float64)
    alone, together = [], []
    for _ in range(2):
        alone.append(float(ranks.gather(nothing + (rate() if ranks.first else 0.0))[0]))
        together.append(float(ranks.gather(nothing + rate()).sum()))
    ratio = median(together) / median(alone)
    return {"rows": rows, "alone": median(alone), "together": median(together), "ratio": round(ratio, 3)}


def on_threads(method: Method, threads: int) -> Method:
    """The same with more threads; its model is its own, since weights are laid out for a number of threads."""

    def run(*args: Any, **options: Any) -> Any:
        torch.set_num_threads(threads)
        try:
            return method.run(*args, **options)
        finally:
            torch.set_num_threads(1)

    return replace(method, run=run)


def methods_of(whole: Any, other: Any, part: Any, dtype: str, ranks: ld.Ranks, group: ld.Ranks) -> list[Method]:
    """Everything that is compared, in one dtype.

    Args:
        whole, other: the model, and a second copy of it for several threads.
        part: of this rank, where the group divides the model.
    """
    made = {
        "plain": make("autoregressive", dtype, whole, DEFAULT),
        "lookahead": make("lookahead", dtype, whole, DEFAULT),
        "parallel": make("parallel", dtype, whole, DEFAULT, ranks=ranks),
        "lookahead, 120 rows": make("lookahead", dtype, whole, FULL),
        "parallel, 120 rows": make("parallel", dtype, whole, FULL, ranks=ranks),
        "threads, plain": on_threads(make("autoregressive", dtype, other, DEFAULT), ranks.size),
        "threads": on_threads(make("lookahead", dtype, other, DEFAULT), ranks.size),
        "threads, 120 rows": on_threads(make("lookahead", dtype, other, FULL), ranks.size),
        "tensor parallel, plain": make("autoregressive", dtype, part, DEFAULT, ranks=group),
        "tensor parallel": make("lookahead", dtype, part, DEFAULT, ranks=group),
        "tensor parallel, 120 rows": make("lookahead", dtype, part, FULL, ranks=group),
    }
    return [replace(method, name=name) for name, method in made.items()]


def summary(rows: list[Row], dtype: str) -> dict[str, Any]:
    """Tokens per second of each method, and the ratios over the prompts whose text does not loop."""
    kept = [row for row in rows if row.distinct_8_grams > LOOP and row.tokens >= SHORT and row.method.endswith(dtype)]
    speeds: dict[str, dict[int, float]] = {}
    for row in kept:
        speeds.setdefault(row.method.partition("@")[0], {})[row.prompt] = row.tokens_per_second
    ratios = {}
    for name, (one, other) in RATIOS.items():
        found = [speed / speeds[other][prompt] for prompt, speed in speeds[one].items()]
        low, middle, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else (found[0],) * 3
        ratios[name] = [round(middle, 3), round(low, 3), round(high, 3)]
    lengths: dict[str, list[float]] = {}
    for row in kept:
        lengths.setdefault(row.method.partition("@")[0], []).append(row.mean_acceptance_length or 1.0)
    return {
        "prompts": len({row.prompt for row in kept}),
        "tokens_per_second": {name: round(median(found.values()), 2) for name, found in speeds.items()},
        "mean_acceptance_length": {name: round(sum(found) / len(found), 3) for name, found in lengths.items()},
        "ratios": ratios,
        "ranks": {
            name: {key: round(median(r.ranks[key] for r in kept if r.method == f"{name}@{dtype}"), 4) for key in counts}
            for name, counts in {r.method.partition("@")[0]: r.ranks for r in kept if r.ranks}.items()
        },
        "agrees": sum(row.agrees for row in rows if row.method.endswith(dtype)),
        "of": sum(row.method.endswith(dtype) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--field", default="prompt")
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--exchange", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with (
        ld.parallel(device="cpu", exchange=args.exchange) as ranks,
        ld.parallel(device="cpu", exchange=args.exchange, tensor_parallel=ranks.size) as group,
    ):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        texts = read_prompts(args.prompts, args.field, args.limit)
        jobs = [Job((tuple(tokenizer(one.content).input_ids),)) for one in texts]
        options = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "eos_token_id": None, "pad_token_id": 0}
        result: dict[str, Any] = {
            "command": shlex.join(["torchrun", "--nproc-per-node", str(ranks.size), *sys.argv]),
            "device": device_name(ranks.device),
            "threads_per_rank": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "exchange": args.exchange,
            "dtypes": {},
        }
        rows: list[Row] = []
        for dtype in args.dtypes.split(","):
            kind = getattr(torch, dtype)
            whole, other, part = (AutoModelForCausalLM.from_pretrained(args.model, dtype=kind).eval() for _ in "123")
            methods = methods_of(whole, other, ld.divide(part, group), dtype, ranks, group)
            mine = [method for method in methods if ranks.first or method.shared]
            products_before = [products(ranks, n, kind) for n in (60, 120)]
            mine, failed = warm_up(mine, jobs, options)
            assert not failed, failed
            own = []
            for found in measure(mine, jobs, options):
                own += found
                if ranks.first:
                    print(dtype, found[0].prompt, {r.method.partition("@")[0]: r.seconds[0] for r in found}, flush=True)
            if not ranks.first:
                continue
            rows += own
            result["dtypes"][dtype] = {"matrix_products": products_before, **summary(own, dtype)}
            print(json.dumps(result["dtypes"][dtype], indent=1), flush=True)
        if ranks.first and args.out is not None:
            result["rows"] = [asdict(row) for row in rows]
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
