"""Tests of policy_loss against PPO, DAPO, GSPO, SPPO and GRPO, written out sequence by sequence."""

import pytest
import torch
from against_float64 import (
    BACKENDS,
    DEVICE,
    randn,
)
from policy_loss_cases import SEQUENCES, as_packed, as_padded

from sppo_kernels import policy_loss


def ppo(ratio, advantage, clip_low=0.2, clip_high=0.2):
    """PPO, arXiv 1707.06347, equation 7, as a loss."""
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def dual_clip(ratio, advantage, c=3.0):
    """Dual clip, arXiv 1912.09729, equation 5, as a loss: max(min(r A, clip(r) A), c A) for A < 0."""
    return torch.where(advantage < 0, torch.min(ppo(ratio, advantage), -c * advantage), ppo(ratio, advantage))


def token_mean(losses):
    return torch.cat(losses).sum() / sum(len(x) for x in losses)


def seq_mean_token_mean(losses):
    return sum(x.sum() / len(x) for x in losses) / len(losses)


def seq_mean_token_sum(losses):
    return sum(x.sum() for x in losses) / len(losses)


def ppo_dual_clip_of(aggregate):
    def published(sequences):
        return aggregate([dual_clip((x["new"] - x["old"]).exp(), x["advantage"]) for x in sequences])

    return published


def clip_higher(sequences):
    """DAPO, arXiv 2503.14476: the upper bound is wider than the lower."""
    return token_mean([ppo((x["new"] - x["old"]).exp(), x["advantage"], 0.2, 0.28) for x in sequences])


def gspo(sequences):
    """GSPO, arXiv 2507.18071, equations 5 and 7."""
    losses = []
    for x in sequences:
        s = ((x["new"] - x["old"]).sum() / len(x["new"])).exp()
        losses.append(ppo(s, x["advantage"][0], 3e-2, 4e-2))
    return sum(losses) / len(losses)


def gspo_token(sequences):
    """GSPO-token, arXiv 2507.18071, equations 13 and 14: sg[s] pi / sg[pi], with one advantage per token."""
    losses = []
    for x in sequences:
        s = ((x["new"] - x["old"]).sum() / len(x["new"])).exp().detach()
        s_token = s * x["new"].exp() / x["new"].exp().detach()
        losses.append(ppo(s_token, x["token_advantage"]).mean())
    return sum(losses) / len(losses)


def bandit(sequences):
    """Bandit with one action per prompt, arXiv 2604.08865: the ratio is that of complete responses."""
    losses = [ppo((x["new"].sum() - x["old"].sum()).exp(), x["advantage"][0], 0.5, 0.5) for x in sequences]
    return sum(losses) / len(losses)


def sppo(sequences):
    """SPPO as published in arXiv 2604.08865: outcome minus value per token, token ratio, dual clip 3, token mean."""
    total, count = 0.0, 0
    for x in sequences:
        for new, old in zip(x["new"], x["old"], strict=True):
            total = total + dual_clip((new - old).exp(), x["advantage"][0])
            count += 1
    return total / count


def grpo(sequences):
    """GRPO, arXiv 2402.03300, equations 3 and 4."""
    losses = []
    for x in sequences:
        kl = (x["ref"] - x["new"]).exp() - (x["ref"] - x["new"]) - 1
        losses.append((ppo((x["new"] - x["old"]).exp(), x["advantage"]) + 0.04 * kl).sum() / len(x["new"]))
    return sum(losses) / len(losses)


def kl_penalty(kl):
    def published(sequences):
        return token_mean([ppo((x["new"] - x["old"]).exp(), x["advantage"]) + 0.3 * kl(x) for x in sequences])

    return published


def k1(x):
    return x["new"] - x["ref"]


def k2(x):
    return (x["new"] - x["ref"]) ** 2 / 2


def corrected(weight, aggregate=token_mean):
    """Apply importance weights between rollout engine and trainer, which are constants in the gradient."""

    def published(sequences):
        return aggregate([weight(x) * ppo((x["new"] - x["old"]).exp(), x["advantage"]) for x in sequences])

    return published


def token_truncate(x):
    return (x["old"] - x["rollout"]).exp().clamp(max=1.1)


def sequence_truncate(x):
    return min((x["old"] - x["rollout"]).sum().exp().item(), 1.1)


def sequence_mask(x):
    weight = (x["old"] - x["rollout"]).sum().exp().item()
    return weight if weight <= 1.1 else 0.0


def icepop(x):
    """IcePop, arXiv 2510.18855, equation 5: k where alpha <= k <= beta, else 0."""
    weight = (x["old"] - x["rollout"]).exp()
    return weight * ((weight >= 0.95) & (weight <= 1.1))


