"""`to_lcconformer`: encoders with the weights of other packages' Conformers, against those."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lcconformer
from lcconformer import ConformerEncoder
from lcconformer.interop import to_lcconformer

from .peers import randomise


def wav2vec2(transformers, position="relative", **changes):
    from transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer import Wav2Vec2ConformerEncoder

    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=3, conv_depthwise_kernel_size=7,
        position_embeddings_type=position, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **changes,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return randomise(Wav2Vec2ConformerEncoder(config)).eval()


def parakeet(transformers, **changes):
    config = transformers.ParakeetEncoderConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=3, intermediate_size=40, num_hidden_layers=3,
        conv_kernel_size=7, num_mel_bins=16, subsampling_conv_channels=8, subsampling_factor=4, **changes,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return randomise(transformers.ParakeetEncoder(config)).eval()


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("group", [False, True], ids=["batch", "group"])
@pytest.mark.parametrize("first", [False, True], ids=["attention first", "convolution first"])
def test_torchaudio(torchaudio_conformer, padded, group, first):
    peer = randomise(torchaudio_conformer.Conformer(16, 4, 32, 3, 7, 0.1, group, first)).eval()
    before = copy.deepcopy(peer.state_dict())
    encoder = to_lcconformer(peer)
    assert not encoder.training
    assert encoder.config.dropout == 0.1
    x, lengths = torch.randn(3, 13, 16), torch.tensor([13, 9, 2] if padded else [13, 13, 13])
    got, got_lengths = encoder(x, lengths)
    torch.testing.assert_close(got, peer(x, lengths)[0], rtol=0, atol=1e-5)
    assert torch.equal(got_lengths, lengths)
    # the peer is as it was, and shares no memory with ours
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in peer.state_dict().items())
    assert type(peer.conformer_layers[0]) is torchaudio_conformer.ConformerLayer


def test_what_is_ours_works_on_it(torchaudio_conformer, tmp_path):
    peer = randomise(torchaudio_conformer.Conformer(16, 4, 32, 3, 7)).double().eval()
    encoder = to_lcconformer(peer)
    x, lengths = torch.randn(2, 9, 16).double(), torch.tensor([9, 5])
    want = peer(x, lengths)[0]
    encoder.save_pretrained(tmp_path)
    torch.testing.assert_close(ConformerEncoder.from_pretrained(tmp_path)(x, lengths)[0], want)
    peer.conformer_layers = peer.conformer_layers[:2]
    torch.testing.assert_close(encoder(x, lengths, depth=2)[0], peer(x, lengths)[0])
    assert len(lcconformer.share(encoder).layers) == 1
    assert to_lcconformer(peer.train()).training


def test_accelerated_and_shared_layers(torchaudio_conformer):
    peer = randomise(torchaudio_conformer.Conformer(16, 4, 32, 3, 7)).eval()
    peer.conformer_layers[2] = peer.conformer_layers[0]
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 5])
    want = peer(x, lengths)[0]
    lcconformer.accelerate(peer, strict=True)
    encoder = to_lcconformer(peer)
    assert encoder.layer_map == (0, 1, 0)
    torch.testing.assert_close(encoder(x, lengths)[0], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("position", ["relative", None])
@pytest.mark.parametrize("act", ["swish", "gelu"])
def test_wav2vec2_conformer(transformers, position, padded, act):
    peer = wav2vec2(transformers, position, hidden_act=act)
    encoder = to_lcconformer(peer.layers)
    x = torch.randn(3, 13, 24)
    lengths = torch.tensor([13, 6, 1]) if padded else None
    mask = torch.arange(13) < lengths[:, None] if padded else None
    want = peer(x.clone(), mask).last_hidden_state
    if padded:
        x = x * mask[..., None]  # as the peer does
    torch.testing.assert_close(peer.layer_norm(encoder(x, lengths)[0]), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("bias", [True, False])
def test_parakeet(transformers, padded, bias):
    peer = parakeet(transformers, convolution_bias=bias)
    encoder = to_lcconformer(peer.layers)
    features, mask = torch.randn(2, 52, 16), torch.ones(2, 52, dtype=torch.bool)
    if padded:
        mask[1, 30:] = False
    out = peer(features, attention_mask=mask)
    x, lengths = peer.subsampling(features, mask) * peer.input_scale, out.attention_mask.sum(-1)
    real = out.attention_mask.bool()
    assert bool(real.all()) != padded
    torch.testing.assert_close(encoder(x, lengths)[0][real], out.last_hidden_state[real], rtol=0, atol=2e-5)


def test_whole_encoders_of_transformers_are_refused(transformers):
    for peer in (wav2vec2(transformers), parakeet(transformers), nn.Linear(2, 2), nn.ModuleList()):
        with pytest.raises(
            ValueError, match=r"to_lcconformer: got .*; expected torchaudio's Conformer, or .*encoder\.layers"
        ):
            to_lcconformer(peer)


@pytest.mark.parametrize("kind", ["rotary", "relative_key"])
def test_other_positions_are_refused(transformers, kind):
    peer = wav2vec2(transformers, "relative")
    peer.layers[0].self_attn.position_embeddings_type = kind
    with pytest.raises(ValueError, match=rf"layer 0: position_embeddings_type '{kind}'; expected 'relative' or None"):
        to_lcconformer(peer.layers)


def test_parakeet_without_biases_is_refused(transformers):
    peer = parakeet(transformers, attention_bias=False)  # of its feed-forward modules too
    with pytest.raises(ValueError, match="layer 0: a feed-forward module has no biases"):
        to_lcconformer(peer.layers)


def test_parakeet_with_heads_of_another_width_is_refused(transformers):
    peer = parakeet(transformers, head_dim=4)
    with pytest.raises(ValueError, match=r"layer 0: .*of other shapes than ours: attention\.out\.weight"):
        to_lcconformer(peer.layers)


def test_layers_of_other_packages_are_refused(transformers):
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertEncoderLayer

    config = transformers.Wav2Vec2BertConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, conv_depthwise_kernel_size=7
    )
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="layer 0: no configuration describes this layer"):
        to_lcconformer(nn.ModuleList([Wav2Vec2BertEncoderLayer(config)]))


def test_layers_that_no_configuration_describes_are_refused(torchaudio_conformer):
    def peer():
        return torchaudio_conformer.Conformer(16, 4, 32, 2, 7)

    other = peer()
    other.conformer_layers[1].self_attn.num_heads = 2
    with pytest.raises(ValueError, match="layer 1 is not like the first"):
        to_lcconformer(other)
    other = peer()
    other.conformer_layers[1].conv_module.sequential[3].eps = 1e-3
    with pytest.raises(ValueError, match=r"layer 1: the norm of the convolution has eps=0\.001"):
        to_lcconformer(other)
    other = peer()
    other.conformer_layers[0].ffn1.sequential[2] = nn.GELU()
    with pytest.raises(ValueError, match="layer 0: activations gelu, silu; ours has one for all"):
        to_lcconformer(other)
    other = peer()
    other.conformer_layers[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="layer 0: ours has no place for scale"):
        to_lcconformer(other)
    other = peer()
    other.conformer_layers[1].ffn2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer 1: ffn2"):
        to_lcconformer(other)
    with pytest.raises(ValueError, match=r"layer 0: .*no adapter for this layer"):
        to_lcconformer(nn.ModuleList([nn.Linear(2, 2)]))
