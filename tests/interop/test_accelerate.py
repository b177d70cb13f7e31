"""`accelerate`: the model of another package computes the same, under the same names, with our layers."""

from __future__ import annotations

import copy
import importlib.metadata
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lcconformer
from lcconformer import ConformerLayer, accelerate


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
            elif name.endswith("running_mean"):
                buffer.normal_(0.0, 0.3)


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
        config = transformers.ParakeetEncoderConfig(
            hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, conv_kernel_size=7,
            num_mel_bins=16, subsampling_conv_channels=8, subsampling_factor=4, **{"num_key_value_heads": 3, **changes},
        )  # fmt: skip
        config._attn_implementation = attention
        model = transformers.ParakeetEncoder(config)
        randomise(model)
        return model.eval()

    return make


def check_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name


def our_layers(model: nn.Module) -> int:
    return sum(isinstance(m, ConformerLayer) for m in model.modules())


# torchaudio


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_torchaudio(torchaudio_model, group, first):
    model = torchaudio_model(group=group, first=first)
    peer = copy.deepcopy(model)
    report = accelerate(model)
    assert [name for name, _ in report.replaced] == [f"encoder.conformer_layers.{i}" for i in range(3)]
    assert report.kept == ()
    assert our_layers(model) == 3
    check_same_state(model, peer.state_dict())

    x, lengths = torch.randn(2, 13, 16), torch.tensor([13, 6])
    for training in (False, True):
        model.train(training), peer.train(training)
        (got, got_lengths), (want, _) = model["encoder"](x, lengths), peer["encoder"](x, lengths)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert torch.equal(got_lengths, lengths)
    # and after a step of training: the statistics moved together
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_state_goes_both_ways_afterwards(torchaudio_model):
    model, peer = torchaudio_model(), torchaudio_model()
    accelerate(model)
    model.load_state_dict(peer.state_dict())
    check_same_state(model, peer.state_dict())
    randomise(model)
    peer.load_state_dict(model.state_dict())
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    model.eval(), peer.eval()
    torch.testing.assert_close(model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0], rtol=0, atol=1e-5)
    state = peer.state_dict()
    del state["encoder.conformer_layers.2.ffn1.sequential.1.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.conformer_layers\.2\.ffn1\.sequential\.1\.bias"):
        model.load_state_dict(state)


def test_a_copy_works_on_its_own(torchaudio_model):
    model = torchaudio_model().eval()
    accelerate(model)
    clone = copy.deepcopy(model)
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    want = model["encoder"](x, lengths)[0]
    state = {n: v.clone() for n, v in model.state_dict().items()}
    randomise(model)
    assert torch.equal(clone["encoder"](x, lengths)[0], want)
    check_same_state(clone, state)


def test_settings_of_the_layer_survive(torchaudio_model):
    """Mode, dtype, frozen parameters, dropout and hooks."""
    model = torchaudio_model(dropout=0.25).double().train()
    layer = model["encoder"].conformer_layers[1]
    for parameter in layer.self_attn.parameters():
        parameter.requires_grad_(False)
    calls = []
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    accelerate(model)
    adapter = model["encoder"].conformer_layers[1]
    assert adapter.training
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    attention = adapter.layer.attention
    assert not any(p.requires_grad for p in (*attention.qkv.parameters(), *attention.out.parameters()))
    assert sum(not p.requires_grad for p in model.parameters()) == len(frozen) == 4
    assert adapter.layer.ffn1.dropout == attention.dropout == adapter.layer.dropout == 0.25
    x, lengths = torch.randn(2, 9, 16, dtype=torch.float64), torch.tensor([9, 4])
    assert not torch.equal(model["encoder"](x, lengths)[0], model["encoder"](x, lengths)[0])
    assert calls == [1, 1]
    handle.remove()
    model["encoder"](x, lengths)
    assert calls == [1, 1]


def test_one_layer_in_two_places_stays_one(torchaudio_conformer):
    layer = torchaudio_conformer.ConformerLayer(16, 32, 4, 7)
    model = nn.ModuleList([layer, layer])
    report = accelerate(model)
    assert [name for name, _ in report.replaced] == ["0", "1"]
    assert model[0] is model[1]
    assert our_layers(model) == 1


