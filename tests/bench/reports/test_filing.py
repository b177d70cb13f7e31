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
    accelerated_rows = "<!-- accelerated:begin --><!-- accelerated:end -->"
    runtimes = "<!-- runtimes:begin -->\nold\n<!-- runtimes:end -->\n\ntail\n"
    (tmp_path / "README.md").write_text(
        f"# title\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\n{accelerated_rows}\n\n{runtimes}"
    )
    contention = "<!-- contention:begin -->\nold\n<!-- contention:end -->\n"
    (tmp_path / "engines.md").write_text(f"# engines\n\n{contention}\n{runtimes}")
    return tmp_path, write


def file(tmp_path):
    pages = (tmp_path / "README.md", tmp_path / "engines.md")
    return file_results(tmp_path / "out", tmp_path / "results", *pages)


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
    assert "<!-- accelerated:begin -->\nNo results are filed yet.\n<!-- accelerated:end -->" in text
    assert text.endswith("No results are filed yet.\n<!-- runtimes:end -->\n\ntail\n")
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


def test_rows_against_runtimes_have_a_table_of_their_own(place):
    path, write = place
    ms = {"eager": 9.0, "onnxruntime": 4.0, "openvino": 3.0, "lcconformer": 2.0}
    rows = [
        row(name, time * scale, "cpu", device="cpu", name="A CPU, 2 threads", dtype=dtype, layers=n, depth=n, batch=b)
        for name, time in ms.items()
        for dtype, scale in (("float32", 1.0), ("bfloat16", 0.5))
        for n, b in ((4, 1), (4, 2), (12, 1))
        if (name, dtype) != ("onnxruntime", "bfloat16")
    ]
    versions = {"torch": "2.11.0", "onnxruntime": "1.32.0", "openvino": "2026.4.1"}
    faster = [r.batch == 2 and (r.provider, r.dtype) == ("lcconformer", "bfloat16") for r in rows]
    write(
        [dataclasses.replace(r, versions=versions, median_ms=0.8 if f else r.median_ms) for r, f in zip(rows, faster)]
    )
    file(path)
    filed = path / "results/a-cpu-2-threads"
    assert [p.name for p in filed.iterdir()] == ["runtimes-2026-01-02-abc123.json"]
    expected = (
        "**A CPU, 2 threads**, 2026-01-02, commit abc123, ONNX Runtime 1.32.0, OpenVINO 2026.4.1 "
        "(`bench/results/a-cpu-2-threads/runtimes-2026-01-02-abc123.json`). Median ms; x: how many times as fast as the "
        "faster runtime.\n\n"
        "| d = 256, N = 4 | ONNX Runtime float32 | OpenVINO float32 | lcconformer float32 | x | OpenVINO bfloat16 | "
        "lcconformer bfloat16 | x |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
        "| 1 x 400 | 4.00 | 3.00 | 2.00 | **1.50** | 1.50 | 1.00 | **1.50** |\n"
        "| 2 x 400 | 4.00 | 3.00 | 2.00 | **1.50** | 1.50 | 0.80 | **1.88** |\n\n"
        "lcconformer against its own float32: bfloat16 2.00 to 2.50 times as fast.\n"
    )
    text = (path / "engines.md").read_text()
    assert expected in text
    assert "| d = 256, N = 12 |" in text
    assert text.endswith("<!-- runtimes:end -->\n\ntail\n")
    link = "[A CPU, 2 threads](bench/results/a-cpu-2-threads/runtimes-2026-01-02-abc123.json)"
    assert (
        (path / "README.md")
        .read_text()
        .endswith(
            "<!-- runtimes:begin -->\n| rows | d | N | float32 | bfloat16 | int8 |\n|---|---:|---:|---:|---:|---:|\n"
            f"| {link} | 256 | 4 | 1.50 to 1.50 (2 shapes) | 1.50 to 1.88 (2 shapes) | - |\n"
            f"| {link} | 256 | 12 | 1.50 to 1.50 (1 shape) | 1.50 to 1.50 (1 shape) | - |\n<!-- runtimes:end -->\n\ntail\n"
        )
    )


def test_every_machine_and_size_has_its_latest_rows_against_runtimes(place):
    path, _ = place
    same = dict(device="cpu", dtype="float32", versions={"onnxruntime": "1.32.0"})
    for name, commit_, ms in (("A CPU", "abc123", 4.0), ("B CPU", "abc123", 5.0), ("B CPU", "def456", 6.0)):
        results = Results(path / "results" / slug(name) / f"runtimes-{commit_}.json")
        results.date = {"abc123": "2026-01-02", "def456": "2026-01-03"}[commit_]
        results.add([row("onnxruntime", ms, "cpu", name=name, commit=commit_, **same)])
        if ms == 5.0:  # of a size that no later file has
            results.add([row("onnxruntime", 2.0, "cpu", name=name, commit=commit_, layers=4, depth=4, **same)])
    text = readme.runtimes_section(path / "results")
    assert re.findall(r"^\*\*(.*?)\*\*, .*commit (\w+)|^\| 8 x 400 \| (\S+)", text, re.M) == [
        ("A CPU", "abc123", ""), ("", "", "4.00"), ("B CPU", "abc123", ""), ("", "", "2.00"),
        ("B CPU", "def456", ""), ("", "", "6.00"),
    ]  # fmt: skip


