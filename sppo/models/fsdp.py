"""Weights that are spread over processes by FSDP2, and how to use them outside of the forward that gathers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[None]:
    """Have all weights on each process, so that each may run what it likes, as often as it likes; to read alone.

    FSDP2 gathers a layer's weights in its forward, for which all processes must come to it. They do in training, by
    design; but one process may sample longer than another, or read more prompts.

    Args:
        model: what was sharded, the outermost module; without FSDP2 nothing happens.
        reshard_after_forward: what its layers do in training.
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
    """A forward that does nothing.

    In the first one, FSDP2 settles that ``model`` is the outermost module. And in backward it gathers ahead what came
    before in its record of forwards, also of those without gradients: this one stands before those of training, on a
    process that has made others in between and on one that has not.
    """
    model.forward = lambda: None
    try:
        model()
    finally:
        del model.forward


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor whole, on each process; all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's ``state_dict`` whole and on the CPU, on each process; tied weights are one tensor."""
    first: dict[int, str] = {}
    owner = {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        of = owner.get(name, name)
        # A copy of what was gathered, which lies in storage with padding that safetensors does not write.
        found[name] = found[of] if of in found else full_tensor(weight).to("cpu", copy=isinstance(weight, DTensor))
    return found


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Copy whole weights into a model, sharded or not."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, dict(weights), options=options)
