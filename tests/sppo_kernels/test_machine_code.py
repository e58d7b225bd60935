"""Code that Triton generates for the kernels, without a GPU.

Kernels are launched and compiled in a subprocess without TRITON_INTERPRET, because the interpreter compiles nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
import torch, triton
import sppo_kernels as sk
from benchmarks.compile.launches import Case, TARGETS, kernel_of, launches
from sppo_kernels.ops.row_passes import ROW_PASSES, CachedRows

def linear(tokens, vocab, backward, **settings):
    hidden, weight = (torch.zeros(n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, vocab))
    labels = torch.zeros(tokens, dtype=torch.int64)
    out = sk.linear_logprobs(hidden, weight, labels, backward=backward, backend="triton", **settings)
    out.logprobs.sum().backward(retain_graph=True)
    out.entropy.sum().backward()

def cache_with_a_group(tokens, vocab):
    labels, tau, stats = torch.zeros(tokens, dtype=torch.int64), torch.ones(1).expand(tokens), torch.zeros(2, tokens)
    stride = -(-vocab // 64) * 64
    logits, probs = (torch.zeros(tokens, stride, dtype=x)[:, :vocab] for x in (torch.float32, torch.bfloat16))
    cached = CachedRows(probs, torch.zeros(2, tokens))
    given = {"logits": logits[None], "labels": labels, "temperature": tau, "softcap": 0.0}
    ROW_PASSES["triton"].cache(**given, row_stats=stats, cached=cached)

def other_ops(tokens):
    x = torch.zeros(tokens)
    logits = torch.zeros(tokens, 64, requires_grad=True)
    sk.selective_logprobs(logits, torch.zeros(tokens, dtype=torch.int64), backend="triton").logprobs.sum().backward()
    cu_seqlens = torch.arange(tokens + 1, dtype=torch.int32)
    for level in ("token", "sequence_mean"):
        leaf = x.clone().requires_grad_()
        sk.policy_loss(leaf, x, x, cu_seqlens=cu_seqlens, ratio_level=level, backend="triton").loss.backward()
    hidden, weight = torch.zeros(tokens, 64, requires_grad=True), torch.zeros(64, requires_grad=True)
    last_index = torch.arange(tokens)
    sk.prompt_value_loss(hidden, weight, last_index, x, backend="triton").loss.backward()
    long = torch.zeros(2, 1024 + tokens)
    sk.gae(long, long, long == 0, backend="triton")
    sk.whiten(x[None], x[None] == 0, backend="triton")
    sk.group_advantages(x, torch.zeros(tokens, dtype=torch.int64), backend="triton")

def elementwise(dtype):
    x, cu_seqlens = torch.zeros(4096, dtype=getattr(torch, dtype)), torch.tensor([0, 4096], dtype=torch.int32)
    given = {"mask": x == 0, "cu_seqlens": cu_seqlens, "aggregation": "seq-mean-token-mean", "backend": "triton"}
    sk.policy_loss(x, x, x[:1], rollout_logprobs=x, rollout_correction="sequence_mask", **given)
    sk.whiten(x, x == 0, backend="triton")

ptx_cases = [Case("linear", json.dumps([n, v, mode]), lambda n=n, v=v, mode=mode: linear(n, v, mode))
         for mode in ("recompute", "cache", "sparse") for n, v in ((33, 97), (33, 50_257), (33, 151_936))]
ptx_cases += [Case("cache", json.dumps([33, v, "cache with a group"]), lambda v=v: cache_with_a_group(33, v))
              for v in (50_257, 151_936)]
ptx_cases += [Case("elementwise", json.dumps([4096, dtype]), lambda dtype=dtype: elementwise(dtype))
              for dtype in ("float32", "bfloat16")]
counts = [2, 32, 33, 100]
count_cases = [Case("linear", f"tokens {n}", lambda n=n: linear(n, 512, "cache")) for n in counts]
count_cases += [Case("linear", f"cached {n}", lambda n=n: linear(100, 512, "cache", logits_budget_bytes=n * 1024))
                for n in (1, 2, 4, 32, 33)]
count_cases += [Case("cache", f"tokens {n}", lambda n=n: cache_with_a_group(n, 512)) for n in counts]
count_cases += [Case("others", f"tokens {n}", lambda n=n: other_ops(n)) for n in counts]

def ptx(launch):
    source = triton.compiler.ASTSource(kernel_of(launch), launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options).asm["ptx"]

code = [[launch.module, launch.kernel, launch.case, ptx(launch)] for launch in launches(ptx_cases, ["sm_90"])]
variants = [[launch.module, launch.kernel, launch.case] for launch in launches(count_cases, ["sm_90"])]
json.dump({"ptx": code, "variants": variants}, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    """PTX of every kernel, and the variants that different numbers of tokens compile."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROGRAM]
    completed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def ptx_of(compiled, kernel, *variant):
    """Return the code of a kernel that a case compiles first, named by the vocabulary and perhaps the mode."""
    return next(
        ptx
        for _, name, case, ptx in compiled["ptx"]
        if name == kernel and tuple(json.loads(case)[1 : 1 + len(variant)]) == variant
    )


