"""Everything a GPU can tell, in calls of under ten minutes: the plan and the processes of ``bash bench/gpu.sh OUT [PHASES]``.

A phase is a few stages; a stage is jobs side by side, each a process of its own, so that one that crashes takes no other
with it.  Phases end at fixed times after the start: what one saves, the next may use, and the sum of their limits is what a
call may take.  Jobs write their results item by item (:mod:`~lcconformer.bench.gpu.items`); one that dies is started again
and goes on behind the item that killed it, and a later call with the same OUT goes on where this one stopped.

This file needs the standard library alone and is run by its path: the driver starts its processes before anything has
imported torch.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CALL", "COST", "FIRST", "SECOND", "Driver", "Job", "Phase", "numbers", "plan", "table"]

CALL = 570.0  # seconds; the machines that we know lend themselves for ten minutes a call
FIRST, SECOND = range(1, 6), range(6, 9)  # the phases of the first call and of the second
JIT, INDUCTOR = 8, 8  # processes that compile ahead at most: together all of 16 cores
RESTARTS, GRACE = 3, 5.0  # starts after a crash; seconds to react to an interrupt

# seconds on 16 cores, and where they come from: the model behind the plan
COST = {
    "import": (8.0, "torch and lcconformer in a new process: 7.6 s on two busy cores"),
    "extension": (45.0, "62 s of processor for g++ and 8 s for nvcc, one architecture, in a few processes at a time"),
    "kernel": (
        5.0,
        "one Triton kernel for sm_90 in bf16: 9.8 s, the mean of 40 on two cores shared by eight; convolutions up to 34",
    ),
    "backward": (40.0, "Inductor, forward and backward of one layer on a GPU: assumed"),
    "constants": (26.0, "constants.cu and cluster_phases.cu in nvcc and on the GPU, 50 shapes of GEMM: assumed"),
    "check": (4.0, "one op of the doctor, one determinism or replay check: assumed"),
    "kernels": (0.6, "one call in a graph, cold and warm, by the profiler and without a GPU's answer: assumed"),
    "case": (14.0, "an encoder: gate in float64, 5 to 8 providers, 3 s of rounds, profile: assumed"),
    "ncu": (6.0, "one kernel under ncu, replayed for each group of counters: assumed"),
    "tests": (75.0, "the GPU tests in 12 processes; their kernels are mostly compiled by then: assumed"),
    "sanitizer": (18.0, "compute-sanitizer on the small ops: assumed, 10 times slower than without"),
}


def cost(**counts: float) -> float:
    """Seconds of a process that does ``counts`` of each cost, after its import."""
    return COST["import"][0] + sum(n * COST[name][0] for name, n in counts.items())


@dataclass(frozen=True)
class Job:
    """One process: arguments of the Python interpreter, expected seconds, whether it is started again after a crash."""

    name: str
    command: tuple[str, ...]
    seconds: float
    again: bool = False
    prefix: tuple[str, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Stages one after the other, the jobs of a stage side by side; ``limit`` seconds in all."""

    number: int
    name: str
    limit: float
    stages: tuple[tuple[Job, ...], ...]

    @property
    def seconds(self) -> float:
        """Expected: the longest job of each stage."""
        return sum(max(job.seconds for job in stage) for stage in self.stages)


