"""The probe: a critic of one linear layer that reads the policy's own hidden states at the end of the prompt.

    V(prompt) = sigmoid(w h + b)        h: the policy's last hidden state at the prompt's last token, a constant

It costs no second model. After each rollout it is fitted anew to the latest outcomes, by logistic regression with a
ridge penalty, and has no learning rate. Source of the idea of reading the policy's states: POISE (arXiv 2605.07579).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from sppo.models.critics import PromptCritic, packed_states, set_head, value_head
from sppo.models.fsdp import load_weights
from sppo.rollout.engine import Sample
from sppo_kernels import prompt_value_logits

REMEMBERED = 2048
"""Number of the latest outcomes that a probe is fitted to."""
RIDGE = 0.3
"""Penalty of the fit: half of this times the squared norm of the weights of standardized states."""


class ProbeConfig(PreTrainedConfig):
    """Configuration of a probe: ``hidden_size`` of the policy."""

    model_type = "sppo_probe"

    def __init__(self, hidden_size: int = 1, **kwargs: Any) -> None:
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class ProbeForSequenceClassification(PreTrainedModel):
    """The layer, in a model of its own, so that it is saved and loaded like any critic."""

    config_class = ProbeConfig

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()


AutoConfig.register(ProbeConfig.model_type, ProbeConfig, exist_ok=True)
AutoModelForSequenceClassification.register(ProbeConfig, ProbeForSequenceClassification, exist_ok=True)


class ProbeCritic(PromptCritic):
    """Predicts P(success) from the policy's hidden states; the optimizer trains neither because of it.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        hidden_size = policy.config.get_text_config().hidden_size
        model = ProbeForSequenceClassification(ProbeConfig(hidden_size, num_labels=1))
        set_head(model, torch.zeros(1))
        nn.init.zeros_(value_head(model).weight)
        model.requires_grad_(False)
        nn.Module.to(model, policy.device)
        super().__init__(model)
        self._policy = (policy,)  # not a submodule of the critic
        self._read: dict[tuple[int, ...], Tensor] = {}
        self._states, self._outcomes = torch.zeros(0, hidden_size), torch.zeros(0)

    @torch.no_grad()
    def prompt_values(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """See :class:`sppo.models.critics.PromptCritic`."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        if not distinct:
            return []
        ends = torch.stack([hidden[-1].float() for hidden in packed_states(self._policy[0], distinct)])
        self._read = dict(zip(distinct, ends.cpu().unbind(), strict=True))
        head, index = value_head(self.model), torch.arange(len(ends), device=ends.device)
        logits = prompt_value_logits(ends, head.weight, index, bias=head.bias)
        values = dict(zip(distinct, logits.sigmoid().tolist(), strict=True))
        return [values[tuple(prompt)] for prompt in prompts]

    def observe(self, samples: Sequence[Sample], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Fit the layer to the outcomes of a rollout, whose values were just predicted, and of earlier ones."""
        pairs = [(self._read[tuple(s.prompt_ids)], s.reward) for s in samples]
        self._read = {}
        # One tensor per process: each of several views would be sent with the whole storage that they share.
        states, rewards = zip(*pairs, strict=True) if pairs else ((), ())
        seen = gather([(torch.stack(states), torch.tensor(rewards))] if pairs else [])
        if seen:
            all_states, all_rewards = zip(*seen, strict=True)
            self._remember(torch.cat([self._states, *all_states]), torch.cat([self._outcomes, *all_rewards]))

    def memory(self) -> dict[str, Tensor]:
        """See :class:`sppo.models.critics.Critic`."""
        return {"states": self._states, "outcomes": self._outcomes}

    def restore(self, memory: dict[str, Tensor]) -> None:
        """See :class:`sppo.models.critics.Critic`."""
        if memory:
            self._remember(memory["states"], memory["outcomes"])
        else:
            self._states, self._outcomes = self._states[:0], self._outcomes[:0]

    def _remember(self, states: Tensor, outcomes: Tensor) -> None:
        self._states, self._outcomes = states[-REMEMBERED:], outcomes[-REMEMBERED:]
        if not len(outcomes):
            return
        weight, bias = fit_logistic(self._states, self._outcomes, RIDGE)
        load_weights(self.model, {"score.weight": weight[None].float(), "score.bias": bias[None].float()})


def fit_logistic(states: Tensor, outcomes: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Fit ``P(outcome) = sigmoid(w h + b)`` by penalized maximum likelihood, in float64 on the CPU.

    Each coordinate of the states is standardized and divided by the square root of their number; the penalty is
    ``ridge / 2 |w|^2`` of the weights of these. The bias has none, but one success and one failure are added.

    Args:
        states: ``[N, H]``, N at least 1.
        outcomes: ``[N]`` in [0, 1].
        ridge: see above, greater than 0.

    Returns:
        ``w`` ``[H]`` and ``b`` 0-d for the states as they are, float64.
    """
    x, y = states.double().cpu(), outcomes.double().cpu()
    mean, scale = x.mean(0), (x.std(0, correction=0) + 1e-6) * x.shape[1] ** 0.5
    x = (x - mean) / scale
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")
    softplus = nn.functional.softplus

    def loss() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:-1], parameters[-1]
        logits = x @ weight + bias
        total = (softplus(logits) - y * logits).sum() + ridge / 2 * weight.square().sum()
        total = total + softplus(bias) + softplus(-bias)
        total.backward()
        return total

    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        optimizer.step(loss)
    weight = parameters.detach()[:-1] / scale
    return weight, parameters.detach()[-1] - weight @ mean
