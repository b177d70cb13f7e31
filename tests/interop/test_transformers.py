"""`ConformerLayer` with the weights of transformers' layers, against those layers."""

from __future__ import annotations

import pytest
import torch

from lcconformer import ConformerConfig, ConformerLayer
from lcconformer.interop.keys import from_peer, to_peer
from lcconformer.interop.transformers import LAYER_KEYS, PARAKEET_LAYER_KEYS

from .peers import randomise


def wav2vec2_encoder(transformers, position, attention, act="swish", **changes):
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=1, conv_depthwise_kernel_size=7,
        position_embeddings_type=position, hidden_act=act, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, conformer_conv_dropout=0.0, layerdrop=0.0,
        **changes,
    )  # fmt: skip
    config._attn_implementation = attention
    encoder = Wav2Vec2ConformerEncoder(config)
    randomise(encoder)
    return encoder


def ours_like(config: ConformerConfig, keys, layer) -> ConformerLayer:
    ours = ConformerLayer(config)
    state = from_peer(keys, layer.state_dict())
    ours.load_state_dict(state)
    assert {name for key in keys for name in key.theirs} >= set(layer.state_dict())
    return ours


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["relative", "rotary", None])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("frames", [1, 2, 13, 64])
def test_wav2vec2_conformer(transformers, position, attention, padded, frames):
    """The encoder of one layer: every frame agrees to 1e-5, those of padding included (padding="peer")."""
    encoder = wav2vec2_encoder(transformers, position, attention).eval()
    config = ConformerConfig(
        d_model=24, num_heads=3, ffn_dim=40, num_layers=1, conv_kernel_size=7, dropout=0.0, padding="peer",
        position=position or "none", rotary_input="hidden", conv_norm="batch", conv_bias=False,
    )  # fmt: skip
    layer = ours_like(config, LAYER_KEYS, encoder.layers[0]).eval()
    x = torch.randn(3, frames, 24)
    lengths = torch.tensor([frames, max(1, frames // 2), 1]) if padded else None
    mask = torch.arange(frames) < lengths[:, None] if padded else None
    # the encoder writes zeros into its input's padding
    want = encoder(x.clone(), mask).last_hidden_state
    if padded:
        x = x * mask[..., None]
    got = encoder.layer_norm(layer(x, lengths))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["relative", "rotary"])
@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_wav2vec2_conformer_trains_alike(transformers, position, act):
    """Training mode: output, all gradients and BatchNorm statistics."""
    encoder = wav2vec2_encoder(transformers, position, "eager", act).train()
    config = ConformerConfig(
        d_model=24, num_heads=3, ffn_dim=40, num_layers=1, conv_kernel_size=7, dropout=0.0, padding="peer",
        position=position, rotary_input="hidden", conv_norm="batch", conv_bias=False, activation=act,
    )  # fmt: skip
    layer = ours_like(config, LAYER_KEYS, encoder.layers[0]).train()
    x, lengths = torch.randn(2, 13, 24), torch.tensor([13, 6])
    mask = torch.arange(13) < lengths[:, None]
    x = x * mask[..., None]
    weight = torch.randn_like(x)
    want = encoder(x.clone(), mask).last_hidden_state
    got = encoder.layer_norm(layer(x, lengths))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    gradients = to_peer(LAYER_KEYS, {name: p.grad for name, p in layer.named_parameters()})
    for name, p in encoder.layers[0].named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
    theirs, ours = encoder.layers[0].conv_module.batch_norm, layer.conv.depthwise_norm
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(ours.get_buffer(name), theirs.get_buffer(name))


def parakeet_encoder(transformers, attention, **changes):
    config = transformers.ParakeetEncoderConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, intermediate_size=40, num_hidden_layers=1,
        conv_kernel_size=7, num_mel_bins=16, subsampling_conv_channels=8, subsampling_factor=4, **changes,
    )  # fmt: skip
    config._attn_implementation = attention
    encoder = transformers.ParakeetEncoder(config)
    randomise(encoder)
    return encoder


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("bias", [True, False], ids=["conv-bias", "no-conv-bias"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_parakeet(transformers, attention, bias, padded):
    """One block in evaluation: real frames agree to 1e-5; it zeroes padding before the convolution, as "masked" does."""
    encoder = parakeet_encoder(transformers, attention, convolution_bias=bias).eval()
    config = ConformerConfig(
        d_model=24, num_heads=3, ffn_dim=40, num_layers=1, conv_kernel_size=7, dropout=0.0, conv_norm="batch",
        conv_bias=bias,
    )  # fmt: skip
    block = encoder.layers[0]
    layer = ours_like(config, PARAKEET_LAYER_KEYS, block).eval()
    frames = 13
    x = torch.randn(3, frames, 24)
    lengths = torch.tensor([13, 6, 1]) if padded else None
    keep = torch.arange(frames) < (lengths if padded else torch.full((3,), frames))[:, None]
    mask = (keep[:, None] & keep[:, :, None])[:, None] if padded else None
    want = block(x, attention_mask=mask, position_embeddings=encoder.encode_positions(x))
    got = layer(x, lengths)
    torch.testing.assert_close(got[keep], want[keep], rtol=0, atol=1e-5)


def test_keys_invert(transformers):
    """To the peer's names and back: the same tensors."""
    wav2vec2, parakeet = (make(transformers, *a).layers[0] for make, a in (
        (wav2vec2_encoder, ("relative", "eager")), (parakeet_encoder, ("eager",)),
    ))  # fmt: skip
    for layer, keys in ((wav2vec2, LAYER_KEYS), (parakeet, PARAKEET_LAYER_KEYS)):
        state = layer.state_dict()
        again = to_peer(keys, from_peer(keys, state))
        assert again.keys() == state.keys()
        assert all(torch.equal(again[name], value) for name, value in state.items())
