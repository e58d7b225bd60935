"""Versions of verl and OpenRLHF that differ from the tested ones; of TRL, in test_trl.py."""

import importlib
import warnings
from importlib import metadata

import pytest
import torch
from openrlhf import models
from openrlhf.models import actor
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from verl.trainer.ppo import core_algos
from verl.utils.experimental import torch_functional
from verl.workers.config import ActorConfig
from verl.workers.utils import losses

from sppo_kernels.integrations import _compatibility, verl_plugin
from sppo_kernels.integrations import openrlhf as openrlhf_fused
from sppo_kernels.integrations import verl as verl_fused


@pytest.fixture(autouse=True)
def _unpatch_before_and_after():
    verl_fused.unpatch()
    yield
    verl_fused.unpatch()
    openrlhf_fused.unpatch()


def use():
    """Compute verl's policy loss of the name that the configuration selects."""
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    return core_algos.get_policy_loss_fn("sppo_seq")(zeros, zeros, ones, ones, "token-mean", config)


def test_verl_an_untested_version_warns_where_it_is_used(monkeypatch):
    verl_fused.unpatch()
    monkeypatch.setattr(_compatibility, "_warned", set())
    monkeypatch.setattr(metadata, "version", lambda _: "0.10.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(verl_plugin)
    with pytest.warns(UserWarning, match=r"verl 0\.10\.0 is not tested, only 0\.9\.1 is"):
        use()


@pytest.mark.parametrize(
    ("owner", "name", "new", "says"),
    [
        (
            losses,
            "value_loss",
            lambda config, output: None,
            r"utils\.losses\.value_loss has the parameters config, output",
        ),
        (core_algos, "compute_policy_loss_vanilla", None, "compute_policy_loss_vanilla does not exist"),
        (torch_functional, "FusedLinearForPPO", None, r"FusedLinearForPPO\.__init__ does not exist"),
    ],
)
def test_verl_what_does_not_fit_is_named_by_the_first_use(monkeypatch, owner, name, new, says):
    """The plugin is quiet, and verl runs without it."""
    verl_fused.unpatch()
    monkeypatch.setattr(owner, name, new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(verl_plugin)
    with pytest.raises(ImportError, match=rf"verl .* does not fit this integration: .*{says}"):
        use()
    verl_fused.unpatch()
    with pytest.raises(ImportError, match=says):
        verl_fused.patch()
    verl_fused.unpatch()


def test_verl_a_vanilla_loss_that_differs_is_found(monkeypatch):
    verl_fused.unpatch()
    vanilla = core_algos.compute_policy_loss_vanilla

    def other(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        loss, metrics = vanilla(
            old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
        )
        return 1.01 * loss, metrics

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", other)
    with pytest.raises(
        ImportError, match=r"result 0 of .*compute_policy_loss_vanilla differs from what replaces it by"
    ):
        verl_fused.patch()
    verl_fused.unpatch()


def test_openrlhf_an_untested_version_that_fits_warns_once(monkeypatch):
    monkeypatch.setattr(_compatibility, "_warned", set())
    monkeypatch.setattr(metadata, "version", lambda package: "0.12.0")
    with pytest.warns(UserWarning, match=r"openrlhf 0\.12\.0 is not tested, only 0\.11\.2 is"):
        openrlhf_fused.patch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        openrlhf_fused.patch()


@pytest.mark.parametrize(
    ("owner", "name", "new", "says"),
    [
        (models, "ValueLoss", None, r"openrlhf\.models\.ValueLoss does not exist"),
        (
            actor,
            "log_probs_from_logits",
            lambda logits, labels: None,
            "has the parameters logits, labels, not",
        ),
        (actor, "log_probs_from_logits", lambda logits, labels, temperature: logits[:, 0], "result 0 of .* differs"),
        (
            RemoteExperienceMaker,
            "compute_advantages_and_returns",
            lambda self: None,
            "has the parameters self, not",
        ),
    ],
)
def test_openrlhf_what_does_not_fit_is_named_and_nothing_is_replaced(monkeypatch, owner, name, new, says):
    monkeypatch.setattr(owner, name, new)
    with pytest.raises(ImportError, match=rf"openrlhf .* does not fit this integration: .*{says}"):
        openrlhf_fused.patch()
    assert getattr(owner, name) is new
    assert models.PolicyLoss is not openrlhf_fused.policy_loss_class()
