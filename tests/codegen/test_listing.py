"""Counting in disassembled kernels: small listings by hand, each of which shows one thing."""

import itertools
from dataclasses import replace

import pytest
from machine_code_checks import assert_each_byte_once, assert_nothing_but_global_memory, assert_wide

from bench.codegen.listing import parse_amdgcn, parse_sass, paths, shortest_path
from bench.codegen.machine_code import analyse
from bench.codegen.variants import Variant


def sass(*lines):
    """A listing as nvdisasm prints it, of instructions and labels."""
    return "\n".join(line if line.endswith(":") else f"        /*{i:04x}*/   {line} ;" for i, line in enumerate(lines))


PROLOGUE = ("LDG.E.64 R2, desc[UR4][R8.64]", "S2R R0, SR_TID.X", "IMAD.WIDE R4, R0, 0x10, R2")
FULL = ("LDG.E.128 R8, desc[UR4][R4.64]", "MUFU.RSQ R8, R8", "STG.E.128 desc[UR4][R4.64], R8", "EXIT")
TAIL = (
    *(f"@!P{i} LDG.E R{8 + i}, desc[UR4][R4.64+{4 * i:#x}]" for i in range(4)),
    *(f"@!P{i} STG.E desc[UR4][R4.64+{4 * i:#x}], R{8 + i}" for i in range(3)),
    "@P3 EXIT",
    "STG.E desc[UR4][R4.64+0xc], R11",
    "EXIT",
)
END = (".L_x_1:", "BRA `(.L_x_1)")
TAIL_LAST = sass(*PROLOGUE, "@!P0 BRA `(.L_x_0)", *FULL, ".L_x_0:", *TAIL, *END)
TAIL_FIRST = sass(*PROLOGUE, "@P0 BRA `(.L_x_0)", *TAIL, ".L_x_0:", *FULL, *END)
NONE = {"registers": 32, "shared_bytes": 0, "local_bytes": 0, "spills": 0}


def analyse_sass(text):
    return analyse(parse_sass(text), threads=128, elements=4, stored_bytes=16, **NONE)


@pytest.mark.fast
@pytest.mark.parametrize("text", [TAIL_LAST, TAIL_FIRST], ids=["tail last", "tail first"])
def test_finds_the_full_block_path(text):
    code = analyse_sass(text)
    assert (code.loads, code.stores, code.uniform_loads) == ([16], [16], [8])
    assert code.instructions == len(PROLOGUE) + 1 + len(FULL)
    assert code.instructions_per_element == 2
    assert code.mufu == 1
    assert_nothing_but_global_memory(code)


def test_finds_the_full_block_path_behind_an_early_exit():
    early = ("LDG.E R6, desc[UR4][R6.64]", "@P0 EXIT", "BSSY B0, `(.L_x_9)", ".L_x_9:")
    code = analyse_sass(sass(*early) + "\n" + TAIL_LAST)
    assert code.uniform_loads == [4, 8]
    assert code.instructions == 3 + len(PROLOGUE) + 1 + len(FULL)


def test_finds_the_full_block_path_beside_a_tail_of_branches():
    tail = [
        (f"@P{i} BRA `(.L_y_{i})", f"LDG.E R8, [R4.64+{4 * i}]", f"STG.E [R4.64+{4 * i}], R8", f".L_y_{i}:")
        for i in range(4)
    ]
    text = sass(*PROLOGUE, "@!P0 BRA P1, `(.L_x_0)", *FULL, ".L_x_0:", *itertools.chain(*tail), "EXIT")
    assert len(list(paths(parse_sass(text)))) == 1 + 2**4
    assert analyse_sass(text).loads == [16]


def test_refuses_predicated_accesses_and_loops():
    predicated = TAIL_LAST.replace("LDG.E.128", "@P1 LDG.E.128")
    with pytest.raises(ValueError, match="no path stores 16 bytes"):
        analyse_sass(predicated)
    with pytest.raises(ValueError, match="loop"):
        analyse_sass(sass(".L_x_0:", "IADD3 R0, R0, 0x1, RZ", "@P0 BRA `(.L_x_0)", "EXIT"))
    with pytest.raises(ValueError, match="cannot tell"):
        parse_sass(sass("BRX R4 -0x10"))


def test_divergent_branches_have_two_ways():
    text = sass(*PROLOGUE, "@P0 BRA `(.L_x_0)", "BRA.DIV ~URZ, `(.L_x_2)", ".L_x_2:", *TAIL, ".L_x_0:", *FULL, *END)
    assert analyse_sass(text).loads == [16] and len(list(paths(parse_sass(text)))) == 5


