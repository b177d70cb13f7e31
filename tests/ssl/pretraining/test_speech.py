"""Who is held out, what is refused, and corpora that are joined."""

from pathlib import Path

import pytest
import torch

from lcconformer.data import load_corpus
from lcconformer.ssl.pretraining.speech import JoinedCorpus, hold_out_speakers, load_speech


def test_speakers_are_held_out(speech_folder: Path) -> None:
    path = str(speech_folder)
    train, validation = load_speech([path], splits=["train"], exclude_speakers=["a"], validation_speakers=["b"])
    assert (train.speakers, validation.speakers) == (("c", "d"), ("b",))
    assert train.splits == ("train",)
    train, validation = load_speech([path])
    assert len(validation.speakers) == 1
    assert not set(train.speakers) & set(validation.speakers)
    assert validation.speakers == hold_out_speakers([load_corpus(path)])
    train, validation = load_speech([path], validation_speakers=[])
    assert validation is None
    assert len(train) == 14
    train, validation = load_speech([path], exclude_speakers=["a", "b", "c"])
    assert (train.speakers, validation) == (("d",), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": ["dev"]}, "no split dev in .*; there are: test, train"),
        ({"exclude_speakers": ["x"]}, "no speaker x in .*; there are: a, b, c, d"),
        ({"exclude_speakers": ["a"], "validation_speakers": ["a"]}, "speaker a is both excluded and held out"),
        ({"exclude_speakers": ["a", "b"], "validation_speakers": ["c", "d"]}, "no speech is left to train on"),
    ],
)
def test_selections_refuse(change: dict, message: str, speech_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_speech([str(speech_folder)], **change)


def test_joined_corpora_keep_their_own_audio(speech_folder: Path) -> None:
    corpus = load_corpus(speech_folder)
    joined = JoinedCorpus([corpus.select(speakers=["a"]), corpus.select(speakers=["b"]), corpus.select(speakers=["a"])])
    ids = [u.id for u in joined]
    assert len(set(ids)) == len(ids) == 4 + 4 + 4
    assert ids[-1] == "2/u12"
    for utterance in joined:
        original = next(u for u in corpus if u.id == utterance.id.removeprefix("2/"))
        assert torch.equal(joined.audio(utterance), corpus.audio(original))
    with pytest.raises(TypeError, match="select from each, then join them"):
        joined.select(speakers=["a"])
    with pytest.raises(TypeError, match="preload each, then join them"):
        joined.preload()
