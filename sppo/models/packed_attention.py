"""Causal attention over packed sequences, registered with transformers under the name ``sppo_packed``.

Sequences lie behind each other in one row of N tokens; ``cu_seq_lens_q`` int32 ``[S + 1]`` says where each begins. No
token is padding and no mask of N x N elements exists. Kernels, best first: flash-attn 4, 3 or 2 where one is installed
for the device, PyTorch's own variable-length one on CUDA, else one ``scaled_dot_product_attention`` a length.
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


@contextmanager
def use_attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let every layer of ``model`` use an attention implementation of transformers, and what it had before afterwards.

    It must stay in force until backward is done: activation checkpointing runs the layers again there.
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
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; signature of transformers' attention functions.

    Args:
        query: ``[1, heads, N, D]``; key and value: ``[1, kv_heads, N, D]`` with kv_heads a divisor of heads.
        cu_seq_lens_q: int32 ``[S + 1]``, from 0 to N.
        max_length_q: tokens of the longest sequence, or more.
        scaling: factor on the scores; None for ``D ** -0.5``.
        sliding_window: a token sees this many tokens, itself among them; None for all before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        ``[1, N, heads, D]`` and None, for the attention weights that no kernel here keeps.
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if torch.is_autocast_enabled(query.device.type):  # over float32 weights rotary leaves query and key in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        if flash := flash_attention(torch.cuda.get_device_capability(query.device)):
            out = by_flash_attention(
                flash, query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap
            )
            return out, None
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        left = sliding_window - 1 if sliding_window else -1
        if (varlen := _torch_varlen()) and not softcap:
            gqa = q.shape[1] != k.shape[1]
            return varlen(q, k, v, *lengths, scale=scale, window_size=(left, 0), enable_gqa=gqa)[None], None
    # Neighbours of one length go together: micro-batches are dealt by length, and a call has its price on a CPU.
    runs = [(n, len(list(run))) for n, run in groupby(cu_seq_lens_q.diff().tolist())]
    parts = zip(runs, *(x[0].split([n * count for n, count in runs], 1) for x in (query, key, value)), strict=True)
    outs = []
    for (n, count), *part in parts:
        q, k, v = (x.unflatten(1, (count, n)).transpose(0, 1) for x in part)
        outs.append(_attend(q, k, v, scale, sliding_window, softcap).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


def by_flash_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """:func:`packed_attention` by a flash-attn, through transformers, which knows what each version calls things.

    Its backward adds in no fixed order unless ``full_determinism=True`` is among the training arguments.
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


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None, softcap: float | None) -> Tensor:
    """Sequences of one length, ``[S, heads, T, D]``."""
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
    """What transformers calls the newest flash-attn that is installed and made for a CUDA device, or None."""
    choices = {
        "flash_attention_4": (is_flash_attn_4_available, (9, 10)),
        "flash_attention_3": (is_flash_attn_3_available, (9,)),
        "flash_attention_2": (is_flash_attn_2_available, (8, 9)),
    }
    fitting = (name for name, (installed, made_for) in choices.items() if capability[0] in made_for and installed())
    return next(fitting, None)


@cache
def _torch_varlen() -> Any:
    """PyTorch's variable-length attention, once it knows windows and grouped heads (older ones know neither)."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


class Packed(NamedTuple):
    """Sequences behind each other: ``input_ids`` and ``position_ids`` ``[1, N]``, ``cu_seqlens`` int32 ``[S + 1]``."""

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    """Lay token sequences behind each other, with positions that start at 0 in each."""
    return Packed(
        torch.tensor([[token for sequence in sequences for token in sequence]]),
        torch.tensor([[position for sequence in sequences for position in range(len(sequence))]]),
        cumulative([len(sequence) for sequence in sequences]),
    )


def cumulative(lengths: Sequence[int]) -> Tensor:
    """Boundaries of sequences of these lengths: int32 ``[len(lengths) + 1]``, from 0."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def packed_hidden(model: PreTrainedModel, packed: Packed, max_length: int) -> Tensor:
    """Last hidden states ``[N, H]`` of the backbone; ``use_attention(model, PACKED_ATTENTION)`` must be in force."""
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
