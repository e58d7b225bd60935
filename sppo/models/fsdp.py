"""Weights sharded over processes by FSDP2, and how to use them outside of the forward that gathers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Hold all weights on each process within a context, so that each can run forwards independently; read-only.

    FSDP2 gathers a layer's weights in its forward, which all processes must therefore run together. They do so in
    training; but one process may sample for longer than another, or read more prompts.

    Args:
        model: the outermost sharded module; without FSDP2 nothing happens.
        reshard_after_forward: setting of its layers in training.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    _forward_nothing(model)
    layers = [shard for shard in shards if shard is not model]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for shard in shards:
        shard.unshard()
    try:
        yield
    finally:
        _forward_nothing(model)
        for shard in shards:
            shard.reshard()
        for layer in layers:
            layer.set_reshard_after_forward(reshard_after_forward, recurse=False)


def _forward_nothing(model: nn.Module) -> None:
    """Run a forward that computes nothing.

    The first forward makes ``model`` FSDP2's root module. In backward FSDP2 prefetches what precedes in its record of
    forwards, including those without gradients: with this forward before those of training, the record is the same on a
    process that has run others in between and on one that has not.
    """
    model.forward = lambda: None
    try:
        model()
    finally:
        del model.forward


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor on each process; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded ``state_dict`` on the CPU of each process; tied weights share one tensor."""
    first_name: dict[int, str] = {}
    owner = {name: first_name.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        tied_to = owner.get(name, name)
        # A gathered tensor has padding in its storage, which safetensors rejects: copy it.
        if tied_to not in found:
            found[tied_to] = full_tensor(weight).to("cpu", copy=isinstance(weight, DTensor))
        found[name] = found[tied_to]
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy unsharded weights into a model, sharded or not."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, dict(weights), options=options)
