"""Speech as it comes: batches of unequal length, packed against padded, and streams, chunk by chunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lcconformer
from lcconformer.ops.checks import frame_mask
from lcconformer.runtime import commit
from lcconformer.tolerance import OUTPUT_FACTOR, allowed_error, passes, relative_error

from ..core.case import Case
from ..core.rows import add_row, device_name, versions
from ..core.timing import Timing, peak_memory_mb, time_interleaved
from ..providers.registry import library
from ..reports.table import grid, number
from .gate import GateError

__all__ = ["draw_lengths", "packed", "streams"]

# seconds of a frame at the layers, behind a front end that merges four
FRAME = 0.04
# of the dev-clean and dev-other sets of LibriSpeech: seconds, log-normal, cut off at both ends
MEDIAN, SPREAD, SHORTEST = 6.0, 0.61, 1.5
LEFT, RIGHT = 64, 4


@dataclass(frozen=True)
class SpeechRow:
    """One way of running one case of speech.

    Attributes:
        kind: ``"packed"`` or ``"streams"``.
        way: as printed.
        mode, batch, frames, d_model, layers, depth, dtype: see :class:`~lcconformer.bench.core.case.Case`; of ``"packed"``
            the longest utterance of the batch, of ``"streams"`` streams and frames of a chunk.
        median_ms, p20_ms, p80_ms: of one call, interleaved with the other ways.
        peak_memory_mb: of one call.
        real_frames: in the call, padding not counted.
        rtf: time of a call over the duration of the speech in it, at 40 ms a frame.
        device_name, versions, commit: as in the rows of the suite.
    """

    kind: str
    way: str
    mode: str
    batch: int
    frames: int
    d_model: int
    layers: int
    depth: int
    dtype: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_memory_mb: float
    real_frames: int
    rtf: float
    device_name: str
    versions: dict[str, str]
    commit: str


_IDENTITY = ("kind", "way", "mode", "batch", "frames", "d_model", "layers", "depth", "dtype", "device_name", "commit")


@dataclass(frozen=True)
class Measured:
    """One way of running a case: its time, and peak memory in MB."""

    name: str
    timing: Timing
    memory: float


def draw_lengths(case: Case, seed: int = 0) -> Tensor:
    """Frames ``[B]`` int64 of utterances as long as those of LibriSpeech's dev sets, at most ``case.frames``."""
    generator = torch.Generator().manual_seed(seed)
    seconds = MEDIAN * (SPREAD * torch.randn(case.batch, generator=generator)).exp()
    return (seconds.clamp(min=SHORTEST) / FRAME).long().clamp(max=case.frames)


def _encoder(case: Case) -> Any:
    """lcconformer's encoder for the case, with nothing at its initial value."""
    encoder: Any = library(case).encoder
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return case.place(encoder).train(case.backward)


def _check(name: str, case: Case, out: Tensor, ref: Tensor, low: Tensor) -> None:
    error = relative_error(out, ref)
    allowed = allowed_error(relative_error(low, ref), OUTPUT_FACTOR, out.dtype)
    if not passes(error, allowed):
        raise GateError(f"{case}, {name}: off by {error:.2e} of its scale; at most {allowed:.2e} is allowed")


def _measure(
    case: Case, calls: dict[str, Callable[[], object]], seconds: float | None, rounds: int | None
) -> list[Measured]:
    for call in calls.values():
        call()
    memory = {name: peak_memory_mb(call, case.device) for name, call in calls.items()}
    timings = time_interleaved(calls, case.device, seconds or 15.0, rounds)
    return [Measured(name, timings[name], memory[name]) for name in calls]


def _print(found: list[Measured], column: str, value: Callable[[Measured], float]) -> None:
    lines = [
        [m.name, *map(number, (m.timing.median, m.timing.p20, m.timing.p80, value(m), m.memory)),
         f"{found[0].timing.median / m.timing.median:.2f}x"]
        for m in found
    ]  # fmt: skip
    print(grid(["", "ms", "p20", "p80", column, "MB", "speedup"], lines))


def _file(path: Path | None, kind: str, case: Case, real_frames: int, found: list[Measured]) -> None:
    if path is None:
        return
    for m in found:
        t = m.timing
        rtf = t.median / (1e3 * FRAME * real_frames)
        row = SpeechRow(
            kind, m.name, case.mode, case.batch, case.frames, case.d_model, case.layers, case.depth, case.dtype,
            t.median, t.p20, t.p80, m.memory, real_frames, rtf, device_name(case.device), versions(), commit(),
        )  # fmt: skip
        add_row(path, row, _IDENTITY)


