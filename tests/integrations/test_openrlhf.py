"""Integration with the real OpenRLHF: losses, experience maker and log-probabilities against its own."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from openrlhf import models
from openrlhf.models import actor, loss
from openrlhf.models import utils as model_utils
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor, ppo_critic
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from sppo_kernels import policy_loss
from sppo_kernels.integrations import openrlhf as fused

ROOT = Path(__file__).parents[2]
NAMES = [
    (models, "PolicyLoss"),
    (models, "ValueLoss"),
    (ppo_actor, "PolicyLoss"),
    (ppo_critic, "ValueLoss"),
    (actor, "log_probs_from_logits"),
    (RemoteExperienceMaker, "get_advantages_and_returns"),
    (RemoteExperienceMaker, "compute_advantages_and_returns"),
]
ORIGINALS = [getattr(*name) for name in NAMES]


def in_place():
    return [getattr(*name) is original for name, original in zip(NAMES, ORIGINALS, strict=True)]


@pytest.fixture(autouse=True)
def _unpatch_after_each_test():
    yield
    fused.unpatch()
    assert all(in_place())


def batch(spread=1.0, empty=False, per_token=True):
    """Make new and old log-probabilities, advantages, mask and rollout log-probabilities, [5, 12]."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    old = -draw(5, 12).abs()
    new, rollout = old + spread * draw(5, 12), old + 0.5 * draw(5, 12)
    advantages = draw(5, 12) if per_token else draw(5, 1).expand(5, 12)
    mask = torch.zeros(5, 12, dtype=torch.long)
    for row, (start, end) in enumerate([(3, 12), (1, 2), (5, 9), (0, 12), (4, 4 if empty else 5)]):
        mask[row, start:end] = 1
    return new, old, advantages, mask, rollout


def outputs_and_gradient(loss_fn, new, old, advantages, mask, rollout=None, **counts):
    new = new.clone().requires_grad_()
    out = loss_fn(new, old, advantages, action_mask=mask, rollout_log_probs=rollout, **counts)
    (out[0] if isinstance(out, tuple) else out).backward()
    return out, new.grad


