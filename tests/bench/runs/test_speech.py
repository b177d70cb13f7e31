"""Packed batches and streams: what is printed, and that wrong numbers are not timed."""

import json
import re

import pytest
import torch
from lcconformer.bench.core.case import Case
from lcconformer.bench.runs import speech
from lcconformer.bench.runs.gate import GateError

from lcconformer import ConformerEncoder
from lcconformer.__main__ import main
from lcconformer.streaming import StreamingEncoder

TINY = ["bench", "--device", "cpu", "--threads", "1", "--d-model", "32", "--layers", "2", "--rounds", "1"]


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_packed(mode, capsys):
    assert main([*TINY, "--packed", "--mode", mode, "--shapes", "4x60"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"{mode} B=4 T=60 d=32 N=2 float32: \d+ real frames, \d+% padding", out)
    assert re.search(r"^padded .* 1\.00x$", out, re.M)
    assert re.search(r"^packed .*x$", out, re.M)


def test_streams(capsys):
    assert main([*TINY, "--streams", "--shapes", "2x4"]) == 0
    out = capsys.readouterr().out
    assert "a chunk of 4 frames with 64 before and 4 after it, 2 streams" in out
    for name in ("plain PyTorch", "module by module", "as chosen"):
        assert re.search(rf"^{name} .*x$", out, re.M)
    for arguments in (["--streams", "--mode", "training"], ["--packed", "--mode", "ops"]):
        assert main([*TINY, *arguments]) != 0


def test_rows_are_filed_once_each(tmp_path, capsys):
    path = tmp_path / "rows.json"
    for arguments in (["--packed", "--shapes", "4x60"], ["--streams", "--shapes", "2x4"]) * 2:
        assert main([*TINY, *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert sorted((r["kind"], r["way"]) for r in rows) == [
        ("packed", "packed"),
        ("packed", "padded"),
        *(("streams", way) for way in ("as chosen", "module by module", "plain PyTorch")),
    ]
    out = capsys.readouterr().out
    for row in rows:
        assert row["real_frames"] == (8 if row["kind"] == "streams" else int(re.search(r": (\d+) real", out).group(1)))
        assert row["rtf"] == pytest.approx(row["median_ms"] / row["real_frames"] / 40)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_lengths_are_those_of_librispeech():
    lengths = speech.draw_lengths(Case("inference", 4000, 800))
    assert lengths.median() == pytest.approx(150, rel=0.05)
    assert lengths.double().mean() == pytest.approx(7.4 / 0.04, rel=0.06)
    assert 37 <= lengths.min() < 60
    assert lengths.max() > 600


def test_wrong_numbers_are_not_timed(monkeypatch):
    case = Case("inference", 2, 8, d_model=32, layers=2, depth=2, kernel=7)
    right, stream = ConformerEncoder.packed, StreamingEncoder.forward
    monkeypatch.setattr(ConformerEncoder, "packed", lambda *a, **k: (right(*a, **k)[0] * 1.01, None))
    with pytest.raises(GateError, match="packed: off by"):
        speech.measure_packed(case, None, 1)
    monkeypatch.setattr(StreamingEncoder, "forward", lambda *a: (stream(*a)[0] + torch.full((), 0.01), *stream(*a)[1:]))
    with pytest.raises(GateError, match="plain PyTorch: off by"):
        speech.measure_stream(case, None, 1)
