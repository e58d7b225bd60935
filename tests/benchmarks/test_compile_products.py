"""Products of the compile report: what lies outside of the main loop is counted, and slow code fails."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks.compile import product_rows, product_table, products, projection_cases
from benchmarks.compile.binaries import Binary
from benchmarks.compile.launches import TARGETS, Launch, launches
from benchmarks.compile.products import Product, is_product, product_of
from benchmarks.harness import library_seams
from sppo_kernels.tuning import TUNABLES

KERNEL = library_seams.PROJECTION_KERNEL
CODE = """
    S2R R0, SR_TID.X
    .L_x_0:
    UTMALDG.2D [UR8], [UR4]
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24
    HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], R24
    @P0 BRA `(.L_x_0)
    FMUL R24, R24, R0
    MUFU.EX2 R24, R24
    FADD R1, R1, R24
    EXIT
"""
CONSTANTS = {"BLOCK_N": 64, "BLOCK_V": 32, "DESCRIPTORS": True, "OUT_DESCRIPTOR": False}


def listing(code: str) -> str:
    lines = [line.strip() for line in code.strip().splitlines()]
    return "\n".join(line if line.endswith(":") else f"        /*0000*/                   {line} ;" for line in lines)


def binary(case: str = "bf16", target: str = "sm_90", product: Product | None = None, **constants: object) -> Binary:
    signature = dict.fromkeys(("hidden", "weight", "stride_hidden", "stride_weight"), "*bf16")
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    options = {"num_warps": 8, "num_stages": 3}
    launch = Launch("op", case, "module", KERNEL, target, signature, {**CONSTANTS, **constants}, attributes, options)
    return Binary(launch, product=product)


def test_what_lies_outside_of_the_blocks_with_matrix_instructions_is_counted_per_element():
    representation = "#mma = #ttg.nvidia_mma<{versionMajor = 3, warpsPerCTA = [8, 1]}>\n#shared = #ttg.x<{}>"
    found = product_of(listing(CODE), representation, CONSTANTS, warps=8)
    names, layout = {"HGMMA": 2, "UTMALDG": 1}, "versionMajor = 3, warpsPerCTA = [8, 1]"
    assert found == Product(main=4, outside=5, elements=8.0, special=1, found=names, layout=layout)
    assert found.per_element == 5 / 8


def test_code_without_matrix_instructions_is_no_product():
    assert product_of(listing("FFMA R0, R1, R2, R0\nEXIT"), "", CONSTANTS, warps=8) is None
    assert is_product("%a = ttng.warp_group_dot %x, %y, %z : tensor<64x128xf32>")
    assert is_product("%a = tt.dot %x, %y, %z")
    assert not is_product("%a = tt.load %dot_ptr")


FAST = Product(main=100, outside=400, elements=32.0, special=33, found={"HGMMA": 8, "UTMALDG": 2})


@pytest.mark.parametrize(
    ("found", "constants", "lacks"),
    [
        ({"HGMMA": 8, "UTMALDG": 2}, {}, []),
        ({"HMMA": 8, "LDGSTS": 2}, {}, ["HGMMA", "UTMALDG"]),
        ({"HGMMA": 8, "UTMALDG": 2}, {"OUT_DESCRIPTOR": True}, ["UTMASTG"]),
        ({"HGMMA": 8}, {"DESCRIPTORS": False}, []),  # rows that are not aligned
    ],
)
def test_slow_code_is_a_failure(found, constants, lacks):
    given = binary(product=replace(FAST, found=found), **constants)
    assert products.missing(given) == lacks
    assert list(products.failures([given])) == (
        [f"{KERNEL}, bf16, sm_90: the code has no {', '.join(lacks)}"] if lacks else []
    )


def test_each_generation_has_instructions_of_its_own():
    for target, (matrix, load, _) in products.FAST.items():
        code = replace(FAST, found={matrix: 8, load: 2})
        assert products.missing(binary(target=target, product=code, DESCRIPTORS=target != "sm_80")) == []
        assert products.missing(binary(target=target, DESCRIPTORS=target != "sm_80")) == [matrix, load]
    unaligned = binary(target="sm_80", product=replace(FAST, found={"HMMA": 8}), DESCRIPTORS=False)
    unaligned.launch.attributes.clear()
    assert products.missing(unaligned) == []
    assert products.missing(binary(target="gfx942")) == []


def test_a_product_beyond_its_budget_fails():
    (_, case), limit = next(iter(products.BUDGETS.items()))
    over = replace(FAST, outside=int(limit * FAST.elements) + 1)
    (failure,) = products.failures([binary(case, product=over)])
    assert failure == (
        f"{KERNEL}, {case}, sm_90: 16.03 instructions per element outside of the main loop, the budget is at most 16"
    )
    assert list(products.failures([binary(case, product=FAST), binary("other", product=over)])) == []


def test_the_table_has_the_modes_of_the_plain_head_and_fits_the_terminal():
    code = {"main": 92, "outside": 1796, "elements": 128.0, "special": 131, "found": {"HGMMA": 8, "UTMALDG": 2}}
    row = {"constants": {**CONSTANTS, "BLOCK_K": 64, "MODE": "statistics"}, "target": "sm_90", "registers": 254,
           "shared": 213_016, "num_warps": 8, "num_stages": 3, "product": code}  # fmt: skip
    cases = [projection_cases.label_of("bf16", projection_cases.PLAIN, mode) for mode in projection_cases.MODES]
    rows = [{**row, "case": case} for case in cases]
    others = [
        {**rows[0], "constants": {**row["constants"], "MODE": "maximum"}},
        {**rows[0], "product": None},
        {**rows[0], "case": projection_cases.label_of("bf16", projection_cases.FULL, "scoring")},
    ]
    assert product_rows([*rows, *others]) == rows
    text = product_table(rows)
    assert max(map(len, text.split("\n"))) <= 120
    assert "scoring              64/32/64/8/3  sm_90" in text
    assert "14.03" in text


# Launches, which are recorded where Triton is not interpreted.


@pytest.mark.slow
@pytest.mark.skipif(library_seams.is_interpreted(), reason="an interpreted kernel is not specialised")
@pytest.mark.parametrize("target", TARGETS)
def test_cases_launch_every_mode_and_every_tile_of_the_target(target):
    cases = [*projection_cases.cases(), *projection_cases.candidate_cases()]
    found = [launch for launch in launches(cases, [target]) if launch.kernel == KERNEL]
    assert {launch.constants["MODE"] for launch in found} == {"statistics", "gradient", "maximum"}
    tiles = {(*(launch.constants[f"BLOCK_{x}"] for x in "NVK"), *map(launch.options.get, ("num_warps", "num_stages")))
             for launch in found}  # fmt: skip
    wide = (256, 128, 64, 8, 3)
    assert (wide in tiles) == (target == "sm_90")
    assert wide in TUNABLES["linear_logprobs.projection"].candidates
