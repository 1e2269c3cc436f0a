"""Steps that run as one call of native code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int32, c_int64, c_void_p
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch

from ...draft.sources import RANKS
from ...draft.tree import TokenTree
from ...verify.sampler import StepLogits
from ..cache import TreeCache
from ..evaluate import as_written, text_config
from ..graphs import state_of
from ..memory import memory_of
from ..packed import version_of
from ..rope import frequencies_change
from ..trees import TreeSteps
from .library import Step, kind, library, why_no_library
from .program import Made, NoProgramError
from .recipes import read

CHUNK = 192
"""Rows of a call at most: more go in several, which gives the same numbers."""

BOUND = 1e-4
"""How far a program's logits may be from the model's own in float32, as a share of their size."""

NOISE = 1.25
"""In half precision, how far they may be from what the same weights give in float32; the model's own are 1 away."""

TIMED = (1, 4, 8, 12, 16, 32, 64)
"""Rows of the steps that are timed before a model's first answer."""

TIMED_AT = 128
"""Tokens of context there."""

APART = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""By how much what a layer gives may differ, as a share of its size, before it is said to be the one that differs."""

SAMPLE = 24
"""Tokens on which they are compared."""

LONGEST = 1024
"""Windows up to this size are passed by that comparison."""

SHARING, SPAN, TILE = 64, 256, 16
"""Queries that share keys, positions of a block and of a tile of attention, as `step.h` has them."""

PARTIALS = 1 << 24
"""Numbers that the blocks of a call's rows give, at most, before they are put together."""


Row = tuple[int, int, int, Sequence[int], int]
"""A row of a step: its token, its position, how many positions from the first on it sees, the nodes of its path, and
its sequence. Node n stands behind those positions, n further on."""


