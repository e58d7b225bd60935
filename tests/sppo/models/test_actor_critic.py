"""A packed update gives the loss and the gradients of the padded one, in every supported family."""

import pytest
import torch
from tiny_models import FAMILIES, char_tokenizer, tiny_model

from sppo.models.actor_critic import ActorCritic
from sppo.models.critic_io import build_critic
from sppo.models.critics import PromptCritic, TokenCritic, clipped_value_loss
from sppo.models.packed_attention import PACKED_ATTENTION, use_attention
from sppo.rollout import Sample
from sppo.rollout.batching import make_micro_batches
from sppo_kernels import reference

PROMPTS = [[3, 7, 2], [5, 9, 9, 4, 8, 2], [3, 7, 2], [6]]
RESPONSES = [[4, 8, 8, 1], [7, 1], [2], [9, 9, 5, 3, 2, 6, 10, 1]]
ADVANTAGES = torch.tensor([0.5, -1.0, 0.25, 2.0])
OUTCOMES = torch.tensor([1.0, 0.0, 0.5, 1.0])


def samples():
    torch.manual_seed(0)
    return [
        Sample(
            "",
            "",
            prompt,
            response,
            truncated=False,
            reward=outcome.item(),
            advantage=advantage,
            value=torch.rand(len(response)),
            returns=torch.rand(len(response)),
        )
        for prompt, response, advantage, outcome in zip(PROMPTS, RESPONSES, ADVANTAGES, OUTCOMES, strict=True)
    ]


def padded(rows):
    fill = lambda row: row + [0] * (max(map(len, rows)) - len(row))
    return torch.tensor([fill(row) for row in rows]), torch.tensor([fill([1] * len(row)) for row in rows])


def padded_loss(policy, critic, kind):
    """Compute the loss as a trainer that pads does: all logits, masks, and the definition of the loss."""
    rows = samples()
    ids, mask = padded([s.prompt_ids + s.response_ids for s in rows])
    loss_mask = torch.zeros_like(mask)
    for i, s in enumerate(rows):
        loss_mask[i, len(s.prompt_ids) : len(s.prompt_ids) + len(s.response_ids)] = 1
    logits = policy(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    logprobs = (logits / 0.7).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    keep = loss_mask[:, 1:]
    loss = reference.policy_loss(
        logprobs, logprobs.detach(), ADVANTAGES.to(logits.dtype), mask=keep, aggregation="seq-mean-token-mean"
    ).loss
    if kind == "prompt":
        ids, mask = padded([s.prompt_ids for s in rows])
        critic.config.pad_token_id = 0
        values = critic(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        target = OUTCOMES.to(values.dtype)
        return loss + torch.nn.functional.binary_cross_entropy_with_logits(values, target)
    hidden = critic.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    values = critic.score(hidden)[..., 0][keep.bool()]
    old, returns = torch.cat([s.value for s in rows]), torch.cat([s.returns for s in rows])
    return loss + clipped_value_loss(values, old, returns, 0.2).mean()


def packed_loss(policy, critic, kind, parts):
    rows = samples()
    pair = ActorCritic(policy, PromptCritic(critic) if kind == "prompt" else TokenCritic(critic, 0.2))
    count = len(rows) if kind == "prompt" else sum(len(s.response_ids) for s in rows)
    total = 0
    with use_attention(pair, PACKED_ATTENTION):
        for batch in make_micro_batches(rows, parts, kind):
            out = pair(batch, temperature=0.7, max_length=16, critic_normalizer=count)
            policy_loss = reference.policy_loss(
                out.logprobs,
                out.logprobs.detach(),
                batch["advantages"],
                cu_seqlens=batch["response_cu_seqlens"],
                aggregation="seq-mean-token-mean",
                normalizer=len(rows),
            ).loss
            total = total + policy_loss + out.critic_loss
        total.backward()  # while the attention is in force
    return total.detach()


@pytest.mark.parametrize("kind", ["prompt", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_the_padded_ones(family, kind):
    policy = tiny_model(family)
    critic = build_critic(None, policy, char_tokenizer())
    torch.nn.init.normal_(critic.score.weight, std=0.3)
    expected = padded_loss(policy, critic, kind)
    expected.backward()
    parameters = dict(policy.named_parameters()) | {f"critic.{n}": p for n, p in critic.named_parameters()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert len(gradients) > 20
    for parts in (1, 3):
        policy.zero_grad()
        critic.zero_grad()
        torch.testing.assert_close(packed_loss(policy, critic, kind, parts), expected.detach(), rtol=1e-5, atol=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                parameters[name].grad, gradient, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
