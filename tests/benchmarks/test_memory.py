"""The memory report: its limits hold, bytes are counted right, and it would say so if a limit were passed."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")


from benchmarks import memory
from benchmarks.__main__ import main
from benchmarks.harness.allocations import GIB, Allocations
from benchmarks.memory import (
    FULL,
    SETTINGS,
    Setting,
    Size,
    eager_peak,
    linear_logprobs_peak,
    linear_policy_loss_peak,
    masked_peak,
)
from sppo_kernels.ops.linear_logprobs.matmul import row_stride


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.enable_grad], ids=["fake", "real"])
def test_bytes_are_counted(mode):
    with mode():
        x = torch.empty(1000, requires_grad=True)
        with Allocations([x]) as allocations:
            a = x.detach() * 2  # 4,000 bytes
            b = a + 1  # 8,000
            del a  # 4,000
            b.view(10, 100).mul_(2)  # neither a view nor writing in place takes any
            assert allocations.peak() == 8000
            saved = x.exp()  # 8,000
            total = saved.sum()  # 8,004
            del saved  # autograd still has it
            c = b.double()  # 16,004
            assert allocations.peak() == 16_004
            assert allocations.peak(apart_from=[c]) == 8004
            assert allocations.peak(apart_from=[b, c, total]) == 4000
            del b, c, total  # 0
            d = torch.empty(3000)  # 12,000, be it where something was before
            assert allocations.peak(apart_from=[d]) == 8004 + 8000


def test_recompute_holds_a_block_of_columns():
    """4,096 columns: float32 logits and bfloat16 gradients. d weight is made in its own dtype, in place."""
    tokens, hidden, vocab = size = Size(4096, 64, 50_000)
    peak, kept = linear_logprobs_peak(size, Setting(chunk_bytes=1024 * row_stride(vocab) * 3))
    assert kept == 0
    least = tokens * 4096 * (4 + 2)
    assert least < peak < least + 20 * tokens * hidden


def test_recompute_of_many_tokens_holds_a_block_of_tokens_and_the_gradient_of_the_weight():
    """In one block: E in bfloat16, float32 logits of a quarter of it, d weight in float32; little else."""
    tokens, hidden, vocab = size = Size(8192, 64, 50_000)
    block = 1024 * row_stride(vocab) * 3
    peak, kept = linear_logprobs_peak(size, Setting(chunk_bytes=block))
    assert kept == 0
    least = block + vocab * hidden * 4
    assert least < peak < least + 20 * tokens * hidden


def test_forward_holds_one_chunk_of_logits():
    tokens, hidden, vocab = size = Size(4096, 64, 50_000)
    block = 1024 * row_stride(vocab) * 3
    peak, _ = linear_logprobs_peak(size, Setting(chunk_bytes=block, gradients=False))
    assert block // 3 < peak < block // 3 + 20 * tokens * hidden


def test_cache_holds_what_it_keeps():
    tokens, _, vocab = size = Size(1024, 64, 50_000)
    peak, kept = linear_logprobs_peak(size, Setting(backward="cache"))
    assert kept == tokens * row_stride(vocab) * 2
    assert kept < peak < kept + tokens * row_stride(vocab) * 4 + 1e6  # while the one chunk of logits is there
    _, part = linear_logprobs_peak(
        size, Setting(backward="cache", logits_budget_bytes=300 * row_stride(50_000) * 2 + 1)
    )
    assert part == 300 * row_stride(50_000) * 2


def test_kept_blocks_are_bounded_by_the_chunk_too():
    """Of a small vocabulary the hidden states are most of what a block holds."""
    tokens, hidden, vocab = size = Size(65_536, 4096, 1000)
    chunk = 2**26
    peak, kept = linear_logprobs_peak(size, Setting(backward="cache", chunk_bytes=chunk))
    assert kept == tokens * row_stride(vocab) * 2
    assert peak < kept + 4 * vocab * hidden + chunk + 60 * tokens


def test_a_support_holds_no_logits_but_its_own():
    """The float32 gradient of the hidden states, and some numbers per entry."""
    tokens, hidden, _ = size = Size(4096, 64, 50_000)
    peak, kept = linear_logprobs_peak(size, Setting(support=20))
    assert kept == 0
    assert peak < tokens * (8 * hidden + 20 * 120)
    assert 3 * 4 * tokens * size.vocab < masked_peak(size) < 3.5 * 4 * tokens * size.vocab


def test_the_fused_forward_holds_no_logits():
    """The parts of a block of tokens and its hidden states, at most 64 MB, and some numbers per token."""
    peak, kept = linear_logprobs_peak(FULL, Setting(gradients=False, projection="fused"))
    assert kept == 0
    assert peak < GIB // 10
    assert peak < (1 << 26) + 60 * FULL.tokens
    assert peak < linear_logprobs_peak(FULL, Setting(gradients=False))[0] / 10


def test_the_fused_projection_keeps_as_much_and_holds_less():
    size = Size(8192, 64, 50_000)
    for setting in (Setting(), Setting(backward="cache")):
        vendor, fused = (
            linear_logprobs_peak(size, setting._replace(projection=projection)) for projection in ("vendor", "fused")
        )
        assert fused[1] == vendor[1]
        assert fused[0] < vendor[0]
    assert linear_policy_loss_peak(size, "fused") < linear_policy_loss_peak(size)


def test_the_loss_in_one_call_keeps_one_block():
    """Of 4,096 tokens the probabilities, float32 logits and hidden states of a quarter of them; d weight in float32."""
    block = 4096 * row_stride(FULL.vocab) * (2 + 1) + 1024 * FULL.hidden * 2
    least = block + FULL.vocab * FULL.hidden * 4
    assert least < linear_policy_loss_peak(FULL) < least + 80 * FULL.tokens


def test_eager_needs_three_float32_tensors_of_logits():
    logits = FULL.tokens * FULL.vocab * 4
    assert 3 * logits < eager_peak(FULL, entropy_gradient=False) < 3.01 * logits
    assert eager_peak(FULL, entropy_gradient=True) > 4 * logits


@pytest.mark.slow
def test_limits_hold(tmp_path, capsys):
    assert main(["memory", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "memory.json").read_text())
    assert report["failures"] == []
    limited = {row["case"]: row for row in report["rows"] if row["limit_bytes"]}
    assert {case: round(row["limit_bytes"] / GIB, 3) for case, row in limited.items()} == {
        "forward without gradients": 1,
        "recompute": 1.5,
        "recompute, chunk_bytes=2**28": 2.5,
        "support of 20": 1,
        "fused, forward without gradients": 0.1,
        "fused, recompute": 1,
        "linear_policy_loss": 4,
        "fused, linear_policy_loss": 4,
    }
    assert all(0 < row["peak_bytes"] <= row["limit_bytes"] for row in limited.values())
    assert "of it, kept" in capsys.readouterr().out


def test_a_passed_limit_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SETTINGS", {"too large": SETTINGS["recompute"]._replace(chunk_bytes=2**34)})
    assert main(["memory", "--out", str(tmp_path)]) == 1
    (failure,) = json.loads((tmp_path / "memory.json").read_text())["failures"]
    assert failure.startswith("too large")
    assert failure in capsys.readouterr().err


@pytest.mark.slow
def test_quick_is_the_smaller_size(tmp_path):
    assert main(["memory", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert {row["tokens"] for row in rows} == {8192}
