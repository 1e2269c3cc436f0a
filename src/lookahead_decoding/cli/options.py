"""Options that commands share."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import EXECUTIONS, MAX_ROWS, PLAIN, SOURCES, LookaheadConfig
from ..ranks.torchrun import PATIENCE, START, speaks, started
from .loading import DTYPES, FIELD, Problem, check_file, first_line, keep_threads

if TYPE_CHECKING:
    from ..draft.shared import Namespace
    from ..ranks.group import Ranks


def with_ranks(command: Callable[..., None]) -> Callable[..., None]:
    """Let torchrun start a command: it gets the ranks as `ranks`, None without torchrun, and the first one prints."""

    @functools.wraps(command)
    def joined(tensor_parallel: int, patience: float, device: str | None, **rest: Any) -> None:
        if not started():
            if tensor_parallel > 1:
                raise Problem(f"--tensor-parallel divides a model over ranks: {START}")
            command(device=device, ranks=None, **rest)
            return
        from ..ranks.group import parallel

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
    if path is None:
        if name is not None:
            raise Problem("--namespace is a part of a --shared-pool: give that as well")
        yield None
        return
    check_file(path, "--shared-pool")
    from ..draft.shared import SharedPool
    from ..saved.shared_file import load_pool, save_pool

    try:
        pool = load_pool(path) if path.exists() else SharedPool()
        namespace = pool.namespace("default" if name is None else name)
    except ValueError as error:
        raise Problem(f"--shared-pool: {first_line(error)}") from error
    try:
        yield namespace
    finally:
        if namespace.tokens and speaks():
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
            save_pool(pool, path)


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.argument("model"),
        click.option(
            "--device", help="Where the model runs, such as cpu or cuda:0. Default: the first GPU if there is one."
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the model."),
        threads_option,
    ):
        command = option(command)
    return command


def threads_option(command: Callable[..., None]) -> Callable[..., None]:
    """How many threads a step runs on, which `load` sets."""
    return click.option(
        "--threads",
        type=click.IntRange(1),
        expose_value=False,
        callback=keep_threads,
        help="Threads of the processor that steps run on.  [default: its cores]",
    )(command)


def lookahead_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of lookahead decoding, which the command gets as `config`, and `compile`."""

    @functools.wraps(command)
    def configured(
        window_size: int | None,
        ngram_size: int | None,
        verification_set_size: int | None,
        sources: str | None,
        max_rows: int | None,
        paper: bool,
        reproducible: bool,
        **rest: Any,
    ) -> None:
        sizes = (window_size, ngram_size, verification_set_size)
        command(config=config_of(sizes, sources, max_rows, paper, reproducible), **rest)

    wrapped: Callable[..., None] = configured
    for option in (
        click.option(
            "-W", "--window-size", type=int, help="Columns of the window. Default: what pays, which may be none."
        ),
        click.option("-N", "--ngram-size", type=int, help="Length of the window's n-grams, in tokens."),
        click.option(
            "-G", "--verification-set-size", type=int, help="N-grams of the window that are kept per first token."
        ),
        click.option("--sources", help=f"Where guesses come from, separated by commas. Default: {','.join(SOURCES)}."),
        click.option("--max-rows", type=int, help=f"Rows of a step at most.  [default: {MAX_ROWS}]"),
        click.option(
            "--paper", is_flag=True, help="The paper's algorithm with a fixed W, N, G (15, 5, 15), no prices."
        ),
        click.option(
            "--reproducible", is_flag=True, help="The same text in every run, in bfloat16 too: no clock decides."
        ),
        execution_option,
    ):
        wrapped = option(wrapped)
    return wrapped


def plain_option(command: Callable[..., None]) -> Callable[..., None]:
    """--plain, which makes `config` that of plain decoding; stands below `lookahead_options`, whose it is."""

    @click.option("--plain", is_flag=True, help="Decode plainly, for comparison.")
    @functools.wraps(command)
    def chosen(plain: bool, config: LookaheadConfig, **rest: Any) -> None:
        if plain and config != LookaheadConfig():
            raise Problem("--plain guesses nothing: leave out what is set for lookahead decoding")
        command(config=PLAIN if plain else config, **rest)

    return chosen


def shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of a shared pool, which the command gets as `shared`; the file is written when the command ends."""

    @functools.wraps(command)
    def opened(shared_pool: Path | None, namespace: str | None, **rest: Any) -> None:
        with shared_text(shared_pool, namespace) as shared:
            command(shared=shared, **rest)

    wrapped: Callable[..., None] = opened
    for option in (
        click.option(
            "--shared-pool",
            type=click.Path(dir_okay=False, path_type=Path),
            help="A file with text of earlier requests, where guesses come from as well; answers are added to it.",
        ),
        click.option("--namespace", help="The part of --shared-pool that is read and added to.  [default: default]"),
    ):
        wrapped = option(wrapped)
    return wrapped


def prompt_options(many: int | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options that choose prompts, which the command gets as `prompts`, a path or None, `field` and `limit`.

    Args:
        many: prompts that are taken where the user does not say.
    """

    def with_prompts(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--limit",
                type=click.IntRange(1),
                default=many,
                show_default=many is not None,
                help="Only the first prompts.",
            ),
            click.option(
                "--field", default=FIELD, show_default=True, help="Field of --prompts that holds the text, or messages."
            ),
            click.option(
                "--prompts",
                type=click.Path(exists=True, dir_okay=False, path_type=Path),
                help="A JSONL file of your own.  [default: four samples, in the chat template of a model that has one]",
            ),
        ):
            command = option(command)
        return command

    return with_prompts


def dtype_option(command: Callable[..., None]) -> Callable[..., None]:
    """The dtype of the weights, by default the one that they are stored in."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="auto is as the weights are stored.",
    )(command)


def execution_option(command: Callable[..., None]) -> Callable[..., None]:
    """How a step runs."""
    return click.option(
        "--execution",
        type=click.Choice(EXECUTIONS),
        default="auto",
        show_default=True,
        help="How a step runs; native and packed hold the weights twice, compiled takes minutes on a CPU to begin.",
    )(command)


TEMPERATURE = click.FloatRange(0, 100)
SEED = click.IntRange(0, 2**62)


def sampling_options(default_length: int | None = 128) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """How long an answer is, and how its tokens are chosen.

    Args:
        default_length: tokens of an answer at most; None is as many as the context has room for.
    """

    def with_sampling(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option(
                "--seed",
                type=SEED,
                default=0,
                show_default=True,
                help="Seed of the first prompt; each further one has one more.",
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1, min_open=True),
                help="Sample from the likeliest tokens of this probability.",
            ),
            click.option("--top-k", type=click.IntRange(0), help="Sample from this many of the likeliest tokens."),
            click.option("--temperature", type=TEMPERATURE, default=0.0, show_default=True, help="0 is greedy."),
            click.option(
                "-n",
                "--max-new-tokens",
                "--max-tokens",
                type=click.IntRange(1),
                default=default_length,
                show_default=default_length or "what fits",
                help="Tokens of an answer at most; fewer where the context ends.",
            ),
        ):
            command = option(command)
        return command

    return with_sampling
