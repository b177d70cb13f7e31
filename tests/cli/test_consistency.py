"""The consistency command: matrices, a summary of them, and heat maps."""

import json

import numpy as np
import pytest

from lcconformer import ConformerEncoder
from lcconformer.__main__ import main
from lcconformer.cli.consistency import format_summary, run_names
from lcconformer.data import load_corpus
from lcconformer.ssl.checkpoint import save_checkpoint
from lcconformer.ssl.evaluation.consistency import MEASURES, model_consistency, summarise
from lcconformer.ssl.model import PretrainingModel


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


@pytest.mark.parametrize(
    ("checkpoint", "compared", "names"),
    [
        ("runs/shared/step_00000500.safetensors", None, {"checkpoint": "shared"}),
        ("demo/uniform.safetensors", "demo/fixed.safetensors", {"checkpoint": "uniform", "compared": "fixed"}),
        ("a/run", "b/run", {"checkpoint": "a/run", "compared": "b/run"}),
    ],
)
def test_plots_name_the_runs(checkpoint, compared, names):
    assert run_names(checkpoint, compared) == names


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
        (["--plot", "c.xyz", "--frames", "50"], "c.xyz; expected a file that ends in .png"),
    ],
)
def test_command_says_what_is_wrong(tiny_checkpoint, speech, capsys, arguments, message):
    command = ["consistency", "--checkpoint", str(tiny_checkpoint), "--data", str(speech), "--device", "cpu"]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err
