"""One stage of what is measured on a GPU: env, kernel, tiny, step, profile, answers, ranks.

    python benchmarks/gpu.py STAGE --results FILE [--dry]

Every figure is a line of JSON in the file as soon as it is known. `report` makes a page of the file, and `chapter` the
GPU's chapter of docs/performance.md from all files in benchmarks/results/gpu. `--dry` runs the same code on a CPU, in
tiny shapes, to see that it runs. `benchmarks/gpu.sh` runs all stages with a time limit each.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
import lookahead_decoding as ld
from benchmarks.enlarge import enlarged_pocket
from benchmarks.tiny import tiny_model
from lookahead_decoding.bench.step import tree_of
from lookahead_decoding.model.attention import dense_mask, encode_rows, reference
from lookahead_decoding.model.graphs import padded
from lookahead_decoding.model.trees import TreeSteps

Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, as released."""

    hidden: int
    units: int
    layers: int
    heads: int
    key_heads: int
    size: int
    vocabulary: int


SHAPES = {
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 64, 49_152),
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 64, 128_256),
    "Llama-2-7B": Shape(4096, 11_008, 32, 32, 32, 128, 32_000),
    "Llama-3-8B": Shape(4096, 14_336, 32, 32, 8, 128, 128_256),
    "dry": Shape(64, 96, 2, 4, 2, 16, 256),
}
TINY = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "mixtral")
TEXTS = ("def fibonacci(n):\n", "class Stack:\n    def __init__(self):\n", "import json\n\ndef load(path):\n")


class Stage:
    """Where a stage runs, and where its figures go."""

    def __init__(self, name: str, results: Path, dry: bool) -> None:
        self.name = name
        self.dry = dry
        self.device = "cpu" if dry else "cuda"
        self._results = results

    def tell(self, **what: Any) -> None:
        """One line of JSON, on disk at once."""
        line = json.dumps({"stage": self.name} | what)
        print(line, flush=True)
        with self._results.open("a") as file:
            file.write(line + "\n")

    def failed(self, error: Exception, **what: Any) -> None:
        """A line in place of a figure."""
        traceback.print_exc()
        self.tell(**what, failed=f"{type(error).__name__}: {str(error)[:300]}")

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if not self.dry:
            torch.cuda.synchronize()

    def milliseconds(self, call: Call, repeats: int = 20) -> float:
        """Median time of a call, until the device is done with it."""
        times = []
        for _ in range(2 if self.dry else repeats + 3):
            start = time.perf_counter()
            call()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return median(times[1:] if self.dry else times[3:])

    def microseconds(self, calls: Sequence[Call], inner: int = 48) -> float:
        """Median device time of one call inside a captured graph, so without its launch; the calls take turns.

        Args:
            calls: the same on different memory, so that a cache does not flatter.
        """
        if self.dry:
            return 1e3 * self.milliseconds(calls[0])
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(inner):
                calls[i % len(calls)]()
        times = []
        for _ in range(7):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * start.elapsed_time(end) / inner)
        return float(median(times[2:]))


