"""Tests of training on the distribution that was sampled, with top_k, top_p or min_p."""

import logging

import pytest
import torch
from tiny_models import SIZES
from tiny_run import logged, make

from sppo.models.actor_critic import policy_logprobs
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention

TRUNCATED = {"top_k": 6, "top_p": 0.8, "temperature": 0.7}


def exact_logprobs(policy, sample, temperature):
    """Log-probabilities of a response in float64: all logits, minus infinity outside the support, normalized."""
    ids, offsets = sample.support
    with torch.no_grad():
        logits = policy(torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0].double() / temperature
    rows = []
    for t, label in enumerate(sample.response_ids):
        row = logits[len(sample.prompt_ids) - 1 + t]
        kept = ids[offsets[t] : offsets[t + 1]].long() if offsets[t] < offsets[t + 1] else torch.arange(len(row))
        rows.append(row[label] - row[kept].logsumexp(0))
    return torch.stack(rows)


@pytest.mark.parametrize("settings", [TRUNCATED, {"min_p": 0.05}, {"top_p": 0.9}], ids=str)
def test_log_probabilities_are_over_the_support(tmp_path, settings):
    """Those before the update, in the update and of the reference equal a masked softmax in float64."""
    trainer = make(tmp_path, num_iterations=2, beta=0.1, max_steps=1, **settings)
    (update, *_) = trainer.rollouts._collect(0)
    policy, temperature = trainer.actor_critic.policy, trainer.args.temperature
    (batch,) = update.micro_batches
    with use_attention(policy, PACKED_ATTENTION), torch.no_grad():
        current, entropy = policy_logprobs(policy, batch, temperature=temperature, max_length=update.max_length)
    by_row = {tuple(s.prompt_ids + s.response_ids): s for s in trainer.rollouts.samples}
    rows = torch.split(batch["input_ids"][0], batch["cu_seqlens"].diff().tolist())
    responses = torch.split(batch["response_ids"], batch["response_cu_seqlens"].diff().tolist())
    want = torch.cat(
        [
            exact_logprobs(policy, by_row[(*row.tolist(), int(response[-1]))], temperature)
            for row, response in zip(rows, responses, strict=True)
        ]
    )
    for name, got in (("current", current), ("old", batch["old_logprobs"]), ("reference", batch["ref_logprobs"])):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5, msg=name)
    sizes = batch["support_offsets"].diff()
    assert ((sizes > 0) & (sizes < SIZES["vocab_size"])).any()
    assert (entropy[sizes > 0] <= sizes[sizes > 0].log() + 1e-6).all()
    assert not current[sizes == 1].any()


def test_the_whole_vocabulary_without_replay(tmp_path):
    """Then micro-batches have no support, and the log-probabilities are smaller."""
    updates = {}
    for replay in (True, False):
        trainer = make(tmp_path, replay_sampling_support=replay, num_iterations=2, **TRUNCATED)
        (updates[replay], *_) = trainer.rollouts._collect(0)
    (with_replay,), (without,) = updates[True].micro_batches, updates[False].micro_batches
    assert not without.keys() & {"support_ids", "support_offsets"}
    assert torch.equal(with_replay["response_ids"], without["response_ids"])  # the samples are the same
    assert (without["old_logprobs"] <= with_replay["old_logprobs"] + 1e-5).all()
    assert without["old_logprobs"].mean() < with_replay["old_logprobs"].mean() - 0.1


@pytest.mark.slow
def test_training_with_a_support(tmp_path):
    """The ratio is 1 until the policy moves, no token leaves its support, and the policy learns."""
    trainer = make(tmp_path, max_steps=12, num_iterations=2, beta=0.01, learning_rate=1e-2, top_p=0.9)
    trainer.train()
    assert logged(trainer, "ratio_max")[::2] == [1.0] * 6
    assert logged(trainer, "ratio_max")[1] > 1.0
    assert logged(trainer, "kl")[0] == 0
    assert logged(trainer, "support_outside") == [0.0] * 12
    assert all(1 <= size < SIZES["vocab_size"] for size in logged(trainer, "support_size"))


@pytest.mark.slow
@pytest.mark.parametrize(("replay", "low", "high"), [(True, 0.0, 1e-4), (False, 0.02, 10.0)])
def test_engines_probabilities_agree_with_replay(tmp_path, replay, low, high):
    """Those of continuous batching are over the support; against the whole vocabulary they seem too likely."""
    trainer = make(
        tmp_path,
        rollout_engine="continuous",
        replay_sampling_support=replay,
        max_steps=1,
        max_completion_length=6,
        **TRUNCATED,
    )
    trainer.train()
    (rollout_kl,) = logged(trainer, "rollout_kl")
    assert low <= abs(rollout_kl) <= high
    (weight,) = logged(trainer, "rollout_weight_mean")
    assert (abs(weight - 1) < 1e-4) == replay


def test_without_replay_there_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        make(tmp_path, replay_sampling_support=False, **TRUNCATED)
    assert "those of another distribution than the one that was sampled" in caplog.text
