"""Runs another package's layer on the packed weights of :mod:`lcconformer.loop`, where an inference on the CPU allows it."""

from __future__ import annotations

import dataclasses
import weakref
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from ..config import ConformerConfig
from ..layer import ConformerLayer
from ..loop import forced_engine, inference, weights
from ..ops.availability import cpu_reasons
from ..ops.derivatives import transformed
from ..ops.registry import forced_backend
from ..plain import NORMS, PLAIN, altered
from .keys import Key, from_peer
from .layer import Parts

__all__ = ["Embedded", "Given", "layer_config", "run"]

# whose parameters are read: plain modules, and torch's attention with its projection
_READ = PLAIN | {nn.Embedding, nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear}
_version = attrgetter("_version")
_WIDEST = 63  # kernel of the depthwise convolution


def run(
    module: nn.Module,
    keys: tuple[Key, ...],
    parts: Parts,
    x: Tensor,
    lengths: Tensor | None,
    *,
    heads: int,
    position: str,
    table: weights.Table | None = None,
) -> Tensor | None:
    """Run a peer's layer on ``x [B, T, D]``, or return None where the engine cannot stand in for it.

    Args:
        module: the layer.
        keys: where it keeps our tensors.
        parts: what it does in its present mode.
        x, lengths: its input, and the real frames of each utterance, None for all.
        heads: of attention.
        position: ``"relative"`` or ``"none"``.
        table: of the relative positions; None: sinusoids, or none.
    """
    if not (_evaluates(parts) and _serves(x)) or _records(module, x):
        return None
    if isinstance(table, Given) and len(table.rows) != 2 * x.shape[1] - 1:
        return None
    if lengths is not None and parts.conv.masked and type(parts.conv.depthwise_norm) is nn.GroupNorm:
        return None  # the kernels leave padding out of its statistics
    config = layer_config(parts, heads, position)
    packed, frames = _kept.get(module), x.shape[0] * x.shape[1]
    if config is None:
        return None
    epsilon = _epsilon(parts.conv.depthwise_norm)
    if packed is None or not packed.holds(config, epsilon, complete=frames >= weights.COMPLETE):
        _kept.pop(module, None)
        if not _readable(module, _READ | parts.layer_norms | {parts.conv.depthwise_class}):
            return None
        packed = _kept[module] = _Packed(module, keys, config, epsilon, causal=parts.conv.causal)
    with torch.no_grad():
        return inference.run_layer(config, packed.layer, x, lengths, table)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The relative positions of a layer whose heads share an embedding of clipped distances.

    Attributes:
        embedding: ``[left + right + 1, D / H]``, of key minus query, -left ... right.
        left, right: where the distances are clipped.
    """

    embedding: nn.Embedding
    left: int
    right: int

    def rows(self, frames: int, device: torch.device) -> Tensor:
        """Return the rows ``[2T-1, D / H]`` of distances -(T-1) ... T-1."""
        distances = torch.arange(1 - frames, frames, device=device).clamp(-self.left, self.right) + self.left
        return self.embedding(distances)

    def __call__(self, layer: weights.PackedLayer, frames: int) -> Tensor:
        return self.rows(frames, torch.device("cpu")).repeat(1, layer.heads)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Relative positions ``[2T-1, D]`` float32 in front of their projection."""

    rows: Tensor

    def __call__(self, layer: weights.PackedLayer, frames: int) -> Tensor:
        assert layer.attention.pos is not None
        return weights.project(layer.attention.pos, self.rows)


def _evaluates(parts: Parts) -> bool:
    """Whether the layer drops nothing, takes no statistics, and is made of what the kernels have."""
    conv, ffn1, ffn2 = parts.conv, parts.ffn1, parts.ffn2
    drops = any((ffn1.inside, ffn1.on, ffn2.inside, ffn2.on, parts.attention_inside, parts.attention_on, conv.on))
    batch = type(conv.depthwise_norm) is nn.BatchNorm1d and conv.depthwise_norm.training
    same = ffn1.activation == ffn2.activation == conv.activation
    # a causal convolution is a centred one whose later taps are zero
    depthwise: Any = conv.depthwise
    fits = not conv.causal or 2 * depthwise.kernel_size[0] - 1 <= _WIDEST
    return same and not drops and not batch and fits


