"""Whether lookahead decoding has the tokens of plain decoding by the same steps, in any dtype, whatever is fed.

    python benchmarks/identity.py MODEL --prompts FILE [--field prompt] [--chat] --limit 40 --json FILE

Each prompt is answered plainly, then with a few sizes of trees, greedily and at a temperature; `==` is counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from benchmarks.executions import ids_of
from lookahead_decoding.saved.profile import device_name

FREE = ((1, 1.0),)
TREES = {
    "default": ld.LookaheadConfig(),
    "4 rows": ld.LookaheadConfig(max_rows=4, step_times=FREE),
    "16 rows": ld.LookaheadConfig(max_rows=16, step_times=FREE),
    "64 rows": ld.LookaheadConfig(max_rows=64, step_times=FREE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--field", default="prompt")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--trees", default="default", help=f"Of {', '.join(TREES)}.")
    parser.add_argument("--temperatures", default="0,0.8")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = ld.pocket_path() if args.model == "pocket" else args.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, args.dtype))
    tokenizer = AutoTokenizer.from_pretrained(path)
    asked = [json.loads(line)[args.field] for line in args.prompts.read_text().splitlines() if line.strip()]
    counts: dict[str, list[int]] = {}
    invariant = True
    for text in asked[: args.limit]:
        ids = ids_of(tokenizer, text, args.chat)
        for temperature in map(float, args.temperatures.split(",")):
            options: dict[str, Any] = {"max_new_tokens": args.tokens, "pad_token_id": 0, "do_sample": temperature > 0}
            options |= {"temperature": temperature} if temperature else {}
            options["attention_mask"] = torch.ones_like(ids)
            plain = None
            for name in ("plain", *args.trees.split(",")):
                decoding = ld.LookaheadDecoding(TREES.get(name, ld.PLAIN), seed=7, execution=args.execution)
                out = ld.generate(model, ids, lookahead=decoding, **options)[0].tolist()
                invariant = invariant and decoding.stats.row_invariant
                if plain is None:
                    plain = out
                    continue
                count = counts.setdefault(f"{name}, temperature {temperature:g}", [0, 0])
                count[0] += out == plain
                count[1] += 1
        print({name: f"{same}/{all}" for name, (same, all) in counts.items()}, flush=True)
    about = {"model": Path(args.model).name, "prompts": args.prompts.name, "dtype": args.dtype, "tokens": args.tokens}
    about |= {"chat": args.chat, "row_invariant": invariant, "device": device_name(torch.device("cpu"))}
    if args.json:
        identical = {name: f"{same}/{all}" for name, (same, all) in counts.items()}
        args.json.write_text(json.dumps({"about": about, "identical": identical}, indent=1) + "\n")


if __name__ == "__main__":
    main()
