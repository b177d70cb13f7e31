"""Encoders made of others: shared weights of unshared ones (Relaxed Recursive Transformers, arXiv 2410.20672), 8 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .encoder import ConformerEncoder
from .ops.checks import frame_mask
from .pretrained import check_described
from .quantization import QuantizedLinear, quantized
from .sharing import sharing_map

__all__ = ["depth_errors", "quantize", "share"]

_METHODS = ("average", "first", "svd-lora")
_STATISTICS = ("running_mean", "running_var")


@torch.no_grad()
def share(
    encoder: ConformerEncoder,
    method: str = "average",
    *,
    sharing: str | tuple[int, ...] = "all",
    lora_rank: int | None = None,
) -> ConformerEncoder:
    """Start a shared-weight encoder from one with a layer for every depth, such as a pretrained model's.

    The result is a starting point: :func:`depth_errors` says how far its hidden states are from those of ``encoder``, and
    training recovers them.  A BatchNorm keeps the statistics of every depth
    (``conv_norm_statistics="per_depth"``), whatever the method.

    Args:
        encoder: the encoder, without conditioning; it is left as it is.
        method: where the tensors of a shared layer come from.

            - ``"average"``: the mean over the depths that share it.
            - ``"first"``: the first of those depths.
            - ``"svd-lora"``: the mean, and the conditioning ``"layer_norm"`` and ``"lora"`` for the rest: every depth keeps
              its LayerNorms, and the difference of each of its matrices in the best approximation of rank ``lora_rank``,
              by truncated SVD.  Other biases, the depthwise convolution and the parameters of relative positions are the
              mean.
        sharing: which depths share a layer (:func:`~lcconformer.sharing.sharing_map`); to share fewer costs less accuracy.
        lora_rank: rank of ``"svd-lora"``; None: that of the encoder's configuration.

    Returns:
        The encoder, on the device, in the dtypes and in the mode of ``encoder``; ``num_layers`` is the same.

    Raises:
        ValueError: an unknown method or form of sharing, an encoder with conditioning, with weights in 8 bits or with other
            tensors than its configuration says.

    Example:
        >>> shared = lcconformer.share(encoder, "svd-lora", lora_rank=16)
        >>> print(depth_errors(encoder, shared, features, lengths))
    """
    if method not in _METHODS:
        raise ValueError(f"share: method is {method!r}; expected one of {', '.join(map(repr, _METHODS))}")
    if encoder.config.conditioning:
        raise ValueError(
            f"share: the encoder's conditioning is {encoder.config.conditioning!r}; expected none: what tells its depths "
            "apart is already part of it, so share an encoder whose layers alone do"
        )
    _check_float("share", encoder)
    check_described("share", encoder)
    config = encoder.config.replace(sharing=sharing)
    if config.conv_norm == "batch":
        config = config.replace(conv_norm_statistics="per_depth")
    if method == "svd-lora":
        rank = config.lora_rank if lora_rank is None else lora_rank
        config = config.replace(conditioning=("layer_norm", "lora"), lora_rank=rank)

    layers = [_layer_state(encoder, k) for k in range(config.num_layers)]
    state = {name: x for name, x in encoder.state_dict().items() if name.startswith("front_end.")}
    groups = sharing_map(sharing, config.num_layers)
    for index in range(max(groups) + 1):
        depths = [layers[k] for k, group in enumerate(groups) if group == index]
        for name in depths[0]:
            state[f"layers.{index}.{name}"] = _combine([layer[name] for layer in depths], method)
    if config.conv_norm_statistics == "per_depth":
        for name in _STATISTICS:
            state[name] = torch.stack([layer[f"conv.depthwise_norm.{name}"] for layer in layers])

    shared = ConformerEncoder(config)
    reference = encoder.layer_of(0).norm.weight
    if shared.conditioning is not None:
        shared.conditioning.to(reference.device, reference.dtype)
        state |= {f"conditioning.{name}": x for name, x in shared.conditioning.state_dict().items()}
    shared.load_state_dict({name: x.detach().clone() for name, x in state.items()}, assign=True)
    if shared.conditioning is not None:
        for k, layer in enumerate(layers):
            shared.conditioning.fit(shared.layer_of(k), k, layer)
    return shared.train(encoder.training)


def _layer_state(encoder: ConformerEncoder, k: int) -> dict[str, Tensor]:
    """Return the state dict of the layer of depth ``k`` (from 0), with the statistics of that depth."""
    return encoder.layer_of(k).state_dict() | encoder.overrides(k)


def _combine(tensors: Sequence[Tensor], method: str) -> Tensor:
    if method == "first" or not tensors[0].is_floating_point():
        return tensors[0]
    return torch.stack(list(tensors)).mean(0)


@torch.no_grad()
def quantize(encoder: ConformerEncoder, weights: str = "int8") -> ConformerEncoder:
    """Store the matrices of an encoder's layers in 8 bits, for inference.

    Weights have one scale for each output; biases, norms, the depthwise convolution, the position projection and the front end
    stay as they are.  Where the processor multiplies 8 bits (AVX512-VNNI), the engine of the CPU rounds each row of a
    matrix's input to 8 bits as well, by its own largest magnitude, and adds up products exactly; everywhere else the weights
    are widened and inputs stay as they are.  ``print(encoder.explain(x))`` says which.

    Args:
        encoder: the encoder, which is left as it is.
        weights: ``"int8"``, the one format there is.

    Returns:
        An encoder whose configuration says ``weights="int8"``: saved, loaded and run as any other, on the device, in the dtype
        and in the mode of ``encoder``.

    Raises:
        ValueError: another format, an encoder that is quantized already, has LoRA conditioning, values that are not finite
            or other tensors than its configuration says.

    Example:
        >>> small = lcconformer.quantize(encoder)
        >>> print(lcconformer.depth_errors(encoder, small, features, lengths))
        >>> small.save_pretrained("encoder-int8")
    """
    if weights != "int8":
        raise ValueError(f"quantize: weights is {weights!r}; expected 'int8'")
    _check_float("quantize", encoder)
    check_described("quantize", encoder)
    state = {name: x.detach().clone() for name, x in encoder.state_dict().items()}
    small = ConformerEncoder(encoder.config.replace(weights=weights))
    for name, module in small.named_modules():
        if isinstance(module, QuantizedLinear):
            given = quantized(f"{name}.weight", state[f"{name}.weight"])
            state |= {f"{name}.{leaf}": x for leaf, x in given.items()}
    small.load_state_dict(state, assign=True)
    return small.train(encoder.training)


def _check_float(caller: str, encoder: ConformerEncoder) -> None:
    if encoder.config.weights != "float":
        raise ValueError(
            f"{caller}: the weights of the encoder are {encoder.config.weights} already; expected the encoder it was made of"
        )


@torch.no_grad()
def depth_errors(
    encoder: ConformerEncoder, other: ConformerEncoder, x: Tensor, lengths: Tensor | None = None
) -> list[float]:
    """Compare the hidden states of two encoders of one width and depth.

    Args:
        encoder: the encoder that is right.
        other: the other one, such as :func:`share` made of it.
        x, lengths: as for :meth:`ConformerEncoder.forward`; real speech, for the error depends on it.

    Returns:
        ``|h' - h| / |h|`` at depth 1 ... N, norms over all real frames.  Both run in their present modes.

    Raises:
        ValueError: the encoders have other widths or depths.
    """
    shapes = [(e.config.num_layers, e.config.d_model) for e in (encoder, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "depth_errors: the encoders have {} loops of width {} and {} of width {}; expected the same".format(
                *shapes[0], *shapes[1]
            )
        )
    (output, frames, states), (_, _, others) = (e(x, lengths, return_hidden_states=True) for e in (encoder, other))
    real = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)  # [B, T']
    if frames is not None:
        real = frame_mask(frames, output.shape[1])
    pairs = [(h[real].double(), g[real].double()) for h, g in zip(states[1:], others[1:])]
    return [float((g - h).norm() / h.norm()) for h, g in pairs]
