"""The operations as every suite measures them: inputs, results in float64, and the least work that each takes.

A function under measurement takes the tensors of a problem by name and returns its outputs by name; it may leave out
outputs that nothing is done with. Whatever loss ends in log-probabilities computed from hidden states is one product
with the output embedding, a row pass, and a function of the log-probabilities, so all of them are made exact alike, a
block of tokens at a time: float64 logits of a whole step would fit nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sppo_kernels
from sppo_kernels import reference

Outputs = dict[str, Tensor]
Function = Callable[..., Outputs]
IGNORED = -100
_BLOCK = 512  # tokens whose logits are held in float64 at once: 0.6 GB at a vocabulary of 152k
_LENGTH = 8192  # tokens of a response, about


class Point(NamedTuple):
    """Where something is measured. Shares are of tokens; ``logits`` is the shape of the distributions."""

    tokens: int
    hidden: int
    vocab: int
    ignored: float = 0.0
    clipped: float = 0.0
    logits: str = "peaked"  # most of the mass on the label, the rest noise; "uniform": all noise; "sharp": a few tokens


class Work(NamedTuple):
    """The least that forward and backward take: operations of matrix products, bytes read and written."""

    forward_flops: float = 0.0
    backward_flops: float = 0.0
    forward_bytes: float = 0.0
    backward_bytes: float = 0.0


@dataclass
class Problem:
    """Tensors for a function by name, those of them that have gradients, and the gradients of its outputs."""

    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    upstream: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor, which is always the large one."""
        return next(iter(self.tensors.values())).dtype

    def forward(self, function: Function) -> Outputs:
        return function(**self.tensors)

    def backward(self, outputs: Outputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            [outputs[name] for name in self.upstream],
            [self.tensors[name] for name in self.leaves],
            [upstream.to(outputs[name].dtype) for name, upstream in self.upstream.items()],
        )

    def step(self, function: Function) -> dict[str, Callable[[], object]]:
        """Forward and, where there is one, backward: calls to be made in turn."""
        if not self.leaves:
            return {"forward": lambda: self.forward(function)}
        alive: list[Outputs] = []
        return {
            "forward": lambda: alive.append(self.forward(function)),
            "backward": lambda: self.backward(alive.pop()),
        }

    def results(self, function: Function) -> Outputs:
        """Outputs, and the gradient of each leaf as ``"d <name>"``."""
        outputs = self.forward(function)
        grads = self.backward(outputs) if self.leaves else ()
        named = {f"d {name}": grad for name, grad in zip(self.leaves, grads, strict=True)}
        return {**{name: x.detach() for name, x in outputs.items()}, **named}

    def cast(self, dtype: torch.dtype) -> Problem:
        """With every floating-point tensor in another dtype."""
        tensors = {
            name: x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for name, x in self.tensors.items()
        }
        return Problem(tensors, self.leaves, self.upstream)


class Operation(NamedTuple):
    """What a suite has to know of an operation.

    ``evaluate(problem, dtype)`` gives its results by plain PyTorch in a dtype: float64 is the truth, and the dtype of
    the inputs says how far from it one may stray.
    """

    make: Callable[[Point, torch.device, torch.dtype], Problem]
    work: Callable[[Point, torch.dtype], Work]
    ours: Callable[[str | None], dict[str, Function]]  # by mode, on a backend
    evaluate: Callable[[Problem, torch.dtype], Outputs]


# Inputs


def _labels(point: Point, device: torch.device) -> Tensor:
    labels = torch.randint(point.vocab, (point.tokens,), device=device)
    labels[torch.rand(point.tokens, device=device) < point.ignored] = IGNORED
    return labels


def _spread(point: Point) -> float:
    """Standard deviation of the noise. If it is twice sqrt(2 log V), the k-th largest p of V goes like k ** -2, and
    some 65 entries a token add up to all but 1e-4, about as many as of a language model at T = 0.6."""
    return 2.0 * math.sqrt(2.0 * math.log(point.vocab)) if point.logits == "sharp" else 1.0


