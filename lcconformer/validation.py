"""Checks of single settings; a refusal names the setting, what was got and what is expected."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["is_integer", "is_number", "need_integer", "need_number"]


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an ``int``, and no ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite ``int`` or ``float``."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def need_integer(owner: str, name: str, value: Any, least: int, most: int) -> None:
    """Require an integer from ``least`` to ``most``.

    Raises:
        ValueError: it is something else.
    """
    if not is_integer(value) or not least <= value <= most:
        raise ValueError(f"{owner}: {name} is {_shown(value)}; expected an integer from {least} to {most}")


def need_number(
    owner: str, name: str, value: Any, least: float, *, below: float = math.inf, open: bool = False
) -> None:
    """Require a finite number of at least ``least`` (with ``open``: above it) and below ``below``.

    Raises:
        ValueError: it is something else.
    """
    if not is_number(value) or not least <= value < below or (open and value == least):
        low = f"above {least:g}" if open else f"of {least:g} or more"
        high = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{owner}: {name} is {_shown(value)}; expected a finite number {low}{high}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
