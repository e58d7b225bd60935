"""Validation of the arguments that linear_logprobs and linear_policy_loss share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..._backend import autocast_is_on, pick_backend
from ..._validation import (
    check_choice,
    check_device,
    check_floating,
    check_int,
    check_integer,
    check_number,
    check_shape,
    reject,
)
from ..selective_logprobs import check_softcap, check_temperature, temperature_per_row
from ..support_passes import Support, check_support
from .auto_mode import AutoBackward
from .projection import PROJECTIONS, choose_projection
from .sparse import MAX_ENTRIES

BACKWARDS = ("auto", "recompute", "cache", "sparse")
_CHUNK_BYTES_CPU = 1 << 28
_CHUNK_BYTES_ACCELERATOR = 1 << 31


class Arguments(NamedTuple):
    """Arguments of the registered operation: validated, cast as autocast would, tokens in one dimension."""

    hiddens: list[Tensor]  # [N, H], and that of the adapter
    weights: list[Tensor]  # [V, H], and that of the adapter
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    temperature: Tensor  # [N] float32
    support_ids: Tensor | None  # [M] int64
    support_offsets: Tensor | None  # [N + 1] int64
    softcap: float  # 0 for none
    ignore_index: int
    backward: str
    auto_key: str  # of an AutoBackward; "" for the default of the weight
    logits_budget_bytes: int | None
    chunk_bytes: int
    mass_tolerance: float
    max_entries: int
    projection: str  # "vendor" or "fused"
    group: str  # name of the process group, "" for none
    backend: str

    @property
    def adapter(self) -> tuple[Tensor, Tensor] | None:
        """The adapter's pair, or None."""
        return (self.hiddens[1], self.weights[1]) if len(self.hiddens) > 1 else None

    @property
    def support(self) -> Support | None:
        """The sampler's support, or None."""
        if self.support_ids is None or self.support_offsets is None:
            return None
        return Support(self.support_ids, self.support_offsets)

    @classmethod
    def validate(
        cls,
        *,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        adapter: tuple[Tensor, Tensor] | None,
        temperature: float | Tensor,
        softcap: float | None,
        ignore_index: int,
        backward: str | AutoBackward,
        logits_budget_bytes: int | None,
        chunk_bytes: int | None,
        mass_tolerance: float,
        max_entries: int,
        projection: str,
        group: dist.ProcessGroup | None,
        support: tuple[Tensor, Tensor] | None,
        backend: str | None,
    ) -> Arguments:
        """Validate the arguments of ``linear_logprobs``. Raises ValueError or TypeError."""
        _check_tensors(hidden, weight, labels, bias)
        hiddens, weights = [hidden], [weight]
        if adapter is not None:
            _check_adapter(adapter, hidden, weight)
            hiddens.append(adapter[0])
            weights.append(adapter[1])
        check_softcap(softcap)
        check_temperature(temperature, labels)
        support_ids, support_offsets = check_support(support, labels) or (None, None)
        auto_key = backward.key if isinstance(backward, AutoBackward) else ""
        backward = "auto" if isinstance(backward, AutoBackward) else backward
        check_choice("backward", backward, BACKWARDS)
        if logits_budget_bytes is not None:
            check_int("logits_budget_bytes", logits_budget_bytes, least=0)
        if chunk_bytes is not None:
            check_int("chunk_bytes", chunk_bytes, least=1)
        check_int("ignore_index", ignore_index, least=-(2**63))
        check_number("mass_tolerance", mass_tolerance)
        if not 0 < mass_tolerance < 1:
            reject("mass_tolerance", mass_tolerance, "in (0, 1)")
        check_int("max_entries", max_entries, least=1)
        if max_entries > MAX_ENTRIES:
            reject("max_entries", max_entries, f"at most {MAX_ENTRIES} (more would cost what they save)")
        check_choice("projection", projection, PROJECTIONS)
        backend = pick_backend(backend, hidden)
        group_name = _name_of(group, backend)
        if autocast_is_on(hidden.device):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hiddens, weights = [x.to(dtype) for x in hiddens], [x.to(dtype) for x in weights]
            bias = None if bias is None else bias.to(dtype)
        _check_dtypes(hiddens, weights, backend)
        differentiated = torch.is_grad_enabled() and any(
            x.requires_grad for x in (*hiddens, *weights, bias) if x is not None
        )
        if chunk_bytes is None:
            chunk_bytes = _CHUNK_BYTES_CPU if hidden.device.type == "cpu" else _CHUNK_BYTES_ACCELERATOR
        return cls(
            hiddens=[x.reshape(-1, x.shape[-1]) for x in hiddens],
            weights=weights,
            bias=bias,
            labels=labels.reshape(-1).long(),
            temperature=temperature_per_row(temperature, labels),
            support_ids=support_ids,
            support_offsets=support_offsets,
            softcap=softcap or 0.0,
            ignore_index=ignore_index,
            backward=backward if differentiated else "recompute",
            auto_key=auto_key,
            logits_budget_bytes=logits_budget_bytes,
            chunk_bytes=chunk_bytes,
            mass_tolerance=max(float(mass_tolerance), 1e-30),  # less is beyond float32
            max_entries=max_entries,
            projection=choose_projection(projection, weights[0], backend=backend, group=group_name),
            group=group_name,
            backend=backend,
        )


