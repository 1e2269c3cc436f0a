"""Exact lookahead decoding for Hugging Face causal language models.

import lookahead_decoding as ld

ids = ld.generate(model, **inputs, max_new_tokens=256, lookahead=ld.LookaheadConfig())
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PLAIN, LookaheadConfig
    from .decoding import Request, autoregressive, decode
    from .hf import LookaheadDecoding, generate
    from .lookahead import Choice, Lookahead
    from .pool import NgramPool
    from .ranks import Ranks, parallel
    from .sampler import Sampler, StepLogits, choose
    from .sharded import ShardedTarget
    from .shared import SharedPool
    from .shared_file import load_pool, save_pool
    from .stats import Stats
    from .target import Target
    from .tensor_parallel import divide
    from .text import StreamStep, stream
    from .tree import TokenTree, build_tree
    from .window import Window

__version__ = "0.1.0"

__all__ = [
    "PLAIN",
    "Choice",
    "Lookahead",
    "LookaheadConfig",
    "LookaheadDecoding",
    "NgramPool",
    "Ranks",
    "Request",
    "Sampler",
    "ShardedTarget",
    "SharedPool",
    "Stats",
    "StepLogits",
    "StreamStep",
    "Target",
    "TokenTree",
    "Window",
    "autoregressive",
    "build_tree",
    "choose",
    "decode",
    "divide",
    "generate",
    "load_pool",
    "parallel",
    "pocket_path",
    "save_pool",
    "stream",
]


_HOMES = {
    "config": "PLAIN LookaheadConfig",
    "decoding": "Request autoregressive decode",
    "hf": "LookaheadDecoding generate",
    "lookahead": "Choice Lookahead",
    "pool": "NgramPool",
    "ranks": "Ranks parallel",
    "sampler": "Sampler StepLogits choose",
    "sharded": "ShardedTarget",
    "shared": "SharedPool",
    "shared_file": "load_pool save_pool",
    "stats": "Stats",
    "target": "Target",
    "tensor_parallel": "divide",
    "text": "StreamStep stream",
    "tree": "TokenTree build_tree",
    "window": "Window",
}
"""The public names by the modules they come from, which are imported when one is asked for: torch takes seconds."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names.split():
            globals()[name] = value = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def pocket_path() -> str:
    """Folder of `pocket`, the small Python-writing model that ships with the package."""
    return str(Path(__file__).with_name("pocket"))
