"""Speech recognition: an encoder, pretrained or new, trained by frame labels and CTC, and its error rates at every depth."""

from .augment import AugmentSettings
from .beam_search import BeamSearch
from .evaluation import (
    best_depth,
    calibrate_exit,
    calibrate_search,
    error_rates,
    evaluate,
    exit_depths,
    hear_corpus,
    read_corpus,
    search_rates,
)
from .model import Recogniser, TaskSettings, load_recogniser
from .ngrams import write_ngrams
from .run import finetune
from .settings import FinetuneResult, FinetuneSettings

__all__ = [
    "AugmentSettings",
    "BeamSearch",
    "FinetuneResult",
    "FinetuneSettings",
    "Recogniser",
    "TaskSettings",
    "best_depth",
    "calibrate_exit",
    "calibrate_search",
    "error_rates",
    "evaluate",
    "exit_depths",
    "finetune",
    "hear_corpus",
    "load_recogniser",
    "read_corpus",
    "search_rates",
    "write_ngrams",
]
