"""The model being served."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..config import EXECUTIONS, LookaheadConfig, LookaheadWarning
from ..draft.tree import TokenTree
from ..price.budget import StepTimes
from ..price.stats import Stats
from ..saved import profile
from ..verify.sampler import StepLogits
from .cache import ROOM
from .evaluate import device_of, text_config, unwrapped
from .memory import memory_of
from .native.program import NoProgramError
from .native.steps import Native, NativeSteps, is_released, native_of, release, step_seconds
from .probe import Steps, Strategy, probe
from .rope import switch_of
from .rows import Lockstep, RowSteps
from .trees import TreeSteps, best_way, not_ready, not_unasked

MARGIN = 8
"""Positions at the end of a model's table that no draft takes: some models count from behind their padding token."""

SINGLE = TokenTree((0,), (-1,))
"""The tree of a sequence's last prompt token, which prefill evaluates."""


class Target:
    """A causal language model that evaluates token trees, for a batch of sequences of their own lengths.

    While a target works, nothing else may use its model, in another thread least of all.

    Args:
        model: what `AutoModelForCausalLM.from_pretrained` gives.
        capacity: slots per sequence: the longest length one can reach, plus the rows of the largest tree.
        batch: sequences.
        execution: how a step runs.
            "eager": as the model is.
            "packed": the same, with native products for few rows, on a CPU, which have a second copy of the weights of
            its linear layers.
            "native": as one call of native code, with such a copy of all weights, on a CPU.
            "captured": padded to fixed shapes and, on a GPU, captured once per size.
            "compiled": compiled with torch.compile, and captured too on a GPU; a CPU takes minutes for it, and in
            bfloat16 holds a second copy of the weights as well.
            "auto": on a GPU "captured", or "eager" with a warning if that cannot be; elsewhere "native" where the model
            has a program and the copy takes at most 2 GiB, or "packed", or "eager".
            A copy is kept for the model's life, and made anew when the weights have changed; of changes made through
            `.data`, a value of every row and of every column is looked at.
        max_rows: of a tree, for which layers with a window keep room.
        released: the model gives up its own weights, and answers by its native program from here on.

    Attributes:
        strategy: how the model checks candidates; see `probe`.
        steps: what evaluates them in that way.
        switch: the position at which its rotary frequencies change, if they do.

    Raises:
        ValueError: the model cannot check candidates, or its step cannot be compiled as asked; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        batch: int = 1,
        execution: str = "auto",
        max_rows: int = ROOM,
        released: bool = False,
    ) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        model = unwrapped(model)
        strategy = probe(model)
        self._set(model, strategy, max_rows)
        self.steps: Steps
        told = memory_of(model).told
        if strategy.drawback and strategy.drawback not in told:
            told.add(strategy.drawback)
            kind = model.config.model_type
            warnings.warn(f"{kind}: {strategy.drawback}; `lookahead doctor` says why", LookaheadWarning, stacklevel=2)
        together = strategy.name == "tree" and (strategy.horizon is None or batch == 1)
        if not together and execution in ("native", "captured", "compiled"):
            raise ValueError(f"execution={execution!r} cannot be: {strategy.drawback}. Leave it out")
        native = self._native(execution, released) if together and strategy.horizon is None else None
        if native is None and (released or is_released(model)):
            raise ValueError(
                "a model can do without its own weights only where its steps run as native code: "
                "leave release out and load the model again; `lookahead doctor` says why they do not"
            )
        if native is not None:
            if released:
                release(model)
            self.steps = NativeSteps(native, model, capacity, batch, strategy.attention, max_rows)
            return
        wanted = best_way(model) if execution == "auto" else execution
        reason = not_ready(model, strategy.attention, wanted) if together or wanted == "packed" else ""
        if strategy.horizon is not None and wanted in (
            "captured",
            "compiled",
        ):  # such a step has no path by the model's mask
            reason = reason or strategy.drawback
        if reason and execution != "auto":
            raise ValueError(f"execution={execution!r} cannot be: {reason}. Leave it out")
        if reason:
            warnings.warn(f"steps run uncompiled: {reason}", LookaheadWarning, stacklevel=2)
        execution = "eager" if reason else wanted
        if together:
            self.steps = TreeSteps(
                model, capacity, batch, strategy.attention, execution, max_rows, strategy.cached_heads
            )
        elif batch == 1:
            execution = execution if execution == "packed" else "eager"
            self.steps = RowSteps(
                model, capacity, strategy.paths or 1, max_rows, copies=strategy.copies, execution=execution
            )
        else:
            self.steps = Lockstep(model, capacity, batch)

    def _native(self, execution: str, released: bool) -> Native | None:
        """The model's program, where steps are to run as one; None where they are not.

        Raises:
            ValueError: that was asked for, and it has none.
        """
        unasked = execution == "auto" and not released and not_unasked(self.model)
        if execution not in ("auto", "native") or unasked:
            return None
        try:
            return native_of(self.model)
        except NoProgramError as error:
            if execution == "native":
                raise ValueError(f"execution='native' cannot be: {error}. Leave it out") from error
            return None

    @classmethod
    def with_attention(
        cls, model: PreTrainedModel, capacity: int, attention: str | None = None, packed: bool = False
    ) -> Target:
        """A target for one sequence and trees with a given attention, unprobed; the model's own by default."""
        target = cls.__new__(cls)
        model = unwrapped(model)
        attention = attention or str(text_config(model)._attn_implementation)
        target._set(model, Strategy("tree", attention))
        target.steps = TreeSteps(model, capacity, 1, attention, "packed" if packed else "eager", ROOM)
        return target

    def _set(self, model: PreTrainedModel, strategy: Strategy, max_rows: int = ROOM) -> None:
        self.model = model
        self.config = text_config(model)
        self.strategy = strategy
        self.switch = switch_of(model)
        self._max_rows = max_rows
        self._text: list[int] | None = []  # of a single sequence; None where its beginning is not known
        self._tree: TokenTree | None = None

    @property
    def attention(self) -> str:
        """That is in force in a step, by its name in transformers' registry."""
        return self.strategy.attention

    @property
    def execution(self) -> str:
        """How a step runs; "eager" is as the model is."""
        return self.steps.execution

    @property
    def row_invariant(self) -> bool:
        """Whether a row's logits do not depend on the rows beside it, bit by bit."""
        return isinstance(self.steps, NativeSteps)

    @property
    def cache(self) -> Cache:
        """Keys and values."""
        return self.steps.cache

    @property
    def plain(self) -> bool:
        """Whether it evaluates roots alone: a batch of a model that takes no trees."""
        return isinstance(self.steps, Lockstep)

    @property
    def fed_again(self) -> int:
        """Accepted tokens that the last forward fed once more, beside its own."""
        return self.steps.fed_again

    @property
    def refeeds(self) -> int:
        """Forwards so far in which accepted tokens were computed again, alone."""
        return self.steps.refeeds

    def fit(self, config: LookaheadConfig) -> LookaheadConfig:
        """A configuration whose trees this target can evaluate.

        Raises:
            ValueError: a window was asked for, and the model's strategy has no place for one.
        """
        if self.strategy.paths is None:
            return config
        if config.window_size is not None and "window" in config.sources:
            raise ValueError(
                f"window_size={config.window_size}: a model of type {self.model.config.model_type!r} is decoded as "
                f"{self.strategy.name}, which has no window ({self.strategy.reasons[0]}); leave it out"
            )
        sources = tuple(source for source in config.sources if source != "window")
        paths = min(self.strategy.paths, config.max_paths or self.strategy.paths)
        return replace(config, sources=sources, max_paths=paths)

    def reach(self, root: int) -> int:
        """How deep a tree may be whose root stands at a position."""
        if self.strategy.horizon is not None and root + self._max_rows > self.strategy.horizon:
            return 0
        table = getattr(self.config, "max_position_embeddings", None) or 0
        within = max(0, table - MARGIN - root) if root < table else 1 << 30  # the text may be longer, by rotations
        return min(within, self.switch.reach(root) if self.switch else 1 << 30)

    def check_length(self, prompt: int, longest: int) -> None:
        """Refuse a text in which rotary frequencies change, where that cannot be followed.

        Args:
            prompt: tokens of the longest sequence before decoding begins.
            longest: tokens that a sequence can reach.

        Raises:
            ValueError: it is one of a batch, or this version of transformers drops the text where they change.
        """
        if self.switch is None or self.plain or longest <= self.switch.position:
            return
        change = f"the model's rotary frequencies change at {self.switch.position} tokens"
        if len(self.lengths) > 1:
            what = f"{change}, and a sequence of this batch can reach {longest}"
            raise ValueError(f"{what}: shorten it, or decode the sequences one by one")
        if self.switch.forgets and prompt <= self.switch.position:
            what = f"{change}, where this version of transformers forgets the text"
            raise ValueError(f"{what}, and this request can reach {longest}: use a newer version, or shorten it")

    def step_times(self, config: LookaheadConfig) -> StepTimes:
        """t(n) of this model, by rows per sequence: as the caller has it, or as steps like this one have shown."""
        if config.fixed_times is not None:
            return StepTimes(config.fixed_times, self.steps.sizes)
        known = memory_of(self.model).times
        device = device_of(self.model)
        key = self.strategy, len(self.lengths), self.execution, self.model.dtype, device, torch.get_num_threads()
        if key not in known:
            known[key] = StepTimes(profile.load(self.machine) or (), self.steps.sizes)
            if isinstance(self.steps, NativeSteps) and config.sources and not known[key].fixed:
                known[key].begin(step_seconds(self.steps.native, self.model, len(self.lengths)))
        return known[key]

    @property
    def machine(self) -> profile.Machine:
        """What the time of a step depends on, besides its rows."""
        return profile.machine_of(self.model, self.execution, len(self.lengths))

    @property
    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return self.steps.lengths

    def report(self, stats: Stats) -> None:
        """Say what decoding cannot see of the steps so far."""
        stats.refeeds = self.refeeds
        stats.row_invariant = self.row_invariant

    @property
    def capacity(self) -> int:
        """Slots per sequence."""
        return self.steps.capacity

    def prefill(self, prompts: Sequence[Sequence[int]], inputs: Mapping[str, Any] | None = None) -> StepLogits:
        """Evaluate the prompts behind what is committed, and return the logits after the last token of each.

        All but the last token is committed. That one is the step's root and waits for `commit`, as after any forward.
        Long prompts go in chunks, which are counted from the end: the last one holds the last token of each.

        Args:
            prompts: token ids of each sequence, without padding, at least one each.
            inputs: of the model's own, such as images, that belong to the prompts.

        Raises:
            ValueError: inputs that come behind a cache where that cannot be.
        """
        if isinstance(self.steps, Lockstep):
            return self.steps.prefill(prompts, inputs)
        starts = self.lengths
        ends = [start + len(prompt) for start, prompt in zip(starts, prompts, strict=True)]
        splits = self.switch is not None and any(map(self.switch.splits, starts, ends))
        if self._text is not None:
            self._text += prompts[0]
        self._tree = None
        if not splits and not inputs:
            return self.steps.prefill(prompts)
        if splits and self.switch and self.switch.renews and 0 < starts[0] <= self.switch.position:
            if inputs:
                raise ValueError("images cannot join a text that the model computes anew here: pass it without a cache")
            return self._anew()
        return self._whole(prompts, inputs, self.lengths[0])

    def _whole(self, prompts: Sequence[Sequence[int]], inputs: Mapping[str, Any] | None, before: int) -> StepLogits:
        """Evaluate prompts in one forward, as `generate` does, behind the first tokens that are committed."""
        assert not isinstance(self.steps, Lockstep)
        if is_released(self.model):
            raise ValueError("the model has given up its own weights, which this prompt needs: load the model again")
        plain = Lockstep(self.model, 0, len(prompts))
        width = max(map(len, prompts))
        if before and len(prompts) > 1:
            raise ValueError("a batch with a cache takes no images: decode the sequences one by one")
        if before:
            self.steps.store(plain.cache, [0])
            plain.load(plain.cache, [range(before)])
        logits = plain.prefill(prompts, inputs)
        rows = [[*range(before), *range(before + width - len(p), before + width)] for p in prompts]
        self.steps.resume(plain.cache, rows, plain.seen)
        return logits

    def _anew(self) -> StepLogits:
        """Evaluate the whole text, of which nothing is committed any more."""
        if self._text is None:
            raise ValueError("the model computes its text anew here, and only its cache is known: pass all ids")
        return self._whole([self._text], None, 0)

    def forward(self, trees: Sequence[TokenTree | None]) -> StepLogits:
        """Evaluate one tree per sequence behind its committed tokens; None where the sequence has ended."""
        self._tree = trees[0]
        if self.switch and self.switch.renews and self.lengths == [self.switch.position] and self._tree:
            if self._text is not None:
                self._text += self._tree.tokens
            self._tree = None
            return self._anew()
        return self.steps.forward(trees)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the keys and values of each path, root first, and drop the rest of the last forward."""
        if self._tree and self._text is not None:
            self._text += [self._tree.tokens[node] for node in paths[0]]
        self.steps.commit(paths)

    def load(self, past: Cache, rows: Sequence[Sequence[int]], text: Sequence[int] | None = None) -> None:
        """Begin with what another cache holds.

        Args:
            past: a cache as `generate` leaves it.
            rows: for each sequence, the slots of `past` that hold its tokens, padding left out.
            text: the tokens of a single sequence, if they are known.
        """
        self._text = None if text is None else list(text)
        self.steps.load(past, rows)

    def store(self, past: Cache, starts: Sequence[int]) -> None:
        """Write everything committed into a dynamic cache, as `generate` would have left it.

        Args:
            past: a dynamic cache of the same model.
            starts: left padding of each sequence.
        """
        self.steps.store(past, starts)
