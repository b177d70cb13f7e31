"""Encoder with heads for frame labels, phones and characters: what a fine-tuning run trains and a checkpoint holds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...config import ConformerConfig
from ...data import IGNORE, PHONES, LogMel
from ...depth import ExitRule
from ...encoder import ConformerEncoder
from ...ops.checks import frame_mask
from ...validation import need_integer, need_number
from ..checkpoint import Checkpoint, load_checkpoint
from ..model import FeatureSettings, check_layers
from .beam_search import BeamSearch
from .units import BLANK, Targets, greedy

__all__ = ["UNITS", "Logits", "Recogniser", "TaskSettings", "load_recogniser"]

UNITS = ("phones", "characters")
"""What CTC spells."""
_MOST_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class TaskSettings:
    """What is predicted: the weight of each prediction in the loss; without a weight there is no head for it.

    Attributes:
        frames: weight of the cross-entropy on the phone of each 10 ms frame.
        phones: weight of CTC on the phones of the alignment.
        characters: weight of CTC on the transcript.
        ctc_outputs: CTC outputs per encoder output, 1 or more; they must outnumber phones or characters.

    Raises:
        ValueError: a value out of range, or no positive weight.
    """

    frames: float = 1.0
    phones: float = 1.0
    characters: float = 0.3
    ctc_outputs: int = 2

    def __post_init__(self) -> None:
        for name in ("frames", *UNITS):
            need_number("TaskSettings", name, getattr(self, name), 0)
        need_integer("TaskSettings", "ctc_outputs", self.ctc_outputs, 1, 64)
        if not any((self.frames, self.phones, self.characters)):
            raise ValueError(
                "TaskSettings: frames, phones and characters are all 0; give one of them a positive weight"
            )


@dataclass(frozen=True)
class Logits:
    """Predictions for a batch.

    frames: ``[B, T, 40]`` for 10 ms frames, T a multiple of the encoder's subsampling factor, or None. units: ``[B, T'', V]``
    for what of phones and characters is trained. counts: ``[B]`` int64 CTC outputs T'' of each utterance without padding.
    """

    frames: Tensor | None
    units: dict[str, Tensor]
    counts: Tensor


class Recogniser(nn.Module):
    """Encoder with one linear head per task, shared by all depths.

    Args:
        config: configuration of the encoder; ``input_dim`` must be the number of mel bins.
        features: settings of the log-mel features, which are normalised per utterance.
        tasks: what is predicted.
        alphabet: the characters that can be spelled.

    Attributes: ``features`` (:class:`~lcconformer.data.LogMel`), ``encoder`` (:class:`~lcconformer.ConformerEncoder`),
    ``heads``.

    Raises:
        ValueError: ``config.input_dim`` is not ``features.num_bins``; the alphabet is empty though characters are predicted,
            or has a character twice.
    """

    def __init__(self, config: ConformerConfig, features: FeatureSettings, tasks: TaskSettings, alphabet: str) -> None:
        super().__init__()
        if config.input_dim != features.num_bins:
            raise ValueError(
                f"Recogniser: config.input_dim is {config.input_dim} but there are {features.num_bins} mel bins; "
                "make them equal"
            )
        if not isinstance(alphabet, str) or len({*alphabet}) != len(alphabet) or len(alphabet) > _MOST_CHARACTERS:
            raise ValueError(f"Recogniser: alphabet is {alphabet!r:.60}; expected a string of different characters")
        if tasks.characters and not alphabet:
            raise ValueError(
                "Recogniser: characters are to be predicted but the alphabet is empty: the speech has no transcripts; "
                "set the weight of characters to 0"
            )
        self.feature_settings, self.tasks, self.alphabet = features, tasks, alphabet
        self.features = LogMel(features.num_bins, features.low_freq, features.high_freq)
        self.encoder = ConformerEncoder(config)
        sizes = {
            "frames": config.subsampling_factor * len(PHONES),
            "phones": tasks.ctc_outputs * len(PHONES),
            "characters": tasks.ctc_outputs * (1 + len(alphabet)),
        }
        heads = {name: nn.Linear(config.d_model, size) for name, size in sizes.items() if getattr(tasks, name)}
        self.heads = nn.ModuleDict(heads)

    @property
    def config(self) -> ConformerConfig:
        return self.encoder.config

    @property
    def units(self) -> tuple[str, ...]:
        """What it can spell: phones, characters or both."""
        return tuple(name for name in UNITS if name in self.heads)

    def describe(self) -> dict[str, Any]:
        """Settings from which :meth:`from_description` builds the same model, ready for JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "features": dataclasses.asdict(self.feature_settings),
            "tasks": dataclasses.asdict(self.tasks),
            "alphabet": self.alphabet,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Recogniser:
        """Build a model, with new weights, from the result of :meth:`describe`.

        Raises:
            ValueError: a key is missing or unknown, or a value out of range.
        """
        try:
            settings = (
                ConformerConfig(**description["config"]),
                FeatureSettings(**description["features"]),
                TaskSettings(**description["tasks"]),
                description["alphabet"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"Recogniser: the description does not fit this version ({error})") from error
        return cls(*settings)

    def logits(self, hidden: Tensor, counts: Tensor) -> Logits:
        """Predictions from a hidden state ``[B, T', d_model]`` with ``counts`` ``[B]`` int64 frames T'."""
        b, t, _ = hidden.shape
        each = self.tasks.ctc_outputs
        units = {name: self.heads[name](hidden).view(b, t * each, -1) for name in self.units}
        frames = self.heads["frames"](hidden).view(b, -1, len(PHONES)) if "frames" in self.heads else None
        return Logits(frames, units, counts * each)

    def entropy(self, logits: Logits) -> Tensor:
        """Entropy ``[B]`` of the posterior, in nats, mean over an utterance's CTC outputs: of phones, else of characters.

        Raises:
            ValueError: neither was trained.
        """
        if not self.units:
            raise ValueError(
                "this model has no CTC output whose entropy could be measured: it was trained on frame labels"
            )
        spoken = logits.units[self.units[0]].float().log_softmax(-1)
        each = -(spoken.exp() * spoken).sum(-1)  # [B, T'']
        real = frame_mask(logits.counts, each.shape[1])
        return (each * real).sum(1) / logits.counts.clamp(min=1)

    def hidden_states(
        self, audio: Tensor, lengths: Tensor, *, depth: int | None = None, hide: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Run the encoder and return its hidden states.

        Args:
            audio: ``[B, S]`` float, 16 kHz.
            lengths: ``[B]`` int64 samples.
            depth: number of loops; None: all N.
            hide: ``[B, T, C]`` bool, features to set to zero, their mean; None: nothing.

        Returns:
            ``depth + 1`` tensors ``[B, T', d_model]`` (``[0]`` is the input of the first loop) and ``[B]`` int64 frames T'.
        """
        features, frames = self._features(audio, lengths)
        if hide is not None:
            features = features.masked_fill(hide, 0.0)
        _, out_lengths, hidden = self.encoder(features, frames, depth=depth, return_hidden_states=True)
        return hidden, out_lengths

    def loss(self, logits: Logits, targets: Targets) -> Tensor:
        """Weighted sum of the losses: cross-entropy per labelled 10 ms frame, CTC per phone and per character."""
        total = logits.counts.new_zeros((), dtype=torch.float32)
        if logits.frames is not None:
            frames = logits.frames[:, : targets.frames.shape[1]].float()
            known = (targets.frames != IGNORE).sum().clamp(min=1)
            sums = F.cross_entropy(frames.flatten(0, 1), targets.frames.flatten(), ignore_index=IGNORE, reduction="sum")
            total = total + self.tasks.frames * sums / known
        for name, classes, counts in (
            ("phones", targets.phones, targets.phone_counts),
            ("characters", targets.characters, targets.character_counts),
        ):
            if name in logits.units:
                spoken = logits.units[name].float().log_softmax(-1).transpose(0, 1)  # [T'', B, V]
                # an utterance without a target is not an empty one; one that is too short to be spelled has no gradient
                each = F.ctc_loss(
                    spoken, classes, logits.counts, counts, blank=BLANK, reduction="none", zero_infinity=True
                )
                sums = each.where(counts > 0, 0.0).sum()
                total = total + getattr(self.tasks, name) * sums / counts.sum().clamp(min=1)
        return total

    def forward(
        self, audio: Tensor, lengths: Tensor, targets: Targets, depths: tuple[int, ...], hide: Tensor | None = None
    ) -> Tensor:
        """Run the encoder once and return the loss at each of K ``depths``, the deepest first: ``[K]``."""
        hidden, counts = self.hidden_states(audio, lengths, depth=depths[0], hide=hide)
        return torch.stack([self.loss(self.logits(hidden[k], counts), targets) for k in depths])

    @torch.no_grad()
    def transcribe(
        self,
        audio: Tensor,
        lengths: Tensor | None = None,
        *,
        units: str | None = None,
        depth: int | None = None,
        rule: ExitRule | None = None,
        search: BeamSearch | None = None,
    ) -> tuple[list[str], list[int]]:
        """Spell what is said, on CTC's best path or as a beam search finds.

        Args:
            audio: ``[B, S]`` float, 16 kHz.
            lengths: ``[B]`` int64 samples; None: all S.
            units: ``"phones"`` or ``"characters"``; None: characters if they were trained, else phones.
            depth: number of loops; None: all N, or as ``rule`` says.
            rule: when to stop looping, instead of ``depth``.
            search: over :meth:`tokens` of ``units``; None: the best path.

        Returns:
            B texts (phones are separated by spaces) and the number of loops that each took.

        Raises:
            ValueError: the units were not trained; both ``depth`` and ``rule`` are given; wrong shapes or depth.
        """
        units = self.choose_units(units)
        if depth is not None and rule is not None:
            raise ValueError("transcribe: depth and rule are both given; choose one")
        if lengths is None:
            lengths = torch.full((audio.shape[0],), audio.shape[-1], dtype=torch.int64, device=audio.device)
        fixed = ExitRule("fixed", depth=self.config.num_layers if depth is None else depth)

        def entropy(new: Tensor, old: Tensor, counts: Tensor | None) -> Tensor:
            assert counts is not None
            return self.entropy(self.logits(new, counts))

        measure = entropy if rule is not None and rule.kind == "entropy" else None
        features = self._features(audio, lengths)
        output, counts, depths = self.encoder.adaptive(*features, rule or fixed, measure=measure)
        assert counts is not None
        logits = self.logits(output, counts)
        return self.spell(logits, units, search), depths.tolist()

    def choose_units(self, units: str | None) -> str:
        """``units``; of None, characters if they were trained, else phones.

        Raises:
            ValueError: they were not trained.
        """
        if units is None and self.units:
            return self.units[-1]
        if units not in self.units:
            trained = ", ".join(self.units) or "nothing (frame labels alone)"
            raise ValueError(f"this model cannot spell {units or 'anything'}: it was trained to spell {trained}")
        return units

    def tokens(self, units: str) -> tuple[str, ...]:
        """What a language model calls the classes of ``units``: the blank, then phones or characters, a space as ``|``."""
        named = PHONES[1:] if units == "phones" else self.alphabet.replace(" ", "|")
        return ("<blank>", *named)

    def spell(self, logits: Logits, units: str, search: BeamSearch | None = None) -> list[str]:
        """The B texts on CTC's best path, or what ``search`` finds.

        Raises:
            ValueError: the search is over other tokens.
        """
        if search is not None and search.tokens != self.tokens(units):
            raise ValueError(
                f"the beam search is over {len(search.tokens)} tokens, {' '.join(search.tokens[:4])} ..., and not over this "
                f"model's {units}: build it with model.tokens({units!r})"
            )
        decode = greedy if search is None else search
        rows = zip(logits.units[units], logits.counts.tolist())
        classes: list[Sequence[int]] = [decode(row[:count]) for row, count in rows]
        if units == "phones":
            return [" ".join(PHONES[c] for c in row) for row in classes]
        return ["".join(self.alphabet[c - 1] for c in row).strip() for row in classes]

    def _features(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, frames = self.features(audio, lengths)
        return features.to(next(self.encoder.parameters()).dtype), frames


def load_recogniser(source: str | os.PathLike[str] | Checkpoint, device: torch.device | str = "cpu") -> Recogniser:
    """Load the model of a checkpoint of :func:`~lcconformer.ssl.finetuning.finetune`, in evaluation mode.

    Args:
        source: a checkpoint file, the folder of a run (its newest checkpoint), or a loaded checkpoint.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is no checkpoint of a fine-tuned model, damaged, or its tensors do not fit its settings.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source, prefix="model.")
    if "tasks" not in checkpoint.meta:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of 'pretrain', which has nothing to spell with: give one of "
            "'lcconformer finetune'"
        )
    check_layers(checkpoint)
    with torch.device("meta"):
        expected = Recogniser.from_description(checkpoint.meta).state_dict()
    checkpoint.check("model.", expected)
    model = Recogniser.from_description(checkpoint.meta)
    model.load_state_dict(checkpoint.section("model."))
    return model.to(device).eval()
