"""The probe command: what is compared with what, what is refused, and numbers that add up."""

import json

import pytest
import torch

from lcconformer.__main__ import main
from lcconformer.cli.probe import format_table, parse_depths, parse_names, split_speech
from lcconformer.data import IGNORE, frame_count, frame_labels, load_corpus
from lcconformer.ssl.evaluation.hidden_states import choose_frames
from lcconformer.ssl.evaluation.probes import ProbeSettings, accuracies, probe_model, smallest_depth

FEW = ["--epochs", "3", "--hidden", "16", "--max-frames", "2000"]


def test_smallest_depth_is_relative_to_the_best_and_ignores_the_front_end():
    accuracy = {0: 0.9, 1: 0.50, 2: 0.594, 3: 0.60, 4: 0.599}
    assert smallest_depth(accuracy) == 2  # 0.594 is 99% of 0.6
    assert smallest_depth({**accuracy, 2: 0.5939}) == 3
    assert smallest_depth(accuracy, tolerance=0.2) == 1
    with pytest.raises(ValueError, match=r"depths \[0\]; expected at least one from 1 on"):
        smallest_depth({0: 0.5})


def test_rows_cover_every_depth_and_probe_over_all_labelled_test_frames(tiny_model, speech):
    corpus = load_corpus(speech)
    train, test = corpus.select(splits=["train"]), corpus.select(splits=["test"])
    progress = []
    settings = ProbeSettings(max_frames=2000, hidden=32, epochs=150)
    rows = probe_model(
        tiny_model, train, test, [0, 1, 3], settings=settings, name="m", log_mel=True, progress=progress.append
    )
    keys = [(r["features"], r["depth"], r["probe"]) for r in rows]
    models = [("m", k, p) for k in (0, 1, 3) for p in ("linear", "hidden")]
    assert keys == [("log-mel", None, "linear"), ("log-mel", None, "hidden"), *models]
    labelled = sum(int((frame_labels(u, frame_count(u.num_samples)) != IGNORE).sum()) for u in test)
    assert {r["frames"] for r in rows} == {labelled}
    # four tones, told apart by their spectrum; the majority class is about a quarter
    assert all(r["accuracy"] > 0.6 for r in rows)
    assert list(accuracies(rows, "m", "linear")) == [0, 1, 3]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_an_accuracy_is_what_counting_by_hand_gives(tiny_model, speech):
    from lcconformer.ssl.evaluation.classifiers import train_probes
    from lcconformer.ssl.evaluation.hidden_states import collect_states

    corpus = load_corpus(speech)
    train, test = corpus.select(splits=["train"]), corpus.select(splits=["test"])
    settings = ProbeSettings(max_frames=500, hidden=8, epochs=2, seed=4)
    rows = probe_model(tiny_model, train, test, [2], settings=settings, name="m")
    chosen = choose_frames(train, max_frames=500, seed=4, labelled=True)
    states = collect_states(tiny_model, train, chosen, [2])
    probes = train_probes(states.hidden, states.labels, classes=40, hidden=8, epochs=2, seed=4)
    held = collect_states(tiny_model, test, choose_frames(test, labelled=True), [2])
    for row, logits in zip(rows, probes.logits(held.hidden)):
        assert row["accuracy"] == pytest.approx(float((logits[0].argmax(-1) == held.labels).double().mean()))


