"""The command itself: its subcommands, and problems in one line."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from .. import __version__
from ..config import LookaheadWarning
from ..ranks.torchrun import speaks, started
from .bench import bench
from .chat import chat
from .demo import demo
from .doctor import doctor
from .generate import generate
from .loading import Problem, first_line
from .printing import say
from .tune import tune
from .verify import verify

SILENCE = 10.0
"""Seconds that the first rank has to say what is wrong."""

WITH_RANKS = ("generate", "verify", "bench")
"""Commands that torchrun may start."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.pass_context
def cli(command: click.Context) -> None:
    """Exact lookahead decoding: the same text in fewer steps.

    MODEL is 'pocket' (a small model that ships with the package), a local folder, or a hub id.
    """
    if started() and command.invoked_subcommand not in WITH_RANKS:
        raise Problem(f"{command.invoked_subcommand} is for one process: start it without torchrun")


for command in (generate, chat, verify, demo, bench, tune, doctor):
    cli.add_command(command)


def main() -> None:
    """The `lookahead` command: problems in one line on stderr, exit code 2."""
    try:
        with _our_warnings_alone():
            cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help(), file=sys.stderr)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        say(first_line(Exception(error.format_message())))
        _end(error.exit_code)
    except (TypeError, ValueError) as error:  # what the package refuses, which says what to do
        say(first_line(error))
        _end(Problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        say(f"{error.strerror or error}{place}")
        sys.exit(1)


def _end(code: int) -> NoReturn:
    """Leave; of several ranks the first one first, since torchrun ends all others as soon as one has failed."""
    if not speaks():
        time.sleep(SILENCE)
    sys.exit(code)


@contextmanager
def _our_warnings_alone() -> Iterator[None]:
    """Inside, warnings of ours are one line each, and those of other packages, which a user cannot mend, are none."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", LookaheadWarning)
            warnings.showwarning = lambda message, *others: say(str(message))
            yield
    finally:
        logging.disable(logging.NOTSET)
