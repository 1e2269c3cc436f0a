"""What the commands share: loading models, reading prompts, and problems in one line."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import pocket_path
from .config import SOURCES, LookaheadConfig
from .torchrun import PATIENCE, START, speaks, started

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .ranks import Ranks
    from .shared import Namespace

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


THREADS = "lookahead_decoding.threads"
"""Where a command's context keeps the number of threads that was asked for."""


def keep_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """Keep --threads for `load`, which is the first to need torch."""
    context.meta[THREADS] = value


class Problem(click.ClickException):
    """Something the user can mend: one line, exit code 2."""

    exit_code = 2


def with_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """Let torchrun start a command: it gets the ranks as `ranks`, None without torchrun, and the first one prints."""

    @functools.wraps(command)
    def joined(tensor_parallel: int, patience: float, device: str | None, **rest: Any) -> None:
        if not started():
            if tensor_parallel > 1:
                raise Problem(f"--tensor-parallel divides a model over ranks: {START}")
            command(device=device, ranks=None, **rest)
            return
        from .ranks import parallel

        try:
            with parallel(tensor_parallel=tensor_parallel, device=device, patience=patience) as ranks, _speaking(ranks):
                command(device=device, ranks=ranks, **rest)
        except ValueError as error:
            raise Problem(first_line(error)) from error

    wrapped: Callable[..., None] = joined
    for option in (
        click.option(
            "--tensor-parallel",
            type=click.IntRange(1),
            default=1,
            show_default=True,
            help="Ranks that hold one copy of the model together; needs torchrun.",
        ),
        click.option(
            "--patience",
            type=click.FloatRange(1),
            default=PATIENCE,
            show_default=True,
            help="Seconds that ranks wait for one which is alive, such as one that compiles.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


@contextmanager
def _speaking(ranks: Ranks) -> Iterator[None]:
    """Inside, only the first rank prints."""
    if ranks.first:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def load(
    name: str, dtype: str, device: str | None, trust: bool, ranks: Ranks | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer by 'pocket', a folder, or a hub id; the part of one rank where ranks divide it."""
    options: dict[str, Any] = {"trust_remote_code": trust}
    if name == "pocket" or _looks_local(name):
        path = str(_folder(name))
    else:
        path = name
        options["local_files_only"] = not _hub_answers(name)
    import torch  # after what can be told without it
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from .probe import probe
    from .tensor_parallel import divide

    threads = click.get_current_context().meta.get(THREADS)
    if threads is not None:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks is not None:
        where = str(ranks.device)
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"cannot use device {where!r}: {first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        model = model.to(where) if ranks is None else divide(model, ranks)
    except Exception as error:  # a broken folder fails in as many ways as there are files in it
        raise Problem(f"cannot load a model from {name!r}: {first_line(error)}") from error
    try:
        probe(model.eval())
    except ValueError as error:
        raise Problem(str(error)) from error
    return model, tokenizer


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _folder(name: str) -> Path:
    """The folder of a model, which has a configuration and weights in it."""
    path = Path(pocket_path() if name == "pocket" else name).expanduser()
    if not path.is_dir():
        what = (
            f"{name!r} is a file: give the folder that it lies in" if path.exists() else f"no model folder at {name!r}"
        )
        raise Problem(what)
    if not (path / "config.json").is_file():
        raise Problem(f"no model in {name!r}: there is no config.json in that folder")
    return path


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached; where it cannot, a model that was downloaded before will do."""
    from huggingface_hub import constants, try_to_load_from_cache

    if _reachable(constants.ENDPOINT):
        return True
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise Problem(f"{name!r} is no folder here and was not downloaded before, and the hub cannot be reached")
    return False


def _reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether a server answers; a proxy is left to the library that knows how to use it."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    parts = urlsplit(address)
    if parts.scheme in getproxies():
        return True
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 443), seconds):
            return True
    except OSError:
        return False


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def read_prompts(path: Path, field: str, limit: int | None = None) -> list[str]:
    """The prompts of a JSONL file."""
    prompts: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, 1):
        if limit is not None and len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Problem(f"{path}, line {number}: not JSON ({error.msg})") from error
        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(text, list) and text:  # the turns of a talk: the first can be answered
            text = text[0]
        if not isinstance(text, str):
            raise Problem(f"{path}, line {number}: no text in field {field!r} (choose one with --field)")
        prompts.append(text)
    if not prompts:
        raise Problem(f"{path}: no prompts in it")
    return prompts


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, which: str) -> list[int]:
    """Token ids of a prompt that fits the model's context."""
    from .hf import context_of

    ids: list[int] = tokenizer(prompt).input_ids
    if not ids:
        raise Problem(f"{which} is empty: give at least one token")
    context = context_of(model)
    if context is not None and len(ids) >= context:
        raise Problem(f"{which} has {len(ids):,} tokens, and the model's context is {context:,}: shorten it")
    return ids


def room(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """New tokens that the context leaves room for."""
    from .hf import context_of

    context = context_of(model)
    return max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))


def sampling(temperature: float, top_k: int | None = None, top_p: float | None = None) -> dict[str, Any]:
    """What `generate` takes: greedy at temperature 0, whatever the model's generation config says."""
    if temperature == 0:
        return {"do_sample": False}
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    return options | {k: v for k, v in (("top_k", top_k), ("top_p", top_p)) if v is not None}


def config_of(
    sizes: tuple[int | None, int | None, int | None],
    sources: str | None = None,
    max_rows: int | None = None,
    paper: bool = False,
    reproducible: bool = False,
) -> LookaheadConfig:
    """Settings from the options of a command: W, N and G, and for the paper's algorithm its own defaults."""
    default: Sequence[str] = ("window",) if paper else SOURCES
    names = default if sources is None else [name.strip() for name in sources.split(",") if name.strip()]
    if paper:
        w, n, g = (given if given is not None else usual for given, usual in zip(sizes, (15, 5, 15), strict=True))
        sizes = (w, n, g)
    try:
        return LookaheadConfig(*sizes, tuple(names), max_rows=max_rows, adaptive=not paper, reproducible=reproducible)
    except (TypeError, ValueError) as error:
        raise Problem(str(error)) from error


@contextmanager
def shared_text(path: Path | None, name: str | None) -> Iterator[Namespace | None]:
    """A namespace of the shared pool in a file, which is written at the end, with what was finished until then."""
    from .shared import SharedPool
    from .shared_file import load_pool, save_pool

    if path is None:
        if name is not None:
            raise Problem("--namespace is a part of a --shared-pool: give that as well")
        yield None
        return
    if not path.absolute().parent.is_dir():
        raise Problem(f"--shared-pool: no folder {str(path.absolute().parent)!r}")
    try:
        pool = load_pool(path) if path.exists() else SharedPool()
        namespace = pool.namespace("default" if name is None else name)
    except ValueError as error:
        raise Problem(f"--shared-pool: {first_line(error)}") from error
    try:
        yield namespace
    finally:
        if namespace.tokens and speaks():
            save_pool(pool, path)
