"""Speech corpora: lists of utterances whose audio is read on demand.

Three layouts are recognised:

1. a LibriSpeech tree: any folder above ``SPEAKER/CHAPTER/*.trans.txt`` with its ``.flac`` files (one subset or several);
2. a zip with one mono 16 kHz file per utterance (``.mp3 .opus .ogg .flac .wav``) and ``meta.jsonl``, one JSON object per
   line: ``utt`` (name of the file without its extension), ``spk``, ``split``, ``text``, ``n`` (number of samples) and
   ``phones`` (``PHONE:frames ...``, in 10 ms frames from the start; empty where unknown);
3. a folder with the same content as such a zip.

Lhotse's manifests are not used: they describe files on a disk, so that a zip would have to be extracted (or rewritten as
Shar), and its samplers do not give the same batches for any number of processes.  Without them, a dozen fields remain.

An unusable file (corrupt, empty, too short, too long, silent, not 16 kHz, not mono) is never fatal: it is left out with a
warning that names it, and is listed in ``Corpus.skipped``.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import tempfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast, overload

import numpy as np
import torch

from .features import FRAME_SHIFT, SAMPLE_RATE
from .phones import parse_alignment
from .utterance import Utterance

FORMATS = (
    "a LibriSpeech folder tree (SPEAKER/CHAPTER/*.trans.txt with .flac files), "
    "a .zip with meta.jsonl and one audio file per utterance, or a folder with the same content"
)
_SUFFIXES = frozenset({".mp3", ".opus", ".ogg", ".flac", ".wav"})
_SILENCE = 4  # largest range of a silent file's samples in 16-bit steps: -84 dB of full scale
_WARNINGS = 20
# far beyond any corpus; a damaged or hostile file must not fill the memory
_MOST_SKIPPED = 100_000  # files that are listed
_LARGEST_AUDIO = 1 << 28  # bytes of a file of audio, unpacked
_LARGEST_META = 1 << 26, 1 << 14  # bytes of meta.jsonl, unpacked: at least this many, or so many per file of audio
_LARGEST_LINE = 1 << 20  # bytes
_MOST_SAMPLES = 1 << 26  # of a file of audio: 70 minutes
_LARGEST_LIST = 1 << 24  # bytes of a zip's list of files: at least this many, or a sixteenth of the zip
_IN_MEMORY = 1 << 24  # bytes of an unpacked file; a larger one is unpacked to a temporary file
# bytes of a zip that are unpacked at a time: those packed by bzip2 may become 20,000 times as many
_PIECE = 1 << 12
_BLOCK = 1 << 20  # samples that are decoded at a time
# what zipfile raises for a member that is damaged, encrypted or packed in a way that it does not know
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)
_SKIPPING = threading.Lock()


class BadAudioError(ValueError):
    """An audio file that cannot be used; the message says why."""


class _Skipped(dict[str, str]):
    """Reasons by file; warns once per file, for the first files only."""

    def add(self, file: str, reason: str) -> None:
        with _SKIPPING:
            if file in self or len(self) >= _MOST_SKIPPED:
                return
            self[file] = reason
            count = len(self)
        if count <= _WARNINGS:
            more = "; for further ones see Corpus.skipped" if count == _WARNINGS else ""
            warnings.warn(f"skipped audio file {count}: {file}: {reason}{more}", UserWarning, stacklevel=3)


class _ListLimited(io.BufferedReader):
    """A zip whose list of files has at most ``most`` bytes: zipfile reads the whole list and makes ten times as much of it."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._most = max(_LARGEST_LIST, path.stat().st_size // 16)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._most:
            raise ValueError(f"its list of files has {size} bytes; expected at most {self._most}")
        return super().read(size)


