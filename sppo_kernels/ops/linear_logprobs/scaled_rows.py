"""Rows multiplied by factors, gathered and scattered: what surrounds the matrix products of backward.

    out[target] = a x[source] + b W[label]

With the second term this finishes a gradient of hidden states, of which the products have left the label out. Without
it, it prepares hidden states for the product that gives the gradient of the output embedding. One pass over the rows,
where PyTorch takes one per operator, in float32.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..._backend import HAS_TRITON

if HAS_TRITON:
    import triton
    import triton.language as tl

    from ..._triton_utils import cdiv, launch, next_power_of_2


def _torch_scaled_rows(
    *,
    out: Tensor,
    x: Tensor,
    factor: Tensor,
    source: Tensor | None = None,
    target: Tensor | None = None,
    label_factor: Tensor | None = None,
    labels: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Set rows of ``out`` to those of ``x`` times ``factor`` [C] or [], plus rows of ``weight`` times ``label_factor``.

    Args:
        out: written at rows ``target`` [C], or at all of its C rows.
        x: read at rows ``source`` [C], or at all of its C rows.
        factor: float32.
        source: row numbers or None.
        target: row numbers or None.
        label_factor: ``[C]`` float32; None for no second term.
        labels: ``[C]``, rows of ``weight``; a number past its end, whose factor must be 0, for none.
        weight: ``[V, H]``.
    """
    rows = (x if source is None else x[source]) * factor.reshape(-1, 1)
    if label_factor is not None:
        assert labels is not None
        assert weight is not None
        rows += label_factor[:, None] * weight[labels.clamp(max=len(weight) - 1)]
    out[slice(None) if target is None else target] = rows.to(out.dtype)


SCALED_ROWS: dict[str, Callable[..., None]] = {"torch": _torch_scaled_rows}


if HAS_TRITON:
    _BLOCK = 1024  # columns per program
    _COLUMNS_PER_WARP = 256

    # One program per row and block of columns. The labels' factors follow others, at an alignment that varies.
    @triton.jit(do_not_specialize_on_alignment=["label_factor_ptr"])
    def linear_logprobs_scaled_rows_kernel(
        out_ptr,
        x_ptr,
        factor_ptr,
        source_ptr,
        target_ptr,
        label_factor_ptr,
        label_ptr,
        weight_ptr,
        stride_out,
        stride_x,
        stride_x_column,
        stride_factor,
        stride_weight,
        stride_weight_column,
        H,
        V,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = column < H
        source = row
        if source_ptr is not None:
            source = tl.load(source_ptr + row)
        y = tl.load(x_ptr + source * stride_x + column * stride_x_column, mask=mask, other=0.0).to(tl.float32)
        y *= tl.load(factor_ptr + row * stride_factor)
        if label_factor_ptr is not None:
            label = tl.load(label_ptr + row)
            at = weight_ptr + label * stride_weight + column * stride_weight_column
            w = tl.load(at, mask=column < tl.where(label < V, H, 0), other=0.0)
            y += tl.load(label_factor_ptr + row) * w.to(tl.float32)
        target = row
        if target_ptr is not None:
            target = tl.load(target_ptr + row)
        tl.store(out_ptr + target * stride_out + column, y, mask=mask)

    def _triton_scaled_rows(*, out, x, factor, source=None, target=None, label_factor=None, labels=None, weight=None):
        """Set what ``_torch_scaled_rows`` does."""
        num_rows, width = len(x) if source is None else len(source), x.shape[1]
        if not num_rows:
            return
        block = min(_BLOCK, next_power_of_2(width))
        launch(
            linear_logprobs_scaled_rows_kernel,
            (num_rows, cdiv(width, block)),
            out_ptr=out,
            x_ptr=x,
            factor_ptr=factor,
            source_ptr=source,
            target_ptr=target,
            label_factor_ptr=label_factor,
            label_ptr=labels,
            weight_ptr=weight,
            stride_out=out.stride(0),
            stride_x=x.stride(0),
            stride_x_column=x.stride(1),
            stride_factor=factor.stride(0) if factor.ndim else 0,
            stride_weight=0 if weight is None else weight.stride(0),
            stride_weight_column=1 if weight is None else weight.stride(1),
            H=width,
            V=0 if weight is None else len(weight),
            BLOCK=block,
            num_warps=max(1, block // _COLUMNS_PER_WARP),
        )

    SCALED_ROWS["triton"] = _triton_scaled_rows
