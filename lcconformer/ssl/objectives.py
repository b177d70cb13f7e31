"""Objectives: predict the masked frames themselves, or their labels from a random codebook.

An objective hides frames (``corrupt``), counts its terms on the host (``count``) and sums them over a batch (``loss``).  The
caller takes the mean, because only the caller knows how many terms the other ranks have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..validation import need_integer, need_number
from .masking import Masks

__all__ = ["BestRQ", "ObjectiveSettings", "Reconstruction", "make_objective"]

# (fraction, span) of the masks: as in Mockingjay and TERA; as in BEST-RQ, where a span of 400 ms starts at 1% of the frames
_MASKS = {"reconstruction": (0.15, 7), "best_rq": (0.4, 40)}
OBJECTIVES = tuple(_MASKS)
_LARGEST = 1 << 20  # span, size and width of the codebook
_NOISE = 0.1  # standard deviation of the noise that replaces masked frames (arXiv 2202.01855, section 4)


@dataclass(frozen=True)
class ObjectiveSettings:
    """Settings of an objective.

    Attributes:
        kind: ``"reconstruction"``: L1 on the masked frames; ``"best_rq"``: cross-entropy on random-projection labels.
        mask_fraction: part of the frames that is masked; None: 0.15 for reconstruction, 0.4 for BEST-RQ.
        mask_span: length of a masked span in frames; None: 7 for reconstruction, 40 for BEST-RQ.
        codebook_size, codebook_dim: number and width of the entries of BEST-RQ's codebook; 8192 and 16 in the paper.

    Raises:
        ValueError: a value out of range.
    """

    kind: str = "reconstruction"
    mask_fraction: float | None = None
    mask_span: int | None = None
    codebook_size: int = 8192
    codebook_dim: int = 16

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ValueError(f"objective is {self.kind!r}; expected one of {', '.join(_MASKS)}")
        need_number("ObjectiveSettings", "mask_fraction", self.fraction, 0, below=1, open=True)
        need_integer("ObjectiveSettings", "mask_span", self.span, 1, _LARGEST)
        need_integer("ObjectiveSettings", "codebook_size", self.codebook_size, 2, _LARGEST)
        need_integer("ObjectiveSettings", "codebook_dim", self.codebook_dim, 1, _LARGEST)

    @property
    def fraction(self) -> float:
        return _MASKS[self.kind][0] if self.mask_fraction is None else self.mask_fraction

    @property
    def span(self) -> int:
        return _MASKS[self.kind][1] if self.mask_span is None else self.mask_span


def _stack(x: Tensor, factor: int) -> Tensor:
    """Group frames: ``[B, T, C] -> [B * ceil(T / factor), factor, C]``, the last group padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % factor)).reshape(-1, factor, x.shape[2])


class Reconstruction(nn.Module):
    """L1 distance between masked frames and their prediction, mean over bins (Mockingjay, arXiv 1910.12638).

    The head is Linear, GELU, LayerNorm, Linear.  Each output of an encoder that merges ``factor`` frames predicts all of them;
    only chosen frames count.

    Args:
        d_model: width of the encoder.
        num_bins: C, width of the features.
        factor: number of input frames per encoder output.
    """

    bert = True

    def __init__(self, d_model: int, num_bins: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.head = nn.Sequential(
            nn.Linear(d_model, d_model), nn.GELU(), nn.LayerNorm(d_model), nn.Linear(d_model, factor * num_bins)
        )

    def corrupt(self, features: Tensor, masks: Masks) -> Tensor:
        """The features ``[B, T, C]`` with masked frames zeroed or replaced, as the encoder sees them."""
        shown = features.gather(1, masks.source[..., None].expand_as(features))
        return shown.masked_fill(masks.hidden[..., None], 0.0)

    def count(self, masks: Masks) -> int:
        """Number of terms of the loss: one per chosen frame."""
        return masks.num_chosen

    def loss(self, hidden: Tensor, features: Tensor, masks: Masks) -> Tensor:
        """Sum of the loss over the chosen frames, in the dtype of ``features``.

        Args:
            hidden: ``[B, T', d_model]``, output of the encoder.
            features: ``[B, T, C]`` before masking.
            masks: the masks of the batch.
        """
        predicted = self.head(hidden.flatten(0, 1)[masks.outputs]).to(features.dtype)  # [n, factor * C]
        target = _stack(features, self.factor)[masks.outputs]  # [n, factor, C]
        weight = _stack(masks.chosen[..., None].to(features.dtype), self.factor)[masks.outputs]  # [n, factor, 1]
        error = (predicted.view_as(target) - target).abs()
        return (error.mean(-1, keepdim=True) * weight).sum()


class BestRQ(nn.Module):
    """Cross-entropy on the labels of a random-projection quantizer (BEST-RQ, arXiv 2202.01855).

    Masked frames are replaced by noise N(0, 0.1^2), as in the paper.  The frames that an encoder output covers are projected
    by a random matrix; their label is the nearest entry of a random codebook, projection and entries being l2-normalised.
    Matrix and codebook are never trained; they are stored with the model.

    Args:
        d_model, num_bins, factor: as for :class:`Reconstruction`.
        codebook_size, codebook_dim: number and width of the codebook's entries.
    """

    bert = False
    projection: Tensor
    codebook: Tensor

    def __init__(self, d_model: int, num_bins: int, factor: int, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.factor = factor
        self.head = nn.Linear(d_model, codebook_size)
        self.register_buffer("projection", nn.init.xavier_uniform_(torch.empty(factor * num_bins, codebook_dim)))
        self.register_buffer("codebook", F.normalize(torch.randn(codebook_size, codebook_dim), dim=-1))

    def corrupt(self, features: Tensor, masks: Masks) -> Tensor:
        """The features ``[B, T, C]`` with masked frames replaced by noise, which torch's generator draws."""
        return torch.where(masks.hidden[..., None], _NOISE * torch.randn_like(features), features)

    def count(self, masks: Masks) -> int:
        """Number of terms of the loss: one per masked encoder output."""
        return len(masks.outputs)

    @torch.no_grad()
    def labels(self, features: Tensor) -> Tensor:
        """Labels of all encoder outputs: features ``[B, T, C]`` -> ``[B * T']`` int64."""
        with torch.autocast(features.device.type, enabled=False):
            projected = _stack(features, self.factor).flatten(1).to(self.projection.dtype) @ self.projection
            # all vectors have unit length: the nearest entry is the one with the largest product
            return (F.normalize(projected, dim=-1) @ self.codebook.T).argmax(-1)

    def loss(self, hidden: Tensor, features: Tensor, masks: Masks) -> Tensor:
        """Sum of the loss over the masked outputs, in nats.  See :meth:`Reconstruction.loss`."""
        logits = self.head(hidden.flatten(0, 1)[masks.outputs]).to(features.dtype)  # [n, codebook_size]
        return F.cross_entropy(logits, self.labels(features)[masks.outputs], reduction="sum")


def make_objective(settings: ObjectiveSettings, d_model: int, num_bins: int, factor: int) -> Reconstruction | BestRQ:
    """Build the objective for an encoder of width ``d_model`` that merges ``factor`` frames of ``num_bins`` bins."""
    if settings.kind == "reconstruction":
        return Reconstruction(d_model, num_bins, factor)
    return BestRQ(d_model, num_bins, factor, settings.codebook_size, settings.codebook_dim)
