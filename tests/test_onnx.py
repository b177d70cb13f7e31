"""ONNX export: ONNX Runtime gives what the module gives, for every number of utterances and frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lcconformer import Conformer, ConformerConfig, ConformerEncoder
from lcconformer.data import LogMel

pytest.importorskip("onnxscript", reason="pip install 'lcconformer[test]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'lcconformer[test]'")

SHAPES = [(3, 29), (1, 1), (2, 2), (1, 50), (5, 13)]
BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5)
SUBSAMPLED = ConformerConfig(**{**vars(BASE), "input_dim": 10, "subsampling": "conv", "subsampling_factor": 4})


class Without(nn.Module):
    """Output alone, of an encoder without lengths."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[0]


MODULES = {
    "lengths": lambda: ConformerEncoder(BASE),
    "no lengths": lambda: Without(ConformerEncoder(BASE)),
    "subsampling": lambda: ConformerEncoder(SUBSAMPLED),
    "no lengths, subsampling": lambda: Without(ConformerEncoder(SUBSAMPLED)),
    "torchaudio": lambda: Conformer(16, 2, 24, 2, 5),
}


def inputs(module: nn.Module, batch: int, frames: int) -> tuple[Tensor, ...]:
    """An utterance of all frames, the others of random lengths down to none."""
    width = next((m.config.input_dim for m in module.modules() if isinstance(m, ConformerEncoder)), None) or 16
    lengths = torch.randint(frames + 1, (batch,))
    lengths[0] = frames
    return (torch.randn(batch, frames, width), lengths)[: 1 if isinstance(module, Without) else 2]


def session(program: torch.onnx.ONNXProgram) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for pool in ("intra_op", "inter_op"):
        options.add_session_config_entry(f"session.{pool}.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class FromAudio(nn.Module):
    """Encoder output, and numbers of frames, of raw audio."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.encoder = LogMel(20), ConformerEncoder(BASE.replace(input_dim=20))

    def forward(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(*self.features(audio, lengths))


def audio(batch: int, samples: int) -> tuple[Tensor, Tensor]:
    """Noise that gets louder, with a tone, and lengths down to one sample."""
    lengths = torch.randint(1, samples + 1, (batch,))
    lengths[0] = samples
    time = torch.linspace(0, 1, samples)
    return 0.2 * time * torch.randn(batch, samples) + 0.1 * torch.sin(2e4 * time**2), lengths


@pytest.mark.parametrize(
    "module", [LogMel(80), LogMel(40, normalize=False), FromAudio()], ids=["cmvn", "plain", "encoder"]
)
def test_models_of_raw_audio(module):
    """Against float64 arithmetic on the same float32 audio, whatever the number of utterances and samples."""
    module.eval()
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}
    exported = torch.export.export(module, audio(2, 9000), dynamic_shapes=dynamic)
    runtime = session(torch.onnx.export(exported, dynamo=True, verbose=False))
    for batch, samples in [(2, 9000), (3, 16000), (1, 80), (1, 401), (2, 24123)]:
        given = audio(batch, samples)
        want, frames = module(*given)
        exact = want if isinstance(module, FromAudio) else features_in_float64(module, *given)
        feed = {i.name: x.numpy() for i, x in zip(runtime.get_inputs(), given)}
        programs = [runtime.run(None, feed)]
        if samples >= 240:  # two frames; torch.export takes fewer for another program
            programs.append(exported.module()(*given))
        for got in programs:
            output, counts = (torch.as_tensor(x) for x in got)
            assert torch.equal(counts, frames)
            assert output.shape == want.shape
            real = torch.arange(want.shape[1]) < frames[:, None]
            torch.testing.assert_close(output[real].double(), exact[real].double(), rtol=1e-4, atol=1e-4)


def features_in_float64(module: LogMel, audio: Tensor, lengths: Tensor) -> Tensor:
    """What the module gives, with its own tables, frame by frame in float64 and by numpy's Fourier transform."""
    rows = []
    for samples, length in zip(audio.double().numpy() * 32768, lengths.tolist()):
        count = (length + 80) // 160
        mirrored = np.concatenate([samples[:length], samples[:length][::-1]])
        frames = mirrored[(np.arange(count)[:, None] * 160 + np.arange(-120, 280)) % (2 * length)]
        frames = frames - frames.mean(1, keepdims=True)
        frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
        power = np.abs(np.fft.rfft(frames * module.window.double().numpy(), 512)) ** 2
        mel = np.log(np.maximum(power @ module.filters.double().numpy(), 2.0**-23))
        if module.normalize and count:
            mel = mel - mel.mean(0)
            mel = mel / np.sqrt((mel**2).mean(0) + 1e-5)
        rows.append(torch.from_numpy(mel))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("name", MODULES)
def test_onnx_runtime_agrees_at_every_shape(name):
    module = MODULES[name]().eval()
    example = inputs(module, 3, 29)
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})[: len(example)]
    program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    runtime = session(program)
    for batch, frames in SHAPES:
        given = inputs(module, batch, frames)
        with torch.no_grad():
            want = module(*given)
        feed = {i.name: x.numpy() for i, x in zip(runtime.get_inputs(), given)}
        got = [torch.from_numpy(x) for x in runtime.run(None, feed)]
        real = torch.ones(got[0].shape[:2], dtype=torch.bool)
        if len(given) == 2:
            want, lengths = want
            assert torch.equal(got[1], lengths)
            real = torch.arange(want.shape[1]) < lengths[:, None]
        assert got[0].shape == want.shape
        torch.testing.assert_close(got[0][real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [BASE, SUBSAMPLED], ids=["no front end", "subsampling"])
def test_a_stream_runs_in_onnx_runtime(config):
    """Its state goes out and in again, for two streams of which one ends first."""
    encoder = ConformerEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    stream = encoder.streaming(chunk=4, left=6, right=2)
    factor = config.subsampling_factor
    x, lengths = torch.randn(2, 15 * factor, config.input_dim or 16), torch.tensor([15 * factor, 7 * factor - 1])
    blocks = list(stream.blocks(x, lengths))
    runtime = session(torch.onnx.export(stream, (*blocks[0], stream.start(2)), dynamo=True, verbose=False))
    state = stream.start(2)
    tensors = [t.numpy() for t in (*state[:4], *state.front_end)]
    with torch.no_grad():
        for block, count in blocks:
            want, lengths, state = stream(block, count, state)
            feed = {
                i.name: v for i, v in zip(runtime.get_inputs(), (block.numpy(), count.numpy(), *tensors), strict=True)
            }
            got, got_lengths, *tensors = runtime.run(None, feed)
            assert torch.equal(torch.from_numpy(got_lengths), lengths)
            for row, n in enumerate(lengths.tolist()):
                torch.testing.assert_close(torch.from_numpy(got[row, :n]), want[row, :n], rtol=1e-4, atol=1e-5)
