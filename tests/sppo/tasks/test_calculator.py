"""The calculator task, and a policy that learns to call the tool in 30 updates."""

import pytest
import torch
from tiny_run import logged

from sppo.cli.recipes import build_trainer, read_recipe
from sppo.optimization import update_loss
from sppo.tasks import calculator


def test_the_calculator_answers_calls_at_the_end_of_a_turn():
    environment = calculator.Calculator()
    assert environment.step("[34*7]") == "238;"
    assert [environment.step(text) for text in ("#238", "[34*7]#1", "[34*]", "[34*7", "")] == [None] * 5
    assert calculator.reward(["[34*7]238;#238", "#238", "#2380", "238"], ["238"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_splits_share_no_prompt():
    train, test = calculator.dataset("train", 400), calculator.dataset("test", 80)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert all(str(eval(p.rstrip("="))) == a for p, a in zip(train["prompt"], train["answer"], strict=True))
    with pytest.raises(ValueError, match="split must be train or test and size at least 1, got 'dev' and 1"):
        calculator.dataset("dev", 1)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    recipe = read_recipe("calculator")
    recipe["args"] |= {"output_dir": str(tmp_path_factory.mktemp("run")), "use_cpu": True, "disable_tqdm": True}
    recipe["args"] |= {"log_completions": False, "eval_strategy": "no"}
    return build_trainer(recipe)


@pytest.mark.slow
def test_a_policy_learns_to_call_a_tool_in_thirty_updates(trainer):
    before = trainer.evaluate()["eval_success_rate"]
    trainer.train()
    after = trainer.evaluate()["eval_success_rate"]
    assert before < 0.5
    assert after > before + 0.25
    rewards = logged(trainer, "success_rate")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1.5
    assert logged(trainer, "turns")[-1] > logged(trainer, "turns")[0]
    assert all(0 < tokens < 20 for tokens in logged(trainer, "environment_tokens"))


@pytest.mark.slow
def test_what_the_environment_wrote_has_no_gradient(trainer):
    """The gradient at the last hidden states is 0 where a token of the environment is predicted, and only there."""
    next(iter(trainer.rollouts))
    samples, update = trainer.rollouts.samples, trainer.rollouts.update
    assert any(not all(sample.mask) for sample in samples)
    states = []
    hook = trainer.model.policy.model.norm.register_forward_hook(
        lambda module, inputs, output: states.append(output) or output.retain_grad()
    )
    (batch,) = update.micro_batches
    batch["advantages"] = torch.ones_like(batch["advantages"])
    loss, output = update_loss(trainer.model, batch, update=update, algorithm=trainer.algorithm, args=trainer.args)
    loss.backward()
    hook.remove()
    moved = states[0].grad[0].abs().sum(1) > 0
    expected = torch.zeros(len(moved), dtype=torch.bool)
    expected[batch["response_index"]] = True
    assert moved.equal(expected)
    assert len(output.logprobs) == sum(sum(sample.mask) for sample in samples)
    assert expected.sum() < sum(len(sample.response_ids) for sample in samples)
