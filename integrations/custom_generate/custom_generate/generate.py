"""Lookahead decoding for `model.generate(custom_generate="<this folder or repository>", trust_remote_code=True)`."""

from __future__ import annotations

import inspect
from typing import Any

import lookahead_decoding as ld
from lookahead_decoding.config import SOURCES


def generate(
    model: Any,
    *,
    lookahead: ld.LookaheadConfig | None = None,
    window_size: int | None = None,
    ngram_size: int | None = None,
    verification_set_size: int | None = None,
    sources: tuple[str, ...] = SOURCES,
    max_rows: int | None = None,
    execution: str = "auto",
    **kwargs: Any,
) -> Any:
    """`model.generate` with lookahead decoding: everything else is passed on."""
    config = lookahead or ld.LookaheadConfig(window_size, ngram_size, verification_set_size, sources, max_rows)
    decoding = ld.LookaheadDecoding(config, execution=execution)
    named = inspect.signature(model.generate).parameters  # transformers fills in those that the caller left out
    return ld.generate(
        model, lookahead=decoding, **{k: v for k, v in kwargs.items() if v is not None or k not in named}
    )
