"""Compare the answers of two runs of `lookahead generate --json`, prompt by prompt.

    lookahead generate pocket --prompts HumanEval.jsonl --dtype float32 --json > ours.jsonl
    lookahead generate pocket --prompts HumanEval.jsonl --dtype float32 --json --plain > plain.jsonl
    python benchmarks/compare_answers.py ours.jsonl plain.jsonl --out FILE.json

Writes how many are identical, and tokens per step on answers that do not loop, on those that do, and on short ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers

from lookahead_decoding.bench.result import LOOP, SHORT, distinct_share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ours", type=Path)
    parser.add_argument("plain", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what the runs were, kept in the file")
    args = parser.parse_args()
    ours, plain = ([json.loads(line) for line in path.read_text().splitlines()] for path in (args.ours, args.plain))
    rows = []
    for number, (one, other) in enumerate(zip(ours, plain, strict=True)):
        share = distinct_share(one["output_ids"])
        kind = "short" if one["tokens"] < SHORT else "looping" if share <= LOOP else "not_looping"
        row = {"prompt": number, "kind": kind, "identical": one["output_ids"] == other["output_ids"]}
        row |= {name: one[name] for name in ("tokens", "steps", "mean_acceptance_length")}
        rows.append(row | {"distinct_8_grams": round(share, 3)})

    def summary(kind: str) -> dict[str, Any]:
        some = [row for row in rows if row["kind"] == kind]
        lengths = [row["mean_acceptance_length"] for row in some]
        return {"prompts": len(some), "mean_acceptance_length": round(mean(lengths), 3) if some else None}

    result = {
        "what": "answers of `lookahead generate`, with and without --plain",
        "note": args.note,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "identical": f"{sum(row['identical'] for row in rows)}/{len(rows)}",
        **{kind: summary(kind) for kind in ("not_looping", "looping", "short")},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print({key: value for key, value in result.items() if key != "rows"})


if __name__ == "__main__":
    main()
