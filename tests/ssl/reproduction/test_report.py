"""The report of made-up runs: what it says of gates, savings, differences, mixed commits and what is missing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lcconformer import ConformerConfig
from lcconformer.ssl.evaluation import figures
from lcconformer.ssl.reproduction import write_report
from lcconformer.ssl.reproduction.report import PLAN

pytest.importorskip("matplotlib", reason="pip install 'lcconformer[demo]'")


@pytest.fixture(autouse=True)
def _plots_are_not_drawn(monkeypatch) -> None:
    monkeypatch.setattr(figures, "render", lambda figure: b"png")  # seconds, which test_reproduce.py spends once


N = 4
SPEAKERS = ("a", "b")
CONFIG = dataclasses.asdict(ConformerConfig(d_model=16, num_heads=2, ffn_dim=32, num_layers=N, input_dim=20))
MACHINE = {
    "device": "CPU", "processor": "made up", "cores": 2, "threads": 1, "python": "3", "torch": "2", "lcconformer": "0",
}  # fmt: skip


def rows(per: list[float], accuracy: list[float]) -> list[dict]:
    counts = {"utterances": 10, "phones": 200, "frames": 2000}
    return [{"depth": k, "per": p, "frame_accuracy": a, **counts} for k, (p, a) in enumerate(zip(per, accuracy), 1)]


def trained(model: str, seed: int, per: list[float], accuracy: list[float], validation: list[float]) -> dict:
    """Result of a supervised run; every speaker has the same error rates."""
    table = rows(per, accuracy)
    by_depth = [
        {"per": [round(100 * p), 100], "frame_error": [round(1000 * (1 - a)), 1000]} for p, a in zip(per, accuracy)
    ]
    matrix = np.ones((N + 1, N + 1)).tolist()
    exits = {"mean_depth": 2.5, **table[2]}
    training = {
        "config": CONFIG, "depth": "fixed" if model == "A" else "uniform", "min_depth": 1, "seed": seed, "steps": 100,
        "batch_seconds": 30.0, "learning_rate": 0.002, "tasks": {"frames": 1.0, "phones": 1.0, "characters": 0.0},
    }  # fmt: skip
    return {
        "description": {"settings": {"training": training}},
        "training": {
            "steps": 100, "loops": 400, "loops_per_step": 4.0 if model == "A" else 2.5, "speech_hours": 1.0,
            "curve": {"step": [50, 100], "loss": [3.0, 2.0]}, "validation_loss": [2.0] * N,
        },
        "encoder": {
            "num_layers": N, "d_model": 16, "unique": 3600 if model == "A" else 1000, "effective": 3600, "heads": 100,
            "gflops": [1.0] * N,
        },
        "rows": {"validation": rows(validation, accuracy), "test": table, "noisy": table},
        "by_speaker": {who: by_depth for who in SPEAKERS},
        "chosen_depth": 1 + int(np.argmin(validation)),
        "exit": {"rule": {"kind": "change", "threshold": 0.25}, "test": exits, "noisy": exits},
        "exit_entropy": {"rule": {"kind": "fixed", "threshold": 0.05}, "test": exits, "noisy": exits},
        "exit_curve": [{"threshold": 0.2, "test": exits, "noisy": exits}],
        "consistency": {"cosine": matrix, "cka": matrix, "frechet": matrix},
    }  # fmt: skip


def probed(accuracy: float) -> dict:
    every = [
        {"features": "C", "depth": k, "probe": probe, "accuracy": accuracy, "validation": 0.5, "frames": 2000}
        for k in range(1, N + 1)
        for probe in ("linear", "hidden")
    ]
    matrix = np.ones((N + 1, N + 1)).tolist()
    floor = [{"features": "log-mel", "depth": None, "probe": p, "accuracy": 0.61} for p in ("linear", "hidden")]
    return {"rows": every, "log_mel": floor, "consistency": {"cosine": matrix, "cka": matrix, "frechet": matrix}}


TIMING = {
    "inference": {
        # from log-mel on, 1 s a loop and 1 s ahead of them; 2 s of log-mel
        model: {"features_s": 2.0, "front_end_s": 1.0, "depth_s": {str(k): 1.0 + k for k in range(1, N + 1)}}
        for model in "AC"
    },
    "batch": {"utterances": 8, "audio_seconds": 100.0, "rounds": 9, "threads": 1},
    "step_s": {"A": {"4": 5.0}, "C": {str(k): 1.0 + k for k in range(1, N + 1)}},
}


def write(
    out: Path, runs: dict[tuple[str, str, int], tuple[dict, dict]], missing: tuple = (), commits: tuple = ("c0",)
) -> str:
    """Files of runs, (kind, model, seed) -> (result, times); returns the page in Markdown."""
    planned = []
    for place, (kind, model, seed) in enumerate((*runs, *missing)):
        name = f"{kind}-{model}-seed{seed}"
        planned.append({"kind": kind, "model": model, "seed": seed, "name": name, "folder": f"{name}-key"})
        if (kind, model, seed) in runs:
            result, times = runs[kind, model, seed]
            folder = out / "runs" / f"{name}-key"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result))
            where = {"machine": MACHINE, "commit": commits[place % len(commits)]}
            (folder / "times.json").write_text(json.dumps(times | where))
    part = {"corpus": "made-up.zip", "utterances": 10, "hours": 1.0, "speakers": 2, "named": [*SPEAKERS]}
    speech = {role: part for role in ("train", "validation", "test", "pretraining")}
    plan = {"preset": "tiny", "command": "lcconformer reproduce", "speech": speech, "aligned": True, "runs": planned}
    (out / PLAN).write_text(json.dumps(plan))
    assert write_report(out) == out / "report.html"
    return (out / "report.md").read_text()


def times(seconds: float) -> dict:
    return {"training": {"compute_s": seconds, "step_s": seconds / 100}}


A = [0.60, 0.50, 0.45, 0.40]
C = [0.44, 0.42, 0.41, 0.405]  # on validation speech depth 3 is within 1% of depth 4


def supervised(shift: float = 0.0, accuracy: float = 0.7) -> dict:
    right = [accuracy - 0.1, accuracy - 0.05, accuracy, accuracy]
    found = {}
    for seed in (0, 1, 2):
        found["scratch", "A", seed] = trained("A", seed, A, right, A), times(777.0)
        found["scratch", "C", seed] = (
            trained("C", seed, [p + shift for p in C], right, [0.5, 0.45, 0.401, 0.4]),
            times(350.0),
        )
    found["timing", "", 0] = {"models": ["A", "C"]}, TIMING
    return found


def test_savings_are_by_both_definitions(tmp_path: Path) -> None:
    page = write(tmp_path, supervised())
    assert "| parameters of the encoder, A over C (4 depths) | 3.60x | 7.8x |" in page
    assert "| training, loops saved (expected: 37.5%) | 37.5% |  |" in page  # 2.5 of 4
    # a step of A takes 5 s, one of C 1 s and 1 s for each of its loops, drawn uniformly
    line = next(x for x in page.splitlines() if x.startswith("| training, time saved: 1 - new / old"))
    saved = float(line.split("|")[2].strip(" %"))
    assert saved == pytest.approx(100 * (1 - 3.5 / 5), abs=5)
    # of times by the clock nothing is said: other load decides them
    assert "777" not in page
    assert "| A | 3 | 100 | 4.00 | 5000 | 500 | 100 | 500 | 2.000 |" in page
    # 2 s of log-mel, then 1 + depth: 6 s at depth 3 against 7 s at depth 4
    assert f"| inference, time saved: C at depth 3 against A at 4 | {100 / 7:.1f}% | 37.7% |" in page
    assert f"| inference, speed-up: C at depth 3 against A at 4 | {100 / 6:.1f}% | 37.7% |" in page
    # 0.01 s a second of speech at depth 1, 0.07 in all
    assert "| A | 20.00 | 10.00 | 20.00 | 30.00 | 40.00 | 50.00 | 0.07000 |" in page


def test_a_difference_is_that_of_the_chosen_depths(tmp_path: Path) -> None:
    page = write(tmp_path, supervised())
    assert "mixed" not in page
    assert "not for free" not in page
    assert "| C - A | PER | 3 | +0.5 [+0.5, +0.5] |" in page
    assert 'with any seed" holds.' in page
    assert "C makes the fewest errors at full depth (PER 40.5%)." in page
    assert "| C | 4, 4, 4 | 40.5 ± 0.0 | 3, 3, 3 | 41.0 ± 0.0 | 4, 4, 4 | 40.5 ± 0.0 |" in page


def test_a_model_that_loses_is_said_to(tmp_path: Path) -> None:
    page = write(tmp_path, supervised(0.015))
    assert "| C - A | PER | 3 | +2.0 [+2.0, +2.0] |" in page
    assert 'with any seed" does not hold' in page
    assert "C makes +2.0 points of errors (PER) against A, so what it saves is not for free" in page


def test_what_leaves_the_picture_is_said(tmp_path: Path) -> None:
    runs = supervised()
    assert "beyond it" not in write(tmp_path / "all in it", runs)
    for key, (run, _) in runs.items():
        if key[1] == "A":
            run["rows"]["test"][0]["per"] = 2.5
    assert "twice the largest error at full depth; beyond it: A." in write(tmp_path / "A is not", runs)


def test_one_seed_is_no_proof(tmp_path: Path) -> None:
    runs = {key: value for key, value in supervised().items() if key[2] == 0}
    page = write(tmp_path, runs)
    assert "one seed is no proof either way" in page
    assert "One seed: there are no error bars" in page
    assert "±" not in page.split("## Errors at every depth")[1].split("## An exit rule")[0]


def test_a_deep_state_that_is_worse_is_said_to_be(tmp_path: Path) -> None:
    runs = supervised()
    for seed in (0, 1, 2):
        worse = trained("C", seed, [0.44, 0.40, 0.41, 0.45], [0.7] * N, [0.5, 0.40, 0.42, 0.45])
        runs["scratch", "C", seed] = worse, times(350.0)
    page = write(tmp_path, runs)
    assert "C makes the fewest errors at depth 2 (PER 40.0%) and 5.0 points more at full depth (45.0%)" in page
    assert "in part the weakness of the last ones" in page


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (0.65, "A has 65.0% of the frames right, 61.6% are asked for: passed"),
        (0.60, "A has 60.0% of the frames right, 61.6% are asked for: failed, insensitive, no claim that C equals A"),
    ],
)
def test_the_gate_of_the_task(tmp_path: Path, accuracy: float, said: str) -> None:
    page = write(tmp_path, supervised(accuracy=accuracy))
    assert said in page
    assert ("would hold, but the gate of the task failed" in page) == ("failed" in said)


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.12, "gains +12.0 points over random weights at the best depth, 10 are asked for: passed"),
        (
            0.03,
            "gains +3.0 points over random weights at the best depth, 10 are asked for: failed, insensitive, no claim",
        ),
    ],
)
def test_the_gate_of_pretraining(tmp_path: Path, gain: float, said: str) -> None:
    runs = supervised() | {
        ("pretrain", "C", 0): ({}, times(100.0)),
        ("random", "C", 0): (probed(0.45), {}),
        ("probe", "C", 0): (probed(0.45 + gain), {}),
    }
    page = write(tmp_path, runs)
    assert page.count(said) == 2  # in short, and where pretraining is
    assert "| log-mel, 11 frames: linear probe | 61.0 |" in page


def test_mixed_commits_and_missing_runs_are_named(tmp_path: Path) -> None:
    page = write(tmp_path, supervised(), missing=(("scratch", "D", 0),), commits=("c0", "c1"))
    assert "Runs of 2 commits of this package are mixed here." in page
    assert "c1: scratch-C seed 0" in page
    assert "Not complete: 1 of 8 runs (scratch-D-seed0)" in page


def test_nothing_complete_is_a_page_that_says_so(tmp_path: Path) -> None:
    page = write(tmp_path, {}, missing=(("scratch", "A", 0),))
    assert "No run is complete." in page


def test_the_optimizer_is_named(tmp_path: Path) -> None:
    for name, said in ((None, "AdamW"), ("muon", "Muon for the matrices of the layers and AdamW for all else")):
        runs = supervised()
        for result, _ in runs.values():
            if name and "description" in result:
                result["description"]["settings"]["training"]["optimizer"] = name
        out = tmp_path / str(name)
        out.mkdir()
        assert f"100 steps of at most 30 s, {said}, peak learning rate 0.002" in write(out, runs)
