"""The reader of disassemblies behind `make sass`, on a listing written out here."""

import os
from types import SimpleNamespace

import pytest
import sass
from gpu import build
from sass_flow import mixed_operands, touched_in_flight

LISTING = """
Fatbin elf code:
\t\tFunction : _Z1kv
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                 /* 0x00 */
                                                                                          /* 0x00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;                       /* 0x00 */
        /*0020*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;              /* 0x00 */
        /*0030*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;                       /* 0x00 */
        /*0040*/               @P0 MUFU.EX2 R5, R4 ;                                      /* 0x00 */
        /*0050*/                   FFMA.FTZ R5, R4, R4, R5 ;                              /* 0x00 */
        /*0060*/               @P1 BRA 0x40 ;                                             /* 0x00 */
        /*0070*/              @!P2 STG.E.64 desc[UR4][R2.64], R4 ;                        /* 0x00 */
        /*0080*/             @!UP0 BRA 0x10 ;                                             /* 0x00 */
        /*0090*/                   EXIT ;                                                 /* 0x00 */
        /*00a0*/                   BRA 0xa0;                                              /* 0x00 */
\t\tFunction : _Z4flatv
        /*0000*/                   STG.E desc[UR4][R2.64], R4 ;                           /* 0x00 */
        /*0010*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                          /* 0x00 */
        /*0020*/                   EXIT ;                                                 /* 0x00 */
"""


def test_the_innermost_loop_is_counted():
    found = sass.kernels(LISTING)
    assert list(found) == ["_Z1kv", "_Z4flatv"]
    assert sass.main_loop(found["_Z1kv"]) == ["MUFU.EX2", "FFMA.FTZ", "BRA"]
    number = sass.counts(sass.main_loop(found["_Z1kv"]))
    assert (number["MUFU"], number["FFMA"], number["LDG.128"]) == (1, 1, 0)


def test_without_a_loop_the_whole_kernel_is_counted():
    number = sass.counts(sass.main_loop(sass.kernels(LISTING)["_Z4flatv"]))
    assert (number["STG"], number["BAR"], number["STG.64"]) == (1, 1, 0)


def test_widths_are_told_apart():
    number = sass.counts([opcode for _, opcode, *_ in sass.kernels(LISTING)["_Z1kv"]])
    assert (number["LDG.128"], number["LDG"], number["STG.64"], number["STG"]) == (2, 1, 1, 0)


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void igpt::cuda::k<__nv_bfloat16, (int)8>(T1*, igpt::Bias, long)", "k<bf16, 8>"),
        ("igpt::cuda::(anonymous namespace)::plain(int*)", "plain"),
        ("void igpt::cuda::assign<unsigned char, short>(short*)", "assign<u8, i16>"),
    ],
)
def test_names_as_promises_write_them(demangled, name):
    assert sass.readable(demangled) == name


def test_a_broken_promise_is_named():
    promised = sass.promises("// text\n// sass k<bf16, 8>: MUFU = 2, FFMA <= 1, LDS >= 1\n")["k<bf16, 8>"]
    found = sass.counts(["MUFU.EX2", "FFMA"])
    assert sass.broken(promised, found) == ["MUFU is 1, promised = 2", "LDS is 0, promised >= 1"]
    with pytest.raises(ValueError, match="cannot read 'WGMMA = 1'"):
        sass.promises("// sass k: WGMMA = 1")


def test_the_kernels_promises_can_be_read():
    sources = sorted(sass.CUDA.glob("*.cu"))
    assert sources and any(sass.promises(path.read_text()) for path in sources)


LOOP = """
\t\tFunction : _Z4loopv
        /*0000*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0020*/                   F2FP.BF16.F32.PACK_AB {packed}, R25, R24 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R64, R{start}, gdesc[UR4], R64, gsb0 ;
        /*0040*/               @P0 BRA 0x10 ;
        /*0050*/                   EXIT ;
"""


@pytest.mark.parametrize(("packed", "start", "turns"), [("R12", 12, True), ("R9", 12, True), ("R9", 12, False)])
def test_operands_that_the_next_turn_reads_again_must_stay(packed, start, turns):
    text = LOOP.format(packed=packed, start=start)
    [body] = sass.kernels(text if turns else text.replace("@P0 BRA 0x10", "    NOP")).values()
    lost = turns and packed == "R9"
    assert mixed_operands(body) == (["the wgmma at 0x10 reads what F2FP and LDSM wrote"] if lost else [])


