"""Speech-like corpora made on the fly."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

RATE = 16_000


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder corpus: 14 utterances of 0.4 to 1.2 s, four speakers a, b, c, d, splits train and test."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(14):
        count = int(RATE * rng.uniform(0.4, 1.2))
        t = np.arange(count) / RATE
        voice = sum(np.sin(2 * np.pi * k * (100 + 15 * i + 40 * np.sin(9 * t)) * t) / k for k in range(1, 9))
        sound = 0.1 * voice * (0.3 + np.sin(20 * t) ** 2) + 0.01 * rng.standard_normal(count)
        soundfile.write(folder / f"u{i:02}.flac", sound.astype(np.float32), RATE)
        rows.append({"utt": f"u{i:02}", "spk": "abcd"[i % 4], "split": "test" if i == 13 else "train", "n": count})
    (folder / "meta.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
