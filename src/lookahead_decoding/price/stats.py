"""What a call did, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..draft.lookahead import Choice
from ..draft.sources import SourceCount
from ..draft.tree import TokenTree

PHASES = ("plan", "forward", "choose", "observe", "commit")


@dataclass(repr=False)
class Stats:
    """Counts of one call of `generate`, over all its sequences.

    A forward is one call of the target, prefill included, and a step is a forward after prefill. With several
    sequences a forward serves all of them, so the ratios count each sequence's own steps and forwards.

    Attributes:
        sequences: sequences of the call.
        tokens: tokens emitted.
        forwards: forwards of the target.
        sequence_forwards: the same, counted once per sequence that still ran.
        accepted: draft tokens that matched and were kept.
        drafted: draft tokens put up for verification.
        rows: nodes fed in steps, padding included.
        plain_steps: steps that fed the current tokens alone.
        refeeds: forwards in which accepted tokens were computed again, alone, to bring a recurrent state up to date.
        sources: drafts by the name of their source: "suffix" (of prompt and output), "recycled", "window", "shared",
            "own", and "pool" (n-grams of prompt and output with the paper's).
        seconds: time in prefill and in each part of a step, by name.
        row_invariant: a row's logits did not depend on the rows beside it, so the tokens are those of plain decoding by
            the same steps, in any dtype.
        ranks: that shared the steps.
        shared_seconds: time in all steps as the ranks agree on it, that of the slowest in each; None for a single one.
        communication_seconds: of these, in which data was on its way; waiting for the slowest rank is left out.
        shard_rows: rows that this rank was fed in steps, accepted tokens that it was fed again included.
        collectives: of all forwards: one each to agree, and one per rank that sent keys and values.
        message_bytes: that this rank said in order to agree.
        sent_bytes: of keys and values that it sent.
    """

    sequences: int = 0
    tokens: int = 0
    forwards: int = 0
    sequence_forwards: int = 0
    accepted: int = 0
    drafted: int = 0
    rows: int = 0
    plain_steps: int = 0
    refeeds: int = 0
    sources: dict[str, SourceCount] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("prefill", *PHASES), 0.0))
    row_invariant: bool = False
    ranks: int = 1
    shared_seconds: float | None = None
    communication_seconds: float = 0.0
    shard_rows: int = 0
    collectives: int = 0
    message_bytes: int = 0
    sent_bytes: int = 0

    @property
    def summary(self) -> str:
        """The counts in words."""
        if not self.forwards:
            return "no call yet"
        fed = f"{self.rows_per_step:.1f} rows per step, {self.plain_share:.0%} of them plain"
        drafts = ", ".join(f"{name} {one.accepted} of {one.proposed}" for name, one in self.sources.items())
        given = f"{self.tokens} tokens in {self.forwards} forwards, {self.mean_acceptance_length:.2f} tokens per step"
        return f"{given}, {fed}" + (f"; accepted: {drafts}" if drafts else "")

    def __repr__(self) -> str:
        return f"<Stats: {self.summary}>"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        facts = {
            "tokens": self.tokens,
            "forwards": self.forwards,
            "tokens per step": f"{self.mean_acceptance_length:.2f}",
            "rows per step": f"{self.rows_per_step:.1f}",
            "plain steps": f"{self.plain_share:.0%}",
        }
        for name, one in self.sources.items():
            facts[f"guesses from {name}"] = f"{one.accepted} of {one.proposed} accepted"
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in facts.items())
        return f"<table>{rows}</table>"

    def count(self, trees: Sequence[TokenTree | None], choices: Sequence[Choice | None]) -> None:
        """Add one forward: the trees that were fed and what came of each."""
        live = [(tree, choice) for tree, choice in zip(trees, choices, strict=True) if tree and choice]
        if self.forwards:
            longest = max(len(tree) for tree, _ in live)
            self.rows += len(trees) * longest
            self.plain_steps += longest == 1
        self.sequences = max(self.sequences, len(trees))
        self.forwards += 1
        self.sequence_forwards += len(live)
        self.tokens += sum(len(choice.tokens) for _, choice in live)
        self.accepted += sum(len(choice.path) - 1 for _, choice in live)
        self.drafted += sum(len(tree) - tree.first_candidate for tree, _ in live)

    @property
    def steps(self) -> int:
        """Forwards after prefill."""
        return max(0, self.forwards - 1)

    @property
    def sequence_steps(self) -> int:
        """Forwards after prefill, counted once per sequence that still ran."""
        return self.sequence_forwards - self.sequences

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step and sequence, bonus token included, prefill's left out; 1.0 is plain decoding."""
        return (self.tokens - self.sequences) / self.sequence_steps if self.sequence_steps else 1.0

    @property
    def accepted_per_step(self) -> float:
        """Accepted draft tokens per step and sequence."""
        return self.accepted / self.sequence_steps if self.sequence_steps else 0.0

    @property
    def step_compression(self) -> float:
        """Tokens per forward and sequence, prefill included: the paper's S."""
        forwards = self.sequence_forwards + self.refeeds
        return self.tokens / forwards if forwards else 1.0

    @property
    def step_seconds(self) -> float:
        """Time in all steps, and in what prefill leaves to do after its forward."""
        return self.own_seconds if self.shared_seconds is None else self.shared_seconds

    @property
    def own_seconds(self) -> float:
        """The same as this process alone saw it."""
        return sum(self.seconds[phase] for phase in PHASES)

    @property
    def plain_share(self) -> float:
        """Share of steps that fed the current tokens alone."""
        return self.plain_steps / self.steps if self.steps else 0.0

    @property
    def rows_per_step(self) -> float:
        """Nodes fed per step, all sequences and padding included."""
        return self.rows / self.steps if self.steps else 0.0
