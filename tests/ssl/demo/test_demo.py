"""The demo end to end on a tiny scale: every number it reports follows from what it measured."""

import json
import re
import sys

import pytest

from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.data import load_corpus
from lcconformer.ssl.demo import DemoPlan, load_demo_speech, run_demo
from lcconformer.ssl.demo.plan import fitting_steps
from lcconformer.ssl.demo.speech import at_most
from lcconformer.ssl.demo.summary import format_results
from lcconformer.ssl.demo.training import FIXED, RANDOM, SAMPLED
from lcconformer.ssl.evaluation.probes import ProbeSettings, accuracies, smallest_depth
from lcconformer.ssl.model import FeatureSettings, load_model
from lcconformer.ssl.pretraining.settings import PretrainSettings

FIGURES = ("training_loss", "held_out_loss", "consistency", "inference_time", "probe_accuracy")


def tiny_plan(steps=6, layers=3):
    config = ConformerConfig(
        d_model=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=layers,
        conv_kernel_size=5,
        dropout=0.0,
        input_dim=20,
        subsampling="stack",
        subsampling_factor=2,
    )
    settings = PretrainSettings(
        config,
        features=FeatureSettings(num_bins=20),
        steps=steps,
        batch_seconds=4.0,
        crop_seconds=4.0,
        device="cpu",
        validate_every=steps,
        checkpoint_every=steps,
    )
    return DemoPlan(settings, ProbeSettings(max_frames=500, hidden=8, epochs=2), consistency_frames=200, rounds=3)


@pytest.fixture(scope="module")
def demo_run(make_speech, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "report"
    train, test = load_demo_speech(str(make_speech("demo", 12)))
    results = run_demo(train, test, tiny_plan(), out, progress=False)
    return out, results


def test_results_are_what_the_file_holds(demo_run):
    out, results = demo_run
    assert json.loads((out / "results.json").read_text()) == results
    names = {f"{figure}.png" for figure in FIGURES} | {"results.json", "report.html"}
    assert {p.name for p in out.iterdir()} == names | {"uniform.safetensors", "fixed.safetensors"}


def test_savings_follow_from_the_times(demo_run):
    _, results = demo_run
    sampled, fixed = results["training"][SAMPLED], results["training"][FIXED]
    saving = results["saving"]
    assert saving["time_saved"] == pytest.approx(1 - sampled["seconds"] / fixed["seconds"])
    assert saving["throughput_ratio"] == pytest.approx(1 / (1 - saving["time_saved"]))
    assert saving["loops_saved_expected"] == pytest.approx(1 / 3)  # 1 - (3 + 1) / (2 * 3)
    assert saving["loops_saved"] == pytest.approx(1 - sum(sampled["depth"]) / sum(fixed["depth"]))
    assert set(fixed["depth"]) == {3}
    assert sampled["steps"] == fixed["steps"] == 6
    for run in (sampled, fixed):
        assert run["seconds"] == run["elapsed"][-1]
        assert len(run["held_out_loss"]) == 3
    # the twins see the same batches
    assert sampled["speech_hours"] == pytest.approx(fixed["speech_hours"], rel=1e-12)


def test_parameters_are_those_of_built_encoders(demo_run):
    _, results = demo_run
    config = tiny_plan().settings.config
    counts = {
        sharing: sum(p.numel() for p in ConformerEncoder(config.replace(sharing=sharing)).parameters())
        for sharing in ("all", "none")
    }
    parameters = results["parameters"]
    assert parameters["shared"] == counts["all"]
    assert parameters["unshared"] == counts["none"]
    assert parameters["ratio"] == pytest.approx(counts["none"] / counts["all"])
    assert parameters["formula"] == pytest.approx(parameters["ratio"])


def test_depths_models_and_the_chosen_depth_agree(demo_run):
    _, results = demo_run
    rows = results["probe"]["rows"]
    assert len(rows) == 2 + 3 * 4 * 2
    times = results["inference"]["ms_per_second"]
    assert list(times) == list(results["consistency"]) == [SAMPLED, FIXED, RANDOM]
    for probe in ("linear", "hidden"):
        chosen = results["smallest_depth"][probe]
        assert chosen["depth"] == smallest_depth(accuracies(rows, SAMPLED, probe, "validation"))
        spent = times[SAMPLED][str(chosen["depth"])] / times[SAMPLED]["3"]
        assert chosen["time_saved"] == pytest.approx(1 - spent)
    for row in rows:
        if row["depth"]:
            assert row["ms_per_second"] == times[row["features"]][str(row["depth"])]
    for matrices in results["consistency"].values():
        assert [len(matrices[m]) for m in ("cosine", "cka", "frechet")] == [4, 4, 4]
        assert all(matrices["cka"][i][i] == pytest.approx(1.0) for i in range(4))


def test_the_page_stands_alone_and_shows_the_numbers(demo_run):
    out, results = demo_run
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES)
    assert not re.search(r"(src|href)=[\"'](?!data:)", page)
    assert "$" not in page
    for shown in (
        f"{100 * results['saving']['time_saved']:.1f}%",
        f"{results['parameters']['ratio']:.2f}x",
        f"{results['training'][FIXED]['held_out_loss'][2]:.4f}",
        results["setup"]["machine"]["torch"],
        "7.8x",
        "41.9%",
        "37.7%",
        "2105.00812",
    ):
        assert shown in page
    for figure in FIGURES:
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    text = format_results(results)
    assert f"{100 * accuracies(results['probe']['rows'], SAMPLED, 'linear')[3]:.1f}%" in text


