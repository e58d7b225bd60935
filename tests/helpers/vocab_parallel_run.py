"""Checks of linear_logprobs with its vocabulary sharded over ranks, run with torchrun by test_vocab_parallel.py."""

from unittest import mock

import interpreter
import pytest
import torch
import torch.distributed as dist
from supports import support_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from sppo_kernels import linear_logprobs, linear_policy_loss
from sppo_kernels.ops.policy_loss import RATIO_LEVELS

TOKENS, WIDTH, ADAPTER_RANK = 9, 6, 2
# Uneven sizes, including a shard with few rows (one row with 4 ranks).
SHARDS = {2: (24, 5), 4: (12, 1, 6, 10)}
NAMES = ("hidden", "weight", "bias", "u", "b")


def inputs(dtype, vocab):
    """Return the full tensors by name and the labels, which are the same on every rank."""
    g = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (vocab, WIDTH), (vocab,), (TOKENS, ADAPTER_RANK), (vocab, ADAPTER_RANK))
    tensors = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in zip(NAMES, shapes, strict=True)}
    labels = torch.randint(vocab, (TOKENS,), generator=g)
    labels[0], labels[1], labels[2], labels[3] = 0, vocab - 1, -100, SHARDS[dist.get_world_size()][0]
    return tensors, labels


def run(tensors, labels, *, extras, upstream, **settings):
    """Return outputs and gradients, with bias and adapter if ``extras``; the last token's upstream gradient is 0."""
    leaves = {k: x.detach().requires_grad_() for k, x in tensors.items() if extras or k in ("hidden", "weight")}
    more = {"bias": leaves["bias"], "adapter": (leaves["u"], leaves["b"])} if extras else {}
    logprobs, entropy = linear_logprobs(leaves["hidden"], leaves["weight"], labels, **more, **settings)
    coefficient = torch.linspace(-1, 1, TOKENS).index_fill(0, torch.tensor([TOKENS - 1]), 0.0)
    loss = (coefficient * (logprobs + (0.3 * entropy if upstream == "both" else 0.0))).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return logprobs.detach(), entropy.detach(), dict(zip(leaves, grads, strict=True))


def shard(tensors, sizes, rank):
    """Return the tensors of one rank and its slice of the vocabulary."""
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    return {k: x[rows] if k in ("weight", "bias", "b") else x for k, x in tensors.items()}, rows


def check_equal_to_one_process(dtype, **settings):
    """Values and gradients equal those of one process, with as many all-reduces as expected."""
    group, rank, sizes = dist.group.WORLD, dist.get_rank(), SHARDS[dist.get_world_size()]
    tensors, labels = inputs(dtype, sum(sizes))
    if settings.pop("mask_first_shard"):
        tensors["bias"][: sizes[0]] = float("-inf")
        labels = torch.where((labels >= 0) & (labels < sizes[0]), sizes[0], labels)
    sizes_of_supports = settings.pop("supports", None)
    if sizes_of_supports:
        settings["support"] = support_of(labels, sizes_of_supports, sum(sizes))
        dist.broadcast(settings["support"][0], 0)
    expected = run(tensors, labels, **settings)
    part, rows = shard(tensors, sizes, rank)
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        got = run(part, labels, **settings, group=group)
    # Forward: one for the shard sizes and two for the only chunk. Backward: one per factor of the logits.
    # Sparse mode adds one at the end of forward, for the certificate. The logits of supports are one, and replace the
    # two of a chunk if there is none.
    forward = 3 + (settings["backward"] == "sparse")
    if sizes_of_supports:
        forward += 1 if 0 in sizes_of_supports else -1
    assert all_reduce.call_count == forward + (2 if settings["extras"] else 1)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.03, 0.01)
    for x, y in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for name, grad in got[2].items():
        want = expected[2][name]
        torch.testing.assert_close(grad, want[rows] if name in ("weight", "bias", "b") else want, rtol=rtol, atol=atol)
    for x in (*got[:2], *(got[2][name] for name in ("hidden", "u") if name in got[2])):
        others = [torch.empty_like(x) for _ in sizes]
        dist.all_gather(others, x)
        assert all(torch.equal(x, other) for other in others), "ranks differ"


