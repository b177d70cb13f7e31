"""A training under fire: killed at random, its disk filled; in the end its tensors are those of the undisturbed run.

    python tests/abuse/soak.py --kills 100            # about half an hour
    python tests/abuse/soak.py --kills 2 --steps 60   # a taste

Two trainings of the same settings on the speech that comes with the package.  One runs from start to end.  The other is
started again and again with --resume and killed (SIGKILL) a random moment after it went on; meanwhile its disk, a small
tmpfs, is filled twice (as root only: an ordinary user cannot mount one).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lcconformer.runtime import ProgressBar, write_atomically
from lcconformer.ssl import load_checkpoint

DATA = Path(__file__).parents[2] / "lcconformer/data/demo/asterisk_en.zip"
OPTIONS = [
    *("--layers", "2", "--d-model", "32", "--heads", "2", "--kernel", "5", "--mel-bins", "40", "--device", "cpu"),
    *("--batch-seconds", "5", "--crop-seconds", "2", "--workers", "1", "--keep", "2"),
    *("--checkpoint-every", "20", "--validate-every", "1000000"),
]
DISK_MB = 8


def start(out: Path, steps: int, *more: str) -> subprocess.Popen[str]:
    # the folder names the run; a resumed one takes all other options from its checkpoint
    command = [sys.executable, "-m", "lcconformer", "pretrain", "--data", str(DATA), "--out", str(out), *OPTIONS]
    command += ["--steps", str(steps), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def rows(out: Path) -> int:
    try:
        return (out / "steps.csv").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small tmpfs on ``folder``; whether that worked."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """Leave no room on the disk of ``folder`` within the block."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    try:
        yield
    finally:
        filler.unlink()


def under_fire(out: Path, steps: int, kills: int, disk: bool, bar: ProgressBar) -> dict[str, int]:
    """Train to the end although the process is killed ``kills`` times; returns what happened."""
    happened = {"kills": 0, "disks filled": 0, "refused for want of room": 0}
    while True:
        bar.update(happened["kills"] / (kills + 1), f"{happened['kills']} kills, {rows(out)} rows")
        fill = disk and happened["disks filled"] < 2 and happened["kills"] >= kills * (1 + happened["disks filled"]) / 3
        process, before = start(out, steps, "--resume"), rows(out)
        deadline = time.monotonic() + 300
        while process.poll() is None and rows(out) <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        if happened["kills"] < kills and process.poll() is None:
            with full(out) if fill else contextlib.nullcontext():
                time.sleep(random.uniform(5, 10) if fill else random.uniform(0, 3))
                process.kill()
                _, said = process.communicate()
            happened["kills"] += 1
            happened["disks filled"] += fill
            continue
        _, said = process.communicate()
        if process.returncode == 0:
            return happened
        if process.returncode == 1 and "can be written" in said:
            happened["refused for want of room"] += 1
            continue
        raise RuntimeError(f"the run ended with {process.returncode}:\n{said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=4000, help="steps of the training (default 4000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of the kills")
    parser.add_argument("--out", type=Path, help="write the counts to this file (JSON)")
    args = parser.parse_args()
    random.seed(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, ProgressBar("undisturbed") as bar:
        folder = Path(temporary)
        process = start(folder / "whole", args.steps)
        _, said = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the undisturbed run ended with {process.returncode}:\n{said}")
        with small_disk(folder / "disk") as disk:
            if not disk:
                bar.say("no small disk can be mounted: the disk will not be filled")
            happened = under_fire(folder / "disk", args.steps, args.kills, disk, bar)
            whole, fire = load_checkpoint(folder / "whole"), load_checkpoint(folder / "disk")
            left = sorted(path.name for path in (folder / "disk").iterdir() if path.suffix == ".tmp")
    same = whole.tensors.keys() == fire.tensors.keys() and all(
        torch.equal(x, fire.tensors[name]) for name, x in whole.tensors.items()
    )
    result = {
        "steps": args.steps,
        **happened,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "bitwise equal": same,
    }
    print(json.dumps(result))
    if left:
        print(f"left behind: {', '.join(left)}", file=sys.stderr)
    if args.out:
        write_atomically(args.out, json.dumps(result, indent=1) + "\n")
    return int(not same or bool(left))


if __name__ == "__main__":
    sys.exit(main())
