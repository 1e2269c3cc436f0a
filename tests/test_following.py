"""A rank that takes another one's tokens ends where it would be had it taken them itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, TopKLogitsWarper

from lookahead_decoding import Sampler, StepLogits, TokenTree, choose
from lookahead_decoding.ranks.following import refuse_what_cannot_follow, state_of

VOCABULARY = 12
TEXT = torch.tensor([[3, 4, 5]])


class Calls(LogitsProcessor):
    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        return scores


class Criterion:
    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, ids: torch.Tensor, scores: Any) -> torch.Tensor:
        self.lengths.append(ids.shape[1])
        return torch.tensor([False])


def sampler(seed: int = 7) -> tuple[Sampler, Callable[[], Any]]:
    calls, criterion, generator = Calls(), Criterion(), torch.Generator().manual_seed(seed)
    made = Sampler(
        TEXT, 20, processors=[calls], criteria=[criterion], do_sample=True, generator=generator, follows=True
    )

    def state() -> Any:
        inside = made._processors[0], made._criteria[0]
        return made.text.tolist(), inside[0].texts, inside[1].lengths, generator.get_state().tolist()

    return made, state


def logits(*seeds: int) -> StepLogits:
    rows = torch.stack([torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(s)) * 4 for s in seeds])
    return StepLogits(rows[None], tuple(range(len(seeds))))


def step(one: Sampler, seeds: tuple[int, ...], drafts: tuple[int, ...] = ()) -> tuple[int, ...]:
    tree = TokenTree((0, *drafts), tuple(range(-1, len(drafts))))
    (choice,) = choose(logits(*seeds), [tree], [one])
    return choice.tokens


def test_tokens_that_were_not_taken_are_passed() -> None:
    leader, its = sampler()
    follower, own = sampler()
    first = step(leader, (1,))
    second = step(leader, (2, 3), (first[0],))  # whatever it is
    step(follower, (1,))
    follower.follow(first, None)
    follower.begin()
    follower.follow(second, None)
    assert own() == its()


def test_a_walk_that_went_elsewhere_goes_back_to_where_the_step_began() -> None:
    leader, its = sampler()
    follower, own = sampler()
    assert step(leader, (1,)) == step(follower, (1,))
    tokens = step(leader, (2,))
    assert step(follower, (9,)) != tokens
    follower.follow(tokens, None)
    assert own() == its()


def test_the_reason_of_the_end_is_taken_too() -> None:
    follower, _ = sampler()
    step(follower, (1,))
    follower.follow((int(follower.text[0, -1]), 6), "stop")
    assert follower.finish_reason == "stop"


def test_torchs_own_generator_follows_as_well() -> None:
    states = []
    for tokens in (0, 1):
        torch.manual_seed(3)
        one = Sampler(TEXT, 20, do_sample=True, follows=True)
        taken = step(one, (1,))
        if tokens:
            one.begin()
            one.follow((4,), None)
        else:
            step(one, (2,))
        states.append((taken, torch.get_rng_state().tolist()))
    assert states[0] == states[1]


class Remembers(LogitsProcessor):
    def __init__(self) -> None:
        self.seen = torch.zeros(1)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen = scores.max()
        return scores


def _counter() -> Any:
    count = 0

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return scores

    return processor


def _list_in_a_closure() -> Any:
    calls: list[int] = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return scores

    return processor


class RemembersOddly(LogitsProcessor):
    """In things that have no attributes, from the second call on."""

    def __init__(self, kind: str) -> None:
        self.calls = 0
        self.kept: Any = deque() if kind == "deque" else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            best = float(scores.max())
            self.kept = deque([best]) if self.kept is not None else scores.numpy().copy()
        return scores


class NoCopy(LogitsProcessor):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds a connection")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        (Remembers(), "remembers scores"),
        (RemembersOddly("deque"), "remembers scores"),
        (RemembersOddly("array"), "remembers scores"),
        (_counter(), "outside of itself"),
        (_list_in_a_closure(), "outside of itself"),
        (NoCopy(), "cannot be copied"),
    ],
)
def test_what_cannot_follow_is_refused(processor: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_what_cannot_follow([processor], [], TEXT, VOCABULARY)


def test_a_criterion_that_keeps_state_outside_of_itself_is_refused() -> None:
    lengths: list[int] = []
    with pytest.raises(ValueError, match="outside of itself"):
        refuse_what_cannot_follow([], [lambda ids, scores: bool(lengths.append(1))], TEXT, VOCABULARY)


def test_what_depends_on_the_text_may_follow_and_is_left_as_it_was() -> None:
    calls = Calls()
    before = torch.get_rng_state()
    refuse_what_cannot_follow([calls, TopKLogitsWarper(3), lambda ids, scores: scores], [Criterion()], TEXT, VOCABULARY)
    assert calls.texts == []
    assert torch.equal(before, torch.get_rng_state())


def test_states_are_compared_all_the_way_down() -> None:
    one = {"a": [1, {2, 3}], "b": torch.ones(2), "g": torch.Generator().manual_seed(1)}
    two = {"a": [1, {2, 3}], "b": torch.ones(2), "g": torch.Generator().manual_seed(1)}
    assert state_of(one) == state_of(two)
    two["b"][1] = 5
    assert state_of(one) != state_of(two)
    ring: list[Any] = []
    ring.append(ring)
    assert state_of(ring) == state_of(ring)
