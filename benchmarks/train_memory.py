"""Peak memory of a whole training step on one device, by kind, for the published configurations, without any GPU.

The trainer's own code runs on fake tensors, which have sizes and no data: ActorCritic with activation checkpointing,
bfloat16 autocast over float32 weights, compute_loss, AdamW of create_optimizer. For several devices accelerate's own
preparation shards the module by FSDP2, over a process group that sends nothing. What is followed is the last
micro-batch of an update, beside the gradients of those before it, and the optimizer's step; policy and critic learn in
the same one. A micro-batch is one sequence with the longest prompt and the longest response, as published. Kinds:

    parameters   float32 weights, all of them or this device's share
    gradients    float32, this device's share; under FSDP2 also those of a layer on their way to the shares
    optimizer    both moments of AdamW, and what its step makes besides (foreach, PyTorch's choice on CUDA)
    copies       bfloat16 weights to compute with: gathered by FSDP2, a layer at a time, or cast by autocast
    activations  inputs of the checkpointed layers, and all that the layer at work makes
    logits       whatever the log-probabilities take, forward and backward, the gradient of the head's weight too

"Without" our operations the log-probabilities are as plain trainers compute them, all else is the same: bfloat16 logits
of the response tokens, float32 from there on, divided by the temperature, log_softmax; the entropies have no gradient.

"Before" the update the trainer computes values of the whole rollout, and old log-probabilities, without gradients, with
all weights gathered in bfloat16 on each device; that phase has a peak of its own.

Not counted: sampling (a cache of keys and values, another engine's weights), CUDA's context (about half a GiB),
workspaces of the vendor's kernels, what the allocator loses, buffers of the communication library, and what overlapping
streams keep longer than one stream would. Gradients are reduced after each micro-batch (sync_each_batch of accelerate);
without that setting each device holds whole gradients until the last one, two bytes a weight.

The exit code is 1 when the published step with the small critic does not peak at least 11 points of the device's memory
below that of PPO, or anything peaks higher with the operations of this library than without.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.optim import adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
)

from benchmarks import results
from benchmarks.allocations import GIB, Allocations, without_values
from benchmarks.qwen import QWEN
from sppo import actor_critic, attention, critic
from sppo.actor_critic import ActorCritic, policy_logprobs
from sppo.algorithms import algorithm_class
from sppo.attention import NAME, Packed, use_attention
from sppo.config import SPPOConfig
from sppo.critic import PromptCritic, TokenCritic, set_head
from sppo.experience import Update
from sppo.files import replacing
from sppo.micro_batches import MicroBatch, deal
from sppo.rollout import Sample
from sppo.sharding import gathered
from sppo.trainer import SPPOTrainer
from sppo_kernels import LogprobOutput, linear_logprobs

DEVICE = 80 * GIB
WITHOUT_CRITIC = ("grpo", "rloo", "remax")
LEAST_SAVED = 11  # points of DEVICE
OWNERS = ("policy", "critic")
KINDS = ("parameters", "gradients", "optimizer", "copies", "activations", "logits")
_PARAMETERS = [(owner, "parameters") for owner in OWNERS]
MODELS = {  # DeepSeek-R1-Distill-Qwen has heads of its own, Qwen2.5-0.5B its embedding for one
    name: Qwen2Config(**size, max_position_embeddings=131_072, tie_word_embeddings=name == "0.5B")
    for name, size in QWEN.items()
}
MODELS["two layers"] = copy.deepcopy(MODELS["0.5B"])  # for a quick look
MODELS["two layers"].num_hidden_layers = 2


class Case(NamedTuple):
    """What trains on how many devices; ``critic`` is a model's name, None for an algorithm without."""

    algorithm: str
    policy: str
    critic: str | None
    devices: int

    @property
    def name(self) -> str:
        """Of its row."""
        if self.critic is None:
            return ", ".join(WITHOUT_CRITIC)  # their micro-batches have the same shapes
        return f"{self.algorithm}, critic {self.critic}"


