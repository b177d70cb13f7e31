"""A Conformer layer computed by :mod:`lcconformer.ops` from the modules of another package, which stay where they are.

What :class:`~lcconformer.ConformerLayer` does with modules of its own: a peer's layer says where it keeps each of them.  Plain
linear maps, norms and convolutions are read; changed ones (hooks, LoRA, quantisation) are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..ops.activations import ACTIVATIONS
from ..ops.checks import frame_mask
from ..plain import LAYER_NORM, LINEAR, NORMS, altered, readable

__all__ = ["Convolution", "FeedForward", "Parts", "attend_relative", "probability", "run"]


class FeedForward(NamedTuple):
    """A half-step feed-forward: its modules, and the probabilities of dropout inside of and on the branch."""

    norm: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str
    inside: float
    on: float


class Convolution(NamedTuple):
    """A convolution module.

    Attributes:
        masked: frames beyond the lengths are zeroed in front of the depthwise convolution.
        causal: the depthwise convolution sees no later frames.
        on: dropout on the output.
        depthwise_class: class of the depthwise convolution, which computes what ``nn.Conv1d`` with this padding does.
        masked_output: frames beyond the lengths are zeroed in the output.

    A BatchNorm in training and a GroupNorm take the statistics of all frames, padding included, as every peer does.
    """

    norm: nn.Module
    pointwise1: nn.Module
    depthwise: nn.Module
    depthwise_norm: nn.Module
    pointwise2: nn.Module
    activation: str
    masked: bool
    causal: bool
    on: float
    depthwise_class: type[nn.Module] = nn.Conv1d
    masked_output: bool = False


class Parts(NamedTuple):
    """The modules of one layer and their dropout, in their present modes.

    Attributes:
        attend: attention of normalised input with the lengths, ``[B, T, D] -> [B, T, D]``.
        attention_inside: dropout of its weights.
        attention_on: dropout on its output.
        attention_bias: whether its projections have biases.
        layer_norms: classes that compute what ``nn.LayerNorm`` does.
    """

    ffn1: FeedForward
    attention_norm: nn.Module
    attend: Callable[[Tensor, Tensor | None], Tensor]
    attention_inside: float
    attention_on: float
    attention_bias: bool
    conv: Convolution
    ffn2: FeedForward
    norm: nn.Module
    convolution_first: bool
    layer_norms: frozenset[type[nn.Module]] = LAYER_NORM


def probability(dropout: nn.Module) -> float:
    """Return what a ``nn.Dropout`` drops in its present mode."""
    p: Any = dropout.p
    return p if dropout.training else 0.0


def attend_relative(
    h: Tensor,
    lengths: Tensor | None,
    positions: Tensor,
    *,
    heads: int,
    qkv: tuple[nn.Module, nn.Module, nn.Module],
    pos: nn.Module,
    biases: tuple[Tensor, Tensor],
    out: nn.Module,
    dropout_p: float,
) -> Tensor:
    """Compute attention with relative positions of ``h [B, T, D]`` by the peer's projections.

    Args:
        h, lengths: normalised input, and the real frames of each utterance.
        positions: table ``[2T-1, D]`` in front of its projection ``pos``.
        heads: H.
        qkv, out: projections.
        biases: u and v_bias ``[H, D/H]``.
        dropout_p: of the attention weights.
    """
    split = (heads, -1)
    q, k, v = (linear(h).unflatten(-1, split) for linear in qkv)  # [B, T, H, D/H]
    relative = (x.to(q.dtype) for x in (pos(positions).unflatten(-1, split), *biases))
    return out(ops.relpos_attention(q, k, v, *relative, lengths=lengths, dropout_p=dropout_p).flatten(-2))


def run(parts: Parts, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Run the layer on ``x [B, T, D]`` with ``lengths [B]`` real frames, None: all."""
    masked = lengths if parts.conv.masked else None
    attention = (parts.attention_norm, lambda h: parts.attend(h, lengths), parts.attention_on)
    real = None
    if parts.conv.masked_output and lengths is not None:
        real = frame_mask(lengths, x.shape[1])[..., None]

    def convolve(h: Tensor) -> Tensor:
        y = _convolve(parts.conv, h, masked)
        return y if real is None else y.masked_fill(~real, 0.0)

    convolution = (parts.conv.norm, convolve, parts.conv.on)
    (norm, first, drop_first), (following, second, drop_second) = (
        (convolution, attention) if parts.convolution_first else (attention, convolution)
    )
    x = _feed_forward(parts.ffn1, x, parts.layer_norms)
    y = first(norm(x)).to(x.dtype)
    if readable((parts.layer_norms,), following) and drop_first < 1.0:
        weight, bias, eps = _affine(following)
        x, h = ops.residual_layer_norm(x, y, weight, bias, dropout_p=drop_first, eps=eps)
    else:
        x = x + F.dropout(y, drop_first)
        h = following(x)
    x = x + F.dropout(second(h), drop_second).to(x.dtype)
    return parts.norm(_feed_forward(parts.ffn2, x, parts.layer_norms))


