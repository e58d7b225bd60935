"""Integration with the real verl on a CPU: losses, advantages, forward, configuration and worker processes."""

import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import verl.utils.torch_functional
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import monkey_patch
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.utils import need_reference_policy
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1 import utils as trainer_utils
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.experimental import torch_functional
from verl.utils.import_utils import load_extern_object
from verl.workers.config import ActorConfig, CriticConfig, FSDPEngineConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils import losses

from sppo_kernels.integrations import verl as fused

ROOT = Path(__file__).parents[2]

# verl loaded the plugin when it was imported.
assert "sppo_seq" in core_algos.POLICY_LOSS_REGISTRY
fused.unpatch()
ORIGINAL_VALUE_LOSS = losses.value_loss
ORIGINAL_COMPUTE_ADVANTAGE = ray_trainer.compute_advantage
ORIGINAL_FUSED_LINEAR = torch_functional.FusedLinearForPPO
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL_COUNTS = {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 12}


@pytest.fixture(autouse=True)
def _patched():
    fused.patch()


def actor_config(**changes):
    config = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1, "clip_ratio_high": 0.3}
    return ActorConfig(**(config | changes))


def batch(rows=5, length=7, spread=0.4, seed=0):
    """Make the inputs of a policy loss: ragged rows, one of them empty, advantages of both signs."""
    torch.manual_seed(seed)
    log_prob = torch.randn(rows, length) - 2
    mask = (torch.arange(length) < torch.tensor([7, 3, 0, 5, 1])[:rows, None]).float()
    advantages = torch.linspace(-1, 1, rows)[:, None] * mask
    return {
        "old_log_prob": log_prob + spread * torch.randn(rows, length),
        "log_prob": log_prob.requires_grad_(),
        "advantages": advantages,
        "response_mask": mask,
    }


def loss_of(name, inputs, mode, config, **extra):
    loss, metrics = core_algos.get_policy_loss_fn(name)(**inputs, loss_agg_mode=mode, config=config, **extra)
    (gradient,) = torch.autograd.grad(loss, inputs["log_prob"])
    return loss, gradient, metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "info", [{}, GLOBAL_COUNTS, {**GLOBAL_COUNTS, "loss_scale_factor": 9}], ids=["local", "dp", "scaled"]
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("spread", [0.4, 3.0])
def test_token_ratio_agrees_with_vanilla(mode, info, weighted, spread):
    """Value, gradient and metrics agree in all aggregations of verl; at spread 3 the dual clip is active."""
    inputs, config = batch(spread=spread), actor_config(global_batch_info=info)
    extra = {"rollout_is_weights": torch.rand(5, 7) * 2} if weighted else {}
    expected = loss_of("vanilla", inputs, mode, config, **extra)
    torch.testing.assert_close(loss_of("sppo_seq", inputs, mode, config, **extra), expected)
    assert expected[2]["actor/pg_clipfrac"] > 0
    assert spread < 1 or expected[2]["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("info", [{}, GLOBAL_COUNTS], ids=["local", "dp"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sequence_mean_agrees_with_gspo(info, weighted):
    """Value and gradient agree with the dual clip, which verl's GSPO lacks, out of reach."""
    inputs = batch()
    config = actor_config(global_batch_info=info, clip_ratio_c=1e9, clip_ratio_low=3e-2, clip_ratio_high=4e-2)
    extra = {"rollout_is_weights": torch.rand(5, 7) * 2} if weighted else {}
    loss, gradient, _ = loss_of("sppo_seq_mean", inputs, "seq-mean-token-mean", config, **extra)
    expected_loss, expected_gradient, _ = loss_of("gspo", inputs, "seq-mean-token-mean", config, **extra)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)
    assert (gradient.abs().sum(-1) == 0).any()  # an empty row and a clipped one
    assert gradient.abs().sum() > 0


def test_sequence_sum_agrees_with_float64():
    """The reference is the definition of the dual-clipped ratio of complete responses."""
    inputs, config = batch(spread=1.0), actor_config()
    loss, gradient, _ = loss_of("sppo_seq_sum", inputs, "seq-mean-token-mean", config)
    x = {name: tensor.detach().double() for name, tensor in inputs.items()}
    log_prob, mask = x["log_prob"].requires_grad_(), x["response_mask"]
    ratio = ((log_prob - x["old_log_prob"]) * mask).sum(-1).exp()
    advantage = x["advantages"][:, 0]
    each = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.3))
    each = torch.where(advantage < 0, each.minimum(-3 * advantage), each)
    expected = each[mask.any(-1)].mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected, log_prob)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sppo_seq_mean", "sppo_seq_sum"])