def _check_tensors(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if x is None:
            reject(name, None, "a torch.Tensor", TypeError)
    check_floating(hidden=hidden, weight=weight, bias=bias)
    check_integer(labels=labels)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        reject("hidden", f"shape {tuple(hidden.shape)}", "[..., H] with at least one column")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        reject("weight", f"shape {tuple(weight.shape)}", f"[V, H] with H = {hidden.shape[-1]}")
    check_shape(hidden.shape[:-1], "the shape of hidden without its last dimension", labels=labels)
    check_shape(weight.shape[:1], "one per row of weight", bias=bias)
    check_device(hidden.device, weight=weight, labels=labels, bias=bias)


def _check_adapter(adapter: tuple[Tensor, Tensor], hidden: Tensor, weight: Tensor) -> None:
    if not isinstance(adapter, tuple | list) or len(adapter) != 2 or any(x is None for x in adapter):
        got = [type(x).__name__ for x in adapter] if isinstance(adapter, tuple | list) else type(adapter).__name__
        reject("adapter", got, "a pair of tensors (u [..., r], B [V, r]), or None", TypeError)
    u, b = adapter
    for name, x in (("adapter[0]", u), ("adapter[1]", b)):
        check_floating(**{name: x})
        check_device(hidden.device, **{name: x})
    if u.ndim == 0 or u.shape[:-1] != hidden.shape[:-1] or u.shape[-1] == 0:
        reject("adapter[0]", f"shape {tuple(u.shape)}", f"of shape {(*hidden.shape[:-1], 'r')} (one row per token)")
    check_shape((weight.shape[0], u.shape[-1]), "one row per row of weight", **{"adapter[1]": b})


def _check_dtypes(hiddens: list[Tensor], weights: list[Tensor], backend: str) -> None:
    for name, x in zip(("weight", "adapter[0]", "adapter[1]"), (weights[0], hiddens[-1], weights[-1]), strict=True):
        if x.dtype != hiddens[0].dtype:
            want = f"of the dtype of hidden, {hiddens[0].dtype} (cast one, or use autocast)"
            reject(name, x.dtype, want, TypeError)
    if backend != "reference" and hiddens[0].dtype not in (torch.float16, torch.bfloat16, torch.float32):
        want = "float16, bfloat16 or float32 (float64: backend='reference')"
        reject("hidden", hiddens[0].dtype, want, TypeError)


def _name_of(group: dist.ProcessGroup | None, backend: str) -> str:
    """Return the name of a process group, since a registered operation takes no objects; "" for none."""
    if group is None:
        return ""
    if backend == "reference":
        reject("group", group, "None with backend='reference', which is defined on the complete weight")
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        want = "a torch.distributed.ProcessGroup that contains this process (of a mesh: mesh.get_group()), or None"
        reject("group", group, want, TypeError)
    return group.group_name
