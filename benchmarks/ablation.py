"""What each source brings by the rows it may use: step compression and mean acceptance length, rows costing nothing.

    python benchmarks/ablation.py --data FOLDER --model pocket --set humaneval --limit 40 --out FILE.json
    python benchmarks/ablation.py --data FOLDER --model stories260K --set stories --seeds 5 --out FILE.json
    python benchmarks/ablation.py --data FOLDER --model pocket --set humaneval --replay --limit 40 --out FILE.json
    python benchmarks/ablation.py --plot FILE.png FILE.json ...

Time plays no part: t(n) is flat, so a tree takes the likeliest nodes up to the cap. Settings are all sources, all
with a shared pool that knows the answers to the prompts before, all with a window that is kept whatever it brings, all
but the window, suffix and recycled alone, and the paper's (W, N, G). Every output is compared with plain decoding.
Small models loop, and loops flatter every speculative method, so prompts whose plain answer has at most half of its
8-grams distinct are left out (except for stories, which are few).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, PreTrainedModel

import lookahead_decoding as ld
from lookahead_decoding.bench.methods import Replay
from lookahead_decoding.bench.result import LOOP, SHORT, distinct_share
from lookahead_decoding.saved.profile import device_name

FREE = ((1, 1.0),)
KEPT_WINDOW = 4, 3  # W and N of a small one: 8 rows
SOURCES: dict[str, tuple[str, ...]] = {
    "all": ("window", "prompt", "output", "recycled"),
    "all, and answers to earlier prompts": ld.LookaheadConfig().sources,  # in a shared pool
    "without window": ("prompt", "output", "recycled"),
    "suffix": ("prompt", "output"),
    "recycled": ("recycled",),
}
# The paper's table 3, and others of the same rows: prompt n-grams in the pool, G = 1, W = 1.
PAPER: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "15,5,15": (15, 5, 15, ("window",)),
    "15,5,15 and prompt": (15, 5, 15, ("window", "prompt", "output")),
    "10,5,10": (10, 5, 10, ("window",)),
    "5,5,5": (5, 5, 5, ("window",)),
    "30,5,1": (30, 5, 1, ("window",)),
    "1,5,30": (1, 5, 30, ("window",)),
    "prompt alone 5,10": (1, 5, 10, ("prompt", "output")),
}
SETS = {  # folder, field of the prompt, field of the reference
    "humaneval": ("humaneval/HumanEval.jsonl", "prompt", "canonical_solution"),
    "mbpp": ("mbpp", "text", "code"),
    "gsm8k": ("gsm8k", "question", "answer"),
    "mt_bench": ("mt_bench", "turns", None),
    "stories": ("stories.jsonl", "prompt", None),
}


def settings(rows: list[int], seed: int, which: str) -> Iterator[tuple[str, ld.LookaheadConfig]]:
    """Names and configurations; the window's random first row is the only thing that a seed changes."""
    for name, sources in SOURCES.items():
        if which in ("both", "sources"):
            for most in rows:
                config = ld.LookaheadConfig(sources=sources, max_rows=most, step_times=FREE, window_seed=seed)
                yield f"{name} @{most}", config
                if name == "all" and most > 2 * math.prod(KEPT_WINDOW):
                    kept = replace(config, window_size=KEPT_WINDOW[0], ngram_size=KEPT_WINDOW[1])
                    yield f"with a window kept @{most}", kept
    if which in ("both", "paper"):
        for name, (w, n, g, sources) in PAPER.items():
            yield f"paper {name}", ld.LookaheadConfig.paper(w, n, g, sources, window_seed=seed)


def read(data: Path, name: str, limit: int | None) -> list[tuple[str, str | None]]:
    """Prompts of a set, each with its reference where there is one."""
    place, field, reference = SETS[name]
    path = data / "data" / place
    if path.is_dir():
        path = sorted(path.glob("*.jsonl"))[0]
    found = []
    for line in path.read_text(encoding="utf-8").splitlines()[:limit]:
        record = json.loads(line)
        prompt = record[field] if field in record else record["prompt"]
        found.append((prompt[0] if isinstance(prompt, list) else prompt, record[reference] if reference else None))
    return found


def run(
    model: PreTrainedModel,
    ids: list[int],
    text: list[int],
    replay: bool,
    config: ld.LookaheadConfig,
    pool: ld.SharedPool,
) -> ld.Stats:
    """Decode `text` after the prompt, and check that it came out."""
    shared = pool.namespace("answers") if "shared" in config.sources else None
    prompt, decoding = torch.tensor([ids]), ld.LookaheadDecoding(config, shared=shared)
    options: dict[str, Any] = {"max_new_tokens": len(text), "do_sample": False, "eos_token_id": None}
    if replay:
        options["logits_processor"] = LogitsProcessorList([Replay([*ids, *text])])
    out = ld.generate(model, prompt, attention_mask=torch.ones_like(prompt), lookahead=decoding, **options)
    if out[0, len(ids) :].tolist() != text:
        raise SystemExit(f"another text than plain decoding's with {config}: run `lookahead verify`")
    return decoding.stats