@pytest.mark.parametrize("mode", [m for m in MODES if m != "seq-mean-token-mean"])
def test_ratios_of_responses_require_their_aggregation(name, mode):
    with pytest.raises(ValueError, match=f"actor.loss_agg_mode must be seq-mean-token-mean .*, got {mode}"):
        loss_of(name, batch(), mode, actor_config())


@pytest.mark.parametrize(
    ("mode", "count"), [("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")]
)
def test_data_parallel_loss_requires_global_counts(mode, count):
    with pytest.raises(ValueError, match=f"{count} must be given with dp_size = 2, got None"):
        loss_of("sppo_seq", batch(), mode, actor_config(global_batch_info={"dp_size": 2}))


def test_a_large_log_ratio_keeps_its_gradient():
    """verl clamps the log-ratio of a token whose probability fell by e^21, which leaves it no gradient."""
    inputs = batch(spread=0.0)
    inputs["old_log_prob"] = inputs["log_prob"].detach() + 21.0
    config = actor_config()
    assert loss_of("vanilla", inputs, "token-mean", config)[1].abs().sum() == 0
    assert loss_of("sppo_seq", inputs, "token-mean", config)[1].abs().sum() > 0


def training_data(rows=5, prompt=4, length=7):
    """Make what verl passes to its losses, without padding -> data, model output, lengths of the sequences."""
    inputs = batch(rows, length)
    lengths = inputs["response_mask"].sum(-1).long()
    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    data = TensorDict(
        {
            "prompts": nested([torch.ones(prompt + i % 2, dtype=torch.long) for i in range(rows)]),
            "responses": nested([torch.ones(int(n), dtype=torch.long) for n in lengths]),
            "response_mask": nested([torch.ones(int(n)) for n in lengths]),
            "old_log_probs": nested([x[:n] for x, n in zip(inputs["old_log_prob"], lengths, strict=True)]),
            "advantages": nested([x[:n] for x, n in zip(inputs["advantages"], lengths, strict=True)]),
            "returns": nested([torch.full((int(n),), float(i % 2)) for i, n in enumerate(lengths)]),
            "values": nested([torch.zeros(int(n)) for n in lengths]),
        },
        batch_size=rows,
    )
    for name, value in {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}.items():
        tu.assign_non_tensor(data, **{name: value})
    total_lengths = [prompt + i % 2 + int(n) for i, n in enumerate(lengths)]
    output = torch.randn(sum(total_lengths)) - 2
    return data, output.requires_grad_(), total_lengths


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_actor_loss_agrees_with_vanilla(mode):
    """``verl.workers.utils.losses.ppo_loss`` has the same loss and gradient with loss_mode=sppo_seq."""
    results = []
    for name in ("vanilla", "sppo_seq"):
        data, output, _ = training_data()
        config = actor_config(loss_agg_mode=mode, policy_loss={"loss_mode": name})
        data = data.exclude("values", "returns")
        loss, metrics = losses.ppo_loss(config, {"log_probs": output}, data)
        results.append((loss.detach(), *torch.autograd.grad(loss, output)))
        assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"} <= metrics.keys()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("counts", [{}, {"dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 12}])
def test_critic_loss_is_the_cross_entropy_at_the_last_prompt_token(counts):
    """No other value has a gradient. Other aggregation modes run verl's loss."""
    data, output, total_lengths = training_data()
    tu.assign_non_tensor(data, **counts)
    critic = lambda mode: CriticConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, loss_agg_mode=mode)
    loss, metrics = losses.value_loss(critic("sppo_seq"), {"values": output}, data)
    (gradient,) = torch.autograd.grad(loss, output)
    ends = np.cumsum(total_lengths)
    prompts = data["prompts"].offsets().diff().tolist()
    last = [end - n + prompt - 1 for end, n, prompt in zip(ends, total_lengths, prompts, strict=True)]
    with_tokens = [i for i in range(5) if i != 2]  # the third response is empty
    logits = output.detach()[[last[i] for i in with_tokens]].double().requires_grad_()
    outcomes = torch.tensor([float(i % 2) for i in with_tokens], dtype=torch.float64)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, outcomes, reduction="sum")
    expected = each / 12 * 4 if counts else each / 4
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient[[last[i] for i in with_tokens]].double(), expected_gradient, rtol=1e-5, atol=1e-6
    )
    assert (gradient != 0).sum() == 4
    assert metrics["critic/vpred_mean"] == pytest.approx(torch.sigmoid(logits).mean().item())
    original, _ = ORIGINAL_VALUE_LOSS(critic("token-mean"), {"values": output}, data)
    patched, _ = losses.value_loss(critic("token-mean"), {"values": output}, data)
    assert torch.equal(patched, original)
    assert not torch.equal(patched, loss)