def plan(out: Path, work: Path, repo: Path, gpu: bool) -> list[Phase]:
    """All phases.  Without a GPU the same ones with tiny shapes, without what only a GPU can do.

    Args:
        out: folder of the results.
        work: folder of the built package and of what compilers keep.
        repo: the checkout.
    """
    small = () if gpu else ("--small",)

    def module(name: str, *arguments: object) -> tuple[str, ...]:
        return ("-m", f"lcconformer.bench.gpu.{name}", *map(str, arguments))

    def items(name: str, phase: int, text: str, seconds: float) -> Job:
        return Job(text, module(name, out, "--phase", phase, *small), seconds, again=True)

    def warm(phase: int, kernels: int, layers: int) -> tuple[Job, ...]:
        """Processes that compile ahead so many Triton kernels and so many layers by Inductor."""
        if not gpu:
            return ()
        jobs = [("kernels" if phase != 2 else "variants", f"{i}/{JIT}", cost(kernel=kernels / JIT)) for i in range(JIT)]
        n = min(layers, INDUCTOR)
        jobs += [("inductor", f"{i}/{n}", cost(backward=layers / n)) for i in range(n)]
        return tuple(Job(f"{what} {share}", module("warm", what, phase, share), s) for what, share, s in jobs)

    def tool(name: str, *arguments: str) -> tuple[str, ...]:
        found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
        return (found, *arguments) if gpu and found else ()

    build = Job("build", (str(Path(__file__)), "--build", str(repo), str(work)), COST["extension"][0])
    constants = Job("constants of the machine", module("constants", out, repo, *small), cost(constants=1))
    sanitizers = [
        Job(
            f"ops, {name}",
            module("sanitized", *small),
            cost(sanitizer=1),
            prefix=tool("compute-sanitizer", "--tool", name, "--error-exitcode", "9"),
        )
        for name in (("memcheck", "racecheck") if gpu else ("memcheck",))
    ]
    # tests want to see the fallbacks that the rest must not use
    free = ("env", "-u", "LCCONFORMER_STRICT")
    tests = Job(
        "GPU tests", module("gpu_tests", out / "gpu_tests.xml", repo, "--seconds", 95), cost(tests=1), prefix=free
    )
    kernels = (
        (items("kernels", 3, "kernels alone", cost(kernels=110)),),
        *(((Job("six kernels under ncu", module("ncu", out), cost(ncu=6)),),) if gpu else ()),
    )
    return [
        Phase(1, "build, compile, constants", 80, ((build, constants, *warm(1, 60, 5)),)),
        Phase(
            2,
            "numbers, and kernel variants compiled",
            105,
            ((items("checks", 2, "checks", cost(check=11)), build, *warm(2, 150, 0)),),
        ),
        Phase(3, "each kernel alone", 118, kernels),
        Phase(4, "encoders", 112, ((items("encoders", 4, "encoders", cost(case=6)),),)),
        Phase(5, "sanitizers, tests", 148, (tuple(sanitizers), (tests,))),
        Phase(
            6,
            "encoders, d = 512 and 768, and long",
            290,
            tuple(stage for stage in (warm(6, 50, 13), (items("encoders", 6, "encoders", cost(case=13)),)) if stage),
        ),
        Phase(7, "peers, autocast, ladder", 120, ((items("encoders", 7, "encoders", cost(case=6)),),)),
        Phase(8, "determinism 30 times, tuning", 155, ((items("checks", 8, "checks", cost(check=30)),),)),
    ]


def table(phases: Sequence[Phase]) -> str:
    """The plan in text, with the sums."""
    lines = [f"{'phase':<46}{'expected':>9}{'limit':>7}"]
    for p in phases:
        lines.append(f"{p.number}  {p.name:<43}{p.seconds:>7.0f} s{p.limit:>5.0f} s")
        for stage in p.stages:
            names = ", ".join(job.name for job in stage)
            lines.append(
                f"     {max(job.seconds for job in stage):>4.0f} s  {names if len(names) < 90 else names[:87] + '...'}"
            )
    lines.append(f"{'sum':<46}{sum(p.seconds for p in phases):>7.0f} s{sum(p.limit for p in phases):>5.0f} s")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    """``"1-5"``, ``"3"``, ``"1,6-8"`` -> the phases.

    Raises:
        ValueError: it is none of these, or names other phases than 1 to 8.
    """
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = []
    if not found or not set(found) <= {*FIRST, *SECOND}:
        raise ValueError(f"gpu.sh: phases are {text!r}; expected numbers from 1 to 8, such as 1-5 or 3,6-8")
    return sorted(set(found))


class Driver:
    """Runs phases and says how they went.

    Args:
        out: folder that summary.txt and log.txt are written to.
        total: seconds for everything; the limits of the phases are scaled up to it if they are less.
        env: environment of the processes.
    """

    def __init__(self, out: Path, total: float, env: dict[str, str] | None = None) -> None:
        self.out, self.total, self.env = out, total, env
        self.begin = time.monotonic()
        self.failed = 0
        self.log = (out / "log.txt").open("a")

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "summary.txt").open("a") as file:
            file.write(text + "\n")

    def run(self, phases: Sequence[Phase]) -> None:
        scale = max(1.0, self.total / sum(p.limit for p in phases))
        end = self.begin
        for phase in phases:
            end = min(end + phase.limit * scale, self.begin + self.total)
            self.say(f"== {phase.number}  {phase.name} (until {end - self.begin:.0f} s)")
            for stage in phase.stages:
                self._stage(stage, end)

    def _stage(self, jobs: Sequence[Job], end: float) -> None:
        """Run jobs side by side until ``end``; a crashed one that can go on is started again."""
        starts = {job: 0 for job in jobs}
        running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            logs = {job: Path(folder) / f"{i}.txt" for i, job in enumerate(jobs)}

            def start(job: Job) -> None:
                starts[job] += 1
                command = [*job.prefix, sys.executable, *job.command]
                with logs[job].open("ab") as stream:
                    process = subprocess.Popen(
                        command, stdout=stream, stderr=stream, env=self.env, start_new_session=True
                    )
                running[job] = process, time.monotonic()

            for job in jobs:
                if time.monotonic() > end - 5:
                    self.say(f"-- {job.name}: no time left")
                else:
                    start(job)
            try:
                while running:
                    for job, (process, began) in list(running.items()):
                        code = process.poll()
                        late = code is None and time.monotonic() > end
                        if late:
                            code = stop(process)
                        if code is None:
                            continue
                        del running[job]
                        crashed = not late and (code < 0 or code == 75)
                        if crashed and job.again and starts[job] <= RESTARTS and time.monotonic() < end - 15:
                            self.say(f"!! {job.name}: died with code {code}; it goes on behind what killed it")
                            self.failed += 1
                            start(job)
                            continue
                        self._tell(job, code, late, time.monotonic() - began, logs[job])
                    time.sleep(0.05)
            finally:
                for process, _ in running.values():
                    stop(process)

    def _tell(self, job: Job, code: int, late: bool, seconds: float, log: Path) -> None:
        text = log.read_text(errors="replace")
        self.log.write(f"== {job.name}: code {code}, {seconds:.0f} s of {job.seconds:.0f} expected\n{text}\n")
        self.log.flush()
        if late:
            self.say(f"-- {job.name}: stopped after {seconds:.0f} s; what it finished is kept")
        elif code:
            self.failed += 1
            self.say(f"!! {job.name}: failed with code {code} after {seconds:.0f} s")
            self.say("\n".join(f"     {line}" for line in text.strip().splitlines()[-5:]))
        else:
            self.say(f"ok {job.name} ({seconds:.0f} s)")


