"""Report of the demo: plots, and one HTML page that contains them."""

from __future__ import annotations

import base64
import datetime
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime import write_atomically
from ..evaluation import figures
from ..evaluation.classifiers import PROBES
from ..evaluation.consistency import MEASURES, NAMES
from ..evaluation.output import html_document
from ..evaluation.probes import LOG_MEL
from .summary import PAPER_NOTE, depth_table, layers, percent, remarks, summary

__all__ = ["write_report"]


def write_report(out: Path, results: Mapping[str, Any]) -> Path:
    """Write ``report.html``, and its plots as PNG files, to ``out``; returns the path of the page."""
    images = {name: figures.render(figure) for name, figure in _figures(results).items()}
    for name, image in images.items():
        write_atomically(out / f"{name}.png", image)
    return write_atomically(out / "report.html", _page(results, images))


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    training = results["training"]
    loss = "L1 on masked frames (standard deviations)" if _reconstructs(results) else "cross-entropy (nats)"
    steps = max(len(t["loss"]) for t in training.values())
    drawn = {
        "training_loss": figures.loss_figure(
            {name: list(zip(t["elapsed"], t["loss"])) for name, t in training.items()}, loss, max(1, steps // 15)
        ),
        "held_out_loss": figures.depth_loss_figure({name: t["held_out_loss"] for name, t in training.items()}, loss),
        "consistency": figures.consistency_figure(
            {
                name: {key: np.array(m) for key, m in matrices.items() if key != "summary"}
                for name, matrices in results["consistency"].items()
            }
        ),
        "inference_time": figures.time_figure(
            {
                name: {int(k): v for k, v in by_depth.items()}
                for name, by_depth in results["inference"]["ms_per_second"].items()
            }
        ),
    }
    if results["probe"]:
        rows = results["probe"]["rows"]
        accuracy: dict[str, dict[str, dict[int, float]]] = {}
        for row in rows:
            if row["features"] != LOG_MEL:
                accuracy.setdefault(row["probe"], {}).setdefault(row["features"], {})[row["depth"]] = row["accuracy"]
        floor = {row["probe"]: row["accuracy"] for row in rows if row["features"] == LOG_MEL}
        chosen = {probe: results["smallest_depth"][probe]["depth"] for probe in PROBES}
        drawn["probe_accuracy"] = figures.accuracy_figure(accuracy, floor, chosen)
    return drawn


def _reconstructs(results: Mapping[str, Any]) -> bool:
    return results["setup"]["objective"]["kind"] == "reconstruction"


def _page(results: Mapping[str, Any], images: Mapping[str, bytes]) -> str:
    setup = results["setup"]
    machine = setup["machine"]
    date = datetime.datetime.fromisoformat(machine["date"]).strftime("%Y-%m-%d %H:%M UTC")

    def image(name: str, text: str) -> str:
        data = base64.b64encode(images[name]).decode()
        return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>'

    saving, batch = results["saving"], results["inference"]["batch"]
    parts = ["<h2>In short</h2>", _table([["", "this run", "the paper"]], summary(results)), _note(PAPER_NOTE)]
    parts += [
        "<h2>Training: depth sampled for every step against all loops</h2>",
        _table(*_training_table(results)),
        _note(
            f"The run with sampled depth went through {percent(saving['loops_saved'])} fewer loops (expected for uniform "
            f"sampling: {percent(saving['loops_saved_expected'])}). It saved {percent(saving['time_saved'])} of the "
            f"wall-clock time and {percent(saving['cpu_time_saved'])} of the processor time; features, front end, loss and "
            "update take the same time in both runs. The runs followed each other, so other load on the machine may have "
            "slowed down one of them; if so, the two percentages differ."
        ),
        image("training_loss", "training loss over time"),
        image("held_out_loss", "held-out loss at every depth"),
        "<h2>Layer consistency: how alike the depths are</h2>",
        image("consistency", "heat maps of the measures of consistency between depths"),
        _table(*_consistency_table(results)),
        _note(
            "Means over all pairs of different depths from 1 on. The control has untrained weights: what it reaches comes "
            "from the residual connections alone. The measures are our choice; the paper does not name its own."
        ),
    ]
    header, rows = depth_table(results)
    parts.append("<h2>What each depth knows, and what it costs</h2>")
    if results["probe"]:
        parts.append(image("probe_accuracy", "phone frame accuracy of the probes by depth"))
    parts += [
        image("inference_time", "inference time by depth"),
        _table(header, rows),
        *(_note(text) for text in remarks(results)),
        "<h2>How this was measured</h2>",
        _list(
            f"Encoder: {_config(setup['config'])}.",
            f"Objective: {setup['objective']['kind'].replace('_', ' ')}; AdamW, peak learning rate "
            f"{setup['training']['learning_rate']:g}, batches of {setup['training']['batch_seconds']:g} s; seed "
            f"{setup['training']['seed']}. Both runs start from the same weights and see the same batches and masks.",
            f"Training speech: {_speech(setup['train'])}. Test speech: {_speech(setup['test'])}.",
            "Training and test speech have the same speaker: accuracies cannot be compared with published ones."
            if setup["train"]["speakers"] == setup["test"]["speakers"] == 1
            else "Training and test speech share no utterance.",
            f"Inference time: {batch['utterances']} utterances ({batch['audio_seconds']:.1f} s of speech) in one batch, "
            f"median of {batch['rounds']} rounds, each of which runs all depths.",
            f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; "
            f"{machine['system']}; Python {machine['python']}, PyTorch {machine['torch']}, lcconformer "
            f"{machine['lcconformer']}.",
            f"The whole demo took {setup['wall_seconds']:.0f} s of wall-clock time and {setup['cpu_seconds']:.0f} s of "
            f"processor time, on {date}.",
        ),
        _note("The same numbers, and more of them, are in results.json beside this page."),
    ]
    where = (
        f"{date} · {machine['processor']}, {machine['threads']} threads · PyTorch {machine['torch']} · "
        "every number measured in this run"
    )
    title = f"One Conformer layer, looped {layers(results)} times: what it saves and what it costs"
    body = [f"<h1>{html.escape(title)}</h1>", _note(where), *parts]
    return html_document("lcconformer demo", "\n".join(body))


def _training_table(results: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    training = results["training"]
    rows = [
        ("steps", "steps", "{:d}"),
        ("mean loops a step", "mean_depth", "{:.2f}"),
        ("wall-clock time (s)", "seconds", "{:.1f}"),
        ("processor time after the first step (s)", "cpu_seconds", "{:.1f}"),
        ("utterances per second", "utterances_per_second", "{:.1f}"),
        ("speech seen (h)", "speech_hours", "{:.2f}"),
        ("training loss, mean of the last tenth", "final_loss", "{:.4f}"),
    ]
    return [["", *training]], [[title, *(form.format(t[key]) for t in training.values())] for title, key, form in rows]


def _consistency_table(results: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    rows = [
        [name, *(f"{matrices['summary'][key]:.3f}" for key in MEASURES)]
        for name, matrices in results["consistency"].items()
    ]
    return [["", *(NAMES[key] for key in MEASURES)]], rows


def _config(config: Mapping[str, Any]) -> str:
    return (
        f"N = {config['num_layers']} loops of one layer, width {config['d_model']}, {config['num_heads']} heads, feed-forward "
        f"{config['ffn_dim']}, kernel {config['conv_kernel_size']}, {config['position']} positions, "
        f"{config['subsampling_factor']} log-mel frames of 10 ms merged into one"
    )


def _speech(corpus: Mapping[str, Any]) -> str:
    return (
        f"{corpus['corpus']}, {corpus['utterances']} utterances, {corpus['minutes']:.1f} minutes, "
        f"speakers: {corpus['speakers']}"
    )


def _table(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, text: str, span: int = 1) -> str:
        # leading spaces mark a row that belongs to the one above
        indent = "&nbsp;" * 3 * (text != text.lstrip())
        return f"<{tag}{f' colspan={span}' * (span > 1)}>{indent}{html.escape(text.strip())}</{tag}>"

    head = ""
    for row in header:
        # empty cells after a name: it spans these columns too
        starts = [i for i, text in enumerate(row) if text or i == 0]
        spans = [end - start for start, end in zip(starts, [*starts[1:], len(row)])]
        head += "<tr>" + "".join(cell("th", row[i], span) for i, span in zip(starts, spans)) + "</tr>"
    body = "\n".join("<tr>" + "".join(cell("td", text) for text in row) + "</tr>" for row in rows)
    return f"<table><thead>{head}</thead><tbody>\n{body}\n</tbody></table>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _list(*items: str) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