def float_instructions_of_first_loop(ptx):
    """Count the instructions on float32 from the target of the first branch back to that branch."""
    lines, labels = [line.strip() for line in ptx.splitlines()], {}
    for i, line in enumerate(lines):
        if match := re.match(r"(\$L\w+):", line):
            labels[match[1]] = i
        branch = re.search(r"bra(?:\.uni)?\s+(\$L\w+);", line)
        if branch and branch[1] in labels:
            opcodes = (re.sub(r"^@!?%\w+\s+", "", line).split(" ")[0] for line in lines[labels[branch[1]] : i])
            return Counter(opcode for opcode in opcodes if opcode.endswith(".f32"))
    raise AssertionError("no loop")


@pytest.mark.slow
def test_selection_reads_a_row_once(compiled):
    """With one pass no thread overwrites a candidate of another; row statistics come from the forward pass."""
    kernels = [name for _, name, case, _ in compiled["ptx"] if json.loads(case) == [33, 97, "sparse"]]
    assert kernels[:3] == [
        "selective_logprobs_fwd_kernel",
        "linear_logprobs_candidates_kernel",
        "linear_logprobs_select_kernel",
    ]
    assert kernels.count("selective_logprobs_fwd_kernel") == 1


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [151_936, 50_257])
def test_what_is_left_for_later_does_not_change_the_sums(compiled, vocab):
    """Probabilities and maxima add instructions to the loop, but none of a product and a sum, nor change how they fuse.

    So the bits of log-probabilities and entropies do not depend on what a call keeps for backward.
    """
    plain, cached, maxima = (
        float_instructions_of_first_loop(ptx_of(compiled, "selective_logprobs_fwd_kernel", vocab, mode))
        for mode in ("recompute", "cache", "sparse")
    )
    assert plain["fma.rn.f32"] >= 8
    assert plain - cached == plain - maxima == Counter()
    assert set(cached - plain) == {"sub.f32", "mul.f32", "ex2.approx.ftz.f32", "cvt.rn.bf16x2.f32"}
    assert set(maxima - plain) == {"sub.f32", "max.f32"}


ROW_PASSES = [
    "selective_logprobs_fwd_kernel",
    "selective_logprobs_bwd_kernel",
    "linear_logprobs_cache_kernel",
    "linear_logprobs_candidates_kernel",
]


@pytest.mark.parametrize("kernel", ROW_PASSES)
@pytest.mark.parametrize("vocab", [151_936, 50_257])
def test_row_passes_load_and_store_16_bytes_at_a_time(compiled, kernel, vocab):
    """Token counts, strides and masks do not hide the row alignment from the compiler."""
    code = ptx_of(compiled, kernel, vocab)
    assert "ld.global.v4.b32" in code
    assert "candidates" in kernel or kernel == "selective_logprobs_fwd_kernel" or "st.global.v4.b32" in code


@pytest.mark.parametrize("vocab", [151_936, 50_257])
def test_the_forward_pass_stores_16_bytes_of_probabilities_at_a_time(compiled, vocab):
    code = ptx_of(compiled, "selective_logprobs_fwd_kernel", vocab, "cache")
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "kernel",
    ["policy_loss_sums_kernel", "policy_loss_fwd_bwd_kernel", "whiten_moments_kernel", "whiten_normalize_kernel"],
)
def test_full_blocks_load_and_store_16_bytes_at_a_time(compiled, kernel, dtype):
    """Bounds and masks are applied to the values, not to the loads; byte masks are 8 at once."""
    code = ptx_of(compiled, kernel, dtype)
    assert "ld.global.v4.b32" in code
    assert "ld.global.v2.b32" in code or "ld.global.b64" in code or kernel.startswith("whiten")
    assert "sums" in kernel or "moments" in kernel or "st.global.v4.b32" in code


def test_other_token_and_sequence_counts_do_not_recompile(compiled):
    variants = defaultdict(list)
    for module, kernel, case in compiled["variants"]:
        variants[f"{module}.{kernel}"].append(case)
    assert {name.rpartition(".")[2] for name in variants} >= {
        "selective_logprobs_fwd_kernel",
        "selective_logprobs_bwd_kernel",
        "linear_logprobs_cache_kernel",
        "linear_logprobs_scaled_rows_kernel",
        "linear_logprobs_weighted_rows_kernel",
        "linear_logprobs_open_rows_kernel",
    }
    recompiled = {name: cases for name, cases in variants.items() if len(cases) > EXPECTED.get(name, 1)}
    assert recompiled == {}


# Variants of kernels that are launched with different dtypes, with and without some arguments, or at two levels.
EXPECTED = {
    # with a cache and without one, and short rows of selective_logprobs
    "sppo_kernels.ops.row_passes.triton.forward.selective_logprobs_fwd_kernel": 3,
    # one temperature for all tokens and those of some, and float32 gradients of selective_logprobs
    "sppo_kernels.ops.row_passes.triton.backward.selective_logprobs_bwd_kernel": 3,
    # d hidden without the labels and with them, and the factor of d weight
    "sppo_kernels.ops.linear_logprobs.scaled_rows.linear_logprobs_scaled_rows_kernel": 3,
    "sppo_kernels.ops.policy_loss.triton.policy_loss_fwd_bwd_kernel": 2,  # at token level and at sequence level
}
