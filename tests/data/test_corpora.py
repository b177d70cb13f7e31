"""Every layout is read alike; whatever is wrong with a file is said, counted and survived."""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from lcconformer.data import BadAudioError, demo_corpus, load_corpus

from .conftest import RATE, tone, write_folder, write_meta, zip_folder


@pytest.fixture
def librispeech(tmp_path):
    for speaker, chapter, count in (("84", "121", 2), ("1272", "135", 1), ("84", "99", 1)):
        folder = tmp_path / "LibriSpeech" / "dev-clean" / speaker / chapter
        folder.mkdir(parents=True)
        lines = []
        for i in range(count):
            name = f"{speaker}-{chapter}-{i:04}"
            soundfile.write(folder / f"{name}.flac", tone(1 + i, seed=i), RATE)
            lines.append(f"{name} HELLO NUMBER {i}")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "LibriSpeech"


@pytest.mark.parametrize("below", ["", "dev-clean"])
def test_librispeech_tree(librispeech, below):
    corpus = load_corpus(librispeech / below)
    assert [u.id for u in corpus] == ["1272-135-0000", "84-121-0000", "84-121-0001", "84-99-0000"]
    assert corpus.speakers == ("1272", "84")
    assert {u.split for u in corpus} == {"dev-clean"}
    assert corpus[2].text == "HELLO NUMBER 1"
    assert corpus[2].num_samples == 32000
    assert corpus[2].phones is None
    torch.testing.assert_close(corpus.audio(corpus[2]), torch.from_numpy(tone(2, seed=1)), atol=2**-15, rtol=0)


@pytest.mark.parametrize("below", ["dev-clean/84", "dev-clean/84/121"])
def test_part_of_a_librispeech_tree(librispeech, below):
    corpus = load_corpus(librispeech / below)
    assert {(u.speaker, u.split) for u in corpus} == {("84", "dev-clean")}


def test_librispeech_file_missing(librispeech):
    (librispeech / "dev-clean/84/99/84-99-0000.flac").unlink()
    with pytest.warns(UserWarning, match="skipped audio file 1: .*84-99-0000: no audio file"):
        assert len(load_corpus(librispeech)) == 3


def test_librispeech_transcript_cannot_point_elsewhere(librispeech):
    transcript = librispeech / "dev-clean/84/99/84-99.trans.txt"
    transcript.write_text(transcript.read_text() + "../121/84-121-0000 STOLEN\n")
    with pytest.warns(UserWarning, match="skipped audio file 1: .*no audio file for this transcript"):
        corpus = load_corpus(librispeech)
    assert [u.text for u in corpus if u.id == "84-121-0000"] == ["HELLO NUMBER 0"]


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".mp3", ".opus"])
def test_folder_and_zip_are_the_same(tmp_path, suffix):
    if suffix == ".opus":
        folder = write_folder(tmp_path / "corpus", [0.5, 1.0], ".ogg")
        for file in folder.glob("*.ogg"):
            soundfile.write(file.with_suffix(".opus"), soundfile.read(file)[0], RATE, format="OGG", subtype="OPUS")
            file.unlink()
    else:
        folder = write_folder(tmp_path / "corpus", [0.5, 1.0], suffix)
    one, two = load_corpus(folder), load_corpus(zip_folder(folder))
    assert tuple(one) == tuple(two)
    assert one[1].phones == (("SIL", 25), ("AH1", 50), ("T", 12))
    for u in one:
        audio = one.audio(u)
        assert audio.dtype == torch.float32
        assert audio.shape == (u.num_samples,)
        assert torch.equal(audio, two.audio(u))
        assert torch.corrcoef(torch.stack((audio, torch.from_numpy(tone(*sound_of(u))))))[0, 1] > 0.9


def sound_of(u):
    number = int(u.id[1:])
    return u.seconds, 100 + 20 * number, number


def test_length_from_the_header_where_meta_has_none(folder):
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    want = [row.pop("n") for row in rows]
    write_meta(folder, rows)
    assert [u.num_samples for u in load_corpus(folder)] == want


def test_memory_and_file_give_the_same_audio(folder):
    corpus = load_corpus(folder)
    kept = corpus.preload()
    for file in folder.iterdir():
        file.unlink()
    reread = load_corpus(write_folder(folder, [u.seconds for u in corpus]))
    for file in folder.glob("*.flac"):
        file.unlink()
    with pytest.raises(BadAudioError):
        reread.audio(reread[0])
    assert [len(kept.audio(u)) for u in kept] == [u.num_samples for u in reread]
    assert torch.equal(kept.select(speakers=["s1"]).audio(kept[1]), kept.audio(kept[1]))


