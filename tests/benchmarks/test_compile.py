"""The compile report: no kernel of the library spills, and the report would say so if one did.

Kernels are compiled in a process without TRITON_INTERPRET: where it is set, Triton has nothing to compile.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.__main__ import main
from benchmarks.compile import budgets, hot_tables, products, projection_cases, table
from benchmarks.compile.binaries import Binary, Hot, parse_amdgcn, parse_cuobjdump
from benchmarks.compile.launches import TARGETS, Launch
from benchmarks.compile.occupancy import occupancy
from benchmarks.compile.projection_predictions import tile_name
from sppo_kernels.tuning import TUNABLES

ROOT = Path(__file__).parents[2]

FAULTY_PACKAGE = """
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return tl.exp(x)

@triton.jit
def good(x_ptr, n, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), helper(tl.load(x_ptr + tl.arange(0, N))) + n)

@triton.jit
def spilling(x_ptr, n, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    y = tl.load(x_ptr + N + tl.arange(0, N))
    for _ in range(n):
        x, y = x * y + tl.sum(y), y + tl.sum(x)
    tl.store(x_ptr + tl.arange(0, N), x + y)

@triton.jit
def ill_typed(x_ptr, n, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), tl.zeros([N + N], tl.float32))

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, 0.0)
"""

FAULTY_REPORT = """
import sys
from pathlib import Path
import torch
import faulty.kernels
from benchmarks.compile import report
from benchmarks.compile.launches import Case

x = torch.zeros(4096)
cases = [
    Case("aligned", "n=32", lambda: faulty.kernels.good[1,](x, 32, N=512, num_warps=2)),
    Case("unaligned", "n=33", lambda: faulty.kernels.good[1,](x[1:], 33, N=512, num_warps=2)),
    Case("again", "n=34", lambda: faulty.kernels.good[1,](x[2:], 34, N=512, num_warps=2)),
    Case("spilling", "", lambda: faulty.kernels.spilling[1,](x, 8, N=1024, num_warps=1, maxnreg=32)),
    Case("ill_typed", "", lambda: faulty.kernels.ill_typed[1,](x, 8, N=1024)),
]
if __name__ == "__main__":
    sys.exit(report(cases, faulty, ["sm_80"], quick=False, out=Path(sys.argv[1])))