FLIGHT = """
\t\tFunction : _Z6flightv
        /*0000*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR8], RZ, !UPT ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R64, R16, gdesc[UR4], R64, gsb0 ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0050*/                   {then} ;
        /*0060*/               @P0 BRA 0x10 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   STG.E.128 [R2.64], R64 ;
        /*0090*/                   EXIT ;
"""


@pytest.mark.parametrize(("left", "then", "first"), [
    ("0x0", "FADD R24, R64, R25", None),
    ("0x1", "FADD R3, R24, R25", None),
    ("0x1", "FADD R24, R24, R25", None),
    ("0x1", "FADD R3, R64, R3", "FADD at 0x50 touches R64"),
    ("0x1", "LDSM.16.M88.4 R8, [R2]", None),
    ("0x1", "LDSM.16.M88.4 R14, [R2]", "LDSM.16.M88.4 at 0x50 touches R16"),
    ("0x2", "LDSM.16.M88.4 R8, [R2]", "LDSM.16.M88.4 at 0x50 touches R8"),
    ("0x2", "FADD R3, R24, R25", "FADD at 0x50 touches R24"),
    ("0x1", "STG.E.128 [R2.64], R62", "STG.E.128 at 0x50 touches R64"),
    ("0x1", "CS2R.32 R63, SRZ", None),
    ("0x1", "CS2R R63, SRZ", "CS2R at 0x50 touches R64"),
    ("0x1", "HGMMA.64x64x16.F32.BF16 R80, R8, gdesc[UR8], RZ, gsb0", "HGMMA.64x64x16.F32.BF16 at 0x50 touches R80"),
])  # fmt: skip
def test_what_a_product_in_flight_owns_is_left_alone(left, then, first):
    found = touched_in_flight(sass.kernels(FLIGHT.format(left=left, then=then))["_Z6flightv"])
    if first is None:
        assert not found
    else:
        assert f"{first} of a wgmma in flight" in found


def test_lanes_that_have_parted_go_on_too():
    text = FLIGHT.format(left="0x1", then="BRA.DIV UR7, 0x90").replace("@P0 BRA 0x10", "    FADD R3, R64, R3")
    assert "FADD at 0x60 touches R64 of a wgmma in flight" in touched_in_flight(sass.kernels(text)["_Z6flightv"])


def test_a_way_that_never_waits_has_an_end():
    text = FLIGHT.format(left="0x0", then="HGMMA.64x64x16.F32.BF16 R128, R8, gdesc[UR8], RZ, gsb0")
    [body] = sass.kernels(text.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "NOP ;", 1)).values()
    assert touched_in_flight(body)  # sums of three groups that nobody waits for


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        (FLIGHT.format(left="0x1", then="FADD R3, R24, R25"), 0, "1 kernels with wgmma"),
        (FLIGHT.format(left="0x1", then="FADD R3, R64, R3"), 1, "_Z6flightv: FADD at 0x50 touches R64"),
        (LOOP.format(packed="R9", start=12), 1, "_Z4loopv: the wgmma at 0x10 reads what F2FP and LDSM wrote"),
        ("", 1, "0 kernels with wgmma"),  # something else was built
    ],
)
def test_what_was_built_is_read(tmp_path, capsys, monkeypatch, text, code, said):
    (tmp_path / "listing").write_text(text + LISTING)
    (tmp_path / "cuobjdump").write_text(f"#!/bin/sh\n[ $1$2 = -sassx.so ] && cat {tmp_path}/listing")
    (tmp_path / "cuobjdump").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sass.main(["--built", "x.so"]) == code and said in capsys.readouterr().out


def test_gpu_check_reads_what_it_has_built(tmp_path, monkeypatch):
    ran = []

    def command(name, line, where, **env):
        ran.append((name, line[1:], env["PATH"].split(os.pathsep)[0]))
        return SimpleNamespace(status="failed")

    def operands(capability, tool):
        machine = build.Machine({"capability": capability}, {"cuobjdump": tool}, tmp_path)
        return build.operands(machine, SimpleNamespace(command=command))

    monkeypatch.setattr(build, "TREE", tmp_path)
    assert operands([9, 0], "/cuda/bin/cuobjdump") == {"operands": "not run"}, "no extension"
    (tmp_path / "igpt_fast").mkdir()
    (tmp_path / "igpt_fast" / "_C.so").touch()
    assert operands([8, 0], "/cuda/bin/cuobjdump") == operands([9, 0], None) == {"operands": "not run"}
    assert not ran and operands([9, 0], "/cuda/bin/cuobjdump") == {"operands": "failed"}
    assert ran == [("build-operands", ["-m", "sass", "--built", tmp_path / "igpt_fast" / "_C.so"], "/cuda/bin")]
