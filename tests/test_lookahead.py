from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookahead_decoding import PLAIN, Choice, Lookahead, LookaheadConfig


def lookahead(prompt: list[int], **settings: object) -> Lookahead:
    limits = {k: settings.pop(k) for k in ("limit", "stop_ids", "propose") if k in settings}
    return Lookahead(prompt, LookaheadConfig(**settings), **limits)


def paper(prompt: list[int], **settings: object) -> Lookahead:
    """The paper's algorithm; W, N and G are 15, 5 and 15 where they are not given."""
    limits = {k: settings.pop(k) for k in ("limit", "stop_ids", "propose") if k in settings}
    return Lookahead(prompt, LookaheadConfig.paper(**settings), **limits)


def test_the_prompts_ngrams_are_candidates_of_the_first_step() -> None:
    core = paper([1, 2, 3, 1, 2, 4, 1], ngram_size=3, sources=("prompt",))
    tree = core.plan()
    assert tree.tokens == (1, 2, 4, 3)
    assert tree.parents == (-1, 0, 1, 1)


def test_without_the_prompt_source_only_the_output_is_learned() -> None:
    core = paper([1, 2, 3, 1, 2, 3], ngram_size=2, sources=("output",))
    assert core.plan().tokens == (3,)
    core.observe(Choice((1, 2, 3), (0, 1, 2)))
    assert core.plan().tokens == (3, 1)


def test_an_accepted_run_is_learned_token_by_token() -> None:
    core = paper([9, 1], ngram_size=3, sources=("output",))
    core.observe(Choice((2, 3, 1), (0, 1, 2)))
    assert core.text == [9, 1, 2, 3, 1]
    assert core.plan().tokens == (1, 2, 3)


def test_planning_twice_gives_the_same_tree() -> None:
    core = lookahead([1, 2, 3])
    assert core.plan() == core.plan()


def test_no_source_is_plain_decoding() -> None:
    core = Lookahead([1, 2, 1, 2, 1], PLAIN)
    assert core.plan().tokens == (1,)
    core.observe(Choice((2,), (0,)))
    assert core.plan().tokens == (2,)


def test_prefill_does_not_move_the_window() -> None:
    core = paper([1, 2, 3], window_size=3, ngram_size=3, sources=("window",))
    before = core.plan().tokens[1:]
    core.observe(Choice((2,), (0,)))
    assert core.plan().tokens[1:] == before


def test_window_ngrams_become_candidates_once_n_minus_one_rows_stand() -> None:
    core = paper([1], window_size=1, ngram_size=3, sources=("window",))
    core.observe(Choice((1,), (0,), (7,)))  # fills the second row
    tree = core.plan()
    assert len(tree.last_row) == 1
    assert tree.first_candidate == len(tree)
    core.observe(Choice((1,), (0,), (8,)))
    tree = core.plan()  # the n-gram (1, 1, 8): root, the drawn second row, the target's token
    assert tree.tokens[tree.first_candidate :] == (1, 8)


def test_a_stop_token_is_never_proposed_by_the_window() -> None:
    core = paper([1], window_size=2, ngram_size=2, sources=("window",), stop_ids={0})
    core.observe(Choice((1,), (0,), (0, 0)))
    assert core.plan().tokens[core.plan().first_candidate :] == ()


def test_no_node_stands_where_plain_decoding_never_feeds_a_token() -> None:
    # five tokens at most: the last is never fed, so the tree may reach position 3, two past the root
    core = paper([1, 2], limit=5, window_size=9, ngram_size=5, propose=lambda text: [[7] * 9])
    assert max(core.plan().depths) == 2
    core.observe(Choice((3, 3), (0, 1), ()))
    assert max(core.plan().depths) == 0


