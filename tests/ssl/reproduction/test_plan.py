"""What is compared, on which speech, and the keys of the runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lcconformer.data import load_corpus
from lcconformer.ssl.finetuning import TaskSettings
from lcconformer.ssl.reproduction import MODELS, PRESETS, load_reproduction_speech, plan_runs
from lcconformer.ssl.reproduction.models import count_parameters
from lcconformer.ssl.reproduction.speech import NoisyCorpus

BASE = PRESETS["tiny"].finetune.config
RESULTS = Path(__file__).parents[3] / "bench" / "results"


@pytest.fixture(scope="module")
def spoken(speech):
    return load_reproduction_speech([str(speech)], test_speakers=["s2"], validation_speakers=["s1"])


def runs(spoken, preset=PRESETS["tiny"], **more):
    return plan_runs(preset, spoken, **more)


def test_models_differ_from_c_in_what_they_say() -> None:
    n = BASE.num_layers
    assert MODELS["C"].encoder(BASE) == BASE
    assert MODELS["A"].encoder(BASE) == BASE.replace(sharing="none")
    assert MODELS["shallow"].encoder(BASE).num_layers == round((n + 1) / 2)
    narrow = MODELS["narrow"].encoder(BASE)
    assert narrow.num_layers == n
    assert narrow.sharing == "none"
    assert narrow.d_model < BASE.d_model
    assert count_parameters(narrow) == pytest.approx(count_parameters(BASE), rel=0.2)
    # sandwich steps run all N loops; (N + 1) / 2 are those of C
    assert MODELS["D"].steps(600, BASE) == 600
    assert MODELS["D-time"].steps(600, BASE) == round(600 * (n + 1) / 2 / n)
    # all loops of A, (N + 1) / 2 of them in a step
    assert MODELS["C-time"].steps(700, BASE) == round(700 * n / ((n + 1) / 2))


def test_a_key_is_that_of_what_decides_the_numbers(spoken) -> None:
    first = {run.name: run.key for run in runs(spoken)}
    assert len(set(first.values())) == len(first)
    # neither the other models, nor the number of seeds, nor where it runs
    fewer = {run.name: run.key for run in runs(spoken, models=("A", "C"), seeds=1, device="cpu")}
    changed = {name for name, key in fewer.items() if first[name] != key}
    assert changed == {"timing"}  # of other models
    preset = PRESETS["tiny"]
    frequent = dataclasses.replace(preset, finetune=dataclasses.replace(preset.finetune, checkpoint_every=7))
    assert {run.name: run.key for run in runs(spoken, frequent)} == first
    faster = dataclasses.replace(preset, pretrain=dataclasses.replace(preset.pretrain, learning_rate=0.5))
    other = {run.name: run.key for run in runs(spoken, faster)}
    kinds = {name.partition("-")[0] for name in first if other[name] != first[name]}
    assert kinds == {"pretrain", "pretrained", "frozen", "probe"}  # what follows from pretraining
    louder = dataclasses.replace(spoken, test=spoken.train)
    assert all(
        run.key != first[run.name] for run in runs(louder) if run.kind not in ("pretrain", "pretrained", "probe")
    )


def older_preset():
    tiny = PRESETS["tiny"]
    encoder = tiny.finetune.config.replace(d_model=144, ffn_dim=576, num_layers=6)
    settings = dataclasses.replace(tiny.finetune, config=encoder, optimizer="adamw", learning_rate=2e-3, steps=2000)
    return dataclasses.replace(tiny, finetune=settings)


@pytest.mark.parametrize(
    ("folder", "preset"), [("paper-tiny", PRESETS["tiny"]), ("paper-tiny-adamw", older_preset())], ids=["now", "older"]
)
def test_runs_of_older_versions_are_found(spoken, folder, preset) -> None:
    """A configuration has more fields than when the filed runs were trained; their keys are the same."""
    places = sorted((RESULTS / folder / "runs").glob("scratch-*/result.json"))
    filed = [json.loads(path.read_text())["description"] for path in places]
    assert filed
    planned = {run.name: run for run in runs(spoken, preset, models=("A", "C", "C-time", "D-time"))}
    for old in filed:
        new = planned[f"scratch-{old['model']}-seed{old['seed']}"].description
        for one in (old, new):  # what the speech decides, which is not the filed one here
            del one["data"], one["settings"]["training"]["batch_seconds"]
        assert new == old


def test_what_comes_first_is_complete_first(spoken) -> None:
    planned = runs(spoken, models=("A", "B", "C", "D-time", "narrow"))
    for place, run in enumerate(planned):
        assert all(other.key in [done.key for done in planned[:place]] for other in run.after), run.name
    assert {run.kind for run in runs(spoken, parts=("supervised",))} == {"scratch", "timing"}
    assert [run.seed for run in planned if run.kind == "scratch"] == [0] * 5 + [1] * 5 + [2] * 5


def test_without_alignments_characters_are_the_task_and_nothing_is_probed(make_speech) -> None:
    folder = make_speech("unaligned", 6, aligned=False)
    planned = runs(load_reproduction_speech([str(folder)], test_speakers=["s2"]))
    assert not {run.kind for run in planned} & {"probe", "random"}
    tasks = {dict(run.settings)["training"].tasks for run in planned if run.kind == "scratch"}
    assert tasks == {TaskSettings(0.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"models": ("A", "X")}, "no model X"),
        ({"models": ("C", "D")}, "A and C must be among them"),
        ({"parts": ("supervised", "dreaming")}, "no part dreaming"),
        ({"seeds": 0}, "number of seeds is 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(spoken, more, message) -> None:
    with pytest.raises(ValueError, match=message):
        runs(spoken, **more)


def test_speakers_have_one_role(make_speech) -> None:
    folder = str(make_speech("roles", 12))
    by_split = load_reproduction_speech([folder])  # s2 is the split test; one of s0 and s1 is drawn for validation
    assert by_split.test.speakers == ("s2",)
    parts = [set(part.speakers) for part in (by_split.train, by_split.validation, by_split.test)]
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    assert sum(len(part) for part in (by_split.train, by_split.validation, by_split.test)) == 12
    named = load_reproduction_speech([folder], test_speakers=["s0"], validation_speakers=["s2"])
    assert (named.train.speakers, named.validation.speakers, named.test.speakers) == (("s1",), ("s2",), ("s0",))
    more = load_reproduction_speech([folder], test_speakers=["s0"], validation_speakers=["s2"], more=[folder])
    assert set(more.pretraining.speakers) == {"s1"}
    assert len(more.pretraining) == 2 * len(more.train)


@pytest.mark.parametrize(
    ("splits", "more", "message"),
    [
        (False, {}, "no split 'test'; name --test-speakers"),
        (True, {"test_speakers": ["s9"]}, "no test speaker s9"),
        (True, {"test_speakers": ["s1"], "validation_speakers": ["s1"]}, "choose one"),
        (True, {"test_speakers": ["s0", "s1", "s2"]}, "nobody is left for training"),
        (True, {"test_speakers": ["s0", "s1"]}, "nobody is left for validation"),
    ],
)
def test_speech_that_cannot_be_separated_is_refused(make_speech, splits, more, message) -> None:
    folder = make_speech("refused", 6, splits=splits)
    with pytest.raises(ValueError, match=message):
        load_reproduction_speech([str(folder)], **more)


def test_noise_is_ten_decibels_below_the_speech_and_the_same_every_time(speech) -> None:
    corpus = load_corpus(speech)
    noisy = NoisyCorpus(corpus)
    for utterance in corpus[:3]:
        clean, heard = corpus.audio(utterance), noisy.audio(utterance)
        noise = heard - clean
        ratio = 20 * np.log10(float(clean.square().mean().sqrt() / noise.square().mean().sqrt()))
        assert ratio == pytest.approx(10.0, abs=0.3)
        assert torch.equal(heard, noisy.audio(utterance))