def test_twice_finds_nothing_more(torchaudio_model):
    model = torchaudio_model()
    accelerate(model)
    again = accelerate(model)
    assert (again.replaced, again.kept) == ((), ())
    assert str(again) == "no Conformer layers found"


def test_a_mask_with_holes_is_refused(torchaudio_model):
    model = torchaudio_model().eval()
    accelerate(model)
    layer = model["encoder"].conformer_layers[0]
    mask = torch.tensor([[False, True, False, True]])
    with pytest.raises(ValueError, match="the attention mask is not that of padding at the end"):
        layer(torch.randn(4, 1, 16), mask)
    with pytest.raises(ValueError, match=r"the padding mask is torch\.float32"):
        layer(torch.randn(4, 1, 16), torch.zeros(1, 4).neg())


# transformers


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["relative", "rotary", None])
def test_wav2vec2_conformer(wav2vec2_model, attention, position):
    """A whole model from the waveform: hidden states, logits, loss and gradients."""
    model = wav2vec2_model(position, attention)
    peer = copy.deepcopy(model)
    report = accelerate(model)
    assert len(report.replaced) == our_layers(model) == 2
    check_same_state(model, peer.state_dict())

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
    for name in ("lm_head.weight", "wav2vec2_conformer.feature_projection.projection.weight"):
        g, w = model.get_parameter(name).grad, peer.get_parameter(name).grad
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-4 * float(w.abs().max()))
    torch.testing.assert_close(model(audio).logits, peer(audio).logits, rtol=0, atol=1e-5)


def test_wav2vec2_conformer_saves_and_loads(wav2vec2_model, tmp_path):
    """save_pretrained of an accelerated model is read by transformers as if nothing had happened."""
    model = wav2vec2_model()
    peer = copy.deepcopy(model)
    accelerate(model)
    model.save_pretrained(tmp_path)
    again = type(peer).from_pretrained(tmp_path)
    check_same_state(again, peer.state_dict())


