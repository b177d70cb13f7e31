"""lcconformer: a Conformer encoder for speech whose layers share one set of weights."""

from .config import ConformerConfig
from .conformer import Conformer
from .conversion import depth_errors, quantize, share
from .depth import DepthSampler, ExitRule
from .encoder import ConformerEncoder
from .interop.accelerate import AccelerationReport, accelerate, restore
from .layer import ConformerLayer
from .loop import captured_training, engine
from .ops.registry import backend
from .packing import pack, unpack

__version__ = "0.1.0"
__all__ = [
    "AccelerationReport",
    "Conformer",
    "ConformerConfig",
    "ConformerEncoder",
    "ConformerLayer",
    "DepthSampler",
    "ExitRule",
    "accelerate",
    "backend",
    "captured_training",
    "depth_errors",
    "engine",
    "pack",
    "quantize",
    "restore",
    "share",
    "unpack",
]
