"""Speech recognition: learning, resuming, freezing, scoring at every depth, the commands, and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lcconformer import ConformerConfig, ExitRule
from lcconformer.__main__ import main
from lcconformer.data import Utterance, load_corpus
from lcconformer.ssl import FeatureSettings, load_checkpoint, load_model
from lcconformer.ssl.finetuning import (
    AugmentSettings,
    BeamSearch,
    FinetuneSettings,
    Recogniser,
    TaskSettings,
    best_depth,
    calibrate_exit,
    error_rates,
    evaluate,
    exit_depths,
    finetune,
    load_recogniser,
    read_corpus,
)
from lcconformer.ssl.finetuning.augment import draw_hidden
from lcconformer.ssl.finetuning.evaluation import Reading
from lcconformer.ssl.finetuning.model import Logits
from lcconformer.ssl.finetuning.units import alphabet_of, greedy, normalise_text, phone_classes

pytest.importorskip("jiwer", reason="pip install 'lcconformer[speech]'")

CONFIG = ConformerConfig(
    d_model=32,
    num_heads=2,
    ffn_dim=64,
    num_layers=3,
    conv_kernel_size=7,
    dropout=0.0,
    input_dim=24,
    subsampling="stack",
    subsampling_factor=4,
)
FEATURES = FeatureSettings(24)
NOTHING = AugmentSettings(0, 0, 0, 0)
LETTER = {"SIL": " ", "AA": "A", "IY": "E", "S": "S"}


@pytest.fixture(scope="module")
def tones(make_speech) -> Path:
    """Twelve aligned utterances of tones, with a transcript that has a letter for each phone."""
    folder = make_speech("spelled", 12)
    rows = [json.loads(line) for line in (folder / "meta.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = "".join(LETTER[item.partition(":")[0]] for item in row["phones"].split())
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def corpus(tones: Path):
    return load_corpus(tones).preload()


def settings(**changes) -> FinetuneSettings:
    values = {"steps": 8, "batch_seconds": 5.0, "device": "cpu", "learning_rate": 5e-3, "augment": NOTHING}
    return FinetuneSettings(CONFIG, FEATURES, **values | changes)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("overfit") / "run"
    return finetune(settings(steps=300), corpus, corpus, out=out, progress=False)


def test_a_few_utterances_are_learnt_at_every_depth_from_the_middle_on(trained, corpus) -> None:
    rows = evaluate(trained.model, corpus)
    assert [row["depth"] for row in rows] == [1, 2, 3]
    for row in rows[1:]:
        assert row["per"] < 0.1
        assert row["frame_accuracy"] > 0.85
        assert row["cer"] < 0.3
    assert trained.stopped == "steps"
    assert trained.validation[-1][0] == 300
    again = load_recogniser(trained.checkpoint.parent)
    assert evaluate(again, corpus) == rows
    with pytest.raises(ValueError, match="checkpoint of 'finetune', whose model recognises speech"):
        load_model(trained.checkpoint)


def test_transcribe_spells_what_the_evaluation_scores(trained, corpus) -> None:
    readings = read_corpus(trained.model, corpus)
    utterance, reading = corpus[3], readings[3]
    audio = corpus.audio(utterance)[None]
    for depth in (1, 3):
        for units in ("phones", "characters"):
            assert trained.model.transcribe(audio, units=units, depth=depth) == (
                [reading.texts[units][depth - 1]],
                [depth],
            )
    assert trained.model.transcribe(audio)[0] == [reading.texts["characters"][2]]
    # the exit rule stops where the evaluation says, at this and at other utterances
    threshold = float(np.median([r.changes[1] for r in readings]))
    rule = ExitRule("change", threshold=threshold)
    depths = exit_depths(readings, rule)
    assert len({*depths}) > 1
    for utterance, depth in zip(corpus, depths):
        assert trained.model.transcribe(corpus.audio(utterance)[None], rule=rule)[1] == [depth]
    # and so it does by entropy
    rule = ExitRule("entropy", threshold=float(np.median([r.entropies[1] for r in readings])), min_depth=2)
    depths = exit_depths(readings, rule)
    assert {*depths} == {2, 3}
    for utterance, depth in zip(corpus, depths):
        assert trained.model.transcribe(corpus.audio(utterance)[None], rule=rule)[1] == [depth]
    with pytest.raises(ValueError, match="both given"):
        trained.model.transcribe(audio, depth=1, rule=rule)
    with pytest.raises(ValueError, match="cannot spell words: it was trained to spell phones, characters"):
        trained.model.transcribe(audio, units="words")


@pytest.mark.parametrize(
    "more", [{}, {"depth": "sandwich", "augment": AugmentSettings()}, {"freeze_front_end": 3}, {"optimizer": "muon"}]
)
def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path: Path, more) -> None:
    whole = finetune(settings(**more), corpus, corpus, out=tmp_path / "whole", progress=False)
    wanted = settings(**more, checkpoint_every=5, keep=3)

    def stop(record) -> None:
        if record.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(wanted, corpus, corpus, out=tmp_path / "parts", progress=False, on_step=stop)
    rest = finetune(wanted, corpus, corpus, out=tmp_path / "parts", progress=False, resume=True)
    assert [r.step for r in rest.history] == [6, 7, 8]
    assert [r.loss for r in rest.history] == [r.loss for r in whole.history[5:]]
    assert rest.validation == whole.validation
    one, other = load_checkpoint(whole.checkpoint), load_checkpoint(rest.checkpoint)
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[k], other.tensors[k]) for k in one.tensors)
    with pytest.raises(ValueError, match=r"cannot resume .* with other settings: seed was 0, now 1"):
        finetune(dataclasses.replace(wanted, seed=1), corpus, out=tmp_path / "parts", progress=False, resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(wanted, corpus, out=tmp_path / "parts", progress=False)


def test_layer_drop_trains_the_layers_that_it_keeps(corpus, tmp_path: Path) -> None:
    run = FinetuneSettings(
        CONFIG.replace(sharing="none"),
        FEATURES,
        steps=1,
        batch_seconds=5.0,
        device="cpu",
        augment=NOTHING,
        depth="layer_drop",
        seed=4,
    )
    kept = run.sampler().layers(0)
    assert kept is not None
    assert len(kept) < CONFIG.num_layers
    result = finetune(run, corpus, out=tmp_path / "run", progress=False)
    torch.manual_seed(run.seed)
    fresh = run.build_model(alphabet_of(corpus))
    for k, (before, after) in enumerate(zip(fresh.encoder.layers, result.model.encoder.layers)):
        moved = any(not torch.equal(one, other) for one, other in zip(before.parameters(), after.parameters()))
        assert moved == (k in kept)
    assert result.history[0].depths == (len(kept),)
    with pytest.raises(ValueError, match="takes sharing='none'"):
        finetune(settings(depth="layer_drop"), corpus, out=tmp_path / "shared", progress=False)


@pytest.fixture
def pretrained():
    from lcconformer.ssl import ObjectiveSettings, PretrainingModel

    return PretrainingModel(CONFIG, FEATURES, ObjectiveSettings())


def test_a_frozen_encoder_keeps_the_pretrained_weights(pretrained, corpus, tmp_path: Path) -> None:
    run = settings(steps=3, freeze_encoder=True)
    result = finetune(run, corpus, out=tmp_path / "run", start=pretrained, progress=False)
    for name, x in pretrained.encoder.state_dict().items():
        assert torch.equal(result.model.encoder.state_dict()[name], x), name
    torch.manual_seed(run.seed)
    fresh = run.build_model(alphabet_of(corpus))
    assert not torch.equal(result.model.heads["phones"].weight, fresh.heads["phones"].weight)
    other = dataclasses.replace(run, config=CONFIG.replace(ffn_dim=32))
    with pytest.raises(ValueError, match="another encoder or other features"):
        finetune(other, corpus, out=tmp_path / "other", start=pretrained, progress=False)


@pytest.mark.parametrize(("steps", "kept"), [(2, True), (3, False)])
def test_a_front_end_is_frozen_for_its_steps(pretrained, corpus, tmp_path: Path, steps: int, kept: bool) -> None:
    run = settings(steps=steps, freeze_front_end=2)
    result = finetune(run, corpus, out=tmp_path / "run", start=pretrained, progress=False)
    before, after = pretrained.encoder.state_dict(), result.model.encoder.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(not name.startswith("front_end") for name in changed)
    assert any(name.startswith("front_end") for name in changed) != kept


def test_utterances_without_a_target_do_not_count() -> None:
    torch.manual_seed(0)
    model = Recogniser(CONFIG, FEATURES, TaskSettings(), "AB").eval()
    from lcconformer.ssl.finetuning.units import Targets

    audio, lengths = 0.1 * torch.randn(2, 16_000), torch.tensor([16_000, 12_000])
    frames = torch.full((2, 100), -100)
    frames[0] = 3
    some = Targets(
        frames, torch.tensor([[5, 7], [0, 0]]), torch.tensor([2, 0]), torch.tensor([[1], [0]]), torch.tensor([1, 0])
    )
    alone = Targets(*(getattr(some, f.name)[:1] for f in dataclasses.fields(Targets)))
    both, one = model(audio, lengths, some, (3, 1)), model(audio[:1], lengths[:1], alone, (3, 1))
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-4)
    none = Targets(torch.full((2, 100), -100), *(torch.zeros(s, dtype=torch.int64) for s in ((2, 0), 2, (2, 0), 2)))
    assert model(audio, lengths, none, (1,)).tolist() == [0.0]


def test_spec_augment_hides_bands_and_spans_by_utterance_and_step() -> None:
    drawn = AugmentSettings(2, 5, 2, 30)
    hidden = draw_hidden(drawn, ["a", "b"], [100, 60], 24, seed=0, step=1)
    assert hidden.shape == (2, 100, 24)
    assert torch.equal(hidden[1, :60], draw_hidden(drawn, ["b"], [60], 24, seed=0, step=1)[0])
    assert not torch.equal(hidden, draw_hidden(drawn, ["a", "b"], [100, 60], 24, seed=0, step=2))
    for step in range(30):
        hidden = draw_hidden(drawn, ["a"], [100], 24, seed=0, step=step)[0]
        bands, spans = hidden.all(0), hidden.all(1)
        assert torch.equal(hidden, bands[None] | spans[:, None])
        assert bands.sum() <= 10
        assert spans.sum() <= 40  # a fifth of the utterance, twice
    assert not draw_hidden(NOTHING, ["a"], [100], 24, seed=0, step=0).any()


def test_texts_phones_and_best_paths() -> None:
    assert normalise_text(" It's  five-o'clock, né?") == "IT'S FIVE O'CLOCK NÉ"
    utterance = Utterance(
        "u", "s", "", "b a", 16_000, (("SIL", 3), ("AA1", 4), ("AA0", 4), ("+NSN+", 2), ("S", 3)), "u.wav"
    )
    assert alphabet_of([utterance]) == " AB"
    assert phone_classes(utterance) == [1, 1, 29]
    path = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 0, 1, 2, 2, 0]), 4).float()
    assert greedy(path) == [1, 1, 2]


def test_entropy_by_hand() -> None:
    model = Recogniser(CONFIG, FEATURES, TaskSettings(), "ABC")
    even, sure = torch.zeros(40), 99.0 * torch.nn.functional.one_hot(torch.tensor(3), 40)
    logits = torch.stack([torch.stack([even, even, sure]), torch.stack([sure, even, even])])
    # of phones, and without padding
    found = model.entropy(Logits(None, {"phones": logits, "characters": torch.zeros(2, 3, 4)}, torch.tensor([3, 1])))
    assert found.tolist() == pytest.approx([2 / 3 * math.log(40), 0.0], abs=1e-6)
    letters = Recogniser(CONFIG, FEATURES, TaskSettings(phones=0.0), "ABC")
    found = letters.entropy(Logits(None, {"characters": torch.zeros(2, 3, 4)}, torch.tensor([3, 1])))
    assert found.tolist() == pytest.approx([math.log(4)] * 2)
    with pytest.raises(ValueError, match="no CTC output whose entropy"):
        Recogniser(CONFIG, FEATURES, TaskSettings(1.0, 0.0, 0.0), "").entropy(Logits(None, {}, torch.tensor([3])))


def reading(
    texts: tuple[str, ...], changes: tuple[float, ...], said: str = "AA S IY B", entropies: tuple[float, ...] = ()
) -> Reading:
    return Reading("u", {"phones": texts}, {"phones": said, "characters": ""}, (1, 2, 3), 4, changes, entropies)


def test_rates_depth_and_exit_rule() -> None:
    # the first is right from depth 1 on and changes little; the second needs all three
    readings = [
        reading(("AA S IY B",) * 3, (9.0, 0.01, 0.01)),
        reading(("AA", "AA S", "AA S IY B"), (9.0, 0.5, 0.4)),
    ]
    assert error_rates(readings, 1) == {
        "mean_depth": 1.0,
        "utterances": 2,
        "frame_accuracy": 0.25,
        "frames": 8,
        "per": 3 / 8,
        "phones": 8,
    }
    assert error_rates(readings, [1, 3])["per"] == 0.0
    rows = [{"depth": k, **error_rates(readings, k)} for k in (1, 2, 3)]
    assert best_depth(rows) == 3
    assert best_depth([{"depth": 2, "cer": 0.5}, {"depth": 1, "cer": 0.5}]) == 1
    rule = calibrate_exit(readings, 3)
    assert rule.kind == "change"
    assert exit_depths(readings, rule) == [2, 3]
    # the entropy says so too, a loop earlier
    unsure = [
        reading(("AA S IY B",) * 3, (9.0, 0.5, 0.5), entropies=(0.1, 0.1, 0.1)),
        reading(("AA", "AA S", "AA S IY B"), (9.0, 0.01, 0.01), entropies=(2.0, 1.0, 0.1)),
    ]
    rule = calibrate_exit(unsure, 3, "entropy")
    assert rule.kind == "entropy"
    assert exit_depths(unsure, rule) == [1, 3]
    assert calibrate_exit(readings, 3, "entropy") == ExitRule("fixed", depth=3)  # nothing was measured
    # where early exits only cost, there is none
    assert calibrate_exit([readings[1]], 3) == ExitRule("fixed", depth=3)
    with pytest.raises(ValueError, match="nothing to score"):
        best_depth([{"depth": 1}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0; expected an integer from 1"),
        ({"freeze_front_end": -1}, "freeze_front_end is -1"),
        ({"freeze_encoder": 1}, "freeze_encoder is 1; expected True or False"),
        ({"precision": "float16"}, "precision is 'float16'; expected one of float32, bfloat16"),
        ({"depth": "deep"}, "kind is 'deep'"),
        ({"min_depth": 4}, "low is 4"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_bad_settings(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_bad_tasks_and_models() -> None:
    with pytest.raises(ValueError, match="all 0"):
        TaskSettings(0, 0, 0)
    with pytest.raises(ValueError, match="phones is -1"):
        TaskSettings(phones=-1)
    with pytest.raises(ValueError, match="time_masks is -1"):
        AugmentSettings(time_masks=-1)
    with pytest.raises(ValueError, match="the alphabet is empty"):
        Recogniser(CONFIG, FEATURES, TaskSettings(), "")
    with pytest.raises(ValueError, match="different characters"):
        Recogniser(CONFIG, FEATURES, TaskSettings(), "AA")
    with pytest.raises(ValueError, match="24 but there are 80 mel bins"):
        Recogniser(CONFIG, FeatureSettings(), TaskSettings(), "A")
    with pytest.raises(ValueError, match="does not fit this version"):
        Recogniser.from_description({})


def test_speech_without_alignments_is_refused_by_name(speech_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no phone alignments"):
        finetune(settings(), load_corpus(speech_folder), out=tmp_path / "run", progress=False)


TINY = "--layers 2 --d-model 16 --heads 2 --ffn-dim 32 --kernel 3 --mel-bins 20 --batch-seconds 5 --device cpu"


def test_commands_end_to_end(tones: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    speakers = ["--data", str(tones), "--validation-speakers", "s1", "--test-speakers", "s2"]
    assert main(["finetune", *speakers, *TINY.split(), "--steps", "3", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "PER" in shown
    assert "chosen on validation: depth" in shown
    result = json.loads((out / "results.json").read_text())
    assert [row["depth"] for row in result["rows"]] == [1, 2]
    assert result["measured_on"] == "test"
    assert result["rows"][0]["utterances"] == 4
    assert result["chosen_depth"] == best_depth(result["validation_rows"])
    assert result["steps"] == 3
    assert result["exit"]["rule"]["kind"] in ("fixed", "change")
    assert result["exit_entropy"]["rule"]["kind"] in ("fixed", "entropy")
    # a finished run is measured again, to the same numbers
    assert main(["finetune", "--resume", str(out)]) == 0
    assert capsys.readouterr().out == shown
    assert main(["finetune", "--resume", str(out), "--layers", "3"]) == 2
    assert "--layers is 3 but was 2" in capsys.readouterr().err

    speech = load_corpus(tones)
    file = str(tones / f"{speech[0].id}.flac")
    # another folder than this one, which may have the package in it
    command = [sys.executable, "-m", "lcconformer", "transcribe", str(out), file, "--depth", "1", "--units", "phones"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=250)
    assert done.returncode == 0, done.stderr
    texts, _ = load_recogniser(out).transcribe(speech.audio(speech[0])[None], units="phones", depth=1)
    assert done.stdout == texts[0] + "\n"
    for rule in ("--exit-threshold", "--exit-entropy"):
        assert main(["transcribe", str(out), file, file, rule, "0.1"]) == 0
        assert capsys.readouterr().out.count(f"{file}\t") == 2


def test_beam_search_by_command(tones: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("flashlight.lib.text.decoder", reason="pip install 'lcconformer[beam]'")
    out = tmp_path / "run"
    speakers = ["--data", str(tones), "--validation-speakers", "s1", "--test-speakers", "s2"]
    assert main(["finetune", *speakers, *TINY.split(), "--steps", "2", "--out", str(out), "--lm-order", "7"]) == 2
    assert "--lm-order is 7; expected an integer from 2 to 6" in capsys.readouterr().err
    assert main(["finetune", *speakers, *TINY.split(), "--steps", "2", "--out", str(out), "--lm-order", "2"]) == 0
    assert "2-grams of characters" in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())
    for units, names in (("phones", {"per"}), ("characters", {"cer", "wer"})):
        search = found["beam_search"][units]
        assert names < {*search["found"]}
        row = found["rows"][found["chosen_depth"] - 1]
        assert {name: row[name] for name in names} == {name: search["best_path"][name] for name in names}
    speech = load_corpus(tones)
    command = ["transcribe", str(out), str(tones / f"{speech[0].id}.flac"), "--units", "phones"]
    assert main([*command, "--lm", str(out / "lm-phones.arpa"), "--lm-weight", "40", "--blank-penalty", "20"]) == 0
    lm = BeamSearch(load_recogniser(out).tokens("phones"), out / "lm-phones.arpa", 40.0, 20.0)
    texts, _ = load_recogniser(out).transcribe(speech.audio(speech[0])[None], units="phones", search=lm)
    assert capsys.readouterr().out == texts[0] + "\n"
    assert main([*command, "--beam", "3"]) == 2
    assert "which needs --lm FILE" in capsys.readouterr().err


def test_a_pretrained_encoder_by_command(tiny_checkpoint: Path, tones: Path, tmp_path: Path, capsys) -> None:
    command = ["finetune", "--data", str(tones), "--checkpoint", str(tiny_checkpoint), "--out", str(tmp_path / "run")]
    more = ["--steps", "1", "--freeze-encoder", "--batch-seconds", "5", "--device", "cpu"]
    assert main([*command, *more, "--layers", "9"]) == 2
    assert "--checkpoint decides the encoder" in capsys.readouterr().err
    assert main([*command, *more]) == 0
    start, model = load_model(tiny_checkpoint), load_recogniser(tmp_path / "run")
    for name, x in start.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], x), name
    assert main(["transcribe", str(tiny_checkpoint), "x.wav"]) == 2
    assert "is a checkpoint of 'pretrain'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "give either --out"),
        (["finetune", "--out", "run"], "--data is missing"),
        (["finetune", "--resume", "nowhere"], "has no checkpoint to resume"),
        (["finetune", "--data", "x", "--out", "run", "--subsampling", "stack:x"], "--subsampling is 'stack:x'"),
        (["transcribe", "nowhere", "x.wav"], "no checkpoint at nowhere"),
        (["transcribe", "nowhere", "x.wav", "--depth", "1", "--exit-threshold", "1"], "choose one"),
        (["transcribe", "nowhere", "x.wav", "--exit-entropy", "1", "--exit-threshold", "1"], "choose one"),
    ],
)
def test_commands_refuse(arguments, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_transcribe_refuses_audio(trained, tmp_path: Path, capsys) -> None:
    import soundfile

    run = str(trained.checkpoint)
    assert main(["transcribe", run, str(tmp_path / "none.wav")]) == 2
    assert "no audio at" in capsys.readouterr().err
    soundfile.write(tmp_path / "fast.wav", np.random.default_rng(0).normal(0, 0.1, 4000), 8000)
    assert main(["transcribe", run, str(tmp_path / "fast.wav")]) == 2
    assert "is sampled at 8000 Hz" in capsys.readouterr().err


def test_options_follow_the_width_and_compare_by_meaning() -> None:
    from lcconformer.cli.finetune import options_of, settings_from
    from lcconformer.cli.options import contradictions

    assert settings_from({}, None).config.ffn_dim == 1024
    assert settings_from({"d_model": 144}, None).config.ffn_dim == 576
    settings = settings_from({"d_model": 144, "ffn_dim": 100, "subsampling": "none"}, None)
    assert (settings.config.ffn_dim, settings.config.subsampling_factor) == (100, 1)
    was = options_of(settings)
    assert contradictions({"subsampling": "none", "d_model": 144, "workers": 7}, was, ("workers",)) == []
    assert contradictions({"subsampling": "stack:2"}, was, ()) == ["--subsampling is stack:2 but was none:1"]
