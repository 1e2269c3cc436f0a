"""`lookahead chat`: a talk with a model at a terminal, or line by line from another program."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..config import LookaheadConfig
from .answers import releases
from .loading import Problem, check_text, first_line, load, sampling
from .options import dtype_option, lookahead_options, model_options, plain_option, sampling_options, shared_options
from .printing import in_width

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..draft.shared import Namespace

HELP = """/reset  forget the talk so far
/exit   leave, as Ctrl-D does
/help   this text
Ctrl-C stops an answer and keeps what it said.
Arrow keys edit the line and bring back earlier ones; lines that are pasted together are one turn."""


@click.command()
@model_options
@click.option("--system", help="A message that tells the model how to behave.")
@dtype_option
@sampling_options(default_length=None)
@lookahead_options
@shared_options
@plain_option
def chat(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    system: str | None,
    dtype: str,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    execution: str,
    shared: Namespace | None,
) -> None:
    """Talk with a model. Ctrl-C stops an answer; /help says more.

    Uses the tokenizer's chat template; without one, the model continues the text so far. Answers end where the model
    ends them, or where its context does.
    """
    chosen = sampling(temperature, top_k, top_p)
    if sys.stdin.isatty():
        _tell(f"[loading {model}]")
    target, tokenizer = load(model, dtype, device, trust_remote_code)
    from ..hf.stream import stream

    if not tokenizer.chat_template:
        _tell(f"[{model} has no chat template: it goes on with the text so far]")
    if sys.stdin.isatty():
        _tell("[ready: /help says what you can do, Ctrl-D leaves]")

    talk = Talk(target, tokenizer, system)
    options = chosen | {"execution": execution, "shared": shared, "release": releases(target, execution)}
    for line in _turns():
        if line.startswith("/"):
            if line == "/exit":
                return
            if line == "/reset":
                talk = Talk(target, tokenizer, system)
            _tell({"/help": HELP, "/reset": "[forgotten]"}.get(line, f"no command {line}: /help lists them"))
            continue
        try:
            check_text(line, "that line")
            ids, length = talk.ask(line, max_new_tokens)
        except (Problem, ValueError) as problem:  # the chat template may refuse what it is given
            _tell(f"[{first_line(problem)}]")
            continue
        try:
            steps = stream(target, tokenizer, ids, lookahead=config, seed=seed, max_new_tokens=length, **options)
            said, reason = "", None
            with _until_interrupted() as interrupted:
                for step in steps:
                    said, reason = said + step.text, step.finish_reason
                    print(step.text, end="", flush=True)
                    if interrupted():
                        reason = "stopped"
                        break
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
        print(flush=True)
        if reason == "length":
            _tell(f"[cut after {length:,} tokens: {'--max-new-tokens' if max_new_tokens else 'the context is full'}]")
        elif reason == "stopped":
            _tell("[stopped]")
        talk.answer(said)


class Talk:
    """What was said, and how it is put to the model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []
        if system is not None and not tokenizer.chat_template:
            raise Problem("--system needs a chat template, and this model's tokenizer has none: leave it out")

    def ask(self, line: str, max_new_tokens: int | None) -> tuple[list[int], int]:
        """Token ids of the talk with a new line, and how many tokens an answer may have.

        The oldest turns are dropped where the context has no room for them. A line that cannot be put is not kept.

        Raises:
            Problem: the context has no room for the line alone.
            ValueError: the chat template does not take the talk.
        """
        try:
            return self._put(line, max_new_tokens)
        except ValueError:
            self._turns.pop()
            raise

    def _put(self, line: str, max_new_tokens: int | None) -> tuple[list[int], int]:
        from ..hf.generate import context_of

        self._turns.append({"role": "user", "content": line})
        context = context_of(self._model)
        least = 1 if context is None else min(max_new_tokens or 64, context // 4)
        dropped = 0
        while context is not None and len(ids := self._ids()) + least > context:
            if len(self._turns) == 1:
                self._turns.clear()
                raise Problem(f"that is {len(ids):,} tokens, and the model's context is {context:,}: say less")
            del self._turns[:2]
            dropped += 1
        if dropped:
            _tell(f"[the context of {context:,} tokens is full: the oldest {dropped} turns were dropped]")
        ids = self._ids()
        room = 1 << 20 if context is None else context - len(ids)
        return ids, min(max_new_tokens or room, room)

    def answer(self, said: str) -> None:
        """Take note of what the model said."""
        self._turns.append({"role": "assistant", "content": said})

    def _ids(self) -> list[int]:
        from ..hf.stream import chat_ids

        if self._tokenizer.chat_template:
            return chat_ids(self._tokenizer, [*self._first, *self._turns])
        text = "".join(turn["content"] for turn in self._turns)
        ids: list[int] = self._tokenizer(text).input_ids
        return ids


def _turns() -> Iterator[str]:
    """What the user says, until the end of the input; what is empty says nothing."""
    read = _prompted() if sys.stdin.isatty() else _piped()
    for line in read:
        if line.strip():
            yield line.strip() if line.startswith("/") else line


def _piped() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\n")


def _prompted() -> Iterator[str]:
    """Lines of a terminal, which is asked wherever the answers go to."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    session: PromptSession[Any] = PromptSession(output=create_output(always_prefer_tty=True))
    while True:
        try:
            yield session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell("[Ctrl-D or /exit leaves]")


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C is taken note of and ends nothing; a second one does."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(message: str) -> None:
    """A line that is not the model's: beside the answers where those go to a file."""
    to = sys.stdout if sys.stdout.isatty() else sys.stderr
    print(in_width(message, to), file=to, flush=True)