def test_finds_the_shortest_path_past_loops_and_slow_ways():
    """Of those that load so much: not the loop, which needs more instructions, nor what loads more or predicated."""
    loop = (".L_x_1:", "LDG.E.128 R8, [R4.64]", "IADD3 R4, R4, R5, RZ", "@P1 BRA `(.L_x_1)", "BRA `(.L_x_2)")
    full = (".L_x_0:", "LDG.E.128 R8, [R4.64]", "LDG.E.128 R12, [R4.64+0x10]")
    rest = (".L_x_2:", "@!P2 BRA `(.L_x_3)", "LDG.E.128 R8, [R4.64]", ".L_x_3:", "STG.E.64 [R2.64], R8", "EXIT")
    text = sass(*PROLOGUE, "@P0 BRA `(.L_x_0)", "@P3 LDG.E.128 R8, [R4.64]", *loop, *full, *rest)
    path = shortest_path(parse_sass(text), 8 + 32)
    assert [i.bytes for i in path if i.is_load] == [8, 16, 16]
    assert len(path) == len(PROLOGUE) + 1 + 2 + 1 + 2
    with pytest.raises(ValueError, match="no path loads 999 bytes"):
        shortest_path(parse_sass(text), 999)


def test_sees_narrow_accesses():
    variant = Variant("sm_90", "tensor", ("fp32",) * 4)
    quarters = [f"LDG.E R{8 + i}, desc[UR4][R4.64+{4 * i:#x}]" for i in range(4)]
    code = analyse_sass(sass(*PROLOGUE, *quarters, *FULL[1:]))
    assert code.loads == [4] * 4
    four_tensors = replace(code, loads=code.loads * 4, stores=code.stores * 3)
    assert_each_byte_once(variant, four_tensors)
    with pytest.raises(AssertionError):
        assert_wide(variant, four_tensors)
    assert_wide(variant, replace(four_tensors, loads=[16] * 4))
    with pytest.raises(AssertionError):
        assert_each_byte_once(variant, code)


def test_sees_half_width_beside_full_width():
    variant = Variant("sm_90", "tensor", ("bf16", "bf16", "fp32", "fp32"))
    code = replace(analyse_sass(TAIL_LAST), loads=[8, 8, 16, 16], stores=[8, 16, 16])
    assert_wide(variant, code)
    with pytest.raises(AssertionError):
        assert_wide(variant, replace(code, loads=[8, 4, 4, 16, 16]))


@pytest.mark.parametrize(
    "line",
    [
        "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f64_full)",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "STS.128 [R12], R8",
        "LDS.U16 R8, [R12]",
    ],
)
def test_sees_calls_barriers_and_shared_memory(line):
    code = analyse_sass(TAIL_LAST.replace("MUFU.RSQ R8, R8", line))
    with pytest.raises(AssertionError):
        assert_nothing_but_global_memory(code)


@pytest.mark.fast
def test_sees_spills():
    with pytest.raises(AssertionError):
        assert_nothing_but_global_memory(replace(analyse_sass(TAIL_LAST), spills=1))
    with pytest.raises(AssertionError):
        assert_nothing_but_global_memory(replace(analyse_sass(TAIL_LAST), local_bytes=8))


def test_finds_the_full_block_path_on_amd():
    # From the tail a branch leads into the full block's code that is never taken; a masked lane is out of range.
    code = analyse(
        parse_amdgcn("""
kernel:
	s_load_dwordx2 s[0:1], s[2:3], 0x0 ; uniform
	s_cbranch_vccz .LBB0_3
	buffer_load_dword v2, v0, s[4:7], 0 offen
	buffer_load_dword v3, v1, s[4:7], 0 offen
	buffer_store_dword v2, v0, s[4:7], 0 offen
	buffer_store_dword v3, v1, s[4:7], 0 offen
	s_cbranch_scc1 .LBB0_5
.LBB0_3:                                ; %Flow
	.loc	1 88 12
	buffer_load_dwordx2 v[2:3], v0, s[4:7], 0 offen
	s_cbranch_execz .LBB0_5
	v_rsq_f32_e32 v2, v2
	buffer_store_dwordx2 v[2:3], v0, s[4:7], 0 offen
.LBB0_5:
	s_endpgm
.Lfunc_end0:
	s_barrier
"""),
        threads=128,
        elements=2,
        stored_bytes=8,
        **NONE,
    )
    assert (code.loads, code.stores, code.uniform_loads, code.mufu) == ([8], [8], [], 1)
    assert code.instructions == 7
    assert_nothing_but_global_memory(code)
