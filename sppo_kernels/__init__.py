"""Fused operations for sequence-level policy optimisation of language models. It imports torch and triton alone."""

__version__ = "0.1.0"

from sppo_kernels import reference

__all__ = [
    "reference",
]
