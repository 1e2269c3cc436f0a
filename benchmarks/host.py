"""What a captured step costs the host: all of a step but the replay, on a CPU, with a recorder that times the replay.

    TRITON_INTERPRET=1 python benchmarks/host.py [--rows 64] [--tokens 200] [--json FILE]

A GPU waits while the host plans the next tree and writes it down, and while it walks the last one. Pocket writes code
in steps of a fixed number of rows; the time of its forward, which a GPU would do, is taken away.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from lookahead_decoding.model import graphs
from lookahead_decoding.saved.profile import device_name

PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n"


class Clock:
    """A recorder that replays by running anew, and counts the seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            start = perf_counter()
            run()
            self.seconds += perf_counter() - start

        replay()
        return replay


def phases(rows: int, tokens: int) -> dict[str, float]:
    """Microseconds of a step by its parts, without the replay: the least of several answers."""
    torch.set_num_threads(1)  # or threads of the replay spin beside the host
    clock = Clock()
    graphs.recorder_for = lambda device: clock
    path = ld.pocket_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(path)(PROMPT, return_tensors="pt").input_ids
    config = ld.LookaheadConfig(max_rows=rows, step_times=((1, 1.0),))  # rows cost nothing, so all are filled
    decoding = ld.LookaheadDecoding(config, execution="captured")
    found: dict[str, list[float]] = {}
    for _ in range(6):
        clock.seconds = 0.0
        options: dict[str, Any] = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        ld.generate(model, ids, lookahead=decoding, pad_token_id=0, **options)
        stats = decoding.stats
        seconds = {name: taken for name, taken in stats.seconds.items() if name != "prefill"}
        seconds["forward"] -= clock.seconds
        for name, taken in seconds.items():
            found.setdefault(name, []).append(1e6 * taken / stats.steps)
        found.setdefault("rows", []).append(stats.rows_per_step)
    return {name: round(min(values[1:]), 1) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = phases(args.rows, args.tokens)
    rows = found.pop("rows")
    facts = {"rows_per_step": rows, "microseconds": found, "together": round(sum(found.values()), 1)}
    facts |= {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    facts |= {"python": platform.python_version()}
    print(json.dumps(facts))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
