"""A shared pool in a file: safetensors, which holds numbers and runs no code when it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..draft.shared import Generation, SharedPool
from .files import replace

NAME = "lookahead-decoding shared pool"
FORMAT = 1


def save_pool(pool: SharedPool, path: str | Path) -> None:
    """Write a pool to a file; an older file stays in place until the new one is whole.

    What the prompts' ends and the answers said can be read from it: keep it as you would keep them. Two processes that
    save to one file do not join their texts; the later one's stay.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(pool, SharedPool):
        raise TypeError(f"pool must be a SharedPool, got {type(pool).__name__}")
    tensors: dict[str, np.ndarray[Any, np.dtype[np.int32]]] = {}
    entries: list[dict[str, Any]] = []
    for number, namespace in enumerate(pool.namespaces.values()):
        with namespace.lock:
            generations = {"younger": namespace.younger, "older": namespace.older}
            entry = {age: generation.requests for age, generation in generations.items()}
            entries.append({"name": namespace.name, "vocab_size": namespace.vocab_size, **entry})
            for age, generation in generations.items():
                tokens = [token for text in generation.texts for token in text]
                tensors[f"{number}.{age}.tokens"] = np.array(tokens, np.int32)
                tensors[f"{number}.{age}.lengths"] = np.array([len(text) for text in generation.texts], np.int32)
    content = json.dumps({"max_bytes": pool.max_bytes, "max_age": pool.max_age, "namespaces": entries})
    metadata = {"name": NAME, "format": str(FORMAT), "content": content, "crc32": str(_check(content, tensors))}
    replace(Path(path), safetensors.numpy.save(tensors, metadata))


def _check(content: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> int:
    check = zlib.crc32(content.encode())
    for name in sorted(tensors):
        check = zlib.crc32(name.encode() + tensors[name].tobytes(), check)
    return check


def load_pool(path: str | Path, max_bytes: int | None = None, max_age: int | None = None) -> SharedPool:
    """Read a pool that `save_pool` wrote.

    Args:
        path: of the file.
        max_bytes, max_age: as for `SharedPool`, by default those of the pool that was saved; the oldest texts that have
            no room are left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no shared pool, of another format, or damaged; the message says which.
    """
    with Path(path).open("rb"):  # a clear error where there is no file
        pass
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("name") != NAME:
                raise ValueError(f"{path} is no shared pool of lookahead-decoding")
            if metadata.get("format") != str(FORMAT):
                raise ValueError(
                    f"{path} has format {metadata.get('format')}, and this version reads {FORMAT}: make it anew"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no shared pool, or was cut short: {error}") from error
    if str(_check(metadata.get("content", ""), tensors)) != metadata.get("crc32"):
        raise ValueError(f"{path} is damaged (its checksum is wrong): make it anew")
    content = json.loads(metadata["content"])
    bounds = {"max_bytes": max_bytes, "max_age": max_age}
    pool = SharedPool(**{name: content[name] if given is None else given for name, given in bounds.items()})
    for number, entry in enumerate(content["namespaces"]):
        namespace = pool.namespace(entry["name"])
        namespace.bind(entry["vocab_size"])
        read = {age: _generation(tensors, f"{number}.{age}", entry[age]) for age in ("younger", "older")}
        namespace.restore(**read)
    return pool


def _generation(tensors: Mapping[str, np.ndarray[Any, Any]], name: str, requests: int) -> Generation:
    generation = Generation()
    ends = tensors[f"{name}.lengths"].cumsum()
    for text in np.split(tensors[f"{name}.tokens"], ends[:-1]) if len(ends) else []:
        generation.add(text.tolist())
    generation.requests = requests
    return generation
