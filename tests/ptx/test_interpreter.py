"""The interpreter of PTX on fragments written by hand: what each instruction does, and that what is wrong is a fault."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from .instructions import operand_places, quotient
from .interpreter import Fault, Memory, from_bf16, launch, to_bf16
from .program import parse

HEAD = """
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({params}) .reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<60>; .reg .b64 %rd<20>; .reg .f32 %f<80>;
    mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, smem; add.s32 %r3, %r2, %r1;
    {loads}
    cvt.u64.u32 %rd10, %r1; add.s64 %rd11, %rd0, %rd10;
    {body}
    ret;
}}
"""
# thread i: %r3 is its word of shared memory, %rd11 of the first array; %rd0, %rd1, ... are the arrays


def run(
    body: str, *arrays: np.ndarray, threads: int = 32, grid: Sequence[int] = (1,), shared: int = 4096
) -> dict[str, list[int]]:
    params = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    loads = " ".join(f"ld.param.u64 %rd{i}, [p{i}];" for i in range(len(arrays)))
    memory = Memory()
    at = [np.uint64(memory.add(a.reshape(-1).view(np.uint8))).tobytes() for a in arrays]
    program = parse(HEAD.format(params=params, threads=threads, loads=loads, body=body))
    return launch(program, grid, at, memory, shared)


def values(body: str, given: np.ndarray, threads: int = 32, result: str = "%r5") -> np.ndarray:
    """What ``body`` leaves in ``result`` of each thread, whose word of ``given`` is in %r4."""
    out = np.zeros(threads, np.uint32)
    run(f"ld.global.b32 %r4, [%rd11]; {body} add.s64 %rd12, %rd1, %rd10; st.global.b32 [%rd12], {result};",
        given.view(np.uint32), out, threads=threads)  # fmt: skip
    return out


DEPENDENTS = "griddepcontrol.launch_dependents;"
HIGH = "mov.b32 {%rs1, %rs2}, %r6; cvt.f32.bf16 %r5, %rs2;"


def ballot(bits: np.ndarray) -> int:
    return int(np.packbits(bits, bitorder="little").view(np.int32)[0])


def integers(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(2**31), 2**31, 32).astype(np.int32)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("add.s32 %r5, %r4, 7;", lambda x: x + 7),
        ("mul.hi.s32 %r5, %r4, -123456789;", lambda x: (x.astype(np.int64) * -123456789 >> 32).astype(np.int32)),
        ("mad.lo.s32 %r5, %r4, 3, 5;", lambda x: x * 3 + 5),
        ("shr.s32 %r5, %r4, 40;", lambda x: np.where(x < 0, -1, 0)),
        ("shl.b32 %r5, %r4, 32;", lambda x: x * 0),
        ("bfe.s32 %r5, %r4, 3, 5;", lambda x: (x >> 3 << 27) >> 27),
        ("bfe.u32 %r5, %r4, 28, 8;", lambda x: (x >> 28) & 15),
        ("bfi.b32 %r5, 5, %r4, 4, 3;", lambda x: (x & ~0x70) | 0x50),
        ("prmt.b32 %r5, %r4, 0, 0x0123;", lambda x: x.byteswap()),
        ("lop3.b32 %r5, %r4, 255, 3, 0x6a;", lambda x: (x & 255) ^ 3),
        ("shf.l.wrap.b32 %r5, %r4, %r4, 8;", lambda x: (x << 8) | ((x >> 24) & 255)),
        ("div.s32 %r5, %r4, -7;", lambda x: (np.trunc(x / -7)).astype(np.int32)),
        ("rem.s32 %r5, %r4, 7;", lambda x: np.fmod(x, 7)),
        ("setp.lt.s32 %p1, %r4, 0; selp.b32 %r5, 1, 2, %p1;", lambda x: np.where(x < 0, 1, 2)),
        ("setp.lt.s32 %p1, %r4, 0; mov.u32 %r5, 4; @!%p1 mov.u32 %r5, 3;", lambda x: np.where(x < 0, 4, 3)),
        ("cvt.s64.s32 %rd5, %r4; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r5, %rd5;", lambda x: np.where(x < 0, -1, 0)),
        ("mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r5, {%rs2, %rs1};", lambda x: (x << 16) | ((x >> 16) & 0xFFFF)),
        ("shfl.sync.bfly.b32 %r5, %r4, 3, 31, -1;", lambda x: x[np.arange(32) ^ 3]),
        ("shfl.sync.idx.b32 %r5, %r4, 1, 0x181f, -1;", lambda x: x[np.arange(32) // 8 * 8 + 1]),
        ("shfl.sync.up.b32 %r5|%p1, %r4, 1, 0, -1;", lambda x: x[np.maximum(np.arange(32) - 1, 0)]),
        ("shfl.sync.down.b32 %r5, %r4, 2, 31, -1;", lambda x: x[[*range(2, 32), 30, 31]]),
        ("setp.lt.s32 %p1, %r4, 0; vote.sync.ballot.b32 %r5, %p1, -1;", lambda x: np.full(32, ballot(x < 0))),
        ("redux.sync.min.s32 %r5, %r4, -1;", lambda x: np.full(32, x.min())),
        ("elect.sync %r6|%p1, -1; selp.b32 %r5, %r4, 0, %p1;", lambda x: np.where(np.arange(32) == 0, x, 0)),
        ("popc.b32 %r5, %r4;", lambda x: np.bitwise_count(x.view(np.uint32)).astype(np.int32)),
        ("clz.b32 %r5, %r4;", lambda x: np.array([32 - int(v).bit_length() for v in x.view(np.uint32)], np.int32)),
        (f"griddepcontrol.wait; {DEPENDENTS} setmaxnreg.inc.sync.aligned.u32 232; mov.u32 %r5, %r4;", lambda x: x),
    ],
)  # fmt: skip
def test_integers_and_warps(body, expected):
    given = integers()
    np.testing.assert_array_equal(values(body, given).view(np.int32), expected(given))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("fma.rn.f32 %r5, %r4, %r4, 0f3F800000;", lambda x: (x.astype(np.float64) ** 2 + 1).astype(np.float32)),
        ("ex2.approx.ftz.f32 %r5, %r4;", np.exp2),
        ("div.full.f32 %r5, 0f3F800000, %r4;", lambda x: 1 / x),
        ("max.f32 %r5, %r4, 0f7FC00000;", lambda x: x),
        ("max.NaN.f32 %r5, %r4, 0f7FC00000;", lambda x: x * np.float32(np.nan)),
        ("cvt.rzi.s32.f32 %r5, %r4; cvt.rn.f32.s32 %r5, %r5;", np.trunc),
        ("cvt.rmi.f32.f32 %r5, %r4;", np.floor),
        ("cvt.sat.f32.f32 %r5, %r4;", lambda x: np.clip(x, 0, 1)),
        ("cvt.rn.f16.f32 %rs1, %r4; cvt.f32.f16 %r5, %rs1;", lambda x: x.astype(np.float16).astype(np.float32)),
        ("cvt.rn.bf16.f32 %rs1, %r4; cvt.f32.bf16 %r5, %rs1;", lambda x: from_bf16(to_bf16(x))),
        (f"cvt.rn.bf16x2.f32 %r6, %r4, 0f40000000; add.rn.bf16x2 %r6, %r6, %r6; {HIGH}", lambda x: 2 * from_bf16(to_bf16(x))),
        ("setp.ltu.f32 %p1, %r4, 0f7FC00000; selp.f32 %r5, 0f3F800000, 0f00000000, %p1;", np.ones_like),
        ("setp.lt.f32 %p1, %r4, 0f7FC00000; selp.f32 %r5, 0f3F800000, 0f00000000, %p1;", np.zeros_like),
    ],
)  # fmt: skip
def test_floats(body, expected):
    given = np.random.default_rng(0).normal(0, 3, 32).astype(np.float32)
    np.testing.assert_array_equal(values(body, given).view(np.float32), expected(given))


def test_lanes_read_different_parameters():
    body = """
        setp.lt.s32 %p1, %r4, 0; mov.u64 %rd5, p0; add.s64 %rd6, %rd5, 8; selp.b64 %rd5, %rd5, %rd6, %p1;
        ld.param.u64 %rd7, [%rd5]; setp.eq.s64 %p1, %rd7, %rd0; selp.b32 %r5, 1, 2, %p1;
    """
    given = integers()
    np.testing.assert_array_equal(values(body, given), np.where(given < 0, 1, 2))


def test_bf16_rounds_to_the_even_neighbour():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7FC00001], np.uint32)
    assert to_bf16(bits.view(np.float32)).tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FFF]


def test_division_rounds_towards_zero():
    a, b = np.array([-7, 7, -8, 5], np.int32), np.array([2, -2, 2, 0], np.int32)
    assert quotient(a, b).tolist() == [-3, -3, -4, -1]


LOOP = """
    and.b32 %r6, %r0, 3; mov.u32 %r5, 0;
    $again: setp.ge.s32 %p1, %r5, %r6; @%p1 bra $out;
    add.s32 %r5, %r5, 1; bra.uni $again;
    $out:
