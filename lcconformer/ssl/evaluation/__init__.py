"""Evaluation of every depth: phone probes, consistency between depths, inference time, and figures of them."""

from .consistency import model_consistency
from .depth_timing import DepthTimes, time_depths
from .hidden_states import random_init_like
from .probes import ProbeSettings, accuracies, best_depth, probe_model, smallest_depth, split_validation

__all__ = [
    "DepthTimes",
    "ProbeSettings",
    "accuracies",
    "best_depth",
    "model_consistency",
    "probe_model",
    "random_init_like",
    "smallest_depth",
    "split_validation",
    "time_depths",
]
