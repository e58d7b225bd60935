"""Row passes over logits: log-probability of a label and entropy forward, the gradient of the logits backward.

selective_logprobs runs them on given logits, linear_logprobs on its chunks of logits. The mathematics is in
selective_logprobs.py.
"""

from __future__ import annotations

from ..._backend import HAS_TRITON
from .results import CachedRows, RowPass, RowResults
from .torch import TORCH_ROW_PASS

__all__ = ["ROW_PASSES", "CachedRows", "RowPass", "RowResults"]

ROW_PASSES: dict[str, RowPass] = {"torch": TORCH_ROW_PASS}

if HAS_TRITON:
    from .triton import TRITON_ROW_PASS

    ROW_PASSES["triton"] = TRITON_ROW_PASS
