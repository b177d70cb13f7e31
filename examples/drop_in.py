"""Compute the Conformer layers of loaded torchaudio and transformers models by lcconformer's kernels, in place.

    python examples/drop_in.py

The models keep their interface, their outputs and their state dicts.  Needs torchaudio and transformers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchaudio.models import Conformer
from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerModel

import lcconformer


def accelerate_and_compare(name: str, model: nn.Module, *inputs: torch.Tensor) -> None:
    """Accelerate a copy of ``model``; print the report and how far the outputs and state dicts are apart."""
    accelerated = copy.deepcopy(model)
    report = lcconformer.accelerate(accelerated)
    with torch.no_grad():
        before, after = model(*inputs)[0], accelerated(*inputs)[0]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    accelerated.load_state_dict(model.state_dict())  # the names and shapes are untouched
    print(f"{name}: {report}\n  largest difference of the outputs: {(after - before).abs().max():.1e}")


def main() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([100, 100])

    torchaudio_model = Conformer(80, num_heads=4, ffn_dim=128, num_layers=4, depthwise_conv_kernel_size=31).eval()
    accelerate_and_compare("torchaudio", torchaudio_model, torch.randn(2, 100, 80), lengths)

    # a small model with random weights; Wav2Vec2ConformerModel.from_pretrained(...) is treated alike
    config = Wav2Vec2ConformerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_depthwise_kernel_size=7,
        num_conv_pos_embedding_groups=4,
    )
    accelerate_and_compare("transformers", Wav2Vec2ConformerModel(config).eval(), torch.randn(2, 16_000))

    # or build torchaudio's Conformer from here, by its own signature, and load its weights
    conformer = lcconformer.Conformer(80, num_heads=4, ffn_dim=128, num_layers=4, depthwise_conv_kernel_size=31).eval()
    conformer.load_state_dict(torchaudio_model.state_dict())
    print("lcconformer.Conformer loads torchaudio's weights")


if __name__ == "__main__":
    main()
