"""Environment of a step: other processes, a device, plain log-probabilities, and the kinds of allocations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface

from benchmarks.train_memory.step import StepAllocations
from sppo.models import actor_critic
from sppo.models import packed_attention as attention
from sppo.models.actor_critic import ActorCritic
from sppo.models.fsdp import gathered
from sppo.models.packed_attention import PACKED_ATTENTION
from sppo_kernels import LogprobOutput


@contextmanager
def processes(count: int) -> Iterator[DeviceMesh | None]:
    """Start a process group that sends nothing; yield None for a single process."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("fsdp",))
    finally:
        dist.destroy_process_group()


def shard(model: ActorCritic, mesh: DeviceMesh) -> None:
    """Shard the models as ``accelerate`` does for ``fsdp=True`` and ``bf16=True``."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=False,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
    )
    fsdp2_prepare_model(accelerator, model)


def measurable() -> bool:
    """Return whether this version of torch has the attention that a GPU without flash-attn uses."""
    return attention._torch_varlen() is not None


def attention_on_cuda(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as sppo.models.packed_attention does on CUDA without flash-attn, whose memory is the same.

    All tokens are one sequence where the lengths would have to be read.
    """
    if query.dtype == torch.float32:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return attention._torch_varlen()(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None


@contextmanager
def on_cuda() -> Iterator[None]:
    """Make code that reads values or the device see what it would see on CUDA."""
    with (
        mock.patch.dict(AttentionInterface._global_mapping, {PACKED_ATTENTION: attention_on_cuda}),
        mock.patch.object(adam, "_get_value", return_value=1.0),
        mock.patch.object(FakeTensor, "tolist", lambda x: [0.0] * len(x)),
    ):
        yield


@contextmanager
def before_an_update(model: ActorCritic) -> Iterator[None]:
    """Enter the contexts in which the trainer computes values and old log-probabilities."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), gathered(model, reshard_after_forward=True):
        yield


def eager_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float, bias: Tensor | None, **_: Any
) -> LogprobOutput:
    """Compute log-probabilities as plain trainers do, all logits at once."""
    logp = (nn.functional.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return LogprobOutput(logp.gather(-1, labels[:, None])[:, 0], entropy)


@contextmanager
def tracked_kinds(
    allocations: StepAllocations, model: ActorCritic, logprobs: Callable[..., LogprobOutput]
) -> Iterator[None]:
    """Compute log-probabilities with ``logprobs``, and set the kinds of allocations in forward and backward."""

    def turn(*kind: str) -> None:
        allocations.kind = kind

    def of_head(hidden: Tensor, *args: Any, **kwargs: Any) -> LogprobOutput:
        with allocations.making(("policy", "logits")):
            output = logprobs(hidden, *args, **kwargs)
        if hidden.requires_grad:
            output.logprobs.register_hook(lambda _: turn("policy", "logits"))
            hidden.register_hook(lambda _: turn("policy", "activations"))
        return output

    def labelled(name: str, kind: str) -> Any:
        method = getattr(FSDPParamGroup, name)

        def run(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            if name == "post_backward":
                grads = [p.unsharded_param.grad for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
                allocations.name((allocations.kind[0], kind), [grad for grad in grads if grad is not None])
            with allocations.making_of_same(kind):
                return method(group, *args, **kwargs)

        return mock.patch.object(FSDPParamGroup, name, run)

    patches = [
        mock.patch.object(actor_critic, "linear_logprobs", of_head),
        labelled("unshard", "copies"),
        labelled("wait_for_unshard", "copies"),
        labelled("post_backward", "gradients"),
    ]
    if (critic_model := model.critic) is not None:
        loss = allocations.making(("critic", "activations"))
        patches.append(mock.patch.object(critic_model, "loss", loss(critic_model.loss)))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
