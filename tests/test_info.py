"""The `info` command: complete, true to what ops really do, and readable."""

from __future__ import annotations

import json

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine, info, loop, ops
from lcconformer.__main__ import main
from lcconformer.ops import _backend


def test_covers_every_op_device_and_mode(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    devices = {d["device"] for d in found["devices"]}
    assert "cpu" in devices
    assert len(devices) == 1 + torch.cuda.device_count()
    rows = {(r["op"], r["device"], r["training"]) for r in found["ops"]}
    assert rows == {(op, device, mode) for op in ops.__all__ for device in devices for mode in (False, True)}
    for row in found["ops"]:
        # every backend is the choice, or has reasons against it; torch needs none
        assert {row["backend"], "torch", *row["against"]} == set(_backend.BACKENDS)
        assert all(row["against"].values())
    assert {(e["device"], e["training"]) for e in found["engines"]} == {(d, m) for d in devices for m in (False, True)}
    assert all((row["engine"] == "modules") == bool(row["against"]) for row in found["engines"])
    assert found["versions"]["torch"] == torch.__version__


def test_text_names_ops_versions_and_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (*ops.__all__, torch.__version__, "extension", "not cuda: "):
        assert word in text
    assert max(map(len, text.splitlines())) < 400
    assert not [line for line in text.splitlines() if line != line.rstrip()]


def test_a_forced_backend_that_cannot_serve_is_shown_not_raised(capsys):
    with backend("cuda"):
        assert main(["info"]) == 0
    text, _, engines = capsys.readouterr().out.partition("Engine of the loop")
    assert "not loop: backend 'cuda' is forced" in engines
    cpu = [line for line in text.splitlines() if " cpu float32" in line]
    assert len(cpu) >= 4
    assert all(line.endswith(": none") for line in cpu)
    assert "backend 'cuda' was forced but cannot serve these inputs" in text


@pytest.mark.parametrize("training", [False, True])
def test_the_engine_named_is_the_one_that_runs(training):
    (row,) = [r for r in info.collect()["engines"] if r["device"] == "cpu" and r["training"] == training]
    encoder = ConformerEncoder(ConformerConfig()).train(training)
    with torch.set_grad_enabled(training):
        run = loop.choose(encoder, torch.zeros(8, 400, 256), torch.full((8,), 400), 12)
    assert row["engine"] == ("modules" if run is None else "loop")


def test_a_forced_engine_is_shown(capsys):
    with engine("modules"):
        assert main(["info"]) == 0
    assert capsys.readouterr().out.count("not loop: engine 'modules' is forced") >= 2
    with engine("loop"), backend("torch"):
        assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "inference cpu float32: none not loop: backend 'torch' is forced" in text


def test_asking_computes_nothing(monkeypatch):
    """An op that chooses a backend stops there, and the next call runs as always."""
    reached = []

    def op():
        _backend.select("an_op", "cpu", {"cpu": lambda: ["no reason at all"]})
        reached.append(True)

    candidates = _backend.candidates_of(op)
    assert not reached
    assert candidates["cpu"]() == ["no reason at all"]
    op()
    assert reached == [True]


def test_choice_is_that_of_select(monkeypatch):
    """What the table says is what the op takes: candidates with and without reasons, in every order of preference."""
    for reasons, want in (({"cpu": []}, "cpu"), ({"cpu": ["too small"]}, "torch"), ({"triton": []}, "torch")):
        candidates = {name: (lambda r=r: r) for name, r in reasons.items()}

        def fake(op, tensor, sizes, lengths, candidates=candidates):
            _backend.select("feed_forward", "cpu", candidates)
            pytest.fail("the op ran")

        monkeypatch.setitem(info.CALLS, "feed_forward", fake)
        row = next(r for r in info.collect()["ops"] if r["op"] == "feed_forward" and r["device"] == "cpu")
        assert row["backend"] == want
        for name, r in reasons.items():
            if name != want:
                assert row["against"][name] == (r or ["could serve; LCCONFORMER_BACKEND=triton forces it"])


def test_evidence(capsys, monkeypatch):
    from lcconformer.bench.reports import evidence

    from lcconformer.__main__ import main

    monkeypatch.setattr(evidence, "table", lambda: "op  reference")
    assert main(["info", "--evidence"]) == 0
    assert capsys.readouterr().out == "op  reference\n"
