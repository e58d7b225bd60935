"""The internals of the library that suites use or replace. No other module of the benchmarks imports them.

A suite that follows allocations or compiles kernels has no GPU: here the library is made to believe in one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import sppo_kernels
from sppo_kernels import _backend, _triton_utils, _validation, ops
from sppo_kernels._registration import Operation
from sppo_kernels.ops import selective_logprobs as selective_logprobs_module
from sppo_kernels.ops.linear_logprobs import arguments, indexing, matmul, projection, sparse, weighted_rows
from sppo_kernels.ops.linear_logprobs import op as linear_logprobs_op
from sppo_kernels.ops.linear_logprobs import output as linear_logprobs_output
from sppo_kernels.ops.linear_logprobs.cache import CachePlan
from sppo_kernels.ops.linear_logprobs.gradients import GradientAccumulator
from sppo_kernels.ops.linear_logprobs.lm_head import LMHead
from sppo_kernels.ops.linear_logprobs.projection import tiling
from sppo_kernels.ops.linear_logprobs.projection import triton as projection_triton
from sppo_kernels.ops.linear_logprobs.projection.factors import head_class
from sppo_kernels.ops.linear_logprobs.support import SupportHead, Tokens
from sppo_kernels.ops.linear_logprobs.tokens import SavedForBackward
from sppo_kernels.ops.linear_policy_loss import op as linear_policy_loss_op
from sppo_kernels.ops.policy_loss import op as policy_loss_op
from sppo_kernels.ops.policy_loss.settings import Settings
from sppo_kernels.ops.prompt_value import op as prompt_value_op
from sppo_kernels.ops.row_passes import RowResults

RECOMPUTED, CACHED = (
    linear_logprobs_output.RECOMPUTED,
    linear_logprobs_output.CACHED,
)  # values of a certificate's num_entries
ACCELERATOR_CHUNK_BYTES = arguments._CHUNK_BYTES_ACCELERATOR
PROJECTION = tiling.TILES  # of the fused projection: its tiles, and those that are chosen
PROJECTION_KERNEL = projection_triton.linear_logprobs_projection_kernel.__name__

# Registered operations are opaque to a dispatch mode: on fake tensors it sees only what they return.
OPERATION_BODIES: dict[Any, Callable[..., Any]] = {
    op.overload: op.function
    for module in (
        linear_logprobs_op,
        linear_policy_loss_op,
        policy_loss_op,
        prompt_value_op,
        selective_logprobs_module,
    )
    for op in vars(module).values()
    if isinstance(op, Operation)
}


def is_interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter."""
    return _backend.INTERPRETED


@functools.cache
def kernel_names() -> frozenset[str]:
    """Return the names of the library's Triton kernels."""
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}.")]
    names = {name for module in modules for name, value in vars(module).items() if hasattr(value, "arg_names")}
    return frozenset(name for name in names if name.endswith("_kernel"))


def accept_cpu_tensors() -> Any:
    """Return a context in which the Triton backend launches kernels on CPU tensors, as under the interpreter."""
    return mock.patch.object(_backend, "INTERPRETED", True)


@contextmanager
def values_are_not_checked() -> Iterator[None]:
    """Check values of CPU tensors as rarely as those on a GPU: not at all."""
    with ExitStack() as stack:
        for patch in _patch_everywhere("values_are_checked", _validation.values_are_checked, lambda tensor: False):
            stack.enter_context(patch)
        yield


def projection_candidates() -> tuple[tiling.Tile, ...]:
    """Return the tiles of the fused projection that the current device, or the one that Triton believes in, has."""
    return tiling.candidates()


def projection_class(vocab: int, hidden: int, dtype: torch.dtype) -> str:
    """Name the class of output embeddings that one of this shape belongs to."""
    return head_class(torch.empty(vocab, hidden, dtype=dtype, device="meta"))


