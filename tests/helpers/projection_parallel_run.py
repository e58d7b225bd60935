"""Checks of the fused projection with its vocabulary sharded over two ranks, run by test_projection_parallel.py."""

import warnings

import interpreter
import pytest
import torch
import torch.distributed as dist
from projection_cases import use_tiles
from vocab_parallel_run import run, shard

from sppo_kernels import linear_logprobs, linear_policy_loss

TOKENS, WIDTH, SIZES = 20, 6, (130, 40)  # three tiles of columns on the first rank, one on the second


def inputs(dtype):
    """Return the full tensors by name and the labels: some at the ends of shards, some likely, some hopeless."""
    g = torch.Generator().manual_seed(0)
    vocab = sum(SIZES)
    shapes = {"hidden": (TOKENS, WIDTH), "weight": (vocab, WIDTH), "bias": (vocab,)}
    shapes |= {"u": (TOKENS, 2), "b": (vocab, 2)}
    tensors = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    tensors["hidden"] *= torch.tensor([1.0, 3.0, 10.0, 60.0])[torch.arange(TOKENS) % 4, None]
    labels = torch.randint(vocab, (TOKENS,), generator=g)
    labels[4::4] = (tensors["hidden"] @ tensors["weight"].t()).argmax(1)[4::4]
    labels[:5] = torch.tensor([0, SIZES[0] - 1, SIZES[0], vocab - 1, -100])
    return {name: x.to(dtype) for name, x in tensors.items()}, labels


def assert_same_on_all_ranks(x):
    """Compare all bits."""
    others = [torch.empty_like(x) for _ in SIZES]
    dist.all_gather(others, x.contiguous())
    assert all(torch.equal(x, other) for other in others), "ranks differ"


def check_equal_to_one_process(dtype, **settings):
    """Values and gradients equal those of one process; values and d hidden are the same on each rank."""
    tensors, labels = inputs(dtype)
    expected = run_tokens(tensors, labels, **settings)
    part, rows = shard(tensors, SIZES, dist.get_rank())
    got = run_tokens(part, labels, **settings, group=dist.group.WORLD)
    for x, y in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=3e-5, atol=2e-5)
        assert_same_on_all_ranks(x)
    eps = torch.finfo(dtype).eps
    for name, grad in got[2].items():
        want = expected[2][name]
        want = want[rows] if name in ("weight", "bias", "b") else want
        error = float((grad.double() - want.double()).norm())
        assert error <= (200 if dtype == torch.float32 else 4) * eps * float(want.double().norm()), name
        if name in ("hidden", "u"):
            assert_same_on_all_ranks(grad)


def run_tokens(tensors, labels, **settings):
    """Return ``run`` of the helper, whose number of tokens is another."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("vocab_parallel_run.TOKENS", len(labels))
        return run(tensors, labels, **settings, projection="fused")


def check_policy_loss(backend):
    """Loss and gradients equal those of one process, in each mode and with a limited cache."""
    tensors, labels = inputs(torch.float32)
    rows = slice(sum(SIZES[: dist.get_rank()]), sum(SIZES[: dist.get_rank() + 1]))
    old, advantages = torch.linspace(-9, -4, TOKENS), torch.tensor([1.0, -0.5, 0.7])
    cu_seqlens = torch.tensor([0, 3, 11, TOKENS], dtype=torch.int32)

    def results(weight, **settings):
        leaves = tensors["hidden"].clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_policy_loss(
            *leaves, labels, old, advantages, cu_seqlens=cu_seqlens, backend=backend, projection="fused", **settings
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)

    for backward, budget in (("cache", None), ("cache", 5000), ("sparse", None)):
        settings = {"backward": backward, "logits_budget_bytes": budget, "mass_tolerance": 1e-8, "max_entries": 64}
        loss, dh, dw = results(tensors["weight"], **settings)
        got = results(tensors["weight"][rows].contiguous(), **settings, group=dist.group.WORLD)
        for x, y in zip(got, (loss, dh, dw[rows]), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def check_auto_agrees(backend):
    """All ranks choose the same mode although their shards differ."""
    tensors, labels = inputs(torch.float32)
    part, _ = shard(tensors, SIZES, dist.get_rank())
    for _ in range(3):
        out = linear_logprobs(
            (20 * part["hidden"]).requires_grad_(),
            part["weight"],
            labels,
            max_entries=4,
            group=dist.group.WORLD,
            return_certificate=True,
            backend=backend,
            projection="fused",
        )
        out.logprobs.sum().backward()
        assert_same_on_all_ranks(torch.stack([out.certificate.sparse_share, out.certificate.cached_share]))
    assert out.certificate.sparse_share > 0.5


def main():
    interpreter.patch()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "linear_logprobs cached")
    cases = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_tiles(monkeypatch)
        for backend in ("torch", "triton"):
            # A row of probabilities takes 768 bytes on the first rank and 256 on the second: 6 and 19 tokens fit.
            cases_of_backend = [
                ("recompute", None, torch.float32),
                ("cache", 5000, torch.float32),
                ("cache", 2500, torch.float16),
                ("sparse", None, torch.bfloat16),
            ]
            if backend == "torch":
                cases_of_backend += [("cache", None, torch.bfloat16), ("sparse", None, torch.float32)]
            for backward, budget, dtype in cases_of_backend:
                plain = {"extras": False, "upstream": "logprobs", "softcap": None, "temperature": 1.0}
                full = {"extras": True, "upstream": "both", "softcap": 40.0}
                full["temperature"] = torch.linspace(0.5, 2, TOKENS)
                for options in (plain, full):
                    settings = {"backward": backward, "logits_budget_bytes": budget, "backend": backend}
                    check_equal_to_one_process(dtype, **settings, **options, mass_tolerance=1e-8, max_entries=64)
                    cases += 1
            check_policy_loss(backend)
            check_auto_agrees(backend)
    if dist.get_rank() == 0:
        print(f"{cases} cases passed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
