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
    from .draft.lookahead import Choice, Lookahead
    from .draft.pool import NgramPool
    from .draft.shared import SharedPool
    from .draft.tree import TokenTree, build_tree
    from .draft.window import Window
    from .engine.decode import Request, autoregressive, decode
    from .hf.generate import LookaheadDecoding, generate
    from .hf.stream import StreamStep, stream
    from .model.target import Target
    from .price.stats import Stats
    from .ranks.group import Ranks, parallel
    from .ranks.sharded import ShardedTarget
    from .ranks.tensor_parallel import divide
    from .saved.shared_file import load_pool, save_pool
    from .verify.sampler import Sampler, StepLogits, choose

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
    "engine.decode": "Request autoregressive decode",
    "hf.generate": "LookaheadDecoding generate",
    "draft.lookahead": "Choice Lookahead",
    "draft.pool": "NgramPool",
    "ranks.group": "Ranks parallel",
    "verify.sampler": "Sampler StepLogits choose",
    "ranks.sharded": "ShardedTarget",
    "draft.shared": "SharedPool",
    "saved.shared_file": "load_pool save_pool",
    "price.stats": "Stats",
    "model.target": "Target",
    "ranks.tensor_parallel": "divide",
    "hf.stream": "StreamStep stream",
    "draft.tree": "TokenTree build_tree",
    "draft.window": "Window",
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