@contextmanager
def projection_selects(tokens: bool, entries: int = 0) -> Iterator[None]:
    """Fake what the fused projection selects by values, where there are none.

    Args:
        tokens: whether all tokens are computed again about their maximum, as very unlikely ones are, or none.
        entries: columns of each token that may be sparse entries.
    """

    class Indexing:
        ranges = staticmethod(indexing.ranges)

        @staticmethod
        def nonzero_indices(mask: Tensor) -> Tensor:
            return torch.arange(len(mask) if tokens else 0)

    def places_of_bits(words: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(words)).repeat_interleave(entries)
        return row, torch.zeros_like(row)

    with (
        mock.patch.object(projection, "indexing", Indexing),
        mock.patch.object(projection, "_places_of_bits", places_of_bits),
    ):
        yield


@contextmanager
def one_rank() -> Iterator[dist.ProcessGroup]:
    """Provide a process group of this process alone, with which operations take the path of several."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


# Allocations without kernels


_ENTRIES = torch.int64, torch.int64, torch.float32  # dtypes of the fields of Entries


def _launch_nothing(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Take the place of a launch."""


class Selection(NamedTuple):
    """What linear_logprobs and linear_policy_loss select by values, which fake tensors do not have.

    Attributes:
        tokens: tokens with a loss, which come first.
        parts: of each backward pass the number of tokens that are recomputed, cached and sparse.
        entries: sparse entries of each sparse token.
    """

    tokens: int = 0
    parts: tuple[tuple[int, int, int], ...] = ()
    entries: int = 0


NOTHING_SELECTED = Selection()


@contextmanager
def on_cuda_without_kernels(
    selection: Selection = NOTHING_SELECTED, launch: Callable[..., None] = _launch_nothing
) -> Iterator[None]:
    """Run operations on fake CPU tensors as on an H100, without their kernels, which allocate nothing.

    In the fused projection no token is so unlikely that it is computed again.

    Args:
        selection: what the operations select.
        launch: called with kernel, grid and arguments instead of a launch.
    """
    answers = iter(selection.parts)

    def nonzero_indices(mask: Tensor) -> Tensor:
        return torch.arange(selection.tokens)

    def partition(selected: Tensor, kind: Tensor | int, number: int) -> list[Tensor]:
        counts = next(answers)
        if len(counts) != number or sum(counts) != len(selected):
            raise ValueError(f"parts must be {number} that sum up to {len(selected)}, got {counts}")
        return list(torch.arange(len(selected)).split(list(counts)))

    def gather_entries(index: Tensor, value: Tensor, count: Tensor, coefficient: Tensor) -> weighted_rows.Entries:
        found = len(count) * selection.entries
        return weighted_rows.Entries(*(torch.empty(found, dtype=dtype) for dtype in _ENTRIES))

    patches = [
        mock.patch.object(indexing, "nonzero_indices", nonzero_indices),
        mock.patch.object(indexing, "partition", partition),
        *_patch_everywhere("gather_entries", weighted_rows.gather_entries, gather_entries),
        mock.patch.object(matmul.Projection, "__init__", _init_projection_on_cuda),
        mock.patch.object(arguments, "_CHUNK_BYTES_CPU", ACCELERATOR_CHUNK_BYTES),
        *_patch_everywhere("launch", _triton_utils.launch, launch),
        mock.patch.object(tiling, "capability", return_value=tiling.HOPPER),
        *_patch_everywhere("pick_backend", _backend.pick_backend, lambda backend, tensor: backend or "triton"),
    ]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # The forward row pass asks whether rows are aligned. A fake tensor is at address 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.enter_context(projection_selects(tokens=False, entries=selection.entries))
        for patch in patches:
            stack.enter_context(patch)
        yield


def _init_projection_on_cuda(self: matmul.Projection, weights: Any, bias: Any) -> None:
    """Set up half-precision products, for which PyTorch built without CUDA rejects fake CUDA tensors."""
    self.mixed, self._weights, self.bias = True, weights, bias


