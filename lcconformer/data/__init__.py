"""Speech for pretraining and probes: corpora, phone labels, log-mel features, batches."""

from .batching import Batch, BatchLoader, plan_batches
from .corpora import BadAudioError, Corpus, demo_corpus, load_corpus, read_audio
from .features import LogMel, cmvn, frame_count
from .phones import IGNORE, PHONES, fold, frame_labels
from .utterance import Utterance

__all__ = [
    "IGNORE",
    "PHONES",
    "BadAudioError",
    "Batch",
    "BatchLoader",
    "Corpus",
    "LogMel",
    "Utterance",
    "cmvn",
    "demo_corpus",
    "fold",
    "frame_count",
    "frame_labels",
    "load_corpus",
    "plan_batches",
    "read_audio",
]
