"""The walk: from the target's logits to the tokens that a step emits.

At a node its logits are processed exactly as plain decoding would process them, on the true text so far; then the
token is the argmax or one draw, and the walk goes on at the child that holds it. So the tokens are those of plain
decoding by construction, whatever was guessed, and the tree only decides how many of them one forward gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..draft.lookahead import Choice, Walk
from ..draft.tree import TokenTree

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Criterion = Callable[[torch.Tensor, tuple[torch.Tensor, ...] | None], torch.Tensor]


@dataclass(frozen=True)
class StepLogits:
    """Logits of one forward, for the rows that need them.

    Attributes:
        logits: (batch, kept rows, vocab), in the model's dtype.
        nodes: node of each kept row, in ascending order; the same for all sequences.
        best: where the target has them already, the argmax of each row and then its best tokens, best first, as
            integers on the host, (batch, at least the kept rows, 1 or more).
    """

    logits: torch.Tensor
    nodes: tuple[int, ...]
    best: torch.Tensor | None = None

    def argmax(self) -> list[list[int]]:
        """The best token of every kept row, (batch, kept rows): one device synchronisation."""
        if self.best is not None:
            known: list[list[int]] = self.best[..., 0].tolist()
            return known
        if self.logits.device.type == "cpu":  # numpy's argmax is the faster one there
            best: list[list[int]] = self.logits.float().numpy().argmax(-1).tolist()
            return best
        best = self.logits.argmax(-1).tolist()
        return best

    def top(self, ranks: int) -> list[list[list[int]]]:
        """The best tokens of every kept row, best first, (batch, kept rows, ranks); ties in any order."""
        ranks = min(ranks, self.logits.shape[-1])
        known = self.best is not None and self.best.shape[-1] > ranks
        best = self.best[..., 1 : 1 + ranks] if self.best is not None and known else top_tokens(self.logits, ranks)
        found: list[list[list[int]]] = best.tolist()
        return found

    def rows(self, sequence: int) -> Mapping[int, int]:
        """For each node of a sequence's tree that has logits here, its row."""
        return {node: row for row, node in enumerate(self.nodes)}

    def agree(self, walks: Sequence[Walk | None], samplers: Sequence[Sampler]) -> Sequence[Walk | None]:
        """The walks that all who share in the step take: these, where nobody else does."""
        return walks


CHUNK = 128
"""Logits of a large vocabulary that `top_tokens` looks at together."""

LARGE = 16_384


def top_tokens(logits: torch.Tensor, ranks: int) -> torch.Tensor:
    """Indices of the largest logits, largest first, (..., vocab) to (..., ranks); fewer where the vocabulary is small.

    On a CPU torch.topk takes ten times as long as a maximum, so a large vocabulary is cut into chunks: only those with
    the largest maxima can hold any.
    """
    vocab = logits.shape[-1]
    ranks = min(ranks, vocab)
    chunks = vocab // CHUNK
    if logits.device.type != "cpu" or vocab < LARGE:
        return logits.topk(ranks).indices
    whole = logits[..., : chunks * CHUNK].reshape(*logits.shape[:-1], chunks, CHUNK)  # (..., chunks, CHUNK)
    best = whole.amax(-1).topk(ranks).indices  # (..., ranks)
    found = whole.gather(-2, best[..., None].expand(*best.shape, CHUNK)).flatten(-2)  # (..., ranks * CHUNK)
    rest = logits[..., chunks * CHUNK :]
    ids = (best[..., None] * CHUNK + torch.arange(CHUNK)).flatten(-2)
    ids = torch.cat([ids, torch.arange(chunks * CHUNK, vocab).expand(*ids.shape[:-1], -1)], -1)
    return ids.gather(-1, torch.cat([found, rest], -1).topk(ranks).indices)


