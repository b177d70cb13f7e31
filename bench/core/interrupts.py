"""Ctrl-C that is not lost: Python drops an exception raised while it runs a weak reference's callback or a destructor."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """Within the block (in the main thread) Ctrl-C raises KeyboardInterrupt as ever, and :meth:`check` raises it again."""

    def __enter__(self) -> Interrupts:
        self._received = False
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed since the block began."""
        if self._received:
            raise KeyboardInterrupt
