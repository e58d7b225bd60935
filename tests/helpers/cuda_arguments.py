"""Arguments of the registered operations on the fake CUDA device."""

import torch
from fake_cuda import registered_operations

from sppo_kernels.ops.linear_logprobs.output import ForwardOutput
from sppo_kernels.ops.policy_loss.settings import Settings

OPS = registered_operations()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IGNORED = -100


def new_labels(cuda, n):
    return cuda.new(n, dtype=torch.int64)


NO_SUPPORT = {"support_ids": None, "support_offsets": None}


def new_support(cuda, n, entries):
    """Make the supports of n tokens."""
    offsets = cuda.new(n + 1, dtype=torch.int64)
    return {"support_ids": cuda.new(entries, dtype=torch.int64), "support_offsets": offsets}


def new_temperature(cuda, n, per_token=False):
    return cuda.new(n) if per_token else cuda.new(1).expand(n)


# Operations without an LM head


def selective_inputs(cuda, dtype, batch=3, length=700, vocab=50257):
    """Make labels and non-contiguous logits: those of all tokens but the last of each row."""
    logits = cuda.new(batch, length + 1, vocab, dtype=dtype)[:, :-1]
    return logits, new_labels(cuda, batch * length)


def selective(cuda, dtype):
    logits, labels = selective_inputs(cuda, dtype)
    tensors = {"logits": logits, "labels": labels, "temperature": new_temperature(cuda, len(labels))}
    return {**tensors, **NO_SUPPORT, "softcap": 0.0, "ignore_index": IGNORED, "backend": "triton"}


def selective_backward(cuda, dtype):
    logits, labels = selective_inputs(cuda, dtype)
    n = len(labels)
    return {
        "grad_logprobs": cuda.new(1).expand(n),
        "grad_entropy": cuda.new(n),
        "logits": logits,
        "labels": labels,
        "temperature": new_temperature(cuda, n, True),
        **NO_SUPPORT,
        "entropy": cuda.new(n),
        "row_stats": cuda.new(2, n),
        "softcap": 30.0,
        "ignore_index": IGNORED,
        "backend": "triton",
    }


def policy(cuda, dtype, n=10_000, sequences=7, per_token=False, optional=False, normalizer=False, **settings):
    """Make arguments of policy_loss, with the optional tensors if ``optional``."""
    new_optional = lambda: cuda.new(n) if optional else None
    defaults = Settings(
        objective="clip",
        ratio_level="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=None,
        aggregation="token-mean",
        kl_coef=0.0,
        kl_estimator="k3",
        rollout_correction="none",
        rollout_floor=0.0,
        rollout_cap=2.0,
    )
    return {
        "logprobs": cuda.new(n, dtype=dtype),
        "old_logprobs": cuda.new(n),
        "advantages": cuda.new(n if per_token else sequences),
        "mask": cuda.new(n, dtype=torch.bool) if optional else None,
        "cu_seqlens": cuda.new(sequences + 1, dtype=torch.int32),
        "normalizer": cuda.new() if normalizer else None,
        "ref_logprobs": new_optional(),
        "rollout_logprobs": new_optional(),
        "per_token": per_token,
        **defaults._replace(**settings)._asdict(),
        "backend": "triton",
    }


def prompt_values(cuda, dtype, prompts=5, length=300, width=1000, packed=False):
    """Make arguments with non-contiguous hidden states: every other row."""
    hidden = cuda.new(1 if packed else prompts, 2 * length, width, dtype=dtype)[:, ::2]
    return {
        "hidden": hidden,
        "weight": cuda.new(width, dtype=dtype),
        "bias": cuda.new(1, dtype=dtype),
        "last_index": cuda.new(prompts, dtype=torch.int64),
        "backend": "triton",
    }


def prompt_value_loss(cuda, dtype, **shape):
    inputs = prompt_values(cuda, dtype, **shape)
    return {**inputs, "outcomes": cuda.new(len(inputs["last_index"])), "normalizer": cuda.new()}


def prompt_value_gradient(cuda, dtype, **shape):
    inputs = prompt_values(cuda, dtype, **shape)
    del inputs["bias"]
    return {**inputs, "grad_logits": cuda.new(1).expand(len(inputs["last_index"]))}