"""


def run_compiled(*command: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, path)))
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def read_report(folder: Path) -> dict:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


COMPILED = ("sm_90", "gfx942")  # one per vendor; `make bench` compiles for all


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("library")
    done = run_compiled("-m", "benchmarks", "compile", "--quick", "--arch", *COMPILED, "--out", str(out))
    assert "written to" in done.stdout, done.stderr
    return done, read_report(out)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "faulty").mkdir()
    (folder / "faulty/__init__.py").touch()
    (folder / "faulty/kernels.py").write_text(FAULTY_PACKAGE)
    (folder / "faulty_report.py").write_text(FAULTY_REPORT)
    done = run_compiled(str(folder / "faulty_report.py"), str(folder), path=folder)
    assert "written to" in done.stdout, done.stderr
    return done, read_report(folder)


@pytest.mark.slow
def test_no_kernel_spills(library):
    done, report = library
    assert report["failures"] == []
    assert all(row["spills"] == 0 and not row["error"] for row in report["rows"])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_every_kernel_is_covered_on_each_target(library):
    _, report = library
    assert [failure for failure in report["failures"] if "no case launches it" in failure] == []
    kernels = Counter((row["module"], row["kernel"]) for row in report["rows"])
    assert len(kernels) > 5
    assert set(kernels.values()) == {len(COMPILED)}
    assert all(row["registers"] > 0 for row in report["rows"])


@pytest.mark.parametrize("version", ["3.6", "3.9"])
def test_the_committed_report_of_each_version_of_triton_is_whole_and_has_no_spill(version):
    (file,) = (ROOT / "benchmarks/results/cpu").glob(f"compile-triton-{version}.*.json")
    report = json.loads(file.read_text())
    assert (report["failures"], report["quick"], report["targets"]) == ([], False, list(TARGETS))
    assert all(row["spills"] == 0 and not row["error"] for row in report["rows"])
    for name, tunable in TUNABLES.items():
        tuned = {
            row["case"].rpartition(" tuned ")[2] for row in report["rows"] if row["operation"] == name.split(".")[0]
        }
        # On a target where a candidate is the default, it is not compiled a second time as "tuned".
        tuned |= {tile_name(row) for row in report["rows"] if "projection" in row["kernel"]}
        assert tuned >= {"/".join(map(str, config)) for config in tunable.candidates[1:]}
    # Tiles of fewer tokens, which "sparse" takes on Hopper, add each token's logits in the same order.
    code = {row["case"]: (row["constants"], row["product"]) for row in report["rows"]
            if row["target"] == "sm_90" and row["constants"].get("MODE") == "statistics"}  # fmt: skip
    (few, its), (many, others) = (
        code[projection_cases.label_of("bf16", projection_cases.PLAIN, mode)] for mode in ("sparse", "scoring")
    )
    assert few["BLOCK_N"] < many["BLOCK_N"]
    assert few["BLOCK_V"] == many["BLOCK_V"]
    assert its["layout"] == others["layout"] != ""


@pytest.mark.slow
def test_faults_are_reported(faulty):
    done, report = faulty
    spill, error, forgotten = report["failures"]
    assert "spilling" in spill
    assert "spills" in spill
    assert "ill_typed" in error
    assert "CompilationError" in error
    assert forgotten == "faulty.kernels.forgotten: no case launches it"  # helper runs inside good
    assert all(failure in done.stderr for failure in report["failures"])
    assert done.returncode == 1


@pytest.mark.slow
def test_rows_are_what_was_launched(faulty):
    _, report = faulty
    aligned, unaligned = (row for row in report["rows"] if row["kernel"] == "good")  # "again" shares a binary
    assert (aligned["num_warps"], aligned["constants"]["N"]) == (2, 512)
    assert aligned["signature"] == {"x_ptr": "*fp32", "n": "i32", "N": "constexpr"}
    assert aligned["aligned_arguments"] == [0, 1]
    assert unaligned["aligned_arguments"] == []
    (spilling,) = (row for row in report["rows"] if row["kernel"] == "spilling")
    assert spilling["spills"] == spilling["stack"] / 4 > 0
    assert spilling["registers"] <= 32


@pytest.mark.slow
def test_kernels_keep_their_budgets(tmp_path):
    done = run_compiled("-m", "benchmarks", "compile", "--budgets", "--out", str(tmp_path))
    assert "written to" in done.stdout, done.stderr
    report = read_report(tmp_path)
    assert report["failures"] == []
    assert done.returncode == 0
    assert {(row["kernel"], row["case"]) for row in report["rows"]} == {*budgets.BUDGETS, *products.BUDGETS}


@pytest.mark.slow
def test_the_hot_path_of_a_kernel_is_counted(faulty):
    """The kernel of 512 elements in 64 threads loads 4 times 4 bytes per thread, or twice 16 where it is aligned."""
    _, report = faulty
    aligned, unaligned = (row for row in report["rows"] if row["kernel"] == "good")
    assert (aligned["hot"]["elements"], aligned["hot"]["load_width"], aligned["hot"]["store_width"]) == (512, 16, 16)
    assert (unaligned["hot"]["elements"], unaligned["hot"]["load_width"], unaligned["hot"]["store_width"]) == (
        512,
        4,
        4,
    )
    assert not aligned["hot"]["is_loop"]
    assert aligned["per_element"]["special"] == 1.0  # one exp
    assert sum(aligned["per_element"].values()) < sum(unaligned["per_element"].values())
    assert (aligned["programs_per_sm"], aligned["occupancy"]) == (32, 1.0)


@pytest.mark.slow
def test_amd_code_has_no_hot_path(library):
    _, report = library
    assert {row["target"] for row in report["rows"] if row["hot"] or row["product"]} == {"sm_90"}


@pytest.mark.parametrize(
    ("resources", "programs"),
    [
        ({"registers": 48, "warps": 8, "shared": 0}, 5),
        ({"registers": 118, "warps": 8, "shared": 32}, 2),
        ({"registers": 138, "warps": 8, "shared": 32}, 1),
        ({"registers": 30, "warps": 8, "shared": 0}, 8),
        ({"registers": 75, "warps": 8, "shared": 16_384}, 3),
        ({"registers": 16, "warps": 1, "shared": 0}, 32),  # the limit of programs
        ({"registers": 16, "warps": 4, "shared": 113 * 1024}, 2),  # with 1 KiB of each for the system
        ({"registers": 16, "warps": 4, "shared": 113 * 1024 + 1}, 1),
    ],
)
def test_programs_per_multiprocessor(resources, programs):
    assert occupancy("sm_90", **resources) == (programs, programs * resources["warps"] / 64)


def hot_binary(**fields) -> Binary:
    kernel, case = next(iter(budgets.BUDGETS))
    launch = Launch("op", case, "module", kernel, budgets.TARGET, {}, {}, {}, {"num_warps": 8, "num_stages": 3})
    hot = {"is_loop": True, "elements": 2048, "counts": {"fp32": 80}, "outside": 9, "barriers": 0}
    numbers = {"registers": 32, "programs_per_sm": 8, "occupancy": 1.0}
    return Binary(launch, **numbers | fields, hot=Hot(**hot, load_width=16, store_width=0))


def test_instructions_are_counted_per_element_of_a_thread():
    assert hot_binary().instructions_per_element() == 10.0  # 8 elements per thread


def test_a_binary_beyond_its_budget_fails_with_kernel_number_and_budget(monkeypatch):
    (kernel, case), _ = next(iter(budgets.BUDGETS.items()))
    monkeypatch.setattr(budgets, "BUDGETS", {(kernel, case): budgets.Budget(9.5, 32, 0, 1.0, 16)})
    assert list(budgets.exceeded([hot_binary()])) == [
        f"{kernel}, {case}, sm_90: 10 instructions per element, the budget is at most 9.5"
    ]
    monkeypatch.setattr(budgets, "BUDGETS", {(kernel, case): budgets.Budget(10.0, 32, 0, 1.0, 16)})
    assert list(budgets.exceeded([hot_binary()])) == []
    assert list(budgets.exceeded([hot_binary(occupancy=0.75, registers=40)])) == [
        f"{kernel}, {case}, sm_90: 40 registers, the budget is at most 32",
        f"{kernel}, {case}, sm_90: 0.75 occupancy, the budget is at least 1",
    ]
    assert budgets.without_launch([hot_binary()]) == []
    assert budgets.without_launch([]) == [f"{kernel}, {case}: has a budget and no launch"]


def test_tables_of_the_hot_path_fit_the_terminal():
    rows = [
        {"kernel": kernel, "case": case, "target": "sm_90", "per_element": {"fp32": 100.0}, "registers": 255,
         "programs_per_sm": 12, "occupancy": 0.75, "hot": {"barriers": 12, "load_width": 16, "store_width": 16}}
        for kernel, case in budgets.BUDGETS
    ]  # fmt: skip
    assert max(map(len, hot_tables(rows).split("\n"))) <= 120
    assert "100.0" in hot_tables(rows)


def test_cuobjdump_is_read():
    text = " Function f:\n  REG:255 STACK:1990 SHARED:0 LOCAL:2 CONSTANT[0]:392 TEXTURE:0\n"
    assert parse_cuobjdump(text) == {"registers": 255, "spills": 498, "stack": 1992}


def test_amd_metadata_is_read():
    text = """
      .amdhsa_private_segment_fixed_size 1
    .private_segment_fixed_size: 6224
    .sgpr_count:     26
    .sgpr_spill_count: 5
    .vgpr_count:     512
    .vgpr_spill_count: 3445
    """
    assert parse_amdgcn(text) == {"registers": 512, "spills": 1556, "stack": 6224, "scalars_in_lanes": 5}


def row(target: str, **fields) -> Binary:
    options = {"num_warps": 8, "num_stages": 3}
    return Binary(Launch("operation", "a long case " * 9, "module", "_kernel", target, {}, {}, {}, options), **fields)


def test_shared_memory_is_held_against_the_limit_of_the_target():
    needs = 100 * 1024
    assert row("sm_80", shared=needs).failure() == ""
    assert "shared memory" in row("gfx942", shared=needs).failure()


def test_table_fits_the_terminal():
    lines = table([row("sm_100", registers=255, spills=99_999, shared=232_448, stack=99_999), row("gfx942")]).split(
        "\n"
    )
    assert max(map(len, lines)) <= 120
    assert lines[2].split()[-5:] == ["sm_100", "255", "99999", "232448", "99999"]
    assert lines[3].split() == ["gfx942", "0", "0", "0", "0"]  # what repeats is left out


def test_suites_are_listed(capsys):
    assert main([]) == 0
    assert "compile" in capsys.readouterr().out


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["compile", "--help"])
    out = capsys.readouterr().out
    assert all(option in out for option in ("--arch", "--quick", "--out"))


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["compile"]) == 2
    assert "unset it" in capsys.readouterr().err