def _patch_everywhere(name: str, value: object, replacement: object) -> list[Any]:
    """Return patches of every module of the library that imported a function by name."""
    return [mock.patch.object(module, name, replacement) for module in _modules() if vars(module).get(name) is value]


def _modules() -> list[ModuleType]:
    prefix = sppo_kernels.__name__
    return [module for name, module in list(sys.modules.items()) if module and name.split(".")[0] == prefix]


def num_cached(tokens: int, vocab: int, budget: int | None) -> int:
    """Return for how many tokens a budget of bytes, or None, lets "cache" keep probabilities in half precision."""
    return tokens if budget is None else min(tokens, budget // (matmul.row_stride(vocab) * torch.bfloat16.itemsize))


def selection_by_tokens(tokens: int, *, cached: int = 0, entries: int = 0) -> Selection:
    """Return what linear_logprobs selects where all tokens have a loss and a gradient.

    The first ``cached`` ones are cached. The others are sparse where they have ``entries``, else recomputed.
    """
    others = tokens - cached
    return Selection(tokens, ((0, cached, others) if entries else (others, cached, 0),), entries)


def selection_by_supports(tokens: int, entries: int) -> Selection:
    """Return what linear_logprobs selects where all tokens have a gradient and a support of so many ``entries``.

    In forward and backward all tokens are narrow, and all entries are on this rank.
    """
    return Selection(tokens * entries, ((0, tokens, 0), (0, tokens, 0)))


def selection_by_blocks(tokens: int, block: int) -> Selection:
    """Return what linear_policy_loss selects where all tokens have a loss, and are cached, block by block."""
    return Selection(tokens, tuple((0, len(part), 0) for part in indexing.ranges(tokens, block)))


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    backward: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int,
    support: tuple[Tensor, Tensor] | None = None,
    projection: str = "vendor",
) -> linear_logprobs_output.ForwardOutput:
    """Call the Triton backend of linear_logprobs and return all outputs of the registered operation."""
    validated = _validate(
        hidden,
        weight,
        labels,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        support=support,
        projection=projection,
    )
    return linear_logprobs_output.ForwardOutput(*linear_logprobs_op.linear_logprobs(**validated._asdict()))


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    chunk_bytes: int,
    projection: str = "vendor",
) -> linear_policy_loss_op.ForwardOutput:
    """Call the Triton backend of the token-level linear_policy_loss and return all outputs of the operation."""
    validated = _validate(
        hidden,
        weight,
        labels,
        backward="cache",
        logits_budget_bytes=None,
        chunk_bytes=chunk_bytes,
        projection=projection,
    )
    settings = Settings(
        objective="clip",
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token-mean",
        kl_coef=0.0,
        kl_estimator="k3",
        rollout_correction="none",
        rollout_floor=0.0,
        rollout_cap=2.0,
    )
    outputs = linear_policy_loss_op.linear_policy_loss(
        **validated._asdict(),
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=None,
        cu_seqlens=cu_seqlens,
        normalizer=None,
        ref_logprobs=None,
        rollout_logprobs=None,
        needs=[True, True, False],
        per_token=True,
        **settings._asdict(),
    )
    return linear_policy_loss_op.ForwardOutput(*outputs)


def _validate(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    backward: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int,
    support: tuple[Tensor, Tensor] | None = None,
    projection: str = "vendor",
) -> arguments.Arguments:
    return arguments.Arguments.validate(
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=None,
        adapter=None,
        temperature=1.0,
        softcap=None,
        ignore_index=-100,
        backward=backward,
        logits_budget_bytes=logits_budget_bytes,
        chunk_bytes=chunk_bytes,
        mass_tolerance=1e-4,
        max_entries=512,
        projection=projection,
        group=None,
        support=support,
        backend="triton",
    )


