"""Calls of linear_logprobs with the fused projection, over what changes the code of its kernels.

A case has one mode of the kernel. Where the selection by values matters, it is faked: in all cases but "sparse" every
token is computed again about its maximum, as very unlikely ones are, which launches the mode "maximum" too. The code of
the second computation differs where it writes rows of another alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

import sppo_kernels
from benchmarks.compile.launches import Case
from benchmarks.harness import library_seams

TOKENS, RANK = 16, 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The values of ``backward``, and the output whose gradient is computed.
MODES = {
    "scoring": ("recompute", ""),
    "cache": ("cache", ""),
    "sparse": ("sparse", ""),
    "gradient": ("recompute", "logprobs"),
    "gradient of entropy": ("recompute", "entropy"),
}


class Head(NamedTuple):
    """An output embedding: its shape, and whether logits have a bias, a softcap and an adapter."""

    vocab: int = 151_936
    hidden: int = 64  # 97 is not aligned, so that rows are read by pointers
    everything: bool = False

    @property
    def title(self) -> str:
        """A short description."""
        return f"V={self.vocab} H={self.hidden}{' softcap bias adapter' if self.everything else ''}"


PLAIN, FULL = Head(), Head(everything=True)
HEADS = (
    FULL,
    PLAIN,
    Head(hidden=97),
    Head(vocab=50_257, hidden=97, everything=True),
)


def label_of(dtype: str, head: Head, mode: str) -> str:
    """Return the label of a case."""
    return f"{dtype} {head.title} fused {mode}"


def cases() -> Iterator[Case]:
    """Yield every mode for every head in bfloat16, and for the first head in float32.

    Code for float16 differs from that for bfloat16 only in what is written.
    """
    for (name, dtype), head, mode in product(DTYPES.items(), HEADS, MODES):
        writes = mode in ("cache", "gradient")
        if name == "bf16" or (head is FULL and (name == "fp32" or writes)):
            yield Case("linear_logprobs", label_of(name, head, mode), functools.partial(_call, dtype, head, mode))


def candidate_cases() -> Iterator[Case]:
    """Yield every mode of a head without options, whose tile is the chosen one, with every tile of the target."""
    for tile, mode in product(library_seams.PROJECTION.candidates, MODES):
        label = f"{label_of('bf16', PLAIN, mode)} tuned {'/'.join(map(str, tile))}"
        yield Case("linear_logprobs", label, functools.partial(_call_with, tile, mode))


def _call_with(tile: Any, mode: str) -> None:
    """Launch nothing on a target that does not have the tile."""
    if tile in library_seams.projection_candidates():
        with library_seams.PROJECTION.using(tile):
            _call(DTYPES["bf16"], PLAIN, mode)


def _call(dtype: torch.dtype, head: Head, mode: str) -> None:
    backward, wanted = MODES[mode]
    x = lambda *shape: torch.zeros(*shape, dtype=dtype, requires_grad=bool(wanted) or backward != "recompute")
    extras: dict[str, Any] = {}
    if head.everything:
        extras = {"bias": x(head.vocab), "adapter": (x(TOKENS, RANK), x(head.vocab, RANK)), "softcap": 30.0}
    with library_seams.projection_selects(tokens=mode != "sparse"):
        out = sppo_kernels.linear_logprobs(
            x(TOKENS, head.hidden),
            x(head.vocab, head.hidden),
            torch.zeros(TOKENS, dtype=torch.int64),
            backward=backward,
            projection="fused",
            backend="triton",
            **extras,
        )
        if wanted:
            getattr(out, wanted).sum().backward()
