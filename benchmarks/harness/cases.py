"""Which operations are measured at which sizes: the plans of the suite kernels."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

from benchmarks.harness.operations import OPERATIONS
from benchmarks.harness.problem import ProblemSize
from benchmarks.harness.results import Row

# Hidden size and vocabulary of Qwen's language models.
LM_SHAPES = {"0.5B": (896, 151_936), "1.5B": (1536, 151_936), "7B": (3584, 152_064), "8B": (4096, 151_936)}
BASE = ProblemSize(8192, *LM_SHAPES["8B"])
MILLION = 1 << 20
SHARP = BASE._replace(logits="sharp")
OURS = "sppo_kernels"
GEMM_ONLY = "matmuls only"
"""A lower bound rather than an implementation: the matrix products that every implementation needs."""


class BenchmarkCase(NamedTuple):
    """An operation at a size."""

    operation: str
    size: ProblemSize

    @property
    def title(self) -> str:
        """A short description, which omits default settings."""
        size = self.size
        shape = f"{size.tokens} tokens" + (f", H {size.hidden}, V {size.vocab}" if size.vocab else "")
        changed = [f"{name} {getattr(size, name)}" for name in ("ignored", "clipped") if getattr(size, name)]
        kind = [size.logits] if size.logits != "peaked" else []
        return ", ".join([f"{self.operation}: {shape}", *changed, *kind])

    def row_key(self) -> Row:
        """Return the columns that identify the case in a row of results."""
        return {"operation": self.operation, **self.size._asdict()}

    @classmethod
    def of_row(cls, row: Row) -> BenchmarkCase:
        """Return the case that a row of results is about."""
        return cls(row["operation"], ProblemSize(*(row[name] for name in ProblemSize._fields)))


def provider_name(mode: str) -> str:
    """Return how rows of results call a mode of this library."""
    return f"{OURS}, {mode}" if mode else OURS


def is_ours(provider: str) -> bool:
    """Tell whether a provider is a mode of this library."""
    return provider.startswith(OURS)


POLICY_LOSSES = ("policy_loss, token", "policy_loss, sequence_mean")
OTHER_OPERATIONS = ("prompt_value_loss", "gae", "whiten", "group_advantages")


def _linear(*sizes: ProblemSize) -> list[BenchmarkCase]:
    return [BenchmarkCase("linear_logprobs", size) for size in sizes]


def _without_vocabulary(names: Iterable[str], *tokens: int) -> list[BenchmarkCase]:
    return [BenchmarkCase(name, ProblemSize(n, LM_SHAPES["1.5B"][0], 0)) for n, name in product(tokens, names)]


def _sweep(base: ProblemSize) -> list[ProblemSize]:
    """Change one property at a time: kind of logits, share of ignored tokens, share of clipped tokens."""
    changes: list[dict[str, Any]] = [
        {"logits": "uniform"}, {"ignored": 0.5}, {"ignored": 0.9}, {"clipped": 0.3}, {"clipped": 0.9},
    ]  # fmt: skip
    return [base._replace(**change) for change in changes]


_HEADS = (
    "linear_logprobs, mean NLL",
    "linear_logprobs + policy_loss",
    "linear_logprobs, support",
    "linear_logprobs, projection",
)
_TINY = ProblemSize(512, 64, 1024)
_DRY = ProblemSize(8, 16, 97, ignored=0.25, clipped=0.25)
_CPU = ProblemSize(512, 576, 49_152)  # the output embedding of SmolLM2-135M

PLANS: dict[str, list[BenchmarkCase]] = {
    # The cases of the claims, and small models, where row passes weigh most.
    "headline": [
        *_linear(BASE, SHARP, ProblemSize(16_384, *LM_SHAPES["1.5B"]), ProblemSize(4096, *LM_SHAPES["0.5B"])),
        BenchmarkCase("selective_logprobs", BASE),
        *_without_vocabulary(POLICY_LOSSES, MILLION),
        BenchmarkCase("linear_logprobs, mean NLL", BASE),
    ],
    # The vendor's product next to the fused projection, from the smallest head to the largest.
    "projection": [
        BenchmarkCase("linear_logprobs, projection", ProblemSize(8192, *shape)) for shape in LM_SHAPES.values()
    ],
    "compiled": [*_linear(BASE, SHARP), BenchmarkCase("selective_logprobs", BASE)],
    "shapes": _linear(
        BASE._replace(tokens=4096),
        *(ProblemSize(8192, *LM_SHAPES[name]) for name in ("0.5B", "1.5B", "7B")),
        BASE._replace(tokens=32_768),
    ),
    "others": [
        *(BenchmarkCase("linear_logprobs + policy_loss", size) for size in (BASE, SHARP)),
        BenchmarkCase("linear_logprobs, support", BASE),
        *_without_vocabulary(OTHER_OPERATIONS, MILLION),
    ],
    "sweep": [
        *_linear(*(BASE._replace(tokens=n) for n in (1024, 2048, 16_384, 65_536)), *_sweep(BASE)),
        *(BenchmarkCase("selective_logprobs", size) for size in (BASE._replace(tokens=1024), *_sweep(BASE))),
        *_without_vocabulary((*POLICY_LOSSES, *OTHER_OPERATIONS), 8192, 65_536),
    ],
    "quick": [
        *_linear(_TINY, _TINY._replace(ignored=0.5, clipped=0.5), _TINY._replace(logits="sharp")),
        *(BenchmarkCase(name, _TINY) for name in _HEADS),
        BenchmarkCase("selective_logprobs", _TINY),
        *_without_vocabulary((*POLICY_LOSSES, *OTHER_OPERATIONS), 4096),
    ],
    "dry": [
        *(BenchmarkCase(name, _DRY) for name in OPERATIONS if "logprobs" in name),
        *_without_vocabulary((*POLICY_LOSSES, *OTHER_OPERATIONS), 64),
    ],
    "cpu": [
        *_linear(
            _CPU, *(_CPU._replace(**change) for change in ({"ignored": 0.9}, {"clipped": 0.9}, {"logits": "sharp"}))
        ),
        *(BenchmarkCase(name, _CPU) for name in ("linear_logprobs, mean NLL", "linear_logprobs + policy_loss")),
        BenchmarkCase("selective_logprobs", _CPU),
        *_without_vocabulary((*POLICY_LOSSES, *OTHER_OPERATIONS), 65_536),
    ],
}
# Of the size of the plan cpu, and eight times as many tokens, where tokens outnumber the dense gradient of the weight.
PLANS["support"] = [BenchmarkCase("linear_logprobs, support", _CPU._replace(tokens=n)) for n in (512, 4096)]
PLANS["full"] = [case for plan in ("headline", "projection", "shapes", "others", "sweep") for case in PLANS[plan]]
