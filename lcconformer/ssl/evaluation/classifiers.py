"""Phone classifiers on frozen features: a pair of them for every depth, all trained together.

The two probes are those of the phone tasks of S3PRL and CPC: a linear layer, and one hidden layer with ReLU.  Both see a
window of neighbouring vectors (S3PRL's ``phone_linear_concat``), and an encoder that merges M frames of 10 ms gets M
classifiers, one for each frame under its output, so that its frame rate sets no limit to the accuracy.  The strongly
correlated channels of hidden states are whitened with the statistics of the training speech: a linear probe stays linear
that way, but needs a few hundred steps where raw channels need hundreds of thousands.  Those of log-mel features in a window
are only standardised, which serves them better (bench/results/paper/README.md has both for both).  The probes of all depths
start from the same weights and see the same vectors in the same order, and nothing couples them (AdamW is elementwise,
gradients are not clipped).  So training them together gives the same result as training each of them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data import IGNORE

__all__ = ["PROBES", "Probes", "train_probes"]

PROBES = ("linear", "hidden")
_STATISTICS = 32_768  # number of vectors for mean and variance
_SCORED = 4096  # vectors that are classified at a time
_NOISE = 1e-2  # part of a channel's variance: weaker directions are not blown up to full size


class Probes:
    """A linear and a one-hidden-layer classifier for each of G sets of features.

    Args:
        mean, whitener: ``[G, 1, D]`` and ``[G, D, D]``; the classifiers see ``(x - mean) @ whitener``.
        labels: number of labels M of a vector.
        classes: number of classes C.
        hidden: width of the hidden layer.
        context: number of neighbours on each side whose features a classifier sees too.
        seed: seed of the initial weights, which are the same for all G sets.
    """

    def __init__(
        self, mean: Tensor, whitener: Tensor, *, labels: int, classes: int, hidden: int, context: int, seed: int
    ) -> None:
        groups, _, width = mean.shape
        generator = torch.Generator().manual_seed(seed)

        def matrix(fan_in: int, fan_out: int) -> Tensor:
            bound = 1.0 / math.sqrt(fan_in)
            weight = torch.empty(fan_in, fan_out).uniform_(-bound, bound, generator=generator).to(mean.device)
            return weight.repeat(groups, 1, 1).requires_grad_()

        self.mean, self.whitener, self.classes, self.context = mean, whitener, classes, context
        seen, out = (2 * context + 1) * width, labels * classes
        self.weights = [matrix(seen, out), matrix(seen, hidden), matrix(hidden, out)]
        self.biases = [mean.new_zeros(groups, 1, n, requires_grad=True) for n in (out, hidden, out)]

    def logits(self, x: Tensor, spans: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[G, R, M, C]`` of both probes (linear, hidden) for some of the vectors of sequences.

        Args:
            x: ``[G, U, D]``, features of any floating dtype.
            spans: ``[U, 2]`` int64, first and last vector of the sequence of each vector; beyond, they are repeated.
            rows: ``[R]`` int64, the vectors to classify; None: all U.
        """
        rows = torch.arange(x.shape[1], device=x.device) if rows is None else rows
        near = rows[:, None] + torch.arange(-self.context, self.context + 1, device=x.device)
        near = near.clamp(spans[rows, :1], spans[rows, 1:])  # [R, W]
        seen = (x[:, near.flatten()].float() - self.mean) @ self.whitener  # [G, R W, D]
        seen = seen.view(len(x), len(rows), -1)  # [G, R, W D]
        linear, first, second = (lambda y, w=w, b=b: torch.baddbmm(b, y, w) for w, b in zip(self.weights, self.biases))
        shape = (len(x), len(rows), -1, self.classes)
        return linear(seen).view(shape), second(F.relu(first(seen))).view(shape)

    @torch.no_grad()
    def correct(self, x: Tensor, labels: Tensor, spans: Tensor) -> Tensor:
        """Count the labels ``[U, M]`` that are met by the classes of ``x [G, U, D]``: ``[2, G]`` int64 (linear, hidden).

        Unknown labels (-100) are never met.
        """
        right = torch.zeros(len(PROBES), len(x), dtype=torch.int64, device=x.device)
        for rows in torch.arange(x.shape[1], device=x.device).split(_SCORED):
            for number, logits in enumerate(self.logits(x, spans, rows)):
                right[number] += (logits.argmax(-1) == labels[rows]).sum((1, 2))
        return right