def model_of(name: str, device: str, layers: int | None = None) -> Any:
    """A random Llama of a released shape, in bfloat16; fewer layers where asked."""
    shape = SHAPES[name]
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.units,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.size,
        vocab_size=shape.vocabulary,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def env(stage: Stage, args: argparse.Namespace) -> None:
    """Versions, the card, and what its memory and its products allow."""
    stage.tell(python=sys.version.split()[0], torch=torch.__version__, transformers=transformers.__version__)
    stage.tell(package=ld.__version__, gcc=subprocess.run(["which", "gcc"], capture_output=True).returncode == 0)
    with suppress(ModuleNotFoundError):
        import triton

        stage.tell(triton=triton.__version__)
    if not stage.dry:
        properties = torch.cuda.get_device_properties(0)
        stage.tell(card=properties.name, memory_gb=round(properties.total_memory / 1e9, 1))
    size = 2**20 if stage.dry else 2**30
    source = torch.zeros(size, dtype=torch.uint8, device=stage.device).random_(0, 255)
    target = torch.empty_like(source)
    copied = stage.microseconds([lambda: target.copy_(source)], 4)
    stage.tell(copy_tb_per_s=round(2 * size / copied / 1e6, 3))
    read = stage.microseconds([lambda: source.view(torch.int32).max()], 4)
    stage.tell(read_tb_per_s=round(size / read / 1e6, 3))
    shape = SHAPES["dry" if stage.dry else "Llama-3-8B"]
    joined = (shape.heads + 2 * shape.key_heads) * shape.size
    layer = [(joined, shape.hidden), (shape.hidden, shape.hidden), (2 * shape.units, shape.hidden)]
    products = [*layer, (shape.hidden, shape.units), (shape.vocabulary, shape.hidden)]
    for rows in (1, 16, 64, 128):  # what products alone say about t(n) / t(1)
        taken = []
        for out, into in products:
            copies = max(1, min(8, 2**29 // (2 * out * into))) if not stage.dry else 1
            weights = [torch.randn(out, into, device=stage.device, dtype=torch.bfloat16) for _ in range(copies)]
            x = torch.randn(rows, into, device=stage.device, dtype=torch.bfloat16)
            calls = [functools.partial(torch.nn.functional.linear, x, w) for w in weights]
            taken.append(round(stage.microseconds(calls, 24), 1))
        whole = shape.layers * sum(taken[:-1]) + taken[-1]
        stage.tell(products_rows=rows, microseconds=taken, step_ms_8b=round(whole / 1e3, 3))


def _attention(
    stage: Stage, nodes: int, context: int, heads: int, key_heads: int, size: int, dtype: torch.dtype, extra: int = 5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray[Any, Any]]:
    """Queries, keys, values and rows of a step; slots behind it hold what must not be read."""
    rows = encode_rows([tree_of(nodes)], [context], nodes)
    slots = context + nodes + extra
    query = torch.randn(1, nodes, heads, size, device=stage.device).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, key_heads, slots, size, device=stage.device).to(dtype) for _ in range(2))
    key[:, :, context + nodes :] = float("nan")
    return query, key, value, rows


