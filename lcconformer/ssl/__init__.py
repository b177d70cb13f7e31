"""Self-supervised pretraining and its evaluation.

This level holds the model, its objectives and masks, and checkpoints; :mod:`~lcconformer.ssl.pretraining` trains,
:mod:`~lcconformer.ssl.evaluation` measures, :mod:`~lcconformer.ssl.demo` does both on a small scale.
"""

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .model import FeatureSettings, PretrainingModel, load_model
from .objectives import ObjectiveSettings

__all__ = [
    "Checkpoint",
    "FeatureSettings",
    "ObjectiveSettings",
    "PretrainingModel",
    "load_checkpoint",
    "load_model",
    "save_checkpoint",
]
