"""Steps that were made ready once: compiled with torch.compile and, on a GPU, captured at a few fixed sizes.

All integers of a captured step, whatever the context, go to the device in one copy; the step is then one launch.
Lengths are among these integers, so the same capture serves every step of its size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .config import LookaheadWarning

SIZES = (1, 8, 32, 64, 128, 256)
"""Rows of a step are padded to one of these, larger ones to a multiple of 256: each size costs a compilation."""

WARM_UPS = 3

Forward = Callable[[Any, torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor], torch.Tensor]
"""model, ids and positions (batch, nodes), rows per kind of mask (batch, 1, nodes, 3 + nodes), index of the rows with
logits (nodes,) to logits (batch, nodes, vocab)."""


PACKED = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "autotune_num_choices_displayed": 0,
    "fx_graph_cache": False,
}
"""Inductor's settings that lay the weights out for a CPU's matrix units: they hold a second copy of the weights.

No graph comes from a cache: those are keyed by shapes, and on a processor without AMX the weights were another model's.
"""


GRAPHS = 64
"""Graphs of one step that torch.compile may hold: models, dtypes, and one sequence or several, have one each."""


class Compiled:
    """A function compiled with torch.compile; if it ever fails it runs as it is from then on, after one warning.

    Args:
        function: what to compile.
        options: settings of torch._inductor while it is compiled.
        dynamic: as for torch.compile.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], options: dict[str, Any] | None = None, dynamic: bool | None = None
    ) -> None:
        self._plain = function
        self._options = options
        import torch._functorch.config
        import torch._inductor.config  # takes a second, which plain use need not pay

        self._compiled: Callable[..., torch.Tensor] | None = torch.compile(function, dynamic=dynamic)

    def __call__(self, *args: Any) -> torch.Tensor:
        if self._compiled is not None:
            try:  # any call may compile, so the settings hold for all
                limit = torch._dynamo.config.patch(recompile_limit=GRAPHS, fail_on_recompile_limit_hit=True)
                options = torch._inductor.config.patch(self._options) if self._options else nullcontext()
                with limit, options, torch._functorch.config.patch(enable_autograd_cache=not self._options):
                    return self._compiled(*args)
            except Exception as error:  # whatever a compiler fails with, the function itself may still run
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"the step could not be compiled and runs uncompiled: {reason}", LookaheadWarning, stacklevel=2
                )
                self._compiled = None
        return self._plain(*args)


def vary(*tensors: torch.Tensor, dimensions: Collection[int] | None = None) -> None:
    """Tell the compiler that sizes of these tensors change from call to call: all, or those of some dimensions.

    A size of 1 is left fixed: a step of one row deserves code of its own.
    """
    for tensor in tensors:
        for dimension in dimensions if dimensions is not None else range(tensor.ndim):
            if tensor.shape[dimension] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def padded(rows: int) -> int:
    """The size that a step of so many rows is padded to."""
    return next((size for size in SIZES if size >= rows), -(-rows // 256) * 256)


@dataclass
class _Step:
    """One size: where its integers go, and what comes of them."""

    host: torch.Tensor
    device: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    rows: list[torch.Tensor]
    keep: torch.Tensor
    graph: torch.cuda.CUDAGraph | None = None
    logits: torch.Tensor | None = None
    best: torch.Tensor | None = None
    bytes: int = 0


class StepGraphs:
    """Runs steps of fixed shape, each size captured at its first use.

    Args:
        forward: evaluates a step; reads nothing but its arguments and memory that stays where it is.
        device: of the model. Only a CUDA device captures; elsewhere a step of fixed shape just runs.
        compile: compile `forward` with torch.compile first. A compiler that fails costs one warning, and the step is
            captured as it is.
    """

    def __init__(self, forward: Forward, device: torch.device, compile: bool) -> None:
        self._forward = Compiled(forward, dynamic=False) if compile else forward
        self._device = device
        self._steps: dict[tuple[int, int], _Step] = {}
        self._pool: Any = None

    @property
    def captured(self) -> dict[tuple[int, int], int]:
        """Bytes held by the captures, by sequences and nodes."""
        return {size: step.bytes for size, step in self._steps.items()}

    def run(
        self, model: Any, ids: np.ndarray, positions: np.ndarray, rows: Sequence[np.ndarray], keep: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate one step whose nodes are padded already.

        Args:
            model: given to `forward`.
            ids, positions: (batch, nodes).
            rows: per kind of mask, (batch, 1, nodes, 3 + nodes), as `encode_rows` gives them.
            keep: nodes that need logits.

        Returns:
            Logits (batch, nodes, vocab) and their argmax (batch, nodes), on the device and valid until the next step;
            the first len(keep) are those of `keep`.
        """
        batch, nodes = ids.shape
        step = self._steps.get((batch, nodes))
        if step is None:
            step = self._steps[batch, nodes] = self._room(batch, nodes, len(rows))
        index = np.zeros(nodes, dtype=np.int32)
        index[: len(keep)] = keep
        flat = [ids.ravel(), positions.ravel(), *(r.ravel() for r in rows), index]
        np.concatenate(flat, out=step.host.numpy(), casting="same_kind")
        step.device.copy_(step.host, non_blocking=True)
        if step.graph is not None:
            step.graph.replay()
        elif self._device.type == "cuda":
            self._capture(model, step)
        else:
            step.logits, step.best = self._evaluate(model, step)
        assert step.logits is not None
        assert step.best is not None
        return step.logits, step.best

    def _room(self, batch: int, nodes: int, kinds: int) -> _Step:
        one, row = batch * nodes, batch * nodes * (3 + nodes)
        total = 2 * one + kinds * row + nodes
        host = torch.zeros(total, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        device = torch.zeros(total, dtype=torch.int32, device=self._device)
        parts = torch.split(device, [one, one, *[row] * kinds, nodes])
        shape = (batch, 1, nodes, 3 + nodes)
        rows = [p.view(shape) for p in parts[2:-1]]
        return _Step(host, device, parts[0].view(batch, nodes), parts[1].view(batch, nodes), rows, parts[-1])

    def _evaluate(self, model: Any, step: _Step) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._forward(model, step.ids.long(), step.positions.long(), step.rows, step.keep.long())
        return logits, logits.argmax(-1)

    def _capture(self, model: Any, step: _Step) -> None:
        before = torch.cuda.memory_allocated()
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._evaluate(model, step)
        torch.cuda.current_stream().wait_stream(stream)
        step.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(step.graph, pool=self._pool):
            step.logits, step.best = self._evaluate(model, step)
        self._pool = self._pool or step.graph.pool()
        step.graph.replay()
        step.bytes = torch.cuda.memory_allocated() - before
