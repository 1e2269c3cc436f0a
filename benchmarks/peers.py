"""Ours against llama.cpp on the same weights, in turns, prompt by prompt.

    python benchmarks/peers.py MODEL --gguf MODEL.gguf --python VENV/bin/python --prompts FILE --limit 12 --json FILE

`--python` has llama-cpp-python installed. Its weights are those of the GGUF file, and made of it at 8 and 16 bits by
llama.cpp itself; ours are the same ones as transformers reads them. Each side has all threads while it answers, and
waits for its turn without using any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

KINDS = {"4 bits": None, "8 bits": 7, "bfloat16": 32}
"""Bits of llama.cpp's weights, with the number that it has for a file of that kind; the first is the file as it is."""


def worker(files: dict[str, str], threads: int, tokens: int) -> None:
    """Answer prompts from standard input by the named kind of weights; runs in the other environment."""
    from llama_cpp import Llama  # type: ignore[import-not-found]
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # type: ignore[import-not-found]

    models = {}
    for name, path in files.items():
        options: dict[str, Any] = {"n_ctx": 1024, "n_threads": threads, "n_threads_batch": threads, "verbose": False}
        models[name] = Llama(path, **options)
        if name == "bfloat16":
            lookup = LlamaPromptLookupDecoding(num_pred_tokens=10)
            models[f"{name}, prompt lookup"] = Llama(path, draft_model=lookup, logits_all=True, **options)
    print(json.dumps(list(models)), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        model = models[asked["kind"]]
        model.reset()
        start = time.perf_counter()
        found = []
        for token in model.generate(asked["ids"], temp=0.0, repeat_penalty=1.0, reset=True):
            found.append(token)
            if len(found) == tokens or token == model.token_eos():
                break
        print(json.dumps({"seconds": time.perf_counter() - start, "ids": found}), flush=True)


def made(gguf: Path, python: str) -> dict[str, str]:
    """Files of the same weights at more bits, beside the given one."""
    files = {}
    for name, number in KINDS.items():
        path = gguf if number is None else gguf.with_name(f"{gguf.stem}-{name.replace(' ', '-')}.gguf")
        if not path.exists():
            code = (
                "import llama_cpp as l, sys; p = l.llama_model_quantize_default_params(); p.ftype = int(sys.argv[3]); "
                "p.allow_requantize = True; "
                "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
            )
            subprocess.run([python, "-c", code, str(gguf), str(path), str(number)], check=True, capture_output=True)
        files[name] = str(path)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--worker", help="JSON of files; for the other environment")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--python")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker), args.threads, args.tokens)
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import lookahead_decoding as ld
    from benchmarks.executions import read_speed
    from lookahead_decoding.bench.result import LOOP, SHORT, distinct_share
    from lookahead_decoding.saved.profile import device_name

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    files = json.dumps(made(args.gguf, args.python))
    command = [args.python, __file__, "--worker", files, "--threads", str(args.threads), "--tokens", str(args.tokens)]
    other = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    theirs = json.loads(other.stdout.readline())
    ours = {"ours, plain": ld.PLAIN, "ours, lookahead": ld.LookaheadConfig()}
    stop = tokenizer.eos_token_id

    def answer(name: str, ids: list[int]) -> tuple[float, list[int]]:
        if name in ours:
            prompt = torch.tensor([ids])
            options: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}
            options |= {"eos_token_id": stop, "attention_mask": torch.ones_like(prompt)}
            start = time.perf_counter()
            out = ld.generate(model, prompt, lookahead=ld.LookaheadDecoding(ours[name]), **options)
            return time.perf_counter() - start, out[0, len(ids) :].tolist()
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdin.write(json.dumps({"kind": name.removeprefix("llama.cpp, "), "ids": ids}) + "\n")
        other.stdin.flush()
        said = json.loads(other.stdout.readline())
        return said["seconds"], said["ids"]

    names = [*ours, *(f"llama.cpp, {kind}" for kind in theirs)]
    asked = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()[: args.limit]]
    rows: list[dict[str, Any]] = []
    for number, text in enumerate([asked[0], *asked]):
        ids = tokenizer(text).input_ids
        line: dict[str, Any] = {"prompt": number - 1, "read_gb_per_s": read_speed(), "tokens_per_s": {}}
        for name in names if number % 2 else names[::-1]:
            seconds, found = answer(name, ids)
            line["tokens_per_s"][name] = round(len(found) / seconds, 1)
            if name == "ours, plain":
                line["loops"] = distinct_share(found) <= LOOP or len(found) < SHORT
        if number:
            rows.append(line)
            print(json.dumps(line), flush=True)
    kept = [line["tokens_per_s"] for line in rows if not line["loops"]]
    summary = {name: round(median(line[name] for line in kept), 1) for name in names}
    ratios = {name: round(median(line["ours, lookahead"] / line[name] for line in kept), 2) for name in names}
    plain = {name: round(median(line["ours, plain"] / line[name] for line in kept), 2) for name in names}
    print(json.dumps(summary), json.dumps(ratios), sep="\n")
    other.stdin.close()
    if args.json:
        about = {"model": Path(args.model).name, "prompts": args.prompts.name, "limit": args.limit}
        about |= {"kept": len(kept), "threads": args.threads, "device": device_name(torch.device("cpu"))}
        versions = [args.python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
        about["llama_cpp_python"] = subprocess.run(versions, capture_output=True, text=True).stdout.strip()
        content = {"about": about, "tokens_per_s": summary, "lookahead_over": ratios, "plain_over": plain, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