def measure_packed(case: Case, seconds: float | None, rounds: int | None) -> tuple[Tensor, list[Measured]]:
    """Time a packed batch against the same one padded; lengths ``[B]`` and measurements.

    Raises:
        GateError: the outputs of one of them are wrong.
    """
    encoder, lengths = _encoder(case), draw_lengths(case).to(case.device)
    longest = int(lengths.max())
    x = case.replace(frames=longest).input().detach()
    real = frame_mask(lengths, longest)
    flat, ends = lcconformer.pack(x, lengths)

    def padded() -> Tensor:
        return encoder(x, lengths, depth=case.depth)[0]

    def packed() -> Tensor:
        return encoder.packed(flat, ends, longest=longest, depth=case.depth)[0]

    def step(run: Callable[[], Tensor], weight: Tensor) -> object:
        with case.autocast():
            if not case.backward:
                with torch.no_grad():
                    return run()
            out = run()
        return torch.autograd.grad(out, list(encoder.parameters()), weight.to(out.dtype))

    encoder.eval()
    with torch.no_grad(), case.autocast():
        outputs = {"padded": padded()[real], "packed": packed()}
        with lcconformer.backend("torch"), lcconformer.engine("modules"):
            low = padded()[real]
            ref = copy.deepcopy(encoder).double()(x.double(), lengths, depth=case.depth)[0][real]
    for name, out in outputs.items():
        _check(name, case, out, ref, low)
    encoder.train(case.backward)
    # gradients of the same loss, zero in the padding
    weight = torch.randn_like(flat)
    padded_weight = lcconformer.unpack(weight, ends, longest)
    calls = {"padded": lambda: step(padded, padded_weight), "packed": lambda: step(packed, weight)}
    return lengths, _measure(case, calls, seconds, rounds)


def packed(cases: Sequence[Case], path: Path | None, seconds: float | None, rounds: int | None) -> int:
    """Print packed batches against padded ones, and add rows to the file ``path``; T is the longest that an utterance may be.

    Raises:
        ValueError: the cases are ops.
        GateError: an output is wrong.
    """
    _refuse_ops("--packed", cases)
    print(f"{device_name(cases[0].device)}; commit {commit()}")
    for case in cases:
        lengths, found = measure_packed(case, seconds, rounds)
        total, longest = int(lengths.sum()), int(lengths.max())
        padding = 100 * (1 - total / (len(lengths) * longest))
        _file(path, "packed", case.replace(frames=longest), total, found)
        print(f"\n{case.replace(frames=longest)}: {total:,} real frames, {padding:.0f}% padding")
        _print(found, "real frames/s", lambda m, total=total: total / m.timing.median * 1e3)
    print("\nlengths as in LibriSpeech's dev sets: log-normal, median 6 s, 40 ms a frame")
    return 0


def measure_stream(case: Case, seconds: float | None, rounds: int | None) -> list[Measured]:
    """Time one chunk of ``case.frames`` frames for each of ``case.batch`` streams, in the middle of an utterance.

    Raises:
        GateError: the outputs of one way of running it are wrong.
    """
    encoder = _encoder(case)
    sizes = {"chunk": case.frames, "left": LEFT, "right": RIGHT, "depth": case.depth}
    stream = encoder.streaming(**sizes)
    frames = 3 * case.frames
    x, lengths = case.replace(frames=frames).input(), torch.full((case.batch,), frames, device=case.device)
    blocks = list(stream.blocks(x, lengths))
    ways = {
        "plain PyTorch": ("torch", "modules"),
        "module by module": ("auto", "modules"),
        "as chosen": ("auto", "auto"),
    }

    def run(stream: Any, blocks: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        state, outputs = stream.start(case.batch), []
        for block, count in blocks:
            out, _, state = stream(block, count, state)
            outputs.append(out)
        return torch.cat(outputs, 1)

    state = stream.start(case.batch)
    state = state._replace(seen=state.seen + LEFT)
    full = torch.full_like(lengths, case.frames + RIGHT)
    block = case.replace(frames=case.frames + RIGHT).input()
    calls: dict[str, Callable[[], object]] = {}
    with torch.no_grad(), case.autocast():
        exact = copy.deepcopy(encoder).double().streaming(**sizes)
        ref, _ = exact.whole(x.double(), lengths)
        with lcconformer.backend("torch"):
            low, _ = stream.whole(x, lengths)
        for name, (backend, engine) in ways.items():

            def call(backend: str = backend, engine: str = engine) -> object:
                with lcconformer.backend(backend), lcconformer.engine(engine), torch.no_grad(), case.autocast():
                    return stream(block, full, state)

            with lcconformer.backend(backend), lcconformer.engine(engine):
                _check(name, case, run(stream, blocks), ref, low)
            calls[name] = call
    return _measure(case, calls, seconds, rounds)


def streams(cases: Sequence[Case], path: Path | None, seconds: float | None, rounds: int | None) -> int:
    """Print the latency of a chunk and the real-time factor, and add rows to ``path``; B is streams, T frames of a chunk.

    Raises:
        ValueError: the cases are ops, or training.
        GateError: an output is wrong.
    """
    _refuse_ops("--streams", cases)
    if cases[0].backward:
        raise ValueError("bench --streams: mode is training; streams are for inference")
    print(f"{device_name(cases[0].device)}; commit {commit()}")
    for case in cases:
        found = measure_stream(case, seconds, rounds)
        _file(path, "streams", case, case.batch * case.frames, found)
        sound = case.batch * case.frames * FRAME * 1e3  # ms
        print(
            f"\n{case}: a chunk of {case.frames} frames with {LEFT} before and {RIGHT} after it, {case.batch} streams"
        )
        _print(found, "RTF", lambda m, sound=sound: m.timing.median / sound)
    print(f"\nms: one call; RTF: that over the speech of all chunks in it, {1e3 * FRAME:.0f} ms a frame")
    return 0


def _refuse_ops(flag: str, cases: Sequence[Case]) -> None:
    if cases[0].op:
        raise ValueError(f"bench {flag}: mode is ops; use --mode inference or training")