class _Archive:
    """Reads members of a zip; reopens it after a fork, because the processes would share one file position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), zipfile.ZipFile(_ListLimited(self.path))
        return self._opened[1]

    def names(self) -> list[str]:
        return self._zip().namelist()

    def open(self, name: str, most: int) -> BinaryIO:
        """Unpack a member of at most ``most`` bytes.

        Raises:
            BadAudioError: it is larger.
        """
        unpacked = cast(BinaryIO, tempfile.SpooledTemporaryFile(_IN_MEMORY))  # noqa: SIM115 (the caller closes it)
        with self._zip().open(name) as member:
            # whatever size the archive gives: a bomb says what it likes
            while piece := member.read(_PIECE):
                unpacked.write(piece)
                if unpacked.tell() > most:
                    unpacked.close()
                    raise BadAudioError(f"is larger than {most >> 20} MB unpacked")
        unpacked.seek(0)
        return unpacked

    def largest_meta(self, audio: int) -> int:
        """Bytes that ``meta.jsonl`` may have unpacked: no more than all the zip, unless that is small."""
        return max(_LARGEST_META[0], min(_LARGEST_META[1] * audio, self.path.stat().st_size))


class _Folder:
    """Reads the files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        return [entry.name for entry in self.path.iterdir() if entry.is_file()]

    def open(self, name: str, most: int) -> BinaryIO:
        """Open a file of at most ``most`` bytes.

        Raises:
            BadAudioError: it is larger, or not a regular file: reading a pipe or a device might never end.
        """
        path = self.path / name
        if not path.is_file():
            raise BadAudioError("is not a regular file")
        if path.stat().st_size > most:
            raise BadAudioError(f"is larger than {most >> 20} MB")
        return path.open("rb")

    def largest_meta(self, audio: int) -> int:
        """Bytes that ``meta.jsonl`` may have."""
        return max(_LARGEST_META[0], _LARGEST_META[1] * audio)