def train_probes(
    features: Tensor,
    labels: Tensor,
    spans: Tensor,
    *,
    classes: int,
    context: int,
    whiten: bool,
    hidden: int = 256,
    epochs: int = 10,
    batch: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[], object] | None = None,
) -> Probes:
    """Train both probes on G sets of features of the same speech.

    The optimizer is AdamW (weight decay 0.01) with a learning rate that falls linearly to zero.

    Args:
        features: ``[G, U, D]``, any floating dtype; only batches of it are converted to float32.
        labels: ``[U, M]`` int64, the M labels of each vector: 0 ... ``classes`` - 1, or -100 where unknown.
        spans: ``[U, 2]`` int64, first and last vector of the sequence of each vector.
        classes: number of classes C.
        context: number of neighbours on each side whose features a classifier sees too.
        whiten: decorrelate the channels; False: bring each to unit variance.
        hidden: width of the hidden layer.
        epochs: passes over the vectors.
        batch: number of labels per step, of ``batch // M`` vectors.
        learning_rate: learning rate of the first step.
        seed: seed of the initial weights and of the order of the vectors.
        progress: called after every epoch.

    Raises:
        ValueError: shapes that do not match, labels out of range or all unknown, or features that are not finite.
    """
    count = features.shape[1:2]
    if features.dim() != 3 or labels.dim() != 2 or labels.shape[:1] != count or spans.shape != (*count, 2):
        raise ValueError(
            f"train_probes: features {list(features.shape)}, labels {list(labels.shape)} and spans {list(spans.shape)}; "
            "expected [G, U, D], [U, M] and [U, 2]"
        )
    known = labels[labels != IGNORE]
    if not len(known) or int(known.min()) < 0 or int(known.max()) >= classes:
        found = f"labels {int(known.min())} ... {int(known.max())}" if len(known) else "no known label"
        raise ValueError(f"train_probes: {found}; expected 0 ... {classes - 1}, or {IGNORE} where unknown")
    mean, whitener = _whitener(features, whiten)
    probes = Probes(mean, whitener, labels=labels.shape[1], classes=classes, hidden=hidden, context=context, seed=seed)
    optimizer = torch.optim.AdamW([*probes.weights, *probes.biases], lr=learning_rate, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    usable = (labels != IGNORE).any(1).nonzero()[:, 0]
    vectors = max(1, batch // labels.shape[1])
    steps = epochs * math.ceil(len(usable) / vectors)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(epochs):
        for order in torch.randperm(len(usable), generator=generator).to(labels.device).split(vectors):
            rows = usable[order]
            target = labels[rows].expand(len(features), -1, -1).flatten()
            linear, deep = (
                F.cross_entropy(y.flatten(0, 2), target, ignore_index=IGNORE)
                for y in probes.logits(features, spans, rows)
            )
            # times G, so that each set gets the gradient of the mean over its own labels, as it would alone
            loss = (linear + deep) * len(features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if progress is not None:
            progress()
    return probes


def _whitener(features: Tensor, whiten: bool) -> tuple[Tensor, Tensor]:
    """Mean ``[G, 1, D]`` and matrix ``[G, D, D]``, float32, that bring channels to unit variance and may decorrelate them.

    Whitening is by the symmetric root (ZCA) of the correlations.  A channel that does not vary becomes 0.
    """
    means, matrices = [], []
    for one in features:  # one at a time, because float64 copies are large
        sample = one[:: max(1, len(one) // _STATISTICS)].double()
        if not bool(sample.isfinite().all()):
            raise ValueError("train_probes: features hold NaN or infinity")
        variance, mean = torch.var_mean(sample, 0, correction=0)
        scale = torch.where(variance > 1e-10, variance.rsqrt(), 0.0)
        matrix = scale.diag()
        if whiten:
            sample = (sample - mean) * scale
            values, vectors = torch.linalg.eigh(sample.T @ sample / len(sample))
            matrix = scale[:, None] * ((vectors * (values.clamp(min=0) + _NOISE).rsqrt()) @ vectors.T)
        means.append(mean[None].float())
        matrices.append(matrix.float())
    return torch.stack(means), torch.stack(matrices)
