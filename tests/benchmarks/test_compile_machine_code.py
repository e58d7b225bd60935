"""Reading of disassembled kernels: the path of a whole block, its instructions, and the elements that it covers."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.compile.machine_code import Instruction, hot_path
from benchmarks.compile.tiles import tile_of


def listing(code: str) -> str:
    """Number the instructions as nvdisasm does; a line that ends with a colon is a label."""
    lines = [line.strip() for line in code.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


def opcodes(code: str, in_loop: bool) -> list[str]:
    return [instruction.opcode for instruction in hot_path(listing(code), in_loop).instructions]


# The shape of a row pass: rows without a label leave early, the last block is masked, threads 0 to 31 store.
ROW_PASS = """
    kernel:
    LDG.E.64 R2, desc[UR14][R2.64]
    @!P0 BRA `(.L_x_0)
    MOV R9, RZ
    .L_x_5:
    IADD3 R4, R21, UR4, RZ
    @P4 BRA `(.L_x_3)
    LDG.E.128 R4, desc[UR14][R2.64]
    SHF.L.U32 R37, R5, 0x10, RZ
    FMUL R5, R5, 0.25
    BRA `(.L_x_4)
    .L_x_3:
    ISETP.GE.AND P3, PT, R4, UR7, PT
    @!P3 LDG.E.128 R4, desc[UR14][R2.64]
    .L_x_4:
    BAR.SYNC.DEFER_BLOCKING 0x0
    MUFU.EX2 R5, R33
    SHFL.BFLY PT, R5, R6, 0x10, 0x1f
    @!P3 BRA `(.L_x_5)
    BAR.SYNC.DEFER_BLOCKING 0x0
    @P0 STG.E desc[UR14][R8.64], R17
    EXIT
    .L_x_0:
    @!P0 STG.E desc[UR14][R2.64], RZ
    EXIT
    .L_x_6:
    BRA `(.L_x_6)
    NOP
"""


def test_the_path_of_a_loop_is_that_of_a_whole_block():
    path = hot_path(listing(ROW_PASS), in_loop=True)
    assert path.is_loop
    assert [instruction.opcode for instruction in path.instructions] == [
        "IADD3", "BRA", "LDG.E.128", "SHF.L.U32", "FMUL", "BRA",
        "BAR.SYNC.DEFER_BLOCKING", "MUFU.EX2", "SHFL.BFLY", "BRA",
    ]  # fmt: skip
    assert path.outside == 6
    assert path.barriers() == 1
    assert path.count() == {
        "integer": 2, "branch": 3, "load": 1, "fp32": 1, "barrier": 1, "special": 1, "shared": 1
    }  # fmt: skip


def test_the_path_of_a_kernel_is_that_of_a_row_with_work():
    """Without a loop the whole kernel counts; what it stores under a mask, or for skipped rows, does not."""
    code = """
        LDG.E R4, desc[UR12][R4.64]
        @P0 BRA P1, `(.L_x_0)
        STG.E.128 desc[UR12][R2.64], RZ
        EXIT
        .L_x_0:
        LDG.E.128 R4, desc[UR12][R8.64]
        @P0 BRA `(.L_x_3)
        F2FP.BF16.F32.PACK_AB R5, R6, R17
        STG.E.128 desc[UR12][R2.64], R4
        EXIT
        .L_x_3:
        ISETP.GE.AND P0, PT, R25, UR14, PT
        F2FP.BF16.F32.PACK_AB R5, R6, R17
        @P0 EXIT
        STG.E.128 desc[UR12][R2.64], R4
        EXIT
    """
    path = hot_path(listing(code), in_loop=False)
    assert not path.is_loop
    assert [instruction.opcode for instruction in path.instructions] == [
        "LDG.E", "BRA", "LDG.E.128", "BRA", "F2FP.BF16.F32.PACK_AB", "STG.E.128", "EXIT"
    ]  # fmt: skip
    assert (path.widths("load", False), path.widths("store", False)) == ([4, 16], [16])


def test_the_innermost_loop_that_loads_most_is_the_hot_one():
    code = """
        .L_x_0:
        IADD3 R1, R1, 0x1, RZ
        .L_x_1:
        LDG.E.64 R4, desc[UR4][R2.64]
        @P0 BRA `(.L_x_1)
        .L_x_2:
        LDG.E.128 R4, desc[UR4][R2.64]
        FADD R4, R4, R5
        @P0 BRA `(.L_x_2)
        BRA.U UP0, `(.L_x_0)
        EXIT
    """
    assert opcodes(code, in_loop=True) == ["LDG.E.128", "FADD", "BRA"]


def test_a_loop_whose_rare_part_lies_behind_the_kernel_is_one_loop():
    code = """
        .L_x_0:
        LDG.E.128 R4, desc[UR4][R2.64]
        BSSY.RECONVERGENT B0, `(.L_x_1)
        BRA.U !UP0, `(.L_x_2)
        FADD R4, R4, R5
        BSYNC.RECONVERGENT B0
        .L_x_3:
        NOP
        .L_x_1:
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        MUFU.RCP R4, R4
        MUFU.RCP R4, R4
        BRA `(.L_x_1)
    """
    assert opcodes(code, in_loop=True) == [
        "LDG.E.128",
        "BSSY.RECONVERGENT",
        "BRA.U",
        "FADD",
        "BSYNC.RECONVERGENT",
        "BRA",
    ]


def test_code_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="must hold the code of a kernel"):
        hot_path("no instruction", in_loop=True)


@pytest.mark.parametrize(
    ("opcode", "kind", "width"),
    [
        ("FFMA.FTZ", "fp32", 0), ("FFMA2", "fp32", 0), ("FSEL", "fp32", 0), ("MUFU.EX2", "special", 0),
        ("F2FP.BF16.F32.PACK_AB", "conversion", 0), ("I2F.RP", "conversion", 0), ("HFMA2.MMA", "conversion", 0),
        ("PRMT", "conversion", 0), ("FLO.U32", "integer", 0), ("IADD3.X", "integer", 0), ("UIMAD.WIDE", "integer", 0),
        ("ULDC.64", "integer", 0), ("LDCU.64", "integer", 0), ("VIADD", "integer", 0), ("S2UR", "integer", 0),
        ("R2UR", "integer", 0), ("LDG.E", "load", 4), ("LDG.E.U8", "load", 1), ("LDG.E.U16.CONSTANT", "load", 2),
        ("LDG.E.64", "load", 8), ("LDG.E.128", "load", 16), ("LDG.E.ENL2.256", "load", 32),
        ("LDGSTS.E.128", "load", 16), ("STG.E.128", "store", 16), ("ATOMG.E.ADD", "store", 4), ("LDS.128", "shared", 0),
        ("SHFL.BFLY", "shared", 0), ("CREDUX.MAX.F32", "shared", 0),
        ("BAR.SYNC.DEFER_BLOCKING", "barrier", 0), ("MEMBAR.ALL.GPU", "barrier", 0),
        ("BSYNC", "branch", 0), ("EXIT", "branch", 0), ("NOP", "other", 0),
    ],
)  # fmt: skip
def test_instructions_are_classified(opcode, kind, width):
    instruction = Instruction("", opcode, "")
    assert (instruction.kind, instruction.width) == (kind, width)


LOOP = """
    %label = tt.load %label_ptr : !tt.ptr<i64> loc(#loc1)
    %t:3 = scf.for %start = %c0_i32 to %V step %c2048_i32 iter_args(%m = %cst_1) -> (f32)  : i32 {
      %19 = scf.if %18 -> (tensor<2048xf32, #blocked>) {
        %x_45 = tt.load %x_ptr_44 : tensor<2048x!tt.ptr<bf16>, #blocked> loc(#loc2)
        scf.yield %z_47 : tensor<2048xf32, #blocked> loc(#loc174)
      } else {
        %x_47 = tt.load %x_ptr_44, %x_46, %cst : tensor<2048x!tt.ptr<bf16>, #blocked> loc(#loc3)
        scf.yield %z_50 : tensor<2048xf32, #blocked> loc(#loc120)
      } loc(#loc114)
      %m_new = "tt.reduce"(%19) <{axis = 0 : i32}> ({
      ^bb0(%a: f32 loc(callsite(#loc1 at #loc151)), %b: f32 loc(callsite(#loc1 at #loc151))):
        tt.reduce.return %c : f32 loc(#loc176)
      }) : (tensor<2048xf32, #blocked>) -> f32 loc(#loc176)
    } loc(#loc179)
    %y = tt.load %y_ptr evictionPolicy = evict_first : tensor<64x!tt.ptr<f32>, #blocked> loc(#loc4)
    tt.store %7, %9 : !tt.ptr<f32> loc(#loc70)
"""


def test_a_tile_is_a_whole_block_of_the_loop():
    tile = tile_of(LOOP)
    assert tile.in_loop
    assert tile.elements == 2048
    assert [access.is_masked for access in tile.accesses] == [False, True]


@pytest.mark.parametrize(
    ("loads", "factor"),
    [
        (["LDG.E.128 R4, [R2.64]"], 1),
        (["LDG.E.128 R4, [R2.64]"] * 4, 4),  # unrolled
        (["@P0 LDG.E.128 R4, [R2.64]", "@!P0 LDG.E.128 R4, [R2.64]"], 1),  # a branch that became predicates
        (["LDG.E.U16 R4, [R2.64]"] * 8, 1),  # eight loads for the elements of one
    ],
)
def test_unrolling_is_seen_from_the_loaded_bytes(loads, factor):
    code = "\n".join([".L_x_0:", *loads, "@P0 BRA `(.L_x_0)", "EXIT"])
    assert tile_of(LOOP).unrolled(hot_path(listing(code), in_loop=True), threads=256) == factor


