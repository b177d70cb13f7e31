"""Small corpora made on the fly."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16_000


def tone(seconds: float, pitch: float = 220.0, seed: int = 0) -> np.ndarray:
    """A noisy harmonic sound that is never silent: float32 [samples]."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    sound = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12))
    return (0.1 * sound + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def write_meta(folder: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "meta.jsonl").write_text("\n".join(lines) + "\n")


def write_folder(folder: Path, seconds: list[float], suffix: str = ".flac") -> Path:
    """A folder corpus with speakers s0, s1, s2 and utterances u000, u001, ... of these durations."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, duration in enumerate(seconds):
        samples = tone(duration, 100 + 20 * i, i)
        soundfile.write(folder / f"u{i:03}{suffix}", samples, RATE)
        frames = len(samples) // 160
        rows.append(
            {
                "utt": f"u{i:03}",
                "spk": f"s{i % 3}",
                "split": "test" if i % 3 == 2 else "train",
                "text": "AH T",
                "n": len(samples),
                "phones": f"SIL:{frames // 4} AH1:{frames // 2} T:{frames // 8}",
            }
        )
    write_meta(folder, rows)
    return folder


def zip_folder(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "corpus", [1.0, 0.5, 2.013, 1.5, 0.7, 3.0])
