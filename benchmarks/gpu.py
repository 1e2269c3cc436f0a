"""The GPU rows of the benchmarks: what a step costs, how far that is from the limit, and tokens per second.

    python benchmarks/gpu.py --data FOLDER --size 7B --out FOLDER

Writes one JSON file per part as soon as it is measured. Weights are `pocket`'s, enlarged without changing its function:
time is the large model's and acceptance is pocket's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from benchmarks.enlarge import enlarged_pocket
from benchmarks.flex import block_mask, flex
from lookahead_decoding import TokenTree, build_tree
from lookahead_decoding.attention import encode_rows
from lookahead_decoding.bench.result import distinct_share
from lookahead_decoding.graphs import padded
from lookahead_decoding.trees import TreeSteps


def milliseconds(run: Callable[[], Any], repeats: int = 30) -> float:
    """Median device time of one call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(median(times))


def bandwidth() -> float:
    """Bytes per second of a large copy on the device, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def tree_of(nodes: int) -> TokenTree:
    """A window of 15/5 and candidates, so many nodes in all."""
    if nodes == 1:
        return build_tree(5)
    window = [[100 + 20 * row + i for i in range(min(15, nodes // 4))] for row in range(4)]
    drafts = [[300 + 7 * i + d for d in range(4)] for i in range(64)]
    return build_tree(5, window, drafts, max_rows=nodes)


def _step(target: ld.Target, tree: TokenTree) -> None:
    target.forward([tree]).argmax()


def attention_times(config: Any, context: int, sizes: list[int]) -> list[dict[str, Any]]:
    """One layer's attention by our kernel and by compiled FlexAttention, and how far they differ."""
    from lookahead_decoding.kernels import tree_attention

    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    second = torch.compile(flex, dynamic=False)
    found = []
    for nodes in sizes:
        slots = context + nodes
        query = torch.randn(1, heads, nodes, config.head_dim, device="cuda", dtype=torch.bfloat16)
        key, value = (
            torch.randn(1, key_heads, slots, config.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        rows = torch.from_numpy(encode_rows([tree_of(nodes)], [context], nodes)).cuda()
        mask = block_mask(rows, slots)
        ours = functools.partial(tree_attention, query, key, value, rows, 0.1, 0.0, None)
        other = functools.partial(second, query, key, value, mask, 0.1)
        row = {"rows": nodes, "kernel_ms": milliseconds(ours), "flex_ms": milliseconds(other)}
        row["largest_difference"] = float((ours() - other()).abs().max())
        found.append(row)
        print(row, flush=True)
    return found


def step_times(model: Any, context: int, sizes: list[int], mode: str) -> list[dict[str, Any]]:
    """Time of a step by rows: all of it, and the captured part alone."""
    rows = []
    for nodes in sizes:
        target = ld.Target(model, context + 300, compile=mode)
        target.prefill([[7] * context])
        target.commit([[0]])
        tree = tree_of(nodes)
        start = time.perf_counter()
        target.forward([tree])
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        whole = milliseconds(functools.partial(_step, target, tree))
        assert isinstance(target.steps, TreeSteps)
        room = target.steps.captured
        assert room is not None
        step = room.graphs._steps[1, padded(nodes)]
        captured = milliseconds(step.replay) if step.replay else None
        rows.append({"rows": nodes, "ms": whole, "captured_ms": captured, "first_use_s": round(first, 1)})
        rows[-1]["captured_bytes"] = room.graphs.captured[1, padded(nodes)]
        print(mode, rows[-1], flush=True)
        del target
    return rows


def generation(
    model: Any, tokenizer: Any, prompts: list[str], length: int, config: ld.LookaheadConfig, mode: str
) -> dict[str, Any]:
    """Tokens per second of every method, prompt by prompt, methods taking turns; warmed up on the first prompt."""
    stats: list[ld.Stats] = []

    def ours(settings: ld.LookaheadConfig) -> Callable[..., Any]:
        def run(ids: torch.Tensor, **options: Any) -> Any:
            decoding = ld.LookaheadDecoding(settings, compile=mode)
            out = ld.generate(model, ids, lookahead=decoding, **options)
            stats.append(decoding.stats)
            return out

        return run

    methods: dict[str, Callable[..., Any]] = {
        "hf-greedy": model.generate,
        "hf-static": lambda ids, **o: model.generate(ids, cache_implementation="static", **o),
        "autoregressive": ours(ld.PLAIN),
        "lookahead": ours(config),
    }
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate([prompts[0], *prompts]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.cuda()
        if ids.shape[1] > length - 64:
            continue
        options = {"do_sample": False, "max_length": length, "attention_mask": torch.ones_like(ids)}
        row: dict[str, Any] = {"prompt": number - 1}
        outputs: dict[str, list[int]] = {}
        for name in list(methods):
            torch.cuda.synchronize()
            start = time.perf_counter()
            try:
                out = methods[name](ids, **options)
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                del methods[name]
                continue
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            outputs[name] = out[0, ids.shape[1] :].tolist()
            row[name] = round(len(outputs[name]) / seconds, 2)
            if name == "lookahead":
                row["mean_acceptance_length"] = round(stats[-1].mean_acceptance_length, 3)
                inside = stats[-1].seconds
                row["phases_ms_per_step"] = {
                    k: round(1e3 * v / max(1, stats[-1].steps), 3) for k, v in inside.items() if k != "prefill"
                }
            if number == 0:
                print(f"warm-up {name}: {seconds:.1f} s", flush=True)
        row["tokens"] = len(outputs["hf-greedy"])
        row["distinct_8_grams"] = round(distinct_share(outputs["hf-greedy"]), 3)
        row["identical"] = {n: o == outputs["hf-greedy"] for n, o in outputs.items()}
        if number:
            rows.append(row)
            print(row, flush=True)
    varied = [r for r in rows if r["distinct_8_grams"] > 0.5 and r["tokens"] >= 32]
    summary: dict[str, Any] = {"prompts": len(varied)}
    for name in methods:
        summary[name] = median(r[name] for r in varied)
        summary[f"lookahead over {name}"] = round(median(r["lookahead"] / r[name] for r in varied), 3)
    return {"summary_of_not_looping": summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with data sets and models")
    parser.add_argument("--size", default="7B")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", default="1,32,64,120")
    parser.add_argument("--mode", choices=("full", "graphs"), default="full")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--config", default="auto", help="auto, or the paper's with W,N,G")
    parser.add_argument("--parts", default="attention,step,generation")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "bfloat16",
        "model": f"pocket enlarged to {args.size}",
        "command": "python " + " ".join(sys.argv),
    }

    def write(name: str, what: dict[str, Any]) -> None:
        (args.out / f"{name}.json").write_text(json.dumps(about | what, indent=1) + "\n")

    model = enlarged_pocket(args.size, torch.bfloat16, "cuda")
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= model.model.embed_tokens.weight.numel() * 2  # looked up, not read
    print(f"{weights / 1e9:.2f} GB of weights", flush=True)
    if "attention" in args.parts:
        sizes = [int(n) for n in args.rows.split(",")]
        write("attention", {"context": args.context, "rows": attention_times(model.config, args.context, sizes)})
    if "step" in args.parts:
        speed = bandwidth()
        floor = weights / speed * 1e3
        print(f"copy {speed / 1e12:.2f} TB/s, floor {floor:.3f} ms", flush=True)
        sizes = [int(n) for n in args.rows.split(",")]
        rows = step_times(model, args.context, sizes, args.mode)
        by = {r["rows"]: r for r in rows}
        last = max(by)
        limits = {
            "t(1) over weight bytes / bandwidth": by[1]["captured_ms"] / floor,
            f"t({last}) / t(1)": by[last]["captured_ms"] / by[1]["captured_ms"],
            f"share outside captured graphs at {last} rows, choose, plan, observe and commit left out": 1
            - by[last]["captured_ms"] / by[last]["ms"],
        }
        write(
            f"step-{args.size}-{args.mode}",
            {"context": args.context, "weights_bytes": weights, "copy_bytes_per_s": speed, "floor_ms": floor}
            | {"rows": rows, "limits": limits},
        )
        print(limits, flush=True)
    if "generation" in args.parts:
        tokenizer = AutoTokenizer.from_pretrained(ld.pocket_path())
        humaneval = args.data / "data" / "humaneval" / "HumanEval.jsonl"
        prompts = [json.loads(line)["prompt"] for line in humaneval.read_text().splitlines()[: args.limit]]
        config = ld.LookaheadConfig()
        if args.config != "auto":
            w, n, g = map(int, args.config.split(","))
            config = ld.LookaheadConfig.paper(w, n, g)
        result = generation(model, tokenizer, prompts, args.length, config, args.mode)
        write(f"generation-{args.size}", {"config": args.config, "length": args.length} | result)
        print(result["summary_of_not_looping"], flush=True)


if __name__ == "__main__":
    main()