def test_a_source_of_ones_own_is_asked_with_the_text_so_far() -> None:
    asked: list[list[int]] = []

    def propose(text: list[int]) -> list[list[int]]:
        asked.append(list(text))
        return [[4, 5]]

    core = Lookahead([1, 2], PLAIN, propose=propose)
    assert core.plan().tokens == (2, 4, 5)
    core.observe(Choice((4, 9), (0, 1)))
    core.plan()
    assert asked == [[1, 2], [1, 2, 4, 9]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        Lookahead([], PLAIN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"ngram_size": 1}, "ngram_size must be at least 2, got 1"),
        ({"verification_set_size": -1}, "verification_set_size must be at least 0, got -1"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"window_size": 9, "ngram_size": 3, "max_rows": 17}, "the window has 18 rows and max_rows is 17"),
        ({"adaptive": False}, "adaptive=False needs window_size"),
        ({"step_times": ((0, 1.0),)}, "rows of at least 1 and times above 0"),
        ({"step_times": ((4, 1.0), (4, 2.0))}, "a number of rows twice"),
        ({"sources": ("windows",)}, "unknown source 'windows'"),
        ({"sources": ("window", "window")}, "names one twice"),
    ],
)
def test_a_bad_setting_is_one_clear_line(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LookaheadConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{"window_size": 2.0}, {"ngram_size": True}, {"sources": "window"}, {"step_times": (1, 2)}]
)
def test_a_setting_of_the_wrong_type_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        LookaheadConfig(**settings)


def test_the_largest_tree_has_room_for_what_is_fixed() -> None:
    assert LookaheadConfig().most_rows == 64
    assert LookaheadConfig(15, 5).most_rows == 64 + 60
    assert LookaheadConfig(15, 5, max_rows=70).most_rows == 70
    assert LookaheadConfig.paper(15, 5, 15).most_rows == 120
    assert LookaheadConfig.paper(15, 5, 15, ("prompt",)).most_rows == 61
    assert PLAIN.most_rows == 1


def test_the_paper_has_no_recycled_source() -> None:
    with pytest.raises(ValueError, match="which has no source 'recycled'"):
        LookaheadConfig.paper(sources=("window", "recycled"))


def test_what_the_target_ranked_is_a_candidate_where_the_text_has_none() -> None:
    core = lookahead([1, 2], sources=("recycled",), max_rows=3)
    core.observe(Choice((3,), (0,), ranked={0: [3, 4]}))  # prefill: after 2
    assert core.plan().tokens == (3, 3, 3)  # nothing is known about 3 but what is frequent
    core.observe(Choice((2,), (0,), ranked={0: [2, 5]}))
    tree = core.plan()
    assert tree.tokens == (2, 3, 2)
    assert tree.parents == (-1, 0, 1)


def test_drafts_are_counted_by_source() -> None:
    counts: dict[str, object] = {}
    config = LookaheadConfig(sources=("prompt",), max_rows=3)
    core = Lookahead([1, 2, 3, 1], config, counts=counts)  # type: ignore[arg-type]
    assert core.plan().tokens == (1, 2, 3)
    core.observe(Choice((2, 9), (0, 1)))
    assert vars(counts["suffix"]) == {"proposed": 2, "accepted": 1, "rows": 2.0}


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=8),
    st.integers(2, 4),
)
def test_text_sources_propose_what_followed_the_current_token(
    prompt: list[int], steps: list[list[int]], ngram: int
) -> None:
    """Against a pool that is made anew from the whole text."""
    core = paper(prompt, ngram_size=ngram, verification_set_size=3, sources=("prompt", "output"))
    for tokens in steps:
        core.observe(Choice(tuple(tokens), tuple(range(len(tokens)))))
    text = core.text
    assert text == prompt + [t for tokens in steps for t in tokens]
    followed: list[tuple[int, ...]] = []
    for start in range(len(text) - ngram, -1, -1):
        found = tuple(text[start + 1 : start + ngram])
        if text[start] == text[-1] and found not in followed:
            followed.append(found)
    tree = core.plan()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, len(tree)):
        paths.append((*paths[tree.parents[node]], tree.tokens[node]))
    assert sorted(paths[1:]) == sorted({f[: i + 1] for f in followed[:3] for i in range(ngram - 1)})