class Sampler:
    """Picks the tokens of one sequence as plain decoding would, one after the other.

    Args:
        ids: the text so far as plain decoding sees it, left padding included, (1, length).
        max_length: length at which the text ends, left padding included.
        stop_ids: tokens that end the text.
        processors: called in order with the text (1, length) and the scores (1, vocab) in float32.
        criteria: further stopping criteria, called with the text after every token; any true result ends it.
        do_sample: draw from the processed scores; otherwise take the best.
        generator: of the draws; torch's own by default.
        keep_scores, keep_logits: collect the processed scores, or the raw logits, of every token.
        follows: it may have to take the tokens of another walk (see `follow`), for which it keeps copies.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        max_length: int,
        *,
        stop_ids: Sequence[int] = (),
        processors: Sequence[Processor] = (),
        criteria: Sequence[Criterion] = (),
        do_sample: bool = False,
        generator: torch.Generator | None = None,
        keep_scores: bool = False,
        keep_logits: bool = False,
        follows: bool = False,
    ) -> None:
        self.length = self._first = self._start = ids.shape[1]
        self._ids = torch.cat([ids, ids.new_zeros(1, max(0, max_length - self.length))], dim=1)
        self._max_length = max_length
        self._stop_ids = frozenset(stop_ids)
        self._processors = list(processors)
        self._criteria = list(criteria)
        self._do_sample = do_sample
        self._generator = generator
        self._plain = not (self._processors or do_sample or keep_scores or keep_logits)
        self._keep_scores = keep_scores
        self._keep_logits = keep_logits
        self.scores: tuple[torch.Tensor, ...] = ()  # (1, vocab) per token
        self.logits: tuple[torch.Tensor, ...] = ()  # (1, vocab) per token
        self.finish_reason: str | None = None
        self._follows = follows
        self._unused = copy.deepcopy((self._processors, self._criteria)) if follows else ([], [])
        self._drawn_from = generator if generator is not None else _generator_of(ids.device)
        self._random_state: torch.Tensor | None = None
        self._vocabulary = 0

    @property
    def text(self) -> torch.Tensor:
        """The text so far, left padding included, (1, length)."""
        return self._ids[:, : self.length]

    def take(self, logits: torch.Tensor, best: int) -> int:
        """Emit the next token.

        Args:
            logits: of the current node, (vocab,).
            best: their argmax.
        """
        self._vocabulary = len(logits)
        token = best if self._plain else self._process(logits)
        self._append(token)
        return token

    def _append(self, token: int) -> None:
        self._ids[0, self.length] = token
        self.length += 1
        if token in self._stop_ids:
            self.finish_reason = "stop"
        elif self.length >= self._max_length:
            self.finish_reason = "length"
        scores = self.scores if self._keep_scores else None
        for criterion in self._criteria:  # all of them, as plain decoding does: one may count its calls
            if bool(torch.as_tensor(criterion(self.text, scores)).any()) and self.finish_reason is None:
                self.finish_reason = "stop"

    def begin(self) -> None:
        """A walk begins."""
        self._start = self.length
        if self._follows and self._do_sample:
            self._random_state = self._drawn_from.get_state()

    def follow(self, tokens: Sequence[int], finish_reason: str | None) -> None:
        """Take what another walk of this step has come to, instead of what this one has.

        Afterwards everything is as if this sampler had taken the tokens itself: processors and criteria were called
        once per token, and as much was drawn. Of tokens that were not taken here there are no scores, so a processor
        whose state depends on them cannot follow (see `following`).
        """
        if self._ids[0, self._start : self.length].tolist() != list(tokens[: self.length - self._start]):
            self._go_back()
        for token in tokens[self.length - self._start :]:
            self._pass(token)
        self.finish_reason = finish_reason

    def _go_back(self) -> None:
        """To where the step began."""
        taken = self._ids[0, self._first : self._start].tolist()
        if self._processors or self._criteria:
            self._processors, self._criteria = copy.deepcopy(self._unused)
            self.length = self._first
            for token in taken:
                self._pass(token)
        self.length = self._start
        if self._random_state is not None:
            self._drawn_from.set_state(self._random_state)

    def _pass(self, token: int) -> None:
        """Emit a token that was chosen elsewhere."""
        nothing = torch.zeros(1, self._vocabulary, device=self._ids.device)
        for processor in self._processors:
            processor(self.text, nothing.clone())
        if self._do_sample:  # the noise of a draw depends on how many scores there are, and not on what they are
            torch.multinomial(nothing + 1, num_samples=1, generator=self._generator)
        self._append(token)

    def _process(self, logits: torch.Tensor) -> int:
        raw = logits[None].to(copy=True, dtype=torch.float32, device=self._ids.device)  # (1, vocab)
        scores = raw
        for processor in self._processors:
            scores = processor(self.text, scores)
        if self._keep_logits:
            self.logits += (raw,)
        if self._keep_scores:
            self.scores += (scores,)
        if not self._do_sample:
            return int(torch.argmax(scores, dim=-1))
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))


def choose(
    step: StepLogits, trees: Sequence[TokenTree | None], samplers: Sequence[Sampler], ranks: int = 0
) -> list[Choice | None]:
    """Walk every sequence's tree and emit its tokens; None where the sequence has ended.

    The walk starts at the root and follows the child that holds the emitted token; it ends where there is none, so a
    fully matched candidate still gives its bonus token, or where the text ends. Nothing is drawn or processed
    past that.

    Args:
        ranks: how many of the best tokens of each node go into the choice.
    """
    best = step.argmax()
    top = step.top(ranks) if ranks else [[[token] for token in row] for row in best]
    walks: list[Walk | None] = []
    for b, (tree, sampler) in enumerate(zip(trees, samplers, strict=True)):
        if tree is None:
            walks.append(None)
            continue
        row_of = step.rows(b)
        node, tokens = 0, []
        path: list[int] = []
        sampler.begin()
        while node in row_of and sampler.finish_reason is None:
            row = row_of[node]
            tokens.append(sampler.take(step.logits[b, row], best[b][row]))
            path.append(node)
            child = tree.child(node, tokens[-1])
            node = -1 if child is None else child
        ranked = {n: top[b][row] for n, row in row_of.items() if n < len(tree)}
        walks.append(Walk(tuple(tokens), tuple(path), sampler.finish_reason, ranked))
    choices: list[Choice | None] = []
    for tree, walk in zip(trees, step.agree(walks, samplers), strict=True):
        if tree is None or walk is None:
            choices.append(None)
            continue
        window_tokens = tuple(walk.ranked[n][0] for n in tree.last_row)
        choices.append(Choice(walk.tokens, walk.path, window_tokens, walk.ranked if ranks else {}))
    return choices


def _generator_of(device: torch.device) -> torch.Generator:
    """Torch's own generator of a device."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
