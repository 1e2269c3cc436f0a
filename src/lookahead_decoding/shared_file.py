"""A shared pool in a file: safetensors, which holds numbers and runs no code when it is read."""

from __future__ import annotations

import json
import zlib
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from .files import replace
from .shared import SharedPool

NAME = "lookahead-decoding shared pool"
FORMAT = 1


def save_pool(pool: SharedPool, path: str | Path) -> None:
    """Write a pool to a file; an older file stays in place until the new one is whole.

    What the prompts' ends and the answers said can be read from it: keep it as you would keep them. Two processes that
    save to one file do not join their texts; the later one's stay.

    Raises:
        OSError: the file cannot be written.
    """
    tensors: dict[str, np.ndarray[Any, np.dtype[np.int32]]] = {}
    entries: list[dict[str, Any]] = []
    check = 0
    for number, namespace in enumerate(pool.namespaces.values()):
        with namespace.lock:
            generations = {"younger": namespace.younger, "older": namespace.older}
            entry = {age: generation.requests for age, generation in generations.items()}
            entries.append({"name": namespace.name, "vocab_size": namespace.vocab_size, **entry})
            for age, generation in generations.items():
                tokens = np.array([token for text in generation.texts for token in text], np.int32)
                check = zlib.crc32(tokens.tobytes(), check)
                tensors[f"{number}.{age}.tokens"] = tokens
                tensors[f"{number}.{age}.lengths"] = np.array([len(text) for text in generation.texts], np.int32)
    metadata = {"name": NAME, "format": str(FORMAT), "crc32": str(check), "namespaces": json.dumps(entries)}
    replace(Path(path), safetensors.numpy.save(tensors, metadata))


def load_pool(path: str | Path, max_bytes: int = 64 << 20, max_age: int = 10_000) -> SharedPool:
    """Read a pool that `save_pool` wrote.

    Args:
        path: of the file.
        max_bytes, max_age: as for `SharedPool`; the oldest texts that have no room are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no shared pool, of another format, or damaged; the message says which.
    """
    pool = SharedPool(max_bytes, max_age)
    with open(path, "rb"):  # a clear error where there is no file
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no shared pool, or was cut short: {error}") from error
    if metadata.get("name") != NAME:
        raise ValueError(f"{path} is no shared pool of lookahead-decoding")
    if metadata.get("format") != str(FORMAT):
        raise ValueError(f"{path} has format {metadata.get('format')}, and this version reads {FORMAT}: make it anew")
    try:
        _fill(pool, metadata, tensors)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): make it anew") from error
    return pool


def _fill(pool: SharedPool, metadata: dict[str, str], tensors: dict[str, Any]) -> None:
    check = 0
    entries = json.loads(metadata["namespaces"])
    for number in range(len(entries)):
        for age in ("younger", "older"):
            check = zlib.crc32(tensors[f"{number}.{age}.tokens"].tobytes(), check)
    if str(check) != metadata["crc32"]:
        raise ValueError("its checksum is wrong")
    for number, entry in enumerate(entries):
        namespace = pool.namespace(entry["name"])
        namespace.bind(int(entry["vocab_size"]))
        for age in ("older", "younger"):
            namespace.turn()
            tokens, lengths = (tensors[f"{number}.{age}.{what}"].tolist() for what in ("tokens", "lengths"))
            for end, length in zip(accumulate(lengths), lengths, strict=True):
                namespace.learn(tokens[end - length : end])
            namespace.younger.requests = max(namespace.younger.requests, int(entry[age]))
