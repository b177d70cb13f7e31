"""The `info` command: complete, true to what ops really do, and readable."""

from __future__ import annotations

import json

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, backend, engine, info, loop, ops
from lcconformer.__main__ import main
from lcconformer.info import collect
from lcconformer.ops import registry
from lcconformer.ops.samples import TRAITS, Sizes


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
        assert {row["backend"], "torch", *row["against"]} == set(registry.BACKENDS)
        assert all(row["against"].values())
    assert {(e["device"], e["training"]) for e in found["engines"]} == {(d, m) for d in devices for m in (False, True)}
    assert all((row["engine"] == "modules") == bool(row["against"]) for row in found["engines"])
    assert all("a cluster holds 1 to 16 frames" in "; ".join(row["against_cluster"]) for row in found["engines"])
    assert found["versions"]["torch"] == torch.__version__


def test_text_names_ops_versions_and_reasons(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    on_request = "serve on request, or where a model has them faster: "
    assert f"{on_request}cuda of glu_depthwise_conv, cuda of relpos_attention" in text
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
        found = loop.decide(encoder, torch.zeros(8, 400, 256), 12)
    assert row["engine"] == ("modules" if found.engine == "modules" else "loop")


def test_a_forced_engine_is_shown(capsys):
    with engine("modules"):
        assert main(["info"]) == 0
    assert capsys.readouterr().out.count("not loop: engine 'modules' is forced") >= 2
    with engine("loop"), backend("torch"):
        assert main(["info"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "inference cpu float32: none not loop: backend 'torch' is forced" in text


class Refusing:
    """A backend with these reasons against it."""

    def __init__(self, *reasons: str) -> None:
        self.reasons = list(reasons)

    def unsupported(self, traits: object) -> list[str]:
        return self.reasons


@pytest.mark.parametrize(
    ("backends", "want"),
    [
        ({"cpu": Refusing()}, "cpu"),
        ({"cpu": Refusing("too small")}, "torch"),
        ({"triton": Refusing()}, "torch"),
        ({"triton": Refusing(), "cpu": Refusing()}, "cpu"),
    ],
)
def test_what_the_table_says_is_what_the_op_takes(monkeypatch, backends, want):
    monkeypatch.setitem(registry.OPS, "feed_forward", registry.OPS["feed_forward"])
    op = registry.Op("feed_forward", backends)  # takes the place of the real one
    row = next(r for r in info.collect()["ops"] if r["op"] == "feed_forward" and r["device"] == "cpu")
    traits = TRAITS["feed_forward"](torch.device("cpu"), torch.float32, Sizes())
    assert row["backend"] == want == op.choose(traits)
    for name, made in backends.items():
        if name != want:
            assert row["against"][name] == (made.reasons or [f"could serve; LCCONFORMER_BACKEND={name} forces it"])


def test_a_backend_on_request_serves_only_where_it_is_forced(monkeypatch):
    monkeypatch.setitem(registry.OPS, "feed_forward", registry.OPS["feed_forward"])
    op = registry.Op("feed_forward", {"cpu": Refusing()}, on_request={"cpu": registry.until_measured})
    row = next(r for r in info.collect()["ops"] if r["op"] == "feed_forward" and r["device"] == "cpu")
    assert row["backend"] == "torch"
    reason = "on request only, until a GPU has measured it; LCCONFORMER_BACKEND=cpu forces it"
    assert row["against"]["cpu"] == [reason]
    traits = TRAITS["feed_forward"](torch.device("cpu"), torch.float32, Sizes())
    assert op.choose(traits) == "torch"
    with backend("cpu"):
        assert op.choose(traits) == "cpu"
    assert op.choose(traits) == "torch"


def test_evidence(capsys, monkeypatch):
    from lcconformer.bench.reports import evidence

    from lcconformer.__main__ import main

    monkeypatch.setattr(evidence, "table", lambda: "op  reference")
    assert main(["info", "--evidence"]) == 0
    assert capsys.readouterr().out == "op  reference\n"


@pytest.mark.parametrize(
    ("bfloat16", "tiles", "said"),
    [(False, False, "AVX512"), (True, False, "AVX512, AVX512-BF16"), (True, True, "AVX512, AVX512-BF16, AMX")],
)
def test_says_what_the_processor_multiplies_with(monkeypatch, bfloat16, tiles, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert collect()["devices"][0]["vector"] == said
