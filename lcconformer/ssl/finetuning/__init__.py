"""Speech recognition: an encoder, pretrained or new, trained by frame labels and CTC, and its error rates at every depth."""

from .augment import AugmentSettings
from .evaluation import best_depth, calibrate_exit, error_rates, evaluate, exit_depths, read_corpus
from .model import Recogniser, TaskSettings, load_recogniser
from .run import finetune
from .settings import FinetuneResult, FinetuneSettings

__all__ = [
    "AugmentSettings",
    "FinetuneResult",
    "FinetuneSettings",
    "Recogniser",
    "TaskSettings",
    "best_depth",
    "calibrate_exit",
    "error_rates",
    "evaluate",
    "exit_depths",
    "finetune",
    "load_recogniser",
    "read_corpus",
]
