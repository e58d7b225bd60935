"""group_advantages: each response compared with the others of its group.

    grpo      (r - mean) / (std + 1e-6)    unbiased std      (arXiv 2402.03300)
    dr_grpo   r - mean                                       (arXiv 2503.20783)
    rloo      r - mean of the others = (r - mean) n / (n - 1)     (arXiv 2402.14740)

A group of one has nothing to be compared with and gets 0. Differences between rewards are summed, so a group of equal
rewards gets exactly 0 (from 0.7 and its rounded mean GRPO would otherwise compute 0.06). Groups may differ in size, and
their members need not be adjacent.

The Triton backend compares all pairs of group ids in one launch: B^2 comparisons for B rewards, 16 million at
B = 4,096, where sorting would take several launches. There are no atomic additions, so the bits do not depend on
the order of programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import HAS_TRITON, NAMESPACE, pick_backend
from .._validation import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_shape,
    reject,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .._triton_utils import launch

ESTIMATORS = ("grpo", "dr_grpo", "rloo")
EPS = 1e-6


def group_advantages(
    rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo", backend: str | None = None
) -> Tensor:
    """Compute group-relative advantages.

    Sources: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), RLOO (arXiv 2402.14740).

    Args:
        rewards: ``[B]``, floating-point. Not differentiated.
        group_ids: ``[B]``, integers; responses to the same prompt share an id.
        estimator: ``"grpo"``, ``"dr_grpo"`` or ``"rloo"``.
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``[B]`` float32.

    Raises:
        ValueError: a shape or device does not match, or the estimator is unknown.
        TypeError: rewards are not floating-point, or group ids are not integers.
    """
    check_floating(rewards=rewards)
    check_integer(group_ids=group_ids)
    if rewards.ndim != 1:
        reject("rewards", f"shape {tuple(rewards.shape)}", "[B]")
    check_shape(rewards.shape, "one per reward", group_ids=group_ids)
    check_device(rewards.device, group_ids=group_ids)
    check_choice("estimator", estimator, ESTIMATORS)
    backend = pick_backend(backend, rewards)
    if backend == "reference":
        return reference(rewards, group_ids, estimator=estimator)
    return _group_advantages(rewards.detach(), group_ids, estimator=estimator, backend=backend)


def reference(rewards: Tensor, group_ids: Tensor, *, estimator: str = "grpo") -> Tensor:
    """Definition of ``group_advantages`` on the ``[B, B]`` matrix of equal ids, in float32, or float64 for float64."""
    r = rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    same = group_ids[:, None] == group_ids[None, :]
    n = same.sum(1)
    difference = torch.where(same, r[None, :] - r[:, None], 0.0)
    deviation = -difference.sum(1) / n
    others = (n - 1).clamp(min=1)
    if estimator == "rloo":
        return deviation * n / others
    if estimator == "dr_grpo":
        return deviation
    variance = torch.where(same, (difference + deviation[:, None]).square(), 0.0).sum(1) / others
    return deviation / (variance.sqrt() + EPS)


@torch.library.custom_op(f"{NAMESPACE}::group_advantages", mutates_args=())
def _group_advantages(rewards: Tensor, group_ids: Tensor, *, estimator: str, backend: str) -> Tensor:
    return _BACKENDS[backend](rewards, group_ids, estimator)


@_group_advantages.register_fake
def _(rewards, group_ids, *, estimator, backend):
    return torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)


# PyTorch backend: sorts the group ids, then takes time linear in B


def _torch_group_advantages(rewards, group_ids, estimator):
    r = rewards.float()
    _, group, n = group_ids.unique(return_inverse=True, return_counts=True)

    def group_sum(x: Tensor) -> Tensor:
        return x.new_zeros(len(n)).index_add_(0, group, x)

    above_least = r - r.new_full((len(n),), torch.inf).scatter_reduce_(0, group, r, "amin")[group]
    deviation = above_least - (group_sum(above_least) / n)[group]
    others = (n - 1).clamp(min=1)
    if estimator == "rloo":
        return deviation * (n / others)[group]
    if estimator == "dr_grpo":
        return deviation
    return deviation / ((group_sum(deviation.square()) / others).sqrt()[group] + EPS)


_BACKENDS = {"torch": _torch_group_advantages}


# Triton backend: one program per block of responses, which reads all responses twice

if HAS_TRITON:

    @triton.jit(do_not_specialize=["B"])
    def group_advantages_fwd_kernel(
        reward_ptr,
        id_ptr,
        advantage_ptr,
        B,
        EPS: tl.constexpr,
        ESTIMATOR: tl.constexpr,
        ROWS: tl.constexpr,
        COLS: tl.constexpr,
    ):
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        r = tl.load(reward_ptr + row, mask=row < B, other=0.0).to(tl.float32)
        group = tl.load(id_ptr + row, mask=row < B, other=0)
        n = tl.zeros([ROWS], tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for start in range(0, B, COLS):
            col = start + tl.arange(0, COLS)
            other = tl.load(reward_ptr + col, mask=col < B, other=0.0).to(tl.float32)
            same = (group[:, None] == tl.load(id_ptr + col, mask=col < B, other=0)[None, :]) & (col < B)[None, :]
            n += tl.sum(same.to(tl.float32), 1)
            total += tl.sum(tl.where(same, other[None, :] - r[:, None], 0.0), 1)
        deviation = -total / tl.maximum(n, 1.0)
        others = tl.maximum(n - 1.0, 1.0)
        advantage = deviation
        if ESTIMATOR == "rloo":
            advantage = deviation * n / others
        if ESTIMATOR == "grpo":
            squares = tl.zeros([ROWS], tl.float32)
            for start in range(0, B, COLS):
                col = start + tl.arange(0, COLS)
                other = tl.load(reward_ptr + col, mask=col < B, other=0.0).to(tl.float32)
                same = (group[:, None] == tl.load(id_ptr + col, mask=col < B, other=0)[None, :]) & (col < B)[None, :]
                d = other[None, :] - r[:, None] + deviation[:, None]
                squares += tl.sum(tl.where(same, d * d, 0.0), 1)
            advantage = deviation / (tl.sqrt(squares / others) + EPS)
        tl.store(advantage_ptr + row, advantage, mask=row < B)

    def _triton_group_advantages(rewards, group_ids, estimator):
        advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
        n, rows = rewards.shape[0], 32
        if n:
            launch(
                group_advantages_fwd_kernel,
                (triton.cdiv(n, rows),),
                reward_ptr=rewards.contiguous(),
                id_ptr=group_ids.contiguous(),
                advantage_ptr=advantages,
                B=n,
                EPS=EPS,
                ESTIMATOR=estimator,
                ROWS=rows,
                COLS=128,
                num_warps=4,
            )
        return advantages

    _BACKENDS["triton"] = _triton_group_advantages
