from __future__ import annotations

from lookahead_decoding import Choice, LookaheadDecoding, Stats, build_tree
from lookahead_decoding.draft.sources import SourceCount


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


def test_counts_print_as_one_readable_line_and_as_a_table() -> None:
    stats = Stats()
    stats.count([build_tree(1)], [Choice((5,), (0,))])
    stats.count([build_tree(1, candidates=[(7, 8)])], [Choice((7, 8, 1), (0, 1, 2))])
    stats.sources = {"suffix": SourceCount(proposed=2, accepted=2)}
    line = "4 tokens in 2 forwards, 3.00 tokens per step, 3.0 rows per step, 0% of them plain; accepted: suffix 2 of 2"
    assert repr(stats) == f"<Stats: {line}>"
    assert "<tr><th>tokens per step</th><td>3.00</td></tr>" in stats._repr_html_()
    decoding = LookaheadDecoding()
    assert repr(decoding) == "<LookaheadDecoding: default settings>"
    decoding.stats = stats
    assert repr(decoding) == f"<LookaheadDecoding: default settings; last call: {line}>"
