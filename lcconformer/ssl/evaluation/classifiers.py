"""Phone classifiers on frozen features: a pair of them for every depth, all trained together.

The two probes are those of the phone tasks of S3PRL and CPC: a linear layer, and one hidden layer with ReLU.  Features are
whitened first, with the mean and covariance of the training frames.  A linear probe stays linear that way, but needs only a
few hundred steps where the strongly correlated channels of raw features need hundreds of thousands.  The probes of all
depths start from the same weights and see the same frames in the same order, and nothing couples them (AdamW is elementwise,
gradients are not clipped).  So training them together gives the same result as training each of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["PROBES", "Probes", "train_probes"]

PROBES = ("linear", "hidden")
_STATISTICS = 32_768  # number of frames for mean and covariance
_NOISE = 1e-5  # part of a channel's variance: weaker directions are rounding errors of float16


class Probes:
    """A linear and a one-hidden-layer classifier for each of G sets of features.

    Args:
        mean, whitener: ``[G, 1, D]`` and ``[G, D, D]``, such that ``(x - mean) @ whitener`` is white.
        classes: number of classes C.
        hidden: width of the hidden layer.
        seed: seed of the initial weights, which are the same for all G sets.
    """

    def __init__(self, mean: Tensor, whitener: Tensor, *, classes: int, hidden: int, seed: int) -> None:
        groups, _, width = mean.shape
        generator = torch.Generator().manual_seed(seed)

        def matrix(fan_in: int, fan_out: int) -> Tensor:
            bound = 1.0 / math.sqrt(fan_in)
            weight = torch.empty(fan_in, fan_out).uniform_(-bound, bound, generator=generator).to(mean.device)
            return weight.repeat(groups, 1, 1).requires_grad_()

        self.mean, self.whitener = mean, whitener
        self.weights = [matrix(width, classes), matrix(width, hidden), matrix(hidden, classes)]
        self.biases = [mean.new_zeros(groups, 1, n, requires_grad=True) for n in (classes, hidden, classes)]

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[G, F, C]`` of both probes (linear, hidden) for features ``[G, F, D]`` of any floating dtype."""
        x = (x.float() - self.mean) @ self.whitener
        linear, first, second = (lambda y, w=w, b=b: torch.baddbmm(b, y, w) for w, b in zip(self.weights, self.biases))
        return linear(x), second(F.relu(first(x)))

    @torch.no_grad()
    def correct(self, x: Tensor, labels: Tensor) -> Tensor:
        """Count the frames of ``x [G, F, D]`` classified as in ``labels [F]``: ``[2, G]`` int64 (linear, hidden)."""
        return torch.stack([(logits.argmax(-1) == labels).sum(-1) for logits in self.logits(x)])


def train_probes(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    hidden: int = 256,
    epochs: int = 10,
    batch_frames: int = 512,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Probes:
    """Train both probes on G sets of features of the same frames.

    The optimizer is AdamW (weight decay 0.01) with a learning rate that falls linearly to zero.

    Args:
        features: ``[G, F, D]``, any floating dtype; only batches of it are converted to float32.
        labels: ``[F]`` int64, 0 ... ``classes`` - 1.
        classes: number of classes C.
        hidden: width of the hidden layer.
        epochs: passes over the frames.
        batch_frames: number of frames per step.
        learning_rate: learning rate of the first step.
        seed: seed of the initial weights and of the order of the frames.
        progress: called after every epoch.

    Raises:
        ValueError: shapes that do not match, labels out of range, or features that are not finite.
    """
    if features.dim() != 3 or labels.shape != features.shape[1:2] or not len(labels):
        raise ValueError(
            f"train_probes: features {list(features.shape)} and labels {list(labels.shape)}; "
            "expected [G, F, D] and [F], F >= 1"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"train_probes: labels {int(labels.min())} ... {int(labels.max())}; expected 0 ... {classes - 1}"
        )
    mean, whitener = _whitener(features)
    probes = Probes(mean, whitener, classes=classes, hidden=hidden, seed=seed)
    optimizer = torch.optim.AdamW([*probes.weights, *probes.biases], lr=learning_rate, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(labels) / batch_frames)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(epochs):
        for index in torch.randperm(len(labels), generator=generator).to(labels.device).split(batch_frames):
            target = labels[index].expand(len(features), -1).flatten()
            linear, deep = (F.cross_entropy(y.flatten(0, 1), target) for y in probes.logits(features[:, index]))
            # times G, so that each set gets the gradient of the mean over its own frames, as it would alone
            loss = (linear + deep) * len(features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress()
    return probes


def _whitener(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[G, 1, D]`` and whitening matrix ``[G, D, D]``, float32.

    Channels are first scaled to unit variance, so that their units do not matter, then decorrelated by the symmetric root
    (ZCA).  A channel that does not vary becomes 0.
    """
    means, matrices = [], []
    for one in features:  # one at a time, because float64 copies are large
        sample = one[:: max(1, len(one) // _STATISTICS)].double()
        if not bool(sample.isfinite().all()):
            raise ValueError("train_probes: features hold NaN or infinity")
        mean = sample.mean(0, keepdim=True)
        sample = sample - mean
        variance = sample.square().mean(0)  # [D]
        scale = torch.where(variance > 1e-10, variance.rsqrt(), 0.0)
        sample = sample * scale
        values, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
        inverse_root = (vectors * (values.clamp(min=0) + _NOISE).rsqrt()) @ vectors.T
        means.append(mean.float())
        matrices.append((scale[:, None] * inverse_root).float())
    return torch.stack(means), torch.stack(matrices)
