"""The upstream of S3PRL: what it returns, and that S3PRL's own modules accept it where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lcconformer.ssl.checkpoint import save_checkpoint
from lcconformer.ssl.finetuning import Recogniser, TaskSettings
from lcconformer.ssl.s3prl import UpstreamExpert, lcconformer


def waves() -> list[torch.Tensor]:
    return [0.1 * torch.randn(n) for n in (16_000, 9_123, 23_456)]


def test_each_waveform_gets_the_states_it_gets_alone(tiny_model, tiny_checkpoint: Path) -> None:
    upstream = lcconformer(tiny_checkpoint, model_config=None, refresh=False).eval()
    assert isinstance(upstream, UpstreamExpert)
    wavs = waves()
    with torch.no_grad():
        found = upstream(wavs)
        assert len(found["hidden_states"]) == tiny_model.config.num_layers + 1
        assert torch.equal(found["last_hidden_state"], found["hidden_states"][-1])
        for row, wav in enumerate(wavs):
            alone, frames = tiny_model.hidden_states(wav[None], torch.tensor([len(wav)]))
            for together, own in zip(found["hidden_states"], alone, strict=True):
                torch.testing.assert_close(together[row, : int(frames)], own[0], rtol=1e-4, atol=1e-4)
                assert not together[row, int(frames) :].any()
    # S3PRL cuts at len / rate, rounded
    rate = upstream.get_downsample_rates("hidden_states")
    assert abs(found["last_hidden_state"].shape[1] - round(max(map(len, wavs)) / rate)) <= 1


def test_it_can_be_trained_and_comes_from_any_checkpoint(tiny_model, tiny_checkpoint: Path, tmp_path: Path) -> None:
    upstream = lcconformer(tiny_checkpoint).train()
    upstream(waves())["last_hidden_state"].square().sum().backward()
    assert all(p.grad is not None for p in upstream.model.encoder.parameters())
    torch.manual_seed(1)
    recogniser = Recogniser(tiny_model.config, tiny_model.feature_settings, TaskSettings(), "AB").eval()
    tensors = {f"model.{name}": x for name, x in recogniser.state_dict().items()}
    path = save_checkpoint(tmp_path / "tuned.safetensors", tensors, recogniser.describe())
    wav = waves()[0]
    with torch.no_grad():
        found = lcconformer(path).eval()([wav])["last_hidden_state"]
        torch.testing.assert_close(found, recogniser.hidden_states(wav[None], torch.tensor([len(wav)]))[0][-1])
    with pytest.raises(FileNotFoundError):
        lcconformer(tmp_path / "nowhere")


def test_s3prl_takes_it(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("s3prl.hub", reason="S3PRL is not installed", exc_type=ImportError)
    nn = pytest.importorskip("s3prl.nn", reason="S3PRL is not installed", exc_type=ImportError)
    monkeypatch.setattr(hub, "lcconformer", lcconformer, raising=False)
    upstream = nn.S3PRLUpstream("lcconformer", path_or_url=str(tiny_checkpoint)).eval()
    wavs = waves()
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    states, lengths = upstream(padded, torch.tensor([len(w) for w in wavs]))
    assert len(states) == upstream.num_layers
    mixed, _ = nn.Featurizer(upstream)(states, lengths)
    assert mixed.shape == states[0].shape