def check_many_chunks():
    """Ranks with shards of different sizes split the tokens into the same chunks; otherwise a rank would deadlock."""
    group, rank, shards = dist.group.WORLD, dist.get_rank(), [40 * (r + 1) for r in range(dist.get_world_size())]
    hidden, weight = torch.randn(700, WIDTH), torch.randn(sum(shards), WIDTH)
    labels = torch.randint(sum(shards), (700,))
    for x in (hidden, weight, labels):
        dist.broadcast(x, 0)
    rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    chunk_bytes = 5 * shards[-1] * 256  # 128 tokens for the largest shard, more for a smaller one
    got = linear_logprobs(hidden, weight[rows].contiguous(), labels, group=group, chunk_bytes=chunk_bytes)
    for x, y in zip(got, linear_logprobs(hidden, weight, labels), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def check_logits_far_below_zero():
    """A maximum that starts at 0 instead of minus infinity would lose every probability (verl's pull request 7439)."""
    group, rank, sizes = dist.group.WORLD, dist.get_rank(), SHARDS[dist.get_world_size()]
    tensors, labels = inputs(torch.float32, sum(sizes))
    tensors["bias"] -= 500
    part, rows = shard(tensors, sizes, rank)
    for backend in ("torch", "triton"):
        settings = {"backend": backend, "extras": True, "upstream": "both", "backward": "recompute"}
        logprobs, entropy, grads = run(part, labels, group=group, **settings)
        want_logprobs, want_entropy, want = run(tensors, labels, **settings | {"backend": "reference"})
        assert want_entropy.max() > 1
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-4, atol=1e-3)  # float32 logits near -500
        torch.testing.assert_close(entropy, want_entropy, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(grads["hidden"], want["hidden"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(grads["weight"], want["weight"][rows], rtol=1e-3, atol=1e-3)


def check_wide_supports():
    """Supports so wide that their logits come from a dense product, on uneven shards."""
    group, rank, shards = dist.group.WORLD, dist.get_rank(), [40 * (r + 1) for r in range(dist.get_world_size())]
    hidden, weight, labels = torch.randn(300, WIDTH), torch.randn(sum(shards), WIDTH), torch.arange(300) % sum(shards)
    ids, offsets = support_of(labels, [20, 1, 0] * 100, sum(shards))
    for x in (hidden, weight, ids):
        dist.broadcast(x, 0)
    rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))
    results = []
    for part, settings in ((weight, {}), (weight[rows].contiguous(), {"group": group})):
        leaves = hidden.clone().requires_grad_(), part.clone().requires_grad_()
        out = linear_logprobs(*leaves, labels, support=(ids, offsets), chunk_bytes=1, **settings)
        results.append([*out, *torch.autograd.grad((out.logprobs * labels).sum() + out.entropy.sum(), leaves)])
    results[0][-1] = results[0][-1][rows]
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-3)


