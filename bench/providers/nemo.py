"""NeMo's Conformer encoder by its own source, without the toolkit around it and its many dependencies."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from .bare import bare_packages, folder_of

__all__ = ["missing", "source"]

_ASR = "nemo.collections.asr"


def _stub(name: str, **contents: object) -> None:
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)


def missing() -> str | None:
    """Return what keeps NeMo's source from being imported; None: nothing."""
    if folder_of("nemo") is None:
        return "NeMo is not installed; pip install --no-deps nemo_toolkit and pip install omegaconf"
    return "pip install omegaconf" if importlib.util.find_spec("omegaconf") is None else None


@contextlib.contextmanager
def source() -> Iterator[Any]:
    """Import NeMo's ``conformer_encoder`` for the block; stubbed are its loggers, checks of types, configs and exporter."""
    with bare_packages("nemo"):
        anything = type("Anything", (), {"__init__": lambda self, *a, **k: None})
        cast = importlib.import_module("nemo.utils.cast_utils")
        utils: Any = sys.modules["nemo.utils"]
        utils.avoid_float16_autocast_context = cast.avoid_float16_autocast_context
        utils.logging = SimpleNamespace(warning=print, info=print)
        utils.logging_mode, utils.model_utils = SimpleNamespace(), SimpleNamespace()
        types = "AcousticEncodedRepresentation BoolType ChannelType LengthsType NeuralType SpectrogramType"
        _stub("nemo.core.neural_types", **dict.fromkeys(types.split(), anything))
        _stub("nemo.core.classes.common", typecheck=lambda: lambda function: function)
        _stub("nemo.core.classes.exportable", Exportable=type("Exportable", (), {}))
        _stub("nemo.core.classes.module", NeuralModule=nn.Module)
        _stub(f"{_ASR}.models.configs", CacheAwareStreamingConfig=SimpleNamespace)
        access: Any = importlib.import_module("nemo.core.classes.mixins.access_mixins")
        mixins: Any = sys.modules["nemo.core.classes.mixins"]
        mixins.AccessMixin = access.AccessMixin
        yield importlib.import_module(f"{_ASR}.modules.conformer_encoder")
