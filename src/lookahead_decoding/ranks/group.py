"""The processes that share one step: how they are started, how they talk, and how they end together."""

from __future__ import annotations

import atexit
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .torchrun import PATIENCE, START, VARIABLES
from .watch import Watch

TEXT = 4096
"""Bytes of a text that ranks show each other."""

EXCHANGES = ("auto", "refeed", "send")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees it.

    They stand in a grid: a row holds one copy of the model, whole or divided by tensor parallelism, and evaluates one
    shard of every step's tree.

    Attributes:
        rank: of this process, from 0.
        size: number of ranks.
        device: of this rank's model.
        mesh: the grid, (shards, tensor_parallel), named "lookahead" and "tp"; None for a single rank.
        exchange: how accepted tokens come to ranks that did not evaluate them: "refeed", "send", or "auto", which is
            what is estimated to take less time.
        watch: over the others; None for a single rank.
    """

    rank: int
    size: int
    device: torch.device
    tensor_parallel: int = 1
    exchange: str = "auto"
    mesh: DeviceMesh | None = field(default=None, repr=False)
    watch: Watch | None = field(default=None, repr=False)

    @property
    def shards(self) -> int:
        """Parts that a tree is divided into."""
        return self.size // self.tensor_parallel

    @property
    def shard(self) -> int:
        """The part that this rank evaluates."""
        return self.rank // self.tensor_parallel

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks to the user."""
        return self.rank == 0

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """What every rank has, (ranks, *shape), on the CPU; all call it, with tensors of one shape and dtype."""
        if self.size == 1:
            return own[None].cpu()
        place = self.device if dist.get_backend() == "nccl" else torch.device("cpu")
        own = own.to(place)
        found = own.new_empty(self.size, *own.shape)
        with self._waiting():
            dist.all_gather(list(found.unbind()), own)
            return found.cpu()

    def computing(self) -> AbstractContextManager[None]:
        """Around a forward: one of a model that is divided is a collective."""
        return self._waiting() if self.tensor_parallel > 1 else nullcontext()

    def share(self, tensor: torch.Tensor, shard: int) -> None:
        """Fill a tensor on all ranks with that of the ranks of one shard; all call it, with one shape and dtype."""
        if self.shards == 1:
            return
        assert self.mesh is not None
        on_cpu = dist.get_backend() == "gloo" and tensor.device.type != "cpu"
        moved = tensor.cpu() if on_cpu else tensor
        source = shard * self.tensor_parallel + self.rank % self.tensor_parallel
        with self._waiting():
            dist.broadcast(moved, source, group=self.mesh.get_group("lookahead"))
        if on_cpu:
            tensor.copy_(moved)

    def _waiting(self) -> AbstractContextManager[None]:
        assert self.watch is not None
        if self.watch.over:
            raise ValueError("these ranks have left: use them inside the with block of ld.parallel()")
        return self.watch.waiting()

    def agree(self, facts: Mapping[str, Any], within: Sequence[str] = ()) -> None:
        """Check that something is the same on all ranks.

        Args:
            facts: by the names that an error uses.
            within: names of those that differ between the ranks of one copy of the model.

        Raises:
            ValueError: a fact differs; the message names it, the rank and both values. It is raised on all ranks.
        """
        if self.size == 1:
            return
        own = {name: _shortened(str(value)) for name, value in facts.items()}
        content = json.dumps(own).encode()
        if len(content) > TEXT:
            raise ValueError(f"ranks show each other {TEXT} bytes at most, got {len(content)}")
        padded = torch.zeros(TEXT, dtype=torch.uint8)
        padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        texts = [bytes(row.tolist()).rstrip(b"\0") for row in self.gather(padded)]
        found: list[dict[str, str]] = [json.loads(text) for text in texts]
        for rank, theirs in enumerate(found):
            for name in own:
                other = rank % self.tensor_parallel if name in within else 0
                if theirs.get(name) != found[other].get(name):
                    raise ValueError(
                        f"rank {rank} has another {name} than rank {other}: {theirs.get(name)!r} and "
                        f"{found[other].get(name)!r}. All ranks must have the same"
                    )

    def spoken(self, text: str) -> str:
        """The first rank's text, on all ranks."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8)
        length = int(self.gather(torch.tensor([len(content)]))[0])
        own = torch.zeros(length, dtype=torch.uint8)
        if self.first:
            own[:] = content
        return bytes(self.gather(own)[0].tolist()).decode()

    def random_state(self) -> None:
        """Give torch's own random generators on all ranks the state that they have on rank 0."""
        if self.size == 1:
            return
        torch.set_rng_state(self.gather(torch.get_rng_state())[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.gather(torch.cuda.get_rng_state(self.device))[0], self.device)


def _shortened(text: str) -> str:
    """A text with as many letters as a message has room for, and where there are more a checksum of them all."""
    room = TEXT // 24
    return text if len(text) <= room else f"{text[:room]}... ({zlib.crc32(text.encode()):08x})"


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parallel(
    *,
    tensor_parallel: int = 1,
    device: str | torch.device | None = None,
    exchange: str = "auto",
    patience: float = PATIENCE,
) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started; leave them at the end of the `with` block.

    Every rank runs the same program: it makes the same calls with the same arguments. Inside the block no rank is
    waited for in vain. One that dies or raises an error ends all others within 10 seconds, one that is stopped within
    25, and one that others wait for within `patience`: with exit code 1 and, on each machine, one line on stderr that
    names it. SIGTERM is held back for up to 4 seconds, in case another rank is the reason.

    Args:
        tensor_parallel: ranks that hold one copy of the model together; they follow each other. 1 is lookahead
            parallelism alone.
        device: of this rank; by default the GPU of its local number, or the CPU where there is none.
        exchange: how accepted tokens come to ranks that did not evaluate them: "refeed" (with the next step, in front
            of the root), "send" (their keys and values), or "auto", what is estimated to take less time.
        patience: seconds that ranks wait for one that is alive.

    Yields:
        The ranks, to be passed on as `parallel=`.

    Raises:
        ValueError: not started by torchrun, a number of ranks that cannot be divided so, or no such device.
    """
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(f"not set: {', '.join(missing)}: {START}")
    rank, size, local = (int(os.environ[name]) for name in VARIABLES[:3])
    if tensor_parallel < 1 or size % tensor_parallel:
        raise ValueError(f"tensor_parallel={tensor_parallel} does not divide {size} ranks: start a multiple of it")
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {', '.join(EXCHANGES)}, got {exchange!r}")
    place = _device(device, local)
    if size == 1:
        yield Ranks(rank, size, place, exchange=exchange)
        return
    backend = "nccl" if place.type == "cuda" else "gloo"
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        limit = timedelta(seconds=patience + 60)  # the watch comes first
        dist.init_process_group(backend, timeout=limit, device_id=place if backend == "nccl" else None)
        atexit.register(_destroy)  # and not at the end of the block: a program may join its ranks more than once
    if dist.get_backend() != backend:
        raise ValueError(
            f"device {place.type!r} needs {backend}, and this program's ranks talk through {dist.get_backend()}"
        )
    shape = (size // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh(place.type, shape, mesh_dim_names=("lookahead", "tp"))
    name = torch.tensor(list(os.urandom(8)), dtype=torch.uint8, device=place)
    dist.broadcast(name, 0)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    watch = Watch(rank, size, host, port, patience, f"lookahead/{bytes(name.tolist()).hex()}")
    watch.start()
    ranks = Ranks(rank, size, place, tensor_parallel, exchange, mesh, watch)
    with watch.told_to_end():
        try:
            yield ranks
        except BaseException as error:
            watch.stop(error)
            raise
        watch.stop()


def _device(device: str | torch.device | None, local: int) -> torch.device:
    if device is None:
        device = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", local)
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"rank with local number {local} has no GPU: there are {torch.cuda.device_count()}")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"ranks talk on CPUs (gloo) and NVIDIA GPUs (nccl), not on {place.type!r}")
    return place