def test_wav2vec2_conformer_checkpoints_activations(wav2vec2_model):
    model = wav2vec2_model().train()
    accelerate(model)
    audio = torch.randn(1, 400)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        (model(audio).logits ** 2).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_wav2vec2_conformer_compiles_and_exports(wav2vec2_model):
    """Layers in one graph for every T; and with them the encoder exports, whose own relative shift the exporter refuses."""
    model = wav2vec2_model()
    accelerate(model)
    encoder = model.wav2vec2_conformer.encoder
    torch._dynamo.reset()
    compiled = torch.compile(encoder.layers[0], backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for frames in (13, 20):
            x = torch.randn(2, frames, 24)
            keep = (torch.arange(frames) < torch.tensor([[frames], [6]]))[:, None, None].expand(2, 1, frames, frames)
            table = encoder.embed_positions(x)
            with torch.compiler.set_stance("default" if frames == 13 else "fail_on_recompile"):
                got = compiled(x, attention_mask=keep, relative_position_embeddings=table)
            want = encoder.layers[0](x, attention_mask=keep, relative_position_embeddings=table)
            torch.testing.assert_close(got, want)

        def data(frames):
            return torch.randn(2, frames, 24), torch.arange(frames) < torch.tensor([[frames], [6]])

        frames = torch.export.Dim("T", min=3, max=512)
        program = torch.export.export(
            encoder, data(13), dynamic_shapes={"hidden_states": {1: frames}, "attention_mask": {1: frames}}
        ).module()
        x, keep = data(31)
        want = encoder(x.clone(), keep).last_hidden_state
        torch.testing.assert_close(program(x.clone(), keep).last_hidden_state, want)


def test_attention_weights_are_refused(wav2vec2_model):
    model = wav2vec2_model()
    accelerate(model)
    with pytest.raises(NotImplementedError, match="output_attentions=True, but an accelerated layer"):
        model(torch.randn(1, 400), output_attentions=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_parakeet(parakeet_model, attention):
    model = parakeet_model(attention)
    peer = copy.deepcopy(model)
    report = accelerate(model)
    assert len(report.replaced) == our_layers(model) == 2
    assert all("for inference only: in training its BatchNorm" in remark for _, remark in report.replaced)
    check_same_state(model, peer.state_dict())
    features = torch.randn(2, 60, 16)
    mask = torch.arange(60) < torch.tensor([[60], [31]])
    got, want = model(features, attention_mask=mask), peer(features, attention_mask=mask)
    assert torch.equal(got.attention_mask, want.attention_mask)
    real = want.attention_mask.bool()
    assert 0 < real.sum() < real.numel()
    assert got.last_hidden_state[real].isfinite().all()
    if attention == "eager" and importlib.metadata.version("transformers").startswith("5.17."):
        pytest.skip("transformers 5.17 gives NaN for a padded utterance with eager attention")
    torch.testing.assert_close(got.last_hidden_state[real], want.last_hidden_state[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(features).last_hidden_state, peer(features).last_hidden_state, rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"accelerated for inference only .*call model\.eval"):
        model.train()(features)


# what is done to an accelerated model counts


class Scaled(nn.Linear):
    """A class that somebody put in the place of a linear map."""

    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    "name", ["ffn1.up", "ffn2.norm", "attention.qkv", "conv.norm", "conv.depthwise", "conv.depthwise_norm"]
)
@pytest.mark.parametrize("kind", ["torchaudio", "wav2vec2"])
def test_hooks_inside_run_once(torchaudio_model, wav2vec2_model, kind, name):
    if kind == "torchaudio":
        model, inputs = torchaudio_model().eval()["encoder"], (torch.randn(2, 13, 16), torch.tensor([13, 6]))
        holder = nn.ModuleList([model])
    else:
        model, inputs = wav2vec2_model(), (torch.randn(2, 400),)
        holder = model
    accelerate(holder)
    layer = next(m for m in model.modules() if isinstance(m, ConformerLayer))
    with torch.no_grad():
        before, calls = model(*inputs)[0], []
        module = layer.get_submodule(name)
        module.register_forward_pre_hook(lambda m, i: calls.append("pre"))
        handle = module.register_forward_hook(lambda m, i, o: calls.append("post") or o * 0.5)
        assert not torch.allclose(model(*inputs)[0], before, atol=1e-4)
        assert calls == ["pre", "post"]
        handle.remove()
        # the modules called, and no weight read: the peer's results still
        torch.testing.assert_close(model(*inputs)[0], before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["weight_norm", "prune", "parametrize", "replace", "quantize"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_changed_weights_inside_count(torchaudio_model, how):
    """Against the peer with that very change."""
    model = torchaudio_model().eval()
    peer = copy.deepcopy(model)
    accelerate(model)
    ours = [adapter.layer for adapter in model["encoder"].conformer_layers]
    theirs = list(peer["encoder"].conformer_layers)
    for layer, twin in zip(ours, theirs):
        for module, other in ((layer.ffn1.up, twin.ffn1.sequential[1]), (layer.ffn2.down, twin.ffn2.sequential[4])):
            for m in (module, other):
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
        names = {
            f"{ffn}.{name}": torch.ao.quantization.default_dynamic_qconfig
            for ffn in ("ffn1", "ffn2")
            for name in ("up", "down")
        }
        for layer in ours:
            torch.ao.quantization.quantize_dynamic(layer, names, inplace=True)
        for layer in theirs:
            for ffn in (layer.ffn1, layer.ffn2):
                torch.ao.quantization.quantize_dynamic(ffn, {nn.Linear}, inplace=True)
    x, lengths = torch.randn(2, 13, 16), torch.tensor([13, 6])
    with torch.no_grad():
        got, want = model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2 if how == "quantize" else 1e-4)


@pytest.mark.parametrize("kind", ["torchaudio", "wav2vec2"])
def test_lora_by_peft(torchaudio_model, wav2vec2_model, kind):
    """Adapters on every linear map count as once merged, and all of them learn."""
    peft = pytest.importorskip("peft", reason="pip install 'lcconformer[test]'")
    options = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    if kind == "torchaudio":
        model, inputs = torchaudio_model().eval(), (torch.randn(2, 13, 16), torch.tensor([13, 6]))
        before = model["encoder"](*inputs)[0]
        accelerate(model)
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if type(m) is nn.Linear})
        tuned = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=names, **options), model)
        run = lambda m: m["encoder"](*inputs)[0]  # noqa: E731
    else:
        model, inputs = wav2vec2_model(), torch.randn(2, 400)
        before = model(inputs).logits
        accelerate(model)
        tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options))
        run = lambda m: m(inputs).logits  # noqa: E731
    tuned.eval()
    adapters = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    inside = [n for n in adapters if ".layer." in n]
    assert len(inside) == 2 * our_layers(tuned) * (8 if kind == "torchaudio" else 9)
    got = run(tuned)
    assert (got - before).abs().max() > 0.1
    got.square().sum().backward()
    for name in inside:
        assert adapters[name].grad is not None, name
        assert adapters[name].grad.abs().max() > 0, name
    for module in list(tuned.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.merge()
    torch.testing.assert_close(run(tuned), got, rtol=0, atol=1e-4)
    for parent in list(tuned.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, peft.tuners.lora.Linear):
                setattr(parent, name, module.base_layer)
    torch.testing.assert_close(run(tuned), got, rtol=0, atol=1e-4)  # read again, by the kernels


def test_lora_by_peft_comes_afterwards(wav2vec2_model):
    peft = pytest.importorskip("peft", reason="pip install 'lcconformer[test]'")
    model = wav2vec2_model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["intermediate_dense"]), model)
    said = only_reason(model)
    assert "ffn1.intermediate_dense is a peft.tuners.lora.layer.Linear, not a Linear" in said


