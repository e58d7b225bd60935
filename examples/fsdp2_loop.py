"""plain_loop.py with weights sharded by FSDP2, on CPUs too: `torchrun --nproc_per_node 2 examples/fsdp2_loop.py`."""

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from plain_loop import PROMPTS, ActorCritic
from torch.distributed.fsdp import register_fsdp_forward_method


def sharded(model, optimizer):
    """Shard model and optimizer.

    Outside a forward, weights become DTensors with this rank's shard, which the fused operations do not accept. Inside
    the forward of the sharded module they are complete tensors, so linear_policy_loss must read lm_head.weight there.
    Hence the model is the module whose forward is the loss, with actor and critic inside. Of a bare LlamaForCausalLM,
    accelerate would shard lm_head separately and gather it only for lm_head's own forward.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    if accelerator.device.type == "cpu":  # accelerate would silently use DDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, optimizer = accelerator.prepare(model, optimizer)
    register_fsdp_forward_method(model, "rollout")  # weights are gathered in this method too
    return accelerator, model, optimizer


def update(accelerator, model, optimizer, samples):
    """Make one step on the samples of all ranks.

    The loss is the mean over the tokens of all ranks. FSDP averages the ranks' gradients, so the normalizer of a rank's
    loss is the number of tokens on all ranks divided by the number of ranks. The critic's mean is over prompts, and
    each rank has the same number of them.
    """
    tokens = (samples[1] != -100).sum().float()
    normalizer = accelerator.reduce(tokens, "sum") / accelerator.num_processes
    optimizer.zero_grad()
    accelerator.backward(model(*samples, normalizer=normalizer))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm


def rollout(model, prompts):
    """Sample responses; a rank whose responses have ended continues until all have, as each step gathers weights."""
    return model.rollout(prompts, synced_gpus=True)


def main(updates=100, seed=0):
    torch.manual_seed(seed)  # the same weights on each rank
    model = ActorCritic()
    accelerator, model, optimizer = sharded(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(seed + rank)  # other samples on each rank
    prompts = PROMPTS.to(accelerator.device)
    held_out = prompts[800:][rank::world]
    before = accelerator.gather(rollout(model, held_out)[-1]).mean()
    for step in range(updates):
        samples = rollout(model, prompts[torch.randint(800, (256 // world,))])
        accelerator.print(f"update {step}: success {accelerator.gather(samples[-1]).mean():.2f}")
        for half in zip(*(x.split(128 // world) for x in samples), strict=True):
            update(accelerator, model, optimizer, half)
    after = accelerator.gather(rollout(model, held_out)[-1]).mean()
    accelerator.print(f"success on held-out prompts: {before:.2f} before, {after:.2f} after")
    return before, after


if __name__ == "__main__":
    main()
