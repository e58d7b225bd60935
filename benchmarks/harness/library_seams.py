"""The internals of the library that suites use or replace. No other module of the benchmarks imports them.

A suite that follows allocations or compiles kernels has no GPU: here the library is made to believe in one.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import sppo_kernels
from sppo_kernels import _backend, _triton_utils, ops
from sppo_kernels.ops import selective_logprobs as selective_logprobs_module
from sppo_kernels.ops.linear_logprobs import arguments, indexing, matmul, sparse, weighted_rows
from sppo_kernels.ops.linear_logprobs import op as linear_logprobs_op
from sppo_kernels.ops.linear_logprobs import output as linear_logprobs_output
from sppo_kernels.ops.linear_logprobs.cache import CachePlan
from sppo_kernels.ops.linear_logprobs.lm_head import LMHead, SavedForBackward
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

# Registered operations are opaque to a dispatch mode: on fake tensors it sees only what they return.
OPERATION_BODIES: dict[Any, Callable[..., Any]] = {
    op._opoverload: op._init_fn
    for module in (
        linear_logprobs_op,
        linear_policy_loss_op,
        policy_loss_op,
        prompt_value_op,
        selective_logprobs_module,
    )
    for op in vars(module).values()
    if isinstance(op, torch.library.CustomOpDef)
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


# Allocations without kernels


def _launch_nothing(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Take the place of a launch."""


@contextmanager
def on_cuda_without_kernels(
    spans: Iterable[tuple[int, int]], launch: Callable[..., None] = _launch_nothing
) -> Iterator[None]:
    """Run operations on fake CPU tensors as on a CUDA device, without their kernels, which allocate nothing.

    Args:
        spans: the ranges of tokens that the operations select by value, in the order in which they select them.
        launch: called with kernel, grid and arguments instead of a launch.
    """
    answers = iter(spans)

    def select(mask: Tensor) -> Tensor:
        return torch.arange(*next(answers))

    patches = [
        mock.patch.object(indexing, "nonzero_indices", select),
        mock.patch.object(matmul.Projection, "__init__", _init_projection_on_cuda),
        mock.patch.object(arguments, "_CHUNK_BYTES_CPU", ACCELERATOR_CHUNK_BYTES),
        *_patch_everywhere("launch", _triton_utils.launch, launch),
        *_patch_everywhere("pick_backend", _backend.pick_backend, lambda backend, tensor: backend or "triton"),
    ]
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def _init_projection_on_cuda(self: matmul.Projection, weights: Any, bias: Any) -> None:
    """Set up half-precision products, for which PyTorch built without CUDA rejects fake CUDA tensors."""
    self.mixed, self.weights, self.bias = True, weights, bias


def _patch_everywhere(name: str, value: object, replacement: object) -> list[Any]:
    """Return patches of every module of the library that imported a function by name."""
    return [mock.patch.object(module, name, replacement) for module in _modules() if vars(module).get(name) is value]


def _modules() -> list[ModuleType]:
    prefix = sppo_kernels.__name__
    return [module for name, module in list(sys.modules.items()) if module and name.split(".")[0] == prefix]


def num_cached(tokens: int, vocab: int, budget: int | None) -> int:
    """Return for how many tokens a budget of bytes, or None, lets "cache" keep logit gradients in half precision."""
    return tokens if budget is None else min(tokens, budget // (matmul.row_stride(vocab) * torch.bfloat16.itemsize))


def selected_spans(tokens: int, cached: int) -> list[tuple[int, int]]:
    """Return the spans that linear_logprobs selects by value: forward those with a loss, here all; backward the same,
    those cached, if any, and those left.
    """
    return [(0, tokens), (0, tokens), *([(0, cached)] if cached else []), (cached, tokens)]


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    backward: str,
    logits_budget_bytes: int | None,
    chunk_bytes: int,
) -> linear_logprobs_output.ForwardOutput:
    """Call the Triton backend of linear_logprobs and return all outputs of the registered operation."""
    validated = _validate(
        hidden, weight, labels, backward=backward, logits_budget_bytes=logits_budget_bytes, chunk_bytes=chunk_bytes
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
) -> linear_policy_loss_op.ForwardOutput:
    """Call the Triton backend of the token-level linear_policy_loss and return all outputs of the operation."""
    validated = _validate(hidden, weight, labels, backward="cache", logits_budget_bytes=None, chunk_bytes=chunk_bytes)
    settings = Settings(
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token-mean",
        kl_coef=0.0,
        kl_estimator="k3",
        rollout_correction="none",
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
        group=None,
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
def counted_columns() -> Iterator[list[int]]:
    """Collect in how many columns of the vocabulary the sparse entries of each backward pass lie."""
    counts: list[int] = []
    by_column = weighted_rows.by_column

    def record(*args: Any, **kwargs: Any) -> Any:
        columns = by_column(*args, **kwargs)
        counts.append(len(columns.column))
        return columns

    with ExitStack() as stack:
        for patch in _patch_everywhere("by_column", by_column, record):
            stack.enter_context(patch)
        yield counts
