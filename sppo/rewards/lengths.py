"""The built-in rewards of length: ``overlong`` and ``length``. They read the number of tokens of each completion."""

from __future__ import annotations

from collections.abc import Sequence


def overlong(completion_lengths: Sequence[int], *, max_tokens: int, buffer: int, offset: float = 0.0) -> list[float]:
    """Penalize completions that are nearly too long: the soft overlong punishment of DAPO.

    Equation 13 of arXiv 2503.14476, for a completion of n tokens::

        0                                  n <= max_tokens - buffer
        (max_tokens - buffer - n) / buffer    otherwise, but
        -1                                 n > max_tokens

    Args:
        completion_lengths: numbers of tokens.
        max_tokens: from this length on the penalty is -1; usually ``max_completion_length``.
        buffer: number of tokens before it over which the penalty grows.
        offset: added to each value. With 1 the values are in [0, 1], as a prompt critic requires.

    Raises:
        ValueError: ``buffer`` is not in [1, max_tokens].
    """
    if not 1 <= buffer <= max_tokens:
        raise ValueError(f"buffer must be in [1, max_tokens={max_tokens}], got {buffer}")
    return [offset - min(1.0, max(0.0, (n - max_tokens + buffer) / buffer)) for n in completion_lengths]


def length(completion_lengths: Sequence[int], *, target: int, alpha: float = 3e-4, delta: float = 0.5) -> list[float]:
    """Reward completions that are shorter than a target: the length factor of LCPO-Max (L1).

    Equation 3 of arXiv 2503.04697, for a completion of n tokens, in [0, 1]: ``clip(alpha (target - n) + delta, 0, 1)``.
    The paper multiplies it with the correctness; a list of rewards is summed.

    Args:
        completion_lengths: numbers of tokens.
        target: desired number of tokens.
        alpha: change of the reward per token.
        delta: the reward of a completion of ``target`` tokens.

    Raises:
        ValueError: ``target`` is below 1, or ``alpha`` is not positive.
    """
    if target < 1 or alpha <= 0:
        raise ValueError(f"target must be at least 1 and alpha greater than 0, got {target} and {alpha}")
    return [min(1.0, max(0.0, alpha * (target - n) + delta)) for n in completion_lengths]
