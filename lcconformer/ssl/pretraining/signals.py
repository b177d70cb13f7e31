"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch.distributed as dist

__all__ = ["STOP_SIGNALS", "StopSignals"]

STOP_SIGNALS = ("SIGINT", "SIGTERM")


class StopSignals:
    """Context in which SIGINT and SIGTERM only set ``received`` to their name, if it is entered in the main thread.

    A second signal has its usual effect, except under torchrun, which sends signals repeatedly.
    """

    received = ""

    def __enter__(self) -> StopSignals:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in map(signal.Signals.__getitem__, STOP_SIGNALS):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number).name
        if not dist.is_torchelastic_launched():
            signal.signal(number, self._before[number])

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
