"""Log-mel filterbank features, computed in batches on the device of the audio.

They equal Kaldi's (``compute-fbank-feats --snip-edges=false --dither=0`` on 16-bit samples): 25 ms Povey window every 10 ms,
DC removed, pre-emphasis 0.97, 512-point power spectrum, triangular filters on the mel scale, natural log with the floor
2^-23.  Edges are not snipped, so that frame ``t`` is centred on sample ``160 t + 80``, the middle of the 10 ms label ``t``.
Each utterance is mirrored at its own ends, so that padding never enters a frame.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import nn

from ..ops.checks import readable
from ..validation import need_integer, need_number

SAMPLE_RATE = 16_000
FRAME_SHIFT = 160
"""Samples from one frame to the next: 10 ms."""

_WINDOW = 400
_FFT = 512
_FLOOR = torch.finfo(torch.float32).eps
_VARIANCE_FLOOR = 1e-5

Count = TypeVar("Count", int, torch.Tensor)


def frame_count(samples: Count) -> Count:
    """Number of frames for ``samples`` (int or int64 tensor): samples / 160, rounded to nearest, halves up."""
    return (samples + FRAME_SHIFT // 2) // FRAME_SHIFT


def cmvn(features: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """Normalise to zero mean and unit variance per utterance and bin, without padding, which becomes zero.

    Args:
        features: ``[B, T, C]``, with any content in the padding.
        frames: ``[B]`` int64, number of frames of each utterance without padding.

    A bin that does not vary (silence, a single frame) becomes zero.
    """
    real = (torch.arange(features.shape[1], device=features.device) < frames[:, None])[..., None]  # [B, T, 1]
    count = frames.clamp(min=1)[:, None, None]
    mean = features.where(real, 0).sum(1, keepdim=True) / count  # [B, 1, C]
    centred = (features - mean).where(real, 0)
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + _VARIANCE_FLOOR)


def _mel_filters(num_bins: int, low_freq: float, high_freq: float) -> torch.Tensor:
    """Kaldi's triangular filters ``[257, num_bins]``, linear in mel = 1127 ln(1 + f / 700); the Nyquist row is zero."""
    bins = torch.arange(_FFT // 2 + 1, dtype=torch.float64) * (SAMPLE_RATE / _FFT)
    mel = (1127.0 * torch.log1p(bins / 700.0))[:, None]
    low, high = (1127.0 * math.log1p(f / 700.0) for f in (low_freq, high_freq))
    edges = torch.linspace(low, high, num_bins + 2, dtype=torch.float64)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    filters = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0)
    filters[-1] = 0
    return filters.float()


