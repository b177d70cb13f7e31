"""Items of a phase: what is done, what it gave and what is left, in OUT/state.json.

A process takes the items one by one.  Whatever is done is skipped by the next process, also in a later call; so is an item
that was begun and killed its process, but only in the same call.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lcconformer.runtime import read_json, write_atomically

__all__ = ["CRASHED", "Items"]

CRASHED = 75  # exit code: CUDA answers nothing any more in this process, and a new one should go on


class Items:
    """The items of one phase.

    Args:
        out: folder of the results.
        phase: its number.
        call: what tells calls of gpu.sh apart.
    """

    def __init__(self, out: Path, phase: int, call: str | None = None) -> None:
        self.path, self.phase = out / "state.json", f"phase {phase}"
        self.call = call or os.environ.get("LCCONFORMER_GPU_CALL", "")

    def _state(self) -> dict[str, dict[str, Any]]:
        return read_json(self.path) if self.path.exists() else {}

    def _note(self, name: str, **entry: object) -> None:
        state = self._state()
        state.setdefault(self.phase, {})[name] = {"call": self.call, **entry}
        write_atomically(self.path, json.dumps(state, indent=1) + "\n")

    def left(self, name: str) -> bool:
        """Whether the item is still to be run."""
        entry = self._state().get(self.phase, {}).get(name)
        return entry is None or (entry["status"] != "done" and entry["call"] != self.call)

    def run(self, items: Mapping[str, Callable[[], object]]) -> int:
        """Run what is left, and note what each returns (values for JSON).

        Returns:
            The exit status: 1 if an item failed, :data:`CRASHED` if the others need a new process.
        """
        failed = 0
        for name, item in items.items():
            if not self.left(name):
                continue
            self._note(name, status="begun")
            begin = time.monotonic()
            try:
                result = item()
            except Exception as error:
                traceback.print_exc()
                self._note(name, status=f"failed: {type(error).__name__}: {str(error)[:300]}")
                failed = 1
                if not alive():
                    return CRASHED
            else:
                self._note(name, status="done", seconds=round(time.monotonic() - begin, 1), result=result)
            sys.stdout.flush()
        return failed


def alive() -> bool:
    """Whether CUDA, if it is there, still answers."""
    if not torch.cuda.is_available():
        return True
    try:
        torch.ones(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
