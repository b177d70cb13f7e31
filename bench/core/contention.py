"""Other work on the cores while something is timed: no server is alone on its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

__all__ = ["neighbours", "parse_contention"]

_BUSY = "while True: pass"
_TORCH = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(512, 512)
print("ready", flush=True)
while True: torch.mm(x, x)
"""


def parse_contention(text: str) -> int | None:
    """``"2"`` -> 2 busy threads; ``"torch"`` -> None, another PyTorch job.

    Raises:
        ValueError: the text is anything else.
    """
    if text == "torch":
        return None
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ValueError(f"bench: --contention is {text!r}; expected a number of busy threads, 1 to 1024, or torch")
    return int(text)


@contextlib.contextmanager
def neighbours(busy: int | None, threads: int) -> Iterator[None]:
    """Keep cores busy inside the block, by processes of their own.

    Args:
        busy: threads that never rest; None for a PyTorch job that multiplies matrices on ``threads`` threads.
    """
    if busy is None:
        commands = [[sys.executable, "-c", _TORCH, str(threads)]]
    else:
        commands = [[sys.executable, "-c", f"print('ready', flush=True)\n{_BUSY}"]] * busy
    started: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for process in started:
            if process.stdout is None or not process.stdout.readline():
                raise RuntimeError(f"bench: the neighbour ended with exit status {process.wait()} before it was busy")
        time.sleep(0.1)
        yield
    finally:
        for process in started:
            process.kill()
            process.communicate()