# each norm's own state


def batch_norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_keeps_its_mode_and_momentum(torchaudio_model, frozen, momentum):
    model = torchaudio_model().train()
    for norm in batch_norms(model):
        norm.train(not frozen).momentum = momentum
    peer = copy.deepcopy(model)
    assert len(accelerate(model).replaced) == 3
    assert all(norm.training is not frozen and norm.momentum == momentum for norm in batch_norms(model))
    lengths = torch.tensor([13, 6])
    for _ in range(2):
        x = torch.randn(2, 13, 16)
        torch.testing.assert_close(model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0], rtol=0, atol=1e-5)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")
    for norm in (*batch_norms(model), *batch_norms(peer)):
        norm.train().momentum = 0.9
    x = torch.randn(2, 13, 16)
    torch.testing.assert_close(model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0], rtol=0, atol=1e-5)
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, name=name: f"{name}: {m}")


# what is left alone


def only_reason(model: nn.Module) -> str:
    state = {n: v.clone() for n, v in model.state_dict().items()}
    report = accelerate(model)
    assert report.replaced == ()
    reasons = {reason for _, reason in report.kept}
    assert len(reasons) == 1
    assert our_layers(model) == 0
    check_same_state(model, state)
    return reasons.pop()


def test_left_alone_torchaudio(torchaudio_model, torchaudio_conformer):
    def changed(change, **options):
        model = torchaudio_model(**options)
        for layer in model["encoder"].conformer_layers:
            change(layer)
        return only_reason(model)

    class Other(torchaudio_conformer.ConformerLayer):
        pass

    lora = nn.Sequential(nn.Linear(16, 32))
    shared = nn.Linear(16, 32)
    for change, reason in (
        (lambda m: setattr(m.ffn1.sequential, "1", lora), "ffn1.sequential.1 is a .*Sequential, not a Linear"),
        (lambda m: setattr(m.ffn1.sequential, "1", shared), "ffn1.sequential.1.weight is shared with another module"),
        (lambda m: setattr(m.ffn2.sequential, "2", nn.GELU()), "ffn2.sequential.2 is a .*GELU, not a SiLU"),
        (lambda m: setattr(m.final_layer_norm, "eps", 1e-3), r"norms differ in epsilon \(1e-05, 0\.001\)"),
        (
            lambda m: setattr(m.conv_module.sequential, "3", nn.SyncBatchNorm(16)),
            "conv_module.sequential.3 is a .*SyncBatchNorm, not a BatchNorm1d",
        ),
        (lambda m: setattr(m.ffn1, "forward", m.ffn1.forward), "ffn1 has a forward of its own; accelerate before"),
        (lambda m: setattr(m.conv_module.sequential[2], "dilation", (2,)), "is not a stride-1 convolution with 'same'"),
        (lambda m: setattr(m, "forward", m.forward), "its forward was replaced by another tool"),
        (lambda m: m.ffn1.register_forward_hook(print), "ffn1 has hooks, which would not run; accelerate before"),
        (lambda m: m.ffn1.half(), r"parameters of several kinds \(torch.float16 on cpu, torch.float32 on cpu\)"),
        (lambda m: m.register_buffer("extra", torch.zeros(1)), "unknown tensors extra"),
        (lambda m: setattr(m, "ffn2", None), "unknown structure: "),
        (lambda m: setattr(m, "__class__", Other), "a subclass of ConformerLayer may compute something else"),
        (
            lambda m: setattr(m.self_attn_dropout, "p", 0.1),
            r"dropout differs after attention \(0\.1\) and after the convolution \(0\.0\); call model\.eval\(\) first",
        ),
    ):
        said = changed(change)
        assert re.search(reason, said), said


