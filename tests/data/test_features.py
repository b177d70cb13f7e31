"""LogMel against Kaldi's own code and against float64; batching; degenerate input."""

import kaldi_native_fbank as knf
import numpy as np
import pytest
import torch

from lcconformer.data import LogMel, cmvn, frame_count
from lcconformer.data.features import _mel_filters

from .conftest import tone


def kaldi(samples: np.ndarray, num_bins: int, low: float, high: float) -> np.ndarray:
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = num_bins
    options.mel_opts.low_freq = low
    options.mel_opts.high_freq = high
    fbank = knf.OnlineFbank(options)
    fbank.accept_waveform(16000, (samples * 32768).tolist())
    fbank.input_finished()
    return np.stack([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])


def float64(samples: np.ndarray, num_bins: int, low: float, high: float) -> np.ndarray:
    """The same by the book, frame by frame."""
    n = len(samples)
    x = samples.astype(np.float64) * 32768
    k = np.arange(400)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * k / 399)) ** 0.85
    filters = _mel_filters(num_bins, low, high).double().numpy()
    rows = []
    for t in range((n + 80) // 160):
        index = 160 * t - 120 + k
        while ((index < 0) | (index >= n)).any():
            index = np.where(index < 0, -index - 1, index)
            index = np.where(index >= n, 2 * n - 1 - index, index)
        frame = x[index] - x[index].mean()
        frame = frame - 0.97 * np.concatenate((frame[:1], frame[:-1]))
        power = np.abs(np.fft.rfft(frame * window, 512)) ** 2
        rows.append(np.log(np.maximum(power @ filters, 2.0**-23)))
    return np.stack(rows)


OPTIONS = [(80, 20.0, 8000.0), (80, 20.0, 5600.0), (40, 0.0, 8000.0), (23, 100.0, 7000.0)]


@pytest.mark.parametrize(("num_bins", "low", "high"), OPTIONS)
@pytest.mark.parametrize("samples", [80, 161, 399, 400, 5000, 16079, 16080])
def test_agrees_with_kaldi(num_bins, low, high, samples):
    audio = tone(samples / 16000, seed=samples)
    features, frames = LogMel(num_bins, low, high, normalize=False)(torch.from_numpy(audio)[None])
    want = kaldi(audio, num_bins, low, high)
    assert features.shape == (1, *want.shape)
    assert frames.tolist() == [len(want)] == [frame_count(samples)]
    np.testing.assert_allclose(features[0].numpy(), want, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("num_bins", "low", "high"), OPTIONS)
@pytest.mark.parametrize("samples", [80, 111, 300, 5000])
def test_no_further_from_float64_than_kaldi(num_bins, low, high, samples):
    audio = tone(samples / 16000, seed=samples)
    want = float64(audio, num_bins, low, high)
    ours = LogMel(num_bins, low, high, normalize=False)(torch.from_numpy(audio)[None])[0][0].numpy()
    assert np.abs(ours - want).max() <= 2 * np.abs(kaldi(audio, num_bins, low, high) - want).max() + 1e-4


@pytest.mark.parametrize("normalize", [False, True])
def test_batch_equals_single(normalize):
    lengths = [81, 400, 16000, 16079, 16080, 7777]
    audio = torch.full((len(lengths), max(lengths) + 500), 0.9)  # the padding is loud
    for row, n in zip(audio, lengths):
        row[:n] = torch.from_numpy(tone(n / 16000, seed=n))
    logmel = LogMel(normalize=normalize)
    features, frames = logmel(audio, torch.tensor(lengths))
    assert features.shape == (len(lengths), frame_count(audio.shape[1]), 80)
    for i, n in enumerate(lengths):
        alone, _ = logmel(audio[i : i + 1, :n])
        assert frames[i] == alone.shape[1]
        torch.testing.assert_close(features[i, : frames[i]], alone[0], atol=1e-5, rtol=0)
        assert (features[i, frames[i] :] == 0).all()


def test_frame_is_centred_on_its_label():
    # a click in the middle of the 10 ms of label t makes frame t the loudest
    audio = torch.zeros(1, 3200)
    audio[0, 160 * 7 + 80] = 0.5
    features, _ = LogMel(normalize=False)(audio)
    assert features[0].mean(-1).argmax() == 7


def test_normalised_to_zero_mean_and_unit_variance_over_real_frames():
    audio = torch.from_numpy(np.stack([tone(1.0, seed=1), tone(1.0, seed=2)])) * torch.linspace(0, 1, 16000)
    features, frames = LogMel()(audio, torch.tensor([16000, 8000]))
    real = features[1, : frames[1]]
    torch.testing.assert_close(real.mean(0), torch.zeros(80), atol=1e-5, rtol=0)
    torch.testing.assert_close(real.var(0, correction=0), torch.ones(80), atol=1e-3, rtol=0)


@pytest.mark.parametrize("audio", [torch.zeros(2, 4000), torch.full((2, 4000), 0.3), torch.zeros(1, 80)])
def test_silence_and_single_frames_are_finite(audio):
    features, _ = LogMel()(audio)
    assert features.isfinite().all()
    assert features.abs().max() < 1e-2


def test_empty_utterance_in_a_batch_gives_zeros():
    features, frames = LogMel()(torch.rand(2, 4000), torch.tensor([4000, 0]))
    assert frames.tolist() == [25, 0]
    assert (features[1] == 0).all()


def test_cmvn_ignores_what_stands_in_the_padding():
    features = torch.randn(2, 9, 4)
    poisoned = features.clone()
    poisoned[1, 5:] = float("nan")
    frames = torch.tensor([9, 5])
    torch.testing.assert_close(cmvn(features, frames), cmvn(poisoned, frames))


def test_float32_under_autocast():
    audio = torch.from_numpy(tone(0.5))[None]
    plain, _ = LogMel()(audio)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = LogMel()(audio)
    assert cast.dtype == torch.float32
    assert torch.equal(plain, cast)


def test_has_no_state_to_save():
    assert not LogMel().state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low_freq": -1}, "low_freq is -1; expected a finite number of 0 or more"),
        ({"low_freq": float("nan")}, "low_freq is nan; expected a finite number"),
        ({"num_bins": 8.0}, "num_bins is 8.0; expected an integer"),
        ({"num_bins": 10**12}, "num_bins is 1000000000000; expected an integer from 1 to 256"),
        ({"high_freq": 9000.0}, "got 20.0 and 9000.0"),
        ({"low_freq": 500.0, "high_freq": 400.0}, "low_freq < high_freq"),
        ({"num_bins": 0}, "num_bins is 0; expected an integer from 1 to 256"),
        ({"num_bins": 200}, "lower num_bins or widen the range"),
    ],
)
def test_impossible_filterbank(options, message):
    with pytest.raises(ValueError, match=message):
        LogMel(**options)


