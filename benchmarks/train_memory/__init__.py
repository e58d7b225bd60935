"""Peak memory of a whole training step on one device, by kind, for the published configurations.

The trainer's own code runs on fake tensors, which have sizes and no data: ActorCritic with activation checkpointing,
bfloat16 autocast over float32 weights, compute_loss, AdamW of create_optimizer. For several devices accelerate's own
preparation shards the module by FSDP2, over a process group that sends nothing. Tracked are the last micro-batch of an
update, together with the gradients of those before it, and the optimizer's step; policy and critic learn in the same
step. A micro-batch is one sequence with the longest prompt and the longest response, as published. Kinds:

    parameters   float32 weights, or this device's shard of them
    gradients    float32, this device's shard; under FSDP2 also those of a layer before they are sharded
    optimizer    both moments of AdamW, and temporaries of its step (foreach, PyTorch's choice on CUDA)
    copies       bfloat16 weights to compute with, gathered by FSDP2 layer by layer, or cast by autocast
    activations  inputs of the checkpointed layers, and all temporaries of the current layer
    logits       memory of the log-probabilities, forward and backward, with the gradient of the output embedding

"Without" this library's operations, log-probabilities are computed as in plain trainers, and all else is the same:
bfloat16 logits of the response tokens, float32 from there on, divided by the temperature, log_softmax; the entropies
have no gradient.

"Before" the update the trainer computes values of the whole rollout, and old log-probabilities, without gradients and
with all weights gathered in bfloat16 on each device. That phase has its own peak.

Not counted: sampling (a cache of keys and values, another engine's weights), CUDA's context (about half a GiB),
workspaces of the vendor's kernels, losses of the allocator, buffers of the communication library, and what overlapping
streams keep longer than one stream would. Gradients are reduced after each micro-batch (sync_each_batch of accelerate);
without that setting each device holds unsharded gradients until the last one, two bytes per weight.

The exit code is 1 when the published step with the small critic does not peak at least 11 points of the device's memory
below that of PPO, or anything peaks higher with the operations of this library than without.
"""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2Config

from benchmarks.harness import results
from benchmarks.harness.library_seams import Selection, num_cached, on_cuda_without_kernels, selection_by_tokens
from benchmarks.harness.suite import Suite
from benchmarks.train_memory.cases import CASES, MODELS, QUICK, QUICK_SETTINGS, Case, samples_of, settings
from benchmarks.train_memory.step import KINDS, OWNERS, Step, StepAllocations, build
from benchmarks.train_memory.surroundings import (
    before_an_update,
    eager_logprobs,
    measurable,
    on_cuda,
    processes,
    shard,
    tracked_kinds,
)
from benchmarks.train_memory.table import COLUMNS, draw, failures_of
from sppo.algorithms import algorithm_class
from sppo.config import SPPOConfig
from sppo.rollout.batching import make_micro_batches
from sppo_kernels import linear_logprobs


def run(args: argparse.Namespace) -> int:
    """Entry of the suite."""
    if not measurable():
        raise SystemExit("train_memory needs torch 2.11 or newer, whose attention of variable length it measures")
    rows = []
    shorter = QUICK_SETTINGS if args.quick else {}
    for case in QUICK if args.quick else CASES:
        print(f"{case.name}, policy {case.policy} on {case.devices}", file=sys.stderr)
        rows += measure(case, settings(case, **shorter), MODELS)
    failures = failures_of(rows)
    path = args.out / "train_memory.json"
    device = "none (fake tensors)"
    results.write(path, "train_memory", device=device, quick=args.quick, failures=failures, rows=rows)
    draw(path.with_suffix(".svg"), rows)
    return results.conclude(f"{results.table(rows, COLUMNS)}\n\nGiB", failures, path)


def measure(case: Case, args: SPPOConfig, models: dict[str, Qwen2Config]) -> list[results.Row]:
    """Measure the peaks of an update and of the phase before it, with the operations of this library and without."""
    kind = algorithm_class(case.algorithm).critic
    samples = samples_of(args, kind)
    (batch,) = make_micro_batches(samples[:1], 1, kind)
    tokens = args.max_completion_length
    kept = num_cached(tokens, models[case.policy].vocab_size, args.logits_budget_bytes)
    rows = []
    with (
        processes(case.devices) as mesh,
        FakeTensorMode() as fake,
        StepAllocations() as allocations,
        allocations.resizes(),
        on_cuda(),
    ):
        model = build(case, models, args.cliprange_value)
        if mesh is not None:
            shard(model, mesh)
        gc.collect()  # frees unsharded weights
        step = Step(allocations, model, args, samples, {name: fake.from_tensor(x) for name, x in batch.items()})
        step.start()
        for operations, logprobs in ((True, linear_logprobs), (False, eager_logprobs)):
            with tracked_kinds(allocations, model, logprobs):
                first = allocations.moment()
                with on_cuda_without_kernels(selection_by_tokens(tokens, cached=kept)):
                    step.update()
                peak = allocations.peak_by_kind(first)
                first = allocations.moment()
                with on_cuda_without_kernels(Selection(tokens)), before_an_update(model):
                    if model.critic is not None:
                        step.values()
                    step.old_logprobs()
                before = allocations.peak_by_kind(first)
            rows.append(row(case, args, operations, peak, before))
    return rows


def row(case: Case, args: SPPOConfig, operations: bool, peak: dict[Any, int], before: dict[Any, int]) -> results.Row:
    """Return the row of a step, in bytes."""
    return {
        "model": case.policy,
        "devices": case.devices,
        "case": case.name,
        "operations": operations,
        "prompt_tokens": args.max_prompt_length,
        "response_tokens": args.max_completion_length,
        "peak_bytes": sum(peak.values()),
        "before_bytes": sum(before.values()),
        **{owner: {kind: peak.get((owner, kind), 0) for kind in KINDS} for owner in OWNERS},
        "before": {owner: {kind: before.get((owner, kind), 0) for kind in KINDS} for owner in OWNERS},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small model")
    results.add_out(parser)


SUITE = Suite(
    add_arguments,
    run,
    tables={"train_memory": results.table_of("train_memory", COLUMNS)},
    draw=lambda path, report: draw(path, report["rows"]),
    needs="the trainer",
)