def assert_like_openrlhf(settings, tensors, **counts):
    outputs, gradient = outputs_and_gradient(fused.policy_loss_class()(**settings), *tensors, **counts)
    expected, expected_gradient = outputs_and_gradient(loss.PolicyLoss(**settings), *tensors, **counts)
    assert [x is None for x in outputs] == [x is None for x in expected]
    names = ("loss", "clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")
    for name, a, b in zip(names, outputs, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


COUNTS = [{}, {"dp_size": 3, "batch_num_tokens": torch.tensor(71.0), "global_batch_size": torch.tensor(13.0)}]


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty-row"])
@pytest.mark.parametrize("counts", COUNTS, ids=["local", "global"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level_loss", [True, False], ids=["token", "sequence"])
@pytest.mark.parametrize("policy_loss_type", ["ppo", "gspo"])
def test_policy_loss_agrees_with_openrlhf(policy_loss_type, token_level_loss, dual_clip, counts, empty):
    settings = {
        "policy_loss_type": policy_loss_type,
        "token_level_loss": token_level_loss,
        "dual_clip": dual_clip,
        "clip_eps_low": 0.1,
        "clip_eps_high": 0.3,
    }
    for spread in (0.3, 1.0, 6.0):
        assert_like_openrlhf(settings, batch(spread, empty), **counts)
    assert_like_openrlhf(settings, batch(1.0, empty, per_token=False), **counts)


CORRECTIONS = [
    ("token", "clip", "ratio", [0.0, 1.2]),  # the only one that runs the operation
    ("token", "clip", "ratio", [0.5, 1.2]),
    ("token", "mask", "ratio", [0.5, 1.2]),
    ("seq", "mask", "ratio", [0.9, 1.2]),
    ("token", "mask", "binary_kl", [0.0, 0.05]),
    ("seq", "mask", "tv", [0.0, 0.1]),
]


@pytest.mark.parametrize("counts", COUNTS, ids=["local", "global"])
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("policy_loss_type", ["ppo", "gspo"])
def test_corrected_policy_loss_agrees_with_openrlhf(monkeypatch, policy_loss_type, correction, counts):
    names = ("is_correction_level", "is_correction_mode", "is_correction_gating", "is_correction_threshold")
    settings = {"policy_loss_type": policy_loss_type, **dict(zip(names, correction, strict=True))}
    calls = []
    monkeypatch.setattr(fused, "policy_loss", lambda *a, **k: calls.append(k) or policy_loss(*a, **k))
    assert_like_openrlhf(settings, batch(), **counts)
    assert len(calls) == (policy_loss_type == "ppo" and correction == CORRECTIONS[0])


def test_a_large_log_ratio_keeps_its_gradient():
    """Beyond 20 OpenRLHF's gradient is 0; here it stays, and dual_clip bounds it."""
    new, old, advantages, mask = torch.tensor([[25.0]]), torch.zeros(1, 1), torch.tensor([[-1.0]]), torch.ones(1, 1)
    _, openrlhf_gradient = outputs_and_gradient(loss.PolicyLoss(), new, old, advantages, mask)
    (value, *_), gradient = outputs_and_gradient(fused.policy_loss_class()(), new, old, advantages, mask)
    assert openrlhf_gradient.item() == 0
    torch.testing.assert_close(gradient, new.exp())
    torch.testing.assert_close(value, new.exp().squeeze())
    (value, *_), gradient = outputs_and_gradient(fused.policy_loss_class()(dual_clip=3.0), new, old, advantages, mask)
    assert (value.item(), gradient.item()) == (3.0, 0.0)


@pytest.mark.parametrize("policy_loss_type", fused.POLICY_LOSS_TYPES)
def test_masked_values_never_matter(policy_loss_type):
    loss_fn = fused.policy_loss_class()(policy_loss_type=policy_loss_type)
    new, old, advantages, mask, _ = batch()
    (value, *metrics), gradient = outputs_and_gradient(loss_fn, new, old, advantages, torch.zeros_like(mask))
    assert value == 0
    assert not gradient.any()
    assert all(x == 0 for x in metrics[:2])
    expected = outputs_and_gradient(loss_fn, new, old, advantages, mask)
    new, old = new.masked_fill(mask == 0, float("inf")), old.masked_fill(mask == 0, float("nan"))
    torch.testing.assert_close(outputs_and_gradient(loss_fn, new, old, advantages, mask), expected, rtol=0, atol=0)


@pytest.mark.parametrize("counts", COUNTS, ids=["local", "global"])
@pytest.mark.parametrize(("sign", "number_clipped"), [(1, 0), (-1, 2)], ids=["dual-clipped", "clipped"])
def test_sppo_seq_clips_the_ratio_of_sequences(sign, number_clipped, counts):
    """Value, gradient and metrics agree with the definition in plain PyTorch."""
    new, old, advantages, mask, _ = batch(0.2, empty=True, per_token=False)
    advantages = sign * advantages
    settings = {"clip_eps_low": 0.1, "clip_eps_high": 0.3, "dual_clip": 1.5}
    loss_fn = fused.policy_loss_class()(policy_loss_type="sppo_seq", **settings)
    (value, clip_ratio, ppo_kl, *rest), gradient = outputs_and_gradient(loss_fn, new, old, advantages, mask, **counts)

    new.requires_grad_()
    has_tokens = mask.any(1)
    ratio, a = ((new - old) * mask).sum(1).exp()[has_tokens], advantages[has_tokens, 0]
    surrogate = torch.maximum(-a * ratio, -a * ratio.clamp(0.9, 1.3))
    surrogate = torch.where(a < 0, torch.minimum(surrogate, -a * 1.5), surrogate)
    expected = surrogate.sum() / (13 / 3 if counts else 4)
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, new.grad)
    clipped = (a > 0) & (ratio > 1.3) | (a < 0) & (ratio < 0.9)
    assert clipped.sum() == number_clipped
    torch.testing.assert_close(clip_ratio, clipped.float().mean())
    torch.testing.assert_close(ppo_kl, ((old - new) * mask).sum() / mask.sum())
    assert rest == [None, None]


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"policy_loss_type": "sppo"}, "policy_loss_type"),
        ({"policy_loss_type": "sppo_seq", "is_correction_level": "token"}, "is_correction_level"),
        ({"is_correction_mode": "drop"}, "is_correction_mode"),
    ],
)
def test_invalid_settings_are_rejected(settings, argument):
    with pytest.raises(ValueError, match=argument):
        fused.policy_loss_class()(**settings)


