"""Encoder, features and objective in one module: what a pretraining run trains and a checkpoint holds."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import pretrained
from ..config import ConformerConfig
from ..data import LogMel
from ..encoder import ConformerEncoder
from ..ops.checks import frame_mask
from .checkpoint import Checkpoint, load_checkpoint
from .masking import Masks
from .objectives import ObjectiveSettings, make_objective

__all__ = ["FeatureSettings", "PretrainingModel", "check_layers", "check_model", "load_model"]


@dataclass(frozen=True)
class FeatureSettings:
    """Arguments of :class:`lcconformer.data.LogMel`: mel bins, and the edges of the filterbank in Hz."""

    num_bins: int = 80
    low_freq: float = 20.0
    high_freq: float = 8000.0


class PretrainingModel(nn.Module):
    """Encoder with front end and objective: audio in, self-supervised losses at the given depths out.

    Args:
        config: configuration of the encoder; ``input_dim`` must be the number of mel bins.
        features: settings of the log-mel features, which are normalised per utterance.
        objective: settings of the objective.

    Attributes: ``features`` (:class:`~lcconformer.data.LogMel`), ``encoder`` (:class:`~lcconformer.ConformerEncoder`),
    ``objective``.

    Raises:
        ValueError: ``config.input_dim`` is not ``features.num_bins``.
    """

    def __init__(self, config: ConformerConfig, features: FeatureSettings, objective: ObjectiveSettings) -> None:
        super().__init__()
        if config.input_dim != features.num_bins:
            raise ValueError(
                f"PretrainingModel: config.input_dim is {config.input_dim} but there are {features.num_bins} mel bins; "
                "make them equal"
            )
        self.feature_settings, self.objective_settings = features, objective
        self.features = LogMel(features.num_bins, features.low_freq, features.high_freq)
        self.encoder = ConformerEncoder(config)
        self.objective = make_objective(objective, config.d_model, features.num_bins, config.subsampling_factor)

    @property
    def config(self) -> ConformerConfig:
        return self.encoder.config

    def describe(self) -> dict[str, Any]:
        """Settings from which :meth:`from_description` builds the same model, ready for JSON."""
        return {
            "config": dataclasses.asdict(self.config),
            "features": dataclasses.asdict(self.feature_settings),
            "objective": dataclasses.asdict(self.objective_settings),
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> PretrainingModel:
        """Build a model, with new weights, from the result of :meth:`describe`.

        Raises:
            ValueError: a key is missing or unknown, or a value out of range.
        """
        try:
            settings = (
                ConformerConfig(**description["config"]),
                FeatureSettings(**description["features"]),
                ObjectiveSettings(**description["objective"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"PretrainingModel: the description does not fit this version ({error})") from error
        return cls(*settings)

    def hidden_states(self, audio: Tensor, lengths: Tensor, *, depth: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Run the encoder on unmasked speech and return its hidden states.

        Args:
            audio: ``[B, S]`` float, 16 kHz.
            lengths: ``[B]`` int64 samples.
            depth: number of loops; None: all N.

        Returns:
            ``depth + 1`` tensors ``[B, T', d_model]`` (``[0]`` is the input of the first loop) and ``[B]`` int64 frames T'.
        """
        features, frames = self.features(audio, lengths)
        _, out_lengths, hidden = self.encoder(features.to(self._dtype), frames, depth=depth, return_hidden_states=True)
        return hidden, out_lengths

    def forward(self, audio: Tensor, lengths: Tensor, masks: Masks, depths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Run the encoder once on masked speech and return the losses at several depths.

        Args:
            audio: ``[B, S]`` float, 16 kHz.
            lengths: ``[B]`` int64 samples.
            masks: result of :func:`~lcconformer.ssl.masking.draw_masks` for the frames of ``audio``.
            depths: K depths, the deepest first.

        Returns:
            sums: ``[K]``, the sum of the objective's terms at each depth.
            apart: scalar, squared difference of the shallower hidden states from the deepest, which gets no gradient from it:
            mean over channels and shallower depths, sum over frames without padding.  Zero for K = 1.
        """
        features, frames = self.features(audio, lengths)
        features = features.to(self._dtype)
        shown = self.objective.corrupt(features, masks)
        _, out_frames, hidden = self.encoder(shown, frames, depth=depths[0], return_hidden_states=True)
        sums = torch.stack([self.objective.loss(hidden[k], features, masks) for k in depths])
        if len(depths) == 1:
            return sums, sums.new_zeros(())
        teacher = hidden[depths[0]].detach()
        real = frame_mask(out_frames, teacher.shape[1])
        gaps = [((hidden[k] - teacher).square().mean(-1) * real).sum() for k in depths[1:]]
        return sums, torch.stack(gaps).mean()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype


def load_model(source: str | os.PathLike[str] | Checkpoint, device: torch.device | str = "cpu") -> PretrainingModel:
    """Load the model of a checkpoint, in evaluation mode.

    Args:
        source: a checkpoint file, the folder of a run (its newest checkpoint), or a loaded checkpoint.

    Raises:
        FileNotFoundError: there is no such file, or no checkpoint in the folder.
        ValueError: the file is no checkpoint, damaged, or its tensors do not fit its settings.
    """
    checkpoint = source if isinstance(source, Checkpoint) else load_checkpoint(source, prefix="model.")
    check_model(checkpoint)
    model = PretrainingModel.from_description(checkpoint.meta)
    model.load_state_dict(checkpoint.section("model."))
    return model.to(device).eval()


def check_model(checkpoint: Checkpoint) -> None:
    """Compare the model that a checkpoint describes with the tensors that it has, before any memory is taken for it.

    Raises:
        ValueError: the description is damaged or of a fine-tuned model, or they differ.
    """
    if "tasks" in checkpoint.meta:
        raise ValueError(
            f"{checkpoint.path} is a checkpoint of 'finetune', whose model recognises speech: load it with "
            "lcconformer.ssl.finetuning.load_recogniser, or give one of 'pretrain'"
        )
    check_layers(checkpoint)
    with torch.device("meta"):
        expected = PretrainingModel.from_description(checkpoint.meta).state_dict()
    checkpoint.check("model.", expected)


def check_layers(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint has as many tensors as the layers of its encoder need, before any module is built for them.

    Raises:
        ValueError: it has fewer, or the description of the encoder is damaged.
    """
    try:
        config = ConformerConfig(**checkpoint.meta["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint.path} does not fit this version ({error})") from error
    try:
        pretrained.check_layers(config, len(checkpoint.entries))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} does not fit its own settings: {error}") from error
