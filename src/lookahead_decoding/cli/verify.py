"""`lookahead verify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..config import LookaheadConfig
from ..ranks.torchrun import speaks
from .loading import DTYPES, Problem, encode, first_line, load, read_prompts, room, samples, sampling
from .options import lookahead_options, model_options, prompt_options, sampling_options, with_ranks

if TYPE_CHECKING:
    from ..ranks.group import Ranks


@click.command()
@model_options
@prompt_options()
@click.option("--dtype", type=click.Choice(DTYPES[1:]), default="float32", show_default=True)
@sampling_options()
@lookahead_options
@with_ranks
def verify(
    model: str,
    device: str | None,
    trust_remote_code: bool,
    prompts: Path | None,
    field: str,
    limit: int | None,
    dtype: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    config: LookaheadConfig,
    execution: str,
    ranks: Ranks | None,
) -> None:
    """Compare with plain decoding, token by token, prompt by prompt.

    Prints how many outputs are identical to `model.generate`, and each first divergence with its margin. Exit code 1
    where one is a bug by the contract in docs/exactness.md.
    """
    chosen = sampling(temperature, top_k, top_p)
    asked = read_prompts(prompts, field, limit) if prompts else []
    target, tokenizer = load(model, dtype, device, trust_remote_code, ranks)
    import torch
    from rich.console import Console
    from rich.progress import track

    from ..hf.exactness import compare
    from ..hf.generate import LookaheadDecoding

    asked = asked or samples(tokenizer, limit)
    encoded = [encode(target, tokenizer, one, f"prompt {i}") for i, one in enumerate(asked, 1)]
    divergences, invariant = [], True
    console = Console(stderr=True, quiet=not speaks())
    for i, ids in enumerate(track(encoded, "verifying", console=console, disable=not sys.stderr.isatty()), 1):
        options = chosen | {"max_new_tokens": room(target, ids, max_new_tokens)}
        try:
            decoding = LookaheadDecoding(config, execution=execution, parallel=ranks)
            found = compare(target, torch.tensor([ids], device=target.device), decoding, seed + i - 1, **options)
        except (TypeError, ValueError) as error:
            raise Problem(first_line(error)) from error
        invariant = invariant and decoding.stats.row_invariant
        if found is not None:
            divergences.append(found)
            verdict = "near-tie" if found.near_tie else "BUG"
            print(
                f"prompt {i}: differs after {found.position} tokens, margin {found.margin:.2e} "
                f"(bound {found.bound:.2e}): {verdict}"
            )
    print(f"identical to model.generate {len(encoded) - len(divergences)}/{len(encoded)} in {dtype}")
    if invariant and all(d.near_tie for d in divergences):
        print("identical to plain decoding by the same steps, which are row-invariant: all")
    if not all(d.near_tie for d in divergences):
        raise SystemExit(1)