def kernel(stage: Stage, args: argparse.Namespace) -> None:
    """Our attention against the reference in float64, and its time against reading the keys once."""
    from lookahead_decoding.model.kernels import launch

    dtypes = (torch.float32,) if stage.dry else (torch.bfloat16, torch.float16, torch.float32)
    cases = ((1, 300, 8, 2), (64, 700, 8, 2), (33, 0, 4, 4), (120, 1500, 8, 1))
    for dtype in dtypes:
        for size in (16,) if stage.dry else (64, 80, 96, 128, 256):
            for nodes, context, heads, key_heads in ((3, 20, 4, 2),) if stage.dry else cases:
                try:
                    query, key, value, rows = _attention(stage, nodes, context, heads, key_heads, size, dtype)
                    used = context + nodes
                    mask = dense_mask(rows, torch.float64).to(stage.device)
                    k, v = (t[:, :, :used].double() for t in (key, value))
                    wanted = reference(query.double(), k, v, mask, size**-0.5)
                    start = time.perf_counter()
                    ours = launch(query, key, value, torch.from_numpy(rows).to(stage.device), size**-0.5).double()
                    stage.wait()
                    error = float((ours - wanted).norm() / wanted.norm())
                    good = error < (1e-5 if dtype == torch.float32 else 1e-2)
                    first = round(time.perf_counter() - start, 2)
                    stage.tell(check=str(dtype), size=size, nodes=nodes, error=error, good=good, first_s=first)
                except Exception as error:
                    stage.failed(error, check=str(dtype), size=size, nodes=nodes)
    for name in ("dry",) if stage.dry else ("Llama-3-8B", "Llama-2-7B"):
        shape = SHAPES[name]
        for context in (40,) if stage.dry else (1024, 8192, 32_768):
            for nodes in (1, 4) if stage.dry else (1, 16, 64, 128):
                dtype = torch.float32 if stage.dry else torch.bfloat16
                copies = max(1, min(16, 2**28 // (context * shape.key_heads * shape.size * 4))) if not stage.dry else 1
                sizes = (nodes, context, shape.heads, shape.key_heads, shape.size, dtype, 0)
                made = [_attention(stage, *sizes) for _ in range(copies)]
                told = torch.from_numpy(made[0][3]).to(stage.device)
                calls = [functools.partial(launch, q, k, v, told, shape.size**-0.5) for q, k, v, _ in made]
                taken = stage.microseconds(calls, max(16, copies))
                read = 2 * 2 * shape.key_heads * (context + nodes) * shape.size
                stage.tell(
                    shape=name,
                    context=context,
                    rows=nodes,
                    microseconds=round(taken, 1),
                    tb_per_s=round(read / taken / 1e6, 3),
                )


def tiny(stage: Stage, args: argparse.Namespace) -> None:
    """Answers of tiny random models in float32: identical to `generate`, by every way to run a step."""
    ids = torch.tensor([[3, 5, 7, 11, 13, 2, 9, 3, 5, 7]], device=stage.device)
    options: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids)}
    plans = [(name, mode) for mode in ("eager", "captured") for name in TINY]
    config = ld.LookaheadConfig(step_times=((1, 1.0),), max_rows=40)
    for name, mode in plans if stage.dry else [*plans, ("llama", "compiled"), ("gemma2", "compiled")]:
        start = time.perf_counter()
        try:
            model = tiny_model(name).to(stage.device)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", ld.config.LookaheadWarning)
                plain = model.generate(ids, **options)[0].tolist()
                identical = []
                for _ in range(2):  # the second time with what was captured
                    decoding = ld.LookaheadDecoding(config, execution=mode)
                    identical.append(ld.generate(model, ids, lookahead=decoding, **options)[0].tolist() == plain)
            ours = sorted({str(w.message)[:160] for w in said if issubclass(w.category, ld.config.LookaheadWarning)})
            stage.tell(
                model=name,
                mode=mode,
                identical=identical,
                tokens_per_step=round(decoding.stats.mean_acceptance_length, 2),
                attention=ld.Target(model, 80, execution="eager").attention,
                seconds=round(time.perf_counter() - start, 1),
                said=ours,
            )
        except Exception as error:
            stage.failed(error, model=name, mode=mode)
            try:
                stage.wait()
            except Exception as broken:
                stage.tell(context_lost=str(broken)[:200])
                return


def _started(model: Any, context: int, mode: str) -> tuple[ld.Target, TreeSteps]:
    """A target behind so many committed tokens."""
    target = ld.Target(model, context + 300, execution=mode)
    for first in range(0, context, 2048):
        target.prefill([[7 + i % 90 for i in range(min(2048, context - first))]])
        target.commit([[0]])
    assert isinstance(target.steps, TreeSteps)
    return target, target.steps


def step(stage: Stage, args: argparse.Namespace) -> None:
    """t(n) by rows and context: the captured part alone, with the host's part, and with the best tokens of each row."""
    model = model_of(args.shape, stage.device)
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    stage.tell(shape=args.shape, weights_gb=round(weights / 1e9, 3))
    for context in args.contexts:
        base = None
        target, steps = _started(model, context, args.mode)
        for nodes in args.rows:
            try:
                evaluate = functools.partial(target.forward, [tree_of(nodes)])
                start = time.perf_counter()
                evaluate().argmax()
                first = time.perf_counter() - start
                assert steps.captured is not None
                held = steps.captured.graphs._steps[1, padded(nodes)]
                alone = stage.milliseconds(held.replay) if held.replay else None
                base = base or alone
                stage.tell(
                    shape=args.shape,
                    mode=args.mode,
                    context=context,
                    rows=nodes,
                    captured_ms=alone,
                    step_ms=round(stage.milliseconds(lambda: evaluate().argmax()), 3),  # noqa: B023
                    with_top_ms=round(stage.milliseconds(lambda: evaluate().top(6)), 3),  # noqa: B023
                    over_one_row=round(alone / base, 3) if alone and base else None,
                    first_use_s=round(first, 2),
                    captured_mb=round(held.bytes / 1e6),
                )
            except Exception as error:
                stage.failed(error, shape=args.shape, context=context, rows=nodes)