def gae(cuda, dtype, rows=6, length=900):
    tensors = {name: cuda.new(rows, length, dtype=dtype) for name in ("rewards", "values")}
    mask = cuda.new(length, rows, dtype=torch.bool).t()
    return {**tensors, "mask": mask, "gamma": 0.99, "lam": 0.95, "backend": "triton"}


# Operations with an LM head


def lm_head(cuda, dtype, n=600, width=64, vocab=50257, rank=0, bias=False, softcap=0.0, per_token=False):
    """Make hidden states, weights, bias, labels, temperature and softcap."""
    new = lambda *shape: cuda.new(*shape, dtype=dtype)
    hiddens, weights = [new(n, width)], [new(vocab, width)]
    if rank:
        hiddens.append(new(n, rank))
        weights.append(new(vocab, rank))
    return {
        "hiddens": hiddens,
        "weights": weights,
        "bias": new(vocab) if bias else None,
        "labels": new_labels(cuda, n),
        "temperature": new_temperature(cuda, n, per_token),
        **NO_SUPPORT,
        "softcap": softcap,
    }


def linear(cuda, dtype, backward="recompute", budget=None, chunk_bytes=1, max_entries=64, **shape):
    return {
        **lm_head(cuda, dtype, **shape),
        "ignore_index": IGNORED,
        "backward": backward,
        "auto_key": "",
        "logits_budget_bytes": budget,
        "chunk_bytes": chunk_bytes,
        "mass_tolerance": 1e-4,
        "max_entries": max_entries,
        "projection": "vendor",
        "group": "",
        "backend": "triton",
    }


def linear_backward(cuda, arguments, results, needs=None):
    """Make arguments of the backward pass from those and the results of a forward pass."""
    forward_only = ("logits_budget_bytes", "mass_tolerance", "max_entries")
    output = ForwardOutput(*results)._asdict()
    for name in ("logprobs", "dropped_mass", "num_entries"):
        del output[name]
    return {
        **{name: x for name, x in arguments.items() if name not in forward_only},
        **output,
        "grad_logprobs": cuda.new(len(arguments["labels"])),
        "grad_entropy": cuda.new(len(arguments["labels"])),
        "needs": needs_of(arguments) if needs is None else needs,
    }


def needs_of(arguments):
    return [True] * (2 * len(arguments["hiddens"])) + [arguments["bias"] is not None]


def linear_backward_arguments(cuda, dtype):
    arguments = linear(cuda, dtype)
    return linear_backward(cuda, arguments, OPS["linear_logprobs"](**arguments))


def linear_policy(cuda, dtype, n=600, sequences=5, backward="cache", **more):
    shape = {key: more.pop(key) for key in ("vocab", "rank", "bias", "softcap", "chunk_bytes", "budget") if key in more}
    arguments = linear(cuda, dtype, backward, n=n, **shape)
    loss = policy(cuda, torch.float32, n, sequences, **more)
    del loss["logprobs"]
    return {**arguments, **loss, "needs": needs_of(arguments)}


ARGUMENTS = {
    "gae": gae,
    "group_advantages": lambda cuda, dtype: {
        "rewards": cuda.new(100, dtype=dtype),
        "group_ids": cuda.new(100, dtype=torch.int64),
        "estimator": "grpo",
        "backend": "triton",
    },
    "linear_logprobs": linear,
    "linear_logprobs_backward": linear_backward_arguments,
    "linear_policy_loss": linear_policy,
    "policy_loss": policy,
    "prompt_value_grad_hidden": prompt_value_gradient,
    "prompt_value_grad_weight": prompt_value_gradient,
    "prompt_value_logits": prompt_values,
    "prompt_value_loss": prompt_value_loss,
    "selective_logprobs": selective,
    "selective_logprobs_backward": selective_backward,
    "whiten": lambda cuda, dtype: {
        "x": cuda.new(70, 90, dtype=dtype),
        "mask": cuda.new(90, 70, dtype=torch.bool).t(),
        "backend": "triton",
    },
}
