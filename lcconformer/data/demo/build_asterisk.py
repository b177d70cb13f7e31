"""Build asterisk_en.zip: ``python -m lcconformer.data.demo.build_asterisk PACKAGES asterisk_en.zip``.

Needs ``pip install av pocketsphinx soundfile`` and a folder PACKAGES with Debian's packages asterisk-core-sounds-en and
asterisk-core-sounds-en-g722 unpacked (``apt-get download`` and ``dpkg-deb -x PACKAGE PACKAGES``). Loading the demo speech
does not need this file.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import av
import numpy as np
import pocketsphinx
import soundfile

from ...runtime import replacing

RATE = 16_000
MAX_SECONDS = 60
TEST_PART = 0.15
OPUS_LEVEL = 0.95  # libsndfile's compression level: about 20 kbit/s

NUMBERS = ("ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE")
SPELLING = {  # slips of the transcript, not of the speaker
    "EXCLAIMATION": "EXCLAMATION",
    "FOURTIETH": "FORTIETH",
    "REPRESENATIVES": "REPRESENTATIVES",
    "UMUTE": "UNMUTE",
}
PRONUNCIATION = {  # words that the aligner's dictionary lacks
    "backtick": "B AE K T IH K",
    "caret": "K EH R AH T",
    "digium": "D IH JH IY AH M",
    "forevermore": "F ER EH V ER M AO R",
    "ivr": "AY V IY AA R",
    "lowercase": "L OW ER K EY S",
    "pbx": "P IY B IY EH K S",
    "prepend": "P R IY P EH N D",
    "prepending": "P R IY P EH N D IH NG",
    "rerecord": "R IY R IH K AO R D",
    "semicolon": "S EH M IY K OW L AH N",
    "touchtone": "T AH CH T OW N",
    "undelete": "AH N D IH L IY T",
    "undeleted": "AH N D IH L IY T IH D",
    "unmute": "AH N M Y UW T",
    "unmuted": "AH N M Y UW T IH D",
    "uppercase": "AH P ER K EY S",
    "waldo's": "W AO L D OW Z",
    "xray": "EH K S R EY",
}


def decode(path: Path) -> np.ndarray:
    """Decode a G.722 file to int16 ``[samples]``."""
    with av.open(str(path), format="g722") as container:
        return np.concatenate([frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)])


def encode(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
    return file.getvalue()


def words(text: str) -> list[str] | None:
    """Words in upper case, with single digits spelt out; None if the text leaves open how it was read."""
    text = re.sub(r"\[.*?\]", "", text)
    if re.search(r"[#*]|\d\d|\d\.\d", text):
        return None
    text = re.sub(r"\d", lambda digit: f" {NUMBERS[int(digit[0])]} ", text.upper().replace("\u2019", "'"))
    return [SPELLING.get(word, word) for word in (w.strip("'") for w in re.findall(r"[A-Z']+", text)) if word]


def run(decoder: pocketsphinx.Decoder, samples: np.ndarray) -> None:
    decoder.start_utt()
    decoder.process_raw(samples.tobytes(), full_utt=True)
    decoder.end_utt()


def align(decoder: pocketsphinx.Decoder, samples: np.ndarray, spoken: list[str]) -> str:
    """Align phones: ``PHONE:frames ...`` in 10 ms frames from the start; empty if the aligner finds no alignment."""
    lower = [word.lower() for word in spoken]
    if any(decoder.lookup_word(word) is None for word in lower):
        return ""
    decoder.set_align_text(" ".join(lower))
    run(decoder, samples)
    if decoder.hyp() is None:
        return ""
    decoder.set_alignment()  # the first pass found the words, the second finds their phones
    run(decoder, samples)
    phones = [phone for word in decoder.get_alignment() for phone in word]
    position = 0
    for phone in phones:
        if phone.start != position:
            return ""
        position += phone.duration
    return " ".join(f"{phone.name}:{phone.duration}" for phone in phones)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    sounds = args.packages / "usr/share/asterisk/sounds/en_US_f_Allison"
    with gzip.open(args.packages / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt") as file:
        lines = [line.strip().partition(": ") for line in file if not line.startswith(";")]

    decoder = pocketsphinx.Decoder(
        lm=None, bestpath=False, beam=1e-60, pbeam=1e-60, wbeam=1e-40, loglevel="FATAL", samprate=RATE
    )
    for word, phones in PRONUNCIATION.items():
        decoder.add_word(word, phones, False)
    rows: list[dict[str, Any]] = []
    with replacing(args.out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, _, text in sorted(lines):
            path = sounds / f"{name}.g722"
            if not path.is_file() or text.startswith(("[", "<")) or name.startswith("silence/"):
                continue  # a tone, no speech, or no such file
            samples, spoken = decode(path), words(text)
            if len(samples) > MAX_SECONDS * RATE:
                continue
            utt = name.replace("/", "_")
            archive.writestr(zipfile.ZipInfo(f"{utt}.opus"), encode(samples))
            row = {
                "utt": utt,
                "spk": "allison",
                "split": "test" if hashlib.sha256(utt.encode()).digest()[0] < 256 * TEST_PART else "train",
                "text": " ".join(spoken) if spoken else text.upper(),
                "n": len(samples),
                "phones": align(decoder, samples, spoken) if spoken else "",
            }
            rows.append(row)
        meta = "".join(json.dumps(row) + "\n" for row in rows)
        archive.writestr(zipfile.ZipInfo("meta.jsonl"), meta, compress_type=zipfile.ZIP_DEFLATED)
    for split in ("train", "test"):
        part = [row for row in rows if row["split"] == split]
        minutes = sum(row["n"] for row in part) / RATE / 60
        print(f"{split}: {len(part)} prompts, {minutes:.1f} min, {sum(bool(row['phones']) for row in part)} aligned")


if __name__ == "__main__":
    main()
