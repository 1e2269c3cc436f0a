"""What happens to the other ranks when one is killed or stopped while they decode.

python benchmarks/failures.py --times 10 --out FILE

Starts ranks with torchrun, sends one of them SIGKILL, or SIGSTOP, in the middle of decoding, and notes how long the
others live, their exit codes, and what they say. With `--alone` the ranks are started without torchrun's agent, which
ends the others by itself where one dies.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

VICTIM = 1


def decode_forever(folder: Path) -> None:
    """One rank: decodes the same prompt again and again."""
    from transformers import AutoModelForCausalLM

    import lookahead_decoding as ld

    with ld.parallel(device="cpu") as ranks:
        model = AutoModelForCausalLM.from_pretrained(ld.pocket_path(), dtype=torch.float32)
        ids = torch.tensor([[1, 50, 60, 70]])
        for number in range(10**6):
            decoding = ld.LookaheadDecoding(parallel=ranks)
            ld.generate(model, ids, max_new_tokens=64, eos_token_id=None, do_sample=False, lookahead=decoding)
            if number == 1:
                (folder / f"{ranks.rank}.ready").write_text(str(os.getpid()))


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def one(size: int, number: signal.Signals, alone: bool) -> dict[str, Any]:
    """Start ranks, hit one, and watch the others end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = [sys.executable, __file__, "--rank", name]
        with (folder / "stderr.txt").open("w") as errors:
            if alone:
                with socket.socket() as free:
                    free.bind(("localhost", 0))
                    port = str(free.getsockname()[1])
                started = []
                for rank in range(size):
                    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
                    started.append(subprocess.Popen(own, env=os.environ | place, stderr=errors))
            else:
                run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
                started = [subprocess.Popen([*run, *own[1:]], stderr=errors)]
            while len(list(folder.glob("*.ready"))) < size:
                if any(process.poll() is not None for process in started):
                    raise SystemExit((folder / "stderr.txt").read_text())
                time.sleep(0.05)
            time.sleep(0.5)
            ids = {rank: int((folder / f"{rank}.ready").read_text()) for rank in range(size)}
            os.kill(ids[VICTIM], number)
            hit = time.monotonic()
            others = [process for rank, process in ids.items() if rank != VICTIM]
            while any(map(alive, others)):
                time.sleep(0.05)
            seconds = time.monotonic() - hit
            with suppress(ProcessLookupError):  # torchrun may have done so
                os.kill(ids[VICTIM], signal.SIGKILL)
            codes = [process.wait() for process in started]
        text = (folder / "stderr.txt").read_text()
    lines = [line for line in text.splitlines() if line.startswith("lookahead: ")]
    if alone:
        exits = [code for rank, code in enumerate(codes) if rank != VICTIM]
    else:  # as its agent tells
        told = re.findall(r"exitcode\s*: (-?\d+) \(pid: (\d+)\)", text)
        exits = [int(code) for code, process in told if int(process) in others]
    named = len(lines) == 1 and f"rank {VICTIM} (process {ids[VICTIM]} on" in lines[0]
    good = named and len(exits) == size - 1 and all(code != 0 for code in exits)
    return {
        "seconds": round(seconds, 2),
        "exit_codes": exits,
        "said": [line.split(" on ")[0] for line in lines],
        "good": good,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        decode_forever(args.rank)
        return
    result: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "ranks": args.ranks}
    for number in (signal.SIGKILL, signal.SIGSTOP):
        runs = []
        for _ in range(args.times):
            runs.append(one(args.ranks, number, args.alone))
            print(number.name, runs[-1], flush=True)
        result[number.name] = {
            "good": f"{sum(run['good'] for run in runs)}/{args.times}",
            "longest_seconds": max(run["seconds"] for run in runs),
            "runs": runs,
        }
        print(number.name, result[number.name]["good"], "longest", result[number.name]["longest_seconds"], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
