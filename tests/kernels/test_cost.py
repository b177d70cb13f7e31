"""The static cost model: control bits, loops, units, one warp's walk, occupancy; and the gate against costlier kernels."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from lcconformer.kernels import report
from lcconformer.kernels.cost import MACHINES, Work, blocks_per_sm, decode, parse, predict, usage
from lcconformer.kernels.cost_shapes import Shape, shape_of, work

FILED = Path(__file__).parents[2] / "bench" / "results" / "triton_cost.json"
H200 = MACHINES[90]


def word(stall: int = 1, yields: bool = False, sets: int = 7, reads: int = 7, mask: int = 0) -> int:
    """Upper word of an instruction with these control bits, its lower bits set to ones."""
    return (stall | (not yields) << 4 | sets << 5 | reads << 8 | mask << 11) << 41 | (1 << 41) - 1


def listing(*lines: str | tuple[str, int]) -> str:
    """What nvdisasm would print; a line with a colon is a label, others are instructions, with their upper word."""
    out, address = [], 0
    for line in lines:
        text, high = (line, word()) if isinstance(line, str) else line
        if text.endswith(":"):
            out.append(text)
            continue
        out += [f"        /*{address:04x}*/    {text} ;   /* 0x{0:016x} */", f"        /* 0x{high:016x} */"]
        address += 16
    return "\n".join(out)


def test_control_bits():
    i = decode("@!P0 LDS.128 R4, [R2]", word(stall=11, yields=True, sets=3, reads=5, mask=0b100010))
    assert (i.op, i.opcode) == ("LDS", "LDS.128")
    assert (i.stall, i.yields, i.sets, i.reads, i.waits) == (11, True, 3, 5, (1, 5))
    i = decode("FADD R1, R2, R3", word(stall=4))
    assert (i.stall, i.yields, i.sets, i.reads, i.waits) == (4, False, None, None, ())


def test_control_bits_of_real_code():
    """Two instructions of the attention kernel on sm_90, as nvdisasm printed them."""
    i = decode("LOP3.LUT R60, R60, 0x1f, RZ, 0xc0, !PT", 0x000FE200078EC0FF)
    assert (i.stall, i.yields, i.sets, i.reads, i.waits) == (1, False, None, None, ())
    i = decode("DEPBAR.LE SB0, 0x0", 0x000FC80000000000)
    assert (i.stall, i.yields, i.sets, i.reads, i.waits) == (4, True, None, None, ())


def test_loops_are_nested_and_a_trap_is_none():
    code = listing(
        "MOV R1, R2", ".L_x_0:", "IADD3 R1, R1, R2, RZ", ".L_x_1:", "FFMA R0, R1, R2, R0", "@P0 BRA `(.L_x_1)",
        "FADD R0, R0, R1", "@P1 BRA `(.L_x_0)", ".L_x_2:", "FADD R0, R0, R1", "@P1 BRA `(.L_x_2)", "EXIT", ".L_x_3:",
        "BRA `(.L_x_3)", "NOP",
    )  # fmt: skip
    program = parse(code)
    assert [(loop.first, loop.last) for loop in program.all_loops()] == [(1, 5), (2, 3), (6, 7)]
    assert [(loop.first, len(loop.inner)) for loop in program.loops] == [(1, 1), (6, 0)]
    # 1 in front, 3 of the outer loop, 2 of the inner one, 2 of the last, EXIT; what follows is never run
    predicted = predict(program, H200, Work(132, (3, 5, 7), 0.0), warps=4, registers=32, shared=0)
    assert predicted.cycles["issue"] == 1 + 3 * 3 + 3 * 5 * 2 + 7 * 2 + 1


def test_a_listing_without_code_is_refused():
    with pytest.raises(ValueError, match="nvdisasm -c -hex"):
        parse("nvdisasm fatal")


def test_trips_must_fit_the_loops():
    program = parse(listing(".L_x_0:", "FADD R0, R0, R1", "@P1 BRA `(.L_x_0)", "EXIT"))
    with pytest.raises(ValueError, match=r"1 loops, its trips are \(\)"):
        predict(program, H200, Work(1, (), 0.0), warps=4, registers=32, shared=0)


@pytest.mark.parametrize(
    ("text", "arch", "unit", "cycles"),
    [
        ("HGMMA.64x32x16.F32.BF16 R24, R80, gdesc[UR12], R24", 90, "tensor", 16),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", 90, "tensor", 128),
        ("HGMMA.64x64x8.F32.TF32 R24, R80, gdesc[UR12], R24", 90, "tensor", 32),
        ("HMMA.16816.F32.BF16 R4, R8, R10, R4", 80, "tensor", 8),
        ("HMMA.1688.F32.TF32 R4, R8, R10, R4", 80, "tensor", 8),
        ("MUFU.EX2 R4, R4", 90, "mufu", 8),
        ("FFMA R4, R4, R5, R6", 80, "fma", 2),
        ("FFMA R4, R4, R5, R6", 90, "fma", 1),
        ("LOP3.LUT R4, R4, R5, RZ, 0xc0, !PT", 90, "alu", 2),
        ("LDS.128 R4, [R2]", 90, "shared", 4),
        ("STS.U16 [R2], R4", 90, "shared", 1),
        ("LDSM.16.M88.4 R4, [R2]", 90, "shared", 4),
        ("LDSM.16.MT88.2 R4, [R2]", 90, "shared", 2),
        ("LDG.E.64 R4, desc[UR4][R2.64]", 90, "global", 2),
        ("LDG.E.64 R4, desc[UR4][R2.64]", 90, "bytes", 256),
        ("LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]", 90, "bytes", 512),
        ("@!PT LDS RZ, [RZ]", 90, "shared", 0),
    ],
)
def test_units(text, arch, unit, cycles):
    used = usage([decode(text, word())], MACHINES[arch])
    assert used[unit] == cycles
    assert used["issue"] == 1


def test_operands_of_warpgroup_products_cross_shared_memory():
    """B is [16, 64] in bfloat16, 16 wavefronts of 128 bytes; A as well where it is no register; each a quarter per warp."""
    from_registers = "HGMMA.64x64x16.F32.BF16 R24, R80, gdesc[UR12], R24"
    from_memory = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24"
    assert usage([decode(from_registers, word())], H200)["shared"] == 4
    assert usage([decode(from_memory, word())], H200)["shared"] == 8


def walk(*lines: str | tuple[str, int]) -> float:
    """Cycles of one block with this code."""
    return predict(parse(listing(*lines, "EXIT")), H200, Work(1, (), 0.0), warps=4, registers=32, shared=0).latency


def test_a_warp_waits_for_its_scoreboards():
    load = ("LDS R4, [R2]", word(stall=2, sets=0))
    assert walk(load, "FADD R0, R1, R1") == 2 + 1 + 1
    assert walk(load, ("FADD R0, R4, R4", word(mask=1))) == 30 + 1 + 1


def test_a_warp_waits_for_copies_but_not_for_those_that_may_be_in_flight():
    copy = ["LDGSTS.E.128 [R4], desc[UR4][R2.64]", "LDGDEPBAR"]
    one, two = walk(*copy, "DEPBAR.LE SB0, 0x0"), walk(*copy, "DEPBAR.LE SB0, 0x1")
    assert one > 300
    assert two == 4


def test_a_warp_waits_for_products():
    product = "HGMMA.64x128x16.F32.BF16 R24, R80, gdesc[UR12], R24, gsb0"
    assert walk(product, product) == 3
    assert walk(product, "WARPGROUP.DEPBAR.LE gsb0, 0x0") == 64 + 40 + 2
    assert walk(product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x0") == 2 * 64 + 40 + 2
    assert walk(product, product, "WARPGROUP.DEPBAR.LE gsb0, 0x1") == 64 + 40 + 2


def test_a_block_may_run_a_share_of_the_straight_code():
    program = parse(listing("FADD R0, R0, R1", ".L_x_0:", "FADD R0, R0, R1", "@P1 BRA `(.L_x_0)", "EXIT"))
    whole = predict(program, H200, Work(132, (3,), 0.0), warps=4, registers=32, shared=0)
    half = predict(program, H200, Work(132, (3,), 0.0, straight=0.5), warps=4, registers=32, shared=0)
    assert (whole.cycles["issue"], half.cycles["issue"]) == (2 + 6, 1 + 6)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared", "blocks"),
    [
        (90, 4, 181, 40960, 2),  # by registers
        (90, 4, 168, 40960, 3),
        (90, 4, 32, 0, 16),  # by warps
        (90, 1, 32, 0, 32),  # by blocks
        (90, 8, 64, 100 << 10, 2),  # by shared memory
        (80, 4, 255, 81 << 10, 2),
        (80, 4, 255, 82 << 10, 1),
        (86, 4, 128, 0, 4),
    ],
)
def test_occupancy(arch, warps, registers, shared, blocks):
    assert blocks_per_sm(MACHINES[arch], warps, registers, shared) == blocks


def test_a_kernel_that_does_not_fit_is_refused():
    program = parse(listing("EXIT"))
    with pytest.raises(ValueError, match="no block of 8 warps"):
        predict(program, H200, Work(1, (), 0.0), warps=8, registers=32, shared=229 << 10)


def test_blocks_wait_for_each_other_in_waves():
    """A long wait is hidden by other blocks on the multiprocessor, and comes again with each wave of them."""
    load = ("LDG.E R4, desc[UR4][R2.64]", word(sets=0))
    program = parse(listing(load, ("FADD R0, R4, R4", word(mask=1)), "EXIT"))

    def microseconds(grid: int, registers: int) -> float:
        return predict(program, H200, Work(grid, (), 0.0), warps=4, registers=registers, shared=0).microseconds

    assert microseconds(2 * 132, 255) == microseconds(132, 255)
    assert microseconds(3 * 132, 255) == pytest.approx(2 * microseconds(132, 255))
    assert microseconds(3 * 132, 128) == microseconds(132, 128)


def test_memory_binds_what_does_not_fit_in_the_cache():
    program = parse(listing("EXIT"))

    def predicted(size: float):
        return predict(program, H200, Work(132, (), size), warps=4, registers=32, shared=0)

    assert predicted(20e6).bound != "dram"
    big = predicted(4.3e9)
    assert (big.bound, round(big.microseconds)) == ("dram", 1000)


def test_every_bfloat16_kernel_states_its_work():
    shapes = ((1, 100), (1, 300), (32, 400))  # a configuration may be for few rows, or for many
    missing = [
        config.name
        for module in report.kernel_modules()
        for config in report.configs(module, 90)
        if config.dtype == "bf16" and all(work(config, shape_of(config, b, t)) is None for b, t in shapes)
    ]
    assert not missing, f"add to WORK in kernels/cost_shapes.py: {', '.join(missing)}"


def test_attention_covers_every_score():
    """Blocks times trips times a tile are the B H T^2 scores, at a T that fills tiles."""
    shape = Shape(2, 256, 256)
    for config in report.configs("relpos_attention", 90):
        blocks, name = config.launch.blocks, config.name.split()[0]
        if "D=64" not in config.name or name.endswith("draw"):
            continue
        own = work(config, shape)
        assert own is not None
        tile = blocks["BLOCK_N"] * blocks.get("BLOCK_M", 2 * blocks["BLOCK_N"])
        trips = own.trips[0] * own.trips[1] if name.endswith("position") else own.trips[0]
        scores = own.grid * tile * trips
        # the tiles of the position kernel lie along the diagonal, and stick out at both ends
        assert scores == pytest.approx(2 * 4 * 256**2, rel=0.6 if name.endswith("position") else 0)


# --- compiled ----------------------------------------------------------------------------------------------------------


def run_python(*args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: interpreted kernels cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


def test_the_report_predicts(tmp_path):
    out = tmp_path / "cost.json"
    run = ("-m", "lcconformer.kernels.report", "--cost", "--op", "partials", "--arch", "90", "--jobs", "1")
    done = run_python(*run, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "never results" in done.stdout
    written = json.loads(out.read_text())
    assert written["triton"] == report.triton.__version__
    assert {(r["name"], r["arch"], r["batch"], r["frames"]) for r in written["kernels"]} == {
        (f"partials.{name}", 90, b, t) for name in ("sum_rows", "accumulate") for b, t in ((1, 100), (32, 400))
    }
    assert all(r["microseconds"] > 0 and r["kilocycles"]["issue"] > 0 for r in written["kernels"])
    # what is filed was cheaper than what is compiled
    for row in written["kernels"]:
        row["microseconds"] /= 1.05
    out.write_text(json.dumps(written))
    done = run_python(*run, "--against", str(out))
    assert done.returncode == 1
    assert "partials.sum_rows fp32 sm_90 (1, 100): microseconds" in done.stderr
    assert "write the file again by --out" in done.stderr


def test_the_report_says_what_it_does_not_model(capsys):
    with pytest.raises(SystemExit):
        report.main(["--cost", "--arch", "100"])
    assert "knows no sm_100; give one of sm_80" in capsys.readouterr().err


SLOWER = """
import dataclasses, pathlib, sys
from lcconformer.kernels import partials, report
from lcconformer.kernels.common import LaunchConfig

