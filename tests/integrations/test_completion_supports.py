"""Supports of completions as rollout engines return them."""

import pytest
import torch

from sppo_kernels.integrations._support import batch_support, completion_supports

COMPLETION, NESTED = [5, 3, 7], [[1, 5], [3], [9, 7, 2]]


@pytest.mark.parametrize("value", [None, [[], [], []]])
def test_a_completion_without_a_cut_has_empty_ranges(value):
    (support,) = completion_supports("field", [value], [COMPLETION], vocab=10)
    assert support.token_ids.tolist() == []
    assert support.offsets.tolist() == [0, 0, 0, 0]


def test_only_supports_of_unmasked_tokens_are_concatenated():
    supports = completion_supports("field", [NESTED, [[8], [6, 4]], None], [COMPLETION, [8, 4], [1]], vocab=10)
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    token_ids, offsets = batch_support(supports, mask)
    assert token_ids.tolist() == [1, 5, 9, 7, 2, 8, 6, 4]
    assert offsets.tolist() == [0, 2, 5, 6, 8, 8]
    token_ids, offsets = batch_support(supports, torch.zeros_like(mask))
    assert (token_ids.tolist(), offsets.tolist()) == ([], [0])


def test_wrong_supports_are_named():
    with pytest.raises(
        ValueError, match=r"field\[1\], for a completion of 3 tokens: .*label 7 of token 2 is not among"
    ):
        completion_supports("field", [NESTED, [[5], [3], [2]]], [COMPLETION, COMPLETION], vocab=10)