class Native:
    """A program with the memory that it works in. It serves one call at a time.

    Args:
        made: the program.
    """

    def __init__(self, made: Made) -> None:
        self.made = made
        heads = (made.heads + 2 * made.key_heads) * made.size
        self._residual = torch.empty(CHUNK, made.hidden, dtype=torch.float32)
        self._heads = torch.empty(CHUNK, max(heads, made.hidden), dtype=torch.float32)
        self._attended = torch.empty(CHUNK, made.heads * made.size, dtype=torch.float32)  # or half of that, in bfloat16
        self._inner = torch.empty(CHUNK, made.inner, dtype=torch.float32)
        self._normed = torch.empty(0, CHUNK * made.hidden + 32, dtype=torch.float32)  # of each thread
        scores = SHARING * SPAN + (2 * SHARING + TILE) * made.size
        self._scores = torch.empty(0, scores, dtype=torch.float32)  # of each thread
        self._partials = torch.empty(0, dtype=torch.float32)
        self._next = torch.zeros(8 * len(made.ops), dtype=torch.int64)
        self._program = made.program()
        self._logits = torch.empty(0, dtype=torch.float32)
        self._angles: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._step = self._places()

    def run(
        self, cache: TreeCache, rows: Sequence[Row], keep: Sequence[int], shift: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Evaluate some rows, at most `CHUNK` of them, and write their keys and values.

        Args:
            cache: with keys and values in every layer.
            keep: rows that need logits.
            shift: from a position to what the model calls it.

        Returns:
            Logits (len(keep), vocab) in float32, and the best tokens of these rows, best first, behind the very best
            one, (len(keep), 1 + RANKS).
        """
        threads = torch.get_num_threads()
        assert len(keep) <= len(rows) <= CHUNK
        ids, positions, prefixes, paths, sequences = zip(*rows, strict=True)
        if not 0 <= min(ids) <= max(ids) < self.made.tokens:
            raise IndexError(f"token ids must be from 0 to {self.made.tokens - 1}")
        if self.made.positions and max(positions) + shift >= self.made.positions:
            raise IndexError(f"the model has learned {self.made.positions} positions, and the text is longer")
        blocks = self._blocks(rows)
        self._make_room(max(positions) + shift + 1, len(rows) * self._partial(blocks), len(keep), threads)
        logits = self._logits[: len(keep)]
        best = torch.empty(len(keep), 1 + RANKS, dtype=torch.int32)
        starts = [0, *accumulate(map(len, paths))]
        flat = [node for path in paths for node in path]
        spans, layers = cache.all_slots, cache.layers
        first = [next(layer.keys for layer in layers if layer.slots is slots) for slots in spans]
        step = Step.from_buffer_copy(self._step)  # with all that is the same in every step
        step.rows, step.kept, step.threads, step.sequences = len(rows), len(keep), threads, len(cache.lengths)
        arrays = {
            "ids": (c_int64, ids),
            "angle": (c_int32, [position + shift for position in positions] if shift else positions),
            "prefix": (c_int32, prefixes),
            "start": (c_int32, starts),
            "path": (c_int32, flat),
            "sequence": (c_int32, sequences),
            "keep": (c_int32, keep),
            "keys": (c_void_p, [layer.keys.data_ptr() for layer in layers]),
            "values": (c_void_p, [layer.values.data_ptr() for layer in layers]),
            "origin": (c_int32, [start for slots in spans for start in slots.starts]),
            "by_sequence": (c_int64, [buffer.stride(0) for buffer in first]),
            "by_head": (c_int64, [buffer.stride(1) for buffer in first]),
        }
        held = [(kind * len(numbers))(*numbers) for kind, numbers in arrays.values()]  # type: ignore[misc]
        for name, array in zip(arrays, held, strict=True):
            setattr(step, name, ctypes.addressof(array))
        step.found, step.blocks = best.data_ptr(), blocks
        code = library()
        assert code is not None
        code.lookahead_step(ctypes.byref(self._program), ctypes.byref(step), kind())
        return logits, best

    def most(self, rows: Sequence[Row]) -> int:
        """How many of these rows a call may have."""
        return min(CHUNK, max(TILE, PARTIALS // max(1, self._partial(self._blocks(rows)))))

    def _blocks(self, rows: Sequence[Row]) -> int:
        """Blocks of positions that a row sees, at most."""
        return max(prefix + len(path) for _, _, prefix, path, _ in rows) // SPAN + 1

    def _partial(self, blocks: int) -> int:
        """Numbers that the blocks of a row give; a single one needs no place for them."""
        return 0 if blocks == 1 else blocks * self.made.heads * (self.made.size + 2)

    def _make_room(self, positions: int, partials: int, kept: int, threads: int) -> None:
        """See that there are angles, scores, partial sums and logits for so many."""
        before = self._angles, self._normed, self._partials, self._logits
        if self.made.tables and (not self._angles or len(self._angles[0][0]) < positions):
            self._angles = [table(max(512, 2 * positions)) for table in self.made.tables]
        if len(self._normed) < threads:
            self._normed = torch.empty(threads, self._normed.shape[1], dtype=torch.float32)
            self._scores = torch.empty(threads, self._scores.shape[1], dtype=torch.float32)
        if len(self._partials) < partials:
            self._partials = torch.empty(partials, dtype=torch.float32)
        if len(self._logits) < kept:
            self._logits = torch.empty(kept, self.made.vocabulary, dtype=torch.float32)
        after = self._angles, self._normed, self._partials, self._logits
        if any(old is not new for old, new in zip(before, after, strict=True)):
            self._step = self._places()

    def _places(self) -> Step:
        """A step with the places of all that is kept from step to step."""
        step = Step(best=RANKS)
        for name in "residual heads logits scores normed attended inner partials".split():
            setattr(step, name, getattr(self, f"_{name}").data_ptr())
        step.scores_of_a_thread, step.normed_of_a_thread = 4 * self._scores.shape[1], 4 * self._normed.shape[1]
        step.next = self._next.data_ptr()
        tables = [[table[i].data_ptr() for table in self._angles] for i in (0, 1)]
        self._tables = [(c_void_p * len(places))(*places) for places in tables]
        step.cosines, step.sines = map(ctypes.addressof, self._tables)
        return step


class NativeSteps(TreeSteps):
    """Steps of a batch by a native program; the cache is the one that other steps have.

    Args:
        native: the program of the model.

    The other arguments are those of `TreeSteps`.
    """

    def __init__(self, native: Native, model: Any, capacity: int, batch: int, attention: str, room: int) -> None:
        super().__init__(model, capacity, batch, attention, "eager", room)
        self.execution = "native"
        self.native = native
        made = native.made
        like = torch.empty(0, made.key_heads, 0, made.size, dtype=made.dtype)
        for layer in self.cache.layers:
            layer.lazy_initialization(like, like)

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """As `Target.forward`."""
        keep = sorted({node for tree in trees if tree is not None for node in tree.scored})
        live = [(b, tree) for b, tree in enumerate(trees) if tree is not None]
        first = dict(zip([b for b, _ in live], accumulate((len(tree) for _, tree in live), initial=0), strict=False))
        rows = {b: [first[b] + node if node < len(tree) else first[b] for node in keep] for b, tree in live}
        some = next(iter(rows.values()))
        wanted = [row for b in range(len(trees)) for row in rows.get(b, some)]  # an ended one has anybody's
        kept = sorted(set(wanted))
        self.cache.make_room(max(len(tree) for _, tree in live))
        logits, best = self._run(list(self._rows_of(live)), kept)
        if kept != wanted:
            place = {row: i for i, row in enumerate(kept)}
            back = torch.tensor([place[row] for row in wanted])
            logits, best = logits[back], best[back]
        shape = len(trees), len(keep), -1
        return StepLogits(logits.view(shape), tuple(keep), best.view(shape))

    def _chunk(self, prompts: Sequence[Sequence[int]]) -> int:
        return min(CHUNK, self.cache.chunk)

    def _prefill(self, parts: Sequence[Sequence[int]], keep: list[int]) -> torch.Tensor:
        """Logits of the rows in `keep`, (batch, len(keep), vocab)."""
        found = torch.zeros(len(parts), len(keep), self.native.made.vocabulary, dtype=torch.float32)
        self.cache.make_room(max(map(len, parts)))
        for b, part in enumerate(parts):
            if part:  # of its own, only the last row is asked for
                found[b] = self._run(list(self._rows_in(part, b)), [len(part) - 1])[0]
        return found

    def _rows_in(self, part: Sequence[int], b: int) -> Iterator[Row]:
        """Rows of a sequence's tokens, each behind all before it."""
        for position, token in enumerate(part, self.lengths[b]):
            yield token, position, position, (0,), b

    def _rows_of(self, live: Sequence[tuple[int, TokenTree]]) -> Iterator[Row]:
        """Rows of trees."""
        for b, tree in live:
            held = self.lengths[b]
            paths: list[tuple[int, ...]] = []
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                paths.append((*(paths[parent] if parent >= 0 else ()), node))
                yield token, held + len(paths[node]) - 1, held, paths[node], b

    def _run(self, rows: Sequence[Row], keep: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Native.run`, in as many calls as it takes; no row sees one of a later call, and `keep` ascends."""
        shift = int(self._shifts[0])
        most = self.native.most(rows)
        if len(rows) <= most:
            return self.native.run(self.cache, rows, keep, shift)
        found = []
        for at in range(0, len(rows), most):
            kept = [row - at for row in keep if at <= row < at + most]
            logits, best = self.native.run(self.cache, rows[at : at + most], kept, shift)
            found.append((logits.clone(), best))
        return torch.cat([logits for logits, _ in found]), torch.cat([best for _, best in found])


def native_of(model: Any) -> Native:
    """The program of a model, proven; made anew when its weights have changed.

    Raises:
        NoProgramError: it has none; the message says why.
    """
    if is_released(model) and _kept(model) is None:
        raise NoProgramError("its weights were given up, and their copy is gone or is of another state of the model")
    if any(type(p) is not torch.nn.Parameter or p.device.type != "cpu" for p in model.parameters()):
        raise NoProgramError("its weights are not plain ones on the CPU")
    changed = (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    if any(changed) or torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        raise NoProgramError("hooks hang on its modules, or their forward was replaced")
    found = _kept(model)
    if found is None:
        made = memory_of(model).made
        made.pop("native", None)  # gives its memory back first
        found = _proven(model)
        made["native"] = _version(model), found
    if isinstance(found, str):
        raise NoProgramError(found)
    return found


def release(model: Any) -> None:
    """Give up a model's own weights: what is left of them is the copy that its program has.

    Raises:
        NoProgramError: it has no program; the message says why.
    """
    native = native_of(model)
    memory_of(model).made.pop("packed", None)
    for parameter in () if is_released(model) else model.parameters():
        parameter.released = tuple(parameter.shape)
        parameter.data = parameter.data.new_empty(0)
    memory_of(model).made["native"] = _version(model), native


def is_released(model: Any) -> bool:
    """Whether a model has given up its own weights."""
    return all(hasattr(p, "released") and not p.numel() for p in model.parameters())


def _version(model: Any) -> object:
    """Equal as long as a program of the model is right."""
    return version_of(model), state_of(model)


def _kept(model: Any) -> Native | str | None:
    """The program that was made of a model as it is, or why there is none; None if that has not been tried."""
    version, found = memory_of(model).made.get("native", (None, None))
    return found if version == _version(model) else None


def why_no_native(model: Any) -> str:
    """Why a model's steps do not run as native code; empty if they can."""
    try:
        native_of(model)
    except NoProgramError as error:
        return str(error)
    return ""


def step_seconds(native: Native, model: Any, batch: int = 1) -> list[tuple[int, float]]:
    """Rows of each sequence and seconds of a step, measured, in increasing order of rows: the least of a few."""
    sizes = [rows for rows in TIMED if rows == 1 or rows * batch <= TIMED[-1]]
    room = (native.made.positions or 1 << 30) - sizes[-1] - 1
    if room < 0:
        return []
    attention = str(text_config(model)._attn_implementation)
    steps = NativeSteps(native, model, TIMED_AT + sizes[-1], batch, attention, sizes[-1])
    steps.cache.lengths[:] = [min(TIMED_AT, room, steps.cache.chunk)] * batch
    found = []
    for rows in sizes:
        tree, times = TokenTree((1,) * rows, (-1, *range(rows - 1))), []
        for _ in range(3):
            start = perf_counter()
            steps.forward([tree] * batch)
            times.append(perf_counter() - start)
        found.append((rows, min(times)))
    return found


def _proven(model: Any) -> Native | str:
    """A program whose logits are those of the model, up to rounding; or why there is none."""
    reason = why_no_library()
    if not reason and frequencies_change(model):
        reason = "its rotary frequencies change with the length of the text"
    if reason:
        return reason
    try:
        with torch.inference_mode(False), torch.no_grad(), as_written(model):
            off, where = float("inf"), ""
            for pairs in (False, True):
                native = None  # the first one's memory, before there is a second
                native = Native(_made(model, pairs))
                found = _difference(native, model)
                if found <= 1:
                    return native
                if found < off:
                    off, where = found, _where(native, model)
    except NoProgramError as error:
        return str(error)
    except Exception as error:  # of a model unlike all others, which then runs as it is
        return f"no program can be made of it ({type(error).__name__}: {error})"
    return f"its logits differ from the program's, by {off:.1f} times what rounding explains{where}"


def _made(model: Any, pairs: bool = False) -> Made:
    """The program of a model, with the slots that a cache of it has; `pairs` as for `read`."""
    config = text_config(model)
    cache = TreeCache(config, 1, 8)
    if cache.stateful or any(not hasattr(layer, "slots") for layer in cache.layers):
        raise NoProgramError("it has layers that keep more than keys and values")
    slots = [layer.slots for layer in cache.layers]
    chunked = any(span.chunked for span in cache.kinds.values())
    windows = [-(one.window or 0) if chunked else one.window or 0 for one in slots]
    return read(model, config, [cache.all_slots.index(one) for one in slots], windows, pairs)


def _difference(native: Native, model: Any) -> float:
    """How far the logits of some tokens are from the model's, past every window that is not too long for that.

    The unit is what rounding explains: in float32 a bound, in half precision the model's own distance from float32.
    """
    windows = [slots.window for slots in TreeCache(text_config(model), 1, 8).all_slots if slots.window]
    length = max([SAMPLE, *(window + SAMPLE for window in windows if window <= LONGEST)])
    ids = [(7 * i + 3) % native.made.tokens for i in range(length)]
    steps = NativeSteps(native, model, length + SAMPLE, 1, str(text_config(model)._attn_implementation), SAMPLE)
    ours = []
    for token in range(0, length, SAMPLE):
        part = ids[token : token + SAMPLE]
        steps.cache.make_room(len(part))
        ours.append(steps._run(list(steps._rows_in(part, 0)), range(len(part)))[0].clone())
        steps.commit([range(len(part))])
    found = torch.cat(ours).double()

    def logits() -> torch.Tensor:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()  # type: ignore[no-any-return]

    own = logits()
    if native.made.dtype == torch.float32:
        return float((found - own).norm() / (BOUND * own.norm()))
    with _in_float32(model):
        exact = logits()
    return float((found - exact).norm() / (NOISE * (own - exact).norm()))


def _where(native: Native, model: Any) -> str:
    """Where the program of a model first gives something else, in words; empty if that cannot be told."""
    seen: list[torch.Tensor] = []

    def look(module: Any, given: Any, result: Any) -> None:
        seen.append((result[0] if isinstance(result, tuple) else result).detach().double().reshape(-1, hidden))

    made, hidden = native.made, native.made.hidden
    hooks = [layer.register_forward_hook(look) for layer, _ in made.layers]
    ids = [(7 * i + 3) % made.tokens for i in range(SAMPLE)]
    try:
        with _in_float32(model):
            model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    steps = NativeSteps(native, model, SAMPLE, 1, str(text_config(model)._attn_implementation), SAMPLE)
    steps.cache.make_room(SAMPLE)
    rows, whole = list(steps._rows_in(ids, 0)), native._program.count
    try:
        for number, (wanted, (_, native._program.count)) in enumerate(zip(seen, made.layers, strict=True)):
            steps._run(rows, [SAMPLE - 1])
            if (native._residual[:SAMPLE].double() - wanted).norm() > APART[made.dtype] * wanted.norm():
                return f", first in layer {number} of {len(seen)}"
    finally:
        native._program.count = whole
    return ", first in its last norm or its head"


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """Inside, a model computes in float32: each module's weights are widened while it runs, and no others."""
    narrow: dict[int, torch.Tensor] = {}

    def widen(module: Any, given: Any) -> None:
        for parameter in module.parameters(recurse=False):
            narrow[id(parameter)] = parameter.data
            parameter.data = parameter.data.float()

    def back(module: Any, given: Any, result: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = narrow.pop(id(parameter), parameter.data)

    hooks = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(back, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
