"""Number of loops: sampled per training step (arXiv 2105.00812), chosen by an exit rule at inference."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops.checks import frame_mask
from .validation import is_integer, need_integer, need_number

__all__ = ["DepthSampler", "ExitRule"]

_KINDS = ("uniform", "fixed", "curriculum", "log_normal", "sandwich", "layer_drop")
_MOST = 1 << 20  # loops: more than any encoder has


def _uniform(seed: int, step: int, draw: int) -> float:
    """Pseudo-random number in [0, 1), a function of its arguments (splitmix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    z = 0
    for word in (seed, step, draw):
        z = (z ^ (word & mask)) + 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        z ^= z >> 31
    return (z >> 11) / (1 << 53)


@dataclass(frozen=True)
class DepthSampler:
    """Depth of each training step, a function of (seed, step): all ranks and resumed runs agree without communication.

    Attributes:
        kind: ``"uniform"``: uniform from ``low`` to ``num_layers``, as in the paper; ``"fixed"``: always ``num_layers``;
            ``"curriculum"``: uniform from ``low`` to a maximum that grows linearly to ``num_layers`` within ``steps``;
            ``"log_normal"``: Poisson with a log-normal rate of mean ``mean`` (arXiv 2502.05171), clipped to the range;
            ``"sandwich"``: the deepest, the shallowest and a random depth in one step (arXiv 1903.05134);
            ``"layer_drop"``: each layer of its own is left out at random (LayerDrop, arXiv 1909.11556), such that as many run
            on average as with ``"uniform"``: :meth:`layers`.
        num_layers: N, the largest depth.
        low: the smallest depth.
        seed: seed of the draws.
        steps: length of the curriculum in steps.
        mean: mean of the log-normal rate; None: the middle of the range.
        sigma: standard deviation of the logarithm of that rate.

    Raises:
        ValueError: a value out of range.
    """

    kind: str = "uniform"
    num_layers: int = 12
    low: int = 1
    seed: int = 0
    steps: int = 0
    mean: float | None = None
    sigma: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"DepthSampler: kind is {self.kind!r}; expected one of {', '.join(_KINDS)}")
        need_integer("DepthSampler", "num_layers", self.num_layers, 1, _MOST)
        if not is_integer(self.low) or not 1 <= self.low <= self.num_layers:
            raise ValueError(
                f"DepthSampler: low is {self.low} with num_layers = {self.num_layers}; expected an integer, "
                "1 <= low <= num_layers"
            )
        if not is_integer(self.seed):
            raise ValueError(f"DepthSampler: seed is {self.seed!r}; expected an integer")
        if not is_integer(self.steps) or (self.kind == "curriculum" and self.steps < 1):
            raise ValueError(
                f"DepthSampler: steps is {self.steps!r}; expected an integer, and 1 or more for a curriculum"
            )
        need_number("DepthSampler", "sigma", self.sigma, 0, below=10, open=True)
        if self.mean is not None:
            need_number("DepthSampler", "mean", self.mean, 0, below=_MOST, open=True)

    def depths(self, step: int) -> tuple[int, ...]:
        """Depths to train in ``step`` (from 0), the deepest first: one, or up to three for ``"sandwich"``."""
        n, low = self.num_layers, self.low
        if self.kind == "fixed":
            return (n,)
        if self.kind == "curriculum":
            n = low + round((n - low) * min(1.0, (step + 1) / self.steps))
        if self.kind == "log_normal":
            return (self._log_normal(step),)
        if self.kind == "layer_drop":
            return (len(self._kept(step)),)
        drawn = low + int(_uniform(self.seed, step, 0) * (n - low + 1))
        if self.kind == "sandwich":
            return tuple(sorted({n, drawn, low}, reverse=True))
        return (drawn,)

    def layers(self, step: int) -> tuple[int, ...] | None:
        """Layers (from 0) that ``"layer_drop"`` keeps in ``step``, one or more; None for other kinds, which keep the first."""
        return self._kept(step) if self.kind == "layer_drop" else None

    def _kept(self, step: int) -> tuple[int, ...]:
        drawn = [_uniform(self.seed, step, 4 + k) for k in range(self.num_layers)]
        kept = tuple(k for k, u in enumerate(drawn) if u < self._keep)
        return kept or (drawn.index(min(drawn)),)

    @property
    def _keep(self) -> float:
        """Probability with which a layer is kept."""
        return (self.low + self.num_layers) / (2 * self.num_layers)

    def _log_normal(self, step: int) -> int:
        mean = (self.low + self.num_layers) / 2 if self.mean is None else self.mean
        u1, u2 = 1.0 - _uniform(self.seed, step, 1), _uniform(self.seed, step, 2)
        normal = math.sqrt(-2.0 * math.log(u1)) * math.cos(2.0 * math.pi * u2)
        rate = math.exp(math.log(mean) - self.sigma**2 / 2 + self.sigma * normal)
        # Poisson by inversion
        target, k = _uniform(self.seed, step, 3), 0
        term = total = math.exp(-rate)
        while total < target and k < self.num_layers:
            k += 1
            term *= rate / k
            total += term
        return min(max(k, self.low), self.num_layers)

    def mean_depth(self, steps: int | None = None) -> float:
        """Expected number of loops per step, in closed form if there is one, else as the mean over ``steps`` (default 10000).

        A ``"sandwich"`` step counts as N loops: its shallower depths are hidden states of the same run.
        """
        if self.kind in ("fixed", "sandwich"):
            return float(self.num_layers)
        if self.kind == "uniform":
            return (self.low + self.num_layers) / 2
        if self.kind == "layer_drop":
            # where none would be kept, one is
            return self.num_layers * self._keep + (1.0 - self._keep) ** self.num_layers
        count = steps or (self.steps if self.kind == "curriculum" else 10_000)
        return sum(self.depths(s)[0] for s in range(count)) / count