def profile(stage: Stage, args: argparse.Namespace) -> None:
    """Time of a step by kernel, of four layers."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    model = model_of(args.shape, stage.device, layers=2 if stage.dry else 4)
    for nodes in args.rows:
        target, _ = _started(model, args.contexts[0], args.mode)
        tree = tree_of(nodes)
        for _ in range(3):
            target.forward([tree]).argmax()
        with profiled(activities=[ProfilerActivity.CPU if stage.dry else ProfilerActivity.CUDA]) as seen:
            for _ in range(5):
                target.forward([tree]).argmax()
            stage.wait()
        launches = sum(e.count for e in seen.key_averages() if stage.dry or e.device_time_total) / 5
        stage.tell(rows=nodes, layers=model.config.num_hidden_layers, launches_per_step=launches)
        for event in sorted(seen.key_averages(), key=lambda e: -e.device_time_total)[:14]:
            taken = round(event.device_time_total / 5, 1)
            stage.tell(rows=nodes, kernel=event.key[:90], calls_per_step=event.count / 5, us_per_step=taken)


def answers(stage: Stage, args: argparse.Namespace) -> None:
    """Tokens per second of every method on real text, methods taking turns: pocket, enlarged to the size of a 7 B."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ld.pocket_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    if stage.dry:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    else:
        model = enlarged_pocket("7B", torch.bfloat16, stage.device)
    length = 12 if stage.dry else 160
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def ours(config: ld.LookaheadConfig) -> Callable[..., tuple[Any, ld.Stats | None]]:
        def run(ids: torch.Tensor) -> tuple[Any, ld.Stats | None]:
            decoding = ld.LookaheadDecoding(config, execution=args.mode)
            return ld.generate(model, ids, lookahead=decoding, **options), decoding.stats

        return run

    methods: dict[str, Callable[..., tuple[Any, ld.Stats | None]]] = {
        "autoregressive": ours(ld.PLAIN),
        "lookahead": ours(ld.LookaheadConfig()),
        "paper 15,5,15": ours(ld.LookaheadConfig.paper(15, 5, 15)),
        "hf-greedy": lambda ids: (model.generate(ids, **options), None),
        "hf-prompt-lookup": lambda ids: (model.generate(ids, prompt_lookup_num_tokens=10, **options), None),
    }
    if not stage.dry:  # which compiles, on a CPU for minutes
        methods["hf-static"] = lambda ids: (model.generate(ids, cache_implementation="static", **options), None)
    for number, text in enumerate([TEXTS[0], *TEXTS[: args.prompts]]):
        ids = tokenizer(text, return_tensors="pt").input_ids.to(stage.device)
        first: list[int] = []
        for name in list(methods):
            try:
                stage.wait()
                start = time.perf_counter()
                out, stats = methods[name](ids)
                stage.wait()
                seconds = time.perf_counter() - start
            except Exception as error:
                stage.failed(error, method=name)
                del methods[name]
                continue
            first = first or out[0].tolist()
            more: dict[str, Any] = {}
            if stats is not None:
                spent = {k: round(1e3 * v / max(1, stats.steps), 3) for k, v in stats.seconds.items() if k != "prefill"}
                more = {"tokens_per_step": round(stats.mean_acceptance_length, 2), "ms_per_step": spent}
                more["rows"] = round(stats.rows_per_step, 1)
            stage.tell(
                warm_up=not number,
                prompt=number,
                method=name,
                tokens_per_s=round(length / seconds, 1),
                same_as_plain=out[0].tolist() == first,
                **more,
            )


