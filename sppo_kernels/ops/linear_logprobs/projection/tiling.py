"""Tiles of the fused projection's kernel, by device and output embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...._backend import INTERPRETED
from ...._triton_utils import cdiv
from ....tuning import Tunable
from .factors import Factors, head_class

ALIGNMENT = 16  # bytes, of tensor descriptors and of the widest loads
HOPPER = 90  # compute capability 9.0, the first with tensor descriptors


class Tile(NamedTuple):
    """Launch configuration of the kernel: sizes of a tile, warps, and stages of the pipeline of loads."""

    block_n: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int


# The first fits every device, the second those of NVIDIA, which have more shared memory. The third needs the registers
# that the products of Hopper leave.
TILES = Tunable(
    "linear_logprobs.projection",
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(256, 128, 64, 8, 3),
)
_DEFAULT_OF_HOPPER = Tile(256, 128, 64, 8, 3)
# What fits in the registers beside a softcap and its slope, beside places of rows that are not aligned, and in products
# without tensor cores.
_OPTIONS = Tile(128, 64, 64, 8, 3)
_NOT_ALIGNED = Tile(64, 64, 32, 8, 3)
_FLOAT32 = Tile(64, 32, 32, 4, 2)
MOST_ROWS_WITH_BITS = 128


def tile_of(factors: Factors) -> Tile:
    """Return the tile for factors: the chosen one, or else the default of the device, or less where registers lack."""
    weight = factors.weights[0]
    if weight.dtype == torch.float32:
        return _FLOAT32
    tile = TILES.choice(head_class(weight)) or (_DEFAULT_OF_HOPPER if capability() == HOPPER else TILES.default)
    if not all(map(is_aligned, (*factors.hiddens, *factors.weights))):
        return _least(tile, _NOT_ALIGNED)
    if factors.softcap or len(factors.weights) > 1:
        return _least(tile, _OPTIONS)
    return tile


def _least(a: Tile, b: Tile) -> Tile:
    return Tile(*map(min, a, b))


def candidates() -> tuple[Tile, ...]:
    """Return the tiles that the current device has registers and shared memory for."""
    found = capability()
    return TILES.candidates if found == HOPPER else TILES.candidates[: 2 if found else 1]


def is_chosen(weight: Tensor) -> bool:
    """Return whether the fused projection was measured to be faster with an output embedding of this shape."""
    return weight.itemsize == 2 and TILES.choice(head_class(weight)) is not None


def bytes_per_token(vocab: int) -> int:
    """Return the bytes of the parts of a token, with the default tile, so that ranks with other shards agree."""
    return 8 * cdiv(vocab, TILES.default.block_v)


def capability() -> int:
    """Return ten times the compute capability of the current NVIDIA GPU; 0 elsewhere."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


def is_aligned(x: Tensor) -> bool:
    """Return whether tensor descriptors can address the rows of ``x``."""
    return x.stride(1) == 1 and x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.itemsize % ALIGNMENT == 0