def block_size(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_bytes: int) -> int:
    """Return how many tokens linear_policy_loss computes at a time."""
    head = LMHead(
        hiddens=[hidden],
        weights=[weight],
        bias=None,
        labels=labels,
        temperature=labels.new_empty(len(labels), dtype=torch.float32),
        softcap=0.0,
        ignore_index=-100,
        chunk_bytes=chunk_bytes,
        projection="vendor",
        group="",
        backend="triton",
        first_row=labels.new_zeros(1),
    )
    return head.block_size()


def cached_gradients(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Return d hidden and d weight of backward="cache" in float32, before they are rounded to their dtypes."""
    head = LMHead(
        hiddens=[hidden],
        weights=[weight],
        bias=None,
        labels=labels,
        temperature=torch.ones(len(labels)),
        softcap=0.0,
        ignore_index=-100,
        chunk_bytes=1 << 28,
        projection="vendor",
        group="",
        backend="torch",
        first_row=labels.new_zeros(1),
    )
    tokens, n = torch.arange(len(labels)), len(labels)
    computed, cached = head.forward(tokens, CachePlan(False, 1, 1e-4, num_dense=n), [len(weight)])
    accumulator = head.accumulator([True, True, False], torch.float32)
    scale = accumulator.rescale(upstream)
    row = computed.row
    head.backward(
        tokens,
        accumulator=accumulator,
        cached=cached,
        saved=SavedForBackward(entropy=row.entropy, row_stats=row.row_stats, num_entries=computed.num_entries),
        grad_logprobs=upstream / scale,
        grad_entropy=None,
        is_only_call=True,
    )
    grad_hidden, grad_weight, _ = accumulator.results(lambda x: torch.float32)
    return grad_hidden, grad_weight


# Sparse gradients


class SelectedEntries(NamedTuple):
    """Sparse logit gradients of C tokens.

    Attributes:
        index: ``[C, K]`` int32 columns.
        value: ``[C, K]``.
        count: ``[C]``, the number of entries; -1 if entries do not suffice.
        dropped: ``[C]``, the probability left out.
    """

    index: Tensor
    value: Tensor
    count: Tensor
    dropped: Tensor


def select_entries(logits: Tensor, labels: Tensor, *, max_entries: int, mass_tolerance: float) -> SelectedEntries:
    """Select the sparse gradients of logits ``[C, V]``, which are overwritten."""
    index = torch.zeros(len(labels), max_entries, dtype=torch.int32)
    value = torch.zeros(len(labels), max_entries)
    selected = sparse.SELECT["torch"](
        logits=logits[None],
        labels=labels,
        temperature=torch.ones(len(labels)),
        softcap=0.0,
        mass_tolerance=mass_tolerance,
        combine=None,
        out=RowResults.empty(len(labels), labels.device),
        index=index,
        value=value,
    )
    return SelectedEntries(index, value, selected.num_entries, selected.dropped_mass)


@contextmanager
def all_supports_are(kind: str) -> Iterator[None]:
    """Take all supports of several tokens for "narrow" or "wide" ones, whatever their size."""

    def partition(self: SupportHead, selected: Tensor) -> Tokens:
        index = indexing.nonzero_indices(selected & (self.sizes != 1))
        return Tokens(index[:0], index[:0], index[:0])._replace(**{kind: index})

    with mock.patch.object(SupportHead, "partition", partition):
        yield


@contextmanager
def counted_columns() -> Iterator[list[int]]:
    """Collect in how many columns of the vocabulary the sparse entries of each backward pass lie."""
    counts: list[int] = []
    add_sparse = GradientAccumulator.add_sparse

    def record(self: GradientAccumulator, index: Tensor, entries: weighted_rows.Entries, **settings: Any) -> None:
        counts.append(len(entries.column.unique()))
        add_sparse(self, index, entries, **settings)

    with mock.patch.object(GradientAccumulator, "add_sparse", record):
        yield counts
