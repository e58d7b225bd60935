"""What Triton compiles the kernels to, for a GPU that need not be there.

Kernels are launched and compiled in a process without TRITON_INTERPRET: where it is set, nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
import torch, triton
import sppo_kernels as ours
from benchmarks.compile.launches import Case, TARGETS, kernel_of, launches

def linear(tokens, vocab, backward):
    hidden, weight = (torch.zeros(n, 64, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, vocab))
    labels = torch.zeros(tokens, dtype=torch.int64)
    out = ours.linear_logprobs(hidden, weight, labels, backward=backward, backend="triton")
    out.logprobs.sum().backward(retain_graph=True)
    out.entropy.sum().backward()

def others(tokens):
    x = torch.zeros(tokens)
    logits = torch.zeros(tokens, 64, requires_grad=True)
    ours.selective_logprobs(logits, torch.zeros(tokens, dtype=torch.int64), backend="triton").logprobs.sum().backward()
    cu_seqlens = torch.arange(tokens + 1, dtype=torch.int32)
    ours.policy_loss(x.clone().requires_grad_(), x, x, cu_seqlens=cu_seqlens, backend="triton").loss.backward()
    hidden, weight = torch.zeros(tokens, 64, requires_grad=True), torch.zeros(64, requires_grad=True)
    last_index = torch.arange(tokens)
    ours.prompt_value_loss(hidden, weight, last_index, x, backend="triton").loss.backward()
    long = torch.zeros(2, 1024 + tokens)
    ours.gae(long, long, long == 0, backend="triton")
    ours.whiten(x[None], x[None] == 0, backend="triton")
    ours.group_advantages(x, torch.zeros(tokens, dtype=torch.int64), backend="triton")

cases = [Case("linear", json.dumps([n, v, mode]), lambda n=n, v=v, mode=mode: linear(n, v, mode))
         for mode in ("recompute", "cache", "sparse") for n, v in ((33, 97), (33, 50_257), (33, 151_936))]
counts = [2, 32, 33, 100]
counted = [Case("linear", f"tokens {n}", lambda n=n: linear(n, 512, "cache")) for n in counts]
counted += [Case("others", f"tokens {n}", lambda n=n: others(n)) for n in counts]

def ptx(launch):
    source = triton.compiler.ASTSource(kernel_of(launch), launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=TARGETS[launch.target].gpu, options=launch.options).asm["ptx"]

compiled = [[launch.module, launch.kernel, launch.case, ptx(launch)] for launch in launches(cases, ["sm_90"])]
kinds = [[launch.module, launch.kernel, launch.case] for launch in launches(counted, ["sm_90"])]
json.dump({"compiled": compiled, "kinds": kinds}, sys.stdout)
"""


@pytest.fixture(scope="module")
def built():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def code_of(built, kernel, vocab):
    (code,) = [ptx for _, name, case, ptx in built["compiled"] if name == kernel and json.loads(case)[1] == vocab][:1]
    return code


def test_selection_stores_what_it_notes_once(built):
    """Selection reads a row once, so no thread overwrites another's store; the forward pass computes the statistics."""
    kernels = [name for _, name, case, _ in built["compiled"] if json.loads(case) == [33, 97, "sparse"]]
    assert kernels[:2] == ["linear_logprobs_candidates_kernel", "linear_logprobs_select_kernel"]
    assert (
        "selective_logprobs_fwd_kernel" not in kernels
    )  # the same binary as without selection, so that bits are the same


ROW_PASSES = [
    "selective_logprobs_fwd_kernel",
    "selective_logprobs_bwd_kernel",
    "linear_logprobs_logit_grads_kernel",
    "linear_logprobs_candidates_kernel",
]


@pytest.mark.parametrize("kernel", ROW_PASSES)
@pytest.mark.parametrize("vocab", [151_936, 50_257])
def test_row_passes_load_and_store_16_bytes_at_a_time(built, kernel, vocab):
    """The alignment of rows reaches the compiler: no count of tokens, stride or mask hides it."""
    code = code_of(built, kernel, vocab)
    assert "ld.global.v4.b32" in code
    assert "candidates" in kernel or kernel == "selective_logprobs_fwd_kernel" or "st.global.v4.b32" in code


def test_new_token_counts_compile_nothing_again(built):
    kinds = defaultdict(list)
    for module, kernel, case in built["kinds"]:
        kinds[f"{module}.{kernel}"].append(case)
    assert {name.rpartition(".")[2] for name in kinds} >= {
        "selective_logprobs_fwd_kernel",
        "selective_logprobs_bwd_kernel",
        "linear_logprobs_logit_grads_kernel",
    }
    recompiled = {name: cases for name, cases in kinds.items() if len(cases) > EXPECTED.get(name, 1)}
    assert recompiled == {}


# Of one kernel there is another kind where it is launched from another operation, on other dtypes.
EXPECTED = {
    "sppo_kernels.ops._row_kernels.selective_logprobs_fwd_kernel": 2,
    "sppo_kernels.ops._row_kernels.selective_logprobs_bwd_kernel": 2,
}
