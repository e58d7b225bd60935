"""group_advantages: each response compared with the others of its group.

    grpo      (r - mean) / (std + 1e-6)    unbiased std      (arXiv 2402.03300)
    dr_grpo   r - mean                                       (arXiv 2503.20783)
    rloo      r - mean of the others = (r - mean) n / (n - 1)     (arXiv 2402.14740)

A group of one has nothing to be compared with and gets 0. Differences between rewards are summed, so a group of equal
rewards gets exactly 0 (from 0.7 and its rounded mean GRPO would otherwise compute 0.06). Groups may differ in size, and
their members need not be adjacent.

The Triton backend sorts the ids and then takes time linear in B, with one program per group. Comparing all pairs of ids
instead would save the sort, some 10 us at B = 512, but take milliseconds at B = 65,536 (both predicted). There are no
atomic additions, so the bits do not depend on the order of programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import HAS_TRITON, pick_backend
from .._registration import operation
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


@operation("group_advantages")
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


# Triton backend: one program per response in the order of the ids. That of a group's first response computes the group.

if HAS_TRITON:

    @triton.jit
    def _end_of_group(id_ptr, start, group, B):
        """Return the index after the last member by binary search in the sorted ids."""
        end = start + 1
        above = B
        while end < above:
            middle = (end + above) // 2
            same = tl.load(id_ptr + middle) == group
            end = tl.where(same, middle + 1, end)
            above = tl.where(same, above, middle)
        return end

    @triton.jit
    def _load_members(reward_ptr, order_ptr, base, first, end, BLOCK: tl.constexpr):
        """Return which lanes have a member, its place in the batch, and its reward minus ``base``."""
        index = first + tl.arange(0, BLOCK)
        inside = index < end
        place = tl.load(order_ptr + index, mask=inside, other=0)
        return inside, place, tl.load(reward_ptr + place, mask=inside, other=0.0).to(tl.float32) - base

    @triton.jit
    def _moments(inside, x):
        n = tl.sum(inside.to(tl.float32), 0)
        mean = tl.sum(tl.where(inside, x, 0.0), 0) / n
        deviation = tl.where(inside, x - mean, 0.0)
        return n, mean, tl.sum(deviation * deviation, 0)

    @triton.jit
    def _advantage(x, n, mean, squares, EPS: tl.constexpr, ESTIMATOR: tl.constexpr):
        others = tl.maximum(n - 1.0, 1.0)
        advantage = x - mean
        if ESTIMATOR == "rloo":
            advantage = advantage * n / others
        if ESTIMATOR == "grpo":
            advantage = advantage / (tl.sqrt(squares / others) + EPS)
        return advantage

    @triton.jit(do_not_specialize=["B"])
    def group_advantages_fwd_kernel(
        reward_ptr,
        id_ptr,
        order_ptr,
        advantage_ptr,
        B,
        EPS: tl.constexpr,
        ESTIMATOR: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        start = tl.program_id(0)
        group = tl.load(id_ptr + start)
        previous = tl.load(id_ptr + start - 1, mask=start > 0, other=0)
        if (start == 0) | (group != previous):
            end = _end_of_group(id_ptr, start, group, B)
            base = tl.load(reward_ptr + tl.load(order_ptr + start)).to(tl.float32)
            inside, place, x = _load_members(reward_ptr, order_ptr, base, start, end, BLOCK)
            n, mean, squares = _moments(inside, x)
            for first in range(start + BLOCK, end, BLOCK):  # Chan, Golub and LeVeque, 1979
                more_inside, _, more = _load_members(reward_ptr, order_ptr, base, first, end, BLOCK)
                m, mean_of_more, squares_of_more = _moments(more_inside, more)
                shift = mean_of_more - mean
                squares += squares_of_more + shift * shift * (n * m / (n + m))
                mean += shift * (m / (n + m))
                n += m
            advantage = _advantage(x, n, mean, squares, EPS, ESTIMATOR)
            tl.store(advantage_ptr + place, advantage, mask=inside)
            for first in range(start + BLOCK, end, BLOCK):
                more_inside, more_places, more = _load_members(reward_ptr, order_ptr, base, first, end, BLOCK)
                advantage_of_more = _advantage(more, n, mean, squares, EPS, ESTIMATOR)
                tl.store(advantage_ptr + more_places, advantage_of_more, mask=more_inside)

    def _triton_group_advantages(rewards, group_ids, estimator):
        advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
        sorted_ids, order = group_ids.sort(stable=True)
        if rewards.shape[0]:
            launch(
                group_advantages_fwd_kernel,
                (rewards.shape[0],),
                reward_ptr=rewards.contiguous(),
                id_ptr=sorted_ids,
                order_ptr=order,
                advantage_ptr=advantages,
                B=rewards.shape[0],
                EPS=EPS,
                ESTIMATOR=estimator,
                BLOCK=256,
                num_warps=4,
            )
        return advantages

    _BACKENDS["triton"] = _triton_group_advantages
