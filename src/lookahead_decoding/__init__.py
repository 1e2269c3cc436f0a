"""Exact lookahead decoding for Hugging Face causal language models.

import lookahead_decoding as ld

ids = ld.generate(model, **inputs, max_new_tokens=256, lookahead=ld.LookaheadConfig())
"""

from pathlib import Path

from .choose import Sampler, StepLogits, choose
from .config import PLAIN, LookaheadConfig
from .decode import Request, autoregressive, decode
from .hf import LookaheadDecoding, generate
from .lookahead import Choice, Lookahead
from .parallel import ShardedTarget
from .pool import NgramPool
from .ranks import Ranks, parallel
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


def pocket_path() -> str:
    """Folder of `pocket`, the small Python-writing model that ships with the package."""
    return str(Path(__file__).with_name("pocket"))
