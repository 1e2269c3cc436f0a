"""Lookahead decoding for `model.generate(custom_generate="<this folder or repository>", trust_remote_code=True)`."""

from __future__ import annotations

from typing import Any

import lookahead_decoding as ld


def generate(
    model: Any,
    *,
    window_size: int = 15,
    ngram_size: int = 5,
    verification_set_size: int = 15,
    sources: tuple[str, ...] = ("window", "prompt", "output"),
    **kwargs: Any,
) -> Any:
    """`model.generate` with lookahead decoding: everything else is passed on."""
    config = ld.LookaheadConfig(window_size, ngram_size, verification_set_size, sources)
    return ld.generate(model, lookahead=config, **{k: v for k, v in kwargs.items() if v is not None})
