"""Error rates at every depth and with an exit rule, from one pass over the speech."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ...data import IGNORE, PHONES, BadAudioError, Corpus, frame_count, frame_labels, plan_batches
from ...data.features import SAMPLE_RATE
from ...depth import ExitRule
from .model import Recogniser
from .units import normalise_text, phone_classes

__all__ = ["Reading", "best_depth", "calibrate_exit", "error_rates", "evaluate", "exit_depths", "read_corpus"]

_BATCH_SECONDS = 64.0  # most audio of a forward pass, padding included; a longer utterance goes alone
_THRESHOLDS = 40  # of the exit rule that are tried
_TOLERANCE = 0.01  # relative to the error at the chosen depth: what an exit rule may cost
_METRICS = ("per", "cer", "frame_error")  # the first one that there is decides


@dataclass(frozen=True)
class Reading:
    """What a model makes of one utterance at depths 1 ... N.

    id: the utterance. texts: for each of the model's units, N texts. references: what was said in these units; empty where
    unknown. correct: N numbers of 10 ms frames whose phone is right. labelled: number of frames whose phone is known.
    changes: N distances of the hidden state from the one before (:meth:`lcconformer.ExitRule.distance`, kind ``"change"``).
    """

    id: str
    texts: Mapping[str, tuple[str, ...]]
    references: Mapping[str, str]
    correct: tuple[int, ...]
    labelled: int
    changes: tuple[float, ...]


@torch.no_grad()
def read_corpus(
    model: Recogniser, corpus: Corpus, *, progress: Callable[[float], object] | None = None
) -> list[Reading]:
    """Read all speech at every depth, each utterance encoded once, in the order of the corpus.

    Args:
        model: the model, in evaluation mode; its device is used.
        corpus: speech with alignments or transcripts.  Unusable audio is left out with a warning.
        progress: called with the part that is done, 0 to 1.

    Raises:
        ValueError: none of the audio is usable.
    """
    device = model.features.window.device
    change = ExitRule("change")
    sizes = [u.num_samples for u in corpus]
    readings: dict[int, Reading] = {}
    done = 0
    for plan in plan_batches(sizes, budget=max(int(_BATCH_SECONDS * SAMPLE_RATE), *sizes)):
        audio = {}
        for index in plan:
            try:
                audio[index] = corpus.audio(corpus[index])
            except BadAudioError as error:
                corpus.skipped.add(corpus[index].source, str(error))
        done += sum(sizes[i] for i in plan)
        if not audio:
            continue
        samples = torch.tensor([len(a) for a in audio.values()])
        hidden, counts = model.hidden_states(
            pad_sequence(list(audio.values()), batch_first=True).to(device), samples.to(device)
        )
        at_depth = [model.logits(h, counts) for h in hidden[1:]]
        changes = [change.distance(new, old, counts).tolist() for old, new in itertools.pairwise(hidden)]
        texts = {name: [model.spell(logits, name) for logits in at_depth] for name in model.units}
        best = [None if x.frames is None else x.frames.argmax(-1).cpu() for x in at_depth]
        for row, index in enumerate(audio):
            utterance = corpus[index]
            labels = frame_labels(utterance, frame_count(utterance.num_samples))
            known = labels != IGNORE
            right = [0 if b is None else int((b[row, : len(labels)] == labels)[known].sum()) for b in best]
            readings[index] = Reading(
                utterance.id,
                {name: tuple(of_depth[row] for of_depth in spelled) for name, spelled in texts.items()},
                {
                    "phones": " ".join(PHONES[c] for c in phone_classes(utterance)),
                    "characters": normalise_text(utterance.text),
                },
                tuple(right),
                0 if best[0] is None else int(known.sum()),
                tuple(of_depth[row] for of_depth in changes),
            )
        if progress is not None:
            progress(done / sum(sizes))
    if not readings:
        raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")
    return [readings[index] for index in sorted(readings)]


def error_rates(readings: Sequence[Reading], depths: int | Sequence[int]) -> dict[str, Any]:
    """Error rates over all utterances, each read at a depth of its own or all at one.

    Returns:
        ``frame_accuracy``, ``per``, ``cer`` and ``wer`` (phones, characters, words; 1.0 is 100% and not the most) with
        the numbers ``frames``, ``phones``, ``characters``, ``words`` that they are over; where the model or the speech lacks
        one, it is absent.  ``mean_depth`` and ``utterances`` are always there.

    Raises:
        ImportError: jiwer is not installed.
    """
    try:
        import jiwer
    except ImportError as error:
        raise ImportError('error rates need jiwer: pip install "lcconformer[speech]"') from error

    chosen = [depths] * len(readings) if isinstance(depths, int) else list(depths)
    result: dict[str, Any] = {"mean_depth": sum(chosen) / len(chosen), "utterances": len(readings)}
    frames = sum(r.labelled for r in readings)
    if frames:
        correct = sum(r.correct[k - 1] for r, k in zip(readings, chosen))
        result |= {"frame_accuracy": correct / frames, "frames": frames}
    for units, names in (("phones", ("per",)), ("characters", ("cer", "wer"))):
        pairs = [
            (r.references[units], r.texts[units][k - 1])
            for r, k in zip(readings, chosen)
            if units in r.texts and r.references[units]
        ]
        if not pairs:
            continue
        said, read = [p[0] for p in pairs], [p[1] for p in pairs]
        for name in names:
            measured = jiwer.process_characters(said, read) if name == "cer" else jiwer.process_words(said, read)
            over = {"per": "phones", "cer": "characters", "wer": "words"}[name]
            total = measured.hits + measured.substitutions + measured.deletions
            rate = measured.cer if isinstance(measured, jiwer.CharacterOutput) else measured.wer
            result |= {name: rate, over: total}
    return result


def evaluate(
    model: Recogniser, corpus: Corpus, *, progress: Callable[[float], object] | None = None
) -> list[dict[str, Any]]:
    """Measure the error rates at depth 1 ... N: a row of :func:`error_rates` each, with its ``depth``.

    Args:
        model, corpus, progress: as for :func:`read_corpus`.

    Raises:
        ValueError: none of the audio is usable.
        ImportError: jiwer is not installed.
    """
    readings = read_corpus(model, corpus, progress=progress)
    return [{"depth": k, **error_rates(readings, k)} for k in range(1, model.config.num_layers + 1)]


def error_of(row: Mapping[str, Any]) -> float:
    """The error that decides: PER, without phones CER, without both the part of wrong frames.

    Raises:
        ValueError: the row has none of them.
    """
    errors = {**row, "frame_error": 1.0 - row["frame_accuracy"]} if "frame_accuracy" in row else row
    for name in _METRICS:
        if name in errors:
            return float(errors[name])
    raise ValueError("the speech has neither alignments nor transcripts that the model predicts: nothing to score")


def best_depth(rows: Sequence[Mapping[str, Any]]) -> int:
    """Depth of the row of :func:`evaluate` with the least error (PER, else CER, else frames); choose it on validation speech.

    Raises:
        ValueError: the rows have no error rate.
    """
    return int(min(rows, key=lambda row: (error_of(row), row["depth"]))["depth"])


def exit_depths(readings: Sequence[Reading], rule: ExitRule) -> list[int]:
    """Depths at which ``rule`` (``"fixed"`` or ``"change"``) stops the utterances, as ``adaptive`` of the encoder would."""
    depths = []
    for reading in readings:
        most = rule.depth or len(reading.changes)
        early = range(rule.min_depth, most) if rule.kind == "change" else ()
        small = [k for k in early if reading.changes[k - 1] < rule.threshold]
        depths.append(small[0] if small else most)
    return depths


def calibrate_exit(readings: Sequence[Reading], depth: int) -> ExitRule:
    """Choose the threshold of an exit rule on validation speech, for the least mean depth.

    Args:
        readings: of validation speech.
        depth: largest number of loops; the error may be at most 1% (relative) above the one at this depth.

    Returns:
        A rule of kind ``"change"``; of kind ``"fixed"`` if no threshold stops any utterance early without costing more.
    """
    fixed = ExitRule("fixed", depth=depth)
    allowed = (1.0 + _TOLERANCE) * error_of(error_rates(readings, depth))
    changes = torch.tensor([c for r in readings for c in r.changes[: depth - 1] if c > 0])
    if not len(changes):
        return fixed
    for threshold in changes.quantile(torch.linspace(1.0, 0.0, _THRESHOLDS)).tolist():
        rule = ExitRule("change", depth=depth, threshold=threshold)
        depths = exit_depths(readings, rule)
        # thresholds fall, so that depths grow
        if min(depths) == depth:
            break
        if error_of(error_rates(readings, depths)) <= allowed:
            return rule
    return fixed