class Corpus(Sequence[Utterance]):
    """A sequence of utterances in a fixed order, with their audio; made by :func:`load_corpus`.

    ``name`` is the path of the corpus; ``skipped`` maps each file left out so far to the reason.
    """

    def __init__(
        self, name: str, utterances: Sequence[Utterance], files: _Archive | _Folder, skipped: _Skipped
    ) -> None:
        self.name = name
        self.skipped = skipped
        self._utterances = tuple(utterances)
        self._files = files
        self._pcm: dict[str, np.ndarray] = {}

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Utterance, ...]: ...
    def __getitem__(self, index: int | slice) -> Utterance | tuple[Utterance, ...]:
        return self._utterances[index]

    def __len__(self) -> int:
        return len(self._utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self._utterances)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}: {len(self)} utterances, {len(self.speakers)} speakers, {self.hours:.2f} h)"

    @property
    def hours(self) -> float:
        return sum(u.num_samples for u in self) / SAMPLE_RATE / 3600

    @property
    def speakers(self) -> tuple[str, ...]:
        return tuple(sorted({u.speaker for u in self}))

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(sorted({u.split for u in self}))

    def select(
        self,
        *,
        speakers: Collection[str] | None = None,
        exclude_speakers: Collection[str] = (),
        splits: Collection[str] | None = None,
        ids: Collection[str] | None = None,
    ) -> Corpus:
        """Select utterances by speaker, split and id (None: all), in the same order; audio already in memory is shared.

        Raises:
            ValueError: the corpus does not have one of the names, or nothing is left.
        """
        for what, wanted, known in (
            ("speaker", {*(speakers or ()), *exclude_speakers}, self.speakers),
            ("split", set(splits or ()), self.splits),
            ("utterance", set(ids or ()), {u.id for u in self} if ids else ()),
        ):
            unknown = sorted(wanted - set(known))
            if unknown:
                has = f"{len(known)} others" if what == "utterance" else ", ".join(known)
                raise ValueError(f"{self.name} has no {what} {', '.join(unknown)}; it has: {has}")
        kept = [
            u
            for u in self
            if (speakers is None or u.speaker in speakers)
            and u.speaker not in exclude_speakers
            and (splits is None or u.split in splits)
            and (ids is None or u.id in ids)
        ]
        if not kept:
            raise ValueError(f"no utterance of {self.name} is left by this selection")
        return self._replace(kept)

    def audio(self, utterance: Utterance) -> torch.Tensor:
        """Load an utterance: float32 ``[num_samples]`` at 16 kHz, full scale +-1, rounded to 16 bits.

        Raises:
            BadAudioError: the file cannot be used.
        """
        pcm = self._pcm.get(utterance.id)
        if pcm is None:
            pcm = self._decode(utterance)
        samples = pcm.astype(np.float32)
        samples /= 32768.0
        return torch.from_numpy(samples)

    def preload(self, workers: int = 2) -> Corpus:
        """Decode all audio into memory as 16-bit integers (115 MB per hour); returns the corpus without unusable files.

        Raises:
            ValueError: no file is usable.
        """
        with ThreadPoolExecutor(workers) as pool:
            pcm = dict(zip((u.id for u in self), pool.map(self._decode_or_skip, self)))
        corpus = self._replace([u for u in self if pcm[u.id] is not None])
        corpus._pcm = {key: value for key, value in pcm.items() if value is not None}
        _refuse_empty(corpus)
        return corpus

    def _replace(self, utterances: Sequence[Utterance]) -> Corpus:
        corpus = Corpus(self.name, utterances, self._files, self.skipped)
        corpus._pcm = self._pcm
        return corpus

    def _decode_or_skip(self, utterance: Utterance) -> np.ndarray | None:
        try:
            return self._pcm[utterance.id] if utterance.id in self._pcm else self._decode(utterance)
        except BadAudioError as error:
            self.skipped.add(utterance.source, str(error))
            return None

    def _decode(self, utterance: Utterance) -> np.ndarray:
        """Decode to int16 ``[num_samples]``; rounded here, so that audio from memory and from a file is the same."""
        expected, got = utterance.num_samples, 0
        if expected > _MOST_SAMPLES:
            raise BadAudioError(
                f"has {expected} samples: cut it into files of at most {_MOST_SAMPLES}, which last 70 minutes"
            )
        pcm = np.empty(expected, np.int16)
        with _open_audio(self._files, utterance.source) as file:
            # one sample more than expected shows that a file is longer, without decoding all of it
            while got <= expected and len(block := file.read(min(_BLOCK, expected + 1 - got), dtype="float32")):
                if not np.isfinite(block).all():
                    raise BadAudioError("has samples that are not finite")
                part = np.clip(np.rint(block[: expected - got] * 32768.0), -32768, 32767)
                pcm[got : got + len(part)] = part
                got += len(block)
        if got != expected:
            more = "more than " if got > expected else ""
            raise BadAudioError(f"holds {more}{min(got, expected)} samples, {expected} expected")
        if int(pcm.max()) - int(pcm.min()) <= _SILENCE:
            raise BadAudioError("is silent")
        return pcm


