"""The report, from the files of the runs alone: a page in Markdown and in self-contained HTML, with its plots."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...config import ConformerConfig
from ...depth import DepthSampler
from ..evaluation import figures
from ..evaluation.classifiers import PROBES
from ..evaluation.consistency import MEASURES, NAMES, summarise
from .models import MODELS
from .page import Page
from .speech import NOISE_DECIBELS
from .statistics import Interval, bootstrap_difference, mean_and_error, paired_difference

__all__ = ["PLAN", "write_report"]

PLAN = "reproduction.json"
TOLERANCE = 0.01
"""Relative to the least error on validation speech: what the smallest depth may cost."""
TASK_GATE = 0.616
"""Frame accuracy of a small MLP on 11 frames of log-mel on LibriSpeech's speakers 84, 422, 777 and 2902."""
PROBE_GATE = 0.10
"""What pretraining must gain over random weights in the linear probe before anything is said about it."""
_WORSE_MEAN, _WORSE_SEED = 0.01, 0.02  # what C may lose against A on average, and with any one seed

# from the abstract of arXiv 2105.00812
PAPER = {"parameters": "7.8x", "training": "41.9%", "inference": "37.7%"}
_OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon for the matrices of the layers and AdamW for all else"}
_TITLES = {"frame_error": "frames wrong", "per": "PER", "cer": "CER", "wer": "WER"}


@dataclass(frozen=True)
class _Run:
    """Files of one complete run."""

    kind: str
    model: str
    seed: int
    result: dict[str, Any]
    times: dict[str, Any]

    def error(self, metric: str, depth: int, speech: str = "test") -> float:
        return _error(self.result["rows"][speech][depth - 1], metric)

    @property
    def depths(self) -> range:
        return range(1, len(self.result["rows"]["test"]) + 1)


def _error(row: dict[str, Any], metric: str) -> float:
    return 1.0 - row["frame_accuracy"] if metric == "frame_error" else row[metric]


class _Data:
    """All complete runs of a plan."""

    def __init__(self, out: Path) -> None:
        self.plan = json.loads((out / PLAN).read_text())
        self.runs: list[_Run] = []
        self.missing: list[str] = []
        for run in self.plan["runs"]:
            place = out / "runs" / run["folder"]
            if not (place / "times.json").is_file():
                self.missing.append(run["name"])
                continue
            result, times = (json.loads((place / f"{name}.json").read_text()) for name in ("result", "times"))
            self.runs.append(_Run(run["kind"], run["model"], run["seed"], result, times))

    def of(self, kind: str, model: str = "") -> list[_Run]:
        """Runs of a kind and a model, one a seed, in the order of the seeds."""
        return sorted((r for r in self.runs if (r.kind, r.model) == (kind, model)), key=lambda r: r.seed)

    def models(self, kind: str) -> list[str]:
        present = {r.model for r in self.runs if r.kind == kind}
        return [name for name in MODELS if name in present]

    @cached_property
    def metrics(self) -> list[str]:
        """Error rates that the runs have, the one that decides first."""
        row: dict[str, Any] = next((r.result["rows"]["test"][0] for r in self.runs if r.kind == "scratch"), {})
        names = [name for name in ("per", "cer", "wer") if name in row]
        return names + (["frame_error"] if "frame_accuracy" in row else [])

    @property
    def timing(self) -> _Run | None:
        return next(iter(self.of("timing")), None)

    def smallest_depth(self, run: _Run) -> int:
        """Smallest depth whose error on validation speech is within the tolerance of the least."""
        errors = {k: run.error(self.metrics[0], k, "validation") for k in run.depths}
        return min(k for k, error in errors.items() if error <= (1.0 + TOLERANCE) * min(errors.values()))


def write_report(out: Path) -> Path:
    """Write ``report.html`` and ``report.md``, with its plots, from the files under ``out``; returns the path of the former.

    Runs that are missing are named; what needs them is left out.  Runs of different commits are named too.

    Raises:
        FileNotFoundError: ``out`` has no plan.
        ImportError: matplotlib is not installed.
    """
    data = _Data(out)
    page = Page("A shared Conformer layer of random depth, against the conventional model")
    _provenance_warnings(data, page)
    if data.models("scratch"):
        _summary(data, page)
        _abstract(data, page)
        _parameters(data, page)
        _training(data, page)
        _accuracy(data, page, "scratch")
        _choice(data, page)
        _exits(data, page)
        _inference(data, page)
        _consistency(data, page)
    _pretraining(data, page)
    _limits(data, page)
    _provenance(data, page)
    return page.write(out)


