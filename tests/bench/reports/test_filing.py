"""Results are filed, and the README says what the files say."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from lcconformer.bench.core.rows import Results, Row
from lcconformer.bench.reports import accelerated, readme
from lcconformer.bench.reports.filing import file_results, slug

from lcconformer.runtime import commit

REPOSITORY = Path(__file__).parents[3]


def row(
    provider, ms, backend="torch", device="cuda", name="Some GPU 9", mode="inference", commit="abc123", **changes
) -> Row:
    plain = Row(
        provider=provider, backend=backend, mode=mode, batch=8, frames=400, d_model=256, layers=12, depth=12,
        dtype="bfloat16", device=device, device_name=name, versions={"torch": "2.11.0"}, commit=commit, median_ms=ms,
        p20_ms=ms, p80_ms=ms, tokens_per_s=1.0, rtf=0.1, peak_memory_mb=None, tflops=1.0, gb_per_s=1.0,
        percent_of_roofline=12.5, speedup_vs_eager=None,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def place(tmp_path):
    """An OUT folder's rows, an empty results folder and a README with markers."""

    def write(rows):
        results = Results(tmp_path / "out" / "bench.json")
        results.date = "2026-01-02"
        results.add(rows)

    (tmp_path / "results").mkdir()
    markers = "<!-- bench:begin -->\nold\n<!-- bench:end -->\n\n<!-- accelerated:begin --><!-- accelerated:end -->"
    (tmp_path / "README.md").write_text(f"# title\n\n{markers}\ntail\n")
    return tmp_path, write


def file(tmp_path):
    return file_results(tmp_path / "out", tmp_path / "results", tmp_path / "README.md")


def test_rows_go_to_a_folder_of_their_machine(place, capsys):
    path, write = place
    write(
        [row("eager", 4.0), row("lcconformer", 2.0, "triton"), row("eager", 9.0, device="cpu", name="A CPU, 2 threads")]
    )
    assert file(path) == 0
    assert [r.provider for r in Results(path / "results/some-gpu-9/2026-01-02-abc123.json").rows] == [
        "eager",
        "lcconformer",
    ]
    assert len(Results(path / "results/a-cpu-2-threads/2026-01-02-abc123.json").rows) == 1
    text = (path / "README.md").read_text()
    assert text.startswith("# title\n\n<!-- bench:begin -->\n**Some GPU 9**, 2026-01-02, commit abc123, torch 2.11.0")
    assert text.endswith(
        "<!-- bench:end -->\n\n<!-- accelerated:begin -->\nNo results are filed yet.\n<!-- accelerated:end -->\ntail\n"
    )
    assert text.index("**Some GPU 9**") < text.index("**A CPU, 2 threads (CPU)**")
    assert "old" not in text


def test_the_table_compares_with_the_fastest_peer_of_the_same_maths(place):
    path, write = place
    peers = [row("eager", 4.0), row("compile", 3.0, "inductor"), row("compile", 2.5, "graphs"), row("torchaudio", 1.0)]
    write([*peers, row("lcconformer", 2.0, "triton"), row("lcconformer", 2.2, "cuda")])
    file(path)
    line = next(x for x in (path / "README.md").read_text().splitlines() if x.startswith("| B=8"))
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells == [
        "B=8 T=400 d=256 N=12 bfloat16", "4.00", "-", "2.50", "-", "1.00", "**2.00** (triton)", "2.00x", "1.25x",
    ]  # fmt: skip


def test_op_rows_and_gpu_tests_become_evidence(place):
    path, write = place
    write([row("lcconformer", 2.0, "triton", mode="feed_forward:forward")])
    (path / "out" / "gpu_tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.kernels.test_feed_forward" name="test_a[1]"/>'
        '<testcase classname="tests.kernels.test_feed_forward" name="test_b"><failure/></testcase></testsuite></testsuites>'
    )
    file(path)
    evidence = json.loads((path / "results/evidence.json").read_text())["feed_forward"]
    assert evidence["timed"]["percent_of_roofline"] == 12.5
    expected = {"passed": 1, "failed": 1, "skipped": 0}
    expected |= {"commit": "abc123", "date": "2026-01-02", "machine": "Some GPU 9"}
    assert evidence["on a GPU"] == expected


def test_cpu_rows_are_no_gpu_evidence(place):
    path, write = place
    write([row("lcconformer", 2.0, "cpu", device="cpu", mode="feed_forward:forward")])
    file(path)
    assert not (path / "results/evidence.json").exists()


@pytest.mark.parametrize("bad", ["unknown", "abc123-dirty"])
def test_only_committed_code_is_filed(place, bad):
    path, write = place
    write([row("eager", 4.0, commit=bad)])
    with pytest.raises(ValueError, match="only results of committed code are filed"):
        file(path)


def test_nothing_to_file(place):
    path, write = place
    with pytest.raises(FileNotFoundError, match=r"give a --json file or the OUT of gpu.sh"):
        file(path)
    write([])
    with pytest.raises(ValueError, match="holds no rows"):
        file(path)


def test_readme_without_markers(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="lacks the lines <!-- bench:begin -->"):
        readme.refresh(tmp_path / "README.md")


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD EPYC 9B14, 2 threads") == "amd-epyc-9b14-2-threads"


def test_the_readme_is_not_stale():
    text = (REPOSITORY / "README.md").read_text()
    for name, section in (("bench", readme.section), ("accelerated", accelerated.section)):
        between = re.search(rf"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", text, re.S)
        assert between, f"the README has lost its section {name}"
        assert between.group(1) == section(REPOSITORY / "bench" / "results"), (
            "run python -m lcconformer.bench.reports.readme"
        )


def test_commit_of_a_copy_comes_from_the_variable(monkeypatch, tmp_path):
    monkeypatch.setattr("lcconformer.runtime.__file__", str(tmp_path / "runtime.py"))
    monkeypatch.setenv("LCCONFORMER_COMMIT", "fedcba")
    commit.cache_clear()
    try:
        assert commit() == "fedcba"
    finally:
        commit.cache_clear()