def test_wrong_input():
    logmel = LogMel()
    with pytest.raises(ValueError, match=r"\[B, S\] with S >= 80, got \[16000\]"):
        logmel(torch.zeros(16000))
    with pytest.raises(ValueError, match=r"got \[2, 79\]"):
        logmel(torch.zeros(2, 79))
    with pytest.raises(ValueError, match=r"lengths must be \[2\], one per utterance, got \[3\]"):
        logmel(torch.zeros(2, 400), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="lengths must be 0 to S = 400, got 1 to 401"):
        logmel(torch.zeros(2, 400), torch.tensor([1, 401]))
    with pytest.raises(ValueError, match="lengths must be 0 to S = 400, got -1 to 400"):
        logmel(torch.zeros(2, 400), torch.tensor([-1, 400]))
    with pytest.raises(ValueError, match=r"lengths must be int64, got torch\.float32"):
        logmel(torch.zeros(2, 400), torch.tensor([1.0, 400.0]))
    with pytest.raises(ValueError, match="audio must be a tensor, got a ndarray"):
        logmel(np.zeros((2, 400)))
    with pytest.raises(ValueError, match="lengths must be a tensor, got a list"):
        logmel(torch.zeros(2, 400), [1, 400])
    with pytest.raises(ValueError, match="must stay in float32"):
        logmel.bfloat16()(torch.zeros(2, 400))


@pytest.mark.gpu
def test_gpu_equals_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    audio, lengths = torch.from_numpy(np.stack([tone(1.0, seed=1), tone(1.0, seed=2)])), torch.tensor([16000, 9000])
    want, _ = LogMel(normalize=False)(audio, lengths)
    got, frames = LogMel(normalize=False).cuda()(audio.cuda(), lengths.cuda())
    assert frames.is_cuda
    torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=0)