def test_the_checkpoints_are_the_models_that_were_measured(demo_run, speech):
    import numpy as np

    from lcconformer.ssl.evaluation.consistency import model_consistency

    out, results = demo_run
    for name, depth in ((SAMPLED, "uniform"), (FIXED, "fixed")):
        model = load_model(out / f"{depth}.safetensors")
        corpus = load_corpus(results["setup"]["test"]["path"]).select(splits=["test"])
        again = model_consistency(model, corpus, max_frames=200)
        np.testing.assert_allclose(again["cka"], results["consistency"][name]["cka"], atol=1e-3)


def test_speech_without_alignments_leaves_the_probes_out(make_speech, tmp_path, capsys):
    train, test = load_demo_speech(str(make_speech("bare", 6, aligned=False)))
    results = run_demo(train, test, tiny_plan(steps=2), tmp_path / "out")
    progress = capsys.readouterr().err
    assert "\r" not in progress  # into a pipe: lines, not frames of a bar
    assert re.search(r"^100% \S+ \[4/4\] inference time$", progress, re.MULTILINE)
    assert results["probe"] is None
    assert results["smallest_depth"] is None
    assert "no phone probes" in (tmp_path / "out" / "report.html").read_text()
    assert "no phone probes" in format_results(results)
    assert not (tmp_path / "out" / "probe_accuracy.png").exists()


def test_speakers_are_held_out_where_there_are_no_splits(make_speech):
    train, test = load_demo_speech(str(make_speech("plain", 9, splits=False)))
    assert len(train) + len(test) == 9
    assert not set(train.speakers) & set(test.speakers)


def test_nothing_to_hold_out_is_an_error(make_speech):
    folder = make_speech("alone", 4, splits=False)
    meta = folder / "meta.jsonl"
    meta.write_text(re.sub(r"\"spk\": \"s\d\"", '"spk": "me"', meta.read_text()))
    with pytest.raises(ValueError, match="one speaker and no splits 'train' and 'test'"):
        load_demo_speech(str(folder))


def test_long_speech_is_cut_to_what_there_is_time_for(make_speech, monkeypatch):
    corpus = load_corpus(make_speech("long", 30))
    cut = at_most(corpus, 0.1, seed=0)
    assert 0.03 < 60 * cut.hours <= 0.1
    assert cut[0] in list(corpus)
    assert len(at_most(corpus, 1e-6, seed=0)) == 1


def test_steps_fit_the_time_and_have_a_ceiling():
    # 5 minutes, 60% of which train: 180 s at (1 + 0.5) s a pair of steps
    assert fitting_steps(1.0, 5.0, 0.5) == 120
    assert fitting_steps(1e-3, 5.0, 0.5) == fitting_steps(1e-4, 5.0, 0.5) < 10_000
    assert fitting_steps(1e3, 5.0, 0.5) == 20


def test_a_missing_matplotlib_is_said_before_the_training(make_speech, tmp_path, monkeypatch):
    train, test = load_demo_speech(str(make_speech("plots", 6)))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("lcconformer.ssl.demo.run.train_model", lambda *a: pytest.fail("trained"))
    with pytest.raises(ImportError, match="plots need matplotlib"):
        run_demo(train, test, tiny_plan(), tmp_path, progress=False)
