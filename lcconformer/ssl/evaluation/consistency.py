"""Layer consistency (arXiv 2105.00812): how alike the hidden states of different depths are.

The paper observes that with shared weights the *distributions* of the embeddings of different layers are similar, but does
not say how it measured that.  Here are four measures of our own for every pair of depths:

- ``cosine``: cosine similarity of a frame's two vectors, mean over frames; 1 where the depths agree vector by vector;
- ``cka``: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414, equation 3), from 0 to 1.  It ignores
  rotation, shift and scale, so 1 means the same information, possibly in other coordinates;
- ``knn``: mutual k-nearest neighbours (Huh et al. 2024, arXiv 2405.07987): of the 10 frames that are nearest to a frame by
  cosine, the part that both depths agree on, mean over frames; 1 for the same neighbourhoods, k / (F - 1) by chance.  Over
  at most 2048 of the frames, evenly spaced, because more frames make nearer neighbours, and squared cost;
- ``frechet``: squared Fréchet distance of the Gaussians fitted to the two sets of frames,
  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2) (Dowson & Landau 1982), divided by |m1 - m2|^2 + tr(S1 + S2).  The
  division makes it independent of the unit: 0 for equal distributions, 1 for distributions with nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...data import Corpus
from ..model import PretrainingModel
from .hidden_states import choose_frames, collect_states

__all__ = ["MEASURES", "NAMES", "consistency", "model_consistency", "summarise"]

MEASURES = ("cosine", "cka", "knn", "frechet")
NAMES = {"cosine": "cosine", "cka": "CKA", "knn": "nearest neighbours", "frechet": "Fréchet distance"}
"""What tables call the measures."""
_NEIGHBOURS = 10
_NEIGHBOUR_FRAMES = 2048


@torch.no_grad()
def consistency(hidden_states: Sequence[Tensor]) -> dict[str, np.ndarray]:
    """Compute the four measures for every pair of depths.

    Args:
        hidden_states: N+1 tensors ``[F, D]`` of the same F frames, without padding, of any floating dtype; the computation
            is in float64.  CKA of few frames is biased upwards: take F well above D.

    Returns:
        ``{"cosine", "cka", "knn", "frechet"}``, each float64 ``[N+1, N+1]``, symmetric.

    Raises:
        ValueError: there are no hidden states, their shapes differ, they have fewer than 2 frames, or values are not finite.
    """
    if not hidden_states:
        raise ValueError("consistency: no hidden states; expected N+1 tensors [F, D]")
    shapes = {tuple(h.shape) for h in hidden_states}
    if len(shapes) > 1 or hidden_states[0].dim() != 2 or hidden_states[0].shape[0] < 2:
        raise ValueError(
            f"consistency: hidden states have shapes {sorted(map(list, shapes))}; expected one shape [F, D], F >= 2"
        )
    states = [h.double() for h in hidden_states]
    if not all(bool(h.isfinite().all()) for h in states):
        raise ValueError("consistency: hidden states hold NaN or infinity")
    frames = states[0].shape[0]
    unit = [torch.nn.functional.normalize(h, dim=1) for h in states]
    means = [h.mean(0) for h in states]
    centred = [h - m for h, m in zip(states, means)]
    covariances = [h.T @ h / frames for h in centred]  # [D, D]
    roots = [_root(s) for s in covariances]
    sizes = [s.norm() for s in covariances]
    spreads = [s.trace() for s in covariances]
    near = [_neighbours(u[:: math.ceil(frames / _NEIGHBOUR_FRAMES)]) for u in unit]

    n = len(states)
    out = {name: np.zeros((n, n)) for name in MEASURES}
    for i in range(n):
        for j in range(i, n):
            pair = {
                "cosine": float((unit[i] * unit[j]).sum(1).mean()),
                "cka": _ratio((centred[i].T @ centred[j] / frames).square().sum(), sizes[i] * sizes[j], 1.0),
                "knn": float((near[i] & near[j]).sum() / near[i].sum()),
            }
            shift = (means[i] - means[j]).square().sum()
            total = shift + spreads[i] + spreads[j]
            common = torch.linalg.eigvalsh(roots[i] @ covariances[j] @ roots[i]).clamp(min=0).sqrt().sum()
            pair["frechet"] = 0.0 if i == j else max(_ratio(total - 2.0 * common, total, 0.0), 0.0)
            for name, value in pair.items():
                out[name][i, j] = out[name][j, i] = value
    return out


def _neighbours(unit: Tensor) -> Tensor:
    """Which frames are among the nearest of each frame, itself left out: ``[F, F]`` bool of unit vectors ``[F, D]``."""
    likeness = (unit @ unit.T).fill_diagonal_(-math.inf)
    nearest = likeness.topk(min(_NEIGHBOURS, len(unit) - 1)).indices
    return torch.zeros_like(likeness, dtype=torch.bool).scatter_(1, nearest, True)


def _root(covariance: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix ``[D, D]``."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _ratio(numerator: Tensor, denominator: Tensor, empty: float) -> float:
    """Divide; ``empty`` if the denominator is zero because frames do not vary at all."""
    return float(numerator / denominator) if denominator > 0 else empty


def model_consistency(
    model: PretrainingModel, corpus: Corpus, *, max_frames: int = 8192, seed: int = 0
) -> dict[str, np.ndarray]:
    """Compute :func:`consistency` of a model's depths 0 ... N on randomly drawn frames of a corpus.

    Raises:
        ValueError: no usable audio.
    """
    choices = choose_frames(corpus, max_frames=max_frames, seed=seed, step=model.config.subsampling_factor)
    return consistency(list(collect_states(model, corpus, choices, range(model.config.num_layers + 1))))


def summarise(matrices: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean of each measure over all pairs of different depths from 1 to N, without depth 0, the front end."""
    n = len(matrices["cosine"]) - 1
    pairs = np.triu_indices(n, 1)
    return {name: float(m[1:, 1:][pairs].mean()) if n > 1 else float("nan") for name, m in matrices.items()}