def _percent(value: float, error: float | None = None) -> str:
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _points(interval: Interval) -> str:
    """A difference of error rates in points, plus: more errors."""
    text = f"{100 * interval.mean:+.1f}"
    if interval.low is not None and interval.high is not None:
        text += f" [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
    return text


def _paired(first: Sequence[_Run], second: Sequence[_Run]) -> tuple[list[_Run], list[_Run]]:
    """The runs of two models with the same seeds."""
    both = {r.seed for r in first} & {r.seed for r in second}
    return [r for r in first if r.seed in both], [r for r in second if r.seed in both]


def _counts(run: _Run, metric: str, depth: int) -> dict[str, tuple[int, int]]:
    return {who: tuple(rows[depth - 1][metric]) for who, rows in run.result["by_speaker"].items()}


@dataclass(frozen=True)
class _Difference:
    """Errors of a model less those of another at the depths that validation chose: over seeds, and over speakers."""

    seeds: Interval
    speakers: Interval
    number: int

    @property
    def holds(self) -> bool:
        return self.seeds.mean <= _WORSE_MEAN and self.seeds.worst <= _WORSE_SEED


def _difference(first: Sequence[_Run], second: Sequence[_Run], metric: str) -> _Difference | None:
    first, second = _paired(first, second)
    if not first:
        return None
    at = [[(run, run.result["chosen_depth"]) for run in runs] for runs in (first, second)]
    errors = [[run.error(metric, depth) for run, depth in pairs] for pairs in at]
    counts = [[_counts(run, metric, depth) for run, depth in pairs] for pairs in at]
    return _Difference(paired_difference(*errors), bootstrap_difference(*counts), len(first))


def _task_gate(data: _Data) -> tuple[bool, str] | None:
    runs = data.of("scratch", "A")
    if "frame_error" not in data.metrics or not runs:
        return None
    accuracy = statistics.fmean(1.0 - r.error("frame_error", r.result["chosen_depth"]) for r in runs)
    passed = accuracy >= TASK_GATE
    text = f"gate of the task: A has {_percent(accuracy)}% of the frames right, {_percent(TASK_GATE)}% are asked for"
    return passed, text + (": passed" if passed else ": failed, insensitive, no claim that C equals A")


def _best_probe(runs: Sequence[_Run]) -> list[float]:
    """For each seed, the accuracy of the linear probe at the depth that validation speech chooses."""
    found = []
    for run in runs:
        rows = [row for row in run.result["rows"] if row["probe"] == "linear"]
        found.append(max(rows, key=lambda row: (row["validation"], -row["depth"]))["accuracy"])
    return found


def _probe_gate(data: _Data) -> tuple[bool, str] | None:
    trained, random = _paired(data.of("probe", "C"), data.of("random", "C"))
    if not trained:
        return None
    gain = statistics.fmean(_best_probe(trained)) - statistics.fmean(_best_probe(random))
    passed = gain >= PROBE_GATE
    text = (
        f"gate of pretraining: the linear probe gains {100 * gain:+.1f} points over random weights at the best depth, "
        f"{100 * PROBE_GATE:.0f} are asked for"
    )
    return passed, text + (": passed" if passed else ": failed, insensitive, no claim about pretraining")


