"""The one description of an encoder: a frozen dataclass, validated once, to and from JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .sharing import sharing_map
from .validation import is_integer, is_number

__all__ = ["ConformerConfig"]

_CHOICES = {
    "position": ("relative", "rotary", "none"),
    "rotary_input": ("query_key", "hidden"),
    "conv_norm": ("layer", "batch", "group", "none"),
    "conv_norm_statistics": ("shared", "per_depth"),
    "activation": ("silu", "gelu", "relu"),
    "padding": ("masked", "peer"),
    "subsampling": ("none", "stack", "conv"),
    "weights": ("float", "int8"),
}
CONDITIONINGS = ("layer_norm", "step", "film", "lora")
_FLAGS = ("attention_bias", "conv_bias", "convolution_first")
# far beyond any use; a damaged or hostile file must not make us allocate what it asks for
_LARGEST = {
    "d_model": 1 << 16,
    "num_heads": 1 << 16,
    "ffn_dim": 1 << 20,
    "num_layers": 10_000,
    "subsampling_factor": 1 << 10,
    "conv_norm_groups": 1 << 16,
    "lora_rank": 1 << 16,
    "input_dim": 1 << 20,
}


@dataclass(frozen=True)
class ConformerConfig:
    """Configuration of a :class:`~lcconformer.ConformerEncoder`.

    Attributes:
        d_model: width of the residual stream.
        num_heads: attention heads; ``d_model`` is divided among them.
        ffn_dim: hidden width of the two feed-forward modules.
        num_layers: N, the number of loops of a full run.
        conv_kernel_size: K of the depthwise convolution, odd, 1 to 63.
        dropout: on every branch, inside the feed-forward modules and on attention weights.
        input_dim: width of the input features; a front end projects them to ``d_model``.  None: inputs are ``d_model`` wide.
        subsampling: ``"none"``, ``"stack"`` (concatenate neighbouring frames) or ``"conv"`` (3x3 convolutions of stride 2).
        subsampling_factor: frames merged into one; 2 or more for ``"stack"``, 2 or 4 for ``"conv"``.
        position: ``"relative"`` (Transformer-XL), ``"rotary"`` or ``"none"``.
        rotary_input: ``"query_key"`` rotates queries and keys (RoFormer); ``"hidden"`` rotates the hidden states before
            the query and key projections, as transformers' Wav2Vec2Conformer does.
        conv_norm: norm after the depthwise convolution.  BatchNorm mixes the statistics of all depths of a shared layer.
        conv_norm_groups: groups of ``conv_norm="group"``.
        conv_norm_statistics: running statistics of BatchNorm, one set for all depths or one per depth.
        activation: of the feed-forward modules and the convolution module.
        attention_bias: biases of the query, key, value and output projections.
        conv_bias: biases of the pointwise and depthwise convolutions.
        convolution_first: convolution before attention.
        layer_norm_eps: epsilon of every norm.
        sharing: which weights each depth uses (:func:`~lcconformer.sharing.sharing_map`).
        conditioning: what distinguishes the depths of a shared layer: any of ``"layer_norm"``, ``"step"``, ``"film"``,
            ``"lora"``; each starts as the identity.
        lora_rank: rank of ``"lora"``.
        padding: ``"masked"``: padding never leaks, a batch gives each utterance what it would get alone.
            ``"peer"``: as torchaudio and others do, the convolution and its norm see the padding.
        weights: how the six matrices of a layer are stored: ``"float"``, or ``"int8"``
            (:func:`~lcconformer.quantize` makes such an encoder of a trained one).

    Raises:
        ValueError: a value out of range; the message says which, what was got and what is expected.
    """

    d_model: int = 256
    num_heads: int = 4
    ffn_dim: int = 1024
    num_layers: int = 12
    conv_kernel_size: int = 31
    dropout: float = 0.1
    input_dim: int | None = None
    subsampling: str = "none"
    subsampling_factor: int = 1
    position: str = "relative"
    rotary_input: str = "query_key"
    conv_norm: str = "layer"
    conv_norm_groups: int = 1
    conv_norm_statistics: str = "shared"
    activation: str = "silu"
    attention_bias: bool = True
    conv_bias: bool = True
    convolution_first: bool = False
    layer_norm_eps: float = 1e-5
    sharing: str | tuple[int, ...] = "all"
    conditioning: tuple[str, ...] = ()
    lora_rank: int = 8
    padding: str = "masked"
    weights: str = "float"

    def __post_init__(self) -> None:
        def fail(name: str, expected: str) -> None:
            raise ValueError(f"ConformerConfig: {name} is {getattr(self, name)!r}; expected {expected}")

        for name, largest in _LARGEST.items():
            value = getattr(self, name)
            if not (is_integer(value) and 1 <= value <= largest) and not (name == "input_dim" and value is None):
                optional = "None or " if name == "input_dim" else ""
                fail(name, f"{optional}a positive integer, at most {largest}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                fail(name, "True or False")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                fail(name, "one of " + ", ".join(map(repr, choices)))
        if self.d_model % self.num_heads:
            fail("num_heads", f"a divisor of d_model = {self.d_model}")
        if self.position == "relative" and self.d_model % 2:
            fail("d_model", "an even number with position='relative'")
        if self.position == "rotary" and (self.d_model // self.num_heads) % 2:
            fail(
                "num_heads", f"an even head width d_model / num_heads with position='rotary' (d_model = {self.d_model})"
            )
        kernel = self.conv_kernel_size
        if not is_integer(kernel) or not 1 <= kernel <= 63 or kernel % 2 == 0:
            fail("conv_kernel_size", "an odd integer from 1 to 63")
        if not is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            fail("dropout", "0 <= dropout < 1")
        if not is_number(self.layer_norm_eps) or self.layer_norm_eps <= 0.0:
            fail("layer_norm_eps", "a positive, finite number")
        if self.d_model % self.conv_norm_groups:
            fail("conv_norm_groups", f"a divisor of d_model = {self.d_model}")
        if self.conv_norm_statistics == "per_depth" and self.conv_norm != "batch":
            fail("conv_norm_statistics", "'shared' unless conv_norm='batch'")
        if self.subsampling == "none" and self.subsampling_factor != 1:
            fail("subsampling_factor", "1 with subsampling='none'")
        if self.subsampling == "stack" and self.subsampling_factor < 2:
            fail("subsampling_factor", "2 or more with subsampling='stack'")
        if self.subsampling == "conv" and self.subsampling_factor not in (2, 4):
            fail("subsampling_factor", "2 or 4 with subsampling='conv'")
        if self.subsampling != "none" and self.input_dim is None:
            fail("input_dim", f"the width of the input features with subsampling={self.subsampling!r}")
        if isinstance(self.conditioning, str):
            fail("conditioning", f"a tuple, ({self.conditioning!r},) for one form")
        if not isinstance(self.conditioning, (tuple, list)):
            fail("conditioning", "a tuple of forms")
        if not isinstance(self.sharing, (str, tuple, list)):
            fail("sharing", "the name of a form or a tuple of layer indices")
        # JSON has lists only
        object.__setattr__(self, "conditioning", tuple(self.conditioning))
        if not isinstance(self.sharing, str):
            object.__setattr__(self, "sharing", tuple(self.sharing))
        unknown = [c for c in self.conditioning if c not in CONDITIONINGS]
        if unknown or len({*self.conditioning}) != len(self.conditioning):
            fail("conditioning", "a subset of " + ", ".join(map(repr, CONDITIONINGS)))
        if self.weights == "int8" and "lora" in self.conditioning:
            fail("weights", "'float' with conditioning 'lora', which adds to the matrices")
        sharing_map(self.sharing, self.num_layers)

    def replace(self, **changes: Any) -> ConformerConfig:
        """A copy with some values changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """One JSON object, a key per field."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ConformerConfig:
        """Inverse of :meth:`to_json`; missing keys take their defaults.

        Raises:
            ValueError: not a JSON object, or a key that is no field.
        """
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"ConformerConfig.from_json: not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"ConformerConfig.from_json: got a JSON {type(values).__name__}; expected an object")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"ConformerConfig.from_json: unknown keys {', '.join(unknown)}; expected some of {', '.join(sorted(known))}"
            )
        return cls(**values)
