"""The learning rate and what decays."""

import pytest

from lcconformer import ConformerConfig
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel
from lcconformer.ssl.pretraining.optim import learning_rate_scale, make_optimizer

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


def test_learning_rate_rises_and_falls_linearly() -> None:
    assert [learning_rate_scale(p, 0.1) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_scale(0.0, 0.0) == 1.0
    assert learning_rate_scale(1.5, 0.1) == 0.0


def test_only_matrices_decay() -> None:
    model = PretrainingModel(
        CONFIG.replace(conditioning=("layer_norm", "step", "film")), FeatureSettings(20), ObjectiveSettings()
    )
    decayed, kept = ({id(p) for p in group["params"]} for group in make_optimizer(model, 0.1).param_groups)
    names = {name: id(p) in decayed for name, p in model.named_parameters()}
    assert len(decayed) + len(kept) == len(names)
    assert all(names[n] for n in names if n.endswith(("up.weight", "qkv.weight", "depthwise.weight", "project.weight")))
    assert not any(names[n] for n in names if n.endswith(("bias", "norm.weight", ".u")) or "conditioning" in n)
