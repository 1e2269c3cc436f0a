"""How a step runs, compared on real prompts: plain and lookahead decoding, native and as before, and `model.generate`.

    python benchmarks/executions.py MODEL --prompts FILE [--field prompt] [--chat] --limit 12 --json FILE

All methods take turns, prompt by prompt, each warmed up. Prompts whose plain answer repeats itself are counted apart.
Beside each prompt stands how fast the machine read memory just then, since others use it too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from lookahead_decoding.bench.result import LOOP, SHORT, distinct_share
from lookahead_decoding.hf.stream import chat_ids
from lookahead_decoding.saved.profile import device_name

METHODS: dict[str, tuple[ld.LookaheadConfig | None, str]] = {
    "hf-greedy": (None, ""),
    "packed plain": (ld.PLAIN, "packed"),
    "packed lookahead": (ld.LookaheadConfig(), "packed"),
    "native plain": (ld.PLAIN, "native"),
    "native lookahead": (ld.LookaheadConfig(), "native"),
}


def read_speed() -> float:
    """Gigabytes per second that all threads read."""
    block = torch.zeros(2**27, dtype=torch.int64)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - start)
    return round(block.nbytes / min(times) / 1e9, 1)


def ids_of(tokenizer: Any, text: str | list[str], chat: bool) -> torch.Tensor:
    """Token ids of a prompt, (1, length): of the first turn where there are several, in the chat template if asked."""
    text = text[0] if isinstance(text, list) else text
    if not chat:
        return torch.tensor([tokenizer(text).input_ids])
    talk = [{"role": "user", "content": text}]
    return torch.tensor([chat_ids(tokenizer, talk)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--field", default="prompt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    path = ld.pocket_path() if args.model == "pocket" else args.model
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=dtype), AutoTokenizer.from_pretrained(path)
    asked = [json.loads(line)[args.field] for line in args.prompts.read_text().splitlines() if line.strip()]
    asked = asked[args.skip : args.skip + args.limit]
    rows: list[dict[str, Any]] = []
    names = args.methods.split(",")

    def answer(name: str, ids: torch.Tensor) -> tuple[list[int], float, ld.Stats | None]:
        options: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        config, execution = METHODS[name]
        decoding = None if config is None else ld.LookaheadDecoding(config, execution=execution)
        start = time.perf_counter()
        out = (
            model.generate(ids, **options)
            if decoding is None
            else ld.generate(model, ids, lookahead=decoding, **options)
        )
        seconds = time.perf_counter() - start
        return out[0, ids.shape[1] :].tolist(), seconds, decoding.stats if decoding else None

    for number, text in enumerate([asked[0], *asked]):
        ids = ids_of(tokenizer, text, args.chat)
        speed = read_speed()
        line: dict[str, Any] = {"prompt": number - 1, "read_gb_per_s": speed, "methods": {}}
        for name in names if number % 2 else names[::-1]:
            out, seconds, stats = answer(name, ids)
            first = line["methods"][name] = {"tokens": len(out), "seconds": round(seconds, 4), "ids": out}
            if stats is not None:
                first |= {"per_step": round(stats.mean_acceptance_length, 2), "rows": round(stats.rows_per_step, 1)}
        if number:  # the first one warms up
            plain = line["methods"][next(n for n in names if "plain" in n or n == "hf-greedy")]["ids"]
            line["loops"] = distinct_share(plain) <= LOOP or len(plain) < SHORT
            for name in names:
                base = line["methods"].get(f"{name.split()[0]} plain", line["methods"][name])["ids"]
                line["methods"][name]["as_plain"] = line["methods"][name]["ids"] == base
            rows.append(line)
            print(
                number - 1,
                speed,
                line["loops"],
                {n: round(m["tokens"] / m["seconds"], 1) for n, m in line["methods"].items()},
                flush=True,
            )
    for line in rows:
        for one in line["methods"].values():
            del one["ids"]
    kept = [line for line in rows if not line["loops"]]
    summary: dict[str, Any] = {}
    for name in names:
        found = [line["methods"][name] for line in kept]
        speeds = [one["tokens"] / one["seconds"] for one in found]
        over = {}
        for other in names:
            ratios = [
                line["methods"][other]["seconds"] / line["methods"][other]["tokens"] * speed
                for line, speed in zip(kept, speeds, strict=True)
            ]
            cut = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
            over[other] = [round(x, 2) for x in (cut[1], cut[0], cut[2])] if ratios else None
        same = sum(line["methods"][name]["as_plain"] for line in rows)
        summary[name] = {"tokens_per_s": round(median(speeds), 1), "over": over, "as_plain": f"{same}/{len(rows)}"}
        summary[name] |= {
            k: round(sum(o[k] for o in found) / len(found), 2) for k in ("per_step", "rows") if k in found[0]
        }
        print(name, json.dumps(summary[name]))
    if args.json:
        about: dict[str, Any] = {
            "model": Path(args.model).name,
            "prompts": f"{args.prompts.name} {args.skip} to {args.skip + args.limit}",
        }
        about |= {"dtype": args.dtype, "tokens": args.tokens, "chat": args.chat, "threads": torch.get_num_threads()}
        about |= {"device": device_name(torch.device("cpu")), "torch": torch.__version__}
        about |= {"transformers": transformers.__version__, "python": platform.python_version()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"about": about, "summary": summary, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
