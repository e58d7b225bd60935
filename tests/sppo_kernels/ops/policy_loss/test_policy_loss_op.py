"""Tests of policy_loss under autograd and torch.compile, with fake tensors, and as a single launch."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    randint,
)
from policy_loss_cases import LEVELS, SEQUENCES, as_packed, as_padded, check, packed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from sppo_kernels import policy_loss, reference
from sppo_kernels.ops.policy_loss import op
from sppo_kernels.ops.policy_loss.settings import Settings


def op_arguments(backend, tensors, mask=None, normalizer=None, level="token"):
    names = ("logprobs", "old_logprobs", "advantages")
    tensors = (
        *(tensors[k] for k in names),
        mask,
        tensors["cu_seqlens"],
        normalizer,
        tensors["ref_logprobs"],
        tensors["rollout_logprobs"],
    )
    settings = Settings(
        objective="clip",
        ratio_level=level,
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        aggregation="token-mean",
        kl_coef=0.1,
        kl_estimator="k3",
        rollout_correction="sequence_truncate",
        rollout_floor=0.0,
        rollout_cap=2.0,
    )
    return tensors, {**settings._asdict(), "per_token": False, "backend": backend}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration_passes_opcheck(backend, dtype):
    tensors = packed([3, 0, 2], dtype)
    torch.library.opcheck(op.policy_loss.overload, *op_arguments(backend, tensors))
    extra = {"mask": randint(0, 2, 5), "normalizer": torch.tensor(4.0, device=DEVICE)}
    torch.library.opcheck(op.policy_loss.overload, *op_arguments(backend, tensors, **extra, level="sequence_sum"))


def test_fake_results_of_float64_are_float64():
    tensors, settings = op_arguments("torch", packed([3, 0, 2], torch.float64))
    torch.library.opcheck(op.policy_loss.overload, tensors, settings, test_utils="test_faketensor")


@pytest.mark.parametrize("layout", [as_packed, as_padded])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend, layout):
    columns = packed(SEQUENCES)
    advantages = columns.pop("advantages")
    columns.pop("cu_seqlens")
    logprobs = columns["logprobs"]
    rest = {k: x.detach() for k, x in layout(columns, advantages).items()}
    shaped = rest.pop("logprobs").requires_grad_()

    def run(x):
        out = policy_loss(x, **rest, ratio_level="sequence_mean", kl_coef=0.1, normalizer=7.0, backend=backend)
        return out.loss, out.metrics["kl"]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(shaped)
    eager = run(shaped)
    for x, y in zip(compiled, eager, strict=True):
        assert torch.equal(x, y)
    (got,) = torch.autograd.grad(compiled[0], shaped)
    assert torch.equal(got, torch.autograd.grad(eager[0], shaped)[0])
    assert logprobs.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors(backend):
    with FakeTensorMode():
        new = lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        logprobs = new(3, 5).requires_grad_()
        out = policy_loss(logprobs, new(3, 5), new(3), mask=new(3, 5), backend=backend)
        for x in (out.loss, *out.metrics.values()):
            assert (x.shape, x.dtype) == ((), torch.float32)
        out.loss.backward()
        assert (logprobs.grad.shape, logprobs.grad.dtype) == ((3, 5), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("level", "launches"), [("token", ["fwd_bwd"]), ("sequence_mean", ["sums", "fwd_bwd"])])
def test_two_launches_and_no_host_sync(level, launches):
    """For packed input loss, metrics and gradient take two kernels, without a host synchronization."""
    tensors = packed([700, 0, 1500, 1])
    arguments = {"ratio_level": level, "kl_coef": 0.1, "rollout_correction": "token_truncate"}
    policy_loss(**tensors, **arguments).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            policy_loss(**tensors, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kernels = [e.name for e in prof.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if name.startswith("policy_loss")]
    assert ours == [f"policy_loss_{name}_kernel" for name in launches], kernels
    # At token level the second kernel zeroes a counter.
    assert len([name for name in kernels if not name.startswith("Mem")]) <= 2, kernels


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
def test_sequences_may_exceed_a_grid_axis(level):
    check("triton", packed([2] * 70_000), ratio_level=level)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_raises(backend):
    tensors = packed([3, 2])
    out = policy_loss(**tensors, backend=backend)
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        torch.autograd.grad(out.loss, tensors["logprobs"], create_graph=True)


@pytest.mark.parametrize("level", LEVELS)
def test_reference_passes_gradcheck(level):
    """Within the clip range the gradient of the reference is the derivative of its value.

    That holds for token ratios and for sequence ratios with one advantage per sequence.
    """
    tensors = packed([3, 0, 2], torch.float64, spread=0.01)
    rest = {k: x for k, x in tensors.items() if k != "logprobs"}
    f = lambda x: reference.policy_loss(x, **rest, ratio_level=level, kl_coef=0.1, clip_low=0.5, clip_high=0.5).loss
    assert torch.autograd.gradcheck(f, tensors["logprobs"])