def _summary(data: _Data, page: Page) -> None:
    page.heading("In short")
    items = []
    task = _task_gate(data)
    for gate in (task, _probe_gate(data)):
        if gate is not None:
            items.append(gate[1][0].upper() + gate[1][1:] + ".")
    for model, metric in itertools.product(("C", "C-time"), data.metrics):
        difference = _difference(data.of("scratch", "A"), data.of("scratch", model), metric)
        if difference is None:
            continue
        verdict = "holds" if difference.holds else "does not hold"
        if difference.holds and task is not None and not task[0]:
            verdict = "would hold, but the gate of the task failed"
        seeds = f"{difference.number} seed{'s' if difference.number > 1 else ''}"
        items.append(
            f"{model} against A, {_TITLES[metric]} at the depths that validation chose: {_points(difference.seeds)} points "
            f"over {seeds}, [{_bounds(difference.speakers)}] by drawing the speakers anew (plus: {model} makes more "
            "errors). "
            f'"No worse than {100 * _WORSE_MEAN:.0f} point on average and {100 * _WORSE_SEED:.0f} with any seed" '
            f"{verdict}" + ("; one seed is no proof either way." if difference.number == 1 else ".")
        )
    items += [_full_depth(data, "C")]
    page.items(items)


def _bounds(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return "no interval: one speaker"
    return f"{100 * interval.low:+.1f}, {100 * interval.high:+.1f}"


def _full_depth(data: _Data, model: str) -> str:
    """Whether the deepest state of a model is its best one: only then a saving by fewer loops is one."""
    metric, runs = data.metrics[0], data.of("scratch", model)
    depths = runs[0].depths
    mean = {k: statistics.fmean(r.error(metric, k) for r in runs) for k in depths}
    best, full = min(depths, key=lambda k: (mean[k], k)), depths[-1]
    if best == full:
        return f"{model} makes the fewest errors at full depth ({_TITLES[metric]} {_percent(mean[full])}%)."
    gap = mean[full] - mean[best]
    return (
        f"{model} makes the fewest errors at depth {best} ({_TITLES[metric]} {_percent(mean[best])}%) and "
        f"{100 * gap:.1f} "
        f"points more at full depth ({_percent(mean[full])}%): "
        + (
            "less than a point, a tie."
            if gap < 0.01
            else "what fewer loops save is in part the weakness of the last ones."
        )
    )


def _mean_step(data: _Data, model: str) -> float | None:
    """Mean time of a training step, over the depths that the steps had, each measured in turn with the other models."""
    timing, runs = data.timing, data.of("scratch", model)
    if timing is None or model not in timing.times["step_s"] or not runs:
        return None
    described = runs[0].result["description"]["settings"]["training"]
    config = ConformerConfig(**described["config"])
    sampler = DepthSampler(
        described["depth"],
        config.num_layers,
        described["min_depth"],
        described["seed"],
        max(1, described["steps"] // 2),
    )
    drawn = Counter("+".join(map(str, sampler.depths(step))) for step in range(described["steps"]))
    measured = timing.times["step_s"][model]
    drawn = Counter({key: n for key, n in drawn.items() if key in measured})
    return sum(n * measured[key] for key, n in drawn.items()) / sum(drawn.values())


def _seconds(data: _Data, model: str, depth: int) -> float | None:
    """Inference time of the batch from audio to the hidden state at ``depth``."""
    if data.timing is None or model not in data.timing.times["inference"]:
        return None
    times = data.timing.times["inference"]
    # the same features for all models: what their times differ by is noise
    features = statistics.median(own["features_s"] for own in times.values())
    return features + times[model]["depth_s"][str(depth)]


def _abstract(data: _Data, page: Page) -> None:
    page.heading("Beside the numbers of the abstract")
    a, c = data.of("scratch", "A"), data.of("scratch", "C")
    if not a or not c:
        page.paragraph("It takes complete runs of A and C.")
        return
    old, new = a[0].result, c[0].result
    n = new["encoder"]["num_layers"]
    ratio = old["encoder"]["unique"] / new["encoder"]["unique"]
    loops = 1.0 - new["training"]["loops_per_step"] / old["training"]["loops_per_step"]
    rows = [
        [f"parameters of the encoder, A over C ({n} depths)", f"{ratio:.2f}x", PAPER["parameters"]],
        [f"training, loops saved (expected: {_percent((n - 1) / (2 * n))}%)", f"{_percent(loops)}%", ""],
    ]
    steps = [_mean_step(data, model) for model in ("A", "C")]
    if steps[0] and steps[1]:
        rows += [
            [
                "training, time saved: 1 - new / old, steps in turn",
                f"{_percent(1 - steps[1] / steps[0])}%",
                PAPER["training"],
            ],
            [
                "training, speed-up: old / new - 1, steps in turn",
                f"{_percent(steps[0] / steps[1] - 1)}%",
                PAPER["training"],
            ],
        ]
    depth = round(statistics.median(data.smallest_depth(r) for r in c))
    times = [_seconds(data, "A", n), _seconds(data, "C", n), _seconds(data, "C", depth)]
    if times[0] and times[1] and times[2]:
        rows += [
            [
                f"inference, time saved: C at depth {depth} against A at {n}",
                f"{_percent(1 - times[2] / times[0])}%",
                PAPER["inference"],
            ],
            [
                f"inference, time saved: C at depth {depth} against C at {n}",
                f"{_percent(1 - times[2] / times[1])}%",
                "",
            ],
            [
                f"inference, speed-up: C at depth {depth} against A at {n}",
                f"{_percent(times[0] / times[2] - 1)}%",
                PAPER["inference"],
            ],
        ]
    page.table(["", "this run", "the abstract"], rows)
    lost = _difference(a, c, data.metrics[0])
    if lost is not None and not lost.holds:
        page.warning(
            f"The abstract saves at comparable performance. Here C makes {100 * lost.seeds.mean:+.1f} points of errors "
            f"({_TITLES[data.metrics[0]]}) against A, so what it saves is not for free."
        )
    page.paragraph(
        f"Depth {depth} is the smallest one whose error on validation speech is at most {100 * TOLERANCE:.0f}% "
        "(relative) above "
        "the least, the median over seeds. Both sides of each ratio run the same kernels. Inference is from audio on, "
        "log-mel "
        "features included. The abstract does not say what its percentages are percentages of; hence both definitions."
    )


def _parameters(data: _Data, page: Page) -> None:
    page.heading("Parameters")
    rows = []
    for model in data.models("scratch"):
        encoder = data.of("scratch", model)[0].result["encoder"]
        rows.append(
            [
                f"{model}: {MODELS[model].text}",
                f"{encoder['num_layers']} x {encoder['d_model']}",
                f"{encoder['unique']:,}",
                f"{encoder['effective']:,}",
                f"{encoder['effective'] / encoder['unique']:.2f}x",
                f"{encoder['heads']:,}",
                f"{encoder['gflops'][-1]:.2f}",
            ]
        )
    page.table(["model", "depths x width", "stored", "effective", "ratio", "heads", "GFLOP, 16 s"], rows)
    page.paragraph(
        "Stored and effective (without sharing) parameters of the encoder; the heads are those of the task. GFLOP: a "
        "forward "
        "pass at full depth over 400 frames at the layers."
    )


def _training(data: _Data, page: Page) -> None:
    page.heading("Training")
    target = _common_loss(data)
    rows = []
    for model in data.models("scratch"):
        runs = data.of("scratch", model)
        first = runs[0].result["training"]
        step = _mean_step(data, model)
        to_loss = [_steps_to(run, target) for run in runs]
        known = [n for n in to_loss if n is not None]
        reached = statistics.fmean(known) if len(known) == len(runs) else None
        rows.append(
            [
                model,
                str(len(runs)),
                str(first["steps"]),
                f"{first['loops_per_step']:.2f}",
                f"{1000 * step:.0f}" if step else "-",
                f"{first['steps'] * step:.0f}" if step else "-",
                "not reached" if reached is None else f"{reached:.0f}",
                f"{reached * step:.0f}" if reached is not None and step else "-",
                f"{statistics.fmean(r.result['training']['curve']['loss'][-1] for r in runs):.3f}",
            ]
        )
    page.table(
        ["model", "seeds", "steps", "loops a step", "ms a step", "s of all steps", f"steps to a loss of {target:.2f}",
         "s to it", "last loss"],
        rows,
    )  # fmt: skip
    page.paragraph(
        "Times are those of steps in turn: all models and depths one after another in every round on the same batch, so "
        "that other load on the machine meets all alike; the mean over the depths of the steps, times their number. The "
        "clock of a run, which says as much about other load, is in its times.json and is not used. The loss of a step is "
        "that of its depth (of sandwich steps, the mean over three), so that losses of different laws of depth differ in "
        "meaning."
    )


def _common_loss(data: _Data) -> float:
    """A training loss that every model reaches: the largest last one."""
    return max(r.result["training"]["curve"]["loss"][-1] for r in data.runs if r.kind == "scratch")


def _steps_to(run: _Run, loss: float) -> int | None:
    curve = run.result["training"]["curve"]
    return next((step for value, step in zip(curve["loss"], curve["step"]) if value <= loss), None)


def _by_depth(runs: Sequence[_Run], metric: str) -> dict[int, tuple[float, float | None]]:
    """Mean over seeds and its standard error at each depth, in percent."""
    found = {}
    for k in runs[0].depths:
        mean, error = mean_and_error([r.error(metric, k) for r in runs])
        found[k] = (100 * mean, None if error is None else 100 * error)
    return found


def _accuracy(data: _Data, page: Page, kind: str) -> None:
    page.heading("Errors at every depth, trained from scratch")
    models = data.models(kind)
    panels = {}
    for metric in data.metrics:
        panels[f"{_TITLES[metric]} (%), test speakers"] = {
            model: _by_depth(data.of(kind, model), metric) for model in models
        }
    # a model that was never asked for fewer loops is lost at most depths: the axes are for the others
    tops = {
        label: 2.0 * max(by_depth[max(by_depth)][0] for by_depth in series.values()) for label, series in panels.items()
    }
    page.image(
        "errors", figures.render(figures.depth_figure(panels, tops=tops)), "error rates by depth, a line per model"
    )
    cut = [m for m in models if any(v > tops[label] for label in panels for v, _ in panels[label][m].values())]
    page.paragraph(
        _bars(data, kind)
        + (f" The axes end at twice the largest error at full depth; beyond it: {', '.join(cut)}." if cut else "")
    )
    for metric, series in zip(data.metrics, panels.values()):
        deepest = max(len(values) for values in series.values())
        rows = [[model, *(_cell(values.get(k)) for k in range(1, deepest + 1))] for model, values in series.items()]
        page.table([f"{_TITLES[metric]} (%), depth", *map(str, range(1, deepest + 1))], rows)
    first = data.of(kind, models[0])[0].result["rows"]["test"][0]
    over = [f"{first[name]:,} {name}" for name in ("frames", "phones", "characters", "words") if name in first]
    page.paragraph(
        f"Over {first['utterances']} utterances of the test speakers: {', '.join(over)}; CTC's best path, no language "
        "model. A "
        "and B were only trained at full depth: their shallower states are shown for what they are."
    )


def _cell(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return ""
    return f"{value[0]:.1f}" + (f" ± {value[1]:.1f}" if value[1] is not None else "")


def _bars(data: _Data, kind: str) -> str:
    seeds = {len(data.of(kind, model)) for model in data.models(kind)}
    if seeds == {1}:
        return "One seed: there are no error bars, and differences of a point or two mean nothing."
    return "Bars and ±: standard error of the mean over seeds."


def _choice(data: _Data, page: Page) -> None:
    page.heading("Depths that validation speech chooses")
    metric = data.metrics[0]
    rows = []
    for model in data.models("scratch"):
        runs = data.of("scratch", model)
        chosen = {
            "best": [r.result["chosen_depth"] for r in runs],
            "smallest": [data.smallest_depth(r) for r in runs],
            "full": [r.depths[-1] for r in runs],
        }
        cells = []
        for depths in chosen.values():
            errors = [r.error(metric, k) for r, k in zip(runs, depths)]
            cells += [", ".join(map(str, depths)), _percent(*mean_and_error(errors))]
        rows.append([model, *cells])
    title = _TITLES[metric]
    page.table(
        ["model", "best depth", f"{title} (%)", "smallest within 1%", f"{title} (%)", "full", f"{title} (%)"], rows
    )
    page.paragraph(
        "A depth for each seed. Depths are chosen on the validation speakers, errors are those of the test speakers."
    )
    differences = []
    for first, second in (("A", "B"), ("A", "C"), ("A", "C-time"), ("C", "D"), ("C", "D-time"), ("C", "sandwich"),
                          ("C", "film"), ("narrow", "C"), ("shallow", "C"), ("dropped", "C"), ("layerdrop", "C")):  # fmt: skip
        for name in data.metrics:
            found = _difference(data.of("scratch", first), data.of("scratch", second), name)
            if found is not None:
                differences.append(
                    [
                        f"{second} - {first}",
                        _TITLES[name],
                        str(found.number),
                        _points(found.seeds),
                        _points(found.speakers),
                    ]
                )
    page.table(["", "of", "seeds", "points, over seeds", "points, over speakers"], differences)
    speakers = len(next(r for r in data.runs if r.kind == "scratch").result["by_speaker"])
    page.paragraph(
        "Paired differences at the chosen depths, plus: more errors. Over seeds: Student's 95% interval of the mean "
        "of the pairs "
        f"(none for one seed). Over speakers: 95% of 10,000 draws of the {speakers} test speakers, the same for both "
        "models." + (" So few speakers make such an interval too narrow." if speakers < 10 else "")
    )


def _exits(data: _Data, page: Page) -> None:
    page.heading("An exit rule instead of a depth")
    metric, curves, rows = data.metrics[0], {}, []
    for model in data.models("scratch"):
        run = data.of("scratch", model)[0]
        if MODELS[model].depth != "fixed":
            for speech in ("test", "noisy"):
                points = [
                    (row[speech]["mean_depth"], 100 * _error(row[speech], metric)) for row in run.result["exit_curve"]
                ]
                if points:
                    curves[f"{model}, {'clean' if speech == 'test' else 'in noise'}"] = points
        depth = run.result["chosen_depth"]
        for kind, name in (("change", "exit"), ("entropy", "exit_entropy")):
            if name not in run.result:  # of an earlier version
                continue
            rule = run.result[name]["rule"]
            cells = [f"{model}, {kind}", "none" if rule["kind"] == "fixed" else f"{rule['threshold']:.3g}"]
            for speech in ("test", "noisy"):
                exits = run.result[name][speech]
                cells += [
                    f"{exits['mean_depth']:.2f}",
                    _percent(_error(exits, metric)),
                    _percent(run.error(metric, depth, speech)),
                ]
            rows.append(cells)
    if curves:
        drawn = figures.trade_figure(curves, f"{_TITLES[metric]} (%)")
        page.image("exits", figures.render(drawn), "errors against the mean depth of exits by change, clean and noisy")
    title = _TITLES[metric]
    page.table(
        ["model, seed 0", "threshold", "mean depth, clean", f"{title} (%)", "at the chosen depth",
         "mean depth, noise", f"{title} (%)", "at the chosen depth"],
        rows,
    )  # fmt: skip
    page.paragraph(
        "An utterance stops looping when its hidden state changes by less than the threshold, or when the entropy of "
        "CTC's posterior, mean over its outputs, falls below it (in nats). The threshold is the one of least mean depth "
        'that costs at most 1% (relative) more errors on the validation speech; "none": no threshold is worth it. The '
        f"plot is of the change. Noise: the test speech in white noise, {NOISE_DECIBELS:.0f} dB below the speech."
    )


def _inference(data: _Data, page: Page) -> None:
    page.heading("Inference time")
    if data.timing is None:
        page.paragraph("It was not measured.")
        return
    times, batch = data.timing.times["inference"], data.timing.times["batch"]
    seconds = batch["audio_seconds"]
    milliseconds = {
        model: {int(k): 1e3 * s / seconds for k, s in own["depth_s"].items()} for model, own in times.items()
    }
    page.image(
        "inference", figures.render(figures.time_figure(milliseconds)), "milliseconds per second of speech by depth"
    )
    deepest = max(max(by_depth) for by_depth in milliseconds.values())
    rows = []
    for model, own in times.items():
        front = 1e3 * own["features_s"] / seconds, 1e3 * own["front_end_s"] / seconds
        cells = [f"{milliseconds[model][k]:.2f}" if k in milliseconds[model] else "" for k in range(1, deepest + 1)]
        whole = (own["features_s"] + max(own["depth_s"].values())) / seconds
        rows.append([model, *(f"{x:.2f}" for x in front), *cells, f"{whole:.5f}"])
    page.table(
        [
            "ms per s of speech",
            "log-mel",
            "front end",
            *(f"depth {k}" for k in range(1, deepest + 1)),
            "real-time factor",
        ],
        rows,
    )
    page.paragraph(
        '"Depth" is the encoder from log-mel features on, front end included; the real-time factor is from audio at '
        "full depth. "
        f"{batch['utterances']} utterances ({seconds:.1f} s) in one batch, {batch['threads']} threads, median of "
        f"{batch['rounds']} "
        "rounds, each of which runs all models and depths in turn."
    )


def _consistency(data: _Data, page: Page) -> None:
    page.heading("Layer consistency")
    found = {}
    for kind, text in (("scratch", "trained"), ("probe", "pretrained"), ("random", "random weights")):
        for model in data.models(kind):
            run = data.of(kind, model)[0]
            if kind != "probe" or model == "C":
                found[f"{model}, {text}"] = {k: np.array(m) for k, m in run.result["consistency"].items()}
    shown = {name: found[name] for name in found if name.split(",")[0] in ("A", "C")}
    page.image(
        "consistency",
        figures.render(figures.consistency_figure(shown)),
        "heat maps of the measures of consistency between depths",
    )
    rows = []
    for name, matrices in found.items():
        mean = summarise(matrices)
        # runs of earlier versions lack nearest neighbours
        rows.append([name, *(f"{mean[m]:.3f}" if m in mean else "-" for m in MEASURES)])
    page.table(["mean of all pairs of depths from 1 on", *(NAMES[m] for m in MEASURES)], rows)
    page.paragraph(
        "Hidden states of the validation speech, seed 0. The paper does not name its measure; these are ours."
    )


def _pretraining(data: _Data, page: Page) -> None:
    if not data.models("pretrain"):
        return
    page.heading("Pretraining")
    gate = _probe_gate(data)
    if gate is not None:
        (page.paragraph if gate[0] else page.warning)(gate[1][0].upper() + gate[1][1:] + ".")
    if data.models("probe"):
        panels: dict[str, dict[str, dict[int, tuple[float, float | None]]]] = {}
        levels: dict[str, dict[str, float]] = {}
        for probe in PROBES:
            label = f"frames right (%), {'linear probe' if probe == 'linear' else 'hidden-layer probe'}"
            panels[label] = {}
            for kind, text in (("probe", "pretrained"), ("random", "random weights")):
                for model in data.models(kind):
                    panels[label][f"{model}, {text}"] = _probe_curve(data.of(kind, model), probe)
            floor = [
                row["accuracy"]
                for run in data.of("random", "C")
                for row in run.result["log_mel"]
                if row["probe"] == probe
            ]
            if floor:
                levels[label] = {"log-mel, 11 frames": 100 * statistics.fmean(floor)}
        drawn = figures.depth_figure(panels, levels)
        page.image("probes", figures.render(drawn), "accuracy of the phone probes by depth")
        rows = []
        for label, series in panels.items():
            rows += [
                [f"{name}: {label.split(', ')[1]}", *(_cell(v) for v in values.values())]
                for name, values in series.items()
            ]
            rows += [
                [f"{name}: {label.split(', ')[1]}", f"{value:.1f}"] for name, value in levels.get(label, {}).items()
            ]
        deepest = max(len(row) for row in rows) - 1
        page.table(
            ["frames right (%), depth", *map(str, range(1, deepest + 1))],
            [r + [""] * (deepest + 1 - len(r)) for r in rows],
        )
    rows = []
    for kind, text in (("pretrained", "fine-tuned"), ("frozen", "frozen, heads alone")):
        for model in data.models(kind):
            for metric in data.metrics:
                found = _difference(data.of("scratch", model), data.of(kind, model), metric)
                if found is not None:
                    _, runs = _paired(data.of("scratch", model), data.of(kind, model))
                    errors = [r.error(metric, r.result["chosen_depth"]) for r in runs]
                    cells = [_percent(*mean_and_error(errors)), _points(found.seeds), _points(found.speakers)]
                    rows.append([f"{model}, {text}", _TITLES[metric], *cells])
    if rows:
        page.table(
            ["pretrained encoder", "of", "errors (%)", "points against scratch, over seeds", "over speakers"], rows
        )
        page.paragraph(
            "As many steps with pretraining as without; minus: pretraining saves errors. Depths are chosen on "
            "validation speech."
        )


def _probe_curve(runs: Sequence[_Run], probe: str) -> dict[int, tuple[float, float | None]]:
    by_seed = [{row["depth"]: row["accuracy"] for row in run.result["rows"] if row["probe"] == probe} for run in runs]
    found = {}
    for k in by_seed[0]:
        mean, error = mean_and_error([accuracy[k] for accuracy in by_seed])
        found[k] = (100 * mean, None if error is None else 100 * error)
    return found


def _limits(data: _Data, page: Page) -> None:
    page.heading("What cannot be compared")
    hours = data.plan["speech"]["train"]["hours"]
    page.items(
        [
            f"The paper trains on LibriSpeech, up to 960 h; here {hours:.2f} h train. Error rates of the two have "
            "nothing to do "
            "with each other.",
            "The paper's sizes, depth, objective, probe, recogniser and hardware are not in its abstract, which is "
            "all that was "
            "at hand; the law of the depth is read as uniform over 1 ... N.",
            "The ratio of parameters grows with the number of depths: N layers can save at most a factor N.",
            "Phones come from an automatic alignment; frame accuracies and phone error rates are against that, not "
            "against "
            "hand labels.",
        ]
    )


def _commits(data: _Data) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for run in data.runs:
        found.setdefault(run.times["commit"], []).append(
            f"{run.kind}{'-' + run.model if run.model else ''} seed {run.seed}"
        )
    return found


def _provenance_warnings(data: _Data, page: Page) -> None:
    commits = _commits(data)
    if len(commits) > 1:
        said = "; ".join(f"{commit}: {', '.join(names)}" for commit, names in commits.items())
        page.warning(f"Runs of {len(commits)} commits of this package are mixed here. {said}.")
    machines = sorted({f"{r.times['machine']['device']}, {r.times['machine']['processor']}" for r in data.runs})
    if len(machines) > 1:
        page.warning(f"Runs of {len(machines)} machines are mixed here: {'; '.join(machines)}. All times are of one.")
    if data.missing:
        page.warning(f"Not complete: {len(data.missing)} of {len(data.plan['runs'])} runs ({', '.join(data.missing)}).")
    if not data.runs:
        page.paragraph("No run is complete.")


def _provenance(data: _Data, page: Page) -> None:
    page.heading("How this was made")
    page.code(data.plan["command"] or "(called from Python)")
    speech = data.plan["speech"]
    items = []
    for role, part in speech.items():
        who = f" ({', '.join(part['named'])})" if part["named"] else ""
        items.append(
            f"{role}: {part['corpus']}, {part['hours']:.2f} h, {part['utterances']} utterances of {part['speakers']} "
            f"speakers{who}"
        )
    seeds = sorted({r.seed for r in data.runs if r.model})
    items.append(f"seeds: {', '.join(map(str, seeds))}")
    items.append(f"commit of the package: {', '.join(_commits(data))}")
    for machine in {json.dumps(_machine(r.times["machine"])): _machine(r.times["machine"]) for r in data.runs}.values():
        items.append(machine)
    first = next((r for r in data.runs if r.kind == "scratch"), None)
    if first is not None:
        training = first.result["description"]["settings"]["training"]
        config, c = training["config"], ConformerConfig(**training["config"])
        items.append(
            f"encoder of {first.model}: N = {config['num_layers']}, width {config['d_model']}, {config['num_heads']} "
            "heads, "
            f"feed-forward {config['ffn_dim']}, kernel {config['conv_kernel_size']}, {c.subsampling_factor} frames of "
            "10 ms merged, "
            f"dropout {config['dropout']:g}"
        )
        tasks = ", ".join(
            f"{name} {weight:g}" for name, weight in training["tasks"].items() if name != "ctc_outputs" and weight
        )
        items.append(
            f"supervised: {training['steps']} steps of at most {training['batch_seconds']:g} s, "
            f"{_OPTIMIZERS[training.get('optimizer', 'adamw')]}, peak learning rate {training['learning_rate']:g}, weights of "
            f"the losses: {tasks}"
        )
    page.items(items)


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['device']}, {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; Python "
        f"{machine['python']}, PyTorch {machine['torch']}, lcconformer {machine['lcconformer']}"
    )
