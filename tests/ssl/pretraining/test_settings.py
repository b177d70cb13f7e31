"""Settings of a run: what is refused, and the way through a checkpoint."""

import dataclasses
import json
import math

import pytest

from lcconformer import ConformerConfig
from lcconformer.ssl import FeatureSettings, ObjectiveSettings
from lcconformer.ssl.pretraining import PretrainSettings
from lcconformer.ssl.pretraining.settings import FREE_SETTINGS

CONFIG = ConformerConfig(
    d_model=16,
    num_heads=2,
    ffn_dim=32,
    num_layers=3,
    conv_kernel_size=3,
    input_dim=20,
    subsampling="stack",
    subsampling_factor=2,
)
SETTINGS = PretrainSettings(
    config=CONFIG,
    features=FeatureSettings(20),
    steps=8,
    batch_seconds=3.0,
    crop_seconds=1.0,
    validate_every=4,
    checkpoint_every=3,
    device="cpu",
)


def settings(**changes: object) -> PretrainSettings:
    return dataclasses.replace(SETTINGS, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0; expected an integer from 1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number above 0"),
        *[
            ({name: value}, f"{name} is {value}; expected a finite number")
            for name in (
                "learning_rate",
                "clip",
                "batch_seconds",
                "crop_seconds",
                "max_minutes",
                "distill",
                "weight_decay",
                "warmup",
            )
            for value in (math.inf, math.nan)
        ],
        *[
            ({name: value}, f"{name} is {value}; expected an integer")
            for name in ("steps", "accumulate", "validate_every", "checkpoint_every", "keep", "workers", "seed")
            for value in (math.inf, 2.5, True, 10**30)
        ],
        ({"device": 3}, "device is 3; expected None or the name of a device"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"batch_seconds": 0.0}, "batch_seconds is 0.0"),
        ({"crop_seconds": 0.0}, "crop_seconds is 0.0"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a finite number of 0 or more and below 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"max_minutes": 0.0}, "max_minutes is 0.0"),
        ({"precision": "half"}, "precision is 'half'; expected one of float32"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of adamw, muon"),
        ({"depth": "deep"}, "kind is 'deep'"),
        ({"min_depth": 4}, "low is 4 with num_layers = 3"),
        ({"distill": 1.0}, "distill is 1.0 with depth='uniform': only depth='sandwich'"),
    ],
)
def test_settings_refuse(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_settings_come_back_from_a_checkpoint() -> None:
    told = settings(
        objective=ObjectiveSettings("best_rq"), config=CONFIG.replace(conditioning=("step",)), max_minutes=2.0
    )
    meta = {**told.build_model().describe(), "settings": told.describe(), "free_settings": told.describe_free()}
    meta = json.loads(json.dumps(meta))
    assert PretrainSettings.from_checkpoint(meta) == told
    assert "optimizer" not in meta["settings"]  # of AdamW nothing is said, as before there was another
    muon = settings(optimizer="muon")
    assert muon.describe() == {**settings().describe(), "optimizer": "muon"}
    described = {**muon.build_model().describe(), "settings": muon.describe(), "free_settings": muon.describe_free()}
    assert PretrainSettings.from_checkpoint(described) == muon
    del meta["free_settings"]  # as in checkpoints of version 0.1.0
    assert PretrainSettings.from_checkpoint(meta) == dataclasses.replace(told, **free_defaults())
    meta["settings"]["unheard_of"] = 1
    with pytest.raises(ValueError, match=r"does not fit this version .*unheard_of"):
        PretrainSettings.from_checkpoint(meta)
    with pytest.raises(ValueError, match=r"does not fit this version .*config"):
        PretrainSettings.from_checkpoint({})


def free_defaults() -> dict:
    return {field.name: field.default for field in dataclasses.fields(PretrainSettings) if field.name in FREE_SETTINGS}