"""


def test_threads_branch_apart_and_meet_again():
    """The shuffle behind the loop needs every thread of the warp again."""
    found = values(f"{LOOP} shfl.sync.bfly.b32 %r5, %r5, 1, 31, -1;", integers())
    np.testing.assert_array_equal(found, (np.arange(32) & 3) ^ 1)


def test_threads_that_return_early_are_not_waited_for():
    out = np.zeros(64, np.int32)
    run("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0; st.global.b32 [%rd11], 5;", out, threads=64)
    assert out.tolist() == [0] * 32 + [5] * 32


def test_blocks_and_labels_in_braces():
    out = np.zeros((3, 32), np.int32)
    once = "{ .reg .pred go; setp.eq.u32 go, %r6, 0; @go bra skip; add.s32 %r7, %r7, %r6; skip: }"
    run(f"mov.u32 %r6, %ctaid.y; mov.u32 %r7, 0; {once} {once} mul.lo.s32 %r8, %r6, 128; cvt.u64.u32 %rd12, %r8;"
        "add.s64 %rd11, %rd11, %rd12; st.global.b32 [%rd11], %r7;", out, grid=(1, 3))  # fmt: skip
    assert out[:, 0].tolist() == [0, 2, 4]


# --- shared memory

REVERSE = """
    st.shared.b32 [%r3], %r0; {wait}
    xor.b32 %r5, %r1, 252; add.s32 %r5, %r2, %r5; ld.shared.b32 %r6, [%r5]; st.global.b32 [%rd11], %r6;
