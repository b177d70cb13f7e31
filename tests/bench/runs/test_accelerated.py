"""Peers against themselves under ``accelerate``: rows, checks, and the table of the README."""

from __future__ import annotations

import dataclasses
import json

import pytest
from lcconformer.bench.core.case import Case
from lcconformer.bench.providers.accelerated import PEERS
from lcconformer.bench.reports import accelerated as report
from lcconformer.bench.runs import accelerated
from lcconformer.bench.runs.gate import GateError

from lcconformer.__main__ import main
from lcconformer.interop import layer

TINY = ["bench", "--accelerated", "--device", "cpu", "--d-model", "16", "--layers", "2", "--rounds", "1"]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_every_peer(peer, mode):
    if (why := peer.missing()) is not None:
        pytest.skip(why)
    row = accelerated.measure(peer, Case(mode, 2, 9, 16, 2, 2), 0.0, 1)
    assert (row.peer, row.mode, row.batch, row.frames, row.dropout) == (
        peer.name,
        mode,
        2,
        9,
        0.1 * (mode == "training"),
    )
    packed = mode == "inference" and peer.name not in ("SpeechBrain", "lucidrains")
    assert row.engine == ("packed weights" if packed else "ops")
    assert 0 < row.error < 1e-5
    assert 0 < row.own_error < 1e-5
    assert row.speedup == row.original_ms / row.accelerated_ms
    assert row.layer
    assert row.version


def test_command(tmp_path, capsys):
    pytest.importorskip("conformer", reason="pip install 'lcconformer[test]'")
    path, options = tmp_path / "rows.json", ["--providers", "Lucidrains", "--json", str(tmp_path / "rows.json")]
    for _ in range(2):  # the second run replaces its rows
        assert main([*TINY, *options, "--shapes", "1x5,2x3"]) == 0
    assert main([*TINY, *options, "--shapes", "1x5", "--mode", "training"]) == 0
    out = capsys.readouterr().out
    assert "lucidrains  inference 2x3  ops" in out
    rows = accelerated.read_rows(path)
    assert [(r.mode, r.batch, r.frames) for r in rows] == [("inference", 1, 5), ("inference", 2, 3), ("training", 1, 5)]
    assert set(json.loads(path.read_text())) == {"date", "rows"}


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--providers", "conformer"], "no peer 'conformer'; use some of torchaudio"), (["--mode", "ops"], "mode is ops")],
)
def test_refusals(options, said, capsys):
    assert main([*TINY, *options]) != 0
    assert said in capsys.readouterr().err


def test_wrong_numbers_are_not_timed(monkeypatch):
    pytest.importorskip("conformer", reason="pip install 'lcconformer[test]'")
    own = layer.run
    monkeypatch.setattr(layer, "run", lambda *a: own(*a) * 1.01)
    (peer,) = (p for p in PEERS if p.name == "lucidrains")
    with pytest.raises(GateError, match=r"lucidrains, .*: off by"):
        accelerated.measure(peer, Case("inference", 1, 9, 16, 2, 2), 0.0, 1)


def test_the_table(tmp_path):
    row = accelerated.AcceleratedRow(
        "A", "a", "1.0", "Layer", "ops", "inference", 1, 16, 256, 4, 0.0, 2e-7, 1e-7, 3.0, 2.0, [3, 2], [3, 2], 1.5,
        "A CPU, 2 threads", {"torch": "2.13.0"}, "abc123",
    )  # fmt: skip
    more = [
        row,
        dataclasses.replace(row, mode="training", error=4e-7, speedup=1.25),
        dataclasses.replace(row, peer="B", batch=8, frames=400, speedup=2.0, error=3e-7),
    ]
    folder = tmp_path / "a-cpu-2-threads"
    folder.mkdir()
    assert report.section(tmp_path) == "No results are filed yet."
    for date, rows in (("2026-01-02", more), ("2025-12-31", [])):  # the latest counts
        content = {"date": date, "rows": [dataclasses.asdict(r) for r in rows]}
        (folder / f"accelerated-{date}-abc123.json").write_text(json.dumps(content))
    text = report.section(tmp_path)
    assert text.startswith("**A CPU, 2 threads (CPU)**, 2026-01-02, commit abc123, torch 2.13.0, d = 256, N = 4 layers")
    assert "(bench/results/a-cpu-2-threads/accelerated-2026-01-02-abc123.json)" in text
    assert "| peer | layer, version | error | inference 1 x 16 | inference 8 x 400 | training 1 x 16 |" in text
    assert "| A | `Layer`, a 1.0 | 2e-07 / 4e-07 | 1.50x | - | 1.25x |" in text
    assert "| B | `Layer`, a 1.0 | 3e-07 / - | - | 2.00x | - |" in text