def _fourier() -> torch.Tensor:
    """Cosines and sines ``[400, 2 * 257]``: a frame times them is its spectrum, real parts and imaginary parts."""
    turns = torch.outer(torch.arange(_WINDOW), torch.arange(_FFT // 2 + 1)) % _FFT
    angle = turns.to(torch.float64) * (2 * math.pi / _FFT)
    return torch.cat((angle.cos(), angle.sin()), 1).float()


class LogMel(nn.Module):
    """Kaldi-compatible log-mel features with optional mean and variance normalisation per utterance.

    It exports by ``torch.export`` and to ONNX for any number of utterances and samples.

    Args:
        num_bins: number of mel filters C.
        low_freq, high_freq: edges of the filterbank in Hz. Where corpora of different bandwidth are mixed, ``high_freq``
            should be inside the narrowest band: speech that was stored as low-rate MP3 ends near 5.8 kHz, and
            ``high_freq=5600`` keeps the normalisation from amplifying its empty bands.
        normalize: apply :func:`cmvn`.

    Raises:
        ValueError: the edges are out of order or out of range, or a filter is narrower than the resolution of the spectrum.
    """

    window: torch.Tensor
    filters: torch.Tensor
    fourier: torch.Tensor

    def __init__(
        self, num_bins: int = 80, low_freq: float = 20.0, high_freq: float = 8000.0, normalize: bool = True
    ) -> None:
        super().__init__()
        for name, value in (("low_freq", low_freq), ("high_freq", high_freq)):
            need_number("LogMel", name, value, 0)
        if not low_freq < high_freq <= SAMPLE_RATE / 2:
            raise ValueError(f"need 0 <= low_freq < high_freq <= {SAMPLE_RATE // 2}, got {low_freq} and {high_freq}")
        need_integer("LogMel", "num_bins", num_bins, 1, _FFT // 2)
        with torch.device("cpu"):  # whatever the default device: the values are looked at
            filters, fourier = _mel_filters(num_bins, low_freq, high_freq), _fourier()
        empty = int((filters.sum(0) == 0).sum())
        if empty:
            raise ValueError(
                f"{empty} of {num_bins} mel filters between {low_freq} and {high_freq} Hz are narrower than "
                f"the spectrum's {SAMPLE_RATE / _FFT:.1f} Hz: lower num_bins or widen the range"
            )
        self.num_bins, self.low_freq, self.high_freq, self.normalize = num_bins, low_freq, high_freq, normalize
        window = torch.hann_window(_WINDOW, periodic=False, dtype=torch.float64).pow(0.85).float()
        self.register_buffer("window", window, persistent=False)
        self.register_buffer("filters", filters.to(window.device), persistent=False)
        self.register_buffer("fourier", fourier.to(window.device), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_bins}, {self.low_freq}-{self.high_freq} Hz, normalize={self.normalize}"

    def forward(self, audio: torch.Tensor, lengths: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the features of a padded batch, in float32 even under autocast.

        Args:
            audio: ``[B, S]`` float, 16 kHz, full scale +-1.
            lengths: ``[B]`` int64, samples of each utterance without padding; None: all S.

        Returns:
            features ``[B, frame_count(S), C]`` float32, zero in the padding, and numbers of frames ``[B]`` int64.

        Raises:
            ValueError: wrong shapes or lengths (the values of lengths are checked on the CPU only), fewer than 80 samples
                (no frame), or this module is no longer float32.
        """
        for name, given in (("audio", audio), ("lengths", lengths)):
            if given is not None and not isinstance(given, torch.Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(given).__name__}")
        if audio.ndim != 2 or audio.shape[1] < FRAME_SHIFT // 2:
            raise ValueError(f"audio must be [B, S] with S >= {FRAME_SHIFT // 2}, got {list(audio.shape)}")
        if lengths is None:
            lengths = torch.full((audio.shape[0],), audio.shape[1], dtype=torch.int64, device=audio.device)
        if lengths.shape != audio.shape[:1]:
            raise ValueError(f"lengths must be [{audio.shape[0]}], one per utterance, got {list(lengths.shape)}")
        if lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"lengths must be int64, got {lengths.dtype}")
        if readable(lengths) and bool(((lengths < 0) | (lengths > audio.shape[1])).any()):
            raise ValueError(
                f"lengths must be 0 to S = {audio.shape[1]}, got {int(lengths.min())} to {int(lengths.max())}"
            )
        if self.filters.dtype != torch.float32:
            raise ValueError(f"LogMel must stay in float32, got {self.filters.dtype}: cast only the encoder")
        total, frames = frame_count(audio.shape[1]), frame_count(lengths)
        with torch.autocast(audio.device.type, enabled=False):
            x = self._mirror(audio.float() * 32768.0, lengths, total).unfold(1, _WINDOW, FRAME_SHIFT)  # [B, T, 400]
            x = x - x.mean(-1, keepdim=True)
            x = x - 0.97 * torch.cat((x[..., :1], x[..., :-1]), -1)
            features = (self._power(x * self.window) @ self.filters).clamp(min=_FLOOR).log()
            if self.normalize:
                return cmvn(features, frames), frames
            real = torch.arange(total, device=audio.device) < frames[:, None]
            return features.where(real[..., None], 0), frames

    def _power(self, x: torch.Tensor) -> torch.Tensor:
        """Power spectrum ``[B, T, 257]`` of frames ``[B, T, 400]``."""
        if torch.compiler.is_exporting():
            # many runtimes lack ONNX's DFT, and that of ONNX Runtime is less exact than a product, whose error is 4e-5 in the
            # features of noise (2e-4 with the DFT)
            real, imaginary = (x @ self.fourier).chunk(2, -1)
            return real.square() + imaginary.square()
        return torch.fft.rfft(x, _FFT).abs().square()

    @staticmethod
    def _mirror(audio: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
        """Extend each utterance by its mirror image on both sides, as far as ``total`` frames need."""
        before = (_WINDOW - FRAME_SHIFT) // 2
        index = torch.arange(-before, (total - 1) * FRAME_SHIFT + _WINDOW - before, device=audio.device)
        length = lengths.clamp(min=1)[:, None]
        index = index % (
            2 * length
        )  # the mirrored signal has period 2 x length, which also serves very short utterances
        return audio.gather(1, torch.minimum(index, 2 * length - 1 - index))
