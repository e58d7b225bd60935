"""plain_loop.py with weights sharded by FSDP2, here on CPUs: `torchrun --nproc_per_node 2 examples/fsdp2_loop.py`."""

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from plain_loop import PROMPTS, ActorCritic
from torch.distributed.fsdp import register_fsdp_forward_method


def sharded(model, optimizer):
    """Outside of a forward, weights are now DTensors, the part of this rank, which no operation takes.

    Inside the forward of the module that was sharded they are whole and plain: there lm_head.weight and
    linear_policy_loss must meet. So the model is the module whose forward is the loss, with actor and critic in it:
    accelerate prepares one module, and of a bare LlamaForCausalLM it shards lm_head apart, for lm_head's forward alone.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), fsdp_plugin=plugin)
    if accelerator.device.type == "cpu":  # where accelerate would make it DDP, without a word
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model, optimizer = accelerator.prepare(model, optimizer)
    register_fsdp_forward_method(model, "rollout")  # weights are whole in this method too
    return accelerator, model, optimizer


def update(accelerator, model, optimizer, samples):
    """One step on the samples of all ranks.

    The mean over the tokens of all: a rank's loss is divided by the normalizer, and then FSDP takes the mean of the
    ranks' gradients, so the normalizer is the tokens of all ranks over the number of ranks. (The critic's mean is over
    prompts, of which each rank has as many.)
    """
    tokens = (samples[1] != -100).sum().float()
    normalizer = accelerator.reduce(tokens, "sum") / accelerator.num_processes
    optimizer.zero_grad()
    accelerator.backward(model(*samples, normalizer=normalizer))
    norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm


def rollout(model, prompts):
    """Each token gathers weights from all ranks, so one whose responses have ended goes along until all have."""
    return model.rollout(prompts, synced_gpus=True)


def main(updates=100, seed=0):
    torch.manual_seed(seed)  # the same weights on each rank
    model = ActorCritic()
    accelerator, model, optimizer = sharded(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(seed + rank)  # other samples
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
