"""Selection of tokens by index."""

import pytest
import torch

from sppo_kernels.ops.linear_logprobs import indexing


def test_take_copies_only_a_part():
    x = torch.arange(12).view(2, 6)
    assert indexing.take(x, torch.arange(6)) is x
    assert indexing.take(x, torch.tensor([1, 4])).tolist() == [[1, 4], [7, 10]]
    assert indexing.take(x, torch.arange(0)).shape == (2, 0)


def test_partition_by_kind_leaves_out_what_is_not_selected():
    selected = torch.tensor([True, True, False, True, True])
    parts = indexing.partition(selected, torch.tensor([2, 0, 0, 0, 2]), 3)
    assert [part.tolist() for part in parts] == [[1, 3], [], [0, 4]]
    parts = indexing.partition(selected, 1, 3)
    assert [part.tolist() for part in parts] == [[], [0, 1, 3, 4], []]


@pytest.mark.parametrize(("number", "size"), [(0, 5), (1, 5), (5, 5), (11, 5), (1025, 1024), (8192, 2048), (700, 300)])
def test_ranges_cover_all_and_differ_little(number, size):
    parts = indexing.ranges(number, size)
    assert [i for part in parts for i in part] == list(range(number))
    assert len(parts) == -(-number // size)
    assert all(len(part) <= size for part in parts)
    if size % 128 == 0:
        assert all(len(part) % 128 == 0 for part in parts[:-1])