def test_survives_pickling_and_other_processes(folder):
    corpus = load_corpus(zip_folder(folder))
    copy = pickle.loads(pickle.dumps(corpus))
    assert torch.equal(copy.audio(copy[0]), corpus.audio(corpus[0]))
    loader = torch.utils.data.DataLoader(list(corpus), batch_size=None, num_workers=2, collate_fn=corpus.audio)
    for u, audio in zip(corpus, loader):
        assert torch.equal(audio, corpus.audio(u))


def test_select(folder):
    corpus = load_corpus(folder)
    assert [u.id for u in corpus.select(speakers=["s1", "s2"])] == ["u001", "u002", "u004", "u005"]
    assert [u.id for u in corpus.select(exclude_speakers=["s1"], splits=["train"])] == ["u000", "u003"]
    assert corpus.splits == ("test", "train")
    with pytest.raises(ValueError, match="has no speaker s7; it has: s0, s1, s2"):
        corpus.select(speakers=["s1", "s7"])
    with pytest.raises(ValueError, match="has no split dev; it has: test, train"):
        corpus.select(splits=["dev"])
    with pytest.raises(ValueError, match="is left by this selection"):
        corpus.select(speakers=["s2"], splits=["train"])
    assert [u.id for u in corpus.select(ids=["u004", "u001"])] == ["u001", "u004"]
    with pytest.raises(ValueError, match="has no utterance u777; it has: 6 others"):
        corpus.select(ids=["u001", "u777"])


def bad_file(path, kind):
    """Replaces the audio at ``path`` by something unusable of about the same length."""
    good = soundfile.read(path, dtype="float32")[0]
    if kind == "silent":
        soundfile.write(path, np.zeros_like(good), RATE)
    elif kind == "constant":
        soundfile.write(path, np.full_like(good, 0.25), RATE)
    elif kind == "stereo":
        soundfile.write(path, np.stack((good, good), 1), RATE)
    elif kind == "8 kHz":
        soundfile.write(path, good, 8000)
    elif kind == "short":
        soundfile.write(path, good[:-100], RATE)
    elif kind == "long":
        soundfile.write(path, np.concatenate((good, good)), RATE)
    elif kind == "no bytes":
        path.write_bytes(b"")
    elif kind == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:700])
    elif kind == "nan":
        good[50] = np.nan
        soundfile.write(path, good, RATE, format="WAV", subtype="FLOAT")
    elif kind == "gone":
        path.unlink()


