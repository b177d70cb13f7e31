"""transformers' AutoModel over the encoder: the same outputs, and files in either form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder

transformers = pytest.importorskip("transformers", reason="pip install 'lcconformer[test]'")
auto = pytest.importorskip("lcconformer.auto")

SMALL = {"d_model": 16, "num_heads": 2, "ffn_dim": 24, "num_layers": 3, "conv_kernel_size": 5}
CONFIGS = {
    "shared": {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 2},
    "map": {"sharing": (0, 1, 0), "conditioning": ("film", "lora"), "lora_rank": 2},
    "batch": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
}


def batch(encoder: ConformerEncoder) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, lengths and the mask of the same."""
    lengths = torch.tensor([13, 6, 1])
    return torch.randn(3, 13, encoder.config.input_dim or 16), lengths, (torch.arange(13) < lengths[:, None]).long()


@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_the_encoder_load_as_an_auto_model(name: str, tmp_path: Path) -> None:
    encoder = ConformerEncoder(ConformerConfig(**SMALL, **CONFIGS[name])).eval()
    encoder.save_pretrained(tmp_path)
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), auto.LCConformerConfig)
    model, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is auto.LCConformerModel
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.encoder_config() == encoder.config
    assert model.config.hidden_size == 16
    x, lengths, mask = batch(encoder)
    want, _, states = encoder(x, lengths, return_hidden_states=True)
    got = model(x, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(got.last_hidden_state, want)
    assert len(got.hidden_states) == 4
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, states))
    assert torch.equal(model(x, mask, depth=2)[0], states[2])
    assert model(x, mask).hidden_states is None
    assert torch.equal(model(x, return_dict=False)[0], encoder(x)[0])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip_in_their_form(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = auto.LCConformerConfig(**SMALL, **CONFIGS[name], output_hidden_states=True)
    model = transformers.AutoModel.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.config.encoder_config() == config.encoder_config()
    want = model.state_dict()
    assert list(want) == list(loaded.state_dict())
    assert all(torch.equal(x, want[key]) and x.dtype == want[key].dtype for key, x in loaded.state_dict().items())
    x, _, mask = batch(model.encoder)
    got, want = loaded(x.to(dtype), mask), model(x.to(dtype), mask)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert len(got.hidden_states) == 4
    with pytest.raises(ValueError, match=r"describes .*'LCConformerModel'.*load it with the class that saved it"):
        ConformerEncoder.from_pretrained(tmp_path)


@pytest.mark.usefixtures("transformers")  # where torchaudio does not import
def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = auto.LCConformerModel(auto.LCConformerConfig(**SMALL, dropout=0.0)).train()
    x, _, mask = batch(model.encoder)
    gradients = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        assert model.encoder.gradient_checkpointing == (enable == model.gradient_checkpointing_enable)
        model.zero_grad()
        model(x, mask).last_hidden_state.square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_config_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads is 3; expected a divisor of d_model = 16"):
        auto.LCConformerConfig(**{**SMALL, "num_heads": 3})
