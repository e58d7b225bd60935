"""The time model against hand-computed numbers, and what is recorded of whole operations."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch

from benchmarks.compile import projection_predictions
from benchmarks.compile.binaries import Binary, Hot
from benchmarks.compile.calls import (
    ENTRIES,
    RECORDERS,
    SUPPORT,
    SUPPORTED,
    Call,
    RecordedLaunch,
    linear_logprobs_call,
)
from benchmarks.compile.launches import Launch
from benchmarks.compile.predictions import PredictedCall, tables, work_of
from benchmarks.compile.products import Product
from benchmarks.compile.time_model import GPU, H100, Prediction, Work, predict
from benchmarks.harness.problem import ProblemSize

# Round numbers: an SM reads 1 GB/s and each of its 4 schedulers issues 1e9 instructions per second.
TOY = GPU(
    name="toy", target="sm_90", multiprocessors=10, clock=1e9, bandwidth=1e10, product_rate=1e12,
    load_latency=0.0, launch=0.0,
)  # fmt: skip


def binary(*, counts: dict[str, int], outside: int = 0, warps: int = 4, programs: int = 2) -> Binary:
    launch = Launch("op", "case", "module", "k_kernel", "sm_90", {}, {}, {}, {"num_warps": warps, "num_stages": 3})
    hot = Hot(True, elements=1024, counts=counts, outside=outside, barriers=0, load_width=16, store_width=0)
    return Binary(launch, registers=32, programs_per_sm=programs, occupancy=1.0, hot=hot)


def test_a_kernel_of_few_instructions_is_bound_by_memory():
    """20 programs of 1 MB on 10 SMs: 2 MB each at 1 GB/s."""
    found = predict(binary(counts={"fp32": 10}), Work(programs=20, passes=1, bytes=20e6), TOY)
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(2e-3)
    assert found.waves == 1.0


def test_a_kernel_of_many_instructions_is_bound_by_issue():
    """4 warps x (500 + 10 x 100) instructions at 4e9 per second, two programs on each SM."""
    code = binary(counts={"fp32": 100}, outside=500)
    found = predict(code, Work(programs=20, passes=10, bytes=20), TOY)
    assert found.bound == "issue"
    assert found.seconds == found.issue == pytest.approx(2 * 4 * 1500 / 4e9)


def test_special_functions_take_eight_cycles():
    code = binary(counts={"fp32": 60, "special": 20})
    found = predict(code, Work(programs=20, passes=10, bytes=20), TOY)
    assert found.bound == "special"
    assert found.special == pytest.approx(2 * 4 * 10 * 20 * 8 / 4e9)


def test_a_lone_program_is_bound_by_latency():
    """Each of 100 passes waits 1 us for memory and then issues 100 instructions, at one per ns."""
    slow = TOY._replace(load_latency=1e-6, launch=5e-6)
    found = predict(binary(counts={"fp32": 100}), Work(programs=10, passes=100, bytes=10), slow)
    assert found.bound == "latency"
    assert found.seconds == pytest.approx(5e-6 + 100 * 1.1e-6)


def test_a_last_wave_with_fewer_programs_takes_less():
    code = binary(counts={"fp32": 100})
    whole, one_more = (predict(code, Work(programs=n, passes=10, bytes=n), TOY).seconds for n in (20, 21))
    assert one_more == pytest.approx(1.5 * whole)  # 2 programs on each SM, then 1 on one of them


def test_code_for_another_gpu_is_refused():
    with pytest.raises(ValueError, match="k_kernel for sm_90"):
        predict(binary(counts={}), Work(1, 1, 1), TOY._replace(target="sm_80"))
    with pytest.raises(ValueError, match="0 programs per SM"):
        predict(replace(binary(counts={}), programs_per_sm=0), Work(1, 1, 1), TOY)


SIZE = ProblemSize(2048, 1024, 8192)
ONE_PASS = 2 * 2048 * 1024 * 8192


@pytest.mark.parametrize(
    ("operation", "passes", "row_passes"),
    [
        ("linear_logprobs, cache", 3, [4 + 2]),
        ("linear_logprobs, recompute", 4, [4, 4 + 2]),
        ("linear_policy_loss", 3, [4 + 2]),
        ("linear_logprobs, sparse", 1, [4 + 1 / 2]),
    ],
)
def test_products_and_row_passes_are_recorded(operation, passes, row_passes):
    """Row passes in bytes per logit. The gradient of the weight is made in its own dtype, and never cast."""
    call = RECORDERS[operation](SIZE)
    assert call.flops == passes * ONE_PASS
    rows = [each for each in call.launches if each.kernel.__name__.startswith("selective_logprobs")]
    found = [each.bytes / SIZE.tokens / SIZE.vocab for each in rows]
    assert found == pytest.approx(row_passes, rel=0.05)
    weight = 2 * SIZE.vocab * SIZE.hidden
    is_sparse = operation.endswith("sparse")  # then it is zeroed first, and the lists of entries are made and sorted
    assert weight * is_sparse <= call.other_bytes < (3 if is_sparse else 1) * weight + 4 * SIZE.tokens * SIZE.hidden


def test_rows_that_are_gathered_count_alone():
    """Of the weight "cache" reads the rows of the labels, and adds hidden states to as many rows of its gradient."""
    launches = {each.kernel.__name__: each for each in RECORDERS["linear_logprobs, cache"](SIZE).launches}
    row = 2 * SIZE.hidden
    scaled, weighted, opened = (launches[f"linear_logprobs_{name}_kernel"] for name in ("scaled_rows", "weighted_rows",
                                                                                       "open_rows"))  # fmt: skip
    assert scaled.bytes == pytest.approx(SIZE.tokens * 2 * row, rel=0.02)  # hidden states, for d weight
    assert weighted.bytes == pytest.approx(SIZE.tokens * 3 * row, rel=0.02)
    assert opened.bytes < weighted.bytes / 10
    # One row per pass, in pieces of 64.
    assert work_of(weighted, binary(counts={"fp32": 1})).passes == 64


def test_entries_are_assumed_for_each_token():
    launches = RECORDERS["linear_logprobs, sparse"](SIZE).launches
    weighted = [each for each in launches if each.kernel.__name__ == "linear_logprobs_weighted_rows_kernel"]
    assert [each.arguments["M"] for each in weighted] == [ENTRIES * SIZE.tokens] * 2
    candidates = next(each for each in launches if each.kernel.__name__ == "linear_logprobs_candidates_kernel")
    per_token = SIZE.vocab / 2 + ENTRIES * (16 + 8 + 4)
    assert candidates.bytes == pytest.approx(SIZE.tokens * per_token, rel=0.02)


def test_a_support_reads_a_row_of_the_weight_per_entry_and_has_no_products():
    call = RECORDERS[SUPPORTED](SIZE)
    assert call.flops == 0
    launches = {each.kernel.__name__: each for each in call.launches}
    rows = 2 * SUPPORT * SIZE.tokens * SIZE.hidden
    entry_logits = launches["linear_logprobs_entry_logits_kernel"]
    assert entry_logits.bytes == pytest.approx(rows + 2 * SIZE.tokens * SIZE.hidden, rel=0.02)
    # Both gradients gather as many rows. That of the hidden states is summed in float32, d weight in its own dtype.
    weighted = [each for each in call.launches if each.kernel.__name__ == "linear_logprobs_weighted_rows_kernel"]
    of_hidden, of_weight = (each.bytes for each in weighted)
    assert of_hidden == pytest.approx(rows + 4 * SIZE.tokens * SIZE.hidden, rel=0.02)
    assert of_weight == pytest.approx(rows + 2 * SIZE.vocab * SIZE.hidden, rel=0.02)
    assert launches["support_fwd_kernel"].bytes < rows / 50
    assert launches["support_bwd_kernel"].bytes < rows / 50


def test_sums_that_begin_at_zero_are_not_read():
    launches = RECORDERS["linear_logprobs, sparse"](SIZE).launches
    weighted = [each for each in launches if each.kernel.__name__ == "linear_logprobs_weighted_rows_kernel"]
    assert all(each.arguments["OUT_IS_ZERO"] for each in weighted)
    for each in weighted:
        out = min(ENTRIES * SIZE.tokens * SIZE.hidden, each.arguments["out_ptr"].numel())
        more = replace(each, arguments={**each.arguments, "OUT_IS_ZERO": False}).bytes - each.bytes
        assert more == out * each.arguments["out_ptr"].itemsize


def test_row_passes_of_given_logits_are_recorded():
    call = RECORDERS["selective_logprobs"](SIZE)
    assert call.flops == 0
    assert [round(each.bytes / SIZE.tokens / SIZE.vocab) for each in call.launches] == [2, 4]


def test_long_responses_are_split_over_programs():
    size = ProblemSize(8192, 0, 0)
    (launch,) = RECORDERS["policy_loss, token"](size).launches
    work = work_of(launch, binary(counts={"fp32": 1}))
    assert work.passes == 1
    assert 8192 // 1024 < work.programs <= 8192 // 1024 + 4


def test_the_work_of_a_launch_is_shared_by_its_programs():
    launch = RecordedLaunch(None, (4, 2), {"x_ptr": torch.empty(64, 1000), "V": 1000})
    assert work_of(launch, binary(counts={})) == Work(programs=8, passes=8, bytes=256_000)


def test_the_time_of_a_call_is_the_sum_of_its_parts():
    each = Prediction(0.002, memory=0.002, issue=0.001, special=0.0, latency=0.0, waves=3.0)
    call = PredictedCall(
        "op", SIZE, Call([], flops=720e12 / 100, other_bytes=2.85e9), [("a", each)] * 2 + [("b", each)]
    )
    row = call.row(H100)
    assert {name: row[name] for name in ("products", "kernels", "other", "total")} == pytest.approx(
        {"products": 10.0, "kernels": 6.0, "other": 1.0, "total": 17.0}
    )
    assert row["over_products"] == pytest.approx(1.7)
    first, second = call.kernel_rows()
    assert (first["kernel"], first["launches"], first["bound"]) == ("a", 2, "memory")
    assert (first["ms"], second["ms"]) == pytest.approx((4.0, 2.0))
    assert max(map(len, tables([row], [first, second]).split("\n"))) <= 120


# The fused projection


def fused_launch(**arguments) -> RecordedLaunch:
    given = {
        "N": 1024,
        "V": 2000,
        "H": 100,
        "R": 100,
        "adapter_hidden": None,
        "out": None,
        "BLOCK_N": 256,
        "BLOCK_V": 128,
    }
    return RecordedLaunch(None, (64,), {**given, **arguments})


def fused_binary(outside: int, special: int = 0) -> Binary:
    launch = Launch("op", "case", "module", "k_kernel", "sm_90", {}, {}, {}, {"num_warps": 8, "num_stages": 3})
    return Binary(launch, product=Product(10, outside, elements=128.0, special=special, found={"HGMMA": 8}))


def test_the_time_of_a_fused_projection_is_that_of_its_parts():
    """4 x 16 tiles on 10 SMs, at 2 instructions per element; the main loop's rate is the vendor's times 0.5."""
    found = projection_predictions.fused_time(fused_binary(256), fused_launch(), TOY)
    assert found.main == pytest.approx(2 * 1024 * 2000 * 100 / 1e12)
    assert found.finishing == pytest.approx(7 * 256 * 128 * 2 / 128 / 1e9)
    assert found.writing == 0
    assert found.total(0.5, TOY) == pytest.approx(2 * found.main + found.finishing)
    # A special function takes 8 cycles.
    slow = projection_predictions.fused_time(fused_binary(256, special=128), fused_launch(), TOY)
    assert slow.finishing == pytest.approx(4 * found.finishing)


def test_an_adapter_and_what_is_written_take_time():
    given = fused_launch(R=50, adapter_hidden="present", out=torch.empty(1024, 2000, dtype=torch.bfloat16))
    found = projection_predictions.fused_time(fused_binary(256), given, TOY)
    assert found.main == pytest.approx(2 * 1024 * 2000 * 150 / 1e12)
    assert found.writing == pytest.approx(2 * 1024 * 2000 / 1e10)
    with pytest.raises(ValueError, match="must be a product for sm_90"):
        projection_predictions.fused_time(binary(counts={}), given, TOY)


def test_the_fused_projection_is_recorded_in_place_of_one_product():
    vendor, fused = (linear_logprobs_call(SIZE, "cache", projection=name) for name in ("vendor", "fused"))
    assert (vendor.flops, fused.flops) == (3 * ONE_PASS, 2 * ONE_PASS)
    names = {each.kernel.__name__ for each in fused.launches}
    assert "linear_logprobs_projection_kernel" in names
    assert "selective_logprobs_fwd_kernel" not in names
    (launch,) = [each for each in fused.launches if "projection" in each.kernel.__name__]
    assert (launch.arguments["N"], launch.arguments["V"], launch.arguments["BLOCK_N"]) == (SIZE.tokens, SIZE.vocab, 256)
    assert fused.other_operations > vendor.other_operations
    scoring = linear_logprobs_call(SIZE, "recompute", projection="fused", gradients=False)
    assert scoring.flops == 0


def head(hidden: int, vendor: float, *fused: float, part: str = "forward") -> dict:
    times = {f"fused_at_{efficiency}": ms for efficiency, ms in zip((1.0, 0.9, 0.8), fused, strict=True)}
    return {
        "head": "x", "part": part, "tokens": 8192, "hidden": hidden, "vocab": 151_936, "vendor": vendor, **times,
        "vendor_products": 1.0, "fused_finishing": 1.0, "fused_writing": 1.0, "instructions_per_element": 14.0,
        "vendor_small_operations": 17, "fused_small_operations": 115,
    }  # fmt: skip


def test_break_even_is_where_the_line_through_the_heads_is_zero():
    rows = [head(1000, 10.0, 9.0, 9.5, 12.0), head(2000, 20.0, 19.0, 20.0, 23.0), head(4000, 40.0, 39.0, 41.0, 44.0)]
    (found,) = projection_predictions.break_even(rows)
    assert found == {
        "part": "forward", "fused_at_1.0": "at every H", "fused_at_0.9": "below H = 2,000", "fused_at_0.8": "at no H"
    }  # fmt: skip
    assert max(map(len, projection_predictions.tables(rows).split("\n"))) <= 120
    assert projection_predictions.break_even([]) == []
