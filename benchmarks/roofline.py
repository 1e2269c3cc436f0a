"""Native steps against what the machine allows: its memory's bandwidth and its arithmetic, measured in the same minute.

    python benchmarks/roofline.py MODEL [MODEL ...] [--rows 1,4,8,16,64] [--contexts 256,4096] [--json FILE]

A step must read every weight once, and the keys and values of its context; and it must multiply each weight by each
row. The limit is the longer of the two, at the bandwidth and the arithmetic that large blocks reach beside it. Rows of
a step are a tree with branches of four. Step, bandwidth and arithmetic take turns; the least of each counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from lookahead_decoding.draft.tree import TokenTree
from lookahead_decoding.model.native.steps import Native, NativeSteps, native_of
from lookahead_decoding.saved.profile import device_name

BLOCK = torch.zeros(2**26, dtype=torch.int64)
"""Half a gigabyte, more than any cache holds."""


def seconds(call: Callable[[], Any]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def tree_of(rows: int) -> TokenTree:
    """A root with branches of four."""
    return TokenTree(tuple(range(1, rows + 1)), (-1, *(0 if i % 4 == 0 else i for i in range(rows - 1))))


def needed(native: Native, model: Any, rows: int, context: int) -> tuple[float, float]:
    """Bytes that a step must read, and operations that it must do."""
    made = native.made
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        matrices -= model.get_input_embeddings().weight.numel()
    size = 2 if made.dtype != torch.float32 else 4
    layers = len(made.spans)
    cached = 2 * layers * made.key_heads * made.size * context
    return size * (matrices + cached), 2.0 * rows * (matrices + 2 * layers * made.heads * made.size * context)


def measure(model: Any, context: int, sizes: list[int], times: int, dtype: torch.dtype) -> dict[str, Any]:
    native = native_of(model)
    steps = NativeSteps(native, model, context + max(sizes), 1, "sdpa", max(sizes))
    steps.cache.make_room(context)
    for layer in steps.cache.layers:
        for buffer in (layer.keys, layer.values):
            buffer.normal_(std=0.3)
    steps.cache.lengths[:] = [context]
    square = torch.ones(1024, 1024, dtype=dtype)
    least: dict[str, float] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        least[name] = min(least.get(name, float("inf")), seconds(call))

    for _ in range(times):
        note("read", BLOCK.sum)
        note("multiply", lambda: square @ square)
        for rows in sizes:
            note(str(rows), partial(steps.forward, [tree_of(rows)]))
    bandwidth, peak = BLOCK.nbytes / least["read"], 2 * 1024**3 / least["multiply"]
    found: dict[str, Any] = {"read_gb_per_s": round(bandwidth / 1e9, 1), "gflop_per_s": round(peak / 1e9), "rows": {}}
    for rows in sizes:
        size, operations = needed(native, model, rows, context)
        limit = max(size / bandwidth, operations / peak)
        found["rows"][rows] = {
            "ms": round(1e3 * least[str(rows)], 2),
            "limit_ms": round(1e3 * limit, 2),
            "limited_by": "bandwidth" if size / bandwidth >= operations / peak else "arithmetic",
            "over_limit": round(least[str(rows)] / limit, 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rows", default="1,4,8,16,64")
    parser.add_argument("--contexts", default="256,4096")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes, contexts = ([int(x) for x in text.split(",")] for text in (args.rows, args.contexts))
    dtype = getattr(torch, args.dtype)
    about: dict[str, Any] = {"dtype": args.dtype, "threads": torch.get_num_threads()}
    about |= {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
    about |= {"transformers": transformers.__version__, "python": platform.python_version()}
    result: dict[str, Any] = {"about": about, "models": {}}
    with torch.inference_mode():
        for name in args.models:
            path = ld.pocket_path() if name == "pocket" else name
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            of_model = result["models"][Path(name).name] = {}
            for context in contexts:
                found = of_model[context] = measure(model, context, sizes, args.times, dtype)
                speeds = f"{found['read_gb_per_s']} GB/s, {found['gflop_per_s']} GFLOP/s"
                print(f"{Path(name).name}, context {context}: {speeds}")
                for rows, line in found["rows"].items():
                    limit = f"limit {line['limit_ms']:8.2f} ({line['limited_by']})"
                    print(f"  {rows:3} rows  {line['ms']:8.2f} ms, {limit}, {line['over_limit']:.2f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
