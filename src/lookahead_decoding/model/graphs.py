"""Steps that were made ready once: compiled with torch.compile and, on a GPU, captured at a few fixed sizes.

A captured step is one launch: all its integers go to the device in one copy, whatever the context, and what the walk
needs of its logits, the best tokens of each row, comes back in another. Lengths are among the integers, so the same
capture serves every step of its size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..config import LookaheadWarning
from ..draft.sources import RANKS
from ..verify.sampler import top_tokens
from .fused import Fused

SIZES = (1, 16, 64, 128, 256)
"""Rows of a step are padded to one of these, larger ones to a multiple of 256: each size costs a capture."""

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

    Raises:
        ValueError: this torch is too old.
    """

    def __init__(
        self, function: Callable[..., torch.Tensor], options: dict[str, Any] | None = None, dynamic: bool | None = None
    ) -> None:
        self._plain = function
        self._options = options
        import torch._functorch.config
        import torch._inductor.config  # takes a second, which plain use need not pay

        if not hasattr(torch._dynamo.config, "recompile_limit"):  # where transformers' own wrappers do not compile
            raise ValueError(f"execution='compiled' needs torch 2.7 or later, and this is {torch.__version__}")
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


Run = Callable[[], None]

Recorder = Callable[[Run], Run]
"""Runs something once, and gives what runs it again in one launch, on the same memory."""


class CudaRecorder:
    """Captures what it runs as a CUDA graph: on one stream and in one memory pool, whatever the size.

    Args:
        device: of all tensors; the caller's current device does not matter.

    Raises:
        RuntimeError: something in it cannot be captured, such as a number that is read back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None
        self._pool: Any = None

    def __call__(self, run: Run) -> Run:
        with torch.cuda.device(self._device):
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(self._stream)
            pool = self._pool or torch.cuda.graph_pool_handle()
            self._pool = None  # a capture that fails leaves a pool that no other may use
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=self._stream):
                run()
            self._pool = pool
            graph.replay()
        return graph.replay


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures steps on a device; None where they just run."""
    return CudaRecorder(device) if device.type == "cuda" else None


def state_of(model: Any) -> tuple[object, ...]:
    """All that a captured step depends on beside its inputs: it serves as long as this is equal.

    Where the weights lie (what is in them may change), which adapters are on and how strongly, what hangs on the
    modules, whether the model trains, and automatic mixed precision.
    """
    places = [t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors]
    modules = list(model.modules())
    adapters = [
        (m.disable_adapters, *map(tuple, (m.active_adapters, m.merged_adapters, getattr(m, "scaling", {}).items())))
        for m in modules
        if hasattr(m, "merged_adapters")
    ]
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    forwards = [m.__dict__["forward"] for m in modules if "forward" in m.__dict__]
    kind = next(model.parameters()).device.type
    mixed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return tuple(places), tuple(adapters), tuple(hooks), tuple(forwards), model.training, mixed


@dataclass
class _Step:
    """One size: where its integers go, and what comes of them.

    Attributes:
        best: on the host, the argmax of each row and then its best tokens, (batch, nodes, 1 + ranks).
        replay: runs it anew, once it is captured.
        failed: it could not be captured, and runs as it is.
    """

    host: torch.Tensor
    device: torch.Tensor
    ids: torch.Tensor
    positions: torch.Tensor
    rows: list[torch.Tensor]
    keep: torch.Tensor
    replay: Run | None = None
    failed: bool = False
    logits: torch.Tensor | None = None
    best: torch.Tensor | None = None
    bytes: int = 0


class StepGraphs:
    """Runs steps of fixed shape, each size captured at its first use; what cannot be captured runs as it is.

    Args:
        forward: evaluates a step; reads nothing but its arguments and memory that stays where it is.
        device: of the model. Only a CUDA device captures; elsewhere a step of fixed shape just runs.
        execution: compile `forward` with torch.compile first. A compiler that fails costs one warning, and the step is
            captured as it is.
        around: what `forward` runs inside of; nothing of it is replayed.
    """

    def __init__(
        self,
        forward: Forward,
        device: torch.device,
        execution: bool,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._around = around
        self._forward = Compiled(forward, dynamic=False) if execution else forward
        self._fuses = not execution  # a compiler does by itself
        self._device = device
        self._recorder = recorder_for(device)
        self._steps: dict[tuple[int, int], _Step] = {}

    @property
    def captured(self) -> dict[tuple[int, int], int]:
        """Bytes held by the captures, by sequences and nodes."""
        return {size: step.bytes for size, step in self._steps.items() if step.replay}

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
            Logits (batch, nodes, vocab) on the device, and on the host the argmax of each row with its best tokens
            behind it, (batch, nodes, 1 or more); valid until the next step. The first len(keep) are those of `keep`.
        """
        batch, nodes = ids.shape
        step = self._steps.get((batch, nodes))
        if step is None:
            step = self._steps[batch, nodes] = self._room(batch, nodes, len(rows))
        index = np.zeros(nodes, dtype=np.int32)
        index[: len(keep)] = keep
        flat = [ids.ravel(), positions.ravel(), *(r.ravel() for r in rows), index]
        np.concatenate(flat, out=step.host.numpy(), casting="same_kind")
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            if step.replay is not None:
                step.replay()
            elif self._recorder is None or step.failed:
                self._evaluate(model, step)
            else:
                self._capture(self._recorder, model, step)
            if self._device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        assert step.logits is not None
        assert step.best is not None
        return step.logits, step.best

    def _room(self, batch: int, nodes: int, kinds: int) -> _Step:
        one, row = batch * nodes, batch * nodes * (3 + nodes)
        total = 2 * one + kinds * row + nodes
        with torch.inference_mode(False):  # the caller's, which may end before the next request
            host = torch.zeros(total, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            device = torch.zeros(total, dtype=torch.int32, device=self._device)
        parts = torch.split(device, [one, one, *[row] * kinds, nodes])
        shape = (batch, 1, nodes, 3 + nodes)
        rows = [p.view(shape) for p in parts[2:-1]]
        return _Step(host, device, parts[0].view(batch, nodes), parts[1].view(batch, nodes), rows, parts[-1])

    def _evaluate(self, model: Any, step: _Step) -> None:
        step.device.copy_(step.host, non_blocking=True)
        with self._around():
            step.logits = self._forward(model, step.ids.long(), step.positions.long(), step.rows, step.keep.long())
        best = step.logits.argmax(-1, keepdim=True)
        if best.shape[1] > 1:  # a step of one row is most often plain, and then nothing is learned from it
            best = torch.cat([best, top_tokens(step.logits, RANKS)], -1)
        if step.best is None:
            with torch.inference_mode(False):
                step.best = torch.zeros(best.shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        step.best.copy_(best.int(), non_blocking=True)

    def _capture(self, recorder: Recorder, model: Any, step: _Step) -> None:
        """Run a step for the first time, so that it is captured afterwards; or, if that cannot be, as it is."""
        before = torch.cuda.memory_allocated() if self._device.type == "cuda" else 0
        try:
            around = Fused(model) if self._fuses else nullcontext()

            def run() -> None:
                with around:
                    self._evaluate(model, step)

            step.replay = recorder(run)
        except Exception as error:  # whatever a capture fails with, the step itself may still run
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"a step of {step.ids.shape[1]} rows could not be captured and runs as it is: {reason}"
            warnings.warn(what, LookaheadWarning, stacklevel=2)
            step.failed = True
            self._evaluate(model, step)
        step.bytes = torch.cuda.memory_allocated() - before if self._device.type == "cuda" else 0
