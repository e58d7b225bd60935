"""Causal attention over packed sequences, registered with transformers under the name ``sppo_packed``.

Sequences are concatenated in one row of N tokens; ``cu_seq_lens_q``, int32 ``[S + 1]``, holds their boundaries. There
is no padding and no N x N mask. Kernels in order of preference: flash-attn 4, 3 or 2 if installed for the device,
PyTorch's variable-length attention on CUDA, otherwise one ``scaled_dot_product_attention`` per run of equal lengths.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

PACKED_ATTENTION = "sppo_packed"
"""Name of the attention implementation in transformers' registry."""


@contextmanager
def use_attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Switch every layer of ``model`` to an attention implementation of transformers within a context.

    The context must include backward: activation checkpointing runs the layers again there.
    """
    found = (getattr(module, "config", None) for module in model.modules())
    configs = list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = implementation
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence, with the signature of transformers' attention functions.

    Args:
        module: the attention layer; not used.
        query: ``[1, heads, N, D]``.
        key, value: ``[1, kv_heads, N, D]`` with kv_heads a divisor of heads.
        attention_mask: not used.
        cu_seq_lens_q: int32 ``[S + 1]``, boundaries from 0 to N.
        max_length_q: number of tokens of the longest sequence, or more.
        scaling: factor of the scores; None for ``D ** -0.5``.
        sliding_window: number of tokens that a token attends to, including itself; None for all before it.
        softcap: if given, scores become ``softcap * tanh(scores / softcap)``.
        s_aux: attention sinks, which no kernel here has; must be None.

    Returns:
        ``[1, N, heads, D]``, and None in place of the attention weights, which no kernel here keeps.

    Raises:
        TypeError: the layer has attention sinks.
    """
    if s_aux is not None:
        raise TypeError(f"{type(module).__name__} has attention sinks")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):  # over float32 weights rotary leaves query and key in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if flash := flash_attention(torch.cuda.get_device_capability(query.device)):
            out = by_flash_attention(
                query,
                key,
                value,
                name=flash,
                cu_seqlens=cu_seq_lens_q,
                max_length=max_length_q,
                scale=scale,
                sliding_window=sliding_window,
                softcap=softcap,
            )
            return out, None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        left = sliding_window - 1 if sliding_window else -1
        if (varlen := _torch_varlen()) and not softcap:
            gqa = q.shape[1] != k.shape[1]
            return varlen(q, k, v, *lengths, scale=scale, window_size=(left, 0), enable_gqa=gqa)[None], None
    # Neighbours of equal length share a call, which is expensive on a CPU; micro-batches are sorted by length.
    runs = [(n, len(list(run))) for n, run in groupby(cu_seq_lens_q.diff().tolist())]
    parts = zip(runs, *(x[0].split([n * count for n, count in runs], 1) for x in (query, key, value)), strict=True)
    outs = []
    for (n, count), *part in parts:
        q, k, v = (x.unflatten(1, (count, n)).transpose(0, 1) for x in part)
        out = _attend(q, k, v, scale=scale, sliding_window=sliding_window, softcap=softcap)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


def by_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    name: str,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Compute :func:`packed_attention` with flash-attn, through transformers, which adapts to its version.

    Its backward is not deterministic unless the training arguments have ``full_determinism=True``.
    """
    attend: Any = _flash_attention_forward
    return attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        softmax_scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max_length,
        max_length_k=max_length,
        attn_implementation=name,
    )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Attend within sequences of equal length, ``[S, heads, T, D]``."""
    n, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if not softcap and (sliding_window is None or sliding_window >= n):
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    i = torch.arange(n, device=q.device)
    seen = (i <= i[:, None]) & (i > i[:, None] - (sliding_window or n))
    if not softcap:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=gqa)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * scale / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v


@cache
def flash_attention(capability: tuple[int, int]) -> str | None:
    """Return transformers' name of the newest flash-attn that is installed and supports a CUDA device, or None."""
    choices = {
        "flash_attention_4": (is_flash_attn_4_available, (9, 10)),
        "flash_attention_3": (is_flash_attn_3_available, (9,)),
        "flash_attention_2": (is_flash_attn_2_available, (8, 9)),
    }
    usable = (name for name, (installed, majors) in choices.items() if capability[0] in majors and installed())
    return next(usable, None)


@cache
def _torch_varlen() -> Any:
    """Return PyTorch's variable-length attention if it supports windows and grouped heads, else None."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


class Packed(NamedTuple):
    """Concatenated sequences: ``input_ids`` and ``position_ids`` ``[1, N]``, ``cu_seqlens`` int32 ``[S + 1]``."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Concatenate token sequences, with positions that start at 0 in each."""
    return Packed(
        torch.tensor([[token for sequence in sequences for token in sequence]]),
        torch.tensor([[position for sequence in sequences for position in range(len(sequence))]]),
        cumulative([len(sequence) for sequence in sequences]),
    )


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Return the boundaries of sequences of these lengths: int32 ``[len(lengths) + 1]``, from 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_hidden(model: PreTrainedModel, packed: Packed, max_length: int) -> Tensor:
    """Compute the backbone's last hidden states ``[N, H]``, within ``use_attention(model, PACKED_ATTENTION)``."""
    output = model.base_model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        cu_seq_lens_q=packed.cu_seqlens,
        cu_seq_lens_k=packed.cu_seqlens,
        max_length_q=max_length,
        max_length_k=max_length,
    )
    return output.last_hidden_state[0]
