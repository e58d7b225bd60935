"""The probe: a critic of one linear layer that reads the policy's own hidden states at the end of the prompt.

    V(prompt) = sigmoid(w h + b)        h: the policy's last hidden state at the prompt's last token, a constant

It costs no forward of its own in an update, which computes ``h`` anyway. Source of the idea: POISE (arXiv 2605.07579).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from sppo.models.critics import PromptCritic, packed_states, set_head, value_head
from sppo.rollout.engine import Sample
from sppo_kernels import prompt_value_logits, prompt_value_loss


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
    """Predicts P(success) from the policy's hidden states, which it does not change.

    Args:
        policy: the policy.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        model = ProbeForSequenceClassification(ProbeConfig(policy.config.get_text_config().hidden_size, num_labels=1))
        set_head(model, torch.zeros(1))
        nn.init.zeros_(value_head(model).weight)
        nn.Module.to(model, policy.device)
        super().__init__(model)
        self._policy = (policy,)  # not a submodule of the critic

    @torch.no_grad()
    def values(self, samples: Sequence[Sample]) -> list[Tensor]:
        """See :class:`sppo.models.critics.Critic`; 0-d each."""
        distinct = list(dict.fromkeys(tuple(s.prompt_ids) for s in samples))
        ends = [hidden[-1].float() for hidden in packed_states(self._policy[0], distinct)]
        if not ends:
            return []
        values = dict(zip(distinct, self._logits(torch.stack(ends)).sigmoid().cpu().unbind(), strict=True))
        return [values[tuple(s.prompt_ids)] for s in samples]

    def loss_of_states(self, states: Tensor, batch: dict[str, Tensor], normalizer: float) -> Tensor:
        """Return a micro-batch's share of the update's critic loss, 0-d.

        Args:
            states: the policy's hidden states ``[N, H]`` of the micro-batch.
            batch: the micro-batch, with ``prompt_end_index`` and ``outcomes`` ``[S]``.
            normalizer: number of responses of the update.
        """
        ends = states.detach()[batch["prompt_end_index"]].float()
        head, index = value_head(self.model), torch.arange(len(ends), device=ends.device)
        return prompt_value_loss(
            ends, head.weight, index, batch["outcomes"], bias=head.bias, normalizer=normalizer
        ).loss

    def _logits(self, ends: Tensor) -> Tensor:
        head, index = value_head(self.model), torch.arange(len(ends), device=ends.device)
        return prompt_value_logits(ends, head.weight, index, bias=head.bias)
