"""The driver of bench/gpu.sh: its plan, its processes, and what a crash or a kill leaves."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lcconformer.bench.gpu import driver
from lcconformer.bench.gpu.driver import CALL, FIRST, SECOND, Driver, Job, Phase

PLACES = (Path("/out"), Path("/work"), Path("/repo"))


def test_each_call_fits_its_ten_minutes():
    phases = {p.number: p for p in driver.plan(*PLACES, gpu=True)}
    assert sorted(phases) == [*FIRST, *SECOND]
    for call in (FIRST, SECOND):
        assert sum(phases[n].limit for n in call) <= CALL == 570
    for phase in phases.values():
        assert phase.seconds <= phase.limit, phase.name


def test_the_plan_names_the_origin_of_each_cost_that_it_uses(capsys):
    assert driver.main(["--plan", "OUT", "1-5"]) == 0
    text = capsys.readouterr().out
    assert text.index("build, compile, constants") < text.index("encoders") < text.index("sum")
    for name in driver.COST:
        assert f"\n{name}: " in text


@pytest.mark.parametrize("gpu", [True, False])
def test_every_command_line_is_one_that_its_module_takes(gpu, monkeypatch):
    """Up to where the module would begin to work."""
    import argparse

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    commands = {job.command for p in driver.plan(*PLACES, gpu) for stage in p.stages for job in stage}
    assert len(commands) > (30 if gpu else 8)
    for command in commands:
        if command[0] == "-m":
            main = importlib.import_module(command[1]).main
            arguments = command[2:]
        else:
            main, arguments = driver.main, command[1:]
        with pytest.raises(Parsed):
            main(list(arguments))


def test_phases_by_number():
    assert driver.numbers("1-5") == [1, 2, 3, 4, 5]
    assert driver.numbers("8,2-3") == [2, 3, 8]
    for wrong in ("", "0", "9", "1-", "a", "5-3"):
        with pytest.raises(ValueError, match="expected numbers from 1 to 8"):
            driver.numbers(wrong)


def job(name: str, code: str, again: bool = False) -> Job:
    return Job(name, ("-c", code), 1.0, again)


def run(out: Path, *stages: tuple[Job, ...], total: float = 240.0) -> str:
    driver_ = Driver(out, total)
    driver_.run([Phase(1, "a phase", total, stages)])
    return (out / "summary.txt").read_text()


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    touch = f"open({str(tmp_path / 'other')!r}, 'w')"
    text = run(
        tmp_path, (job("bad", "raise SystemExit('no such thing')"), job("good", "print(1)")), (job("next", touch),)
    )
    assert "!! bad: failed with code 1" in text
    assert "     no such thing" in text
    assert "ok good" in text
    assert (tmp_path / "other").exists()
    assert "== bad: code 1" in (tmp_path / "log.txt").read_text()


def test_the_jobs_of_a_stage_run_side_by_side(tmp_path):
    """Each waits for the other, for a minute at most."""
    wait = (
        "import pathlib, time, sys\nhere = pathlib.Path({folder!r})\n(here / '{mine}').touch()\n"
        "end = time.monotonic() + 60\nwhile not (here / '{other}').exists():\n"
        "    time.sleep(0.05)\n    assert time.monotonic() < end"
    )
    jobs = [wait.format(folder=str(tmp_path), mine=a, other=b) for a, b in (("a", "b"), ("b", "a"))]
    text = run(tmp_path, (job("first", jobs[0]), job("second", jobs[1])))
    assert "ok first" in text
    assert "ok second" in text


def test_what_exceeds_its_phase_is_stopped_with_its_children(tmp_path):
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(200)"
    code = (
        f"import subprocess, sys, pathlib\np = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(p.pid))\np.wait()"
    )
    text = run(tmp_path, (job("slow", code),), (job("late", "print(1)"),), total=12.0)
    assert "-- slow: stopped after" in text
    assert "-- late: no time left" in text
    if (tmp_path / "child").exists():
        state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


ITEMS = """
import os, signal, sys
from pathlib import Path
from lcconformer.bench.gpu.items import Items
out = Path({out!r})
def note(name, deadly=False):
    def item():
        with (out / "ran.txt").open("a") as file:
            file.write(name + "\\n")
        if deadly and os.environ["DEADLY"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return len(name)
    return item
sys.exit(Items(out, 4).run({{"one": note("one"), "two": note("two", True), "three": note("three")}}))
"""


def test_a_killed_process_goes_on_behind_what_killed_it_and_a_later_call_tries_that_again(tmp_path, monkeypatch):
    code = ITEMS.format(out=str(tmp_path))
    monkeypatch.setenv("DEADLY", "1")
    monkeypatch.setenv("LCCONFORMER_GPU_CALL", "first")
    text = run(tmp_path, (job("items", code, again=True),))
    assert f"!! items: died with code {-signal.SIGKILL}; it goes on" in text
    assert "ok items" in text
    assert (tmp_path / "ran.txt").read_text().split() == ["one", "two", "three"]
    state = json.loads((tmp_path / "state.json").read_text())["phase 4"]
    assert {name: entry["status"] for name, entry in state.items()} == {"one": "done", "two": "begun", "three": "done"}
    assert state["three"]["result"] == 5

    monkeypatch.setenv("DEADLY", "0")
    monkeypatch.setenv("LCCONFORMER_GPU_CALL", "second")
    run(tmp_path, (job("items", code, again=True),))
    assert (tmp_path / "ran.txt").read_text().split() == ["one", "two", "three", "two"]


def test_an_item_that_fails_is_noted_and_the_others_run(tmp_path, capsys):
    from lcconformer.bench.gpu.items import Items

    def bad():
        raise RuntimeError("off by 3")

    assert Items(tmp_path, 2, "a").run({"bad": bad, "good": lambda: 7}) == 1
    state = json.loads((tmp_path / "state.json").read_text())["phase 2"]
    assert state["bad"]["status"] == "failed: RuntimeError: off by 3"
    assert state["good"]["result"] == 7
    assert Items(tmp_path, 2, "a").run({"bad": bad, "good": lambda: 7}) == 0, "not again in the same call"
    assert Items(tmp_path, 2, "b").run({"bad": bad, "good": lambda: 7}) == 1


def test_an_extension_that_was_built_from_the_same_sources_is_kept(tmp_path, monkeypatch):
    repo, work = tmp_path / "repo", tmp_path / "work"
    (repo / "csrc").mkdir(parents=True)
    (work / "site" / "lcconformer").mkdir(parents=True)
    (repo / "csrc" / "a.cpp").write_text("1")
    (repo / "setup.py").write_text(
        "import sys, pathlib\n"
        "target = pathlib.Path(sys.argv[sys.argv.index('--build-lib') + 1], 'lcconformer')\n"
        "target.mkdir(parents=True)\n(target / '_C.so').write_text(pathlib.Path('csrc/a.cpp').read_text())\n"
    )
    built = work / "site" / "lcconformer" / "_C.so"
    assert driver.build(repo, work) == 0
    assert built.read_text() == "1"
    (repo / "csrc" / "a.cpp").write_text("2")
    assert driver.build(repo, work) == 0
    assert built.read_text() == "2"
    monkeypatch.setattr(subprocess, "run", None)
    assert driver.build(repo, work) == 0


def test_the_driver_starts_without_torch():
    code = (
        "import runpy, sys\nsys.argv = ['driver.py', '--plan']\n"
        f"try: runpy.run_path({driver.__file__!r}, run_name='__main__')\nexcept SystemExit as done: assert not done.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "expected" in done.stdout