@pytest.mark.parametrize("counts", COUNTS, ids=["local", "global"])
def test_value_loss_is_the_cross_entropy_at_the_first_token(counts):
    """No other value has a gradient, and neither has a row without tokens."""
    values, _, _, mask, _ = batch(empty=True)
    values.requires_grad_()
    outcomes = torch.tensor([1.0, 0.0, 0.25, 1.0, 1.0])
    returns = outcomes[:, None] * mask
    fused.SPPOValueLoss(0.2)(values, torch.zeros_like(values), returns, action_mask=mask, **counts).backward()
    rows, first = [0, 1, 2, 3], [3, 1, 5, 0]
    expected = torch.zeros_like(values)
    expected[rows, first] = (values[rows, first].sigmoid() - outcomes[:4]).detach() / (13 / 3 if counts else 4)
    torch.testing.assert_close(values.grad, expected)
    with torch.no_grad():
        loss_fn = fused.SPPOValueLoss()
        value = loss_fn(values, values, returns, mask)
        torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(values[rows, first], outcomes[:4]))
        assert loss_fn(values, values, returns, torch.zeros_like(mask)) == 0


# The experience maker


def experiences():
    """Make two batches as ``make_experience`` returns them, with values of 0 where masked."""
    batches = []
    for seed, index in ((1, [2, 0]), (2, [3, 1])):
        torch.manual_seed(seed)
        mask = torch.zeros(2, 8, dtype=torch.long)
        mask[0, 3:8] = mask[1, 2:5] = 1
        batches.append(
            Experience(
                sequences=torch.ones(2, 9, dtype=torch.long),
                attention_mask=torch.ones(2, 9, dtype=torch.long),
                action_mask=mask,
                values=torch.randn(2, 8) * mask,
                rewards=torch.tensor([1.0, 0.0]),
                kl=torch.zeros(2, 8),
                response_length=mask.sum(1),
                index=index,
                info={},
            )
        )
    return batches


def maker(estimator="gae", n_samples_per_prompt=1, kl_coef=0.0):
    """Construct an experience maker without the Ray actors, which only ``make_experience`` needs."""
    advantage = SimpleNamespace(estimator=estimator, gamma=0.9, lambd=0.8, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=n_samples_per_prompt, max_new_tokens=8),
        reward=SimpleNamespace(clip_range=None, overlong_buffer_len=None, stop_properly_penalty_coef=None),
    )
    controller = SimpleNamespace(value=kl_coef)
    return RemoteExperienceMaker(None, None, None, None, controller, SimpleNamespace(args=args), None)


def test_advantages_are_outcome_minus_prompt_value():
    """They are the same at each token, neither whitened nor discounted, and the settings stay unchanged."""
    with fused.patch():
        sppo = maker()
        batches = sppo.compute_advantages_and_returns(experiences())
    assert sppo.args.algo.advantage.estimator == "gae"
    for experience in batches:
        mask = experience.action_mask
        value = experience.values[[0, 1], [3, 2]].sigmoid()
        expected = (torch.tensor([1.0, 0.0]) - value)[:, None] * mask
        torch.testing.assert_close(experience.advantages, expected)
        torch.testing.assert_close(experience.returns, torch.tensor([[1.0], [0.0]]) * mask)
        assert experience.info["return"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("estimator", ["reinforce", "rloo", "dr_grpo", "group_norm", "flash_reinforce"])
def test_other_estimators_are_unchanged(estimator):
    expected = maker(estimator, 2).compute_advantages_and_returns(experiences())
    with fused.patch():
        batches = maker(estimator, 2).compute_advantages_and_returns(experiences())
    for patched, original in zip(batches, expected, strict=True):
        results, expected_results = [(x.advantages, x.returns) for x in (patched, original)]
        torch.testing.assert_close(results, expected_results, rtol=0, atol=0)


def test_outcomes_outside_the_unit_interval_are_rejected():
    """A KL penalty makes an outcome negative; the settings stay unchanged."""
    batches = experiences()
    batches[1].kl += 0.1
    with fused.patch():
        sppo = maker(kl_coef=1.0)
        with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\] .*--algo.kl.init_coef 0.*got -0\.3"):
            sppo.compute_advantages_and_returns(batches)
        assert sppo.args.algo.advantage.estimator == "gae"


