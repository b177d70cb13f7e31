"""The lock of a run's folder: two runs in one folder would overwrite each other's checkpoints and logs.

``run.lock`` is locked by the operating system, which lets go of it when the process ends, however it ends; ``run.json`` says
whose the run is.  Some network file systems lock within one machine only, so the run also touches ``run.json`` every 30
seconds, and a run on another machine takes a folder over only after that has stopped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...runtime import read_json, write_atomically

__all__ = ["lock_folder"]

_TOUCH = 30.0  # seconds
_STALE = 10 * _TOUCH  # clocks of two machines differ, and a busy file system takes its time


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of ``folder``, which is made, for the block.

    Raises:
        ValueError: another run is in the folder; the message says whose.
        OSError: the folder cannot be made or written to.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise ImportError('pretraining needs filelock: pip install "lcconformer[speech]"') from error

    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / "run.json"
    lock = FileLock(folder / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _taken(folder, _read(owner)) from None
    try:
        other = _read(owner)
        if other is not None:
            if other.get("host") != socket.gethostname() and time.time() - owner.stat().st_mtime < _STALE:
                raise _taken(folder, other)
            warnings.warn(f"{folder}: the run of {_whose(other)} ended without saying so", UserWarning, stacklevel=4)
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_atomically(owner, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
        stop = threading.Event()
        toucher = threading.Thread(target=_touch, args=(owner, stop), name="run.lock", daemon=True)
        toucher.start()
        try:
            yield
        finally:
            stop.set()
            toucher.join()
            owner.unlink(missing_ok=True)
    finally:
        if made and [entry.name for entry in folder.iterdir()] == ["run.lock"]:
            # the run never wrote anything
            with suppress(OSError):
                (folder / "run.lock").unlink()
                folder.rmdir()
        lock.release()


def _touch(owner: Path, stop: threading.Event) -> None:
    while not stop.wait(_TOUCH):
        with suppress(OSError):
            os.utime(owner)


def _read(owner: Path) -> dict[str, Any] | None:
    """Return what ``run.json`` says; None if there is none; empty if it cannot be read."""
    try:
        found = read_json(owner, 4096)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _whose(run: dict[str, Any]) -> str:
    return f"process {run.get('pid', '?')} on {run.get('host', '?')}, started {run.get('started', '?')}"


def _taken(folder: Path, run: dict[str, Any] | None) -> ValueError:
    return ValueError(
        f"another run is in {folder} ({_whose(run or {})}): wait for it, stop it, or choose another folder for this one"
    )
