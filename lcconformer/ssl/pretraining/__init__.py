"""Pretraining: settings, the training loop, its logs and checkpoints, and the speech it runs on."""

from .run import pretrain
from .settings import PretrainResult, PretrainSettings, StepRecord
from .speech import load_speech
from .validation import validation_losses

__all__ = ["PretrainResult", "PretrainSettings", "StepRecord", "load_speech", "pretrain", "validation_losses"]