BAD = {
    "silent": "is silent",
    "constant": "is silent",
    "stereo": "has 2 channels: mix it down",
    "8 kHz": "is sampled at 8000 Hz: resample it to 16000 Hz",
    "short": r"holds \d+ samples, 24000 expected",
    "long": "holds more than 24000 samples, 24000 expected",
    "no bytes": "cannot be decoded",
    "noise": "cannot be decoded",
    "cut": r"cannot be decoded|holds \d+ samples",
    "nan": "not finite",
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("zipped", [False, True])
def test_unusable_audio_is_named_counted_and_left_out(folder, kind, zipped):
    bad_file(folder / "u003.flac", kind)
    corpus = load_corpus(zip_folder(folder) if zipped else folder)
    with pytest.raises(BadAudioError, match=BAD[kind]):
        corpus.audio(corpus[3])
    with pytest.warns(UserWarning, match=f"skipped audio file 1: u003.flac: .*({BAD[kind]})"):
        kept = corpus.preload()
    assert [u.id for u in kept] == ["u000", "u001", "u002", "u004", "u005"]
    assert list(kept.skipped) == ["u003.flac"]
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        corpus.preload()


@pytest.mark.parametrize("kind", ["stereo", "8 kHz", "no bytes", "noise"])
def test_bad_headers_show_at_once_where_headers_are_read(librispeech, kind):
    bad_file(librispeech / "dev-clean/84/121/84-121-0001.flac", kind)
    with pytest.warns(UserWarning, match=f"84-121-0001.flac: .*({BAD[kind]})"):
        assert len(load_corpus(librispeech)) == 3


def test_too_short_too_long_and_empty(tmp_path):
    folder = write_folder(tmp_path / "c", [1.0, 0.15, 5.0, 2.0])
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    rows[3]["n"] = 0
    write_meta(folder, rows)
    with pytest.warns(UserWarning, match="skipped audio file") as caught:
        corpus = load_corpus(folder, max_seconds=4)
    assert [u.id for u in corpus] == ["u000"]
    assert [str(w.message) for w in caught] == [
        "skipped audio file 1: u001.flac: lasts 0.15 s, outside min_seconds=0.2 ... max_seconds=4",
        "skipped audio file 2: u002.flac: lasts 5.00 s, outside min_seconds=0.2 ... max_seconds=4",
        "skipped audio file 3: u003.flac: is empty",
    ]


BAD_ROWS = {
    "{": "is no JSON object",
    "[1, 2]": "is no JSON object",
    '{"utt": "../outside", "spk": "s", "n": 16000}': r"no audio file for utterance '../outside'",
    '{"utt": "/etc/passwd", "spk": "s", "n": 16000}': "no audio file",
    '{"utt": "inner/u000", "spk": "s", "n": 16000}': "no audio file",
    '{"utt": ["u000"], "spk": "s", "n": 16000}': "no audio file",
    '{"spk": "s", "n": 16000}': "no audio file",
    '{"utt": "u001", "spk": "s", "n": "many"}': "line 6 gives it many samples",
    '{"utt": "u001", "spk": "s", "n": 1e9}': "gives it 1000000000.0 samples",
    '{"utt": "u001", "spk": "s", "n": 99999999999999999999}': "gives it 99999999999999999999 samples",
    '{"utt": "u001", "spk": "s", "n": -5}': "is empty",
    '{"utt": "u000", "spk": "s", "n": 16000}': "utterance u000 is there twice",
}


@pytest.mark.parametrize("row", BAD_ROWS)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_rows_never_read_outside(folder, row, zipped):
    # the files that a trick would find
    soundfile.write(folder.parent / "outside.flac", tone(1.0), RATE)
    lines = [line for line in (folder / "meta.jsonl").read_text().splitlines() if '"u001"' not in line]
    write_meta(folder, [*lines, row])
    path = folder
    if zipped:
        path = zip_folder(folder)
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(folder.parent / "outside.flac", "../outside.flac")
            archive.write(folder.parent / "outside.flac", "inner/u000.flac")
    else:
        (folder / "inner").mkdir()
        soundfile.write(folder / "inner" / "u000.flac", tone(1.0), RATE)
    with pytest.warns(UserWarning, match=BAD_ROWS[row]):
        corpus = load_corpus(path)
    assert [u.id for u in corpus] == ["u000", "u002", "u003", "u004", "u005"]
    assert not [u for u in corpus if "/" in u.source]


def test_bad_alignment_costs_only_the_alignment(folder):
    text = (folder / "meta.jsonl").read_text().replace("SIL:25 AH1", "SIL:25 WHAT", 1)
    (folder / "meta.jsonl").write_text(text)
    with pytest.warns(UserWarning, match="ignored the phone alignment of u000.flac: unknown phone 'WHAT'"):
        corpus = load_corpus(folder)
    assert [u.phones is None for u in corpus] == [True, False, False, False, False, False]


def test_many_bad_files_are_counted_but_not_all_named(tmp_path):
    folder = write_folder(tmp_path / "c", [1.0] + [0.1] * 30)
    with pytest.warns(UserWarning, match="skipped audio file") as caught:
        corpus = load_corpus(folder)
    assert len(corpus.skipped) == 30
    assert len(caught) == 20
    assert "for further ones see Corpus.skipped" in str(caught[-1].message)


def test_what_is_no_corpus(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no corpus at .*nowhere: expected a LibriSpeech folder tree .*\.zip"):
        load_corpus(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    for name in ("empty", "text.zip", "other.zip"):
        with pytest.raises(ValueError, match=f"{name} is no corpus: expected a LibriSpeech"):
            load_corpus(tmp_path / name)
    write_meta(folder, ['{"utt": "gone", "n": 16000}'])
    with (
        pytest.warns(UserWarning, match="skipped audio file 1"),
        pytest.raises(ValueError, match=r"holds no usable utterance \(1 skipped; meta.jsonl line 1: no audio file"),
    ):
        load_corpus(folder)
    with pytest.raises(ValueError, match="min_seconds < max_seconds, got 3 and 2"):
        load_corpus(folder, min_seconds=3, max_seconds=2)


def test_damaged_zip(folder):
    path = zip_folder(folder)
    content = bytearray(path.read_bytes())
    content[content.rindex(b'"utt"') + 8] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"corpus.zip is damaged \(Bad CRC.*download it again"):
        load_corpus(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"corpus.zip is no corpus"):
        load_corpus(path)


def test_lines_end_at_newlines_alone(tmp_path):
    """A BOM, and separators that str.splitlines breaks at, belong to the text."""
    corpus = write_folder(tmp_path / "corpus", [1.0, 0.5])
    rows = [json.loads(line) for line in (corpus / "meta.jsonl").read_text().splitlines()]
    rows[0]["text"], rows[1]["text"] = "ONE\u2028TWO", "THREE\u0085FOUR"
    content = "\ufeff" + "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (corpus / "meta.jsonl").write_text(content, "utf-8")
    assert [u.text for u in load_corpus(corpus)] == ["ONE\u2028TWO", "THREE\u0085FOUR"]


def test_transcripts_that_cannot_be_read(librispeech):
    """A folder, a pipe, a dangling link and a name that no file can have cost only themselves."""
    chapter = librispeech / "dev-clean" / "84" / "121"
    (chapter / "folder.trans.txt").mkdir()
    os.mkfifo(chapter / "pipe.trans.txt")
    (chapter / "link.trans.txt").symlink_to("nowhere")
    with open(chapter / "84-121.trans.txt", "a") as file:
        file.write("x" * 300 + " TEXT\n" + "nul\0byte TEXT\n")
    with pytest.warns(UserWarning, match="skipped audio file"):
        corpus = load_corpus(librispeech)
    assert len(corpus) == 4
    assert sum("no transcripts can be read" in reason for reason in corpus.skipped.values()) == 3
    assert sum("no audio file" in reason for reason in corpus.skipped.values()) == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_members_are_left_out(tmp_path, method):
    source = write_folder(tmp_path / "corpus", [1.0, 0.5, 0.7], ".wav")
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(source.iterdir()):
            archive.write(file, file.name)
        where = archive.getinfo("u001.wav")
    content = bytearray(path.read_bytes())
    start = where.header_offset + 30 + len("u001.wav")
    content[start + where.compress_size // 4 : start + where.compress_size // 2] = b"\xff" * (
        where.compress_size // 2 - where.compress_size // 4
    )
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"u001\.wav"):
        corpus = load_corpus(path).preload()
    assert [u.id for u in corpus] == ["u000", "u002"]


def encrypted(path, name):
    """Set the flag of encryption of a member of a zip."""
    content = bytearray(path.read_bytes())
    for header, flags, title in ((b"PK\x03\x04", 6, 30), (b"PK\x01\x02", 8, 46)):
        at = content.find(header)
        while at >= 0:
            if content[at + title : at + title + len(name)] == name.encode():
                content[at + flags] |= 1
            at = content.find(header, at + 4)
    path.write_bytes(content)


def test_encrypted_members(folder):
    path = zip_folder(folder)
    encrypted(path, "u001.flac")
    with pytest.warns(UserWarning, match=r"u001\.flac: cannot be decoded .*encrypted"):
        assert len(load_corpus(path).preload()) == 5
    encrypted(path, "meta.jsonl")
    with pytest.raises(ValueError, match=r"is damaged .*encrypted"):
        load_corpus(path)


@pytest.mark.parametrize("member", ["meta.jsonl", "u000.wav"])
def test_a_bomb_does_not_go_off(tmp_path, member):
    """A zip of a megabyte that holds half a gigabyte takes less memory than a gigabyte."""
    path = tmp_path / "bomb.zip"
    row = {"utt": "u000", "spk": "s", "split": "train", "text": "", "n": 16000, "phones": ""}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("meta.jsonl", "u000.wav"):
            with archive.open(name, "w") as file:
                file.write((json.dumps(row) + "\n").encode() if name == "meta.jsonl" else b"RIFF")
                for _ in range(512 if name == member else 0):
                    file.write(b"x\n" * (1 << 19))
    assert path.stat().st_size < 4e6
    script = (
        "import resource, sys, warnings\n"
        "from lcconformer.data import load_corpus\n"
        "warnings.simplefilter('ignore')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    load_corpus(sys.argv[1]).preload()\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 'MB')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=250)
    said, memory = done.stdout.splitlines()
    assert "is larger than" in said, done.stderr
    assert float(memory.split()[0]) < 900


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_files_and_folders_are_read(tmp_path, kind):
    path = "/dev/zero" if kind == "device" else tmp_path / "pipe"
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ValueError, match="no corpus but a device or a pipe"):
        load_corpus(path)


def test_without_soundfile_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r'pip install "lcconformer\[speech\]"'):
        load_corpus(folder)


def test_demo_corpus():
    corpus = demo_corpus()
    assert not corpus.skipped
    assert corpus.splits == ("test", "train")
    assert len(corpus.speakers) == 1
    assert 0.35 < corpus.hours < 0.45
    aligned = [u for u in corpus if u.phones]
    assert len(aligned) > 0.9 * len(corpus)
    for u in aligned:
        # alignments cover their prompt but for a last piece of a frame
        assert 0 <= u.num_samples / 160 - sum(frames for _, frames in u.phones) < 2
    for u in corpus[::40]:
        assert corpus.audio(u).abs().max() > 0.05


@pytest.mark.parametrize(
    ("name", "count", "speakers", "aligned"), [("ls_dev20.zip", 1313, 20, 1312), ("so762_opus10k.zip", 5000, 250, 4983)]
)
def test_real_corpora(shared_data, name, count, speakers, aligned):
    corpus = load_corpus(shared_data / name)
    assert (len(corpus), len(corpus.speakers)) == (count, speakers)
    assert sum(u.phones is not None for u in corpus) == aligned
    for u in corpus[:: count // 20]:
        assert len(corpus.audio(u)) == u.num_samples