def ranks(stage: Stage, args: argparse.Namespace) -> None:
    """Lookahead parallelism over two processes, a card each: started with torchrun, of which the first one tells."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = ld.pocket_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    length = 12 if stage.dry else 160
    with ld.parallel() as group:
        if stage.dry:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        else:
            model = enlarged_pocket("7B", torch.bfloat16, str(group.device))
        options: dict[str, Any] = {
            "max_new_tokens": length,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        for number, text in enumerate([TEXTS[0], *TEXTS[: args.prompts]]):
            ids = tokenizer(text, return_tensors="pt").input_ids.to(group.device)
            for name, together in (("one", None), ("all", group)):
                decoding = ld.LookaheadDecoding(parallel=together)
                start = time.perf_counter()
                out = ld.generate(model, ids, lookahead=decoding, **options)
                seconds = time.perf_counter() - start
                if group.first:
                    stage.tell(
                        warm_up=not number,
                        prompt=number,
                        processes=group.size if together else 1,
                        method=f"lookahead on {name}",
                        tokens_per_s=round(length / seconds, 1),
                        tokens_per_step=round(decoding.stats.mean_acceptance_length, 2),
                        rows=round(decoding.stats.rows_per_step, 1),
                        text=hash(tuple(out[0].tolist())) % 10**6,
                    )


def report(stage: Stage, args: argparse.Namespace) -> None:
    """One page of a results file: what ran, what failed, the ratios."""
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    for name in dict.fromkeys(line["stage"] for line in lines):
        ours = [line for line in lines if line["stage"] == name]
        bad = [line for line in ours if "failed" in line or line.get("good") is False]
        bad += [line for line in ours if False in line.get("identical", [])]
        print(f"{name}: {len(ours)} figures, {len(bad)} failed or wrong")
        for line in bad[:10]:
            print("   ", json.dumps(line)[:200])
    for line in lines:
        if line.get("over_one_row"):
            print(f"t({line['rows']})/t(1) at {line['context']}, {line['shape']}: {line['over_one_row']}")
    timed = [line for line in lines if line["stage"] == "answers" and line.get("warm_up") is False]
    by = {m: median(r["tokens_per_s"] for r in timed if r["method"] == m) for m in {r["method"] for r in timed}}
    for method, speed in sorted(by.items(), key=lambda item: -item[1]):
        print(f"{method}: {speed} tokens/s, {speed / by['autoregressive']:.2f} of autoregressive")


@dataclass(frozen=True)
class Wanted:
    """A figure of the GPU's chapter.

    Attributes:
        name: in words.
        bound: what it should be, in words.
        find: the figure in the lines of a results file; None where it was not measured.
    """

    name: str
    bound: str
    find: Callable[[Sequence[dict[str, Any]]], float | None]


def _of(lines: Sequence[dict[str, Any]], stage: str, value: str, **named: Any) -> float | None:
    """A value of the last line of a stage that says so much."""
    found = [line for line in lines if line["stage"] == stage and line.items() >= named.items() and line.get(value)]
    return float(found[-1][value]) if found else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _over_weights(lines: Sequence[dict[str, Any]]) -> float | None:
    """A plain captured step over the time that its weights take at the bandwidth that was read."""
    weights, speed = _of(lines, "step", "weights_gb", shape="Llama-3-8B"), _of(lines, "env", "read_tb_per_s")
    taken = _of(lines, "step", "captured_ms", shape="Llama-3-8B", context=1024, rows=1, mode="captured")
    return _ratio(taken, weights / speed if weights and speed else None)


def _over_reading(lines: Sequence[dict[str, Any]]) -> float | None:
    """The attention of a step of 64 rows at 8k over reading its keys and values once."""
    speed = _of(lines, "env", "read_tb_per_s")
    return _ratio(speed, _of(lines, "kernel", "tb_per_s", shape="Llama-3-8B", context=8192, rows=64))


def _speed(lines: Sequence[dict[str, Any]], method: str) -> float | None:
    found = [line["tokens_per_s"] for line in lines if line["stage"] == "answers" and line.get("warm_up") is False
             and line.get("method") == method]  # fmt: skip
    return median(found) if found else None


def _identical(lines: Sequence[dict[str, Any]]) -> float | None:
    """Share of tiny models and ways to run a step whose tokens in float32 are those of `generate`."""
    found = [all(line["identical"]) for line in lines if line["stage"] == "tiny" and "identical" in line]
    return sum(found) / len(found) if found else None


def _parallel(lines: Sequence[dict[str, Any]]) -> float | None:
    """Two processes over one."""
    timed = [line for line in lines if line["stage"] == "ranks" and line.get("warm_up") is False]
    of = {n: [line["tokens_per_s"] for line in timed if (line["processes"] > 1) == n] for n in (False, True)}
    return median(of[True]) / median(of[False]) if of[True] and of[False] else None


CHAPTER = (
    Wanted("a step of 64 rows over one of one row, 8 B, 1k context, bfloat16", "at most 1.10",
           lambda lines: _of(lines, "step", "over_one_row", shape="Llama-3-8B", context=1024, rows=64, mode=MODE)),
    Wanted("a plain captured step over the time of reading the weights, 8 B", "at most 1.25", _over_weights),
    Wanted("attention of 64 rows at 8k over reading the keys and values once", "at most 1.3", _over_reading),
    Wanted("lookahead over transformers' eager greedy, code, 7 B", "at least 4",
           lambda lines: _ratio(_speed(lines, "lookahead"), _speed(lines, "hf-greedy"))),
    Wanted("lookahead over its static cache with compile", "at least 2.2",
           lambda lines: _ratio(_speed(lines, "lookahead"), _speed(lines, "hf-static"))),
    Wanted("lookahead over its prompt lookup", "",
           lambda lines: _ratio(_speed(lines, "lookahead"), _speed(lines, "hf-prompt-lookup"))),
    Wanted("the paper's 15,5,15 over our plain decoding", "",
           lambda lines: _ratio(_speed(lines, "paper 15,5,15"), _speed(lines, "autoregressive"))),
    Wanted("lookahead over our plain decoding", "",
           lambda lines: _ratio(_speed(lines, "lookahead"), _speed(lines, "autoregressive"))),
    Wanted("lookahead on two cards over one", "", _parallel),
    Wanted("share of tiny models whose tokens in float32 are those of `generate`", "1", _identical),
)  # fmt: skip
MODE = "captured"
GPU_RESULTS = Path(__file__).parent / "results" / "gpu"
PERFORMANCE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/gpu.py chapter -->\n", "<!-- end -->\n"


def chapter_of(files: Sequence[Path]) -> str:
    """The GPU's chapter: a row per figure, a column per results file, which is named by its card."""
    measured = {file: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    cards = {file: str(_card(lines)) for file, lines in measured.items()}
    heads = [f"[{card}](../benchmarks/results/gpu/{file.name})" for file, card in cards.items()] or ["any card"]
    lines = ["| | should be | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for wanted in CHAPTER:
        found = [wanted.find(of) for of in measured.values()] or [None]
        cells = ["not measured" if value is None else f"{value:.2f}" for value in found]
        lines.append(f"| {wanted.name} | {wanted.bound} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _card(lines: Sequence[dict[str, Any]]) -> Any:
    return next((line["card"] for line in lines if "card" in line), "unknown")


def chapter(stage: Stage, args: argparse.Namespace) -> None:
    """Write the GPU's chapter of docs/performance.md."""
    before, _, rest = PERFORMANCE.read_text().partition(BEGIN)
    PERFORMANCE.write_text(
        before + BEGIN + chapter_of(sorted(GPU_RESULTS.glob("*.jsonl"))) + END + rest.partition(END)[2]
    )


STAGES = {f.__name__: f for f in (env, kernel, tiny, step, profile, answers, ranks, report, chapter)}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--shape", default="Llama-3-8B", choices=SHAPES)
    parser.add_argument("--mode", default="captured", choices=("captured", "compiled"))
    parser.add_argument("--contexts", type=_numbers, default=[1024])
    parser.add_argument("--rows", type=_numbers, default=[1, 64])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="on a CPU, in tiny shapes")
    args = parser.parse_args()
    if args.dry:
        args.shape, args.contexts, args.rows, args.prompts = "dry", [40], [1, 4], 1
    transformers.logging.set_verbosity_error()
    STAGES[args.stage](Stage(args.stage, args.results, args.dry), args)


if __name__ == "__main__":
    main()