def load_corpus(path: str | os.PathLike[str], *, min_seconds: float = 0.2, max_seconds: float = 60.0) -> Corpus:
    """Open a corpus in one of three layouts (see the module), its utterances sorted by id.

    Only the headers of audio files are read. Utterances shorter than ``min_seconds`` or longer than ``max_seconds`` are
    skipped with a warning.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the layout is unknown, or there is no usable utterance.
        ImportError: soundfile is not installed.
    """
    if not 0.005 <= min_seconds < max_seconds:
        raise ValueError(f"need 0.005 <= min_seconds < max_seconds, got {min_seconds} and {max_seconds}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no corpus at {path}: expected {FORMATS}")
    _soundfile()
    skipped = _Skipped()
    files: _Archive | _Folder
    found = None
    try:
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path} is no corpus but a device or a pipe: expected {FORMATS}")
        if path.is_dir():
            files = _Folder(path)
            found = _from_meta(files, skipped) if "meta.jsonl" in files.names() else _from_librispeech(files, skipped)
        elif zipfile.is_zipfile(path):
            files = _Archive(path)
            found = _from_meta(files, skipped) if "meta.jsonl" in files.names() else None
    except BadAudioError as error:
        raise ValueError(f"meta.jsonl of {path} {error}") from error
    except _UNREADABLE as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from error
    if found is None:
        raise ValueError(f"{path} is no corpus: expected {FORMATS}")

    utterances: dict[str, Utterance] = {}
    for utterance in sorted(found, key=lambda u: (u.id, u.source)):
        if utterance.id in utterances:
            skipped.add(utterance.source, f"utterance {utterance.id} is there twice")
        elif utterance.num_samples <= 0:
            skipped.add(utterance.source, "is empty")
        elif not min_seconds <= utterance.seconds <= max_seconds:
            bounds = f"min_seconds={min_seconds:g} ... max_seconds={max_seconds:g}"
            skipped.add(utterance.source, f"lasts {utterance.seconds:.2f} s, outside {bounds}")
        else:
            utterances[utterance.id] = utterance
    corpus = Corpus(str(path), list(utterances.values()), files, skipped)
    _refuse_empty(corpus)
    return corpus


def demo_corpus() -> Corpus:
    """Load the speech that comes with the package: 23 minutes of English telephone prompts with phone alignments.

    It has one speaker and the splits ``train`` and ``test``. ``lcconformer/data/demo/NOTICE`` names its authors and its
    licence (CC BY-SA 3.0).
    """
    return load_corpus(str(resources.files("lcconformer.data.demo") / "asterisk_en.zip"))