def cispo(sequences):
    """CISPO, arXiv 2506.13585, equations 4 and 5: sg[clip(r)] A log pi, over all tokens."""
    weights = [(x["new"] - x["old"]).exp().clamp(1 - 0.3, 1 + 0.2).detach() for x in sequences]
    return token_mean([-w * x["advantage"] * x["new"] for w, x in zip(weights, sequences, strict=True)])


PUBLISHED = [
    pytest.param(ppo_dual_clip_of(token_mean), {"dual_clip": 3.0}, id="ppo-token-mean"),
    pytest.param(
        ppo_dual_clip_of(seq_mean_token_mean),
        {"dual_clip": 3.0, "aggregation": "seq-mean-token-mean"},
        id="ppo-seq-mean-token-mean",
    ),
    pytest.param(
        ppo_dual_clip_of(seq_mean_token_sum),
        {"dual_clip": 3.0, "aggregation": "seq-mean-token-sum"},
        id="ppo-seq-mean-token-sum",
    ),
    pytest.param(clip_higher, {"clip_high": 0.28}, id="dapo"),
    pytest.param(cispo, {"objective": "cispo", "clip_low": 0.3}, id="cispo"),
    pytest.param(
        corrected(icepop),
        {"rollout_correction": "token_mask", "rollout_floor": 0.95, "rollout_cap": 1.1},
        id="icepop",
    ),
    pytest.param(gspo, {"ratio_level": "sequence_mean", "clip_low": 3e-2, "clip_high": 4e-2}, id="gspo"),
    pytest.param(gspo_token, {"ratio_level": "sequence_mean", "advantages": "token_advantage"}, id="gspo-token"),
    pytest.param(bandit, {"ratio_level": "sequence_sum", "clip_low": 0.5, "clip_high": 0.5}, id="sequence-sum"),
    pytest.param(sppo, {"dual_clip": 3.0}, id="sppo"),
    pytest.param(grpo, {"kl_coef": 0.04, "aggregation": "seq-mean-token-mean"}, id="grpo"),
    pytest.param(kl_penalty(k1), {"kl_coef": 0.3, "kl_estimator": "k1"}, id="kl-k1"),
    pytest.param(kl_penalty(k2), {"kl_coef": 0.3, "kl_estimator": "k2"}, id="kl-k2"),
    pytest.param(
        corrected(token_truncate), {"rollout_correction": "token_truncate", "rollout_cap": 1.1}, id="token-truncate"
    ),
    pytest.param(
        corrected(sequence_truncate, seq_mean_token_mean),
        {"rollout_correction": "sequence_truncate", "rollout_cap": 1.1, "aggregation": "seq-mean-token-mean"},
        id="sequence-truncate",
    ),
    pytest.param(
        corrected(sequence_mask), {"rollout_correction": "sequence_mask", "rollout_cap": 1.1}, id="sequence-mask"
    ),
]


@pytest.mark.parametrize("layout", [as_packed, as_padded])
@pytest.mark.parametrize(("published", "arguments"), PUBLISHED)
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_published_algorithm(backend, published, arguments, layout):
    n = sum(SEQUENCES)
    old = randn(n) - 2
    columns = {
        "logprobs": (old + randn(n, scale=0.4)).requires_grad_(),
        "old_logprobs": old,
        "ref_logprobs": old + randn(n, scale=0.4),
        "rollout_logprobs": old + randn(n, scale=0.1),
    }
    advantage, token_advantage = torch.tensor([0.7, -1.1, 5.0, -0.4, 0.2], device=DEVICE), randn(n)
    exact = {k: x.detach().double().requires_grad_(k == "logprobs") for k, x in columns.items()}
    sequences = [
        {
            "new": new,
            "old": old,
            "ref": ref,
            "rollout": rollout,
            "advantage": a.double().expand(len(new)),
            "token_advantage": per_token.double(),
        }
        for new, old, ref, rollout, a, per_token in zip(
            *(x.split(SEQUENCES) for x in exact.values()), advantage, token_advantage.split(SEQUENCES), strict=True
        )
        if len(new)
    ]
    want = published(sequences)
    (want_grad,) = torch.autograd.grad(want, exact["logprobs"])

    arguments = dict(arguments)
    advantages = token_advantage if arguments.pop("advantages", "") == "token_advantage" else advantage
    loss = policy_loss(**layout(columns, advantages), **arguments, backend=backend).loss
    (grad,) = torch.autograd.grad(loss, columns["logprobs"])
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-5, atol=1e-7)
    assert (grad != 0).any()