def test_command_writes_rows_times_rule_and_machine(tiny_checkpoint, speech, tmp_path, capsys):
    out = tmp_path / "new" / "rows.json"
    command = ["probe", "--checkpoint", str(tiny_checkpoint), "--train-data", str(speech), "--test-data", str(speech)]
    assert main([*command, *FEW, "--random-init", "--device", "cpu", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert len(rows) == 2 + 2 * 2 * 4
    assert {r["features"] for r in rows} == {"log-mel", "checkpoint", "random-init"}
    for row in rows:
        timed = row["features"] == "checkpoint" and row["depth"] > 0
        assert (row["seconds"] is not None) == timed
    for probe in ("linear", "hidden"):
        assert result["smallest_depth"][probe] == smallest_depth(accuracies(rows, "checkpoint", probe))
    assert result["smallest_depth"]["kind"] == "relative"
    assert result["train"]["speakers"] == ["s0", "s1"]
    assert result["test"]["speakers"] == ["s2"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["timing"]["audio_seconds"] > 0
    shown, progress = capsys.readouterr()
    assert "\r" not in progress  # into a pipe: lines, not frames of a bar
    assert progress.count("100% ") == 2
    assert "random-init" in shown
    assert f"{100 * accuracies(rows, 'checkpoint', 'hidden')[3]:.1f}" in shown

    again = tmp_path / "again.json"
    assert main([*command, *FEW, "--depths", "0,3", "--device", "cpu", "--json", str(again)]) == 0
    repeated = json.loads(again.read_text())["rows"]
    assert {r["depth"] for r in repeated} == {None, 0, 3}
    for probe in ("linear", "hidden"):
        first = accuracies(rows, "checkpoint", probe)
        # batched with other depths or not, the same probe to rounding: at most a frame or two tips over
        for depth, value in accuracies(repeated, "checkpoint", probe).items():
            assert value == pytest.approx(first[depth], abs=5e-3)


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


def test_depths_and_names_are_parsed():
    assert parse_depths("all", 3) == [0, 1, 2, 3]
    assert parse_depths("3, 1,1", 3) == [1, 3]
    for bad in ("4", "1,x", "-1", "", "1,,2"):
        with pytest.raises(ValueError, match=r"--depths is .*; expected 'all' or depths from 0 to 3"):
            parse_depths(bad, 3)
    assert parse_names("a, b,") == ["a", "b"]
    assert parse_names(None) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "9"], "--depths is '9'"),
        (["--epochs", "0"], "epochs is 0; expected 1 or more"),
        (["--test-speakers", "nobody"], "has no speaker nobody"),
        (["--checkpoint", "missing.safetensors"], "no checkpoint at missing.safetensors"),
        (["--train-data", "missing"], "no corpus at missing"),
    ],
)
def test_command_says_what_is_wrong(tiny_checkpoint, speech, capsys, arguments, message):
    command = ["probe", "--checkpoint", str(tiny_checkpoint), "--train-data", str(speech), "--test-data", str(speech)]
    assert main([*command, "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "message"), [("tpu9", "'tpu9' is no device"), ("cuda:99", "'cuda:99' is not there")]
)
def test_a_device_that_is_not_there_is_refused(device, message, capsys):
    with pytest.raises(SystemExit):
        main(["probe", "--checkpoint", "c", "--train-data", "d", "--test-data", "d", "--device", device])
    assert message in capsys.readouterr().err


def test_speech_without_alignments_is_refused(tiny_checkpoint, make_speech, capsys):
    bare = str(make_speech("bare", 6, aligned=False))
    command = ["probe", "--checkpoint", str(tiny_checkpoint), "--train-data", bare, "--test-data", bare]
    assert main([*command, "--device", "cpu"]) == 2
    assert "no utterance has a phone alignment" in capsys.readouterr().err


def test_table_is_aligned():
    rows = [
        {"features": f, "depth": d, "probe": p, "accuracy": 0.5, "frames": 1234, "seconds": 0.1 if d else None}
        for f, d in (("log-mel", None), ("checkpoint", 0), ("checkpoint", 1))
        for p in ("linear", "hidden")
    ]
    table = format_table(rows, ["checkpoint"], audio_seconds=20.0).splitlines()
    assert "1,234 test frames" in table[0]
    assert table[3].split() == ["log-mel", "50.0", "50.0"]
    assert table[5].split() == ["1", "50.0", "50.0", "5.00"]
    assert table[3].index("50.0") == table[4].index("50.0") == table[5].index("50.0")
