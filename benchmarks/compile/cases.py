"""Calls of every operation over the dtypes, sizes and settings that change what is compiled.

The first case that launches a kernel is what ``--quick`` compiles: the usual dtype with every feature enabled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

import sppo_kernels
from benchmarks.compile import projection_cases
from benchmarks.compile.launches import Case
from benchmarks.harness import library_seams
from sppo_kernels.tuning import TUNABLES, Config, Tunable

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = (151_936, 50_257, 97)  # a multiple of 16 (Qwen), odd (GPT-2), smaller than a block
HIDDEN_SIZES = (1536, 97)
SUPPORT_HIDDEN_SIZES = (4096, 576, 97)  # of a multiple of a block, not one, and odd


def all_cases() -> Iterator[Case]:
    """Yield calls of every operation over the dtypes, sizes and settings that change what is compiled."""
    yield from _selective_logprobs_cases()
    yield from _linear_logprobs_cases()
    yield from _support_cases()
    yield from _policy_loss_cases()
    yield from _prompt_value_cases()
    yield from _advantage_cases()
    yield from projection_cases.cases()
    yield from _candidate_cases()
    yield from projection_cases.candidate_cases()


def _selective_logprobs_cases() -> Iterator[Case]:
    def call(dtype: torch.dtype, vocab: int, softcap: float | None, shape: tuple[int, ...], temperature: Any) -> None:
        logits = torch.zeros(*shape, vocab, dtype=dtype, requires_grad=True)
        labels = torch.zeros(shape, dtype=torch.int64)
        _backward(
            *sppo_kernels.selective_logprobs(logits, labels, temperature=temperature, softcap=softcap, backend="triton")
        )

    for (name, dtype), vocab, softcap in product(DTYPES.items(), VOCABULARIES, (30.0, None)):
        label = f"{name} V={vocab}{' softcap' if softcap else ''}"
        yield Case("selective_logprobs", label, functools.partial(call, dtype, vocab, softcap, (16,), 1.0))
    for label, shape, temperature in (
        ("one row", (1,), 1.0),
        ("[B, T, V]", (2, 8), 1.0),
        ("temperature per row", (16,), torch.ones(16)),
    ):
        one = functools.partial(call, torch.bfloat16, VOCABULARIES[0], None, shape, temperature)
        yield Case("selective_logprobs", f"bf16 V={VOCABULARIES[0]} {label}", one)


def _linear_logprobs_cases() -> Iterator[Case]:
    def call(
        dtype: torch.dtype, vocab: int, softcap: float | None, backward: str, tokens: int = 16, group: Any = None
    ) -> None:
        hidden, weight = (torch.zeros(n, 64, dtype=dtype, requires_grad=True) for n in (tokens, vocab))
        labels = torch.zeros(tokens, dtype=torch.int64)
        settings = {"softcap": softcap, "backward": backward, "backend": "triton", "group": group}
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, **settings)
        out.logprobs.sum().backward(retain_graph=True)
        out.entropy.sum().backward()

    for (name, dtype), vocab, softcap, backward in product(
        DTYPES.items(), VOCABULARIES, (30.0, None), ("recompute", "cache", "sparse")
    ):
        label = f"{name} V={vocab}{' softcap' if softcap else ''} {backward}"
        yield Case("linear_logprobs", label, functools.partial(call, dtype, vocab, softcap, backward))

    def with_group(dtype: torch.dtype, softcap: float | None) -> None:
        with library_seams.one_rank() as group:
            call(dtype, VOCABULARIES[0], softcap, "cache", group=group)

    for (name, dtype), softcap in product(DTYPES.items(), (30.0, None)):
        label = f"{name} V={VOCABULARIES[0]}{' softcap' if softcap else ''} cache group"
        yield Case("linear_logprobs", label, functools.partial(with_group, dtype, softcap))
    for name, dtype in DTYPES.items():  # a list of labels of more than one piece
        label = f"{name} V={VOCABULARIES[2]} cache 200 tokens"
        yield Case("linear_logprobs", label, functools.partial(call, dtype, VOCABULARIES[2], None, "cache", tokens=200))


def _support_cases() -> Iterator[Case]:
    """Yield calls with supports, whose kernels do not depend on the vocabulary beyond its alignment."""
    vocab, entries = 128, 3

    def call(dtype: torch.dtype, hidden_size: int, softcap: float | None, everything: bool, tokens: int = 16) -> None:
        x = lambda *shape: torch.zeros(*shape, dtype=dtype, requires_grad=True)
        extras = {"bias": x(vocab), "adapter": (x(tokens, 16), x(vocab, 16))} if everything else {}
        out = sppo_kernels.linear_logprobs(
            x(tokens, hidden_size),
            x(vocab, hidden_size),
            torch.zeros(tokens, dtype=torch.int64),
            support=(torch.arange(entries).repeat(tokens), entries * torch.arange(tokens + 1)),
            softcap=softcap,
            backend="triton",
            **extras,
        )
        out.logprobs.sum().backward(retain_graph=True)
        out.entropy.sum().backward()

    for (name, dtype), hidden_size, (softcap, everything) in product(
        DTYPES.items(), SUPPORT_HIDDEN_SIZES, ((30.0, True), (None, False))
    ):
        label = f"{name} H={hidden_size}{' softcap bias adapter' if everything else ''} support"
        yield Case("linear_logprobs", label, functools.partial(call, dtype, hidden_size, softcap, everything))


def _policy_loss_cases() -> Iterator[Case]:
    levels = ("token", "sequence_mean", "sequence_sum")
    corrections = ("token_truncate", "sequence_truncate", "sequence_mask")
    aggregations = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")

    def call(dtype: torch.dtype, tokens: int, everything: bool, **settings: Any) -> None:
        x = lambda: torch.zeros(tokens, dtype=dtype)
        per_sequence = torch.zeros(2)
        cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
        if everything:
            settings = {
                "mask": torch.ones(tokens, dtype=torch.bool), "dual_clip": 3.0, "normalizer": 7.0, "kl_coef": 0.1,
                "ref_logprobs": x(), "rollout_logprobs": x(), **settings,
            }  # fmt: skip
        advantages = x() if everything else per_sequence
        loss, _ = sppo_kernels.policy_loss(
            x().requires_grad_(), x(), advantages, cu_seqlens=cu_seqlens, backend="triton", **settings
        )
        _backward(loss)

    def case(label: str, dtype: str = "fp32", tokens: int = 40_000, everything: bool = False, **settings: Any) -> Case:
        return Case("policy_loss", label, functools.partial(call, DTYPES[dtype], tokens, everything, **settings))

    for level, correction in product(levels, corrections):
        yield case(f"all {level} {correction}", everything=True, ratio_level=level, rollout_correction=correction)
    for level, aggregation in product(levels, aggregations):
        yield case(f"{level} {aggregation}", ratio_level=level, aggregation=aggregation)
    cispo = {"objective": "cispo", "dual_clip": None, "rollout_correction": "token_mask"}
    yield case("all cispo token_mask", everything=True, **cispo)
    for estimator in ("k1", "k2"):
        yield case(f"all {estimator}", everything=True, kl_estimator=estimator)
    for dtype in ("bf16", "fp16"):
        yield case(f"all {dtype}", dtype, everything=True)
    yield case("one token", tokens=1)


def _prompt_value_cases() -> Iterator[Case]:
    def call(function: Callable[..., Any], dtype: torch.dtype, size: int, lead: tuple[int, ...], bias: bool) -> None:
        hidden = torch.zeros(*lead, size, dtype=dtype, requires_grad=True)
        weight = torch.zeros(1, size, dtype=dtype, requires_grad=True)
        head = torch.zeros(1, dtype=dtype, requires_grad=True) if bias else None
        given: tuple[Tensor, ...] = (hidden, weight, torch.zeros(lead[0], dtype=torch.int64))
        if function is sppo_kernels.prompt_value_loss:
            given += (torch.zeros(lead[0]),)
        result = function(*given, bias=head, backend="triton")
        _backward(result if isinstance(result, Tensor) else result.loss)

    functions: tuple[Any, ...] = (sppo_kernels.prompt_value_loss, sppo_kernels.prompt_value_logits)
    for function, (name, dtype), size, lead, bias in product(
        functions, DTYPES.items(), HIDDEN_SIZES, ((16,), (2, 8)), (True, False)
    ):
        label = f"{name} H={size} {'packed' if len(lead) == 1 else 'padded'}{' bias' if bias else ''}"
        yield Case(function.__name__, label, functools.partial(call, function, dtype, size, lead, bias))


def _advantage_cases() -> Iterator[Case]:
    for length in (40_000, 97, 1):
        x = torch.zeros(2, length)
        mask = x == 0
        yield Case("gae", f"T={length}", functools.partial(sppo_kernels.gae, x, x, mask, backend="triton"))
        yield Case("whiten", f"T={length}", functools.partial(sppo_kernels.whiten, x, mask, backend="triton"))
    for estimator, size in product(("grpo", "dr_grpo", "rloo"), (512, 1)):
        given = torch.zeros(size), torch.zeros(size, dtype=torch.int64)
        call = functools.partial(sppo_kernels.group_advantages, *given, estimator=estimator, backend="triton")
        yield Case("group_advantages", f"{estimator} B={size}", call)


def _candidate_cases() -> Iterator[Case]:
    """Yield each operation's most complete case again with every configuration that its kernels may be tuned to.

    The tiles of the fused projection, which not every target has, are those of projection_cases.py.
    """
    rows = lambda case: case.operation == "selective_logprobs" and case.label.endswith("V=151936 softcap")
    fullest = {
        "selective_logprobs.forward": rows,
        "selective_logprobs.backward": rows,
        "policy_loss": lambda case: case.operation == "policy_loss" and case.label.startswith("all "),
    }
    cases = [*_selective_logprobs_cases(), *_linear_logprobs_cases(), *_policy_loss_cases()]

    def call(tunable: Tunable, config: Config, case: Case) -> None:
        with tunable.using(config):
            case.call()

    for name, is_fullest in fullest.items():
        tunable = TUNABLES[name]
        for config, case in product(tunable.candidates[1:], filter(is_fullest, cases)):
            label = f"{case.label} tuned {'/'.join(map(str, config))}"
            yield Case(case.operation, label, functools.partial(call, tunable, config, case))


def _backward(*outputs: Tensor) -> None:
    torch.stack([x.float().sum() for x in outputs]).sum().backward()