@dataclass(frozen=True)
class ExitRule:
    """Rule by which an utterance stops looping (:meth:`ConformerEncoder.adaptive`).

    Attributes:
        kind: ``"fixed"``: after ``depth`` loops (Shallow Layer Inference, arXiv 2105.00812); ``"change"``: when the normalised
            change ``|h_k - h_(k-1)| / |h_(k-1)|`` of an utterance falls below ``threshold``; ``"cosine"``: when the mean
            over its frames of ``1 - cos(h_k, h_(k-1))`` does; ``"entropy"``: when the entropy of a recogniser's posterior
            does (:meth:`~lcconformer.ssl.finetuning.Recogniser.entropy`, in nats), which the recogniser measures.
        depth: number of loops of ``"fixed"``; largest number of loops otherwise (None: all loops of the encoder).
        threshold: threshold of all but ``"fixed"``, positive.
        min_depth: number of loops before the first test, 1 or more.

    Raises:
        ValueError: a value out of range.
    """

    kind: str = "fixed"
    depth: int | None = None
    threshold: float = 0.05
    min_depth: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "change", "cosine", "entropy"):
            raise ValueError(f"ExitRule: kind is {self.kind!r}; expected 'fixed', 'change', 'cosine' or 'entropy'")
        if self.kind == "fixed" and self.depth is None:
            raise ValueError("ExitRule: kind 'fixed' needs depth, the number of loops")
        if self.depth is not None:
            need_integer("ExitRule", "depth", self.depth, 1, _MOST)
        need_number("ExitRule", "threshold", self.threshold, 0, open=True)
        need_integer("ExitRule", "min_depth", self.min_depth, 1, _MOST)

    def distance(self, new: Tensor, old: Tensor, lengths: Tensor | None) -> Tensor:
        """Distance ``[B]`` between two successive hidden states ``[B, T, d_model]``, over frames without padding.

        Raises:
            ValueError: the rule is of kind ``"entropy"``, which no hidden state has.
        """
        if self.kind == "entropy":
            raise ValueError("ExitRule: kind 'entropy' is for a recogniser with heads: use Recogniser.transcribe")
        if lengths is None:
            lengths = torch.full((new.shape[0],), new.shape[1], device=new.device)
        pad = ~frame_mask(lengths, new.shape[1])  # [B, T]
        if self.kind == "cosine":
            cosine = torch.cosine_similarity(new, old, -1)
            return (1.0 - cosine).masked_fill(pad, 0.0).sum(1) / lengths.clamp(min=1)
        change = (new - old).masked_fill(pad[..., None], 0.0).square().sum((1, 2)).sqrt()
        size = old.masked_fill(pad[..., None], 0.0).square().sum((1, 2)).sqrt()
        return change / size.clamp(min=torch.finfo(new.dtype).tiny)
