"""One random layer for every provider, so that the same maths must give the same outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lcconformer.interop.keys import Key, from_peer, to_peer

from ..core.case import Case
from .baselines import ConformerLayer, relative_attention

__all__ = ["layer_gradients", "load_layers", "random_layer"]


def random_layer(case: Case, position: str, conv_norm: str, conv_bias: bool) -> dict[str, Tensor]:
    """State dict of one layer by lcconformer's names, float64 on the CPU.

    No weight is zero or one, except biases that a peer lacks, so that every term of the maths has an effect.
    """
    generator = torch.Generator().manual_seed(1)
    layer = ConformerLayer(
        case.d_model, case.num_heads, case.ffn_dim, case.kernel, 0.0, position, conv_norm, relative_attention
    )
    state: dict[str, Tensor] = {}
    for name, value in layer.state_dict().items():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif name.endswith("running_var"):
            state[name] = 1.0 + 0.1 * noise.abs()
        elif name.endswith(("attention.u", "attention.v_bias")):
            state[name] = 0.5 * noise
        elif value.dim() > 1:
            state[name] = noise / value[0].numel() ** 0.5
        else:
            state[name] = 0.1 * noise + (1.0 if name.endswith("norm.weight") else 0.0)
    if not conv_bias:
        for name in ("pointwise1", "depthwise", "pointwise2"):
            state[f"conv.{name}.bias"].zero_()
    return state


def load_layers(layers: Iterable[nn.Module], state: Mapping[str, Tensor], keys: tuple[Key, ...] | None) -> None:
    """Load the same weights into every layer.

    Args:
        layers: layers of one provider.
        state: weights by lcconformer's names.
        keys: the provider's names; None for lcconformer's.

    Raises:
        ValueError: a layer has parameters that ``state`` does not set.
    """
    theirs = dict(state) if keys is None else to_peer(keys, state)
    for layer in layers:
        missing = layer.load_state_dict(theirs, strict=False).missing_keys
        if missing:
            raise ValueError(f"bench: the peer's layer has weights without a counterpart: {', '.join(missing)}")


def layer_gradients(
    layers: Iterable[nn.Module], gradients: Mapping[int, Tensor], keys: tuple[Key, ...] | None
) -> dict[str, Tensor]:
    """Gradients by lcconformer's names, in float64 and summed over layers, as a shared layer accumulates them.

    Args:
        layers: layers of one provider.
        gradients: ``id(parameter)`` -> its gradient.
        keys: the provider's names; None for lcconformer's.
    """
    total: dict[str, Tensor] = {}
    for layer in layers:
        named = {name: gradients[id(p)] for name, p in layer.named_parameters()}
        for name, value in (named if keys is None else from_peer(keys, named)).items():
            total[name] = total.get(name, 0.0) + value.double()
    return total
