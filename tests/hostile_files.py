"""Read files of up to 100 MB that were made to fill the memory: one line each, ``NAME PEAK_MB OUTCOME``.

    python tests/hostile_files.py FOLDER [NAME ...]

The peak is that of the whole process so far, so the first line above a limit names what took the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from lcconformer.bench.core.rows import Results
from lcconformer.bench.reports.evidence import read_report
from lcconformer.kernels import tuning

from lcconformer.data import load_corpus
from lcconformer.data.corpora import read_audio
from lcconformer.runtime import read_json
from lcconformer.ssl import load_checkpoint, load_model
from lcconformer.ssl.finetuning import load_recogniser
from lcconformer.ssl.pretraining.lock import lock_folder
from lcconformer.ssl.pretraining.logs import CsvLog

SIZE = 40_000_000  # Python makes of it more than a gigabyte
Make = Callable[[Path], object]
CASES: dict[str, tuple[Make, Callable[[Path], object]]] = {}
"""What makes the files in a folder, and what reads them: the folder, or its file x.* if it has one."""


def case(read: Callable[[Path], object]) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES[make.__name__] = make, read
        return make

    return add


def filled(path: Path, unit: bytes, size: int = SIZE, start: bytes = b"", end: bytes = b"") -> Path:
    path.write_bytes(start + unit * ((size - len(start) - len(end)) // len(unit)) + end)
    return path


def tensor_file(path: Path, header: bytes, body: bytes = b"", claims: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if claims is None else claims) + header + body)
    return path


def entries(count: int) -> bytes:
    """A header of ``count`` tensors of one number."""
    each = (f'"{i}":{{"dtype":"F32","shape":[],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(count))
    return ("{" + ",".join(each) + "}").encode()


def read_log(path: Path) -> None:
    CsvLog(path, ["step", "loss"], 1).close()


def read_owner(folder: Path) -> None:
    with lock_folder(folder):
        pass


# --- checkpoints ------------------------------------------------------------------------------------------------------


@case(load_model)
def checkpoint_that_is_nearly_all_header(folder: Path) -> object:
    count = SIZE // 65
    return tensor_file(folder / "x.safetensors", entries(count), bytes(4 * count))


@case(load_checkpoint)
def checkpoint_with_the_largest_header(folder: Path) -> object:
    count = (1 << 23) // 70
    return tensor_file(folder / "x.safetensors", entries(count), bytes(4 * count))


@case(load_checkpoint)
def checkpoint_with_the_largest_settings(folder: Path) -> object:
    settings = json.dumps('{"format": 1, "x": [' + "[]," * 2_790_000 + "0]}")
    header = f'{{"__metadata__":{{"lcconformer":{settings}}}}}'
    return tensor_file(folder / "x.safetensors", header.encode())


@case(load_recogniser)
def checkpoint_that_claims_a_header_of_a_terabyte(folder: Path) -> object:
    return tensor_file(folder / "x.safetensors", b"{}", claims=1 << 40)


@case(load_model)
def checkpoint_that_claims_a_tensor_of_a_terabyte(folder: Path) -> object:
    header = b'{"model.x":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}'
    return tensor_file(folder / "x.safetensors", header)


@case(load_model)
def checkpoint_of_numbers_that_are_not_read(folder: Path) -> object:
    header = b'{"model.x":{"dtype":"F8_E4M3","shape":[80000000],"data_offsets":[0,80000000]}}'
    return tensor_file(folder / "x.safetensors", header, bytes(80_000_000))


# --- results, logs, tuned configurations --------------------------------------------------------------------------------


@case(Results)
def benchmark_results(folder: Path) -> object:
    return filled(folder / "x.json", b"[],", start=b'{"rows": [', end=b"0]}")


@case(Results)
def benchmark_results_of_the_largest_size(folder: Path) -> object:
    return filled(folder / "x.json", b"{},", (1 << 23) - 8, start=b'{"rows": [', end=b"0]}")


@case(read_json)
def json_of_the_largest_size(folder: Path) -> object:
    names = b",".join(b'"%x":{}' % i for i in range(1 << 19))
    return filled(folder / "x.json", names + b",", (1 << 23) - 8, start=b"{", end=b'"":0}')


@case(read_report)
def test_report(folder: Path) -> object:
    return filled(folder / "x.xml", b"<a/>", start=b"<a>", end=b"</a>")


@case(read_report)
def test_report_of_the_largest_size(folder: Path) -> object:
    return filled(folder / "x.xml", b"<a/>", (1 << 23) - 8, start=b"<a>", end=b"</a>")


@case(tuning.read)
def tuned_configurations(folder: Path) -> object:
    return filled(folder / "x.json", b'"":{},', start=b'{"configs": {', end=b'"":{}}}')


@case(read_log)
def log_of_steps(folder: Path) -> object:
    return filled(folder / "x.csv", b"1,2\r\n", 2_000_000, start=b"step,loss\r\n")


@case(read_log)
def log_of_one_line(folder: Path) -> object:
    return filled(folder / "x.csv", "\U0001f600,".encode(), start=b"step,loss\r\n")


@case(read_owner)
def owner_of_a_run(folder: Path) -> object:
    return filled(folder / "run.json", b"[],", start=b"[", end=b"0]")


# --- corpora --------------------------------------------------------------------------------------------------------------


def meta_line(i: int, **more: object) -> bytes:
    return json.dumps({"utt": f"u{i}", "n": 16000, **more}).encode() + b"\n"


@case(load_corpus)
def corpus_of_one_utterance_many_times(folder: Path) -> object:
    (folder / "u0.wav").touch()
    filled(folder / "meta.jsonl", meta_line(0), 4_000_000)
    return folder


@case(load_corpus)
def corpus_of_a_text(folder: Path) -> object:
    (folder / "u0.wav").touch()
    filled(folder / "meta.jsonl", b"x")
    return folder


@case(load_corpus)
def corpus_of_phones(folder: Path) -> object:
    numbers = iter(range(1000, 100_000_000))
    with open(folder / "meta.jsonl", "wb") as file:
        for i in range(60):
            (folder / f"u{i}.wav").touch()
            file.write(meta_line(i, phones=" ".join(f"K:{next(numbers)}" for _ in range(40_000))))
    return folder


@case(load_corpus)
def corpus_of_a_transcript(folder: Path) -> object:
    chapter = folder / "1" / "2"
    chapter.mkdir(parents=True)
    filled(chapter / "1-2.trans.txt", "\U0001f600".encode() * 50)
    return folder


def archive(path: Path, method: int, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name.replace("_", "."), content)
    return path


def listing(path: Path, count: int, name: bytes = b"a.wav") -> Path:
    """A zip with ``count`` entries in its list of files, all of one member."""
    content = archive(path, zipfile.ZIP_STORED, a_wav=b"").read_bytes()
    start = content.index(b"PK\x01\x02")
    one = content[start : content.index(b"PK\x05\x06")]
    size = len(one) * count
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count & 0xFFFF, count & 0xFFFF, size, start, 0)
    path.write_bytes(content[:start] + one * count + end)
    return path


@case(load_corpus)
def zip_of_a_long_list(folder: Path) -> object:
    return listing(folder / "x.zip", SIZE // 51)


@case(load_corpus)
def zip_of_the_longest_list(folder: Path) -> object:
    return listing(folder / "x.zip", (1 << 24) // 51 - 1)


@case(load_corpus)
def zip_of_a_bomb(folder: Path) -> object:
    return archive(folder / "x.zip", zipfile.ZIP_DEFLATED, meta_jsonl=bytes(1 << 27), u0_wav=b"")


@case(load_corpus)
def zip_of_an_audio_bomb(folder: Path) -> object:
    """Packed by bzip2, which may become 20,000 times as much."""
    return archive(folder / "x.zip", zipfile.ZIP_BZIP2, meta_jsonl=b'{"utt": "u0"}', u0_wav=bytes(1 << 27))


@case(load_corpus)
def zip_whose_meta_is_far_larger(folder: Path) -> object:
    """A long list of files allows a long meta.jsonl, but not one of gigabytes."""
    path = folder / "x.zip"
    pieces, packer = [], zlib.compressobj(1, zlib.DEFLATED, -15)
    unpacked = 0
    for i in range(8_000):
        line = meta_line(i, text="x" * 16_000)
        unpacked += len(line)
        pieces.append(packer.compress(line))
    packed = b"".join([*pieces, packer.flush()])
    with zipfile.ZipFile(path, "w") as file:
        for i in range(8_000):
            file.writestr(f"u{i}.wav", b"")
        file.writestr("meta.jsonl", b"")
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    # the member again, with the content that zipfile would have had to hold
    head = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(packed), unpacked, 10, 0) + b"meta.jsonl"
    listed = content[start : content.rindex(b"PK\x05\x06")]
    at = listed.rindex(b"PK\x01\x02")
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, 0, len(packed), unpacked, 10, 0, 0, 0, 0, 0, start
    )
    listed = listed[:at] + entry + b"meta.jsonl"
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 8_001, 8_001, len(listed), start + len(head) + len(packed), 0)
    path.write_bytes(content[:start] + head + packed + listed + end)
    return path


@case(read_audio)
def audio_of_hours(folder: Path) -> object:
    """Silence takes next to nothing in a .flac."""
    path = folder / "x.flac"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for _ in range(70):
            file.write(np.zeros(1 << 20, np.int16))
    return path


@case(read_audio)
def audio_of_the_greatest_length(folder: Path) -> object:
    path = folder / "x.flac"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for _ in range(64):
            file.write(np.arange(1 << 20).astype(np.int16) // 8)
    return path


def peak_mb() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are made")
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all if none is named")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("start", peak_mb(), "-", flush=True)
    for name in args.names or CASES:
        folder = args.folder / name
        folder.mkdir(parents=True)
        make, read = CASES[name]
        # in a process of its own, whose memory does not count
        child = os.fork()
        if child == 0:
            make(folder)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise RuntimeError(f"{name}: the files could not be made")
        try:
            read(next(folder.glob("x.*"), folder))
            outcome = "read"
        except (ValueError, OSError) as error:
            outcome = f"refused: {error}"
        print(name, peak_mb(), outcome[:150].replace("\n", " "), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