def read_audio(path: str | os.PathLike[str]) -> torch.Tensor:
    """Load a file of audio: float32 ``[S]`` at 16 kHz, full scale +-1, rounded to 16 bits.

    Raises:
        FileNotFoundError: there is no such file.
        BadAudioError: the file cannot be used; it is not mono or not 16 kHz, say.
        ImportError: soundfile is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no audio at {path}")
    _soundfile()
    files, skipped = _Folder(path.parent), _Skipped()
    try:
        with _open_audio(files, path.name) as header:
            samples = header.frames
        if samples < FRAME_SHIFT // 2:
            raise BadAudioError(f"has {samples} samples: less than a frame")
        utterance = Utterance(path.stem, "", "", "", samples, None, path.name)
        return Corpus(str(path), [utterance], files, skipped).audio(utterance)
    except BadAudioError as error:
        raise BadAudioError(f"{path} {error}") from error


def _from_meta(files: _Archive | _Folder, skipped: _Skipped) -> list[Utterance]:
    # only names listed by the container are ever opened, so an id such as "../x" finds no file
    names = sorted(name for name in files.names() if "/" not in name and Path(name).suffix.lower() in _SUFFIXES)
    audio = {Path(name).stem: name for name in names}
    found: dict[str, Utterance] = {}
    known: dict[tuple[str, int], tuple[str, int]] = {}
    # lines end at newlines alone: U+2028 and the like may be part of a text
    for number, line in enumerate(_lines(files, files.largest_meta(len(audio))), 1):
        where = f"meta.jsonl line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8", "replace"))
            keys = ("utt", "spk", "split", "text", "phones")
            utt, speaker, split, text, phones = (str(row.get(key) or "") for key in keys)
            samples = row.get("n")
        except (ValueError, AttributeError, RecursionError):
            skipped.add(where, "is no JSON object")
            continue
        if utt not in audio:
            skipped.add(where, f"no audio file for utterance {utt!r:.100}")
            continue
        if utt in found:
            skipped.add(audio[utt], f"utterance {utt} is there twice")
            continue
        if samples is None:
            samples = _read_length(files, audio[utt], skipped)
        elif type(samples) is not int or samples >= 2**40:
            skipped.add(audio[utt], f"{where} gives it {str(samples)[:20]} samples")
            samples = None
        if samples is None:
            continue
        alignment = _alignment(phones, audio[utt], known)
        found[utt] = Utterance(utt, speaker, split, text, samples, alignment, audio[utt])
    return list(found.values())


def _lines(files: _Archive | _Folder, most: int, name: str = "meta.jsonl") -> Iterator[bytes]:
    """Yield the lines of a file of at most ``most`` bytes; a longer line than any that we use comes in pieces."""
    with files.open(name, most) as file:
        while line := file.readline(_LARGEST_LINE):
            yield line


def _from_librispeech(files: _Folder, skipped: _Skipped) -> list[Utterance] | None:
    path = files.path
    transcripts = sorted(path.rglob("*.trans.txt"))
    if not transcripts:
        return None
    root = path.resolve()
    texts: dict[Path, str] = {}
    for transcript in transcripts:
        name = str(transcript.relative_to(path))
        try:
            for number, line in enumerate(_lines(files, _LARGEST_META[0], name)):
                utt, _, text = line.decode("utf-8-sig" if number == 0 else "utf-8", "replace").strip().partition(" ")
                if not utt:
                    continue
                file = transcript.parent / f"{utt}.flac"
                if Path(utt).name != utt or not _is_file(file):
                    skipped.add(f"{name}: {utt[:100]}", "no audio file for this transcript")
                else:
                    texts[file] = text
        except (BadAudioError, OSError) as error:
            skipped.add(name, f"no transcripts can be read from it ({error})")

    def read(file: Path) -> Utterance | None:
        source = str(file.relative_to(path))
        samples = _read_length(files, source, skipped)
        if samples is None:
            return None
        folders = (root / source).parents  # CHAPTER, SPEAKER, subset
        return Utterance(file.stem, folders[1].name, folders[2].name, texts[file], samples, None, source)

    with ThreadPoolExecutor(8) as pool:
        return [utterance for utterance in pool.map(read, texts) if utterance is not None]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _read_length(files: _Archive | _Folder, source: str, skipped: _Skipped) -> int | None:
    try:
        with _open_audio(files, source) as header:
            return header.frames
    except BadAudioError as error:
        skipped.add(source, str(error))
        return None


@contextmanager
def _open_audio(files: _Archive | _Folder, source: str) -> Iterator[Any]:
    """Open a ``soundfile.SoundFile`` and check that it is mono and 16 kHz; all failures inside become BadAudioError."""
    try:
        with files.open(source, _LARGEST_AUDIO) as raw, _soundfile().SoundFile(raw) as file:
            if file.channels != 1:
                raise BadAudioError(f"has {file.channels} channels: mix it down to one")
            if file.samplerate != SAMPLE_RATE:
                raise BadAudioError(f"is sampled at {file.samplerate} Hz: resample it to {SAMPLE_RATE} Hz")
            yield file
    except BadAudioError:
        raise
    except _UNREADABLE as error:
        raise BadAudioError(f"cannot be decoded ({error})") from error


def _alignment(
    phones: str, source: str, known: dict[tuple[str, int], tuple[str, int]]
) -> tuple[tuple[str, int], ...] | None:
    try:
        return parse_alignment(phones, known) or None
    except ValueError as error:
        warnings.warn(f"ignored the phone alignment of {source}: {error}", UserWarning, stacklevel=2)
        return None


def _refuse_empty(corpus: Corpus) -> None:
    if not len(corpus):
        reasons = "; ".join(f"{file}: {reason}" for file, reason in list(corpus.skipped.items())[:3])
        raise ValueError(f"{corpus.name} holds no usable utterance ({len(corpus.skipped)} skipped; {reasons})")


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError('reading speech needs soundfile: pip install "lcconformer[speech]"') from error
    return soundfile
