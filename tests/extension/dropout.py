"""Dropout masks of the compiled kernels, worked out apart from them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _philox(counter: np.ndarray, key: int) -> np.ndarray:
    """Philox-4x32-7 (Salmon et al. 2011) of ``counter [..., 4]``."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        low = np.uint64(0xFFFFFFFF)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, -1).astype(np.uint32)


def keep_factor(seed: int, p: float, rows: int, cols: int, *, stream: int = 0, major: int = 0) -> Tensor:
    """``[rows, cols]`` float64: 0 where dropped, 1 / (probability of being kept) elsewhere."""
    counter = np.zeros((rows, -(-cols // 8), 4), np.uint64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.arange(rows)[:, None]
    counter[..., 2], counter[..., 3] = major, stream
    words = _philox(counter, seed & (2**64 - 1))
    halves = np.stack([words & 0xFFFF, words >> 16], -1).reshape(rows, -1)[:, :cols]
    threshold = min(round(p * 65536), 65535)
    return torch.from_numpy((halves >= threshold) * (65536 / (65536 - threshold)))