SMALL_CRITIC = Case("sppo", "7B", "1.5B", 4)
TOKEN_CRITIC = Case("ppo", "7B", "7B", 4)
CASES = [
    SMALL_CRITIC,
    Case("sppo", "7B", "7B", 4),
    TOKEN_CRITIC,
    Case("grpo", "7B", None, 4),
    Case("sppo", "1.5B", "0.5B", 1),
    Case("sppo", "1.5B", "1.5B", 1),
    Case("ppo", "1.5B", "1.5B", 1),
    Case("grpo", "1.5B", None, 1),
]
QUICK = [Case("sppo", "two layers", "two layers", 1), Case("ppo", "two layers", "two layers", 1)]
QUICK_SETTINGS = {
    "max_prompt_length": 256,
    "max_completion_length": 1024,
    "gradient_accumulation_steps": 4,
    "steps_per_generation": 16,
}


# The step


class StepAllocations(Allocations):
    """A kind is a pair: of OWNERS and of KINDS. What a parameter is cast to is a copy to compute with."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "policy", "activations"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        call = functools.partial(super().__torch_dispatch__, func, types, args, kwargs)
        if func is torch.ops.aten._to_copy.default and self.kind_of(args[0]) in _PARAMETERS:
            with self.making_of_same("copies"):
                return call()
        return call()

    def making_of_same(self, what: str) -> AbstractContextManager[None]:
        """What comes into being inside is of this kind, and of whose the rest is now."""
        return self.making((self.kind[0], what))


def build(case: Case, models: dict[str, Qwen2Config], cliprange: float) -> ActorCritic:
    """Policy and critic as the trainer has them before they are sharded, float32."""
    judge = None
    if case.critic is not None:
        config = copy.deepcopy(models[case.critic])
        config.num_labels = 1
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        set_head(classifier, torch.zeros(1))
        by_token = algorithm_class(case.algorithm).critic == "token"
        judge = TokenCritic(classifier, cliprange) if by_token else PromptCritic(classifier)
    pair = ActorCritic(AutoModelForCausalLM.from_config(models[case.policy], dtype=torch.float32), judge)
    pair.gradient_checkpointing_enable()
    pair.forward = torch.autocast("cpu", torch.bfloat16)(pair.forward)  # type: ignore[method-assign]  # as accelerate does
    return pair.train()


def settings(case: Case, **overrides: Any) -> SPPOConfig:
    """The published ones, with what other algorithms need, divided over the devices."""
    size = "1.5b" if case.policy == "1.5B" else "7b"
    whole = SPPOConfig.paper(size, use_cpu=True)
    for name in ("gradient_accumulation_steps", "steps_per_generation"):
        overrides.setdefault(name, getattr(whole, name) // case.devices)
    of_algorithm = algorithm_class(case.algorithm).defaults
    chosen = {name: value for name, value in of_algorithm.items() if value is not None}
    return SPPOConfig.paper(size, use_cpu=True, algorithm=case.algorithm, **chosen | overrides)


def samples_of(args: SPPOConfig, kind: str | None) -> list[Sample]:
    """A rollout of one process: prompts that differ, and all of them as long as they may be."""
    assert args.max_prompt_length is not None
    response = [1] * args.max_completion_length
    of_tokens = torch.zeros(len(response))
    made = [
        Sample("", "", [i] * args.max_prompt_length, response, truncated=True, reward=1.0, advantage=torch.zeros(()))
        for i in range(args.rollout_size)
    ]
    for sample in made if kind == "token" else ():
        sample.value = sample.returns = sample.advantage = of_tokens
    return made


class Step:
    """Updates of policy and critic by the trainer's own code, as the whole of it is not there.

    Args:
        allocations: the mode that is in force.
        pair: what learns.
        args: settings.
        samples: a rollout of this process.
        batch: the micro-batch of its first sample.
    """

    def __init__(
        self,
        allocations: StepAllocations,
        pair: ActorCritic,
        args: SPPOConfig,
        samples: Sequence[Sample],
        batch: MicroBatch,
    ) -> None:
        self.allocations, self.pair, self.args, self.samples, self.batch = allocations, pair, args, samples, batch
        self.length = len(samples[0].prompt_ids) + len(samples[0].response_ids)
        self.parts = {"policy": pair.policy} | ({"critic": pair.critic} if pair.critic is not None else {})
        for owner, part in self.parts.items():
            allocations.name((owner, "parameters"), [*part.parameters(), *part.buffers()])
        self.trainer = self._trainer()
        self.optimizer = self.trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            group["foreach"] = True  # what PyTorch takes on CUDA

    def _trainer(self) -> SPPOTrainer:
        algorithm = algorithm_class(self.args.algorithm)(self.args)
        trainer = SPPOTrainer.__new__(SPPOTrainer)
        update = Update([self.batch], self.length, 1.0, 1.0, policy_learns=True, critic_learns=True)
        trainer.args, trainer.algorithm, trainer.model, trainer.optimizer = self.args, algorithm, self.pair, None
        trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
        trainer.experience = SimpleNamespace(update=update, progress=SimpleNamespace(trusted=True))
        trainer.is_deepspeed_enabled = False
        trainer._measure = lambda *_, **__: None  # metrics are a few numbers
        return trainer

    def values(self) -> None:
        """The critic's, of the rollout. Its chunks take the same, so one goes through the model, the others leave what
        that left."""
        read = critic.packed_hidden
        first: list[Tensor] = []

        def states(model: PreTrainedModel, packed: Packed, length: int) -> Tensor:
            if not first:
                first.append(read(model, packed, length))
                return first[0]
            return first[0].new_empty(packed.input_ids.shape[1], first[0].shape[1])

        with mock.patch.object(critic, "packed_hidden", states), self.allocations.making(("critic", "activations")):
            self.pair.judge.values(self.samples)

    def old_logprobs(self) -> None:
        """Of a micro-batch."""
        with use_attention(self.pair, NAME):
            policy_logprobs(self.pair.policy, self.batch, temperature=self.args.temperature, max_length=self.length)

    def update(self) -> None:
        """The last micro-batch of an update, which finds the gradients of those before it, and the optimizer's step."""
        self._leave_gradients()
        with use_attention(self.pair, NAME):
            loss = self.trainer.compute_loss(self.pair, self.batch)
            with self.allocations.making((list(self.parts)[-1], "activations")):  # what came last goes back first
                loss.backward()
        self._move()

    def start(self) -> None:
        """The optimizer has its state; and DTensor knows each operation: for one that is new to it, it makes whole
        tensors without data to learn their shapes, which are not to count."""
        self._leave_gradients()
        self._move()

    def _leave_gradients(self) -> None:
        for owner, part in self.parts.items():
            with self.allocations.making((owner, "gradients")):
                for p in part.parameters():
                    p.grad = torch.zeros_like(p)

    def _move(self) -> None:
        for part in self.parts.values():
            nn.utils.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
        with self.allocations.making_of_same("optimizer"):
            self.optimizer.step()
        for owner, part in self.parts.items():
            states = [
                self.optimizer.state[p][moment] for p in part.parameters() for moment in ("exp_avg", "exp_avg_sq")
            ]
            self.allocations.name((owner, "optimizer"), states)
        self.optimizer.zero_grad()


