"""Base of the dataclasses that hold an op's arguments: the one list that schema, autograd and every backend go by."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Contract"]

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
}


class Contract:
    """A frozen dataclass of tensors and plain values.

    ``cls(*contract.flat())`` gives it back, which is how it crosses the dispatcher and an ``autograd.Function``.
    """

    def flat(self) -> tuple[Any, ...]:
        """Return the values in the order of the fields."""
        return tuple(self.__dict__.values())

    @classmethod
    def schema(cls) -> str:
        """Return the fields as arguments of a ``torch.library`` schema, such as ``"Tensor x, Tensor? bias, float eps"``."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return ", ".join(f"{_SCHEMA_TYPES[str(f.type)]} {f.name}" for f in fields)