@pytest.fixture
def critic(tmp_path):
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    return models.get_llm_for_sequence_regression(
        str(tmp_path), "critic", param_dtype="bf16", attn_implementation="eager", init_value_head=True
    ).float()


def test_the_value_at_the_first_token_depends_only_on_the_prompt(critic):
    """The values of two left-padded responses to one prompt agree there and nowhere else."""
    sequences = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [0, 0, 5, 6, 11, 12, 0]])
    attention_mask = (sequences != 0).long()
    action_mask = torch.zeros(2, 6, dtype=torch.long)  # of the positions 1 to 6
    action_mask[0, 3:6] = action_mask[1, 3:5] = 1
    values = critic(sequences, action_mask, attention_mask)
    prompt = critic(sequences[:, :4], attention_mask=attention_mask[:, :4], return_output=True)["last_hidden_state"]
    torch.testing.assert_close(values[:, 3], critic.score(prompt)[:, -1, 0])
    assert not torch.allclose(values[0, 4], values[1, 4])
    rewards = torch.zeros(2, 6)
    rewards[0, 5] = 1
    advantages, returns = fused.get_advantages_and_returns(None, values, rewards, action_mask, 1.0, 1.0)
    value = values[0, 3].sigmoid()
    torch.testing.assert_close(advantages, torch.stack([1 - value, -value]).detach()[:, None] * action_mask)
    fused.SPPOValueLoss()(values, values, returns, action_mask).backward()
    assert critic.score.weight.grad.abs().sum() > 0


# Log-probabilities


@pytest.fixture
def _no_triton_in_openrlhf(monkeypatch):
    """Run OpenRLHF on a CPU: flash-attn's cross-entropy requires a GPU, and OpenRLHF's entropy compiles C++."""
    monkeypatch.setitem(sys.modules, "flash_attn.ops.triton.cross_entropy", None)
    monkeypatch.setattr(actor, "compute_entropy", model_utils.compute_entropy._torchdynamo_orig_callable)


