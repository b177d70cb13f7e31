"""The evidence table is made of test reports."""

import pytest
from lcconformer.bench.core.case import OPS
from lcconformer.bench.reports import evidence

CASES = {
    "tests.ops.test_feed_forward.test_gradcheck": "reference",
    "tests.kernels.test_relpos_attention.test_forward[7]": "interpreted",
    "tests.kernels.test_report.test_shipped[relpos_attention-90]": "compiled",
    "tests.extension.test_cuda_glu_depthwise_conv.test_odd_shapes[emulated-3-7]": "emulated",
    "tests.ptx.test_kernels.test_shipped[residual_layer_norm-sm90-t=19-d=512-bf16]": "executed",
    "tests.ptx.test_kernels.test_shipped[chain_depthwise-sm80-c=200-layer-bf16]": "executed",
    "tests.loop.test_chain.test_every_depth[batch]": "interpreted",
    "tests.extension.test_cuda_cluster_loop.test_every_depth[emulated]": "emulated",
    "tests.loop.test_graphs.test_chain": None,
    "tests.ptx.test_interpreter.test_feed_forward": None,
    "tests.test_config.test_feed_forward": None,
    "tests.kernels.test_common.test_launch": None,
}


@pytest.fixture
def report(tmp_path):
    def write(outcomes):
        cases = []
        for name, outcome in outcomes.items():
            classname, _, test = name.partition(".test_")
            module, _, test = test.partition(".")
            inside = "" if outcome == "passed" else f"<{outcome}/>"
            cases.append(f'<testcase classname="{classname}.test_{module}" name="{test}">{inside}</testcase>')
        path = tmp_path / "report.xml"
        path.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return path

    return write


def test_places_decide_the_step(report, tmp_path):
    table = tmp_path / "evidence.json"
    found = evidence.record_report(report(dict.fromkeys(CASES, "passed")), path=table)
    steps = {(op, step) for op, entries in found.items() for step in entries}
    assert steps == {
        ("feed_forward", "reference"),
        ("relpos_attention", "interpreted"),
        ("relpos_attention", "compiled"),
        ("residual_layer_norm", "executed"),
        ("glu_depthwise_conv", "emulated"),
        ("chain", "executed"),
        ("chain", "interpreted"),
        ("cluster_loop", "emulated"),
    }
    assert evidence.load(table) == found


def test_a_test_of_all_kernels_counts_for_every_op(report, tmp_path):
    found = evidence.record_report(
        report({"tests.kernels.test_report.test_budgets[90]": "passed"}), path=tmp_path / "e.json"
    )
    assert {op: list(entries) for op, entries in found.items()} == {op: ["compiled"] for op in (*OPS, "chain")}


def test_outcomes_are_counted_and_other_steps_stay(report, tmp_path):
    table = tmp_path / "evidence.json"
    one, two = "tests.ops.test_feed_forward.test_a", "tests.ops.test_feed_forward.test_b"
    evidence.record_report(report({"tests.kernels.test_feed_forward.test_c": "passed"}), path=table)
    found = evidence.record_report(report({one: "failure", two: "passed"}), path=table)["feed_forward"]
    assert (found["reference"]["passed"], found["reference"]["failed"]) == (1, 1)
    assert found["interpreted"]["passed"] == 1
    text = evidence.table(table)
    assert "1 of 2" in text
    assert "1 pass" in text
    assert found["reference"]["commit"] in text


def test_a_gpu_run_is_one_step(report, tmp_path):
    names = {"tests.kernels.test_feed_forward.test_c": "passed", "tests.ops.test_feed_forward.test_d": "skipped"}
    origin = {"commit": "a", "date": "2026-01-01", "machine": "GPU"}
    found = evidence.record_report(report(names), gpu=True, path=tmp_path / "e.json", origin=origin)
    assert found == {"feed_forward": {"on a GPU": {"passed": 1, "failed": 0, "skipped": 1, **origin}}}


def test_skipped_tests_prove_nothing(report, tmp_path):
    with pytest.raises(ValueError, match=r"no test in .* ran that is about relpos_attention"):
        evidence.record_report(report({"tests.ops.test_feed_forward.test_a": "skipped"}), path=tmp_path / "e.json")


def test_not_a_report(tmp_path):
    (tmp_path / "x.xml").write_text("no xml")
    with pytest.raises(ValueError, match="no JUnit report"):
        evidence.record_report(tmp_path / "x.xml", path=tmp_path / "e.json")


def test_empty_table_says_how_to_fill_it(tmp_path):
    assert "pytest --junitxml" in evidence.table(tmp_path / "e.json")