def _margins(point: Point, device: torch.device) -> Tensor:
    """How far a label's logit stands above the noise: near the largest of it, or log V away from its log-sum-exp."""
    if point.logits == "uniform":
        return torch.zeros(point.tokens, device=device)
    shares = torch.rand(point.tokens, device=device)
    if point.logits == "sharp":
        return _spread(point) * math.sqrt(2.0 * math.log(point.vocab)) * (0.9 + 0.2 * shares)
    return math.log(point.vocab) + 8.0 * shares - 2.0


def _upstream(point: Point, device: torch.device) -> Tensor:
    """As of a loss that averages over tokens; 0 for those that are clipped."""
    upstream = torch.randn(point.tokens, device=device) / point.tokens
    return upstream * (torch.rand(point.tokens, device=device) >= point.clipped)


def _make_linear(point: Point, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """hidden and weight whose logits are noise, with the label's above it."""
    weight = torch.randn(point.vocab, point.hidden, device=device, dtype=dtype).mul_(point.hidden**-0.5)
    labels = _labels(point, device)
    hidden = _spread(point) * torch.randn(point.tokens, point.hidden, device=device)
    hidden += _margins(point, device)[:, None] * weight[labels.clamp(min=0)].float()
    return {"hidden": hidden.to(dtype).requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}


def _make_linear_logprobs(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = _make_linear(point, device, dtype)
    return Problem(tensors, ("hidden", "weight"), {"logprobs": _upstream(point, device)})


def _make_linear_nll(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    tensors = _make_linear(point, device, dtype)
    return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})


def _make_linear_policy_loss(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    """Responses of one length, [B, T] flattened, so that peers without packing can take part."""
    tensors = _make_linear(point, device, dtype)
    # Ratios well inside and well outside of the clip range: with one at its edge any rounding would flip a gradient.
    gaps = torch.tensor([-0.5, -0.08, 0.08, 0.5], device=device)[torch.randint(4, (point.tokens,), device=device)]
    exact = torch.cat([logprobs for logprobs, _ in _blocks(tensors, torch.float32)])
    sequences = max(1, point.tokens // min(_LENGTH, point.tokens // 4))
    tensors["old_logprobs"] = exact + gaps
    tensors["advantages"] = torch.randn(sequences, device=device)
    return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})


def _make_selective(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    labels = _labels(point, device)
    logits = torch.randn(point.tokens, point.vocab, device=device, dtype=dtype)
    index = labels.clamp(min=0)[:, None]
    logits.scatter_add_(1, index, _margins(point, device)[:, None].to(dtype))
    tensors = {"logits": logits.requires_grad_(), "labels": labels}
    return Problem(tensors, ("logits",), {"logprobs": _upstream(point, device)})


def _make_policy_loss(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    """Packed responses of very different lengths; log-probabilities are float32 whatever the model's dtype."""
    n, sequences = point.tokens, responses(point.tokens)
    cuts = torch.randint(n + 1, (sequences - 1,), device=device, dtype=torch.int32).sort().values
    old = torch.randn(n, device=device).abs().neg()
    logprobs = old + 0.2 * torch.randn(n, device=device)
    tensors = {
        "logprobs": logprobs.requires_grad_(),
        "old_logprobs": old,
        "advantages": torch.randn(sequences, device=device),
        "cu_seqlens": torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), n)]),
    }
    return Problem(tensors, ("logprobs",), {"loss": torch.ones((), device=device)})


