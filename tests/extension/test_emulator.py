"""The emulator of CUDA threads: right kernels pass in every schedule, wrong ones are caught and named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from .building import CSRC, HERE, SANITIZE, build, included

SEEDS = range(5)


@pytest.fixture(scope="session")
def run_case(gxx):
    program = build("emulator_cases", [(HERE / "emulator_cases.cpp", SANITIZE)], [], gxx)

    def run(case: str, seed: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, case, str(seed)], capture_output=True, text=True, timeout=240)

    return run


@pytest.mark.parametrize(
    "case",
    [
        "barriers", "warp_operations", "atomics", "grid_barrier", "copies", "copies_in_two_groups",
        "ring_of_copies", "ring_of_blocks", "barrier_of_all_threads",
        "products_of_float16", "products_of_bfloat16", "transposed_products_of_float16", "transposed_products_of_bfloat16",
        # rows by depth by columns where there is more than one choice; left factors from registers unless said
        "products_of_groups_32x32", "products_of_groups_32x64", "products_of_groups_96x64", "products_of_groups_128x64",
        "products_of_groups_64x96", "products_of_groups_64x128",
        "products_of_shared_memory_96x64", "products_of_shared_memory_128x64", "two_products",
    ],
)  # fmt: skip
def test_right_kernels_pass_in_every_schedule(run_case, case):
    for seed in SEEDS:
        result = run_case(case, seed)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("case", "wavefronts", "conflicts"),
    [
        # of the 32 lanes of a warp, stored and loaded; three warps
        ("floats", 1, 0),
        ("floats_in_two_banks", 16, 15),
        ("pairs", 2, 0),
        ("pairs_of_every_other_pair", 4, 2),
        ("fours", 4, 0),
        ("fours_of_every_other_four", 8, 4),
    ],
)
def test_bank_conflicts_are_counted(run_case, case, wavefronts, conflicts):
    result = run_case(f"traffic_of_{case}", 1)
    assert result.stdout == f"{2 * 3 * wavefronts} {2 * 3 * conflicts}\n", result.stderr


def test_a_launch_leaves_the_current_device_as_it_was(run_case):
    assert run_case("device_after_a_launch", 0).returncode == 0
    missing = run_case("missing_device", 0)
    assert missing.returncode == 0
    assert missing.stdout == "case: invalid device ordinal\n"


def test_the_seed_chooses_the_schedule(run_case):
    orders = [run_case("order", seed).stdout for seed in SEEDS]
    assert len(set(orders)) == len(orders)
    assert run_case("order", 0).stdout == orders[0]


def test_a_copy_reads_its_source_at_a_random_step_before_its_wait(run_case):
    seen = [run_case("copy_of_what_changes", seed).stdout.split() for seed in range(20)]
    assert all(len(of_threads) == 96 and {*of_threads} <= {"0", "1"} for of_threads in seen)
    assert {of_threads[0] for of_threads in seen} == {"0", "1"}  # one copy, by the schedule
    assert run_case("copy_of_what_changes", 0).stdout.split() == seen[0]


def test_a_product_reads_its_factors_at_a_random_step_before_its_wait(run_case):
    seen = [run_case("product_of_what_changes", seed).stdout.split() for seed in range(20)]
    # sums of 16 zeros, of 16 ones, or of a column that changes meanwhile
    assert all(len(of_threads) == 256 and {*map(int, of_threads)} <= {*range(17)} for of_threads in seen)
    assert {of_threads[0] for of_threads in seen} >= {"0", "16"}
    assert run_case("product_of_what_changes", 0).stdout.split() == seen[0]


@pytest.mark.parametrize("case", ["without_wait", "without_the_first_wait", "without_commit", "without_barrier"])
def test_a_product_that_is_not_waited_for_gives_a_wrong_result(run_case, case):
    # under an odd seed a warpgroup multiplies before the other one has stored its part
    for seed in SEEDS[1::2] if case == "without_barrier" else SEEDS:
        result = run_case(f"products_{case}", seed)
        assert result.returncode == 3, result.stderr


OF_PRODUCTS = {
    "products_not_shown": r"at line \d+ has not been shown to products by block \(0, 0, 0\) thread",
    "products_without_beginning": r"multiplies at line \d+ without begin_products",
    "product_without_a_warp": r"deadlock: .* waits in multiply_add_async at .*cases.cpp:\d+; .*\(96, 0, 0\) has ret",
    "product_of_a_changed_factor": r"changes a factor of the product at line \d+ before its wait",
    "product_of_two_descriptors": r"divergent warpgroup: .* multiplies at line \d+ while others .*by other factors",
    "product_past_the_end": r"a factor of the product at line \d+ reaches beyond the block's shared memory",
    "product_left_on_its_way": r"returns before its products are done",
}


@pytest.mark.parametrize("case", OF_PRODUCTS)
def test_what_goes_wrong_with_products_is_named(run_case, case):
    for seed in SEEDS:
        result = run_case(case, seed)
        assert result.returncode == 4, result.stderr
        assert re.search(OF_PRODUCTS[case], result.stderr, re.DOTALL), result.stderr


IN_CLUSTERS = {
    "barrier_not_seen_yet": r"(has not taken|where there is no barrier yet)",
    "arrival_ahead_of_the_block": r"where the store at line \d+ of block .* is on its way",
    "missing_arrival": r"deadlock: .*wait_at at .*cases.cpp:\d+",
    "missing_wait_of_the_cluster": r"where the store at line \d+ of block .* is on its way",
    "store_to_what_is_read": r"where the store at line \d+ of block .* is on its way",
    "block_that_has_returned": r"(which has returned|has returned; \d+ threads wait|returns while the store at line \d+)",
    "block_that_is_not_there": r"stores to block 4 .*which there is not",
    "arrives_twice": r"arrives again without a wait at line \d+",
    "waits_without_arrival": r"waits without having arrived at line \d+",
    "store_left_on_its_way": r"thread \(3, 0, 0\) has not released its store at line \d+",
    "stores_to_one_place": r"where the store at line \d+ of .* is on its way",
}


@pytest.mark.parametrize("case", IN_CLUSTERS)
def test_what_goes_wrong_in_a_cluster_is_named(run_case, case):
    # under an odd seed a thread goes on to the release of its store before another stores there
    for seed in SEEDS[::2] if case == "stores_to_one_place" else SEEDS:
        result = run_case(case, seed)
        assert result.returncode == 4, result.stderr
        assert re.search(IN_CLUSTERS[case], result.stderr, re.DOTALL), result.stderr


@pytest.mark.parametrize("case", ["missing_barrier_before_read", "missing_barrier_before_write"])
def test_a_missing_barrier_gives_a_wrong_result(run_case, case):
    for seed in SEEDS:
        result = run_case(case, seed)
        assert result.returncode == 3, result.stderr


@pytest.mark.parametrize("warp", ["first", "second", "third"])
def test_any_warp_may_run_ahead_to_where_a_barrier_is_missing(run_case, warp):
    """Under an odd seed; the one that runs ahead overtakes nobody where it is the last of its block."""
    codes = [run_case(f"{warp}_warp_runs_ahead", seed).returncode for seed in range(1, 20, 2)]
    assert {*codes} <= {0, 3}
    assert codes.count(3) >= 8, codes


@pytest.mark.parametrize("case", ["static_index", "dynamic_index", "global_index"])
def test_an_index_out_of_bounds_is_caught(run_case, case):
    for seed in SEEDS:
        result = run_case(case, seed)
        assert result.returncode not in (0, 3, 4)
        assert "heap-buffer-overflow" in result.stderr


def test_a_misaligned_load_is_caught(run_case):
    result = run_case("misaligned", 0)
    assert result.returncode not in (0, 3, 4)
    assert "misaligned address" in result.stderr


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "divergent_barrier",
            r"divergent barrier: block \(\d, 0, 0\) thread \(\d+, 0, 0\) is at .*cases.cpp:\d+ while",
        ),
        (
            "missing_thread",
            r"deadlock: .*__syncthreads at .*cases.cpp:\d+; block \(1, 0, 0\) thread \(5, 0, 0\) has ret",
        ),
        ("missing_lane", r"deadlock: .*__shfl_down_sync at .*cases.cpp:\d+; .*thread \(7, 0, 0\) has returned"),
        ("divergent_warp", r"divergent warp: block .* is in __shfl_\w+_sync at line \d+ while others"),
        ("copy_without_wait", r"is in load at .*cases.cpp:\d+ where the copy at line \d+ of .* is on its way"),
        ("copy_without_commit", r"is in load at .* is on its way"),
        ("copy_without_barrier", r"is in load at .*(has landed, with no barrier since then|is on its way)"),
        ("copy_into_what_is_read", r"is in load at .*(has landed, with no barrier since then|is on its way)"),
        ("ring_copied_to_too_early", r"is in load at .*cases.cpp:\d+ where the copy at line \d+ of .* is on its way"),
        ("copy_from_past_the_end", r"copies from outside of an array at line \d+"),
        ("copy_left_on_its_way", r"returns before its copies have landed"),
        ("shared_too_small", r"takes 4194304 bytes of dynamic shared memory; the launch gave 1024"),
        ("shared_beyond_device", r"more than 99 KiB"),
        ("grid_barrier_without_cooperation", r"not cooperative"),
        ("part_of_a_cluster", r"not whole clusters"),
        ("clusters_beyond_device", r"more than 227 KiB"),
    ],
)
def test_what_would_hang_or_fail_to_launch_is_named(run_case, case, message):
    for seed in SEEDS:
        result = run_case(case, seed)
        assert result.returncode == 4, result.stderr
        assert re.search(message, result.stderr, re.DOTALL), result.stderr


def test_a_kernel_is_compiled_again_for_its_own_headers_alone(gxx):
    for source in (*(CSRC / "cuda").glob("*.cu"), *(CSRC / "cpu" / "simd").glob("*.cpp")):
        command = [gxx, "-MM", "-std=c++17", "-DLCC_EMULATION", f"-I{CSRC}", "-x", "c++", source]
        rule = subprocess.run(command, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
        assert {Path(name).resolve() for name in rule.split()[1:]} <= {path.resolve() for path in included(source)}
    assert CSRC / "cuda/relpos_attention.cuh" not in included(CSRC / "cuda/glu_depthwise_conv.cu")
