"""Probes of a model: which frames count, which speech is compared with which, and numbers that add up."""

import pytest
import torch

from lcconformer.data import IGNORE, frame_count, frame_labels, load_corpus
from lcconformer.ssl.evaluation.hidden_states import choose_utterances, collect_sequences
from lcconformer.ssl.evaluation.probes import (
    ProbeSettings,
    accuracies,
    best_depth,
    probe_model,
    smallest_depth,
    split_speech,
    split_validation,
)


def test_smallest_depth_is_relative_to_the_best_and_ignores_the_front_end():
    accuracy = {0: 0.9, 1: 0.50, 2: 0.594, 3: 0.60, 4: 0.599}
    assert smallest_depth(accuracy) == 2  # 0.594 is 99% of 0.6
    assert smallest_depth({**accuracy, 2: 0.5939}) == 3
    assert smallest_depth(accuracy, tolerance=0.2) == 1
    assert best_depth(accuracy) == 3
    assert best_depth({1: 0.5, 2: 0.5}) == 1
    with pytest.raises(ValueError, match=r"depths \[0\]; expected at least one from 1 on"):
        smallest_depth({0: 0.5})


def parts(path):
    """Training, validation and test speech."""
    corpus = load_corpus(path)
    train, validation = split_validation(corpus.select(splits=["train"]), ["s1"])
    return train, validation, corpus.select(splits=["test"])


def test_rows_cover_every_depth_and_probe_over_all_labelled_test_frames(tiny_model, speech):
    train, validation, test = parts(speech)
    progress = []
    settings = ProbeSettings(max_frames=2000, hidden=32, epochs=150)
    options = {"settings": settings, "name": "m", "log_mel": True, "progress": progress.append}
    rows = probe_model(tiny_model, train, validation, test, [0, 1, 3], **options)
    keys = [(r["features"], r["depth"], r["probe"]) for r in rows]
    models = [("m", k, p) for k in (0, 1, 3) for p in ("linear", "hidden")]
    assert keys == [("log-mel", None, "linear"), ("log-mel", None, "hidden"), *models]
    labelled = sum(int((frame_labels(u, frame_count(u.num_samples)) != IGNORE).sum()) for u in test)
    assert {r["frames"] for r in rows} == {labelled}
    # four tones, told apart by their spectrum; the majority class is about a quarter
    assert all(r["accuracy"] > 0.6 and r["validation"] > 0.6 for r in rows)
    assert list(accuracies(rows, "m", "linear")) == [0, 1, 3]
    assert accuracies(rows, "m", "linear", "validation")[1] == rows[4]["validation"]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_an_accuracy_is_what_counting_by_hand_gives(tiny_model, speech):
    from lcconformer.ssl.evaluation.classifiers import train_probes

    train, validation, test = parts(speech)
    settings = ProbeSettings(max_frames=300, hidden=8, epochs=2, context=1, seed=4)
    rows = probe_model(tiny_model, train, validation, test, [2], settings=settings, name="m", log_mel=True)
    chosen = collect_sequences(tiny_model, train, choose_utterances(train, max_frames=300, seed=4), [2])
    options = {"classes": 40, "hidden": 8, "epochs": 2, "seed": 4}
    probes = train_probes(chosen.hidden, chosen.labels, chosen.spans, context=1, whiten=True, **options)

    def frames(x):  # two frames of 10 ms under each output
        spans = (x.spans * 2 + torch.tensor([0, 1])).repeat_interleave(2, 0)
        return x.mel.flatten(0, 1)[None], x.labels.reshape(-1, 1), spans

    floor = train_probes(*frames(chosen), context=5, whiten=False, **options)
    for corpus, key in ((validation, "validation"), (test, "accuracy")):
        held = collect_sequences(tiny_model, corpus, choose_utterances(corpus), [2])
        known = held.labels != IGNORE
        by_hand = [
            float((logits[0].argmax(-1) == held.labels)[known].double().mean())
            for logits in probes.logits(held.hidden, held.spans)
        ]
        mel, labels, spans = frames(held)
        known = labels != IGNORE
        by_hand_floor = [
            float((logits[0].argmax(-1) == labels)[known].double().mean()) for logits in floor.logits(mel, spans)
        ]
        assert [row[key] for row in rows] == pytest.approx([*by_hand_floor, *by_hand])


def test_validation_speech_is_of_other_speakers_or_of_other_utterances(speech):
    corpus = load_corpus(speech)
    train, validation = split_validation(corpus)
    assert not set(train.speakers) & set(validation.speakers)
    assert len(train) + len(validation) == len(corpus)
    train, validation = split_validation(corpus, ["s0"])
    assert validation.speakers == ("s0",)
    assert "s0" not in train.speakers
    alone = corpus.select(speakers=["s2"])
    train, validation = split_validation(alone)
    assert len(validation) == 1
    assert len(train) == len(alone) - 1
    with pytest.raises(ValueError, match="one utterance to train on"):
        split_validation(alone.select(ids=[alone[0].id]))


def test_two_corpora_and_speakers(make_speech, speech):
    other = make_speech("other", 4, seed=9)
    train, test = split_speech(str(speech), str(other))
    assert (len(train), len(test)) == (12, 4)
    train, test = split_speech(str(speech), str(other), ["s0"], ["s1", "s2"])
    assert (train.speakers, test.speakers) == (("s0",), ("s1", "s2"))


def test_one_corpus_is_split_by_speaker_or_by_its_own_splits(speech):
    path = str(speech)
    for speakers, expected in (
        ((None, None), (("s0", "s1"), ("s2",))),
        ((None, ["s0"]), (("s1", "s2"), ("s0",))),
        ((["s1"], None), (("s1",), ("s0", "s2"))),
        ((["s1"], ["s0"]), (("s1",), ("s0",))),
    ):
        train, test = split_speech(path, f"{path}/.", *speakers)
        assert (train.speakers, test.speakers) == expected


def test_overlap_is_refused(make_speech, speech):
    with pytest.raises(ValueError, match=r"speaker s1 is in both --train-speakers and --test-speakers"):
        split_speech(str(speech), str(speech), ["s0", "s1"], ["s1"])
    plain = make_speech("plain", 4, splits=False)
    with pytest.raises(ValueError, match=r"no splits 'train' and 'test': name --test-speakers \(it has s0, s1, s2\)"):
        split_speech(str(plain), str(plain))
    copy = make_speech("plain", 6, splits=False)
    with pytest.raises(
        ValueError, match=r"4 utterances are in both training and test data \(plain00, plain01, plain02"
    ):
        split_speech(str(plain), str(copy))
