"""The probe command: what it writes and prints, and what it refuses."""

import json

import pytest
import torch

from lcconformer import quantize
from lcconformer.__main__ import main
from lcconformer.cli.options import names
from lcconformer.cli.probe import format_table, parse_depths
from lcconformer.ssl.evaluation.probes import accuracies, best_depth, smallest_depth

FEW = ["--epochs", "3", "--hidden", "16", "--max-frames", "2000"]


def test_command_writes_rows_times_rule_and_machine(tiny_checkpoint, speech, tmp_path, capsys, monkeypatch):
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
        validated = accuracies(rows, "checkpoint", probe, "validation")
        expected = {"best": best_depth(validated), "smallest": smallest_depth(validated)}
        assert result["chosen_depth"][probe] == expected
    assert result["chosen_depth"]["kind"] == "relative"
    assert sorted(result["train"]["speakers"] + result["validation"]["speakers"]) == ["s0", "s1"]
    assert result["test"]["speakers"] == ["s2"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["timing"]["audio_seconds"] > 0
    shown, progress = capsys.readouterr()
    assert "\r" not in progress  # into a pipe: lines, not frames of a bar
    assert progress.count("100% ") == 2
    assert "random-init" in shown
    assert f"{100 * accuracies(rows, 'checkpoint', 'hidden')[3]:.1f}" in shown

    again, given = tmp_path / "again.json", []
    monkeypatch.setattr("lcconformer.cli.probe.quantize", lambda encoder: given.append(encoder) or quantize(encoder))
    assert main([*command, *FEW, "--depths", "0,3", "--int8", "--device", "cpu", "--json", str(again)]) == 0
    all_rows = json.loads(again.read_text())["rows"]
    small = [r for r in all_rows if r["features"] == "int8"]
    assert [(r["depth"], r["seconds"] is not None) for r in small if r["probe"] == "linear"] == [(0, False), (3, True)]
    repeated = [r for r in all_rows if r["features"] != "int8"]
    states = [[r["accuracy"] for r in part if r["depth"] == 3] for part in (small, repeated)]
    assert states[0] == pytest.approx(states[1], abs=0.05)
    assert len(given) == 1
    assert {r["depth"] for r in repeated} == {None, 0, 3}
    for probe in ("linear", "hidden"):
        first = accuracies(rows, "checkpoint", probe)
        # batched with other depths or not, the same probe to rounding: at most a frame or two tips over
        for depth, value in accuracies(repeated, "checkpoint", probe).items():
            assert value == pytest.approx(first[depth], abs=5e-3)


def test_depths_and_names_are_parsed():
    assert parse_depths("all", 3) == [0, 1, 2, 3]
    assert parse_depths("3, 1,1", 3) == [1, 3]
    for bad in ("4", "1,x", "-1", "", "1,,2"):
        with pytest.raises(ValueError, match=r"--depths is .*; expected 'all' or depths from 0 to 3"):
            parse_depths(bad, 3)
    assert names("a, b,") == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "9"], "--depths is '9'"),
        (["--epochs", "0"], "epochs is 0; expected 1 or more"),
        (["--test-speakers", "nobody"], "has no speaker nobody"),
        (["--validation-speakers", "s2"], "has no speaker s2"),
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
