from __future__ import annotations

from lookahead_decoding import Choice, Stats, build_tree


def test_counts_and_ratios_of_two_sequences_of_which_one_ends() -> None:
    stats = Stats()
    root = build_tree(1)
    stats.count([root, root], [Choice((5,), (0,)), Choice((6,), (0,))])  # prefill
    assert (stats.tokens, stats.forwards, stats.steps, stats.rows) == (2, 1, 0, 0)
    assert (stats.mean_acceptance_length, stats.step_compression, stats.rows_per_step) == (1.0, 1.0, 0.0)
    wide = build_tree(1, [[0, 2], [3, 4]], [(7, 8), (9,)])  # the root, 3 of the window, 3 candidates
    stats.count([wide, root], [Choice((7, 8, 1), (0, 4, 5)), Choice((6,), (0,))])
    stats.count([wide, None], [Choice((3,), (0,)), None])
    assert stats.sequences == 2
    assert stats.tokens == 7
    assert (stats.forwards, stats.steps) == (3, 2)
    assert (stats.sequence_forwards, stats.sequence_steps) == (5, 3)
    assert (stats.accepted, stats.drafted) == (2, 6)
    assert stats.rows == 28  # two sequences of seven rows, twice
    assert stats.rows_per_step == 14.0
    assert stats.mean_acceptance_length == 5 / 3
    assert stats.step_compression == 7 / 5
    assert stats.accepted_per_step == 2 / 3