"""


def test_a_barrier_orders_warps():
    out = np.zeros(64, np.int32)
    run(REVERSE.format(wait="bar.sync 0;"), out, threads=64)
    assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize("wait", ["", "bar.warp.sync -1;", "bar.sync 1, 32;", "bar.arrive 1, 128;"])
def test_a_race_between_warps_is_a_fault(wait):
    with pytest.raises(Fault, match=r"race: read of what another warp wrote.*ld\.shared|deadlock"):
        run(REVERSE.format(wait=wait), np.zeros(64, np.int32), threads=64)


def test_writing_what_another_warp_still_reads_is_a_fault():
    again = REVERSE.format(wait="bar.sync 0;")
    with pytest.raises(Fault, match="race: write of what another warp read"):
        run(again + again.replace("$", "$2"), np.zeros(64, np.int32), threads=64)


def test_warps_write_different_values_to_one_place():
    with pytest.raises(Fault, match="different values"):
        run("st.shared.b32 [%r2], %r0;", np.zeros(64, np.int32), threads=64)


def test_a_named_barrier_of_two_of_four_warps():
    """Producers arrive and go on, consumers wait: only those two warps need to meet."""
    out = np.zeros(128, np.int32)
    body = """
        setp.lt.u32 %p1, %r0, 32; setp.ge.u32 %p2, %r0, 96;
        @%p1 st.shared.b32 [%r3], %r0; @%p1 bar.arrive 1, 64;
        @%p2 bar.sync 1, 64; @%p2 add.s32 %r5, %r3, -384; @%p2 ld.shared.b32 %r6, [%r5]; @%p2 st.global.b32 [%rd11], %r6;
    """
    run(body, out, threads=128)
    assert out.tolist() == [0] * 96 + list(range(32))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.shared.b32 %r5, [%r3];", "before anything was written"),
        ("st.shared.b32 [%r3+4096], %r0;", "shared memory out of bounds"),
        ("st.shared.b32 [%r3+2], %r0;", "misaligned shared"),
        ("ld.global.b32 %r5, [%rd11+4];", "outside of every tensor"),
        ("ld.global.b32 %r5, [%rd11+2];", "misaligned global"),
        ("frobnicate.b32 %r5, %r4;", r"no such instruction is known: frobnicate\.b32"),
        ("bar.sync 1, 64;", "deadlock"),
        ("$on: bra $on;", "still running"),
        ("trap;", "trapped"),
    ],
)
def test_faults(body, reason, monkeypatch):
    monkeypatch.setattr("tests.ptx.interpreter.MAX_STEPS", 1000)
    with pytest.raises(Fault, match=reason):
        run(body, np.zeros(32, np.int32))


@pytest.mark.parametrize(("step", "passes"), [(4, 1), (8, 2), (128, 32), (132, 1)])
def test_bank_conflicts_are_counted(step, passes):
    found = run(
        f"mul.lo.s32 %r5, %r0, {step}; add.s32 %r5, %r2, %r5; st.shared.b32 [%r5], %r0;",
        np.zeros(32, np.int32),
        shared=8192,
    )
    assert list(found.values()) == [[1, passes, 1]]


# --- copies on their way

COPY = """
    shl.b32 %r5, %r0, 4; cvt.u64.u32 %rd5, %r5; add.s64 %rd6, %rd0, %rd5; add.s32 %r6, %r2, %r5;
    cp.async.cg.shared.global [%r6], [%rd6], 16; cp.async.commit_group; {wait}
    ld.shared.b32 %r7, [%r6]; st.global.b32 [%rd6], 0; add.s64 %rd7, %rd1, %rd10; st.global.b32 [%rd7], %r7;