def test_rows_beside_other_work_have_a_table(place):
    path, write = place
    same = dict(device="cpu", name="A CPU, 2 threads", batch=1, layers=4, depth=4, dtype="float32")
    ms = {"onnxruntime": 4.0, "openvino": 3.0, "lcconformer": 2.0}
    rows = [
        row(name, ms[name] * scale, "cpu", beside=beside, frames=frames, **same)
        for name in ms
        for beside, scale, frames in (("", 1, 16), ("1", 1.5, 16), ("2", 2, 16), ("torch", 3, 16), ("", 1, 2000))
    ]
    versions = {"torch": "2.11.0", "onnxruntime": "1.32.0", "openvino": "2026.4.1"}
    write([dataclasses.replace(r, versions=versions) for r in rows])
    file(path)
    expected = (
        "<!-- contention:begin -->\n**A CPU, 2 threads**, 2026-01-02, commit abc123, ONNX Runtime 1.32.0, OpenVINO 2026.4.1 "
        "(`bench/results/a-cpu-2-threads/runtimes-2026-01-02-abc123.json`). Median ms; x: how many times as long as beside "
        "nothing.\n\n"
        "| d = 256, N = 4, float32 | beside | ONNX Runtime | x | OpenVINO | x | lcconformer | x |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|\n"
        "| 1 x 16 | nothing | 4.00 | - | 3.00 | - | 2.00 | - |\n"
        "| 1 x 16 | a busy thread | 6.00 | 1.5 | 4.50 | 1.5 | 3.00 | 1.5 |\n"
        "| 1 x 16 | 2 busy threads | 8.00 | 2.0 | 6.00 | 2.0 | 4.00 | 2.0 |\n"
        "| 1 x 16 | a PyTorch job of as many threads | 12.0 | 3.0 | 9.00 | 3.0 | 6.00 | 3.0 |\n"
        "<!-- contention:end -->\n"
    )
    assert expected in (path / "engines.md").read_text()


def test_rows_beside_other_work_are_kept_apart(place):
    path, write = place
    same = dict(device="cpu", name="A CPU, 2 threads", batch=1)
    write(
        [
            row("eager", 4.0, **same),
            row("lcconformer", 2.0, "cpu", **same),
            row("lcconformer", 9.0, "cpu", beside="2", **same),
            row("lcconformer", 1.0, "cpu", beside="torch", **same),
        ]
    )
    file(path)
    text = (path / "README.md").read_text()
    assert "| B=1 T=400 d=256 N=12 bfloat16 | 4.00 | - | - | - | - | **2.00** (cpu) | 2.00x | 2.00x |" in text
    filed = Results(path / "results/a-cpu-2-threads/2026-01-02-abc123.json")
    assert [r.beside for r in filed.rows] == ["", "", "2", "torch"]


def test_older_rows_do_not_say_what_ran_beside_them():
    older = dataclasses.asdict(row("eager", 4.0))
    del older["beside"]
    assert Row.from_json(older) == row("eager", 4.0)
    del older["depth"]
    with pytest.raises(ValueError, match="missing or unknown fields: depth"):
        Row.from_json(older)


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
    (tmp_path / "README.md").write_text("<!-- bench:begin --><!-- bench:end -->")
    with pytest.raises(ValueError, match=r"README.md lacks the lines <!-- accelerated:begin -->"):
        readme.refresh(tmp_path / "README.md")


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD EPYC 9B14, 2 threads") == "amd-epyc-9b14-2-threads"


@pytest.mark.parametrize(
    ("page", "name", "section"),
    [
        ("README.md", "bench", readme.section),
        ("README.md", "accelerated", accelerated.section),
        ("README.md", "runtimes", readme.runtimes_summary),
        ("docs/engines.md", "runtimes", readme.runtimes_section),
        ("docs/engines.md", "contention", readme.contention_section),
    ],
)
def test_the_tables_are_not_stale(page, name, section):
    text = (REPOSITORY / page).read_text()
    between = re.search(rf"<!-- {name}:begin -->\n(.*)\n<!-- {name}:end -->", text, re.S)
    assert between, f"{page} has lost its section {name}"
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
