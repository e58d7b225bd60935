"""What a causal language model computes between its last hidden states and its logits."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere, Muse, Falcon-H1
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite and MiniCPM3, Inkling
_MULTIPLIED_BY_LOGITS_SCALING = ("hyperclovax",)


class LMHead(NamedTuple):
    """Logits ``cap(scale * (hidden @ weight.T + bias))``, with ``cap(x) = softcap * tanh(x / softcap)`` if given."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def as_logprob_settings(self, temperature: float) -> dict[str, Any]:
        """Return ``temperature`` and ``softcap`` of ``linear_logprobs``, which has no scale, for the same distribution.

        ``c tanh(a x / c) / t`` is ``(c / a) tanh(x / (c / a)) / (t / a)``.
        """
        softcap = None if self.softcap is None else self.softcap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap}


def lm_head(model: PreTrainedModel) -> LMHead:
    """Read the LM head of a model and what follows it.

    Raises:
        ValueError: the head has other parameters than a weight and a bias, or logits have a scale that is not positive.
    """
    layer = cast(nn.Linear, model.get_output_embeddings())
    if other := sorted({name for name, _ in layer.named_parameters()} - {"weight", "bias"}):
        raise ValueError(
            f"model={type(model).__name__}: its LM head has the parameters {', '.join(other)} besides weight and bias, "
            "which the fused log-probabilities do not apply; this architecture cannot be trained here yet"
        )
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(layer.weight, getattr(layer, "bias", None), logit_scale(model), softcap)


def logit_scale(model: PreTrainedModel) -> float:
    """Return the constant that the configuration of a model multiplies its logits with, 1 without one.

    Raises:
        ValueError: it is not a positive number.
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in (*_MULTIPLIERS, *_DIVISORS):
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(
                f"model.config.{name} must be a positive number, got {value!r}; {type(model).__name__} cannot be "
                "trained here"
            )
        divides = name in _DIVISORS and config.model_type not in _MULTIPLIED_BY_LOGITS_SCALING
        scale = scale / value if divides else scale * value
    return scale