def fit(points: list[tuple[int, float]], drafts: int = 4) -> tuple[float, float] | None:
    """alpha and f of the paper's S = (f - 1 + E) / f, E = (g + 1) - sum of (1 - alpha^i)^b, by least squares.

    Args:
        points: parallel drafts b, and the step compression that was measured.
        drafts: g, draft tokens of each.
    """
    if len(points) < 2:
        return None
    found = (math.inf, 0.0, 0.0)
    for a in range(1, 100):
        alpha = a / 100
        expected = [(drafts + 1) - sum((1 - alpha**i) ** b for i in range(1, drafts + 1)) for b, _ in points]
        # S - 1 = (E - 1) / f has its best 1 / f in closed form
        inverse = sum((e - 1) * (s - 1) for e, (_, s) in zip(expected, points, strict=True))
        inverse /= max(1e-12, sum((e - 1) ** 2 for e in expected))
        error = sum((1 + inverse * (e - 1) - s) ** 2 for e, (_, s) in zip(expected, points, strict=True))
        if inverse > 0:
            found = min(found, (error, alpha, 1 / inverse))
    return (found[1], found[2]) if math.isfinite(found[0]) else None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    path = ld.pocket_path() if args.model == "pocket" else str(args.data / "models" / args.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found: dict[str, list[list[ld.Stats]]] = {}
    pools: defaultdict[tuple[str, int], ld.SharedPool] = defaultdict(ld.SharedPool)
    shares, used = [], 0
    for number, (prompt, reference) in enumerate(read(args.data, args.set, args.limit)):
        ids = tokenizer(prompt).input_ids
        if args.replay:
            text = tokenizer(reference).input_ids[: args.max_new_tokens]
        else:
            one = torch.tensor([ids])
            options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "eos_token_id": None}
            text = model.generate(one, attention_mask=torch.ones_like(one), **options)[0, len(ids) :].tolist()
        shares.append(round(distinct_share(text), 3))
        if (shares[-1] <= LOOP and args.set != "stories") or len(text) < SHORT:
            continue
        used += 1
        for seed in range(args.seeds):
            for name, config in settings(args.rows, seed, args.settings):
                by_seed = found.setdefault(name, [[] for _ in range(args.seeds)])
                by_seed[seed].append(run(model, ids, text, args.replay, config, pools[name, seed]))
        print(f"prompt {number}: {used} used", flush=True)
    lines: dict[str, dict[str, Any]] = {}
    for name, by_seed in found.items():
        means = [mean(s.step_compression for s in stats) for stats in by_seed]
        every = [s for stats in by_seed for s in stats]
        lines[name] = {
            "step_compression": round(mean(means), 3),
            "by_seed": [round(m, 3) for m in means],
            "spread": round(stdev(means), 3) if len(means) > 1 else None,
            "mean_acceptance_length": round(mean(s.mean_acceptance_length for s in every), 3),
            "rows_per_step": round(mean(s.rows_per_step for s in every), 1),
        }
        print(f"{name:32}", lines[name], flush=True)
    points = [
        (g, lines[f"paper {w},{n},{g}"]["step_compression"])
        for w, n, g in ((5, 5, 5), (10, 5, 10), (15, 5, 15))
        if lines.get(f"paper {w},{n},{g}")
    ]
    return {
        "command": "python benchmarks/ablation.py --data FOLDER " + " ".join(args.shown),
        "model": args.model,
        "set": args.set,
        "mode": "replay" if args.replay else "greedy",
        "dtype": "float32",
        "device": device_name(model.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompts": len(shares),
        "prompts_used": used,
        "paper_fit": dict(zip(("alpha", "f"), fit(points) or (None, None), strict=True)),
        "settings": lines,
    }


def plot(path: Path, files: list[Path]) -> None:
    """Mean acceptance length against rows, one panel per file."""
    import matplotlib.pyplot as plt

    across = min(3, len(files))
    down = -(-len(files) // across)
    figure, grid = plt.subplots(down, across, figsize=(4.5 * across, 3.6 * down), sharey=True, squeeze=False)
    panels = [axes for line in grid for axes in line]
    for axes, file in zip(panels, files, strict=False):
        result = json.loads(file.read_text())
        lines: dict[str, list[tuple[float, float]]] = {}
        for name, line in result["settings"].items():
            group = "paper" if name.startswith("paper") else name.partition(" @")[0]
            lines.setdefault(group, []).append((line["rows_per_step"], line["mean_acceptance_length"]))
        for group, points in lines.items():
            style = "x" if group == "paper" else "s--" if group == "without window" else "o-"  # may lie on top of all
            axes.plot(*zip(*sorted(points), strict=True), style, label=group, markersize=4)
        if (fitted := result["paper_fit"])["alpha"]:
            sizes = [2**k for k in range(6)]
            values = [1 + (4 - sum((1 - fitted["alpha"] ** i) ** b for i in range(1, 5))) / fitted["f"] for b in sizes]
            axes.plot([8 * b for b in sizes], values, "--", label="the paper's formula, W = G, N = 5")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows per step")
        axes.set_title(f"{result['model']}, {result['set']}, {result['mode']}")
    panels[0].set_ylabel("tokens per step")
    panels[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="the folder with data sets and models")
    parser.add_argument("--model", choices=("stories260K", "pocket"), default="pocket")
    parser.add_argument("--set", choices=tuple(SETS), default="humaneval")
    parser.add_argument("--replay", action="store_true", help="force the data set's own answers")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[4, 8, 16, 32, 64, 120])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", choices=("both", "sources", "paper"), default="both")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("files", type=Path, nargs="*", help="results to draw")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.plot:
        plot(args.plot, args.files)
        return
    if args.data is None or args.out is None:
        parser.error("--data and --out are needed to measure")
    options = ("model", "set", "limit", "max_new_tokens", "seeds", "settings")
    args.shown = [
        f"--{name.replace('_', '-')} {value}" for name in options if (value := getattr(args, name)) is not None
    ]
    args.shown += [f"--rows {','.join(map(str, args.rows))}", *(["--replay"] if args.replay else [])]
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
