"""transformers' ``AutoConfig`` and ``AutoModel`` for our encoders: importing this module registers both.

    import lcconformer.auto
    model = transformers.AutoModel.from_pretrained("models/small")

The directory may be one of ``ConformerEncoder.save_pretrained`` or one of transformers itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .config import ConformerConfig
from .encoder import ConformerEncoder
from .pretrained import MODEL_TYPE

try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput
except ImportError as error:
    raise ImportError("lcconformer.auto needs transformers: pip install transformers") from error

__all__ = ["LCConformerConfig", "LCConformerModel"]

_FIELDS = {field.name: field.default for field in dataclasses.fields(ConformerConfig)}


class LCConformerConfig(PretrainedConfig):
    """The fields of :class:`~lcconformer.ConformerConfig`, in transformers' form.

    Raises:
        ValueError: a field is out of range.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_dim",
    }

    def __init__(self, **values: Any) -> None:
        for name, default in _FIELDS.items():
            setattr(self, name, values.pop(name, default))
        self.encoder_config()
        super().__init__(**values)

    def encoder_config(self) -> ConformerConfig:
        """The same configuration for :class:`~lcconformer.ConformerEncoder`."""
        return ConformerConfig(**{name: getattr(self, name) for name in _FIELDS})


class LCConformerModel(PreTrainedModel):
    """A :class:`~lcconformer.ConformerEncoder` (``.encoder``) as a model of transformers.

    Args:
        config: its configuration.
    """

    config_class = LCConformerConfig
    base_model_prefix = "encoder"  # so that the names of ConformerEncoder.save_pretrained are found
    main_input_name = "input_features"
    supports_gradient_checkpointing = True  # by loops: transformers sets the encoder's attribute of that name

    def __init__(self, config: LCConformerConfig) -> None:
        super().__init__(config)
        self.encoder = ConformerEncoder(config.encoder_config())
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """The encoder has initialised itself."""

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        *,
        depth: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_unused: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """Encode.

        Args:
            input_features: ``[B, T, input_dim]``, or ``[B, T, d_model]`` without ``input_dim``.
            attention_mask: ``[B, T]``, 1 or True at real frames, which precede the padding; None: all frames are real.
            depth: number of loops; None: all.
            output_hidden_states: also return the input of the first loop and the output of each.
            return_dict: False: return a tuple.

        Returns:
            ``last_hidden_state [B, T', d_model]`` and ``hidden_states``, a tuple of ``depth + 1`` or None.
        """
        lengths = None if attention_mask is None else attention_mask.long().sum(-1)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.encoder(input_features, lengths, depth=depth, return_hidden_states=bool(hidden))
        states: Any = tuple(outputs[2]) if hidden else None
        if return_dict is False:
            return (outputs[0],) if states is None else (outputs[0], states)
        return BaseModelOutput(last_hidden_state=outputs[0], hidden_states=states)


AutoConfig.register(MODEL_TYPE, LCConformerConfig, exist_ok=True)
AutoModel.register(LCConformerConfig, LCConformerModel, exist_ok=True)
