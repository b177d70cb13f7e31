"""`ConformerConfig`: defaults, JSON, and a clear message for every bad value."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lcconformer import ConformerConfig

CONFIGS = [
    ConformerConfig(),
    ConformerConfig(input_dim=80, subsampling="conv", subsampling_factor=4, conditioning=("film", "lora"), lora_rank=2),
    ConformerConfig(num_layers=4, sharing=(0, 1, 1, 0), conv_norm="batch", conv_norm_statistics="per_depth"),
    ConformerConfig(d_model=96, num_heads=6, position="rotary", rotary_input="hidden", dropout=0.0, padding="peer"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_json_round_trip(config):
    again = ConformerConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)  # tuples came back as tuples
    assert set(json.loads(config.to_json())) == {f.name for f in dataclasses.fields(config)}


def test_json_takes_defaults_for_missing_keys():
    assert ConformerConfig.from_json('{"d_model": 64}') == ConformerConfig(d_model=64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"from_json: not JSON"),
        ("[1]", r"from_json: got a JSON list; expected an object"),
        ('{"d_modle": 64}', r"unknown keys d_modle; expected some of .*d_model"),
        ('{"d_model": 0}', r"d_model is 0; expected a positive integer"),
    ],
)
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message):
        ConformerConfig.from_json(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[
            ({name: value}, rf"{name} is {value!r}; expected a positive integer")
            for name in ("d_model", "num_heads", "ffn_dim", "num_layers", "conv_norm_groups", "lora_rank")
            for value in (0, -1, 2.0, True, "4")
        ],
        ({"subsampling_factor": 0}, r"subsampling_factor is 0; expected a positive integer"),
        ({"input_dim": 0}, r"input_dim is 0; expected None or a positive integer"),
        ({"input_dim": 80.0}, r"input_dim is 80\.0; expected None or a positive integer"),
        ({"input_dim": True}, r"input_dim is True; expected None or a positive integer"),
        ({"position": "absolute"}, r"position is 'absolute'; expected one of 'relative', 'rotary', 'none'"),
        ({"rotary_input": "x"}, r"rotary_input is 'x'; expected one of 'query_key', 'hidden'"),
        ({"conv_norm": "instance"}, r"conv_norm is 'instance'; expected one of 'layer', 'batch', 'group', 'none'"),
        ({"conv_norm_statistics": "own"}, r"conv_norm_statistics is 'own'; expected one of 'shared', 'per_depth'"),
        ({"activation": "tanh"}, r"activation is 'tanh'; expected one of 'silu', 'gelu', 'relu'"),
        ({"padding": "same"}, r"padding is 'same'; expected one of 'masked', 'peer'"),
        ({"subsampling": "vgg"}, r"subsampling is 'vgg'; expected one of 'none', 'stack', 'conv'"),
        ({"num_heads": 3}, r"num_heads is 3; expected a divisor of d_model = 256"),
        ({"d_model": 15, "num_heads": 3}, r"d_model is 15; expected an even number with position='relative'"),
        ({"d_model": 12, "num_heads": 4, "position": "rotary"}, r"num_heads is 4; expected an even head width"),
        *[
            ({"conv_kernel_size": k}, rf"conv_kernel_size is {k!r}; expected an odd integer from 1 to 63")
            for k in (0, -1, 4, 65, 7.0)
        ],
        ({"conv_kernel_size": True}, r"conv_kernel_size is True; expected an odd integer"),
        ({"dropout": 1.0}, r"dropout is 1\.0; expected 0 <= dropout < 1"),
        ({"dropout": -0.1}, r"dropout is -0\.1; expected 0 <= dropout < 1"),
        ({"dropout": float("nan")}, r"dropout is nan; expected 0 <= dropout < 1"),
        ({"dropout": "0.1"}, r"dropout is '0\.1'; expected 0 <= dropout < 1"),
        *[
            ({"layer_norm_eps": eps}, rf"layer_norm_eps is {eps!r}; expected a positive, finite number")
            for eps in ("1e-5", 0.0, float("inf"), float("nan"), True)
        ],
        ({"conv_norm_groups": 3}, r"conv_norm_groups is 3; expected a divisor of d_model = 256"),
        ({"conv_norm_statistics": "per_depth"}, r"expected 'shared' unless conv_norm='batch'"),
        ({"subsampling_factor": 2}, r"subsampling_factor is 2; expected 1 with subsampling='none'"),
        ({"subsampling": "stack", "input_dim": 80}, r"subsampling_factor is 1; expected 2 or more"),
        (
            {"subsampling": "conv", "input_dim": 80, "subsampling_factor": 3},
            r"subsampling_factor is 3; expected 2 or 4",
        ),
        ({"subsampling": "stack", "subsampling_factor": 2}, r"input_dim is None; expected the width"),
        ({"conditioning": ("step", "adapter")}, r"conditioning is .*; expected a subset of 'layer_norm', 'step'"),
        ({"conditioning": ("step", "step")}, r"conditioning is .*; expected a subset"),
        ({"conditioning": "step"}, r"conditioning is 'step'; expected a tuple"),
        ({"conditioning": 5}, r"conditioning is 5; expected a tuple of forms"),
        ({"conditioning": ([],)}, r"conditioning is \(\[\],\); expected a subset"),
        ({"sharing": "some"}, r"sharing is 'some' with num_layers = 12: unknown form"),
        ({"sharing": None}, r"sharing is None; expected the name of a form or a tuple"),
        ({"sharing": "cycle:" + "9" * 5000}, r"the numbers after ':' are not integers"),
        ({"attention_bias": 1}, r"attention_bias is 1; expected True or False"),
        # what would take gigabytes for a list of the loops, or for one weight
        ({"num_layers": 10**9}, r"num_layers is 1000000000; expected a positive integer, at most 10000"),
        ({"d_model": 10**7}, r"d_model is 10000000; expected a positive integer, at most 65536"),
        ({"num_layers": 10**30}, r"expected a positive integer, at most 10000"),
    ],
    ids=str,
)
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        ConformerConfig(**changes)


def test_replace_validates():
    config = ConformerConfig()
    assert config.replace(d_model=64).d_model == 64
    with pytest.raises(ValueError, match="num_heads is 7"):
        config.replace(num_heads=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64