"""


def test_an_asynchronous_copy_lands_at_its_wait():
    given, out = np.arange(128, dtype=np.int32), np.zeros(32, np.int32)
    run(COPY.format(wait="cp.async.wait_group 0;"), given, out)
    assert out.tolist() == list(range(0, 128, 4))


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 1;"])
def test_a_copy_that_nobody_waited_for(wait):
    with pytest.raises(Fault, match="still on its way"):
        run(COPY.format(wait=wait), np.arange(128, dtype=np.int32), np.zeros(32, np.int32))


def test_a_copy_of_fewer_bytes_fills_with_zeros():
    given, out = np.arange(1, 129, dtype=np.int32), np.ones(32, np.int32)
    body = COPY.format(wait="cp.async.wait_all;").replace("16; cp", "16, 0; cp").replace("%r7, [%r6]", "%r7, [%r6+4]")
    run(body, given, out)
    assert not out.any()


BULK = """
    setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r2+1024], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2+1024], 128;
    @%p1 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd0], 128, [%r2+1024];
    {wait}
    ld.shared.b32 %r7, [%r3]; add.s64 %rd7, %rd1, %rd10; st.global.b32 [%rd7], %r7;
"""
WAIT = "{ .reg .pred done; waiting: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2+1024], 0; @!done bra waiting; }"


def test_a_bulk_copy_lands_when_its_mbarrier_is_waited_for():
    given, out = np.arange(32, dtype=np.int32), np.zeros(32, np.int32)
    run(BULK.format(wait=WAIT), given, out)
    assert out.tolist() == given.tolist()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (BULK.format(wait=""), "another warp wrote"),
        (BULK.format(wait=WAIT).replace("_, [%r2+1024], 128", "_, [%r2+1024], 256"), "deadlock"),
        (BULK.format(wait=WAIT.replace("], 0", "], 1")), "another warp wrote|deadlock"),
        (BULK.format(wait=WAIT).replace("@%p1 mbarrier.init.shared::cta.b64 [%r2+1024], 1;", ""), "not initialised"),
    ],
)
def test_a_bulk_copy_without_its_wait(body, reason):
    with pytest.raises(Fault, match=reason):
        run(body, np.arange(32, dtype=np.int32), np.zeros(32, np.int32))


def test_a_ring_of_a_producer_and_a_consumer_warp():
    """Four stages through one buffer: the full and the empty mbarrier change phase each time."""
    given, out = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    wait = WAIT.replace("{", "{{").replace("}", "}}").replace("1024", "{at}").replace(", 0;", ", {parity};")
    body = f"""
        setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 32; mov.u32 %r8, 0; mov.u64 %rd8, %rd0;
        @%p1 mbarrier.init.shared.b64 [%r2+1024], 1; @%p1 mbarrier.init.shared.b64 [%r2+1032], 32; bar.sync 0;
        add.s32 %r9, %r3, -128; sub.s64 %rd9, %rd10, 128; add.s64 %rd9, %rd9, %rd1;
        $next: and.b32 %r10, %r8, 1; xor.b32 %r11, %r10, 1;
        @!%p2 bra $consume;
        {wait.format(at=1032, parity="%r11")}
        @%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2+1024], 128;
        @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd8], 128, [%r2+1024];
        bra.uni $end;
        $consume: {wait.format(at=1024, parity="%r10")}
        ld.shared.b32 %r7, [%r9]; st.global.b32 [%rd9], %r7; mbarrier.arrive.shared.b64 %rd12, [%r2+1032];
        $end: add.s64 %rd8, %rd8, 128; add.s64 %rd9, %rd9, 128;
        add.s32 %r8, %r8, 1; setp.lt.u32 %p3, %r8, 4; @%p3 bra $next;
    """
    run(body, given, out, threads=64)
    assert out.tolist() == given.tolist()
    with pytest.raises(Fault, match=r"race|deadlock|arrivals"):
        run(body.replace("[%r2+1032], %r11", "[%r2+1032], %r10"), given, out, threads=64)
    with pytest.raises(Fault, match="race"):
        run(body.replace(wait.format(at=1032, parity="%r11"), ""), given, out, threads=64)


def test_a_bulk_store_reads_until_its_wait():
    body = """
        st.shared.b32 [%r3], %r0; {fence} setp.eq.u32 %p1, %r0, 0;
        @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%r2], 128; cp.async.bulk.commit_group;
        {wait} st.shared.b32 [%r3], 0;
    """
    fence, wait = "fence.proxy.async.shared::cta;", "cp.async.bulk.wait_group.read 0;"
    out = np.zeros(32, np.int32)
    run(body.format(fence=fence, wait=wait), out)
    assert out.tolist() == list(range(32))
    with pytest.raises(Fault, match="still being read"):
        run(body.format(fence=fence, wait=""), out)
    with pytest.raises(Fault, match=r"fence\.proxy\.async"):
        run(body.format(fence="", wait=wait), out)


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics(space):
    out = np.zeros(32, np.int32)
    at = "%rd0" if space == "global" else "%r2"
    run(f"st.shared.b32 [%r3], 0; atom.{space}.add.u32 %r5, [{at}], 2; red.{space}.max.s32 [{at}+4], %r0;"
        + ("ld.shared.b32 %r6, [%r3]; st.global.b32 [%rd11], %r6;" if space == "shared" else ""), out)  # fmt: skip
    assert out[:3].tolist() == [64, 31, 0]


def test_atomic_add_of_bf16_pairs():
    out = np.zeros(32, np.uint32)
    run("mov.u32 %r5, 0x3F804000; red.global.add.noftz.bf16x2 [%rd0], %r5;", out)
    assert from_bf16(np.array([out[0] & 0xFFFF, out[0] >> 16], np.uint16)).tolist() == [64.0, 32.0]


# --- matrices


def test_ldmatrix_and_stmatrix_are_inverse():
    """A warp loads an 8 x 8 matrix from rows, and stores it transposed."""
    given, out = np.arange(64, dtype=np.uint16), np.zeros(64, np.uint16)
    body = """
        add.s64 %rd5, %rd0, %rd10; ld.global.b32 %r4, [%rd5]; st.shared.b32 [%r3], %r4; bar.warp.sync -1;
        and.b32 %r5, %r0, 7; shl.b32 %r5, %r5, 4; add.s32 %r5, %r2, %r5;
        ldmatrix.sync.aligned.m8n8.x1{a}.shared.b16 {{%r6}}, [%r5];
        stmatrix.sync.aligned.m8n8.x1{b}.shared.b16 [%r5+512], {{%r6}};
        ld.shared.b32 %r7, [%r3+512]; add.s64 %rd6, %rd1, %rd10; st.global.b32 [%rd6], %r7;
    """
    for a, b in (("", ""), (".trans", ".trans"), (".trans", ""), ("", ".trans")):
        run(body.format(a=a, b=b), given, out)
        expected = given.reshape(8, 8)
        assert out.reshape(8, 8).tolist() == (expected if a == b else expected.T).tolist()


ROUND = {
    "bf16": lambda x: from_bf16(to_bf16(x)),
    "f16": lambda x: x.astype(np.float16).astype(np.float32),
    "tf32": lambda x: (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32),
}
BITS = {"bf16": to_bf16, "f16": lambda x: x.astype(np.float16).view(np.uint16), "tf32": lambda x: x.view(np.uint32)}


@pytest.mark.parametrize(("kind", "k"), [("bf16", 16), ("bf16", 8), ("f16", 16), ("tf32", 8), ("tf32", 4)])
def test_mma(kind, k):
    """Fragments gathered by the tables of the PTX ISA: row groupID + 8 (i & 1), column of register i // 2."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(0, 1, s).astype(np.float32) for s in ((16, k), (k, 8), (16, 8)))
    per = 1 if kind == "tf32" else 2
    lane, group, quad = np.arange(32), np.arange(32) // 4, np.arange(32) % 4
    words = []
    for register in range(16 * k // 32 // per):
        row = group + 8 * (register % 2)
        numbers = [BITS[kind](a[row, per * quad + 4 * per * (register // 2) + n]) for n in range(per)]
        words.append(np.stack(numbers, 1).copy().view(np.uint32)[:, 0])
    for register in range(8 * k // 32 // per):
        numbers = [BITS[kind](b[per * quad + 4 * per * register + n, group]) for n in range(per)]
        words.append(np.stack(numbers, 1).copy().view(np.uint32)[:, 0])
    places = [(group + 8 * (i // 2), 2 * quad + i % 2) for i in range(4)]
    words += [c[p].view(np.uint32) for p in places]
    given, out = np.stack(words, 1).copy(), np.zeros((32, 4), np.float32)
    n, na = len(words), 16 * k // 32 // per
    regs = [f"%r{20 + i}" for i in range(n)]
    loads = "".join(f"ld.global.b32 {r}, [%rd5+{4 * i}];" for i, r in enumerate(regs))
    stores = "".join(f"st.global.b32 [%rd6+{4 * i}], %r{10 + i};" for i in range(4))
    group_of = lambda names: "{" + ",".join(names) + "}"  # noqa: E731
    run(f"mul.wide.u32 %rd5, %r0, {4 * n}; add.s64 %rd5, %rd0, %rd5; mul.wide.u32 %rd6, %r0, 16; add.s64 %rd6, %rd1, %rd6;"
        f"{loads} mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r10,%r11,%r12,%r13}}, {group_of(regs[:na])},"
        f"{group_of(regs[na:-4])}, {group_of(regs[-4:])}; {stores}", given, out)  # fmt: skip
    expected = ROUND[kind](a).astype(np.float64) @ ROUND[kind](b) + c
    found = np.zeros((16, 8))
    for i, (r, col) in enumerate(places):
        found[r, col] = out[lane, i]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def descriptor(start: int, swizzle: int, lead: int, stride: int) -> int:
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | (lead >> 4) << 16 | (stride >> 4) << 32 | mode << 62


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_descriptor_reaches_every_chunk_of_a_tile_once(swizzle, transposed):
    """64 rows by as many columns as a swizzled line holds: 16-byte chunks permuted within 8 lines, nothing twice."""
    columns = swizzle // 2
    at = operand_places(
        descriptor(1024, swizzle, 8 * swizzle * 8, 8 * swizzle),
        64 if not transposed else columns,
        columns if not transposed else 64,
        2,
        transposed,
    )
    assert sorted(at.reshape(-1).tolist()) == list(range(1024, 1024 + 64 * swizzle, 2))
    line = (at[1] if not transposed else at[:, 1]) - 1024
    # the second line of 128 bytes has its chunks exchanged in pairs
    expected = np.arange(columns) * 2 + swizzle
    assert line.tolist() == (expected ^ (((1024 + expected) >> 7 & (swizzle // 16 - 1)) << 4)).tolist()


WGMMA = """
    {fill} bar.sync 0; {fence}
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0,%f1,%f2,%f3}}, {a}, {b}, 0, 1, 1{flags};
    wgmma.commit_group.sync.aligned; {wait}
    mul.wide.u32 %rd6, %r0, 16; add.s64 %rd6, %rd1, %rd6; st.global.v4.f32 [%rd6], {{%f0,%f1,%f2,%f3}};
"""
# thread i copies 32 bytes: 64 rows of A and 8 of B, 32 bytes each, 32-byte swizzle
FILL = """
    setp.lt.u32 %p1, %r0, 72; shl.b32 %r5, %r0, 5; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd0, %rd5;
    mov.u32 %r20, 0; mov.u32 %r21, 0; mov.u32 %r22, 0; mov.u32 %r23, 0; mov.u32 %r24, 0; mov.u32 %r25, 0;
    @%p1 ld.global.v4.b32 {%r20,%r21,%r22,%r23}, [%rd5]; @%p1 ld.global.v4.b32 {%r24,%r25,%r26,%r27}, [%rd5+16];
    bfe.u32 %r6, %r0, 2, 1; shl.b32 %r6, %r6, 4; xor.b32 %r7, %r5, %r6; add.s32 %r7, %r7, %r2; xor.b32 %r8, %r7, 16;
    @%p1 st.shared.v4.b32 [%r7], {%r20,%r21,%r22,%r23}; @%p1 st.shared.v4.b32 [%r8], {%r24,%r25,%r26,%r27};
"""
SOUND = {
    "fill": FILL,
    "fence": "fence.proxy.async.shared::cta;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "a": str(descriptor(0, 32, 16, 256)),
    "b": str(descriptor(2048, 32, 16, 256)),
    "flags": ", 0, 0",
}


def wgmma(**change: str) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(0, 1, (72, 16)).astype(np.float32)
    out = np.zeros((128, 4), np.float32)
    run(WGMMA.format(**(SOUND | change)), to_bf16(x), out, threads=128)
    x = from_bf16(to_bf16(x))
    # thread 32 w + 4 g + q, number n: row 16 w + g + 8 (n // 2), column 2 q + n % 2
    found = out.reshape(4, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4).reshape(64, 8)
    return found, x[:64] @ x[64:].T


def test_wgmma_from_shared_memory():
    np.testing.assert_allclose(*wgmma(), rtol=1e-5, atol=1e-5)


def test_wgmma_result_before_its_wait_is_nan():
    found, _ = wgmma(wait="mov.f32 %f9, %f0; wgmma.wait_group.sync.aligned 0; mov.f32 %f0, %f9;")
    assert np.isnan(found[:, ::2]).any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fence": ""}, r"fence\.proxy\.async"),
        ({"wait": ""}, "nobody waited"),
        ({"wait": "st.shared.b32 [%r3], 0;" + SOUND["wait"]}, "still being read"),
        ({"b": str(descriptor(4096, 32, 16, 256))}, "beyond shared memory"),
        ({"b": str(descriptor(2304, 32, 16, 256))}, "before anything was written"),
        ({"fence": "", "fill": f"{FILL} bar.sync 0; {SOUND['fence']}"}, None),
    ],
)  # fmt: skip
def test_wgmma_without_what_it_needs(change, reason):
    if reason is None:
        np.testing.assert_allclose(*wgmma(**change), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(Fault, match=reason):
        wgmma(**change)


def test_wgmma_before_the_barrier_races():
    body = re.sub(r"bar\.sync 0;", "", WGMMA, count=1)
    x, out = np.zeros((72, 16), np.uint16), np.zeros((128, 4), np.float32)
    with pytest.raises(Fault, match=r"race"):
        run(body.format(**SOUND), x, out, threads=128)