def _make_prompt_value(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    """Packed prompts of 256 tokens."""
    prompts = _prompts(point)
    tensors = {
        "hidden": torch.randn(point.tokens, point.hidden, device=device, dtype=dtype).requires_grad_(),
        "weight": torch.randn(1, point.hidden, device=device, dtype=dtype).mul_(point.hidden**-0.5).requires_grad_(),
        "last_index": (torch.arange(1, prompts + 1, device=device) * (point.tokens // prompts)) - 1,
        "outcomes": torch.randint(2, (prompts,), device=device).float(),
    }
    return Problem(tensors, ("hidden", "weight"), {"loss": torch.ones((), device=device)})


def _make_gae(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    shape = _rows_of_responses(point)
    rewards, values = (torch.randn(shape, device=device) for _ in range(2))
    return Problem({"rewards": rewards, "values": values, "mask": _prefix_mask(shape, device)})


def _make_whiten(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    shape = _rows_of_responses(point)
    return Problem({"x": torch.randn(shape, device=device), "mask": _prefix_mask(shape, device)})


def _make_group_advantages(point: Point, device: torch.device, dtype: torch.dtype) -> Problem:
    """As many responses as a step has, not tokens: groups of 8."""
    rewards = torch.rand(_group_members(point), device=device)
    return Problem({"rewards": rewards, "group_ids": torch.arange(len(rewards), device=device) // 8})


def responses(tokens: int) -> int:
    """Packed responses that policy_loss's tokens are cut into."""
    return max(4, tokens // _LENGTH)


def _prompts(point: Point) -> int:
    return max(1, point.tokens // 256)


def _group_members(point: Point) -> int:
    return max(8, point.tokens // _LENGTH * 8)


def _rows_of_responses(point: Point) -> tuple[int, int]:
    length = min(_LENGTH, point.tokens)
    return point.tokens // length, length


def _prefix_mask(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Each row is kept up to a place of its own, as padded responses are."""
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), device=device)
    return torch.arange(shape[1], device=device) < lengths


# Results by plain PyTorch


def _blocks(tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies, a block of tokens at a time."""
    weight = tensors["weight"].detach().to(dtype)
    with torch.no_grad():
        for hidden, labels in zip(tensors["hidden"].split(_BLOCK), tensors["labels"].split(_BLOCK), strict=True):
            yield _from_logits(torch.nn.functional.linear(hidden.to(dtype), weight), labels)


def _from_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and, without gradient, entropies, the way they are usually written."""
    logp = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    keep = labels != IGNORED
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1) * keep
    return logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * keep, entropy


def _evaluate_linear(problem: Problem, dtype: torch.dtype, finish: Function) -> Outputs:
    """``finish`` makes the outputs of an operation from log-probabilities, entropies and the other tensors."""
    tensors = problem.tensors
    logprobs, entropy = map(torch.cat, zip(*_blocks(tensors, dtype), strict=True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    other = {k: x.to(wide) if x.is_floating_point() else x for k, x in tensors.items() if k not in ("hidden", "weight")}
    head = Problem(
        {**other, "logprobs": logprobs.requires_grad_(), "entropy": entropy}, ("logprobs",), problem.upstream
    )
    outputs = head.results(finish)
    coefficients = outputs.pop("d logprobs").to(wide)
    weight = tensors["weight"].detach().to(dtype).requires_grad_()
    dh, dw = [], torch.zeros_like(weight, dtype=wide)
    for rows in torch.arange(len(logprobs), device=logprobs.device).split(_BLOCK):
        hidden = tensors["hidden"].detach()[rows].to(dtype).requires_grad_()
        logp, _ = _from_logits(torch.nn.functional.linear(hidden, weight), tensors["labels"][rows])
        d_hidden, d_weight = torch.autograd.grad(logp, (hidden, weight), coefficients[rows])
        dh.append(d_hidden)
        dw += d_weight
    return {**outputs, "d hidden": torch.cat(dh), "d weight": dw.to(dtype)}


def values(logprobs: Tensor, entropy: Tensor, **_: Tensor) -> Outputs:
    """The outputs of linear_logprobs itself."""
    return {"logprobs": logprobs, "entropy": entropy}


def mean_nll(logprobs: Tensor, labels: Tensor, **_: Tensor) -> Outputs:
    """Mean negative log-likelihood over the tokens that bear loss: what supervised fine-tuning minimises."""
    return {"loss": -logprobs.sum() / (labels != IGNORED).sum()}


def token_ppo(
    policy_loss: Callable[..., Any],
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    labels: Tensor,
    **_: Any,
) -> Outputs:
    """The clipped token-level loss of responses of one length, one advantage a response."""
    shape = len(advantages), -1
    mask = (labels != IGNORED).view(shape)
    return {"loss": policy_loss(logprobs.view(shape), old_logprobs.view(shape), advantages, mask=mask).loss}


def _evaluate_selective(problem: Problem, dtype: torch.dtype) -> Outputs:
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(problem.tensors["labels"])).split(_BLOCK):
        logits = problem.tensors["logits"].detach()[rows].to(dtype).requires_grad_()
        part = Problem(
            {"logits": logits, "labels": problem.tensors["labels"][rows]},
            ("logits",),
            {"logprobs": problem.upstream["logprobs"][rows]},
        )
        for name, x in part.results(eager_selective_logprobs).items():
            found.setdefault(name, []).append(x)
    return {name: torch.cat(parts) for name, parts in found.items()}


def eager_selective_logprobs(logits: Tensor, labels: Tensor) -> Outputs:
    """From given logits."""
    logprobs, entropy = _from_logits(logits, labels)
    return {"logprobs": logprobs, "entropy": entropy}


def eager_linear_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Outputs:
    """All logits at once."""
    return eager_selective_logprobs(torch.nn.functional.linear(hidden, weight), labels)


def named(function: Callable[..., Any], *names: str, **settings: Any) -> Function:
    """A function of the library with its outputs by name."""

    def call(**tensors: Tensor) -> Outputs:
        out = function(**tensors, **settings)
        if hasattr(out, "_asdict"):
            return {name: x for name, x in out._asdict().items() if isinstance(x, Tensor)}
        return dict(zip(names, (out,) if isinstance(out, Tensor) else out, strict=True))

    return call


# The least work


def _linear_work(point: Point, dtype: torch.dtype) -> Work:
    """One product forward, two backward, of the tokens that need them."""
    product = 2.0 * point.tokens * (1 - point.ignored) * point.hidden * point.vocab
    return Work(forward_flops=product, backward_flops=2 * product * (1 - point.clipped))


def _selective_work(point: Point, dtype: torch.dtype) -> Work:
    """Forward reads the rows that bear loss, backward those that have a gradient, and writes all of it."""
    row, tokens = point.vocab * dtype.itemsize, point.tokens * (1 - point.ignored)
    backward = row * (tokens * (1 - point.clipped) + point.tokens)
    return Work(forward_bytes=tokens * row + 16 * point.tokens, backward_bytes=backward + 16 * point.tokens)


def _policy_loss_work(point: Point, dtype: torch.dtype) -> Work:
    """Two float32 in, the gradient out."""
    return Work(forward_bytes=8.0 * point.tokens, backward_bytes=4.0 * point.tokens)


def _prompt_value_work(point: Point, dtype: torch.dtype) -> Work:
    """The last token of each prompt; the gradient of all hidden states, most of it zeros."""
    read = _prompts(point) * point.hidden * dtype.itemsize
    return Work(forward_bytes=read, backward_bytes=read + point.tokens * point.hidden * dtype.itemsize)


def _gae_work(point: Point, dtype: torch.dtype) -> Work:
    """As if the mask left nothing out."""
    return Work(forward_bytes=(4 + 4 + 1 + 4 + 4) * math.prod(_rows_of_responses(point)))


def _whiten_work(point: Point, dtype: torch.dtype) -> Work:
    """Read twice, since mean and variance come before the first result; as if the mask left nothing out."""
    return Work(forward_bytes=(2 * (4 + 1) + 4) * math.prod(_rows_of_responses(point)))


def _group_work(point: Point, dtype: torch.dtype) -> Work:
    return Work(forward_bytes=(4 + 8 + 4) * _group_members(point))


# Ours, on a given backend


def _ours_linear(finish: Function) -> Callable[[str | None], dict[str, Function]]:
    def call(
        mode: str, backend: str | None, hidden: Tensor, weight: Tensor, labels: Tensor, **other: Tensor
    ) -> Outputs:
        out = sppo_kernels.linear_logprobs(hidden, weight, labels, backward=mode, backend=backend)
        return finish(logprobs=out.logprobs, entropy=out.entropy, labels=labels, **other)

    return lambda backend: {mode: partial(call, mode, backend) for mode in ("cache", "recompute", "sparse", "auto")}


def _ours_in_one_call(ours: Callable[[str | None], dict[str, Function]]) -> Callable[[str | None], dict[str, Function]]:
    """Beside log-probabilities and loss, one after the other."""

    def call(
        backend: str | None, mode: str, labels: Tensor, old_logprobs: Tensor, advantages: Tensor, **head: Tensor
    ) -> Outputs:
        ends = torch.arange(len(advantages) + 1, dtype=torch.int32, device=labels.device)
        cu_seqlens = ends * (len(labels) // len(advantages))
        given = old_logprobs, advantages
        out = sppo_kernels.linear_policy_loss(
            head["hidden"], head["weight"], labels, *given, cu_seqlens=cu_seqlens, backward=mode, backend=backend
        )
        return {"loss": out.loss}

    modes = {"one call": "cache", "one call, sparse": "sparse"}
    return lambda backend: {**ours(backend), **{name: partial(call, backend, mode) for name, mode in modes.items()}}


def _ours(function: Callable[..., Any], *names: str, **settings: Any) -> Callable[[str | None], dict[str, Function]]:
    return lambda backend: {"": named(function, *names, backend=backend, **settings)}


def _linear(make: Callable[..., Problem], ours: Function, plain: Function) -> Operation:
    return Operation(make, _linear_work, _ours_linear(ours), partial(_evaluate_linear, finish=plain))


def _small(
    make: Callable[..., Problem], work: Callable[..., Work], name: str, *outputs: str, **settings: Any
) -> Operation:
    """An operation whose definition can be run whole, in float64 too."""
    plain = named(getattr(reference, name), *outputs, **settings)
    evaluate = lambda problem, dtype: problem.cast(dtype).results(plain)
    return Operation(make, work, _ours(getattr(sppo_kernels, name), *outputs, **settings), evaluate)


_POLICY = _linear(
    _make_linear_policy_loss,
    partial(token_ppo, sppo_kernels.policy_loss),
    partial(token_ppo, reference.policy_loss),
)

OPERATIONS: dict[str, Operation] = {
    "linear_logprobs": _linear(_make_linear_logprobs, values, values),
    "linear_logprobs, mean NLL": _linear(_make_linear_nll, mean_nll, mean_nll),
    "linear_logprobs + policy_loss": _POLICY._replace(ours=_ours_in_one_call(_POLICY.ours)),
    "selective_logprobs": Operation(
        _make_selective, _selective_work, _ours(sppo_kernels.selective_logprobs), _evaluate_selective
    ),
    "policy_loss, token": _small(_make_policy_loss, _policy_loss_work, "policy_loss"),
    "policy_loss, sequence_mean": _small(
        _make_policy_loss, _policy_loss_work, "policy_loss", ratio_level="sequence_mean"
    ),
    "prompt_value_loss": _small(_make_prompt_value, _prompt_value_work, "prompt_value_loss"),
    "gae": _small(_make_gae, _gae_work, "gae", "advantages", "returns", gamma=0.99, lam=0.95),
    "whiten": _small(_make_whiten, _whiten_work, "whiten", "x"),
    "group_advantages": _small(_make_group_advantages, _group_work, "group_advantages", "advantages"),
}