def _serves(x: Tensor) -> bool:
    """Whether the engine may run, and has kernels for ``x``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    if x.dtype != torch.float32 or type(x) is not Tensor or not x.numel() or torch.is_autocast_enabled(x.device.type):
        return False
    wanted = forced_backend() in ("auto", "cpu") and forced_engine() != "modules"
    return wanted and not cpu_reasons(x.device, x.dtype)


def _records(module: nn.Module, x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def layer_config(parts: Parts, heads: int, position: str) -> ConformerConfig | None:
    """Return the settings of the layer; None if ours have none like it."""
    ffn1, conv, ffn2 = parts.ffn1, parts.conv, parts.ffn2
    norms: list[Any] = [ffn1.norm, parts.attention_norm, conv.norm, ffn2.norm, parts.norm]
    depthwise: Any = conv.depthwise
    depthwise_norm: Any = conv.depthwise_norm
    matrices: list[Any] = [ffn1.up, ffn1.down, ffn2.up, ffn2.down]
    up = matrices[0]
    known: list[tuple[Any, type]] = [*((m, nn.Linear) for m in matrices), (depthwise, conv.depthwise_class)]
    if any(type(module) is not kind for module, kind in known) or any(m.bias is None for m in matrices):
        return None
    if any(type(norm) not in parts.layer_norms or norm.eps != norms[0].eps for norm in norms):
        return None
    # a BatchNorm is folded into the taps, whatever its epsilon
    batch = type(depthwise_norm) is nn.BatchNorm1d
    if type(depthwise_norm) not in NORMS or not (batch or _epsilon(depthwise_norm) in (0.0, norms[0].eps)):
        return None
    return ConformerConfig(
        d_model=up.in_features,
        num_heads=heads,
        ffn_dim=up.out_features,
        num_layers=1,
        conv_kernel_size=depthwise.kernel_size[0] * (2 if conv.causal else 1) - conv.causal,
        position=position,
        conv_norm=NORMS[type(depthwise_norm)],
        conv_norm_groups=getattr(depthwise_norm, "num_groups", 1),
        attention_bias=parts.attention_bias,
        conv_bias=depthwise.bias is not None,
        convolution_first=parts.convolution_first,
        layer_norm_eps=norms[0].eps,
        activation=conv.activation,
        padding="masked" if conv.masked else "peer",
    )


def _epsilon(norm: nn.Module) -> float:
    return getattr(norm, "eps", 0.0)  # an Identity has none


def _leaves(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if m._parameters and not m._modules]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _readable(module: nn.Module, known: frozenset[type[nn.Module]]) -> bool:
    """Whether calling the layer's modules is computing with their tensors, and these can be packed."""
    if any(altered(leaf, "", known) for leaf in _leaves(module)):
        return False
    tensors = _tensors(module)
    return all(
        t.device.type == "cpu" and weights.cacheable(t) and t.dtype in (torch.float32, torch.int64) for t in tensors
    )


class _Packed:
    """The packed weights of one layer, and the state of its modules and tensors when they were packed."""

    def __init__(
        self, module: nn.Module, keys: tuple[Key, ...], config: ConformerConfig, epsilon: float, *, causal: bool
    ) -> None:
        modules = list(module.modules())
        self._owners: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._found = self._ids()
        self._leaves = [(m, (type(m),)) for m in _leaves(module)]
        self._tensors = _tensors(module)
        self._state = self._now()
        self._memory = [StorageWeakRef(t.untyped_storage()) for t in self._tensors]  # addresses are not used again
        self._values = weights.Fingerprint(self._tensors)
        self._config, self._epsilon = config, epsilon
        with torch.device("meta"):
            layer = ConformerLayer(config)
        layer.conv.depthwise_norm.eps = epsilon  # type: ignore[assignment]
        state = from_peer(keys, module.state_dict())
        if causal:
            taps = state["conv.depthwise.weight"]
            state["conv.depthwise.weight"] = F.pad(taps, (0, taps.shape[-1] - 1))
        layer.load_state_dict(state, assign=True)
        self.layer = weights.pack(layer, {})
        if self.layer.attention.v_bias is None:  # a table may be there all the same
            none = torch.zeros(config.num_heads, config.d_model // config.num_heads)
            attention = dataclasses.replace(self.layer.attention, v_bias=none)
            self.layer = dataclasses.replace(self.layer, attention=attention)

    def _ids(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self._owners))))

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), list(map(_version, self._tensors))

    def holds(self, config: ConformerConfig, epsilon: float, *, complete: bool) -> bool:
        """Return whether modules and tensors are as they were; values by all of them if ``complete``, else by samples."""
        settings = (config, epsilon) == (self._config, self._epsilon)
        same = settings and self._ids() == self._found and self._now() == self._state
        return same and not any(altered(m, "", cls) for m, cls in self._leaves) and self._values.holds(complete)


_kept: weakref.WeakKeyDictionary[nn.Module, _Packed] = weakref.WeakKeyDictionary()
