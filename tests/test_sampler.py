from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import Choice, Sampler, StepLogits, TokenTree, build_tree, choose

VOCAB = 8


def follows(tree: TokenTree, after: dict[int, int]) -> StepLogits:
    """Logits of a target whose next token depends on the last one alone."""
    logits = torch.zeros(1, len(tree.scored), VOCAB)
    for row, node in enumerate(tree.scored):
        logits[0, row, after[tree.tokens[node]]] = 1.0
    return StepLogits(logits, tuple(tree.scored))


def sampler(length: int = 1, max_length: int = 99, **settings: object) -> Sampler:
    return Sampler(torch.ones(1, length, dtype=torch.long), max_length, **settings)


def walk(tree: TokenTree, after: dict[int, int], by: Sampler) -> Choice:
    (choice,) = choose(follows(tree, after), [tree], [by])
    assert choice is not None
    return choice


NEXT = {1: 2, 2: 3, 3: 4, 4: 5, 5: 6, 6: 7, 7: 0, 0: 1}


def test_a_full_match_gives_the_bonus_token() -> None:
    tree = build_tree(1, candidates=[(2, 3)])
    assert walk(tree, NEXT, sampler()) == Choice((2, 3, 4), (0, 1, 2))


def test_a_partial_match_ends_with_the_targets_own_token() -> None:
    tree = build_tree(1, candidates=[(2, 7, 3)])
    assert walk(tree, NEXT, sampler()) == Choice((2, 3), (0, 1))


def test_a_rejection_at_once_gives_one_token() -> None:
    tree = build_tree(1, candidates=[(7, 3), (3, 4)])
    assert walk(tree, NEXT, sampler()) == Choice((2,), (0,))


def test_the_walk_takes_the_sibling_that_matches() -> None:
    tree = build_tree(1, candidates=[(2, 7), (2, 3, 7), (4,)])
    assert walk(tree, NEXT, sampler()).tokens == (2, 3, 4)
    assert walk(tree, NEXT, sampler()).path == (0, 1, 3)


def test_window_nodes_give_tokens_but_are_not_walked() -> None:
    tree = build_tree(1, window=[[0, 2], [2, 3]])
    assert walk(tree, NEXT, sampler()) == Choice((2,), (0,), (3, 4))


def test_a_stop_token_inside_an_accepted_run_ends_it() -> None:
    by = sampler(stop_ids=(3, 6))
    assert walk(build_tree(1, candidates=[(2, 3, 4)]), NEXT, by) == Choice((2, 3), (0, 1))
    assert by.finish_reason == "stop"


def test_the_length_limit_inside_an_accepted_run_ends_it() -> None:
    by = sampler(length=4, max_length=6)
    assert walk(build_tree(1, candidates=[(2, 3, 4)]), NEXT, by) == Choice((2, 3), (0, 1))
    assert by.finish_reason == "length"
    assert by.text.tolist() == [[1, 1, 1, 1, 2, 3]]


def test_criteria_see_each_token_as_plain_decoding_would() -> None:
    seen: list[list[int]] = []

    def criterion(text: torch.Tensor, scores: object) -> torch.Tensor:
        seen.append(text[0].tolist())
        return torch.tensor([text[0, -1] == 3])

    by = sampler(criteria=[criterion])
    assert walk(build_tree(1, candidates=[(2, 3, 4)]), NEXT, by).tokens == (2, 3)
    assert seen == [[1, 2], [1, 2, 3]]
    assert by.finish_reason == "stop"


def test_processors_run_along_the_accepted_path_alone() -> None:
    seen: list[list[int]] = []

    def never_four(text: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(text[0].tolist())
        return scores.index_fill(1, torch.tensor([4]), -1.0)

    tree = build_tree(1, candidates=[(2, 3, 4), (5, 6)])
    assert walk(tree, NEXT, sampler(processors=[never_four])).tokens == (2, 3, 0)
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_sampling_draws_once_per_emitted_token() -> None:
    tree = build_tree(1, candidates=[(2, 3), (4, 5)])
    step = follows(tree, NEXT)
    step = StepLogits(step.logits * 20, step.nodes)
    torch.manual_seed(3)
    (choice,) = choose(step, [tree], [sampler(do_sample=True)])
    after = torch.rand(1)
    assert choice.path == (0, 1, 2)
    torch.manual_seed(3)
    for node in choice.path:
        torch.multinomial(step.logits[0, step.nodes.index(node)][None].softmax(-1), 1)
    assert torch.equal(after, torch.rand(1))


def test_a_generator_of_its_own_leaves_torchs_alone() -> None:
    tree = build_tree(1, candidates=[(2,)])
    step = StepLogits(torch.randn(1, 2, VOCAB), (0, 1))
    state = torch.get_rng_state()
    draws = [
        choose(step, [tree], [sampler(do_sample=True, generator=torch.Generator().manual_seed(5))]) for _ in range(2)
    ]
    assert draws[0] == draws[1]
    assert torch.equal(state, torch.get_rng_state())


def test_a_sequence_that_has_ended_gets_nothing() -> None:
    tree = build_tree(1)
    step = StepLogits(torch.eye(2, VOCAB)[:, None], (0,))
    assert choose(step, [None, tree], [sampler(), sampler()]) == [None, Choice((1,), (0,))]


def test_scores_and_logits_are_kept_per_token() -> None:
    by = sampler(processors=[lambda text, scores: scores * 2], keep_scores=True, keep_logits=True)
    walk(build_tree(1, candidates=[(2,)]), NEXT, by)
    assert [s.max().item() for s in by.scores] == [2.0, 2.0]
    assert [s.max().item() for s in by.logits] == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_equal_logits_wins_as_in_torch(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 5, 300).to(dtype)
    logits[0, :, [7, 200]] = 50.0
    assert StepLogits(logits, tuple(range(5))).argmax() == logits.argmax(-1).tolist() == [[7] * 5]


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=6),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(2, 7),
)
def test_the_walk_emits_what_plain_decoding_would(
    candidates: list[list[int]], after: list[int], max_length: int
) -> None:
    tree = build_tree(1, candidates=candidates)
    by = sampler(max_length=max_length)
    choice = walk(tree, dict(enumerate(after)), by)
    plain = [1]
    while len(plain) < max_length:
        plain.append(after[plain[-1]])
    tokens = list(choice.tokens)
    assert tokens == plain[1 : 1 + len(tokens)]
    longest = max((n for c in candidates for n in range(len(c) + 1) if c[:n] == plain[1 : 1 + n]), default=0)
    assert len(tokens) == min(longest + 1, max_length - 1)