def test_repeated_loads_of_a_line_cover_more_elements_and_those_of_other_lines_do_not():
    load = "%a = tt.load %p, %mask, %cst : tensor<512x!tt.ptr<f32>, #blocked> loc(#loc{})"
    tile = tile_of("\n".join(load.format(line) for line in (1, 2, 3, 3)))
    assert not tile.in_loop
    assert tile.elements == 1024


def test_a_kernel_that_only_stores_has_the_elements_that_it_stores():
    tile = tile_of("tt.store %p, %v : tensor<32x64x!tt.ptr<bf16>, #blocked> loc(#loc1)")
    assert tile.elements == 2048
    assert [access.is_masked for access in tile.accesses] == [False]


def test_widths_are_those_of_block_loads():
    """Scalars, which all threads load alike, are no part of a tile."""
    scalars = ["%a = tt.load %p : !tt.ptr<i64> loc(#loc1)", *["%b = tt.load %q : !tt.ptr<f32> loc(#loc2)"] * 5]
    tile = tile_of("\n".join([*scalars, "%x = tt.load %x_ptr : tensor<2048x!tt.ptr<bf16>, #blocked> loc(#loc3)"]))
    loads = ["LDG.E.64 R2, [R2.64]", *["LDG.E R4, [R2.64]"] * 5, *["LDG.E.U16 R4, [R2.64]"] * 8]
    path = hot_path(listing("\n".join([*loads, "EXIT"])), in_loop=False)
    assert tile.widths(path, "load") == [2] * 8