def stop(process: subprocess.Popen[bytes]) -> int:
    """Interrupt the process group, kill what is left of it after a few seconds, and return the exit code."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def build(repo: Path, work: Path) -> int:
    """Compile the extension of ``repo`` into ``work/site``, unless it is there from the same sources."""
    sources = sorted(p for p in (repo / "csrc").rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    digest = hashlib.sha256(f"{sys.version} {os.environ.get('LCCONFORMER_CUDA')}".encode())
    for path in (repo / "setup.py", *sources):
        digest.update(path.read_bytes())
    stamp, now = work / "built", digest.hexdigest()
    if stamp.exists() and stamp.read_text() == now:
        print("built already")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        # without pyproject.toml, whose metadata an old setuptools refuses, and away from a checkout that may be read-only; at
        # the same place each time, so that ninja goes on where a build was stopped
        source = work / "source"
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(repo / "csrc", source / "csrc")
        shutil.copy(repo / "setup.py", source)
        (source / "lcconformer").mkdir()
        options = ["--build-lib", f"{folder}/lib", "--build-temp", str(work / "objects")]
        code = subprocess.run([sys.executable, "setup.py", "build_ext", *options], cwd=source).returncode
        built = list(Path(folder).glob("lib/lcconformer/_C*"))
        for path in built:
            # at once: other processes may be importing it
            shutil.copy(path, work / f"{path.name}.new")
            os.replace(work / f"{path.name}.new", work / "site" / "lcconformer" / path.name)
    if code or not built:
        print("no extension was built; the Python parts serve without it", file=sys.stderr)
        return code or 1
    stamp.write_text(now)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument(
        "--build", nargs=2, type=Path, metavar=("REPO", "WORK"), help="build the extension, nothing else"
    )
    parser.add_argument("--plan", action="store_true", help="print the plan, nothing else")
    parser.add_argument("--gpu", type=int, choices=(0, 1), default=1, help="whether there is a GPU")
    parser.add_argument("--repo", type=Path, default=Path.cwd())
    parser.add_argument("--work", type=Path, default=Path("build/gpu"))
    parser.add_argument("out", nargs="?", type=Path, default=Path("OUT"))
    parser.add_argument("phases", nargs="?", default="1-5")
    args = parser.parse_args(argv)
    if args.build:
        return build(*args.build)
    try:
        chosen = numbers(args.phases)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    phases = [p for p in plan(args.out, args.work, args.repo, bool(args.gpu)) if p.number in chosen]
    if args.plan:
        print(table(phases))
        print("\n".join(f"{name}: {seconds:g} s, {source}" for name, (seconds, source) in COST.items()))
        return 0
    if 1 not in chosen:
        first = phases[0]
        build_first = plan(args.out, args.work, args.repo, bool(args.gpu))[0].stages[0][
            :1
        ]  # at once where it was built
        phases[0] = Phase(first.number, first.name, first.limit, (build_first, *first.stages))
    # so that a driver that is stopped stops its processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # without a GPU times mean nothing, and a busy laptop may take longer
    driver = Driver(args.out, CALL if args.gpu else 3600)
    driver.run(phases)
    goals = [sys.executable, "-m", "lcconformer.bench.reports.goals", str(args.out / "bench.json")]
    done = subprocess.run(goals, capture_output=True, text=True)
    driver.say(done.stdout + done.stderr)
    count = sum(p.is_file() for p in args.out.iterdir())
    driver.say(f"{time.monotonic() - driver.begin:.0f} s, {driver.failed} failures; {count} files in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
