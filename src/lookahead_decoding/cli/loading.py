"""Models and prompts by what a user calls them; what is wrong with them is one line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import pocket_path
from .printing import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..ranks.group import Ranks

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


THREADS = "lookahead_decoding.threads"
"""Where a command's context keeps the number of threads that was asked for."""


def keep_threads(context: click.Context, parameter: click.Parameter, value: int | None) -> None:
    """Keep --threads for `load`, which is the first to need torch."""
    there = os.cpu_count()
    if value is not None and there is not None and value > there:
        raise click.BadParameter(f"{value} is more than the processor has ({there})", context, parameter)
    context.meta[THREADS] = value


class Problem(click.ClickException):
    """Something the user can mend: one line, exit code 2."""

    exit_code = 2


def load(
    name: str, dtype: str, device: str | None, trust: bool, ranks: Ranks | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer by 'pocket', a folder, or a hub id; the part of one rank where ranks divide it."""
    options: dict[str, Any] = {"trust_remote_code": trust}
    if name.lower().endswith(".gguf"):
        raise Problem(f"{name!r}: GGUF files are not read; give the model as transformers keeps it, a folder or hub id")
    if name == "pocket" or _looks_local(name):
        path = str(_folder(name))
    else:
        path = name
        options["local_files_only"] = not _hub_answers(name)
    import torch  # after what can be told without it
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from ..model.probe import probe
    from ..ranks.tensor_parallel import divide

    context = click.get_current_context(silent=True)
    threads = context.meta.get(THREADS) if context else None
    if threads is not None:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()  # of a download, which the line above hides as well
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if ranks is not None:
        where = str(ranks.device)
    try:
        torch.empty(0, device=where)
    except NotImplementedError as error:
        raise Problem(f"cannot use device {where!r}: this machine, or its build of PyTorch, has none") from error
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
    if dtype == "auto" and _slow_in_bfloat16(model):
        say("this processor has no instructions for bfloat16, which the weights are in: --dtype float32 is faster")
    return model, tokenizer


def _slow_in_bfloat16(model: PreTrainedModel) -> bool:
    import torch

    from ..model.native.library import why_no_library

    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    plain = model.device.type == "cpu" and model.dtype == torch.bfloat16 and bool(why_no_library())
    return plain and bool(supported and not supported())


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()


def _folder(name: str) -> Path:
    """The folder of a model, which has a configuration and a tokenizer in it."""
    path = Path(pocket_path() if name == "pocket" else name).expanduser()
    if not path.is_dir():
        wrong = "{!r} is a file: give the folder that it lies in" if path.exists() else "no model folder at {!r}"
        raise Problem(wrong.format(name))
    if not (path / "config.json").is_file():
        raise Problem(f"no model in {name!r}: there is no config.json in that folder")
    if not any("token" in file.name or "vocab" in file.name or file.suffix == ".model" for file in path.iterdir()):
        raise Problem(f"no tokenizer in {name!r}: save it there as well, with tokenizer.save_pretrained")
    return path


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached; where it cannot, a model that was downloaded before will do."""
    from huggingface_hub import constants, try_to_load_from_cache

    if _reachable(constants.ENDPOINT):
        return True
    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        guess = ": did you mean 'pocket'?" if get_close_matches(name.lower(), ["pocket"]) else ""
        raise Problem(f"{name!r} is no folder here and was not downloaded before, and the hub cannot be reached{guess}")
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


LONGEST = 300
"""Characters of another package's message that are shown, up to the end of a sentence."""


def first_line(error: BaseException) -> str:
    """What an error says first: its first line, and those that go on with it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unfinished = list(takewhile(lambda line: line.endswith((",", ":")), lines))
    said = " ".join(lines[: len(unfinished) + 1])
    if len(said) > LONGEST and ". " in said[:LONGEST]:
        said = said[: said.rindex(". ", 0, LONGEST) + 1]
    return said or type(error).__name__


@dataclass(frozen=True)
class Prompt:
    """What a user asks: a text to go on with, or the messages of a talk, as chat templates take them."""

    content: str | list[dict[str, Any]]

    def in_chat(self, system: str | None = None) -> Prompt:
        """The talk that this prompt begins, or goes on with, behind a system message if there is one."""
        messages = self.content if isinstance(self.content, list) else [{"role": "user", "content": self.content}]
        return Prompt(([{"role": "system", "content": system}] if system is not None else []) + messages)


SAMPLES = (
    Prompt(
        "Write a Python class Stack with the methods push, pop, peek and size, and say in its docstring what each does."
    ),
    Prompt(
        "Add type hints to this function and change nothing else:\n\n"
        "def mean(numbers, weights=None):\n"
        '    """The weighted mean of a list of numbers."""\n'
        "    if weights is None:\n"
        "        weights = [1.0] * len(numbers)\n"
        "    total = 0.0\n"
        "    for number, weight in zip(numbers, weights):\n"
        "        total += number * weight\n"
        "    return total / sum(weights)\n"
    ),
    Prompt(
        "A train leaves at nine and runs 60 miles in an hour; another leaves at ten and runs 80. When and where does "
        "the second one catch up? Explain step by step."
    ),
    Prompt("Describe how bread is made, from the grain to the loaf."),
)


def samples(tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[Prompt]:
    """Prompts where none are given: code, an edit, a sum and prose, in the chat template of a model that has one."""
    return [one.in_chat() if tokenizer.chat_template else one for one in SAMPLES[:limit]]


FIELD = "prompt"
"""Of a line of a prompts file that holds what is asked; where nobody names another, "messages" may be in its place."""


def read_prompts(path: Path, field: str, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSONL file: a text each, a list of turns of which the first is asked, or messages."""
    prompts: list[Prompt] = []
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(content.split("\n"), 1):  # JSON may hold other line separators
        if limit is not None and len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise Problem(f"{path}, line {number}: not JSON ({error.msg})") from error
        except RecursionError as error:
            raise Problem(f"{path}, line {number}: JSON that is nested too deep") from error
        found = record.get(field) if isinstance(record, dict) else None
        if found is None and isinstance(record, dict) and field == FIELD:
            found = record.get("messages")
            if found is not None and not (isinstance(found, list) and _are_messages(found)):
                raise Problem(f"{path}, line {number}: messages must be a list of objects with 'role' and 'content'")
        if isinstance(found, list) and found and isinstance(found[0], str):
            found = found[0]
        if not isinstance(found, str | list) or (isinstance(found, list) and not _are_messages(found)):
            raise Problem(f"{path}, line {number}: no text in field {field!r} (choose one with --field)")
        prompts.append(Prompt(found))
    if not prompts:
        raise Problem(f"{path}: no prompts in it")
    return prompts


def _are_messages(found: list[Any]) -> bool:
    return bool(found) and all(isinstance(m, dict) and "role" in m for m in found)


def check_text(text: str, which: str) -> None:
    """See that a text is one; bytes that are not UTF-8 come from the command line as half characters.

    Raises:
        Problem: it is not; `which` says whose it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Problem(f"{which} is not UTF-8") from error


def check_file(path: Path | None, option: str) -> None:
    """See that a file can be written, and the folders above it that are not there, before anything is measured.

    Raises:
        Problem: something that is no folder is in the way, or it must not be written to.
    """
    if path is None:
        return
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Problem(f"{option}: cannot write to {str(there)!r}")


def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, which: str) -> list[int]:
    """Token ids of a prompt that fits the model's context."""
    from ..hf.generate import context_of
    from ..hf.stream import chat_ids

    if isinstance(prompt.content, str):
        check_text(prompt.content, which)
        ids: list[int] = tokenizer(prompt.content).input_ids
    else:
        try:
            ids = chat_ids(tokenizer, prompt.content)
        except ValueError as error:
            raise Problem(f"{which}: {first_line(error)}") from error
    if not ids:
        raise Problem(f"{which} is empty: give at least one token")
    context = context_of(model)
    if context is not None and len(ids) >= context:
        raise Problem(f"{which} has {len(ids):,} tokens, and the model's context is {context:,}: shorten it")
    return ids


def room(model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    """New tokens that the context leaves room for."""
    from ..hf.generate import context_of

    context = context_of(model)
    return max_new_tokens if context is None else min(max_new_tokens, context - len(prompt))


def sampling(temperature: float, top_k: int | None = None, top_p: float | None = None) -> dict[str, Any]:
    """What `generate` takes: greedy at temperature 0, whatever the model's generation config says."""
    if temperature == 0:
        if top_k is not None or top_p is not None:
            raise Problem("--top-k and --top-p are for sampling: give a --temperature as well")
        return {"do_sample": False}
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    return options | {k: v for k, v in (("top_k", top_k), ("top_p", top_p)) if v is not None}
