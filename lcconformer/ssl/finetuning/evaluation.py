"""Error rates at every depth and with an exit rule, from one pass over the speech."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...data import IGNORE, PHONES, BadAudioError, Corpus, Utterance, frame_count, frame_labels, plan_batches
from ...data.features import SAMPLE_RATE
from ...depth import ExitRule
from .beam_search import BeamSearch
from .model import Logits, Recogniser
from .units import normalise_text, phone_classes

__all__ = [
    "Heard",
    "Reading",
    "best_depth",
    "calibrate_exit",
    "calibrate_search",
    "error_rates",
    "evaluate",
    "exit_depths",
    "hear_corpus",
    "read_corpus",
    "search_rates",
]

_BATCH_SECONDS = 64.0  # most audio of a forward pass, padding included; a longer utterance goes alone
_THRESHOLDS = 40  # of the exit rule that are tried
_TOLERANCE = 0.01  # relative to the error at the chosen depth: what an exit rule may cost
_WEIGHTS, _PENALTIES = (0.5, 1.0, 1.5, 2.0), (0.0, 1.0, 2.0, 3.0)  # of a beam search that are tried
_CALIBRATED = 30_000  # outputs that they are tried on
_METRICS = ("per", "cer", "frame_error")  # the first one that there is decides


@dataclass(frozen=True)
class Reading:
    """What a model makes of one utterance at depths 1 ... N.

    id: the utterance. texts: for each of the model's units, N texts. references: what was said in these units; empty where
    unknown. correct: N numbers of 10 ms frames whose phone is right. labelled: number of frames whose phone is known.
    changes: N distances of the hidden state from the one before (:meth:`lcconformer.ExitRule.distance`, kind ``"change"``).
    entropies: N entropies of the posterior (:meth:`~lcconformer.ssl.finetuning.Recogniser.entropy`), unless
    nothing is spelled.
    """

    id: str
    texts: Mapping[str, tuple[str, ...]]
    references: Mapping[str, str]
    correct: tuple[int, ...]
    labelled: int
    changes: tuple[float, ...]
    entropies: tuple[float, ...] = ()


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
    change = ExitRule("change")
    readings: dict[int, Reading] = {}
    for indices, hidden, counts in _encode(model, corpus, None, progress):
        at_depth = [model.logits(h, counts) for h in hidden[1:]]
        changes = [change.distance(new, old, counts).tolist() for old, new in itertools.pairwise(hidden)]
        entropies = [model.entropy(logits).tolist() for logits in at_depth] if model.units else []
        texts = {name: [model.spell(logits, name) for logits in at_depth] for name in model.units}
        best = [None if x.frames is None else x.frames.argmax(-1).cpu() for x in at_depth]
        for row, index in enumerate(indices):
            utterance = corpus[index]
            labels = frame_labels(utterance, frame_count(utterance.num_samples))
            known = labels != IGNORE
            right = [0 if b is None else int((b[row, : len(labels)] == labels)[known].sum()) for b in best]
            readings[index] = Reading(
                utterance.id,
                {name: tuple(of_depth[row] for of_depth in spelled) for name, spelled in texts.items()},
                _references(utterance),
                tuple(right),
                0 if best[0] is None else int(known.sum()),
                tuple(of_depth[row] for of_depth in changes),
                tuple(of_depth[row] for of_depth in entropies),
            )
    return [readings[index] for index in sorted(readings)]


def _encode(
    model: Recogniser, corpus: Corpus, depth: int | None, progress: Callable[[float], object] | None
) -> Iterator[tuple[list[int], list[Tensor], Tensor]]:
    """Encode all speech in batches: the utterances' places in the corpus, hidden states and numbers of frames.

    Raises:
        ValueError: none of the audio is usable.
    """
    device = model.features.window.device
    sizes = [u.num_samples for u in corpus]
    done, usable = 0, False
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
        padded = pad_sequence(list(audio.values()), batch_first=True)
        usable = True
        yield list(audio), *model.hidden_states(padded.to(device), samples.to(device), depth=depth)
        if progress is not None:
            progress(done / sum(sizes))
    if not usable:
        raise ValueError(f"none of the audio of {corpus.name} is usable; Corpus.skipped says why")


def _references(utterance: Utterance) -> dict[str, str]:
    """What was said, in each of the units; empty where unknown."""
    return {
        "phones": " ".join(PHONES[c] for c in phone_classes(utterance)),
        "characters": normalise_text(utterance.text),
    }


@dataclass(frozen=True)
class Heard:
    """Logits ``[T'', V]`` of one utterance at one depth for what CTC spells, on the CPU, and what was said in these units."""

    id: str
    logits: Mapping[str, Tensor]
    references: Mapping[str, str]


@torch.no_grad()
def hear_corpus(model: Recogniser, corpus: Corpus, depth: int) -> list[Heard]:
    """Encode all speech at one depth, for beam searches over the same logits.

    Raises:
        ValueError: none of the audio is usable.
    """
    heard: dict[int, Heard] = {}
    for indices, hidden, counts in _encode(model, corpus, depth, None):
        logits = model.logits(hidden[-1], counts)
        rows = {name: values.float().cpu() for name, values in logits.units.items()}
        for row, (index, count) in enumerate(zip(indices, logits.counts.tolist())):
            own = {name: values[row, :count].clone() for name, values in rows.items()}
            heard[index] = Heard(corpus[index].id, own, _references(corpus[index]))
    return [heard[index] for index in sorted(heard)]


def search_rates(model: Recogniser, heard: Sequence[Heard], units: str, search: BeamSearch | None) -> dict[str, Any]:
    """Error rates of ``units`` (:func:`error_rates`) as a beam search finds them; None: on the best path."""
    readings = []
    for one in heard:
        logits = one.logits[units]
        spelled = model.spell(Logits(None, {units: logits[None]}, torch.tensor([len(logits)])), units, search)
        readings.append(Reading(one.id, {units: (spelled[0],)}, one.references, (0,), 0, (0.0,)))
    rates = error_rates(readings, 1)
    return {name: value for name, value in rates.items() if name not in ("mean_depth", "utterances")}


def calibrate_search(model: Recogniser, heard: Sequence[Heard], units: str, lm: str | os.PathLike[str]) -> BeamSearch:
    """Choose the weight of a language model and the penalty of the blank on validation speech, for the fewest errors.

    Args:
        model, heard: the model, and validation speech as it hears it; of more than 10 minutes a part is used.
        units: ``"phones"`` or ``"characters"``.
        lm: file of the language model.

    Raises:
        ImportError, FileNotFoundError, ValueError: see :class:`BeamSearch`.
        ValueError: nothing was said in these units.
    """
    tokens = model.tokens(units)
    outputs = sum(len(one.logits[units]) for one in heard)
    heard = heard[:: max(1, math.ceil(outputs / _CALIBRATED))]
    tried = [BeamSearch(tokens, lm, weight, penalty) for weight in _WEIGHTS for penalty in _PENALTIES]
    # of equals the first one
    return min(tried, key=lambda search: error_of(search_rates(model, heard, units, search)))


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
    """Depths at which ``rule`` (``"fixed"``, ``"change"`` or ``"entropy"``) stops the utterances, as ``transcribe`` would."""
    depths = []
    for reading in readings:
        most = rule.depth or len(reading.changes)
        early = () if rule.kind == "fixed" else range(rule.min_depth, most)
        small = [k for k in early if _measured(reading, rule.kind)[k - 1] < rule.threshold]
        depths.append(small[0] if small else most)
    return depths


def _measured(reading: Reading, kind: str) -> tuple[float, ...]:
    """What falls below the threshold of an exit rule, at each depth."""
    return reading.entropies if kind == "entropy" else reading.changes


def calibrate_exit(readings: Sequence[Reading], depth: int, kind: str = "change") -> ExitRule:
    """Choose the threshold of an exit rule on validation speech, for the least mean depth.

    Args:
        readings: of validation speech.
        depth: largest number of loops; the error may be at most 1% (relative) above the one at this depth.
        kind: ``"change"`` or ``"entropy"``.

    Returns:
        A rule of this kind; of kind ``"fixed"`` if no threshold stops any utterance early without costing more.
    """
    fixed = ExitRule("fixed", depth=depth)
    allowed = (1.0 + _TOLERANCE) * error_of(error_rates(readings, depth))
    found = torch.tensor([x for r in readings for x in _measured(r, kind)[: depth - 1] if x > 0])
    if not len(found):
        return fixed
    for threshold in found.quantile(torch.linspace(1.0, 0.0, _THRESHOLDS)).tolist():
        rule = ExitRule(kind, depth=depth, threshold=threshold)
        depths = exit_depths(readings, rule)
        # thresholds fall, so that depths grow
        if min(depths) == depth:
            break
        if error_of(error_rates(readings, depths)) <= allowed:
            return rule
    return fixed