def test_dropout_that_is_frozen_in_part_is_left_alone(torchaudio_model):
    model = torchaudio_model(dropout=0.1).train()
    for layer in model["encoder"].conformer_layers:
        layer.ffn1.eval()
    assert only_reason(model) == "some of its modules are in training mode and others are not"


def test_dropout_that_is_not_ours_is_served_in_evaluation(torchaudio_model):
    model = torchaudio_model(dropout=0.1).eval()
    for layer in model["encoder"].conformer_layers:
        layer.self_attn_dropout.p = 0.3
    peer = copy.deepcopy(model)
    report = accelerate(model)
    assert {remark for _, remark in report.replaced} == {
        "for inference only: dropout differs after attention (0.3) and after the convolution (0.1)"
    }
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 4])
    torch.testing.assert_close(model["encoder"](x, lengths)[0], peer["encoder"](x, lengths)[0], rtol=0, atol=1e-5)
    with pytest.raises(NotImplementedError, match="dropout differs after attention"):
        model.train()["encoder"](x, lengths)


def test_left_alone_transformers(wav2vec2_model, parakeet_model, transformers):
    assert "attention implementation 'flex_attention'" in only_reason(wav2vec2_model(attention="flex_attention"))
    model = wav2vec2_model(attention="eager")
    model.config.output_attentions = True
    assert "config.output_attentions: ours never forms the weights" in only_reason(model)
    assert "activation NewGELUActivation" in only_reason(wav2vec2_model(hidden_act="gelu_new"))
    model = wav2vec2_model()
    model(torch.randn(1, 400), output_hidden_states=True)  # transformers hooks the attention modules on first use
    assert "self_attn has hooks, which would not run; accelerate before changing it" in only_reason(model)
    model = wav2vec2_model(dropout=0.1, activation_dropout=0.0).train()
    assert "dropout differs within the feed-forward modules (0.0, 0.1)" in only_reason(model)
    assert "call model.eval() first" in only_reason(parakeet_model().train())
    assert "feed-forward modules without bias" in only_reason(parakeet_model(attention_bias=False))
    model = wav2vec2_model()
    for layer in model.wav2vec2_conformer.encoder.layers:
        layer.self_attn.linear_q.weight.requires_grad_(False)
    assert "linear_q.weight, self_attn.linear_k.weight, self_attn.linear_v.weight are trained in part" in only_reason(
        model
    )


def test_left_alone_others(transformers):
    """Other Conformers are named with a reason, not passed over in silence."""
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=2, feature_projection_input_dim=8
    )
    assert "clipped relative keys and a causal convolution are not ours" in only_reason(
        transformers.Wav2Vec2BertModel(config)
    )

    class ConformerBlock(nn.Module):
        pass

    assert "no adapter for this layer" in only_reason(nn.ModuleList([ConformerBlock()]))


def test_the_model_itself_cannot_be_replaced(torchaudio_conformer):
    report = accelerate(torchaudio_conformer.ConformerLayer(16, 32, 4, 7))
    assert report.kept == (("ConformerLayer", "it is the model itself; put it inside a module"),)


def test_report_reads_well(torchaudio_model):
    model = nn.ModuleDict({"a": torchaudio_model(), "b": torchaudio_model()})
    model["b"]["encoder"].conformer_layers[1].final_layer_norm.eps = 1e-3
    assert str(accelerate(model)) == (
        "5 layers replaced:\n"
        "  a.encoder.conformer_layers.0, a.encoder.conformer_layers.1, ..., b.encoder.conformer_layers.2\n"
        "1 layer left as they were:\n"
        "  b.encoder.conformer_layers.1: norms differ in epsilon (1e-05, 0.001)"
    )
    assert str(accelerate(nn.Linear(2, 2))) == "no Conformer layers found"


def test_our_own_layers_are_not_touched():
    encoder = lcconformer.Conformer(16, 4, 32, 2, 7)
    assert str(accelerate(encoder)) == "no Conformer layers found"
