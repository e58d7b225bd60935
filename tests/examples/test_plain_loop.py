"""The loop to copy: short, self-contained, correct for each sample, and it learns."""

import ast
import sys
from pathlib import Path

import plain_loop
import pytest
import torch
from plain_loop import EOS, PROMPT, PROMPTS, TEMPERATURE, ActorCritic


def test_is_short_and_self_contained():
    source = Path(plain_loop.__file__).read_text()
    assert len(source.splitlines()) <= 60
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} <= {"torch", "transformers", "sppo_kernels", *sys.stdlib_module_names}


def test_held_out_prompts_are_held_out():
    assert len(PROMPTS.unique(dim=0)) == len(PROMPTS) == 1000


@pytest.fixture
def samples():
    torch.manual_seed(0)
    model = ActorCritic()
    with torch.no_grad():
        model.actor.lm_head.weight *= 20  # far from uniform: a wrong position or temperature shows
    return model, *model.rollout(PROMPTS[:400])


def test_old_logprobs_are_of_the_tokens_that_were_sampled(samples):
    model, tokens, labels, old, _ = samples
    with torch.no_grad():
        logits = model.actor(tokens).logits[:, :-1] / TEMPERATURE
    expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)[:, PROMPT - 1 :]
    torch.testing.assert_close(old, expected.where(labels != -100, 0.0), rtol=1e-4, atol=1e-5)


def test_ratio_starts_at_one(samples):
    """Then the policy's loss is minus the mean over tokens of R - V."""
    model, tokens, labels, old, rewards = samples
    with torch.no_grad():
        loss = model(tokens, labels, old, rewards)
        logits = model.head(model.critic(tokens[:, :PROMPT]).last_hidden_state[:, -1]).squeeze(-1)
    lengths = (labels != -100).sum(1)
    expected = -((rewards - logits.sigmoid()) * lengths).sum() / lengths.sum()
    expected += torch.nn.functional.binary_cross_entropy_with_logits(logits, rewards)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_samples_end_at_eos_and_are_graded_by_their_last_digit(samples):
    _, tokens, labels, _, rewards = samples
    kinds = set()
    for prompt, row, reward in zip(tokens[:, :PROMPT].tolist(), labels.tolist(), rewards.tolist(), strict=True):
        response = row[: row.index(-100)] if -100 in row else row
        assert set(row[len(response) :]) <= {-100}
        assert EOS not in response[:-1]
        ended = response[-1] == EOS
        assert reward == float(ended and response[-2:-1] == [max(prompt)])
        assert ended or len(response) == labels.shape[1]
        kinds.add((ended, len(response) == 1, reward))
    assert {(True, True, 0.0), (True, False, 0.0), (True, False, 1.0), (False, False, 0.0)} <= kinds


@pytest.mark.slow
def test_learns(capsys):
    with torch.random.fork_rng():
        before, after = plain_loop.main(updates=18)
    assert before < 0.1
    assert after > 0.2  # 0.27 and 0.28 with two seeds, and more with more updates
    assert f"{after:.2f} after" in capsys.readouterr().out
