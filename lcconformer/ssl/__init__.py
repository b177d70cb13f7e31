"""Self-supervised pretraining: masks, objectives, the training loop, checkpoints."""

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