def advantage_data(scale=1.0):
    inputs = batch()
    rewards = torch.zeros(5, 7)
    lengths = inputs["response_mask"].sum(-1).long()
    rewards[torch.arange(5), (lengths - 1).clamp(min=0)] = scale * torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0])
    values = torch.randn(5, 7)
    tensors = {"token_level_rewards": rewards, "response_mask": inputs["response_mask"], "values": values}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(list("abcde"), dtype=object)})


def test_advantages_are_outcome_minus_prompt_value():
    """verl's compute_advantage gives R - sigmoid(value at the last prompt token) at the tokens of the response."""
    data = advantage_data()
    mask, values = data.batch["response_mask"], data.batch["values"]
    data = ray_trainer.compute_advantage(data, adv_estimator="sppo_seq", config={})
    outcomes = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0])
    torch.testing.assert_close(data.batch["advantages"], (outcomes - values[:, 0].sigmoid())[:, None] * mask)
    torch.testing.assert_close(data.batch["returns"], outcomes[:, None] * mask)
    found = core_algos.get_adv_estimator_fn("sppo_seq")(
        **data.select(["token_level_rewards", "response_mask", "values"]).batch
    )
    assert torch.equal(found[0], data.batch["advantages"])


def test_other_estimators_are_unchanged():
    for estimator in ("gae", "grpo", "rloo"):
        torch.manual_seed(0)
        patched = ray_trainer.compute_advantage(advantage_data(), adv_estimator=estimator, config={})
        torch.manual_seed(0)
        original = ORIGINAL_COMPUTE_ADVANTAGE(advantage_data(), adv_estimator=estimator, config={})
        assert torch.equal(patched.batch["advantages"], original.batch["advantages"])


def test_outcomes_outside_the_unit_interval_are_rejected():
    with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\] when summed .*use_kl_in_reward=False, got 2"):
        ray_trainer.compute_advantage(advantage_data(scale=2.0), adv_estimator="sppo_seq", config={})


def test_missing_values_are_rejected():
    data = advantage_data().select(["token_level_rewards", "response_mask"], ["uid"])
    with pytest.raises(ValueError, match=r"needs the critic's values: critic\.enable must not be False"):
        ray_trainer.compute_advantage(data, adv_estimator="sppo_seq", config={})


class EngineWithoutProcesses(FSDPEngineWithLMHead):
    """verl's engine without the processes on GPUs that its constructor starts."""

    def __init__(self):
        self.pad_to_length = self.use_ulysses_sp = False
        self.engine_config = FSDPEngineConfig()