@pytest.mark.usefixtures("_no_triton_in_openrlhf")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_from_logits_agree_with_openrlhf(temperature):
    torch.manual_seed(0)
    logits, labels, upstream = 3 * torch.randn(2, 5, 33), torch.randint(33, (2, 5)), torch.randn(2, 5)
    results = []
    for function in (fused.log_probs_from_logits, model_utils.log_probs_from_logits):
        x = logits.clone().requires_grad_()
        logprobs = function(x * 1, labels, temperature)
        (logprobs * upstream).sum().backward()
        results.append((logprobs, x.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("_no_triton_in_openrlhf")
def test_actor_is_unchanged():
    """Log-probabilities, the entropy of the same logits and the LM head's gradient agree."""
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = models.Actor(Qwen2ForCausalLM(config), temperature=0.7)
    policy.packing_samples = False
    sequences, mask = torch.randint(1, 32, (2, 7)), torch.ones(2, 4)

    def run():
        policy.zero_grad()
        logprobs, output = policy(sequences, mask, torch.ones_like(sequences), return_output=True, return_entropy=True)
        (logprobs.sum() + output.entropy.sum()).backward()
        return logprobs, output.entropy, policy.model.lm_head.weight.grad.clone()

    expected = run()
    with fused.patch():
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)


# Signatures, patching and imports


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures_are_those_of_openrlhf():
    pairs = [
        (fused.policy_loss_class().__init__, loss.PolicyLoss.__init__),
        (fused.policy_loss_class().forward, loss.PolicyLoss.forward),
        (fused.SPPOValueLoss.__init__, loss.ValueLoss.__init__),
        (fused.SPPOValueLoss.forward, loss.ValueLoss.forward),
        (fused.log_probs_from_logits, model_utils.log_probs_from_logits),
        (fused.get_advantages_and_returns, RemoteExperienceMaker.get_advantages_and_returns),
        (
            fused._unwhitened(RemoteExperienceMaker),
            RemoteExperienceMaker.compute_advantages_and_returns,
        ),
    ]
    for replacement, original in pairs:
        assert parameters(replacement) == parameters(original), original
    assert issubclass(fused.policy_loss_class(), loss.PolicyLoss)


def test_patches_replace_each_other_and_unpatch_restores():
    fused.unpatch()
    assert all(in_place())
    fused.patch()
    assert not any(in_place())
    assert ppo_actor.PolicyLoss is models.PolicyLoss is fused.policy_loss_class()
    patched = [getattr(*name) for name in NAMES]
    fused.patch()
    assert [getattr(*name) for name in NAMES] == patched
    with fused.patch(policy_loss_type="sppo_seq"):
        loss_fn = ppo_actor.PolicyLoss(clip_eps_low=0.1, policy_loss_type="ppo")
        assert (type(loss_fn), loss_fn.policy_loss_type) == (fused.policy_loss_class(), "sppo_seq")
        assert loss_fn.clip_eps_low == 0.1
    assert [getattr(*name) for name in NAMES] == patched
    fused.unpatch()
    assert all(in_place())
    for function in (fused.patch, fused.patch_when_imported):
        with pytest.raises(ValueError, match="policy_loss_type must be one of 'ppo', 'gspo', 'sppo_seq', got 'sppo'"):
            function(policy_loss_type="sppo")
    assert all(in_place())


def run_python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hooks_patch_after_the_first_import_of_a_trainer():
    """Installing a hook imports neither OpenRLHF nor DeepSpeed nor Ray."""
    run_python("""
import sys
from sppo_kernels.integrations import openrlhf as fused

finders = list(sys.meta_path)
fused.patch_when_imported(policy_loss_type="sppo_seq")
fused.patch_when_imported()
assert len(sys.meta_path) == len(finders) + 1
fused.unpatch()
assert sys.meta_path == finders
assert not {"openrlhf", "deepspeed", "ray"} & sys.modules.keys()
fused.unpatch()
fused.patch_when_imported()
assert not {"openrlhf", "deepspeed", "ray"} & sys.modules.keys()
import openrlhf.models
assert openrlhf.models.PolicyLoss.__name__ == "PolicyLoss"
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ray import ppo_actor, ppo_critic
assert sys.meta_path == finders
assert ppo_actor.PolicyLoss is openrlhf.models.PolicyLoss is fused.policy_loss_class()
assert ppo_critic.ValueLoss is openrlhf.models.ValueLoss is fused.SPPOValueLoss
assert RemoteExperienceMaker.get_advantages_and_returns is fused.get_advantages_and_returns
fused.unpatch()
assert ppo_actor.PolicyLoss is openrlhf.models.PolicyLoss is fused.policy_loss_class().__base__
assert ppo_critic.ValueLoss is openrlhf.models.ValueLoss is not fused.SPPOValueLoss
fused.patch_when_imported()
assert ppo_actor.PolicyLoss is fused.policy_loss_class()
""")


@pytest.mark.slow
def test_ray_workers_run_the_hook():
    """The hook patches a worker process of a local Ray.

    It runs before Ray sets the worker's GPU and does not import DeepSpeed.
    """
    run_python("""
import ray
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer

def hook():
    import os, sys
    from sppo_kernels.integrations import openrlhf as fused
    fused.patch_when_imported(policy_loss_type="sppo_seq")
    os.environ["IN_HOOK"] = repr((os.environ.get("CUDA_VISIBLE_DEVICES"), "deepspeed" in sys.modules))

@ray.remote(num_gpus=1)
class Worker:
    def observe(self):
        import os
        PolicyLoss = ActorPPOTrainer.__init__.__globals__["PolicyLoss"]  # the worker's, which imports the class here
        loss = PolicyLoss(policy_loss_type="gspo")
        return type(loss).__name__, loss.policy_loss_type, os.environ.get("IN_HOOK"), os.environ["CUDA_VISIBLE_DEVICES"]

ray.init(num_cpus=1, num_gpus=1, include_dashboard=False, runtime_env={"worker_process_setup_hook": hook})
observed = ray.get(Worker.remote().observe.remote())
assert observed == ("SPPOPolicyLoss", "sppo_seq", "(None, False)", "0"), observed
ray.shutdown()
""")
