"""The command, in process."""

import json
import subprocess
import sys

import pytest
import torch
from lcconformer.bench import cli
from lcconformer.bench.core.roofline import Ceilings
from lcconformer.bench.runs import gate, suite

from lcconformer.__main__ import main

TINY = ["bench", "--device", "cpu", "--threads", "1", "--d-model", "32", "--layers", "2", "--rounds", "1"]


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(suite, "measure_ceilings", lambda case: Ceilings(0.1, 10.0))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_table_rows_and_plots(mode, tmp_path, capsys):
    arguments = ["--mode", mode, "--shapes", "1x8,2x8", "--providers", "eager,lcconformer:torch", "--depth", "2,1"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path)]
    assert main([*TINY, *arguments, *files]) == 0
    out = capsys.readouterr().out
    assert f"{mode}, B = 2, T = 8, d = 32, N = 2, float32, on " in out
    assert ", 1 thread;" in out
    assert "lcconformer:torch depth 1" in out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 6
    for kind in ("scaling", "speedup", "roofline"):
        assert (tmp_path / f"{mode}-d32-float32-{kind}.png").stat().st_size > 10_000


def test_ops(tmp_path, capsys):
    assert main([*TINY, "--mode", "ops", "--shapes", "1x8", "--providers", "eager,lcconformer:torch"]) == 0
    out = capsys.readouterr().out
    for op in ("relpos_attention", "glu_depthwise_conv", "feed_forward", "residual_layer_norm"):
        assert f"{op}:training, B = 1, T = 8" in out


def test_interruption_keeps_finished_rows(tmp_path, monkeypatch, capsys):
    real = cli.run_case

    def run_case(case, *args, **kwargs):
        if case.frames == 9:
            raise KeyboardInterrupt
        return real(case, *args, **kwargs)

    monkeypatch.setattr(cli, "run_case", run_case)
    path = tmp_path / "out.json"
    assert main([*TINY, "--shapes", "1x8,1x9,1x10", "--providers", "eager", "--json", str(path)]) == 130
    assert [row["frames"] for row in json.loads(path.read_text())["rows"]] == [8]
    assert "inference, B = 1, T = 8" in capsys.readouterr().out


INTERRUPTED = """
import signal, sys, weakref
from lcconformer.bench import cli
from lcconformer.bench.core.roofline import Ceilings
from lcconformer.bench.runs import suite
from lcconformer.__main__ import main

real = cli.run_case

class Thing:
    pass

def run_case(case, *args, **kwargs):
    if case.frames == 9:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        assert reference() is None
        print("went on after the callback", file=sys.stderr)
    return real(case, *args, **kwargs)

cli.run_case, suite.measure_ceilings = run_case, lambda case: Ceilings(0.1, 10.0)
before = signal.getsignal(signal.SIGINT)
status = main(sys.argv[1:])
assert signal.getsignal(signal.SIGINT) is before
sys.exit(status)
"""


def test_an_interruption_in_a_callback_is_not_lost(tmp_path):
    """Python prints and drops what is raised in the callback of a weak reference."""
    path = tmp_path / "out.json"
    # a process of its own: the interruption reaches nothing else
    command = [sys.executable, "-c", INTERRUPTED, *TINY, "--shapes", "1x8,1x9,1x10", "--providers", "eager"]
    done = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 130, done.stderr
    assert "went on after the callback" in done.stderr
    assert [row["frames"] for row in json.loads(path.read_text())["rows"]] == [8]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seconds", "nan"], "--seconds is nan; expected a finite number above 0"),
        (["--threads", "0"], "--threads is 0; expected an integer from 1"),
        (["--rounds", "0"], "--rounds is 0; expected an integer from 1"),
        (["--layers", "-1"], "--layers is -1; expected an integer from 1"),
        (["--json", "."], "--json is ., which is a folder"),
        (["--contention", "many"], "--contention is 'many'; expected a number of busy threads, 1 to 1024, or torch"),
        (["--plot", "/dev/null/x"], "is no folder that can be written to"),
    ],
)
def test_bad_options(more, message, capsys):
    assert main([*TINY, "--shapes", "1x8", "--providers", "eager", *more]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("told", [True, False])
def test_threads_of_the_environment(told, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not told:
        monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    torch.set_num_threads(1)  # what torch takes from the environment when it is imported
    options = [*TINY[:3], *TINY[5:]]
    assert "--threads" not in options
    try:
        assert main([*options, "--shapes", "1x8", "--providers", "eager"]) == 0
    finally:
        torch.set_num_threads(before)
    assert (", 1 thread;" in capsys.readouterr().out) == told


def test_ladder_states_both_definitions_and_the_paper(capsys):
    assert main([*TINY, "--ladder", "--shapes", "1x8"]) == 0
    out = capsys.readouterr().out
    assert "shallow inference, 1 of 2 loops" in out
    for text in ("7.8x fewer parameters", "41.9%", "37.7%", "throughput ratio", "1 - new / old", "2.0x fewer"):
        assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--ladder", "--mode", "ops"], "use --mode inference or training"),
        (["--compare", "HEAD", "--mode", "ops"], "encoders only"),
        (["--compare", "no-such-ref"], "no-such-ref"),
        (["--import", "/nowhere/at/all"], "does not exist"),
    ],
)
def test_errors_say_what_to_do(arguments, message, capsys):
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device here")
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_long_audio_has_its_own_defaults(monkeypatch, capsys):
    """At a few frames, where the gate's reference still walks over blocks of queries."""
    monkeypatch.setattr(cli, "LONG_SHAPES", "1x40")
    monkeypatch.setattr(gate, "_LONG", 20)
    arguments = [a for a in TINY if a not in ("--layers", "2")]
    assert main([*arguments, "--long"]) == 0
    out = capsys.readouterr().out
    assert "inference, B = 1, T = 40, d = 32, N = 1, float32, on " in out
    assert "lcconformer:cpu+loop" in out
