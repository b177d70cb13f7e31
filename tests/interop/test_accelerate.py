"""`accelerate`: the model of another package computes the same, under the same names, by our kernels."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lcconformer
from lcconformer import accelerate, ops, restore
from lcconformer.interop.accelerated import AcceleratedLayer

from .peers import randomise


@pytest.fixture
def torchaudio_model(torchaudio_conformer):
    def make(*, dropout=0.0, group=False, first=False) -> nn.Module:
        model = nn.ModuleDict({"encoder": torchaudio_conformer.Conformer(16, 4, 32, 3, 7, dropout, group, first)})
        randomise(model)
        return model

    return make


@pytest.fixture
def wav2vec2_model(transformers):
    def make(position="relative", attention="sdpa", dropout=0.0, **changes) -> nn.Module:
        config = transformers.Wav2Vec2ConformerConfig(
            hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, conv_depthwise_kernel_size=7,
            position_embeddings_type=position, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
            conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 4), num_feat_extract_layers=2, vocab_size=11,
            mask_time_prob=0.0, layerdrop=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
            **{f"{d}_dropout": dropout for d in ("hidden", "activation", "attention", "conformer_conv")} | changes,
        )  # fmt: skip
        config._attn_implementation = attention
        model = transformers.Wav2Vec2ConformerForCTC(config)
        randomise(model)
        return model.eval()

    return make


@pytest.fixture
def parakeet_model(transformers):
    def make(attention="sdpa", **changes) -> nn.Module:
        dropouts = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
        config = transformers.ParakeetEncoderConfig(
            hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, conv_kernel_size=7,
            num_mel_bins=16, subsampling_conv_channels=8, subsampling_factor=4,
            **{"num_key_value_heads": 3, **dropouts, **changes},
        )  # fmt: skip
        config._attn_implementation = attention
        model = transformers.ParakeetEncoder(config)
        randomise(model)
        return model.eval()

    return make


@pytest.fixture
def encoder(transformers):
    """``encoder(name, position, attention)``: a stack of two layers, called with hidden states ``[B, T, 24]`` and a mask."""
    sizes = {"hidden_size": 24, "conv_depthwise_kernel_size": 7}
    seamless = {
        "speech_encoder_attention_heads": 3, "speech_encoder_intermediate_size": 40, "speech_encoder_layers": 2,
        "speech_encoder_layerdrop": 0.0, "speech_encoder_dropout": 0.0,
    }  # fmt: skip
    wav2vec2 = {
        "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 2, "layerdrop": 0.0,
        **{f"{d}_dropout": 0.0 for d in ("hidden", "activation", "attention", "conformer_conv")},
    }  # fmt: skip
    clipped = {"left_max_position_embeddings": 5, "right_max_position_embeddings": 3}
    conv_positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    kinds = {
        "wav2vec2_conformer": ("Wav2Vec2Conformer", "Wav2Vec2ConformerConfig", wav2vec2 | conv_positions),
        "wav2vec2_bert": ("Wav2Vec2Bert", "Wav2Vec2BertConfig", wav2vec2 | clipped),
        "seamless_m4t": ("SeamlessM4TConformer", "SeamlessM4TConfig", seamless),
        "seamless_m4t_v2": ("SeamlessM4Tv2Conformer", "SeamlessM4Tv2Config", seamless | clipped),
    }

    def make(name: str, position: str | None, attention: str = "sdpa", **changes: Any) -> nn.Module:
        prefix, config_name, settings = kinds[name]
        config = getattr(transformers, config_name)(
            **{**sizes, **settings, "position_embeddings_type": position, **changes}
        )
        config._attn_implementation = attention
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        stack = getattr(module, f"{prefix}Encoder")(config)
        randomise(stack)
        return stack.eval()

    return make


def check_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name


def accelerated_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, AcceleratedLayer)]


def output_of(stack: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y = stack(x, attention_mask=mask)
    return y if isinstance(y, Tensor) else y.last_hidden_state


def check_trains_alike(
    model: nn.Module, peer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], x: Tensor, real: Tensor
) -> None:
    """Outputs at real frames, gradients of the input and of every parameter, and statistics."""
    weight = torch.randn(*real.shape, 1) * real[..., None]
    found = []
    for m in (peer, model):
        m.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(m, leaf * 1.0)  # Wav2Vec2Conformer writes to its input
        (y * weight).sum().backward()
        found.append((y, leaf.grad, {n: p.grad for n, p in m.named_parameters()}))
    (want, want_x, want_p), (got, got_x, got_p) = found
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got_x, want_x, rtol=0, atol=2e-5 * float(want_x.abs().max()))
    assert got_p.keys() == want_p.keys()
    largest = max(float(p.abs().max()) for p in want_p.values() if p is not None)
    for name, gradient in want_p.items():
        if gradient is None:
            assert got_p[name] is None, name
        else:
            torch.testing.assert_close(
                got_p[name], gradient, rtol=0, atol=2e-5 * largest, msg=lambda m, name=name: f"{name}: {m}"
            )
    for (name, a), (_, b) in zip(model.named_buffers(), peer.named_buffers(), strict=True):
        if b is not None and b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        elif b is not None:
            assert torch.equal(a, b), name


# every peer: forward, gradients, statistics


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_torchaudio(torchaudio_model, served, group, first):
    model = torchaudio_model(group=group, first=first)
    peer = copy.deepcopy(model)
    report = accelerate(model)
    assert list(report.accelerated) == [f"encoder.conformer_layers.{i}" for i in range(3)]
    assert report.kept == ()
    check_same_state(model, peer.state_dict())

    x, lengths = torch.randn(2, 13, 16), torch.tensor([13, 6])
    real = torch.ones(2, 13, dtype=torch.bool)  # torchaudio computes padding as ours does
    for training in (False, True):
        model.train(training), peer.train(training)
        check_trains_alike(model, peer, lambda m, x: m["encoder"](x, lengths)[0], x, real)
    assert served == ["ops"] * 6
    model.eval(), peer.eval()
    with torch.no_grad():
        (got, got_lengths), (want, _) = model["encoder"](x, lengths), peer["encoder"](x, lengths)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert torch.equal(got_lengths, lengths)
    assert served[6:] == ["engine"] * 3


CASES = [
    *(("wav2vec2_conformer", position) for position in ("relative", "rotary", None)),
    *(("wav2vec2_bert", position) for position in ("relative_key", "relative", "rotary", None)),
    *(("seamless_m4t", position) for position in ("relative", "rotary")),
    ("seamless_m4t_v2", "relative_key"),
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "position"), CASES)
def test_encoders_of_transformers(encoder, served, name, position, attention):
    """Odd and tiny sizes, whole and padded, in evaluation and in training."""
    if name == "seamless_m4t_v2" and attention == "eager":
        said = only_reason(encoder(name, position, "eager"))
        assert said == "attention implementation 'eager'; ours takes the masks of 'sdpa'"
        return
    peer = encoder(name, position, attention)
    model = copy.deepcopy(peer)
    assert len(accelerate(model, strict=True).accelerated) == 2
    check_same_state(model, peer.state_dict())
    packed = position != "rotary"
    for frames in (1, 2, 13, 40):
        for padded in (False, True):
            x = torch.randn(3, frames, 24)
            lengths = torch.tensor([frames, max(1, frames // 2), 1]) if padded else torch.full((3,), frames)
            real = torch.arange(frames) < lengths[:, None]
            mask = real if padded else None
            del served[:]
            for training in (False, True):
                model.train(training), peer.train(training)
                check_trains_alike(model, peer, lambda m, x, mask=mask: output_of(m, x, mask), x, real)
            assert served == ["ops"] * 4
            model.eval(), peer.eval()
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    got, want = output_of(model, x.clone(), mask), output_of(peer, x.clone(), mask)
                torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
            assert served[4:] == ["engine" if packed else "ops"] * 4


def test_chunks_of_seamless_v2_are_left_to_the_peer(encoder, served):
    """Its attention within chunks is no padding; a chunk that holds all frames is."""
    peer = encoder("seamless_m4t_v2", "relative_key", speech_encoder_chunk_size=8, speech_encoder_left_chunk_num=0)
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    with torch.no_grad():
        for frames, ours in ((8, 2), (13, 0)):
            x, mask = torch.randn(2, frames, 24), torch.arange(frames) < torch.tensor([[frames], [5]])
            del served[:]
            torch.testing.assert_close(model(x, mask)[mask], peer(x, mask)[mask], rtol=0, atol=1e-5)
            assert len(served) == ours


@pytest.mark.parametrize("position", ["relative", "rotary"])
def test_a_whole_wav2vec2_conformer(wav2vec2_model, position):
    """From the waveform: hidden states, logits, loss and gradients, with the usual gelu."""
    model = wav2vec2_model(position)
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    audio = torch.randn(2, 400)
    mask = (torch.arange(400) < torch.tensor([[400], [230]])).long()
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    losses = []
    for m in (model, peer):
        out = m(audio, attention_mask=mask, labels=labels, output_hidden_states=True)
        out.loss.backward()
        losses.append(out)
    got, want = losses
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for g, w in zip(got.hidden_states, want.hidden_states):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(model.named_parameters(), peer.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parakeet(parakeet_model, served, attention):
    """In training its BatchNorms take the statistics of padding too, as accelerated ones do."""
    if attention == "eager" and importlib.metadata.version("transformers").startswith("5.17."):
        pytest.skip("transformers 5.17 gives NaN for a padded utterance with eager attention")
    model = parakeet_model(attention)
    peer = copy.deepcopy(model)
    assert len(accelerate(model, strict=True).accelerated) == 2
    features = torch.randn(2, 60, 16)
    mask = torch.arange(60) < torch.tensor([[60], [31]])
    for given in (None, mask):
        real = peer(features, attention_mask=mask).attention_mask.bool()
        assert 0 < real.sum() < real.numel()
        if given is None:
            real = torch.ones_like(real)
        for training in (False, True):
            model.train(training), peer.train(training)
            check_trains_alike(model, peer, lambda m, x, given=given: output_of(m, x, given), features, real)
        model.eval(), peer.eval()
        with torch.no_grad():
            got, want = model(features, attention_mask=given), peer(features, attention_mask=given)
        torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real], rtol=0, atol=1e-5)
        if given is not None:
            assert torch.equal(got.attention_mask, want.attention_mask)
    assert served == (["ops"] * 4 + ["engine"] * 2) * 2


def test_parakeet_without_biases(parakeet_model):
    peer = parakeet_model(attention_bias=False, convolution_bias=False)
    model = copy.deepcopy(peer)
    accelerate(model, strict=True)
    features = torch.randn(2, 60, 16)
    with torch.no_grad():
        torch.testing.assert_close(output_of(model, features, None), output_of(peer, features, None), rtol=0, atol=1e-5)


def test_parakeet_trains_steps_alike(parakeet_model):
    """Three steps of an optimizer made before accelerating, padded: the same weights and statistics."""
    model = parakeet_model()
    peer = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, peer)]
    accelerate(model, strict=True)
    mask = torch.arange(60) < torch.tensor([[60], [31]])
    for _ in range(3):
        features = torch.randn(2, 60, 16)
        for m, optimizer in zip((model, peer), optimizers):
            out = m.train()(features, attention_mask=mask)
            loss = (out.last_hidden_state * out.attention_mask[..., None]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


# dropout where the peer has it


PLACES = {
    "wav2vec2": ("ffn1.intermediate_dropout", "ffn2.output_dropout", "self_attn_dropout", "conv_module.dropout"),
    "torchaudio": ("ffn1.sequential.3", "ffn2.sequential.5", "self_attn_dropout", "conv_module.sequential.6"),
}


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
def test_dropout_is_in_the_same_place(encoder, torchaudio_model, served, kind, place):
    """What drops everything is no chance."""
    x = torch.randn(2, 13, 16 if kind == "torchaudio" else 24)
    if kind == "torchaudio":
        model = torchaudio_model()
        call = lambda m, x: m["encoder"](x, torch.tensor([13, 6]))[0]  # noqa: E731
    else:
        model = encoder("wav2vec2_conformer", "relative")
        call = lambda m, x: output_of(m, x, None)  # noqa: E731
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    for m in (model, peer):
        layers = [c for c in m.modules() if hasattr(c, "self_attn")]
        for one in layers:
            one.get_submodule(place).p = 1.0
        m.train()
    check_trains_alike(model, peer, call, x, torch.ones(2, 13, dtype=torch.bool))
    assert set(served) == {"ops"}
    model.eval(), peer.eval()
    torch.testing.assert_close(call(model, x.clone()), call(peer, x.clone()), rtol=0, atol=1e-5)


def test_parakeet_drops_within_feed_forwards_and_attention_alone(parakeet_model, monkeypatch):
    model = parakeet_model(activation_dropout=1.0)
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    features = torch.randn(2, 60, 16)
    model.train(), peer.train()
    check_trains_alike(model, peer, lambda m, x: output_of(m, x, None), features, torch.ones(2, 15, dtype=torch.bool))

    model = parakeet_model(attention_dropout=0.25)
    accelerate(model, strict=True)
    seen, own = [], ops.relpos_attention
    monkeypatch.setattr(ops, "relpos_attention", lambda *a, **k: (seen.append(k["dropout_p"]), own(*a, **k))[1])
    model.train()(features)
    model.eval()(features)
    assert seen == [0.25, 0.25, 0.0, 0.0]


def test_parakeet_drops_positions_of_each_utterance(parakeet_model, served):
    """Which ours cannot: the peer does."""
    model = parakeet_model(dropout_positions=0.5)
    accelerate(model, strict=True)
    model.train()(torch.randn(2, 60, 16))
    assert served == []
    model.train()(torch.randn(1, 60, 16))
    assert served == ["ops"] * 2


@pytest.mark.parametrize("kind", ["seamless_m4t", "torchaudio"])
def test_dropout_of_attention_weights_alone_is_not_the_engines(encoder, torchaudio_model, served, kind):
    """A layer in training with a frozen BatchNorm and no other dropout."""
    model = torchaudio_model() if kind == "torchaudio" else encoder("seamless_m4t", "relative")
    accelerate(model, strict=True)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    x = torch.randn(2, 13, 16 if kind == "torchaudio" else 24)

    def call() -> Tensor:
        with torch.no_grad():
            if kind == "torchaudio":
                return model["encoder"](x, torch.tensor([13, 6]))[0]
            return output_of(model, x.clone(), None)

    assert torch.equal(call(), call())
    assert set(served) == {"engine"}
    served.clear()
    for one in accelerated_layers(model):
        if kind == "torchaudio":
            one.self_attn.dropout = 0.25
        else:
            one.self_attn.dropout.p = 0.25
    assert not torch.equal(call(), call())
    assert set(served) == {"ops"}


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_keeps_its_mode_and_momentum(torchaudio_model, frozen, momentum):
    model = torchaudio_model().train()
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    for m in (model, peer):
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.train(not frozen).momentum = momentum
    lengths = torch.tensor([13, 6])
    for _ in range(2):
        x = torch.randn(2, 13, 16)
        torch.testing.assert_close(model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0], rtol=0, atol=1e-5)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")


# nothing else changes


@pytest.mark.parametrize("kind", ["torchaudio", "wav2vec2", "parakeet"])
def test_objects_names_and_classes_stay(torchaudio_model, wav2vec2_model, parakeet_model, kind):
    model = {"torchaudio": torchaudio_model, "wav2vec2": wav2vec2_model, "parakeet": parakeet_model}[kind]()
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    modules = {n: (id(m), type(m).__name__, type(m).__module__) for n, m in model.named_modules()}
    types = {n: type(m) for n, m in model.named_modules()}
    report = accelerate(model)
    assert len(accelerated_layers(model)) == len(report.accelerated) > 0
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert {n: (id(m), type(m).__name__, type(m).__module__) for n, m in model.named_modules()} == modules
    assert all(isinstance(m, types[n]) for n, m in model.named_modules())
    again = accelerate(model)
    assert (again.accelerated, again.kept) == ((), ())
    assert restore(model) == report.accelerated
    assert {n: type(m) for n, m in model.named_modules()} == types
    assert restore(model) == ()


def test_a_layer_by_itself(torchaudio_conformer):
    one = torchaudio_conformer.ConformerLayer(16, 32, 4, 7).eval()
    peer = copy.deepcopy(one)
    assert list(accelerate(one, strict=True).accelerated) == ["ConformerLayer"]
    x = torch.randn(13, 2, 16)
    torch.testing.assert_close(one(x, None), peer(x, None), rtol=0, atol=1e-5)
    assert restore(one) == ("ConformerLayer",)


def test_copies_and_pickles(encoder, served):
    model = encoder("seamless_m4t", "relative")
    accelerate(model, strict=True)
    x = torch.randn(1, 13, 24)
    with torch.no_grad():
        want = model(x)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            del served[:]
            torch.testing.assert_close(clone(x), want)
            assert served == ["engine"] * 2
            assert len(restore(clone)) == 2


def test_saves_and_loads(wav2vec2_model, tmp_path):
    """transformers reads the file as if nothing had happened, and loads into an accelerated model."""
    model = wav2vec2_model()
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    model.save_pretrained(tmp_path)
    again = type(peer).from_pretrained(tmp_path)
    check_same_state(again, peer.state_dict())
    randomise(peer)
    model.load_state_dict(peer.state_dict())
    audio = torch.randn(1, 400)
    with torch.no_grad():
        torch.testing.assert_close(model(audio).logits, peer(audio).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["wav2vec2", "parakeet"])
def test_checkpoints_activations(wav2vec2_model, parakeet_model, kind):
    model, x = (
        (wav2vec2_model(), torch.randn(1, 400)) if kind == "wav2vec2" else (parakeet_model(), torch.randn(1, 60, 16))
    )
    model.train()
    accelerate(model, strict=True)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        (model(x)[0] ** 2).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["wav2vec2_conformer", pytest.param("wav2vec2_bert", marks=pytest.mark.slow)])
def test_compiles_and_exports(encoder, name):
    """Layers in one graph for every T; and with them the encoder exports, whose own relative shift the exporter refuses."""
    stack = encoder(name, "relative")
    accelerate(stack, strict=True)
    torch._dynamo.reset()
    compiled = torch.compile(stack.layers[0], backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for frames in (13, 20):
            x = torch.randn(2, frames, 24)
            keep = (torch.arange(frames) < torch.tensor([[frames], [6]]))[:, None, None].expand(2, 1, frames, frames)
            table = stack.embed_positions(x)
            with torch.compiler.set_stance("default" if frames == 13 else "fail_on_recompile"):
                got = compiled(x, attention_mask=keep, relative_position_embeddings=table)
            want = stack.layers[0](x, attention_mask=keep, relative_position_embeddings=table)
            torch.testing.assert_close(got, want)

        def data(frames):
            return torch.randn(2, frames, 24), torch.arange(frames) < torch.tensor([[frames], [6]])

        frames = torch.export.Dim("T", min=3, max=512)
        program = torch.export.export(
            stack, data(13), dynamic_shapes={"hidden_states": {1: frames}, "attention_mask": {1: frames}}
        ).module()
        x, keep = data(31)
        want = stack(x.clone(), keep).last_hidden_state
        torch.testing.assert_close(program(x.clone(), keep).last_hidden_state, want)


def test_torchscript_is_traced_or_refused_with_what_to_do(torchaudio_model):
    model = torchaudio_model()["encoder"].eval()
    accelerate(model, strict=True)
    x, lengths = torch.randn(2, 13, 16), torch.tensor([13, 6])
    with pytest.raises(NotImplementedError, match=r"an accelerated ConformerLayer: call lcconformer\.restore\(model\)"):
        torch.jit.script(model)
    assert len(accelerated_layers(model)) == 3
    traced = torch.jit.trace(model, (x, lengths))
    restore(model)
    for program in (traced, torch.jit.script(model)):
        torch.testing.assert_close(program(x, lengths)[0], model(x, lengths)[0], rtol=0, atol=1e-5)


# where ours cannot stand in, the peer computes


def test_masks_with_holes_are_left_to_the_peer(torchaudio_model, encoder, served):
    model = torchaudio_model().eval()["encoder"]
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    x, mask = torch.randn(4, 1, 16), torch.tensor([[False, True, False, True]])
    assert torch.equal(model.conformer_layers[0](x, mask), peer.conformer_layers[0](x, mask))
    for name, position in (("wav2vec2_conformer", "relative"), ("wav2vec2_bert", "relative_key")):
        stack = encoder(name, position)
        twin = copy.deepcopy(stack)
        accelerate(stack, strict=True)
        left = torch.arange(13) >= torch.tensor([[0], [7]])  # padding ahead of the utterance
        x = torch.randn(2, 13, 24)
        assert torch.equal(output_of(stack, x.clone(), left), output_of(twin, x.clone(), left))
    assert served == []


@pytest.mark.parametrize("kind", ["wav2vec2", "parakeet"])
def test_attention_weights_come_from_the_peer(wav2vec2_model, parakeet_model, served, kind):
    """And asking once does not end the acceleration."""
    if kind == "wav2vec2":
        model, x = wav2vec2_model(attention="eager"), torch.randn(1, 400)
    else:
        model, x = parakeet_model(attention="eager"), torch.randn(1, 60, 16)
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    with torch.no_grad():
        got, want = (m(x, output_attentions=True, output_hidden_states=True) for m in (model, peer))
        assert served == []
        assert len(got.attentions) == len(want.attentions) == 2
        assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions))
        got, want = (m(x, output_hidden_states=True) for m in (model, peer))
    assert len(served) == 2
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for a, b in zip(got.hidden_states, want.hidden_states):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


class Scaled(nn.Linear):
    """A class that somebody put in the place of a linear map."""

    def forward(self, x):
        return 0.5 * super().forward(x)


INSIDE = {
    "torchaudio": (
        "ffn1", "ffn1.sequential.1", "ffn2.sequential.0", "ffn1.sequential.2", "self_attn.out_proj", "self_attn_dropout",
        "conv_module.layer_norm", "conv_module.sequential.0", "conv_module.sequential.2", "conv_module.sequential.3",
    ),
    "wav2vec2": (
        "ffn1", "ffn2.output_dense", "ffn1_layer_norm", "ffn1.intermediate_act_fn", "self_attn", "self_attn.linear_q",
        "self_attn.linear_pos", "conv_module.pointwise_conv1", "conv_module.depthwise_conv", "conv_module.batch_norm",
        "conv_module.glu", "conv_module.dropout", "final_layer_norm",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in INSIDE.items() for name in names])
def test_hooks_inside_run_once(torchaudio_model, encoder, kind, name):
    if kind == "torchaudio":
        model, inputs = torchaudio_model().eval()["encoder"], (torch.randn(2, 13, 16), torch.tensor([13, 6]))
        first = model.conformer_layers[0]
    else:
        model, inputs = encoder("wav2vec2_conformer", "relative", hidden_act="swish"), (torch.randn(2, 13, 24),)
        first = model.layers[0]
    accelerate(model, strict=True)

    def hooked(module, inputs, output):
        calls.append("post")
        return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    with torch.no_grad():
        before, calls = model(*inputs)[0], []
        module = first.get_submodule(name)
        module.register_forward_pre_hook(lambda m, i: calls.append("pre"))
        handle = module.register_forward_hook(hooked)
        assert not torch.allclose(model(*inputs)[0], before, atol=1e-4)
        assert calls == ["pre", "post"]
        handle.remove()
        torch.testing.assert_close(model(*inputs)[0], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["weight_norm", "prune", "parametrize", "replace", "quantize"])
@pytest.mark.parametrize("early", [False, True], ids=["later", "earlier"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_changed_weights_count(encoder, how, early):
    """Whether they are changed before or after accelerating."""
    model = encoder("seamless_m4t", "relative")
    peer = copy.deepcopy(model)
    x, mask = torch.randn(2, 13, 24), torch.arange(13) < torch.tensor([[13], [6]])
    if not early:
        accelerate(model, strict=True)
        with torch.no_grad():
            model(x, mask)  # packs
    for stack in (model, peer):
        for one in stack.layers:
            for m in (one.ffn1.intermediate_dense, one.self_attn.linear_v):
                if how == "weight_norm":
                    parametrizations.weight_norm(m)
                    m.parametrizations.weight.original0.data.mul_(0.5)
                elif how == "prune":
                    prune.l1_unstructured(m, "weight", 0.5)
                elif how == "parametrize":
                    parametrize.register_parametrization(m, "weight", nn.Softplus())
                elif how == "replace":
                    m.__class__ = Scaled
            if how == "quantize":
                torch.ao.quantization.quantize_dynamic(one.ffn1, {nn.Linear}, inplace=True)
    if early:
        accelerate(model, strict=True)
    with torch.no_grad():
        got, want = model(x, mask)[mask], peer(x, mask)[mask]
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if how == "quantize" else 1e-4)


@pytest.mark.parametrize("order", ["accelerate first", "PEFT first"])
@pytest.mark.parametrize("kind", ["torchaudio", "wav2vec2", "parakeet"])
def test_lora_by_peft(torchaudio_model, wav2vec2_model, parakeet_model, order, kind):
    """The same names, outputs and gradients of the adapters as on the peer, and they count as once merged."""
    peft = pytest.importorskip("peft", reason="pip install 'lcconformer[test]'")
    targets = {
        "torchaudio": r".*ffn\d\.sequential\.[14]",
        "wav2vec2": ["linear_q", "linear_v", "intermediate_dense"],
        "parakeet": ["q_proj", "v_proj", "linear1", "relative_k_proj"],
    }[kind]
    make, x = {
        "torchaudio": (torchaudio_model, torch.randn(2, 13, 16)),
        "wav2vec2": (wav2vec2_model, torch.randn(2, 400)),
        "parakeet": (parakeet_model, torch.randn(2, 60, 16)),
    }[kind]
    run = lambda m: m["encoder"](x, torch.tensor([13, 6]))[0] if kind == "torchaudio" else m(x)[0]  # noqa: E731
    peer = make().eval()
    model = copy.deepcopy(peer)
    before = run(peer)
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets)
    if order == "accelerate first":
        accelerate(model, strict=True)
    for m in (model, peer):
        torch.manual_seed(3)
        peft.inject_adapter_in_model(config, m)
        m.eval()
    if order == "PEFT first":
        accelerate(model, strict=True)
    check_same_state(model, peer.state_dict())
    got, want = run(model), run(peer)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert (got - before).abs().max() > 0.1
    got.square().sum().backward()
    want.square().sum().backward()
    adapters = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(adapters) >= 2 * 2 * 3
    for name in adapters:
        a, b = model.get_parameter(name).grad, peer.get_parameter(name).grad
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    for module in list(model.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    with torch.no_grad():
        torch.testing.assert_close(run(model), want, rtol=0, atol=1e-4)


# weights are packed for inference, and packed again when they change


@pytest.mark.parametrize("how", ["in place", "data", "optimizer", "load", "replaced"])
def test_packed_weights_follow_the_peers(encoder, served, how):
    model = encoder("seamless_m4t", "relative")
    twin = copy.deepcopy(model)
    accelerate(model, strict=True)
    x = torch.randn(2, 13, 24)
    with torch.no_grad():
        before = model(x)
    for m in (model, twin):
        weight = m.layers[1].self_attn.linear_k.weight
        with torch.no_grad():
            if how == "in place":
                weight.mul_(1.5)
            elif how == "data":
                weight.data *= 1.5
            elif how == "load":
                m.load_state_dict({n: v * 1.01 if v.is_floating_point() else v for n, v in m.state_dict().items()})
            elif how == "replaced":
                m.layers[1].self_attn.linear_k.weight = nn.Parameter(1.5 * weight)
        if how == "optimizer":
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.SGD(m.parameters(), lr=0.01, fused=True).step()
    with torch.no_grad():
        got, want = model(x), twin(x)
    assert (got - before).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert served == ["engine"] * 4


def test_the_engine_takes_positions_of_another_kind(encoder, served):
    """Each table that comes, also after another one of the same size."""
    model = encoder("seamless_m4t", "relative")
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    x = torch.randn(2, 13, 24)
    with torch.no_grad():
        for factor in (1.1, 1.0, 0.5, 1.1):
            table = peer.embed_positions(x) * factor
            got, want = (m.layers[0](x, relative_position_embeddings=table) for m in (model, peer))
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert served == ["engine"] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(encoder, dtype):
    model = encoder("seamless_m4t", "relative").to(dtype)
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    x, mask = torch.randn(2, 13, 24, dtype=dtype), torch.arange(13) < torch.tensor([[13], [6]])
    with torch.no_grad():
        got, want = model(x, mask)[mask], peer(x, mask)[mask]
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10 if dtype == torch.float64 else 0.1)


# what is left alone


def only_reason(model: nn.Module) -> str:
    state = {n: v.clone() for n, v in model.state_dict().items()}
    types = [type(m) for m in model.modules()]
    report = accelerate(model)
    assert report.accelerated == ()
    reasons = {reason for _, reason in report.kept}
    assert len(reasons) == 1
    assert [type(m) for m in model.modules()] == types
    check_same_state(model, state)
    with pytest.raises(
        ValueError, match=r"accelerate: strict=True, and the model is left as it was\n0 layers accelerated\n"
    ):
        accelerate(model, strict=True)
    return reasons.pop()


def test_left_alone_torchaudio(torchaudio_model, torchaudio_conformer):
    def changed(change):
        model = torchaudio_model()
        for one in model["encoder"].conformer_layers:
            change(one)
        return only_reason(model)

    class Other(torchaudio_conformer.ConformerLayer):
        pass

    class Tanh(nn.Tanh):
        pass

    for change, reason in (
        (lambda m: setattr(m.ffn2.sequential, "2", Tanh()), "activation Tanh"),
        (lambda m: setattr(m, "forward", m.forward), "its forward was replaced by another tool"),
        (lambda m: setattr(m.ffn1, "forward", m.ffn1.forward), "ffn1 has a forward of its own"),
        (lambda m: setattr(m.conv_module.sequential[2], "dilation", (2,)), "is not one of stride 1 with 'same'"),
        (lambda m: m.ffn1.register_forward_hook(print), "ffn1 has hooks, which would not run"),
        (lambda m: setattr(m.self_attn, "bias_k", nn.Parameter(torch.zeros(1))), "self_attn has added keys"),
        (lambda m: setattr(m, "ffn2", None), "unknown structure: "),
        (lambda m: setattr(m, "ffn2", nn.Identity()), "unknown structure: "),
        (lambda m: setattr(m.final_layer_norm, "bias", None), "final_layer_norm has no weight or no bias"),
        (lambda m: setattr(m, "__class__", Other), "a subclass of ConformerLayer may compute something else"),
    ):
        said = changed(change)
        assert re.search(reason, said), said


def test_left_alone_transformers(wav2vec2_model, parakeet_model):
    assert "attention implementation 'flex_attention'" in only_reason(wav2vec2_model(attention="flex_attention"))
    assert "activation NewGELUActivation" in only_reason(wav2vec2_model(hidden_act="gelu_new"))
    model = parakeet_model()
    model.layers[0].self_attn.register_forward_hook(print)
    report = accelerate(model)
    assert list(report.accelerated) == ["layers.1"]
    assert report.kept == (("layers.0", "self_attn has hooks, which would not run"),)


def test_another_version_is_left_alone(torchaudio_conformer, monkeypatch):
    model = torchaudio_conformer.Conformer(16, 4, 32, 1, 7)
    kind = type(
        "ConformerLayer", (nn.Module,), {"__module__": "torchaudio.models.conformer", "__init__": nn.Module.__init__}
    )
    model.conformer_layers[0].__class__ = kind
    assert "has no _FeedForwardModule, _ConvolutionModule; is it another version?" in only_reason(model)


def test_left_alone_others():
    """Other Conformers are named with a reason, not passed over in silence."""

    class ConformerBlock(nn.Module):
        pass

    assert "no adapter for this layer" in only_reason(nn.ModuleList([ConformerBlock()]))
    with pytest.raises(ValueError, match="no Conformer layers found"):
        accelerate(nn.Linear(2, 2), strict=True)


def test_report_reads_well(torchaudio_model):
    model = nn.ModuleDict({"a": torchaudio_model(), "b": torchaudio_model()})
    model["b"]["encoder"].conformer_layers[1].final_layer_norm.bias = None
    assert str(accelerate(model)) == (
        "5 layers accelerated: a.encoder.conformer_layers.0, a.encoder.conformer_layers.1, ..., "
        "b.encoder.conformer_layers.2\n"
        "1 layer not accelerated:\n"
        "  b.encoder.conformer_layers.1: final_layer_norm has no weight or no bias"
    )
    assert str(accelerate(nn.Linear(2, 2))) == "no Conformer layers found"


def test_our_own_layers_are_not_touched():
    encoder = lcconformer.Conformer(16, 4, 32, 2, 7)
    assert str(accelerate(encoder)) == "no Conformer layers found"


def test_no_peer_is_imported():
    """Unless a model of it is given: the adapters are there, and their packages are not."""
    import subprocess
    import sys

    code = (
        "import sys, lcconformer, torch.nn as nn; lcconformer.accelerate(nn.Linear(1, 1));"
        "peers = 'transformers', 'torchaudio', 'espnet', 'conformer', 'einops', 'speechbrain', 'nemo';"
        "print([n for n in peers if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == "[]"


def test_another_norm_in_the_convolution(torchaudio_model):
    """Put there after accelerating."""
    model = torchaudio_model().eval()["encoder"]
    peer = copy.deepcopy(model)
    accelerate(model, strict=True)
    x, lengths = torch.randn(2, 13, 16), torch.tensor([13, 6])
    for norm in (nn.Identity(), nn.BatchNorm1d(16, eps=0.1), nn.InstanceNorm1d(16), nn.GroupNorm(4, 16, eps=1e-3)):
        for m in (model, peer):
            for one in m.conformer_layers:
                one.conv_module.sequential[3] = copy.deepcopy(norm).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(x, lengths)[0], peer(x, lengths)[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(model(x, lengths)[0], peer(x, lengths)[0], rtol=0, atol=1e-5)
