"""Supports of completions as rollout engines return them."""

import numpy as np
import pytest
import torch

from sppo_kernels.integrations._support import batch_support, completion_supports

COMPLETION, NESTED = [5, 3, 7], [[1, 5], [3], [9, 7, 2]]


@pytest.mark.parametrize(
    "value",
    [
        NESTED,
        [np.array(kept) for kept in NESTED],
        ([1, 5, 3, 9, 7, 2], [0, 2, 3, 6]),
        (np.array([1, 5, 3, 9, 7, 2]), np.array([0, 2, 3, 6])),
        (torch.tensor([1, 5, 3, 9, 7, 2], dtype=torch.int32), torch.tensor([0, 2, 3, 6])),
    ],
    ids=["lists", "arrays", "CSR lists", "CSR arrays", "CSR tensors"],
)
def test_forms_are_equal(value):
    (support,) = completion_supports("field", [value], [COMPLETION], vocab=10)
    assert support.token_ids.tolist() == [1, 5, 3, 9, 7, 2]
    assert support.offsets.tolist() == [0, 2, 3, 6]


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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[5], [3]], r"offsets.*\(one per label, and the end\)"),
        ([[5], [3], [2]], "label 7 of token 2 is not among"),
        ([[5], [3], [7, 7]], "7 twice in the support of token 2"),
        ([[5], [3], [7, 10]], r"in \[0, 10\), got 10 in the support of token 2"),
        ([[5], [3], [7, -1]], r"in \[0, 10\), got -1 in the support of token 2"),
        ([[5], [3], [7.5]], "an integer tensor"),
        ([5, 3, 7], "not iterable"),
        (3, "not iterable"),
        (([5, 3, 7], [0, 1, 2, 4]), "from 0 to 3"),
    ],
)
def test_malformed_supports_are_rejected(value, message):
    with pytest.raises(ValueError, match=rf"field\[1\], of a completion of 3 tokens, must be a list .*{message}"):
        completion_supports("field", [NESTED, value], [COMPLETION, COMPLETION], vocab=10)