def run_actor_engine(backend):
    """Run verl's engine on a micro-batch and a tiny Qwen2 -> log-probabilities, entropies, gradients."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, initializer_range=0.5)
    )  # fmt: skip
    nested = lambda rows: torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    rows = [torch.arange(n) for n in (5, 9, 3)]
    data = TensorDict({"input_ids": nested([x * 3 for x in rows]), "position_ids": nested(rows)}, batch_size=3)
    settings = {"use_remove_padding": False, "use_fused_kernels": backend is not None}
    tu.assign_non_tensor(data, **settings, calculate_entropy=True, temperature=0.7)
    engine = EngineWithoutProcesses()
    original = type(model).forward
    try:
        monkey_patch.apply_monkey_patch(model, **settings, fused_kernels_backend=backend)
        inputs, arguments = engine.prepare_model_inputs(data)
        out = engine.prepare_model_outputs(model(**inputs), arguments, data, None)
    finally:
        type(model).forward = original
    logprobs, entropy = out["log_probs"].values(), out["entropy"].values()
    (logprobs * torch.linspace(-1, 1, 17) + 0.1 * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture
def _no_flash_attn_in_verl(monkeypatch):
    """Disable flash-attn's cross-entropy, which requires a GPU."""
    monkeypatch.setattr(torch_functional, "_FLASH_ATTN_CROSS_ENTROPY_AVAILABLE", False)
    monkeypatch.setattr(verl.utils.torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", False)


@pytest.mark.usefixtures("_no_flash_attn_in_verl")
@pytest.mark.filterwarnings("ignore:linear_logprobs cached")  # entropies have gradients here
@pytest.mark.parametrize("backend", fused.FUSED_BACKENDS)
def test_fused_logprobs_agree_with_logits(monkeypatch, backend):
    """Results and gradients of the actor agree with those from verl's logits, and linear_logprobs computes them."""
    calls = []
    run = fused.linear_logprobs
    monkeypatch.setattr(fused, "linear_logprobs", lambda *args, **kwargs: calls.append(kwargs) or run(*args, **kwargs))
    expected = run_actor_engine(None)
    assert not calls
    torch.testing.assert_close(run_actor_engine(backend), expected, rtol=1e-4, atol=1e-5)
    assert calls == [{"temperature": 0.7, "backward": fused.FUSED_BACKENDS[backend]}]


@pytest.mark.usefixtures("_no_flash_attn_in_verl")
def test_other_backends_are_unchanged():
    assert isinstance(torch_functional.FusedLinearForPPO(64), ORIGINAL_FUSED_LINEAR)
    expected = run_actor_engine(None)
    torch.testing.assert_close(run_actor_engine("torch"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: sppo"):
        torch_functional.FusedLinearForPPO(impl_backend="sppo")


def test_unpatch_removes_everything():
    fused.unpatch()
    assert losses.value_loss is ORIGINAL_VALUE_LOSS
    assert ray_trainer.compute_advantage is ORIGINAL_COMPUTE_ADVANTAGE
    assert torch_functional.FusedLinearForPPO is ORIGINAL_FUSED_LINEAR
    assert trainer_base.value_loss is ORIGINAL_VALUE_LOSS  # although verl imported it while it was patched
    assert not [
        name for name in (*core_algos.POLICY_LOSS_REGISTRY, *core_algos.ADV_ESTIMATOR_REGISTRY) if "sppo" in name
    ]
    fused.unpatch()  # nothing to undo
    with fused.patch():
        with fused.patch():
            pass
        assert "sppo_seq" in core_algos.POLICY_LOSS_REGISTRY
    assert "sppo_seq" not in core_algos.POLICY_LOSS_REGISTRY


def test_names_imported_by_the_trainer_are_patched():
    """verl's trainer imports the critic's loss and the advantages by name."""
    assert trainer_base.value_loss is losses.value_loss is not ORIGINAL_VALUE_LOSS
    assert trainer_utils.compute_advantage is ray_trainer.compute_advantage is not ORIGINAL_COMPUTE_ADVANTAGE


def test_data_parallel_critic_loss_requires_the_global_batch_size():
    data, output, _ = training_data()
    tu.assign_non_tensor(data, dp_size=2)
    critic = CriticConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, loss_agg_mode="sppo_seq")
    with pytest.raises(ValueError, match="global_batch_size must be given with dp_size = 2, got None"):
        losses.value_loss(critic, {"values": output}, data)


def test_patched_functions_are_pickled_under_verls_names():
    """A worker without this package runs verl's own functions."""
    for patched in (losses.value_loss, ray_trainer.compute_advantage, torch_functional.FusedLinearForPPO):
        assert b"sppo" not in pickle.dumps(patched)
        assert pickle.loads(pickle.dumps(patched)) is patched


def test_ray_workers_load_the_plugin():
    """The critic's loss that verl sends to a worker process of Ray is SPPO's there."""
    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        data, output, _ = training_data()
        critic = CriticConfig(strategy="fsdp", ppo_micro_batch_size_per_gpu=1, loss_agg_mode="sppo_seq")

        def on_worker(value_loss, output, data):
            from verl.trainer.ppo import core_algos

            loss, _ = value_loss(model_output={"values": output}, data=data)
            return list(core_algos.POLICY_LOSS_REGISTRY), list(core_algos.ADV_ESTIMATOR_REGISTRY), loss

        sent = partial(losses.value_loss, config=critic)
        policy_losses, estimators, loss = ray.get(ray.remote(on_worker).remote(sent, output.detach(), data))
    finally:
        ray.shutdown()
    assert set(fused.RATIO_LEVELS) <= set(policy_losses)
    assert "sppo_seq" in estimators
    torch.testing.assert_close(loss, sent(model_output={"values": output.detach()}, data=data)[0])


def test_the_plugin_imports_no_module_of_verl():
    """It waits for verl's own imports."""
    code = """
import sys, verl
from sppo_kernels.integrations import verl as fused
assert not set(fused._PATCHED_MODULES) & set(sys.modules)
from verl.trainer.ppo import core_algos
assert {"sppo_seq", "sppo_seq_mean", "sppo_seq_sum"} <= set(core_algos.POLICY_LOSS_REGISTRY)
assert "sppo_seq" in core_algos.ADV_ESTIMATOR_REGISTRY
assert fused._added == {"verl.trainer.ppo.core_algos"}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def recipe(tmp_path, *arguments):
    """Return the arguments with which examples/verl_sppo.sh starts verl, for a model folder of two files."""
    Qwen2Config(architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>").save_pretrained(tmp_path / "model")
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MODEL": str(tmp_path / "model"), "DATA": "/data.parquet"}
    script = [str(ROOT / "examples/verl_sppo.sh"), *arguments]
    done = subprocess.run(["bash", *script], env=environment, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.split()


def composed(tmp_path, *arguments):
    module, *overrides = recipe(tmp_path, *arguments)[1:]
    assert module == "verl.trainer.main_ppo"
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=overrides)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("critic.loss_agg_mode=token-mean", "must both be sppo_seq or neither .*, got sppo_seq and token-mean"),
        ("algorithm.adv_estimator=gae", "must both be sppo_seq or neither .*, got gae and sppo_seq"),
        (
            "actor_rollout_ref.actor.policy_loss.loss_mode=sppo_seq_sum "
            "actor_rollout_ref.actor.loss_agg_mode=token-mean",
            "actor_rollout_ref.actor.loss_agg_mode must be seq-mean-token-mean .*, got token-mean",
        ),
    ],
)
def test_incompatible_names_are_rejected(tmp_path, changed, message):
    """verl calls need_critic before it starts anything."""
    with pytest.raises(ValueError, match=message):
        trainer_base.need_critic(composed(tmp_path, *changed.split()))


def test_other_configurations_are_unchanged():
    """They may lack the keys that SPPO's names would be under."""
    config = OmegaConf.create({"algorithm": {"adv_estimator": "gae"}, "critic": {"enable": None}})
    assert trainer_base.need_critic(config)


def test_sppo_needs_a_critic_unless_disabled(tmp_path):
    assert trainer_base.need_critic(composed(tmp_path))
    assert not trainer_base.need_critic(composed(tmp_path, "critic.enable=False"))
    others = "algorithm.adv_estimator=grpo", "critic.loss_agg_mode=token-mean"
    with pytest.warns(UserWarning, match="Disabled critic"):
        assert not trainer_base.need_critic(composed(tmp_path, *others))


def test_verl_accepts_the_recipe(tmp_path):
    """verl composes and validates the recipe's configuration, which names SPPO's parts."""
    config = composed(tmp_path, "trainer.nnodes=2")
    assert not need_reference_policy(config)
    validate_config(config, use_reference_policy=False, use_critic=True)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert core_algos.get_policy_loss_fn(actor.policy_loss.loss_mode).args == ("token",)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c, actor.use_kl_loss) == (
        0.2,
        0.2,
        3.0,
        False,
    )
    assert config.critic.loss_agg_mode == config.algorithm.adv_estimator == fused.NAME
    assert config.actor_rollout_ref.model.fused_kernel_options.impl_backend in fused.FUSED_BACKENDS
    assert config.trainer.nnodes == 2
    score = load_extern_object(config.reward.custom_reward_function.path, "compute_score")
    assert score("math_dapo", "so it is \\boxed{34}", "34") == 1.0
    assert score("math_dapo", "so it is \\boxed{35}", "34", extra_info={}) == 0.0
