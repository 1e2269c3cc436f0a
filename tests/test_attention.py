"""Every way to compute a step's attention against the obvious one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.flex import block_mask, flex

from lookahead_decoding import TokenTree, build_tree
from lookahead_decoding.model.attention import additive_mask, dense_mask, encode_rows, folded, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tree_of(nodes: int) -> TokenTree:
    """A tree of exactly so many nodes, with depth and branches."""
    window = [[0, *range(2, 5)], range(5, 9)] if nodes >= 8 else []
    tree = build_tree(1, window, [[i, i + 1, i + 2] for i in range(10, 200, 3)], max_rows=nodes)
    return TokenTree(tree.tokens[:nodes], tree.parents[:nodes], (), 1)


def inputs(
    nodes: int, lengths: list[int], heads: int, key_heads: int, size: int, dtype: torch.dtype, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    torch.manual_seed(nodes + size)
    trees = [tree_of(max(1, nodes - 2 * b)) for b in range(len(lengths))]  # padded but for the first
    rows = encode_rows(trees, lengths, nodes, window)
    slots = max(lengths) + nodes
    query = torch.randn(len(lengths), nodes, heads, size).transpose(1, 2)
    key, value = (torch.randn(len(lengths), key_heads, slots + 5, size) for _ in range(2))
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), value.to(DEVICE, dtype), rows


def test_rows_say_what_each_node_sees() -> None:
    tree = build_tree(1, candidates=[(2, 3), (4,)])
    rows = encode_rows([tree], [7], 5, None)
    assert rows.shape == (1, 1, 5, 8)
    assert rows[0, 0].tolist() == [
        [7, 0, 1 << 30, 1, 0, 0, 0, 0],
        [7, 1, 1 << 30, 1, 1, 0, 0, 0],
        [7, 2, 1 << 30, 1, 1, 1, 0, 0],
        [7, 1, 1 << 30, 1, 0, 0, 1, 0],
        [7, 0, 1 << 30, 0, 0, 0, 0, 1],
    ]


def test_a_sliding_window_goes_by_position_and_not_by_slot() -> None:
    tree = build_tree(1, candidates=[(2, 3), (4,)])
    assert (dense_mask(encode_rows([tree], [3], 4, 3), torch.float32)[0, 0] == 0).int().tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 0, 0, 1],
    ]


def test_padding_and_shorter_sequences_see_nothing_that_is_not_theirs() -> None:
    mask = dense_mask(encode_rows([build_tree(1, candidates=[(2,)]), None], [2, 1], 3), torch.float32, groups=2)
    assert mask.shape == (2, 1, 6, 5)
    one = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    ended = [[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0]]
    assert (mask[:, 0] == 0).int().tolist() == [one + one, ended + ended]


@pytest.mark.parametrize("window", [None, 3, 40])
def test_a_mask_made_on_the_device_is_the_same(window: int | None) -> None:
    _, _, _, rows = inputs(12, [70, 3, 41], 2, 2, 8, torch.float32, window)
    dense = dense_mask(rows, torch.float32)
    made = additive_mask(torch.from_numpy(rows), dense.shape[-1] + 5, torch.float32)
    assert torch.equal(made[..., : dense.shape[-1]], dense)
    assert (made[..., dense.shape[-1] :] < 0).all()


CASES = [  # nodes, lengths, heads, key heads, size
    (1, [5], 4, 4, 16),
    (1, [300], 8, 1, 32),
    (7, [0], 4, 2, 16),
    (16, [70], 4, 2, 24),
    (40, [130], 8, 1, 16),
    (33, [100, 3, 64], 6, 2, 16),
]


@pytest.mark.parametrize(("nodes", "lengths", "heads", "key_heads", "size"), CASES)
@pytest.mark.parametrize(("window", "softcap", "has_sinks"), [(None, 0.0, False), (9, 0.0, False), (9, 2.0, True)])
def test_heads_folded_into_rows(
    nodes: int,
    lengths: list[int],
    heads: int,
    key_heads: int,
    size: int,
    window: int | None,
    softcap: float,
    has_sinks: bool,
) -> None:
    query, key, value, rows = inputs(nodes, lengths, heads, key_heads, size, torch.float32, window)
    slots = max(lengths) + nodes
    key, value = key[:, :, :slots], value[:, :, :slots]
    more = softcap, torch.randn(heads, device=DEVICE) if has_sinks else None
    wanted = reference(query, key, value, dense_mask(rows, torch.float32).to(DEVICE), 0.2, *more)
    ours = folded(query, key, value, dense_mask(rows, torch.float32, heads // key_heads).to(DEVICE), 0.2, *more)
    assert torch.allclose(ours, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("nodes", "lengths", "heads", "key_heads", "size"), CASES)
@pytest.mark.parametrize(("window", "softcap"), [(None, 0.0), (9, 2.0)])
def test_flex_attention_agrees_with_the_reference(
    nodes: int, lengths: list[int], heads: int, key_heads: int, size: int, window: int | None, softcap: float
) -> None:
    query, key, value, rows = inputs(nodes, lengths, heads, key_heads, size, torch.float32, window)
    slots = max(lengths) + nodes
    key, value = key[:, :, :slots], value[:, :, :slots]
    wanted = reference(query, key, value, dense_mask(rows, torch.float32).to(DEVICE), 0.2, softcap)
    other = flex(query, key, value, block_mask(torch.from_numpy(rows).to(DEVICE), slots), 0.2, softcap)
    assert torch.allclose(other, wanted, atol=1e-5)


@pytest.mark.parametrize(("nodes", "lengths", "heads", "key_heads", "size"), CASES)
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 2.0}, {"sinks": True}, {"window": 9}, {"softcap": 3.0, "sinks": True, "window": 40}],
    ids=["", "softcap", "sinks", "window", "all"],
)
def test_the_kernel(
    nodes: int, lengths: list[int], heads: int, key_heads: int, size: int, options: dict[str, object]
) -> None:
    kernels = pytest.importorskip("lookahead_decoding.model.kernels", reason="needs triton")
    query, key, value, rows = inputs(nodes, lengths, heads, key_heads, size, torch.float32, options.get("window"))
    sinks = torch.randn(heads, device=DEVICE) if options.get("sinks") else None
    cap = float(options.get("softcap", 0.0))
    key[:, :, max(lengths) + nodes :] = float("nan")  # nothing past the step may be read into the result
    slots = max(lengths) + nodes
    mask = dense_mask(rows, torch.float32).to(DEVICE)
    wanted = reference(query, key[:, :, :slots], value[:, :, :slots], mask, 0.2, cap, sinks)
    ours = kernels.launch(query, key, value, torch.from_numpy(rows).to(DEVICE), 0.2, cap, sinks)
    assert torch.allclose(ours, wanted, atol=1e-5), (ours - wanted).abs().max()


@pytest.mark.skipif(DEVICE == "cpu", reason="half precision is for a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("nodes", "lengths", "heads", "key_heads", "size"), [*CASES, (120, [1024], 32, 8, 128)])
def test_the_kernel_in_half_precision(
    nodes: int, lengths: list[int], heads: int, key_heads: int, size: int, dtype: torch.dtype
) -> None:
    kernels = pytest.importorskip("lookahead_decoding.model.kernels", reason="needs triton")
    query, key, value, rows = inputs(nodes, lengths, heads, key_heads, size, dtype, None)
    slots = max(lengths) + nodes
    mask = dense_mask(rows, torch.float64).to(DEVICE)
    wanted = reference(query.double(), key[:, :, :slots].double(), value[:, :, :slots].double(), mask, 0.2)
    ours = kernels.launch(query, key, value, torch.from_numpy(rows).to(DEVICE), 0.2).double()
    assert (ours - wanted).norm() / wanted.norm() < 1e-2
