"""Lookahead parallelism: one step of one batch, divided over ranks that hold a copy of the model each.

Every rank plans the same trees, evaluates its shard of them, and walks that far. One all-gather tells all of them how
far each came, and what the model ranked best at each node; the longest walk is taken by all (arXiv 2402.02057, where
it is called the same). Accepted tokens that a rank did not evaluate itself are fed again, as a chain in front of the
root of its next shard, or their keys and values are sent to it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..config import LookaheadConfig
from ..draft.lookahead import Walk
from ..draft.lookahead import max_rows as max_rows_of
from ..draft.sources import RANKS
from ..draft.tree import TokenTree
from ..model.cache import ROOM
from ..model.memory import memory_of
from ..model.target import Target
from ..model.trees import TreeSteps
from ..price.budget import SHAPES, StepTimes
from ..price.stats import Stats
from ..saved import profile
from ..verify.sampler import Sampler, StepLogits
from .division import Division, Header, Layout, checksum, divided, rows_of
from .group import Ranks

SPARE_NODES = 8
"""Of a rank whose shard is larger than its part of all rows, since some ancestors are in several shards."""

LINK_TOKENS, LINK_TIMES = (1, 16), 5
"""Tokens whose keys and values are sent to measure a link, and how often."""


@dataclass(frozen=True)
class ShardedLogits(StepLogits):
    """Logits of one rank's shards.

    Attributes:
        target: whose step it is.
        division: of that step.
    """

    target: ShardedTarget = field(kw_only=True)
    division: Division = field(kw_only=True)

    def rows(self, sequence: int) -> Mapping[int, int]:
        return rows_of(self.nodes, self.division.places(self.target.ranks.shard, sequence))

    def agree(self, walks: Sequence[Walk | None], samplers: Sequence[Sampler]) -> Sequence[Walk | None]:
        agreed = self.target.exchange(self.division, walks)
        for walk, sampler in zip(agreed, samplers, strict=True):
            if walk is not None:
                sampler.follow(walk.tokens, walk.finish_reason)
        return agreed


class ShardedTarget(Target):
    """A target that evaluates its shard of every tree, and comes to one result with the targets of other ranks.

    All ranks must make the same calls with the same arguments. What is committed is the same on all of them; keys and
    values may lag behind by the tokens of the last step.

    Args:
        ranks: that share the steps; the other arguments are those of `Target`.

    Raises:
        ValueError: also where the model is not the same on all ranks; the message names the rank and what differs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        batch: int = 1,
        execution: str = "auto",
        max_rows: int = ROOM,
        *,
        ranks: Ranks,
    ) -> None:
        super().__init__(model, capacity, batch, execution, 2 * max_rows)  # with what may be fed again in front
        self.ranks = ranks
        ranks.agree(self._facts(), within=("weights",))
        self._layout = Layout(batch, 1, 1)
        self._pending: list[list[list[int]]] = [[[] for _ in range(batch)] for _ in range(ranks.shards)]
        self._division = Division([], [])
        self._steps = 0
        self._digest = 0
        self._times = StepTimes()
        self._in_seconds = False
        self._stats: Stats | None = None
        self._evaluated = 0.0  # when the last forward ended
        self._accounted = 0.0  # of this rank's time in steps
        self._gathering = self._sending = 0.0  # seconds in the last step's all-gather, and in sending keys and values
        self._seconds = self._transfer = 0.0
        self._shard_rows = self._fed_again = self._collectives = self._message_bytes = self._sent_bytes = 0

    def _facts(self) -> dict[str, Any]:
        return {
            "version of lookahead-decoding": profile.Machine.version,
            "version of torch": torch.__version__,
            "version of transformers": transformers.__version__,
            "type of model": self.model.config.model_type,
            "dtype": self.model.dtype,
            "model configuration": _checksum_of(self.model.config),
            "weights": digest_of(self.model),
            "way to check candidates": self.strategy.name,
            "way to run a step": self.execution,
            "batch size": len(self.steps.lengths),
        }

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        own = self._pending[self.ranks.shard]
        return [length + len(tokens) for length, tokens in zip(self.steps.lengths, own, strict=True)]

    @property
    def fed_again(self) -> int:
        return self._fed_again

    def fit(self, config: LookaheadConfig) -> LookaheadConfig:
        """As `Target.fit`.

        Raises:
            ValueError: also where the ranks have other configurations.
        """
        config = super().fit(config)
        self.ranks.agree({"lookahead configuration": config})
        rows = -(-max_rows_of(config) // self.ranks.shards) + SPARE_NODES
        widest = max(w for w, _ in SHAPES) if config.window_size is None else config.window_size
        width = RANKS if "recycled" in config.sources else 1
        self._layout = Layout(len(self.lengths), max(rows, min(widest + 1, config.most_rows)), width)
        return config

    def check_length(self, prompt: int, longest: int) -> None:
        if self.switch is not None and not self.plain and longest > self.switch.position and self.ranks.shards > 1:
            raise ValueError(
                f"the model's rotary frequencies change at {self.switch.position} tokens, and a sequence can reach "
                f"{longest}, which several ranks cannot follow: shorten it, or decode it on one device"
            )
        super().check_length(prompt, longest)

    def step_times(self, config: LookaheadConfig) -> StepTimes:
        """t(n / ranks), since each evaluates its share of n rows."""
        shards = self.ranks.shards
        if config.fixed_times is not None:
            self._times = StepTimes(divided(config.fixed_times, shards))
        else:
            known = memory_of(self.model).times
            key = "divided", shards, self.strategy, len(self.lengths), self.execution, self.model.dtype
            measured = profile.load(self.machine) or []
            same = {int(n) for n in self.ranks.gather(torch.tensor([zlib.crc32(repr(measured).encode())]))}
            if key not in known:
                known[key] = StepTimes(divided(measured, shards) if len(same) == 1 else ())
            self._times = known[key]
        self._in_seconds = config.fixed_times is None
        return self._times

    def prefill(self, prompts: Sequence[Sequence[int]], inputs: Mapping[str, Any] | None = None) -> StepLogits:
        self._catch_up()
        self._digest = checksum([n for prompt in prompts for n in (*prompt, -1)], sum(self.lengths))
        division = Division([TokenTree((prompt[-1],), (-1,)) for prompt in prompts], self._leads())
        with self.ranks.computing():
            return self._divided(division, super().prefill(prompts, inputs))

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        division = Division(trees, self._leads())
        fed = division.fed(self.ranks.shard)
        self._shard_rows += max(len(tree) for tree in fed if tree is not None)
        with self.ranks.computing():
            return self._divided(division, super().forward(fed))

    def _leads(self) -> list[list[list[int]]]:
        return [[list(tokens) for tokens in own] for own in self._pending]

    def _divided(self, division: Division, logits: StepLogits) -> ShardedLogits:
        self._division = division
        self._evaluated = perf_counter()
        live = [b for b, tree in enumerate(division.trees) if tree is not None]
        self._fed_again = max(len(own[b]) for own in division.leads for b in live)
        return ShardedLogits(logits.logits, logits.nodes, logits.best, target=self, division=division)

    def exchange(self, division: Division, walks: Sequence[Walk | None]) -> list[Walk | None]:
        """Tell the other ranks how far this one came, and take the longest walk of each sequence.

        Raises:
            RuntimeError: the ranks have come apart; the message names one.
        """
        now = perf_counter()
        before = self._stats.own_seconds if self._stats is not None else 0.0
        own = before + now - self._evaluated - self._accounted if self._stats is not None else 0.0
        again = self.steps.fed_again
        header = Header(
            self._steps, self._digest, division.digest, again, *map(_micro, (own, self._gathering, self._sending))
        )
        numbers = self._layout.write(header, division.said(self.ranks.shard, walks))
        message = torch.tensor(numbers, dtype=torch.int32)
        gathered = self.ranks.gather(message).tolist()
        self._collectives += 1
        self._message_bytes += message.nbytes
        self._gathering, self._sending = perf_counter() - now, 0.0
        self._accounted = before + now + self._gathering - self._evaluated
        headers, said = zip(*map(self._layout.read, gathered), strict=True)
        self._check(headers)
        self._count(headers)
        self._steps += 1
        per_shard = self.ranks.tensor_parallel
        return [division.longest(b, said, per_shard) for b in range(len(division.trees))]

    def _check(self, headers: Sequence[Header]) -> None:
        for rank, header in enumerate(headers):
            if header[:2] != headers[0][:2]:
                raise RuntimeError(
                    f"rank {rank} has another text than rank 0 in step {self._steps}: every rank must be given the "
                    "same prompts and options"
                )
            if header.trees != headers[0].trees:
                raise RuntimeError(
                    f"rank {rank} has other candidates than rank 0 in step {self._steps}: a source of one's own, or a "
                    "shared pool, must give the same on all ranks"
                )

    def _count(self, headers: Sequence[Header]) -> None:
        """The step took as long as on its slowest rank; a message is on its way while the last rank waits for it."""
        gathering, sending = min(h.gathering for h in headers), min(h.sending for h in headers)
        self._seconds += (max(h.time for h in headers) + gathering) / 1e6
        self._transfer += (gathering + sending) / 1e6
        self._fed_again = max(self._fed_again, *(h.fed_again for h in headers))

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        division, shards, own = self._division, range(self.ranks.shards), self.ranks.shard
        held = [[division.held(shard, b, path) for b, path in enumerate(paths)] for shard in shards]
        before = self.lengths
        super().commit([division.local(own, b, path) for b, path in enumerate(paths)])
        lags = [0] * len(paths)
        for b, (tree, path) in enumerate(zip(division.trees, paths, strict=True)):
            if tree is None or not path:
                continue
            tokens = [tree.tokens[node] for node in path]
            self._digest = checksum([b, *tokens], self._digest)
            for shard in shards:
                self._pending[shard][b] = tokens[held[shard][b] :]
            lags[b] = max(len(pending[b]) for pending in self._pending)
        if any(lags) and self._pays_to_send(lags):
            self._send(paths, held, before)

    def _pays_to_send(self, lags: Sequence[int]) -> bool:
        """Whether sending keys and values is cheaper than feeding the tokens again, as far as is known.

        Args:
            lags: of each sequence, the most tokens that a rank lacks.
        """
        if not isinstance(self.steps, TreeSteps) or self.ranks.exchange == "refeed":
            return False
        if self.ranks.exchange == "send":
            return True
        if not self._in_seconds:
            return False
        rows = max(len(tree) for tree in self._division.trees if tree is not None)
        price = self._times(rows + self.ranks.shards * max(lags)) - self._times(rows)
        each, more = self._measured_link()
        return each + more * sum(lags) < price

    def _measured_link(self) -> tuple[float, float]:
        """Seconds of sending no token's keys and values, and of each one, as the slowest rank sees it."""
        made, name = memory_of(self.model).made, f"link of {self.ranks}"
        start = perf_counter()
        if name not in made:
            size = self.steps.cache.bytes_per_token
            best = []
            for tokens in LINK_TOKENS:
                buffer = torch.zeros(tokens * size, dtype=torch.uint8, device=self.ranks.device)
                times = []
                for _ in range(LINK_TIMES):
                    self.ranks.gather(torch.zeros(1, dtype=torch.int32))  # all begin at once
                    start = perf_counter()
                    self.ranks.share(buffer, 0)
                    if buffer.device.type == "cuda":
                        torch.cuda.synchronize(buffer.device)
                    times.append(perf_counter() - start)
                best.append(min(times))
            slowest = self.ranks.gather(torch.tensor(best, dtype=torch.float64)).amax(0).tolist()
            more = max(0.0, slowest[1] - slowest[0]) / (LINK_TOKENS[1] - LINK_TOKENS[0])
            made[name] = None, (max(0.0, slowest[0] - more * LINK_TOKENS[0]), more)
        self._accounted += perf_counter() - start  # no step took this long
        link: tuple[float, float] = made[name][1]
        return link

    def _send(self, paths: Sequence[Sequence[int]], held: Sequence[Sequence[int]], before: Sequence[int]) -> None:
        """Bring the keys and values of all ranks up to date."""
        start, own = perf_counter(), self.ranks.shard
        cache = self.steps.cache
        wanted: dict[int, list[tuple[int, int]]] = {}  # sequences and the first node that somebody lacks, by source
        for b, path in enumerate(paths):
            first = min(row[b] for row in held)
            if first < len(path):
                source = next(shard for shard, row in enumerate(held) if row[b] == len(path))
                wanted.setdefault(source, []).append((b, first))
        for source, pieces in sorted(wanted.items()):
            counts = [len(paths[b]) - first for b, first in pieces]
            buffer = torch.empty(sum(counts) * cache.bytes_per_token, dtype=torch.uint8, device=self.ranks.device)
            if source == own:
                places = [(b, before[b] + first, count) for (b, first), count in zip(pieces, counts, strict=True)]
                buffer = torch.cat([cache.taken(*place) for place in places])
            self.ranks.share(buffer, source)
            self._collectives += 1
            self._sent_bytes += buffer.nbytes if source == own else 0
            if source != own:
                parts = torch.split(buffer, [count * cache.bytes_per_token for count in counts])
                for (b, first), count, part in zip(pieces, counts, parts, strict=True):
                    cache.put(b, before[b] + first, count, part)
            for b, _ in pieces:
                for rank in self._pending:
                    rank[b] = []
        self._sending += perf_counter() - start

    def store(self, past: Cache, starts: Sequence[int]) -> None:
        self._catch_up()
        super().store(past, starts)

    def _catch_up(self) -> None:
        """Evaluate what this rank lacks, alone; ranks that lack nothing take no part in it."""
        own = self._pending[self.ranks.shard]
        if any(own):
            super().forward([TokenTree(tuple(t), tuple(range(-1, len(t) - 1))) if t else None for t in own])
            super().commit([range(len(tokens)) for tokens in own])
            for pending in self._pending:
                pending[:] = [[] for _ in pending]

    def report(self, stats: Stats) -> None:
        super().report(stats)
        if self._stats is None:  # prefill is no step
            self._stats, self._accounted = stats, stats.own_seconds
        stats.ranks = self.ranks.size
        stats.shared_seconds = self._seconds
        stats.communication_seconds = self._transfer
        stats.shard_rows = self._shard_rows
        stats.collectives = self._collectives
        stats.message_bytes, stats.sent_bytes = self._message_bytes, self._sent_bytes


def digest_of(model: PreTrainedModel) -> str:
    """Of a sample of all weights, those of this rank where they are divided."""
    sums = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            sums.update(f"{name} {tuple(local.shape)} {local.dtype}".encode())
            if type(local) in (torch.Tensor, torch.nn.Parameter) and local.device.type != "meta" and local.numel():
                flat = local.detach().reshape(-1)
                sample = flat[:: max(1, flat.numel() // 64)].cpu().contiguous()
                sums.update(sample.view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()[:16]


def _checksum_of(config: Any) -> str:
    """Of a model's configuration, but for where it was loaded from."""
    content = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _micro(seconds: float) -> int:
    return min(int(seconds * 1e6), 2**31 - 1)
