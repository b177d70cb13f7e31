"""Facts about the GPU architectures that the kernels are compiled for."""

from __future__ import annotations

__all__ = ["SHARED_MEMORY"]

# compute capability (90 for sm_90) -> bytes of shared memory one block may use; the same on every GPU of an architecture
SHARED_MEMORY: dict[int, int] = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
