"""Supports of completions in each form that rollout engines return, and wrong ones."""

import numpy as np
import pytest
import torch

from sppo_kernels import Support
from sppo_kernels.ops.support_passes import read_support

COMPLETION, NESTED = [5, 3, 7], [[1, 5], [3], [9, 7, 2]]
IDS, OFFSETS = [1, 5, 3, 9, 7, 2], [0, 2, 3, 6]


@pytest.mark.parametrize(
    "value",
    [
        NESTED,
        [np.array(kept) for kept in NESTED],
        (IDS, OFFSETS),
        (np.array(IDS, dtype=np.int16), np.array(OFFSETS)),
        (torch.tensor(IDS), torch.tensor(OFFSETS, dtype=torch.int32)),
        Support.of(NESTED),
    ],
    ids=["lists", "arrays", "CSR lists", "CSR arrays", "CSR tensors", "Support"],
)
def test_forms_are_equal(value):
    ids, offsets = read_support("field", value, COMPLETION, vocab=10)
    assert (ids.tolist(), offsets.tolist()) == (IDS, OFFSETS)
    assert (ids.dtype, offsets.dtype) == (torch.int32, torch.int64)


def test_parts_are_selected_and_concatenated():
    whole, rest = Support.of(NESTED), Support.of([[], [4]])
    assert [x.tolist() for x in whole.select(torch.tensor([True, False, True]))] == [[1, 5, 9, 7, 2], [0, 2, 5]]
    assert [x.tolist() for x in Support.cat([whole, rest])] == [[*IDS, 4], [*OFFSETS, 6, 7]]
    assert Support.cat([whole, rest]).has_labels(torch.tensor([5, 1, 2, 8, 4])).tolist() == [1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([5, 3, 7], "must be a list with the token ids .*not iterable"),
        (3, "must be a list with the token ids .*not iterable"),
        (torch.tensor(IDS), "must be a list with the token ids .*iteration over a 0-d"),
        ([[5], [3], [7.5]], "must be a list with the token ids .*token_ids must be an integer tensor"),
        (("seven", OFFSETS), "must be a list with the token ids"),
        (([[1], [5, 3]], OFFSETS), "must be a list with the token ids"),
        ([[5], [3]], r"offsets\) must be of shape \(4,\) \(one per label, and the end\), got shape \(3,\)"),
        (([5, 3, 7], OFFSETS, IDS), "support must be a pair .* got 3 elements"),
        (([[5, 3, 7]], [0, 1, 2, 3]), r"token_ids\) must be of shape \[M\]"),
        (([5.0, 3.0, 7.0], [0, 1, 2, 3]), r"token_ids\) must be an integer tensor, got torch.float32"),
        (([5, 3, 7], [False, True, True, True]), r"offsets\) must be an integer tensor, got torch.bool"),
        (([5, 3, 7], [1, 1, 2, 3]), "must be from 0 to 3, the number of token_ids, got from 1 to 3"),
        (([5, 3, 7], [0, 1, 2, 4]), "must be from 0 to 3, the number of token_ids, got from 0 to 4"),
        (([5, 3, 7], [0, 2, 1, 3]), r"must be ascending, got \[2, 1\] at token 1"),
        ([[5], [3], [2]], "label 7 of token 2 is not among the 1 tokens of its support"),
        ([[5], [3], [7, 9, 7]], "7 twice in the support of token 2"),
        ([[5], [3], [7, 10]], r"in \[0, 10\), got 10 in the support of token 2"),
        ([[5, -1], [3], [7]], r"in \[0, 10\), got -1 in the support of token 0"),
    ],
)
def test_wrong_supports_raise(value, message):
    with pytest.raises(ValueError, match=f"^field.*{message}"):
        read_support("field", value, COMPLETION, vocab=10)