config = next(iter(partials.aot_configs(90)))
path = pathlib.Path(sys.argv[1])
report.write((row.flat() for row in report.predictions(config, 90)), path)
assert report.costlier(report.predictions(config, 90), path) == []
# half the columns a program: twice the programs for the same sums, each with the same overhead
launch = LaunchConfig(4, 1, {"BLOCK_P": 32, "BLOCK_N": 16})
slower = dataclasses.replace(config, launch=launch, constexprs=launch.blocks)
found = report.costlier(report.predictions(slower, 90), path)
assert any("issue" in line for line in found), found
"""


def test_the_gate_notices_a_slower_kernel(tmp_path):
    done = run_python("-c", SLOWER, str(tmp_path / "cost.json"))
    assert done.returncode == 0, done.stderr


def cost(**changes: object) -> report.Cost:
    program = parse(listing("FADD R0, R1, R2", "EXIT"))
    predicted = predict(program, H200, Work(1320, (), 1e9), warps=4, registers=32, shared=0)
    return dataclasses.replace(report.Cost("op", "bf16", 90, "c0de", 32, 400, 32, 0, False, predicted), **changes)


def test_a_kernel_without_a_filed_cost_is_named(tmp_path):
    report.write([cost().flat()], tmp_path / "cost.json")
    assert report.costlier([cost()], tmp_path / "cost.json") == []
    assert report.costlier([cost(name="new")], tmp_path / "cost.json") == ["new bf16 sm_90 (32, 400): not in cost.json"]


def test_costs_of_another_triton_are_refused(tmp_path):
    path = tmp_path / "cost.json"
    path.write_text('{"triton": "2.0", "kernels": []}')
    with pytest.raises(ValueError, match=r"of Triton 2\.0"):
        report.costlier([cost()], path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_kernel_got_costlier():
    """On the version of Triton that the file is of; another one compiles otherwise."""
    filed = json.loads(FILED.read_text())["triton"]
    if filed != report.triton.__version__:
        pytest.skip(f"{FILED.name} is of Triton {filed}, this is {report.triton.__version__}")
    run = ("-m", "lcconformer.kernels.report", "--cost", "--match", "bf16", "--jobs", "2")
    done = run_python(*run, "--changed", str(FILED), "--against", str(FILED))
    assert done.returncode == 0, done.stderr