def check_policy_loss():
    """linear_policy_loss on each rank equals that of one process, per ratio level and mode, with several blocks."""
    group, rank, shards = dist.group.WORLD, dist.get_rank(), [40 * (r + 1) for r in range(dist.get_world_size())]
    hidden, weight, old = torch.randn(700, WIDTH), torch.randn(sum(shards), WIDTH), torch.randn(700) - 5
    labels, advantages = torch.randint(sum(shards), (700,)), torch.randn(5)
    for x in (hidden, weight, old, labels, advantages):
        dist.broadcast(x, 0)
    cu_seqlens = torch.tensor([0, 100, 100, 420, 600, 700], dtype=torch.int32)
    rows = slice(sum(shards[:rank]), sum(shards[: rank + 1]))

    def results(weight, **settings):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_policy_loss(*leaves, labels, old, advantages, cu_seqlens=cu_seqlens, chunk_bytes=1, **settings)
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)

    for ratio_level in RATIO_LEVELS:
        for backward in ("cache", "sparse", "auto"):
            settings = {"ratio_level": ratio_level, "backward": backward, "mass_tolerance": 1e-8, "max_entries": 4}
            loss, dh, dw = results(weight, **settings)
            got = results(weight[rows].contiguous(), **settings, group=group)
            for x, y in zip(got, (loss, dh, dw[rows]), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def check_auto_agrees():
    """All ranks choose the same mode although their shards of the logits differ."""
    world = dist.get_world_size()
    hidden = 60.0 * torch.eye(64)[torch.arange(64) % 8]  # peaked on rank 0's rows, flat on all others
    weight = torch.eye(64)[dist.get_rank() * 64 // world : (dist.get_rank() + 1) * 64 // world].contiguous()
    shares = []
    for _ in range(3):
        out = linear_logprobs(
            hidden,
            weight.requires_grad_(),
            torch.arange(64),
            max_entries=2,
            group=dist.group.WORLD,
            chunk_bytes=1,
            return_certificate=True,
        )
        out.logprobs.sum().backward()
        shares.append(torch.stack([out.certificate.sparse_share, out.certificate.cached_share]))
    assert shares[0].tolist() == [0, 1]
    assert shares[-1][0] == 1
    others = [torch.empty_like(torch.stack(shares)) for _ in range(world)]
    dist.all_gather(others, torch.stack(shares))
    assert all(torch.equal(x, others[0]) for x in others)


def check_errors():
    """The error for a wrong label names the range of the full vocabulary."""
    sizes = SHARDS[dist.get_world_size()]
    tensors, labels = inputs(torch.float32, sum(sizes))
    part, _ = shard(tensors, sizes, dist.get_rank())
    for bad in (sum(sizes), -1):
        wrong = labels.clone()
        wrong[4] = bad
        message = rf"labels must be in \[0, {sum(sizes)}\) or ignore_index=-100, got {bad}"
        with pytest.raises(ValueError, match=message):
            linear_logprobs(part["hidden"], part["weight"], wrong, group=dist.group.WORLD)


def check_tensor_parallel_dtensor():
    """A row-sharded DTensor weight is passed as its local tensor; its gradient is a DTensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors, labels = inputs(torch.float32, 29)
    weight = nn.Parameter(distribute_tensor(tensors["weight"], mesh, [Shard(0)]))
    with pytest.raises(
        TypeError, match=r"weight must be a plain tensor.* weight.to_local\(\) with group=mesh.get_group"
    ):
        linear_logprobs(tensors["hidden"], weight, labels)
    linear_logprobs(tensors["hidden"], weight.to_local(), labels, group=mesh.get_group()).logprobs.sum().backward()
    full_weight = tensors["weight"].requires_grad_()
    linear_logprobs(tensors["hidden"], full_weight, labels).logprobs.sum().backward()
    assert isinstance(weight.grad, DTensor)
    torch.testing.assert_close(weight.grad.full_tensor(), full_weight.grad, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    """A module that calls the operation in the forward of the LM head's owner, where FSDP2 has gathered the weight."""

    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 29, bias=False)

    def forward(self, x, labels):
        return linear_logprobs(self.body(x), self.lm_head.weight, labels).logprobs


def check_fsdp2():
    """With data parallelism each rank has its own tokens, and gradients are means over the ranks."""
    torch.manual_seed(0)
    model, unsharded = Model(), Model()
    unsharded.load_state_dict(model.state_dict())
    fully_shard(model)
    x = torch.randn(dist.get_world_size(), TOKENS, WIDTH)
    labels = torch.randint(29, x.shape[:2])
    rank = dist.get_rank()
    model(x[rank], labels[rank]).sum().backward()
    (unsharded(x, labels).sum() / dist.get_world_size()).backward()
    for (name, sharded), full in zip(model.named_parameters(), unsharded.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), full.grad, rtol=1e-4, atol=1e-5, msg=name)


def main():
    interpreter.patch()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    cases = 0
    for backend in ("torch", "triton"):
        for backward in ("recompute", "cache", "sparse"):
            # Four ranks differ only in their shards, so interpreted kernels have one case of each mode there.
            is_short = backend == "triton" and dist.get_world_size() == 4
            for dtype in (torch.float32,) if is_short else (torch.float32, torch.bfloat16):
                for extras, upstream, softcap, temperature, mask_first_shard in (
                    (False, "logprobs", None, 1.0, False),
                    (True, "both", 4.0, 0.6, False),
                    (True, "both", None, torch.linspace(0.5, 2.0, TOKENS), True),
                )[2 * is_short :]:
                    check_equal_to_one_process(
                        dtype,
                        backend=backend,
                        backward=backward,
                        mass_tolerance=1e-8,  # with so few columns almost nothing is dropped
                        extras=extras,
                        upstream=upstream,
                        softcap=softcap,
                        temperature=temperature,
                        mask_first_shard=mask_first_shard,
                    )
                    cases += 1
    for backend in ("torch", "triton"):
        for supports in ((4, 1, 3, 2, 6, 29, 5, 1, 2), (4, 1, 3, 0, 6, 29, 5, 0, 2)):
            for backward, softcap in (("recompute", 4.0), ("sparse", None)):
                check_equal_to_one_process(
                    torch.float32,
                    backend=backend,
                    backward=backward,
                    mass_tolerance=1e-8,
                    extras=True,
                    upstream="both",
                    softcap=softcap,
                    temperature=0.6,
                    mask_first_shard=softcap is None,
                    supports=supports,
                )
                cases += 1
    check_logits_far_below_zero()
    check_wide_supports()
    check_many_chunks()
    check_policy_loss()
    check_auto_agrees()
    check_errors()
    check_tensor_parallel_dtensor()
    check_fsdp2()
    if dist.get_rank() == 0:
        print(f"{cases} cases passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