# What the step is made to do, and watched by


def eager_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float, bias: Tensor | None, **_: Any
) -> LogprobOutput:
    """As plain trainers compute them, all logits at once."""
    logp = (nn.functional.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    return LogprobOutput(logp.gather(-1, labels[:, None])[:, 0], entropy)


@contextmanager
def watched(allocations: StepAllocations, pair: ActorCritic, logprobs: Callable[..., LogprobOutput]) -> Iterator[None]:
    """Log-probabilities come from ``logprobs``; kinds change as the step goes forward, and back in backward."""

    def turn(*kind: str) -> None:
        allocations.kind = kind

    def of_head(hidden: Tensor, *args: Any, **kwargs: Any) -> LogprobOutput:
        with allocations.making(("policy", "logits")):
            output = logprobs(hidden, *args, **kwargs)
        if hidden.requires_grad:
            output.logprobs.register_hook(lambda _: turn("policy", "logits"))
            hidden.register_hook(lambda _: turn("policy", "activations"))
        return output

    def labelled(name: str, kind: str) -> Any:
        method = getattr(FSDPParamGroup, name)

        def run(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            if name == "post_backward":
                grads = [p.unsharded_param.grad for p in group.fsdp_params if hasattr(p, "_unsharded_param")]
                allocations.name((allocations.kind[0], kind), [grad for grad in grads if grad is not None])
            with allocations.making_of_same(kind):
                return method(group, *args, **kwargs)

        return mock.patch.object(FSDPParamGroup, name, run)

    patches = [
        mock.patch.object(actor_critic, "linear_logprobs", of_head),
        labelled("unshard", "copies"),
        labelled("wait_for_unshard", "copies"),
        labelled("post_backward", "gradients"),
    ]
    if (judge := pair.judge) is not None:
        loss = allocations.making(("critic", "activations"))
        patches.append(mock.patch.object(judge, "loss", loss(judge.loss)))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def attention_on_cuda(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """What sppo.attention does there without flash-attn, whose memory is the same; all as one sequence where the length
    of each would have to be looked at."""
    if query.dtype == torch.float32:
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths = cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q
    return attention._torch_varlen()(q, k, v, *lengths, scale=scaling, window_size=(-1, 0), enable_gqa=True)[None], None


@contextmanager
def processes(count: int) -> Iterator[DeviceMesh | None]:
    """This one and others, to which nothing is sent; None for this one alone."""
    if count == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("fsdp",))
    finally:
        dist.destroy_process_group()


def shard(pair: ActorCritic, mesh: DeviceMesh) -> None:
    """As ``accelerate`` does for ``fsdp=True`` and ``bf16=True``."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="FULL_STATE_DICT",
    )
    plugin.set_mixed_precision("bf16")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="bf16",
        is_main_process=False,
        device=torch.device("cpu"),
        torch_device_mesh=mesh,
        parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
    )
    fsdp2_prepare_model(accelerator, pair)


@contextmanager
def on_cuda() -> Iterator[None]:
    """What looks at values, or at the device, is told what it would see there."""
    with (
        mock.patch.dict(AttentionInterface._global_mapping, {NAME: attention_on_cuda}),
        mock.patch.object(adam, "_get_value", return_value=1.0),
        mock.patch.object(FakeTensor, "tolist", lambda x: [0.0] * len(x)),
    ):
        yield


def measure(case: Case, args: SPPOConfig, models: dict[str, Qwen2Config]) -> list[results.Row]:
    """Peaks of an update and of the phase before it, with the operations of this library and without."""
    kind = algorithm_class(case.algorithm).critic
    samples = samples_of(args, kind)
    (batch,) = deal(samples[:1], 1, kind)
    tokens = args.max_completion_length
    kept = min(tokens, args.logits_budget_bytes // (2 * models[case.policy].vocab_size))
    rows = []
    with (
        processes(case.devices) as mesh,
        FakeTensorMode() as fake,
        StepAllocations() as allocations,
        allocations.resizes(),
        on_cuda(),
    ):
        pair = build(case, models, args.cliprange_value)
        if mesh is not None:
            shard(pair, mesh)
        gc.collect()  # whole weights
        step = Step(allocations, pair, args, samples, {name: fake.from_tensor(x) for name, x in batch.items()})
        step.start()
        for operations, logprobs in ((True, linear_logprobs), (False, eager_logprobs)):
            with watched(allocations, pair, logprobs):
                first = allocations.moment()
                # Which tokens bear loss; in backward the same, of which E is of use, which are left.
                with without_values([(0, tokens), (0, tokens), *([(0, kept)] if kept else []), (kept, tokens)]):
                    step.update()
                peak = allocations.peak_by_kind(first)
                first = allocations.moment()
                with without_values([(0, tokens)]), before_an_update(pair):
                    if pair.judge is not None:
                        step.values()
                    step.old_logprobs()
                before = allocations.peak_by_kind(first)
            rows.append(row(case, args, operations, peak, before))
    return rows


@contextmanager
def before_an_update(pair: ActorCritic) -> Iterator[None]:
    """Contexts that the trainer has in force where it judges and scores a rollout."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), gathered(pair, reshard_after_forward=True):
        yield


def row(case: Case, args: SPPOConfig, operations: bool, peak: dict[Any, int], before: dict[Any, int]) -> results.Row:
    """Of the results; bytes."""
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


# The suite

COLUMNS: results.Columns = {
    "policy": lambda row: row["model"],
    "devices": lambda row: row["devices"],
    "step": lambda row: row["case"],
    "our operations": lambda row: "with" if row["operations"] else "without",
    "peak, GiB": lambda row: _gib(row["peak_bytes"]),
    "of 80 GiB": lambda row: f"{_percent(row):.1f}%",
    **{kind: lambda row, kind=kind: _gib(row["policy"][kind]) for kind in KINDS},
    "critic": lambda row: _gib(sum(row["critic"].values())) if row["critic"]["parameters"] else "",
    "before": lambda row: _gib(row["before_bytes"]),
}


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _percent(row: results.Row) -> float:
    return 100 * row["peak_bytes"] / DEVICE


def failures_of(rows: Sequence[results.Row]) -> list[str]:
    """What does not hold of the rows that are there."""
    found = []
    ours = {(row["model"], row["case"]): row for row in rows if row["operations"]}
    for row in rows:
        with_ours = ours[row["model"], row["case"]]
        for name in ("peak_bytes", "before_bytes"):
            if with_ours[name] > row[name]:
                found.append(
                    f"{row['model']}, {row['case']}: {name} {with_ours[name]} with our operations, {row[name]} without"
                )
    small, token = (ours.get((case.policy, case.name)) for case in (SMALL_CRITIC, TOKEN_CRITIC))
    if small and token and (saved := _percent(token) - _percent(small)) < LEAST_SAVED:
        found.append(f"{small['case']}: {saved:.1f} points below {token['case']}, not {LEAST_SAVED}")
    return found


def draw(path: Path, rows: Sequence[results.Row]) -> None:
    """Stacked bars: the policy's kinds, then the critic's in the same colours, hatched."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(results.NO_CHART, file=sys.stderr)
        return
    figure = Figure(figsize=(11, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
    left = [0.0] * len(rows)
    for owner, hatch in zip(OWNERS, ("", "////"), strict=True):
        for kind, colour in zip(KINDS, colours, strict=True):
            sizes = [row[owner][kind] / GIB for row in rows]
            if any(sizes):
                bars = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
                axes.barh(range(len(rows)), sizes, left=left, label=f"{owner}: {kind}", **bars)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    labels = [
        f"{row['model']} on {row['devices']}: {row['case']}{'' if row['operations'] else ', without'}" for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(DEVICE / GIB, color="#cc3311", linewidth=1)
    axes.set_xlabel("peak of a training step on a device, GiB")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.1))
    with replacing(path) as staged:
        figure.savefig(staged, format="png", dpi=100)


def run(args: argparse.Namespace) -> int:
    """``python -m benchmarks memory --train``."""
    rows = []
    shorter = QUICK_SETTINGS if args.quick else {}
    for case in QUICK if args.quick else CASES:
        print(f"{case.name}, policy {case.policy} on {case.devices}", file=sys.stderr)
        rows += measure(case, settings(case, **shorter), MODELS)
    failures = failures_of(rows)
    path = args.out / "memory-train.json"
    device = "none (fake tensors)"
    results.write(path, "memory-train", device=device, quick=args.quick, failures=failures, rows=rows)
    draw(path.with_suffix(".png"), rows)
    return results.conclude(f"{results.table(rows, COLUMNS)}\n\nGiB", failures, path)
