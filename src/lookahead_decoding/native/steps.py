"""Steps that run as one call of native code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..evaluate import text_config
from ..memory import memory_of
from ..packed import version_of
from ..rope import frequencies_change
from ..sampler import StepLogits
from ..sources import RANKS
from ..tree import TokenTree
from ..trees import TreeSteps
from .library import Step, library, why_no_library
from .program import Made, NoProgramError, pointer, program_of

CHUNK = 192
"""Rows of a call at most: more go in several, which gives the same numbers."""

BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""How far a program's logits may be from the model's own, as a share of their size."""

SAMPLE = 24
"""Tokens on which they are compared."""


class Native:
    """A program with the memory that it works in. It serves one call at a time.

    Args:
        made: the program.
    """

    def __init__(self, made: Made) -> None:
        self.made = made
        self._threads = torch.get_num_threads()
        width = made.hidden if made.dtype == torch.float32 else made.hidden // 2 + made.hidden % 2
        self._residual = torch.empty(CHUNK, made.hidden)
        self._heads = torch.empty(CHUNK, (made.heads + 2 * made.key_heads) * made.size)
        self._attended = torch.empty(CHUNK, made.heads * made.size, dtype=made.dtype)
        self._inner = torch.empty(CHUNK, made.inner, dtype=made.dtype)
        self._normed = torch.empty(self._threads, CHUNK * width + 16)
        self._scores = torch.empty(self._threads, 0)
        self._next = np.zeros(8 * len(made.ops), dtype=np.int64)
        self._program = made.program()
        self._logits = torch.empty(0)

    def run(
        self,
        layers: Sequence[Any],
        ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        prefixes: np.ndarray,
        paths: Sequence[Sequence[int]],
        sequences: np.ndarray,
        keep: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate some rows, at most `CHUNK` of them.

        Args:
            layers: of the cache, with keys and values (batch, key heads, capacity, size).
            ids, positions: of each row.
            slots: where the keys and values of each row go.
            prefixes: slots that each row sees, from the first on.
            paths: slots that it sees behind them, itself the last.
            sequences: of the batch.
            keep: rows that need logits.

        Returns:
            Logits (len(keep), vocab) in float32, and the best tokens of these rows, best first, behind the very best
            one, (len(keep), 1 + RANKS).
        """
        made, threads = self.made, self._threads
        capacity = layers[0].keys.shape[2]
        if int(positions.max()) >= len(made.cosines):
            made.angles(int(positions.max()) + 1)
            self._program = made.program()
        if self._scores.shape[1] < capacity + 32:
            self._scores = torch.empty(threads, capacity + 32)
        if len(self._logits) < len(keep):
            self._logits = torch.empty(len(keep), made.vocabulary)
        logits, found = self._logits[: len(keep)], np.zeros((len(keep), RANKS), dtype=np.int32)
        starts = np.cumsum([0, *map(len, paths)])
        flat = [slot for path in paths for slot in path]
        integers = [positions, slots, prefixes, starts, flat, sequences, keep]
        arrays = [np.ascontiguousarray(part, dtype=np.int32) for part in integers]
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        keys, values = (np.array([pointer(getattr(layer, n)) for layer in layers]) for n in ("keys", "values"))
        step = Step(
            len(ids), len(keep), threads, RANKS, pointer(ids), *map(pointer, arrays), pointer(keys), pointer(values)
        )
        step.by_sequence, step.by_head = layers[0].keys.stride()[:2]
        step.cosines, step.sines = pointer(made.cosines), pointer(made.sines)
        step.residual, step.heads, step.logits = map(pointer, (self._residual, self._heads, logits))
        step.scores, step.normed = pointer(self._scores), pointer(self._normed)
        step.attended, step.inner = pointer(self._attended), pointer(self._inner)
        step.scores_of_a_thread, step.normed_of_a_thread = (4 * t.stride(0) for t in (self._scores, self._normed))
        step.found, step.next = pointer(found), pointer(self._next)
        code = library()
        assert code is not None
        code.lookahead_step(ctypes.byref(self._program), ctypes.byref(step))
        best = torch.from_numpy(found)
        return logits, torch.cat([best[:, :1], best], 1)


class NativeSteps(TreeSteps):
    """Steps of a batch by a native program; the cache is the one that other steps have.

    Args:
        native: the program of the model.

    The other arguments are those of `TreeSteps`.
    """

    def __init__(self, native: Native, model: Any, capacity: int, batch: int, attention: str, room: int) -> None:
        super().__init__(model, capacity, batch, attention, "off", room)
        self.how = "native"
        self._native = native
        made = native.made
        like = torch.empty(0, made.key_heads, 0, made.size, dtype=made.dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """As `Target.forward`."""
        keep = sorted({node for tree in trees if tree is not None for node in tree.scored})
        live = [(b, tree) for b, tree in enumerate(trees) if tree is not None]
        first = dict(zip([b for b, _ in live], np.cumsum([0, *(len(tree) for _, tree in live)]).tolist(), strict=False))
        rows = {b: [first[b] + node if node < len(tree) else first[b] for node in keep] for b, tree in live}
        some = next(iter(rows.values()))
        kept = [row for b in range(len(trees)) for row in rows.get(b, some)]  # an ended one has anybody's
        logits, best = self._run(list(self._rows_of(live)), kept)
        shape = len(trees), len(keep), -1
        return StepLogits(logits.view(shape), tuple(keep), best.view(shape))

    def _prefill(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of the rows in `keep`, (batch, len(keep), vocab)."""
        found = torch.zeros(len(parts), len(keep), self._native.made.vocabulary)
        for b, part in enumerate(parts):
            if part:  # of its own, only the last row is asked for
                found[b] = self._run(list(self._rows_in(part, b)), [len(part) - 1])[0]
        return found

    def _rows_in(self, part: Sequence[int], b: int) -> Iterator[tuple[int, int, int, int, list[int], int]]:
        """As `_rows_of`, of tokens of one sequence in a row."""
        for slot, token in enumerate(part, self.lengths[b]):
            yield token, slot, slot, slot, [slot], b

    def _rows_of(self, live: Sequence[tuple[int, TokenTree]]) -> Iterator[tuple[int, int, int, int, list[int], int]]:
        """Token, position, slot, visible prefix, path and sequence of each row."""
        for b, tree in live:
            held = self.lengths[b]
            paths: list[list[int]] = []
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                paths.append([*(paths[parent] if parent >= 0 else []), held + node])
                yield token, held + len(paths[node]) - 1, held + node, held, paths[node], b

    def _run(self, rows: Sequence[Any], keep: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Native.run`, in as many calls as it takes; no row sees one of a later call."""
        shift = int(self._shifts[0])
        logits, best = [], []
        for at in range(0, len(rows), CHUNK):
            ids, positions, slots, prefixes, paths, sequences = zip(*rows[at : at + CHUNK], strict=True)
            kept = [row - at for row in keep if at <= row < at + CHUNK]
            found = self._native.run(
                self.cache.layers,
                np.array(ids),
                np.array(positions) + shift,
                np.array(slots),
                np.array(prefixes),
                paths,
                np.array(sequences),
                kept,
            )
            logits.append(found[0].clone() if len(rows) > CHUNK else found[0])
            best.append(found[1])
        if len(logits) == 1:
            return logits[0], best[0]
        order = sorted(range(len(keep)), key=lambda i: keep[i] // CHUNK)  # stable: the rows of a call as they stand
        back = torch.tensor(order).argsort()
        return torch.cat(logits)[back], torch.cat(best)[back]


def native_of(model: Any) -> Native:
    """The program of a model, proven; made anew when its weights have changed.

    Raises:
        NoProgramError: it has none; the message says why.
    """
    made = memory_of(model).made
    state = version_of(model), model.training, tuple(m for m in model.modules() if "forward" in vars(m))
    if "native" not in made or made["native"][0] != state:
        made.pop("native", None)
        made["native"] = state, _proven(model)
    found: Native | NoProgramError = made["native"][1]
    if isinstance(found, NoProgramError):
        raise found
    return found


def _proven(model: Any) -> Native | NoProgramError:
    """A program whose logits are those of the model, up to rounding."""
    reason = why_no_library()
    if not reason and frequencies_change(model):
        reason = "its rotary frequencies change with the length of the text"
    if reason:
        return NoProgramError(reason)
    try:
        with torch.inference_mode(False), torch.no_grad():
            native = Native(program_of(model, text_config(model)))
            off = _difference(native, model)
    except NoProgramError as error:
        return error
    if not off <= BOUND[native.made.dtype]:
        return NoProgramError(f"its logits differ from the program's by {off:.1%}")
    return native


def _difference(native: Native, model: Any) -> float:
    """How far the logits of a few tokens are from the model's own."""
    steps = NativeSteps(native, model, SAMPLE + 8, 1, str(text_config(model)._attn_implementation), 8)
    ids = [(7 * i + 3) % native.made.vocabulary for i in range(SAMPLE)]
    if any(slots.window is not None for slots in steps.cache.all_slots):
        raise NoProgramError("it has layers with a window")
    ours = steps._run(list(steps._rows_in(ids, 0)), range(SAMPLE))[0].double()
    wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return float((ours - wanted).norm() / wanted.norm())
