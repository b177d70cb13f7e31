"""Speech-like corpora with exact phone times, and a tiny pretraining model."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from lcconformer import ConformerConfig
from lcconformer.ssl.checkpoint import save_checkpoint
from lcconformer.ssl.model import FeatureSettings, PretrainingModel
from lcconformer.ssl.objectives import ObjectiveSettings

RATE = 16_000
PITCHES = {"SIL": 0.0, "AA": 300.0, "IY": 1200.0, "S": 3500.0}


def sound(phones: list[tuple[str, int]], rng: np.random.Generator) -> np.ndarray:
    """A tone of its own for each phone, in noise; silence is noise alone."""
    parts = []
    for phone, frames in phones:
        t = np.arange(frames * 160) / RATE
        parts.append(0.2 * np.sin(2 * np.pi * PITCHES[phone] * t))
    samples = np.concatenate(parts)
    return (samples + 0.01 * rng.standard_normal(len(samples))).astype(np.float32)


@pytest.fixture(scope="session")
def make_speech(tmp_path_factory: pytest.TempPathFactory):
    """``make_speech(name, count=8, splits=True, aligned=True)`` -> folder of a corpus of speakers s0, s1, s2; about 1 s each.

    Splits are ``train`` (s0, s1) and ``test`` (s2), or none.
    """

    def make(name: str, count: int = 8, *, splits: bool = True, aligned: bool = True, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(name)
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(count):
            names = [*rng.permutation(list(PITCHES)), *rng.permutation(list(PITCHES))]
            phones = [(str(p), int(n)) for p, n in zip(names, rng.integers(5, 20, len(names)))]
            samples = sound(phones, rng)
            soundfile.write(folder / f"{name}{i:02}.flac", samples, RATE)
            rows.append(
                {
                    "utt": f"{name}{i:02}",
                    "spk": f"s{i % 3}",
                    "split": ("test" if i % 3 == 2 else "train") if splits else "",
                    "text": "",
                    "n": len(samples),
                    "phones": " ".join(f"{p}:{n}" for p, n in phones) if aligned else "",
                }
            )
        (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture(scope="session")
def speech(make_speech) -> Path:
    return make_speech("speech", 12)


@pytest.fixture
def tiny_model() -> PretrainingModel:
    """3 loops of width 16 over pairs of frames, 20 mel bins, seeded, in evaluation mode."""
    torch.manual_seed(0)
    config = ConformerConfig(
        d_model=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=3,
        conv_kernel_size=5,
        dropout=0.0,
        input_dim=20,
        subsampling="stack",
        subsampling_factor=2,
    )
    return PretrainingModel(config, FeatureSettings(num_bins=20), ObjectiveSettings()).eval()


@pytest.fixture
def tiny_checkpoint(tiny_model: PretrainingModel, tmp_path: Path) -> Path:
    tensors = {f"model.{name}": x for name, x in tiny_model.state_dict().items()}
    return save_checkpoint(tmp_path / "tiny.safetensors", tensors, tiny_model.describe())
