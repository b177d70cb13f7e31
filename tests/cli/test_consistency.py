"""Consistency of real models: a layer that changes nothing is fully consistent; the command reports what it measured."""

import json

import numpy as np
import pytest
import torch

from lcconformer import ConformerEncoder
from lcconformer.__main__ import main
from lcconformer.data import load_corpus
from lcconformer.ssl.checkpoint import save_checkpoint
from lcconformer.ssl.evaluation.consistency import MEASURES, format_summary, model_consistency, summarise
from lcconformer.ssl.model import PretrainingModel


def test_a_layer_that_adds_nothing_leaves_all_depths_alike(tiny_model, speech):
    layer = tiny_model.encoder.layers[0]
    for linear in (layer.ffn1.down, layer.ffn2.down, layer.attention.out, layer.conv.pointwise2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    matrices = model_consistency(tiny_model, load_corpus(speech), max_frames=300)
    ones = np.ones((3, 3))
    # depth 0 lacks the layer's last norm
    np.testing.assert_allclose(matrices["cosine"][1:, 1:], ones, atol=1e-5)
    np.testing.assert_allclose(matrices["cka"][1:, 1:], ones, atol=1e-5)
    np.testing.assert_allclose(matrices["frechet"][1:, 1:], 0 * ones, atol=1e-4)
    assert summarise(matrices)["cka"] == pytest.approx(1.0, abs=1e-5)


def test_only_real_frames_count_and_the_draw_is_seeded(tiny_model, speech):
    corpus = load_corpus(speech)
    first, again, other = (model_consistency(tiny_model, corpus, max_frames=150, seed=s) for s in (0, 0, 1))
    for measure in MEASURES:
        np.testing.assert_array_equal(first[measure], again[measure])
        assert not np.array_equal(first[measure], other[measure])
    # an utterance of its own length in a padded batch gives the states it gives alone
    one = corpus.select(ids=[corpus[0].id])
    audio = one.audio(one[0])[None]
    with torch.no_grad():
        hidden, _ = tiny_model.hidden_states(audio, torch.tensor([audio.shape[1]]))
    expected = torch.cosine_similarity(hidden[1][0], hidden[3][0], -1).mean()
    assert model_consistency(tiny_model, one)["cosine"][1, 3] == pytest.approx(float(expected), abs=2e-3)


def test_summary_leaves_out_the_front_end_and_the_diagonal():
    matrix = np.array([[9.0, 9, 9, 9], [9, 1, 0.5, 0.2], [9, 0.5, 1, 0.8], [9, 0.2, 0.8, 1]])
    assert summarise({m: matrix for m in MEASURES})["cka"] == pytest.approx(0.5)


def test_command_compares_models_and_draws_them(tiny_model, tiny_checkpoint, speech, tmp_path, capsys):
    config = tiny_model.config.replace(sharing="none")
    other = PretrainingModel(config, tiny_model.feature_settings, tiny_model.objective_settings)
    assert isinstance(other.encoder, ConformerEncoder)
    unshared = save_checkpoint(
        tmp_path / "unshared.safetensors", {f"model.{k}": v for k, v in other.state_dict().items()}, other.describe()
    )
    out, plot = tmp_path / "c.json", tmp_path / "c.png"
    command = ["consistency", "--checkpoint", str(tiny_checkpoint), "--data", str(speech), "--device", "cpu"]
    files = ["--json", str(out), "--plot", str(plot)]
    assert main([*command, "--compare", str(unshared), "--frames", "200", *files]) == 0
    result = json.loads(out.read_text())
    assert list(result["matrices"]) == ["checkpoint", "compared", "random-init"]
    expected = model_consistency(tiny_model, load_corpus(speech), max_frames=200)
    for measure in MEASURES:
        np.testing.assert_allclose(result["matrices"]["checkpoint"][measure], expected[measure], atol=1e-6)
    assert result["matrices"]["compared"] != result["matrices"]["checkpoint"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown, progress = capsys.readouterr()
    assert "\r" not in progress  # into a pipe: lines, not frames of a bar
    assert progress.count("100% ") == 1
    assert f"{summarise(expected)['cka']:.3f}" in shown
    assert f"{expected['frechet'][1, -1]:.3f}" in shown


def test_one_loop_has_no_pairs():
    matrices = {m: np.eye(2) for m in MEASURES}
    assert np.isnan(summarise(matrices)["cosine"])
    assert "nan" in format_summary({"one": matrices})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "1"], "--frames is 1; expected 2 or more"),
        (["--data", "missing"], "no corpus at missing"),
        (["--compare", "missing"], "no checkpoint at missing"),
        (["--plot", "c.xyz", "--frames", "50"], "cannot draw a 'xyz' file; expected one of"),
    ],
)
def test_command_says_what_is_wrong(tiny_checkpoint, speech, capsys, arguments, message):
    command = ["consistency", "--checkpoint", str(tiny_checkpoint), "--data", str(speech), "--device", "cpu"]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