def _affine(norm: Any) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _feed_forward(parts: FeedForward, x: Tensor, norms: frozenset[type[nn.Module]]) -> Tensor:
    norm, up, down = parts.norm, parts.up, parts.down
    # the op has one dropout for both places
    if parts.inside != parts.on or parts.on >= 1.0 or not readable((norms, LINEAR, LINEAR), norm, up, down):
        h = F.dropout(ACTIVATIONS[parts.activation](up(norm(x))), parts.inside)  # [B, T, F]
        return x + 0.5 * F.dropout(down(h), parts.on).to(x.dtype)
    weight, bias, eps = _affine(norm)
    matrices: list[Any] = [up.weight, up.bias, down.weight, down.bias]
    return ops.feed_forward(
        x, weight, bias, *matrices, scale=0.5, activation=parts.activation, dropout_p=parts.on, eps=eps
    )


def _plain(convolution: Any, kind: type[nn.Module] = nn.Conv1d) -> bool:
    if type(convolution) is not kind:
        return False
    usual = (convolution.stride, convolution.dilation, convolution.padding_mode) == ((1,), (1,), "zeros")
    return usual and not altered(convolution, "", (kind,))


def _pointwise(module: Any, x: Tensor) -> Tensor:
    """Apply a convolution of width 1, or a linear map, to ``[B, T, C]``."""
    if isinstance(module, nn.Linear):
        return module(x)
    if not _plain(module):
        return module(x.transpose(1, 2)).transpose(1, 2)
    return F.linear(x, module.weight.squeeze(-1), module.bias)


def _convolve(parts: Convolution, h: Tensor, lengths: Tensor | None) -> Tensor:
    depthwise: Any = parts.depthwise
    norm: Any = parts.depthwise_norm
    y = _pointwise(parts.pointwise1, h)  # [B, T, 2D]
    frames = y.shape[1]
    batch = type(norm) is nn.BatchNorm1d and norm.training
    if lengths is not None and (batch or type(norm) is nn.GroupNorm):
        # zeros leave the GLU as zeros, and the frames count in the statistics
        y = y.masked_fill(~frame_mask(lengths, frames)[..., None], 0.0)
        lengths = None
    ahead = depthwise.kernel_size[0] // 2 if parts.causal else 0
    if not _plain(depthwise, parts.depthwise_class) or not readable((frozenset(NORMS),), norm):
        return _pointwise(parts.pointwise2, _called(parts, y, lengths, ahead))
    if ahead:
        # a causal convolution is a centred one, half a kernel later
        y = F.pad(y, (0, 0, ahead, 0))
        lengths = None if lengths is None else lengths + ahead
    options: dict[str, Any] = {"norm": NORMS[type(norm)]}
    if type(norm) is not nn.Identity:
        options |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
    if type(norm) is nn.GroupNorm:
        options["num_groups"] = norm.num_groups
    elif type(norm) is nn.BatchNorm1d:
        options |= {"running_mean": norm.running_mean, "running_var": norm.running_var, "training": batch}
        if batch:
            options["momentum"] = norm.momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
    bias = depthwise.bias
    y = ops.glu_depthwise_conv(
        y,
        depthwise.weight.squeeze(1).to(y.dtype),
        None if bias is None else bias.to(y.dtype),
        lengths=lengths,
        activation=parts.activation,
        **options,
    )
    return _pointwise(parts.pointwise2, y[:, :frames])


def _called(parts: Convolution, y: Tensor, lengths: Tensor | None, ahead: int) -> Tensor:
    """Call the depthwise convolution and its norm on ``[B, T, 2D]``, as the peer does."""
    y = F.glu(y, -1)
    if lengths is not None:
        y = y.masked_fill(~frame_mask(lengths, y.shape[1])[..., None], 0.0)
    y = F.pad(y.transpose(1, 2), (2 * ahead, 0)) if ahead else y.transpose(1, 2)
    y = parts.depthwise(y)  # [B, D, T]
    by_channel = any(isinstance(m, nn.LayerNorm) for m in parts.depthwise_norm.modules())
    y = parts.depthwise_norm(y.transpose(1, 2)) if by_channel else parts.depthwise_norm(y).transpose(1, 2)
    return ACTIVATIONS[parts.activation](y)
