"""Step compression and mean acceptance length, greedy, float32, every output compared with stock `generate`.

    python benchmarks/step_compression.py --data FOLDER --model stories260K --out FILE.json
    python benchmarks/step_compression.py --data FOLDER --model pocket --limit 40 --max-new-tokens 256 --out FILE.json

The window's first row is random: figures are means over `--seeds` of it. Small models loop, and loops flatter every
speculative method, so prompts whose plain answer has at most half of its 8-grams distinct are listed apart.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import lookahead_decoding as ld
from lookahead_decoding.bench.result import distinct_share

SHORT = 50  # tokens below which a text is too short to say whether it loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with data sets and models")
    parser.add_argument("--model", choices=("stories260K", "pocket"), required=True)
    parser.add_argument("--sources", default="window")
    parser.add_argument("--config", default="15,5,15", help="W,N,G")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.model == "pocket":
        path, prompts = ld.pocket_path(), args.data / "data" / "humaneval" / "HumanEval.jsonl"
        options: dict[str, Any] = {"do_sample": False}
    else:
        path, prompts = str(args.data / "models" / args.model), args.data / "data" / "stories.jsonl"
        options = {"do_sample": False, "eos_token_id": None}
    options["max_new_tokens"] = args.max_new_tokens
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    w, n, g = map(int, args.config.split(","))
    rows = []
    for number, line in enumerate(prompts.read_text().splitlines()[: args.limit]):
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        row: dict[str, Any] = {"prompt": number, "tokens": plain.shape[1] - ids.shape[1], "identical": True}
        row["distinct_8_grams"] = round(distinct_share(plain[0, ids.shape[1] :].tolist()), 3)
        stats = []
        for seed in range(args.seeds):
            config = ld.LookaheadConfig(w, n, g, tuple(args.sources.split(",")), window_seed=seed)
            decoding = ld.LookaheadDecoding(config)
            ours = ld.generate(model, ids, attention_mask=torch.ones_like(ids), lookahead=decoding, **options)
            row["identical"] &= ours.tolist() == plain.tolist()
            stats.append(decoding.stats)
        row["step_compression"] = [round(s.step_compression, 3) for s in stats]
        row["mean_acceptance_length"] = [round(s.mean_acceptance_length, 3) for s in stats]
        row["rows_per_step"] = round(mean(s.rows_per_step for s in stats), 1)
        rows.append(row)
        print(row, flush=True)

    def summary(some: list[dict[str, Any]]) -> dict[str, Any]:
        if not some:
            return {"prompts": 0}
        by_seed = [mean(r["step_compression"][s] for r in some) for s in range(args.seeds)]
        return {
            "prompts": len(some),
            "identical": sum(r["identical"] for r in some),
            "step_compression": round(mean(by_seed), 3),
            "step_compression_by_seed": [round(s, 3) for s in by_seed],
            "spread": round(stdev(by_seed), 3) if len(by_seed) > 1 else None,
            "mean_acceptance_length": round(mean(mean(r["mean_acceptance_length"]) for r in some), 3),
            "rows_per_step": round(mean(r["rows_per_step"] for r in some), 1),
        }

    varied = [r for r in rows if r["distinct_8_grams"] > 0.5 and r["tokens"] >= SHORT]
    result = {
        "what": "step compression, greedy, prefill counted",
        "settings": {k: str(v) for k, v in vars(args).items() if k not in ("data", "out")},
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "dtype": "float32",
        "all": summary(rows),
        "not_looping": summary(varied),
        "looping": summary([r for r in rows if r["distinct_8_grams"] <= 0.5]),
        "short": summary([r for r in rows if r["tokens"] < SHORT]),
        "device": f"{torch.get_num_threads()} CPU threads",
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("all", "not_looping", "looping", "short"):
        print(name, result[name])


if __name__ == "__main__":
    main()
