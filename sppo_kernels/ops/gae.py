"""gae: generalized advantage estimation, by reverse scans.

    delta_t = r_t + gamma V_next - V_t         A_t = delta_t + gamma lam A_next         return_t = A_t + V_t

"next" is the next unmasked token of the row (a tool's output inside a response is skipped); after the last one both V
and A are 0. Masked tokens get 0. A_t = delta_t + a_t A_{t+1}, with a_t = gamma lam (where masked, a_t = 1 and
delta_t = 0), is a linear recurrence. Maps x -> d + a x compose, so a block of tokens is an associative scan instead of
a loop over tokens. V_next is a scan too.

Traffic: rewards, values and mask are read once (values and mask a second time from the cache). Advantages and returns
are written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import HAS_TRITON, pick_backend
from .._registration import operation
from .._validation import (
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    reject,
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from .._triton_utils import launch, next_power_of_2


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of token-level PPO (arXiv 1506.02438, equation 16).

    The results are neither differentiated nor whitened.

    Args:
        rewards: ``[B, T]``, floating-point, the reward that follows each token.
        values: ``[B, T]``, floating-point, the critic's value before each token.
        mask: ``[B, T]``, nonzero where a token belongs to the response.
        gamma: discount, in [0, 1].
        lam: interpolates between one-step (0) and Monte-Carlo (1) estimates, in [0, 1].
        backend: ``"reference"``, ``"torch"``, ``"triton"``, or None for triton on an accelerator and torch elsewhere.

    Returns:
        ``(advantages, returns)``: ``[B, T]`` float32, 0 where masked.

    Raises:
        ValueError: a shape or device does not match, or gamma or lam is outside [0, 1].
        TypeError: rewards or values are not floating-point.
    """
    check_floating(rewards=rewards, values=values)
    check_tensor(mask=mask)
    if rewards.ndim != 2:
        reject("rewards", f"shape {tuple(rewards.shape)}", "[B, T]")
    check_shape(rewards.shape, "the shape of rewards", values=values, mask=mask)
    check_device(rewards.device, values=values, mask=mask)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            reject(name, value, "in [0, 1]")
    backend = pick_backend(backend, rewards)
    if backend == "reference":
        return reference(rewards, values, mask, gamma=gamma, lam=lam)
    return _gae(rewards.detach(), values.detach(), mask != 0, gamma=gamma, lam=lam, backend=backend)


def reference(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Definition of ``gae``: a loop from the last token to the first, in float32, or float64 for float64 rewards."""
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards, values, keep = rewards.detach().to(dtype), values.detach().to(dtype), mask != 0
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        now = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * next_advantage
        advantages[:, t] = torch.where(keep[:, t], now, 0.0)
        next_advantage = torch.where(keep[:, t], now, next_advantage)
        next_value = torch.where(keep[:, t], values[:, t], next_value)
    return advantages, torch.where(keep, advantages + values, 0.0)


@operation("gae")
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _BACKENDS[backend](rewards, values, mask, gamma, lam)


@_gae.register_fake
def _(rewards, values, mask, *, gamma, lam, backend):
    return tuple(torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))


# PyTorch backend: the scan in log2(T) doublings


def _reverse_scan(factor: Tensor, term: Tensor) -> Tensor:
    """Solve y_t = term_t + factor_t * y_{t+1}, y_T = 0, along the last dimension."""
    factor, term = factor.clone(), term.clone()
    step = 1
    while step < term.shape[1]:
        term[:, :-step] += factor[:, :-step] * term[:, step:]
        factor[:, :-step] *= factor[:, step:].clone()
        factor[:, -step:] = 0
        step *= 2
    return term


def _torch_gae(rewards, values, mask, gamma, lam):
    rewards, values = rewards.float(), values.float()
    zero = torch.zeros_like(values)
    # The value of the next unmasked token: y_t = V_t where unmasked, else y_{t+1}; then shifted by one token.
    value_from_here = _reverse_scan((~mask).float(), torch.where(mask, values, zero))
    next_value = torch.nn.functional.pad(value_from_here[:, 1:], (0, 1))
    delta = torch.where(mask, rewards + gamma * next_value - values, zero)
    advantages = _reverse_scan(torch.where(mask, gamma * lam, 1.0), delta)
    return torch.where(mask, advantages, zero), torch.where(mask, advantages + values, zero)


_BACKENDS = {"torch": _torch_gae}


# Triton backend: one program per row; blocks of tokens from the last to the first, with two numbers carried over

MAX_BLOCK = 1024  # tokens

if HAS_TRITON:

    @triton.jit
    def _compose(later_factor, later_term, factor, term):
        """Compose the later token's map with this one's: x -> term + factor * (later_term + later_factor * x)."""
        return later_factor * factor, term + factor * later_term

    @triton.jit(do_not_specialize=["T"])
    def gae_fwd_kernel(
        reward_ptr,
        value_ptr,
        mask_ptr,
        advantage_ptr,
        return_ptr,
        T,
        gamma,
        decay,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * T
        next_value_of_block = 0.0
        next_advantage_of_block = 0.0
        blocks = tl.cdiv(T, BLOCK)
        for i in range(0, blocks):
            col = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
            keep = tl.load(mask_ptr + row + col, mask=col < T, other=0) != 0
            value = tl.load(value_ptr + row + col, mask=col < T, other=0.0).to(tl.float32)
            reward = tl.load(reward_ptr + row + col, mask=col < T, other=0.0).to(tl.float32)
            value = tl.where(keep, value, 0.0)

            # The same row shifted by one token: the value of the next unmasked token is also a scan, of maps x -> V or
            # x -> x.
            keep_after = tl.load(mask_ptr + row + col + 1, mask=col + 1 < T, other=0) != 0
            value_after = tl.load(value_ptr + row + col + 1, mask=col + 1 < T, other=0.0).to(tl.float32)
            pass_on, next_value = tl.associative_scan(
                (tl.where(keep_after, 0.0, 1.0), tl.where(keep_after, value_after, 0.0)), 0, _compose, reverse=True
            )
            next_value += pass_on * next_value_of_block

            delta = tl.where(keep, reward + gamma * next_value - value, 0.0)
            factor, advantage = tl.associative_scan((tl.where(keep, decay, 1.0), delta), 0, _compose, reverse=True)
            advantage += factor * next_advantage_of_block
            tl.store(advantage_ptr + row + col, tl.where(keep, advantage, 0.0), mask=col < T)
            tl.store(return_ptr + row + col, tl.where(keep, advantage + value, 0.0), mask=col < T)

            first = tl.arange(0, BLOCK) == 0
            next_value_of_block = tl.sum(tl.where(first, next_value, 0.0), 0)
            next_advantage_of_block = tl.sum(tl.where(first, advantage, 0.0), 0)

    def _triton_gae(rewards, values, mask, gamma, lam):
        advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
        rows, length = rewards.shape
        if rewards.numel():
            launch(
                gae_fwd_kernel,
                (rows,),
                reward_ptr=rewards.contiguous(),
                value_ptr=values.contiguous(),
                mask_ptr=mask.contiguous(),
                advantage_ptr=advantages,
                return_ptr=returns,
                T=length,
                gamma=gamma,
                decay=gamma * lam,
                BLOCK=min(MAX_BLOCK, next_power_of_2(length)),
                num_warps=4,
            )
        return advantages, returns

    _BACKENDS["triton"] = _triton_gae
