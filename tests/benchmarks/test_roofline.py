"""The roofline suite: made-up events become rows whose rates are those of a calculation by hand."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

pytest.importorskip("triton")

from benchmarks import roofline
from benchmarks.harness import timing
from benchmarks.harness.cases import BASE
from benchmarks.harness.problem import IGNORE_INDEX
from benchmarks.roofline.profiling import LINEAR_POLICY_LOSS, Event, Product, Profile, Sizes, events_of, products_of
from benchmarks.roofline.rows import BYTES, CALL, IDLE, is_our_kernel, is_product, relate, rows_of, short_name
from benchmarks.roofline.terminal_table import folded

CPU = torch.device("cpu")
GEMM = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
XMMA = "sm90_xmma_gemm_bf16f32_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel"
COPY = (
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda"
    "(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda(float)#1}>>(int)"
)
FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >(int)"
SCALED, WEIGHTED = "linear_logprobs_scaled_rows_kernel", "linear_logprobs_weighted_rows_kernel"
CEILINGS = {"copy_gb_s": 3000.0, "matmul_tflops": 800.0}
SIZES = Sizes(BASE.tokens, BASE.hidden, BASE.vocab, itemsize=2, cached=BASE.tokens, labels=8000)
ONE = 2 * 8192 * 4096 * 151_936  # operations of a product of all tokens with the output embedding


def product(m, k, n, us, *, name=GEMM, others=()):
    return Product(m, k, n, (Event(name, us), *others))


def cache_profile(calls=2):
    """Of cache at BASE: logits in eight chunks, the other two products in one piece each."""
    products = [product(1024, 4096, 151_936, 1775.0) for _ in range(8)]
    products += [product(8192, 151_936, 4096, 14_000.0), product(151_936, 8192, 4096, 14_400.0, name=XMMA)]
    passes = [Event("selective_logprobs_fwd_kernel", 350.0)] * 8 + [Event(SCALED, 75.0)] * 2 + [Event(WEIGHTED, 1850.0)]
    rest = [
        Event(COPY, 1300.0),
        Event(FILL, 10.0),
        Event("Memset (Device)", 2.0),
        Event("Memcpy DtoD (Device -> X)", 8),
    ]
    events = [event for one in products for event in one.kernels] + passes + rest
    return Profile(events * calls, products * calls, calls, wall_ms=50.0, flops=3.0 * ONE)


def by_kernel(rows):
    return {row["kernel"]: row for row in rows}


def test_the_rates_of_cache_are_those_by_hand():
    rows, problems = rows_of("cache", cache_profile(), SIZES, ("selective_logprobs_fwd_kernel", SCALED, WEIGHTED))
    assert problems == []
    relate(rows, CEILINGS)
    found = by_kernel(rows)
    # 8,192 x 151,936 logits of 4 bytes, and probabilities of 2: 7.468 GB in 2.8 ms
    forward = found["selective_logprobs_fwd_kernel"]
    assert (forward["launches"], forward["ms"], forward["bytes"]) == (8, pytest.approx(2.8), 7_467_958_272)
    assert forward["gb_s"] == pytest.approx(2667.1, rel=1e-4)
    assert forward["of_copy"] == pytest.approx(0.88904, rel=1e-4)
    # 8,192 tokens: 6 + 2 + 4 bytes of each of 4,096 columns, and 36 of factors and places; 0.4029 GB in 0.15 ms
    assert found[SCALED]["gb_s"] == pytest.approx(2686.4, rel=1e-4)
    # 2 bytes of each column and 20 of the list per token, and 4 of 8,000 rows: 0.1983 GB in 1.85 ms
    assert found[WEIGHTED]["gb_s"] == pytest.approx(107.22, rel=1e-4)
    # 10.196 TFLOP in 14.2 ms, in 14.0 and in 14.4
    logits, weight = found[f"logits: {GEMM}"], found[f"d weight: {XMMA[:60]}"]
    assert (logits["launches"], logits["flops"]) == (8, ONE)
    assert logits["tflops"] == pytest.approx(718.05, rel=1e-4)
    assert logits["of_product"] == pytest.approx(0.89756, rel=1e-4)
    assert found[f"d hidden: {GEMM}"]["tflops"] == pytest.approx(728.31, rel=1e-4)
    assert weight["tflops"] == pytest.approx(708.08, rel=1e-4)
    assert found[CALL]["tflops"] == pytest.approx(611.77, rel=1e-4)


def test_rows_account_for_all_of_the_time():
    seen = cache_profile()
    rows, _ = rows_of("cache", seen, SIZES)
    *kernels, idle, call = rows
    busy = sum(event.us for event in seen.events) / 1000 / seen.calls
    assert sum(row["ms"] for row in kernels) == pytest.approx(busy)
    assert (idle["kernel"], call["kernel"], call["ms"]) == (IDLE, CALL, 50.0)
    assert idle["ms"] == pytest.approx(50.0 - busy)
    assert sum(row["of_call"] for row in [*kernels, idle]) == pytest.approx(1.0)
    assert sum(row["launches"] for row in kernels) == call["launches"] == len(seen.events) / seen.calls
    others = {row["kernel"] for row in kernels if "bytes" not in row and "flops" not in row}
    assert others == {
        "elementwise_kernel direct_copy_kernel_cuda", "vectorized_elementwise_kernel FillFunctor", "Memset",
        "Memcpy DtoD",
    }  # fmt: skip


def test_what_a_product_launches_besides_is_listed_with_it():
    others = (
        Event("void cublasLt::splitKreduce_kernel<32, 16, int, float>(int)", 100.0),
        Event("Memset (Device)", 3.0),
    )
    one = product(8192, 151_936, 4096, 14_000.0, others=others)
    seen = Profile([*one.kernels, Event("Memset (Device)", 5.0)], [one], 1, wall_ms=20.0, flops=float(ONE))
    rows, problems = rows_of("a product", seen, SIZES)
    assert problems == []
    found = by_kernel(rows)
    assert found[f"d hidden: {GEMM}"]["flops"] == ONE
    assert found["d hidden: splitKreduce_kernel"]["ms"] == pytest.approx(0.1)
    assert (found["d hidden: Memset"]["launches"], found["Memset"]["launches"]) == (1, 1)
    assert found["Memset"]["ms"] == pytest.approx(0.005)
    line = next(row for row in folded(rows, []) if row["kernel"].startswith("products"))
    assert line["ms"] == pytest.approx(14.103)


@pytest.mark.parametrize("without", ["shapes", "kernels"])
def test_without_shapes_all_products_share_the_operations(without):
    seen = cache_profile()
    bare = [] if without == "shapes" else [one._replace(kernels=()) for one in seen.products]
    rows, problems = rows_of("cache", seen._replace(products=bare), SIZES)
    assert problems == []
    found = by_kernel(rows)
    rate = 3 * ONE / 42.6e-3 / 1e12  # three products in 42.6 ms
    assert found[GEMM]["tflops"] == pytest.approx(rate)
    assert found[XMMA[:60]]["tflops"] == pytest.approx(rate)
    assert found[CALL]["flops"] == pytest.approx(3 * ONE)


def test_a_count_that_cannot_be_trusted_is_a_failure():
    seen = cache_profile()

    def why(**changes):
        return rows_of("cache", seen._replace(**changes), SIZES)[1]

    assert why(flops=4.0 * ONE) == ["products of 3.059e+13 operations by their shapes, 4.079e+13 by FlopCounterMode"]
    assert why(events=[*seen.events, Event("gae_fwd_kernel", 3.0)]) == [
        "nothing says how many bytes gae_fwd_kernel moves"
    ]
    some = [seen.products[0]._replace(kernels=()), *seen.products[1:]]
    assert why(products=some) == ["only some of its matrix products have kernels"]
    passes = [event for event in seen.events if is_our_kernel(event.name)]
    assert why(products=[], events=passes) == ["no kernel of its matrix products was found"]
    assert "the profiler saw nothing" in why(products=[], events=[])
    assert rows_of("cache", seen, SIZES, (SCALED, "linear_logprobs_select_kernel"))[1] == [
        "linear_logprobs_select_kernel was not launched"
    ]


def test_names_are_shortened():
    sort = "void cub::CUB_200802_SM_900::DeviceRadixSortOnesweepKernel<cub::Policy<long>, false, long>(long*)"
    scatter = "void at::native::(anonymous namespace)::indexSelectLargeIndex<float, long, unsigned int>(int)"
    assert short_name("linear_logprobs_weighted_rows_kernel") == "linear_logprobs_weighted_rows_kernel"
    assert short_name("policy_loss_fwd_bwd_kernel") == "policy_loss_fwd_bwd_kernel"
    assert short_name("selective_logprobs_fwd_kernel_0d1d2d") == "selective_logprobs_fwd_kernel"
    assert short_name(sort) == "DeviceRadixSortOnesweepKernel"
    assert short_name(scatter) == "indexSelectLargeIndex"
    assert short_name("Memcpy DtoH (Device -> Pageable)") == "Memcpy DtoH"
    assert short_name("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>(int)").startswith(
        "Kernel2 cutlass"
    )
    assert not is_our_kernel(short_name(COPY))
    assert all(map(is_product, (GEMM, XMMA, "void cutlass::Kernel2<cutlass_80_x>(int)", "aten::addmm")))
    assert not any(
        map(is_product, (COPY, FILL, sort, "selective_logprobs_fwd_kernel", "Memset (Device)", "aten::mm_like"))
    )


def test_every_expected_kernel_has_a_formula():
    assert {name for names in roofline.KERNELS.values() for name in names} <= set(BYTES)
    sizes = Sizes(10, 64, 1000, itemsize=2, cached=2, labels=1, recomputed=3, entries=50, columns=40)
    assert {name: formula(sizes, 2.0) for name, formula in BYTES.items()} == {
        "selective_logprobs_fwd_kernel": 40_000 + 4000 + 5000,
        "selective_logprobs_bwd_kernel": 18_000,
        "linear_logprobs_scaled_rows_kernel": 10 * (384 + 12) + 2 * (384 + 24),
        "linear_logprobs_candidates_kernel": 10 * 532 + 200,
        "linear_logprobs_select_kernel": 360 + 800,
        "linear_logprobs_weighted_rows_kernel": 2 * 50 * 148 + 5 * 256 + 40 * 512 + 2 * 148 + 256,
        "linear_logprobs_open_rows_kernel": 102 / 64 * 24,
        "policy_loss_fwd_bwd_kernel": 260,
    }


def test_the_profilers_events_are_read():
    def event(name, us, device=DeviceType.CUDA, shapes=(), kernels=(), annotation=False):
        return SimpleNamespace(
            name=name, device_type=device, is_user_annotation=annotation, input_shapes=shapes, kernels=kernels,
            time_range=SimpleNamespace(elapsed_us=lambda: us), self_cpu_time_total=us,
        )  # fmt: skip

    kernel = SimpleNamespace(name=GEMM, duration=9.0)
    seen = [
        event("aten::mm", 4.0, DeviceType.CPU, [[2, 3], [3, 5], []], [kernel]),
        event("aten::addmm", 4.0, DeviceType.CPU, [[2, 5], [2, 7], [7, 5], []], [kernel]),
        event("aten::add", 0.0, DeviceType.CPU, [[2, 5], [2, 5]]),
        event(GEMM, 9.0),
        event("a range", 99.0, annotation=True),
    ]
    assert events_of(seen, on_gpu=True) == [Event(GEMM, 9.0)]
    gpu = (Event(GEMM, 9.0),)
    assert products_of(seen, on_gpu=True) == [Product(2, 3, 5, gpu), Product(2, 7, 5, gpu)]
    on_cpu = products_of(seen, on_gpu=False)
    assert [one.kernels for one in on_cpu] == [(Event("aten::mm", 4.0),), (Event("aten::addmm", 4.0),)]


def rows_of_a_run(*names, extra=0):
    """Of cases that are alike but for many small kernels and one of more than a hundredth of a call."""
    rows = []
    for i, name in enumerate(names):
        small = [Event(f"void at::native::kernel_{k}<int>(int)", 20.0 + k + i) for k in range(extra)]
        seen = cache_profile(calls=1)
        rows += rows_of(name, seen._replace(events=[*seen.events, *small]), SIZES)[0]
    relate(rows, CEILINGS)
    return rows


def test_the_table_folds_what_is_small():
    rows = rows_of_a_run("one", "two", extra=12)
    large = [row for row in rows if row["of_call"] >= 0.01]
    first = [row for row in folded(rows, large) if row["case"] == "one"]
    assert [row["kernel"] for row in first] == [
        f"{CALL}, 0.974 ms idle",
        "products: logits 718, d hidden 728, d weight 708",
        "selective_logprobs_fwd_kernel",
        WEIGHTED,
        "elementwise_kernel direct_copy_kernel_cuda",
        "other: linear_logprobs_scaled_rows 0.150, kernel_11 0.031, 14 more",
    ]
    assert first[1]["of_product"] == pytest.approx(3 * ONE / 42.6e-3 / 800e12)
    assert first[0]["ms"] == pytest.approx(sum(row["ms"] for row in first[1:]) + 0.974)
    lines = roofline.table(rows).splitlines()
    assert len(lines) == 1 + 2 * 6
    assert [line.partition(" ")[0] for line in lines if not line.startswith(" ")] == ["one", "two"]


def test_the_table_of_all_cases_is_short_and_has_our_kernels_where_they_fit():
    rows = rows_of_a_run(*[case.name for case in roofline.cases(quick=False)], extra=12)
    lines = roofline.table(rows).splitlines()
    assert len(lines) <= 40
    assert sum("selective_logprobs_fwd_kernel  " in line for line in lines) == 8
    assert sum(f"{WEIGHTED}  " in line for line in lines) == 7  # the last is folded
    assert (
        sum(
            "other: linear_logprobs_weighted_rows 1.85, direct_copy_kernel_cuda 1.30, 16 more" in line for line in lines
        )
        == 1
    )
    assert not any("elementwise_kernel" in line for line in lines)
    assert max(map(len, lines)) <= 190


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """The suite on a CPU, where nothing is measured that takes long."""
    monkeypatch.setattr(timing, "ceilings", lambda device, dtype: CEILINGS)

    def run():
        parser = argparse.ArgumentParser()
        roofline.add_arguments(parser)
        code = roofline.run(parser.parse_args(["--quick", "--out", str(tmp_path)]))
        return code, json.loads((tmp_path / "roofline.json").read_text())

    return run


@pytest.mark.slow
def test_the_suite_walks_through_every_case(suite, capsys):
    code, report = suite()
    assert (code, report["failures"]) == (0, [])
    tiny = roofline.TINY
    one = 2 * tiny.tokens * tiny.hidden * tiny.vocab
    passes = [row["flops"] / one for row in report["rows"] if row["kernel"] == CALL]
    assert passes[:2] == [3, 4]
    assert 1 <= passes[2] < 4
    assert passes[3] <= 3  # some of its tokens are clipped
    sizes = list(report["sizes"].values())
    assert [(size["cached"], size["recomputed"]) for size in sizes[:2]] == [(tiny.tokens, 0), (0, tiny.tokens)]
    assert sizes[2]["entries"] >= sizes[2]["columns"] > 0
    assert {row["case"] for row in report["rows"]} == set(report["sizes"])
    assert report["ceilings"] == CEILINGS
    assert all("of_product" in row for row in report["rows"] if "flops" in row)
    printed = capsys.readouterr().out
    assert "copy 3000 GB/s, product 800.00 TFLOP/s" in printed


@pytest.mark.slow
def test_a_case_that_fails_is_reported_and_the_next_runs(suite, monkeypatch):
    count = roofline.count

    def failing(run, problem):
        if (problem.tensors["labels"] != IGNORE_INDEX).all() and "old_logprobs" not in problem.tensors:
            raise torch.OutOfMemoryError("no room")
        return count(run, problem)

    monkeypatch.setattr(roofline, "count", failing)
    code, report = suite()
    assert code == 1
    assert [failure.partition(": ")[2] for failure in report["failures"]] == ["out of memory"] * 3
    assert {row["case"].partition(",")[0] for row in report["rows"]} == {LINEAR_POLICY_LOSS}


def test_the_cases_are_those_of_the_headline_and_of_a_small_model():
    names = [case.name for case in roofline.cases(quick=False)]
    assert len(names) == len(set(names)) == 8
    assert "cache, 8192 x 4096 x 151936" in names
    assert "linear_policy_loss, 16384 x 1536 x 151936" in names
    assert {case.mode for case in roofline.cases(quick=False) if case.size.logits == "sharp"} == {"sparse"}
