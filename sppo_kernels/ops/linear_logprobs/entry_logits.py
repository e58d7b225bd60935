"""Single logits: products of hidden states with chosen rows of the output embedding.

    out[e] = <hidden[token[e]], weight[column[e]]> + bias[column[e]]

A logit takes 2 H FLOPs and reads H elements of the output embedding, and of the hidden state unless it is in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..._backend import HAS_TRITON, without_autocast

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import cdiv, launch, next_power_of_2

_CPU_ELEMENTS = 1 << 18  # of gathered rows at a time: 1 MB, so that they stay in the cache


def _torch_entry_logits(
    *, out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor, column: Tensor, add: bool
) -> None:
    """Set logits of entries, or add to them if ``add``.

    Args:
        out: ``[M]`` float32; 0 is set, or added, where there is no logit.
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]`` or None.
        token: ``[M]``, rows of ``hidden``, ascending; -1 for no logit.
        column: ``[M]``, rows of ``weight``; no logit for a number outside [0, V).
        add: see above.
    """
    if not add:
        out.zero_()
    entries = ((token >= 0) & (column >= 0) & (column < len(weight))).nonzero().squeeze(-1)
    if weight.dtype == torch.float32 and weight.is_contiguous():
        out[entries] += _sampled_products(hidden, weight, token[entries], column[entries])
    else:  # copied to float32, a few rows at a time
        for entry in entries.split(max(1, _CPU_ELEMENTS // hidden.shape[1])):
            with without_autocast(out.device):
                out[entry] += torch.linalg.vecdot(weight[column[entry]].float(), hidden[token[entry]].float())
    if bias is not None:
        out[entries] += bias[column[entries]].float()


def _sampled_products(hidden: Tensor, weight: Tensor, token: Tensor, column: Tensor) -> Tensor:
    """Return the logits of entries that are sorted by token, without copies of their rows."""
    tokens = torch.arange(len(hidden) + 1, device=token.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # that CSR is in beta, that indices are not checked
        pattern = torch.sparse_csr_tensor(
            torch.searchsorted(token, tokens),
            column,
            torch.zeros(len(token), device=token.device),
            size=(len(hidden), len(weight)),
            check_invariants=False,
        )
    return torch.sparse.sampled_addmm(pattern, hidden.contiguous(), weight.t(), beta=0.0).values()


ENTRY_LOGITS: dict[str, Callable[..., None]] = {"torch": _torch_entry_logits}


if HAS_TRITON:
    _ENTRIES = 16  # per program
    _WIDEST = 256  # columns per step: 16 bytes per thread of a warp in half precision

    # One program per 16 entries, whichever tokens they belong to, so that supports of any size take equally long. Each
    # thread keeps sums of its own, which are added up once.
    @triton.jit(do_not_specialize=["M"])
    def linear_logprobs_entry_logits_kernel(
        out_ptr,
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        token_ptr,
        column_ptr,
        stride_hidden,
        stride_hidden_column,
        stride_weight,
        stride_weight_column,
        M,
        H,
        V,
        ADD: tl.constexpr,
        ENTRIES: tl.constexpr,
        BLOCK_H: tl.constexpr,
    ):
        entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
        mask = entry < M
        token = tl.load(token_ptr + entry, mask=mask, other=-1)
        column = tl.load(column_ptr + entry, mask=mask, other=-1)
        needed = (token >= 0) & (column >= 0) & (column < V)
        hidden_ptr += token[:, None] * stride_hidden
        weight_ptr += column[:, None] * stride_weight
        total = tl.zeros([ENTRIES, BLOCK_H], tl.float32)
        for start in range(0, H, BLOCK_H):
            h = start + tl.arange(0, BLOCK_H)[None, :].to(tl.int64)
            both = needed[:, None] & (h < H)
            a = tl.load(hidden_ptr + h * stride_hidden_column, mask=both, other=0.0).to(tl.float32)
            b = tl.load(weight_ptr + h * stride_weight_column, mask=both, other=0.0).to(tl.float32)
            total += a * b
        logits = tl.sum(total, 1)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + column, mask=needed, other=0.0).to(tl.float32)
        if ADD:
            logits += tl.load(out_ptr + entry, mask=mask, other=0.0)
        tl.store(out_ptr + entry, logits, mask=mask)

    def _triton_entry_logits(*, out, hidden, weight, bias, token, column, add):
        """Set what ``_torch_entry_logits`` does."""
        if not len(out):
            return
        width = hidden.shape[1]
        block = min(_WIDEST, next_power_of_2(width))
        launch(
            linear_logprobs_entry_logits_kernel,
            (cdiv(len(out), _ENTRIES),),
            out_ptr=out,
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=bias,
            token_ptr=token,
            column_ptr=column,
            stride_hidden=hidden.stride(0),
            stride_hidden_column=hidden.stride(1),
            stride_weight=weight.stride(0),
            stride_weight_column=weight.stride(1),
            M=len(out),
            H=width,
            V=len(weight),
            ADD=add,
            ENTRIES=_ENTRIES,
            BLOCK_H=block,
            num_warps=4,
        )

    ENTRY_LOGITS["triton"] = _triton_entry_logits
