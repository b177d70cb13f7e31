"""What the Triton kernels share: launching, dtypes, heuristics, dropout by counter, the ahead-of-time protocol.

Every kernel module exposes `aot_configs(arch) -> Iterable[AotConfig]`: the configurations it ships for that
architecture. `lcconformer.kernels.report` compiles them without a GPU and prints registers, spills and shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from lcconformer.architectures import SHARED_MEMORY

# set before triton is imported, or not at all: decorating a kernel reads it
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

TRITON_DTYPE: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched; `blocks` are its BLOCK_* constexprs. No warps: use the library instead of this kernel.

    `pdl`: programmatic dependent launch: the kernel may start before the previous one has ended, and waits for it inside.
    """

    num_warps: int
    num_stages: int
    blocks: Mapping[str, int] = field(default_factory=dict)
    pdl: bool = False

    def with_pdl(self, pdl: bool) -> LaunchConfig:
        """Return this configuration with or without programmatic dependent launch."""
        return replace(self, pdl=True) if pdl else self

    def __str__(self) -> str:
        tiles = "".join(f" {name}={size}" for name, size in self.blocks.items())
        return f"warps={self.num_warps} stages={self.num_stages}{tiles}" if self.num_warps else "the library's"

    def kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments for `kernel[grid](...)`; fusing a*b+c is pinned, since Triton's default varies."""
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
            **({"launch_pdl": True} if self.pdl else {}),
        }


@dataclass(frozen=True)
class AotConfig:
    """One kernel as shipped, ready to be compiled for an architecture without a GPU.

    `signature` names the run-time arguments ("*bf16", "*fp32", "i32", "i64", "fp32"); every other parameter of the
    kernel is in `constexprs`. Pointers count as 16-byte aligned; `divisible` names the integers that are multiples of
    16 (as strides are at run time); `spill_budget` is the bytes of stack a thread may use; `may_serialize`: ptxas may
    serialise the warpgroup products on sm_90 (C7515).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    dtype: str
    launch: LaunchConfig
    divisible: frozenset[str] = frozenset()
    tensor_cores: bool = False
    spill_budget: int | None = None
    may_serialize: bool = False


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(x: torch.Tensor) -> int:
    """Return the compute capability of the tensor's device (90 for an H200); the interpreter acts as 90."""
    if x.device.type != "cuda":
        return 90
    return _capability(x.device.index)


def nearest_arch(arch: int) -> int:
    """Return the listed architecture whose limits a device of capability `arch` has (87 -> 86, 103 -> 100, 121 -> 120)."""
    return max((a for a in SHARED_MEMORY if a <= arch), default=min(SHARED_MEMORY))


_NO_GUARD = contextlib.nullcontext()


def supports_pdl(x: torch.Tensor) -> bool:
    """Whether kernels on the tensor's device can be launched with programmatic dependent launch."""
    return x.device.type == "cuda" and arch_of(x) >= 90


def product_precision(dtype: torch.dtype) -> str:
    """Return `input_precision` of tl.dot: float32 products as PyTorch's own, exact, or TF32 where that is allowed."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def device_guard(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, where launches go."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(x.device)


Launch = Callable[[int, bool], None]
"""A kernel with its grid and arguments, to be launched on a stream, given by its handle, once or more: its tensors are read
where they are.  The second argument says whether a profiler wants to hear of it."""

_collected: ContextVar[list[Launch] | None] = ContextVar("lcconformer.launches", default=None)


def launch(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, x: torch.Tensor, *args: Any, **kwargs: Any
) -> None:
    """Run `kernel` over `grid` on the device of `x`; empty grids launch nothing."""
    if 0 in grid:
        return
    with device_guard(x):
        bound = _bind(kernel, grid, config, args, kwargs)
    issue(bound, x)


@contextlib.contextmanager
def collected() -> Iterator[list[Launch]]:
    """Collect the launches of the block in a list, for :func:`run`, instead of making them."""
    launches: list[Launch] = []
    token = _collected.set(launches)
    try:
        yield launches
    finally:
        _collected.reset(token)


def issue(launch: Launch, x: torch.Tensor) -> None:
    """Make a launch on the device of `x`, or leave it to the block of :func:`collected` around."""
    launches = _collected.get()
    if launches is None:
        run((launch,), x)
    else:
        launches.append(launch)


def run(launches: Iterable[Launch], x: torch.Tensor) -> None:
    """Make the launches one after the other, on the device of `x` and its current stream."""
    with device_guard(x):
        stream, hooked = _stream(), _hooked()
        for launch in launches:
            launch(stream, hooked)


def _stream() -> int:
    """Return the handle of the current stream of the current device; the interpreter has none."""
    if INTERPRETED:
        return 0
    driver = triton.runtime.driver.active
    return driver.get_current_stream(driver.get_current_device())


def _hooked() -> bool:
    """Whether a profiler wants to hear of launches, which Triton tells it."""
    runtime = triton.knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


class _Known(NamedTuple):
    """What is known of a kernel.

    Attributes:
        parameters: of each its name, whether it is a constexpr, and whether Triton specialises on its value.
        compiled: what Triton compiled, by device, configuration and specialisation of the arguments.
    """

    parameters: tuple[tuple[str, bool, bool], ...]
    compiled: dict[tuple[Any, ...], CompiledKernel]


@functools.cache
def _known(kernel: Any) -> _Known:
    return _Known(tuple((p.name, p.is_constexpr, not p.do_not_specialize) for p in kernel.params), {})


def _bind(
    kernel: Any, grid: tuple[int, ...], config: LaunchConfig, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Launch:
    """Return the launch of what Triton compiles for arguments like these on the current device.

    `kernel[grid](...)` binds, specialises and hashes its arguments anew at each launch. The key here tells apart all that
    Triton does: dtype and 16-byte alignment of tensors; whether integers are one, multiples of 16, and fit in 32 bits; what
    is absent; and the values of constexprs.
    """

    def by_triton(_stream: int, _hooked: bool) -> None:
        kernel[grid](*args, **kwargs, **config.kwargs())

    if INTERPRETED:
        return by_triton
    named = {**kwargs, **config.blocks}
    parameters, known = _known(kernel)
    values = [*args, *[named[name] for name, _, _ in parameters[len(args) :]]]
    device = triton.runtime.driver.active.get_current_device()
    key: list[Any] = [device, config.num_warps, config.num_stages, config.pdl]
    for value, (_, constant, specialised) in zip(values, parameters):
        if constant:
            key.append(value)
        elif type(value) is int:
            divisor = 0 if not specialised else 1 if value == 1 else 16 if not value & 15 else 0
            key.append(divisor if -(2**31) <= value < 2**31 else -1 - divisor)
        elif value is None:
            key.append(None)
        elif type(value) is float:
            key.append(float)
        else:
            key += value.dtype, not value.data_ptr() & 15
    specialisation = tuple(key)
    compiled = known.get(specialisation)
    if compiled is None:
        compiled = kernel.warmup(*args, grid=grid, **kwargs, **config.kwargs())
        if compiled is None:  # a hook that keeps Triton from compiling: Triton launches nothing then
            return lambda _stream, _hooked: None
        if not isinstance(compiled, CompiledKernel):  # it is being compiled in the background
            return by_triton
        known[specialisation] = compiled
    x, y, z = (*grid, 1, 1)[:3]
    start = compiled.run
    rest = (compiled.function, compiled.packed_metadata, None, None, None, *values)

    def bound_launch(stream: int, hooked: bool) -> None:
        if hooked:
            by_triton(stream, hooked)
        else:
            start(x, y, z, stream, *rest)

    return bound_launch


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself if its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dense(*vectors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Return [C] or [B] parameters contiguous: kernels index them without a stride."""
    return [None if v is None else v.contiguous() for v in vectors]


# --- dropout ---------------------------------------------------------------------------------------------------------
# The decision for element (row, col) is 16 bits of Philox-4x32-7 with key `seed` and counter
# (col // 8, row, major, stream): half-word col % 8 of the four words, low half first. Seven rounds pass BigCrush
# (Salmon et al., 2011); 16 bits keep the cost at one Philox per eight elements, and the kept values are scaled by
# the exact probability. `stream` is the loop of a shared layer, `major` is batch * heads + head, or 0.

DROPOUT_LEVELS = 1 << 16


def dropout_threshold(p: float) -> int:
    """Return the threshold below which an element's 16 bits drop it."""
    return min(round(p * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)


def dropout_scale(p: float) -> float:
    """Return 1 / (probability of being kept) for the threshold actually used."""
    return DROPOUT_LEVELS / (DROPOUT_LEVELS - dropout_threshold(p))


@triton.jit
def dropout_keep(seed, stream, major, rows, col_start, threshold, BLOCK_N: tl.constexpr):
    """Decide which of the [M, BLOCK_N] elements at rows [M] and columns col_start... are kept; col_start % 8 == 0.

    seed int64; stream, major, rows, col_start, threshold int32.
    """
    cols8 = col_start // 8 + tl.arange(0, BLOCK_N // 8)
    zero = rows[:, None] * 0 + cols8[None, :] * 0  # [M, BLOCK_N / 8]
    r0, r1, r2, r3 = tl.philox(seed, zero + cols8[None, :], zero + rows[:, None], zero + major, zero + stream, 7)
    t = tl.cast(threshold, tl.uint32)
    lo = tl.join(tl.join((r0 & 0xFFFF) >= t, (r2 & 0xFFFF) >= t), tl.join((r1 & 0xFFFF) >= t, (r3 & 0xFFFF) >= t))
    hi = tl.join(tl.join((r0 >> 16) >= t, (r2 >> 16) >= t), tl.join((r1 >> 16) >= t, (r3 >> 16) >= t))
    # [M, BLOCK_N / 8, word / 2, word % 2, half] -> [M, BLOCK_N]
    return tl.reshape(tl.join(lo, hi), (rows.shape[0], BLOCK_N))


# dropout streams of the feed-forward
HIDDEN = tl.constexpr(0)
OUTPUT = tl.constexpr(1)


@triton.jit
def dropped(x, seed_ptr, stream, rows, col_start, threshold, keep_scale, BLOCK_N: tl.constexpr):
    """x [M, BLOCK_N] with dropped elements zero and the others scaled; x itself without a seed."""
    if seed_ptr is None:
        return x
    else:
        keep = dropout_keep(tl.load(seed_ptr), stream, 0, rows, col_start, threshold, BLOCK_N)
        return tl.where(keep, x * tl.cast(keep_scale, tl.float32), 0.0)


# --- pointwise -------------------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    # exp2 and the square of rsqrt compile to 5 instructions, a division to 8 and exp to 4 more (sm_90, Triton 3.9)
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def add_bias(x, bias_ptr, cols, N):
    """x [M, BLOCK_N] float32 plus bias[cols]; x itself without a bias."""
    if bias_ptr is None:
        return x
    else:
        return x + tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]


# --- ahead of time ---------------------------------------------------------------------------------------------------


_INT64 = ("seed_ptr", "lengths_ptr", "cu_seqlens_ptr")
_FLOAT = ("scale", "grad_scale", "keep_scale", "alpha", "eps")


def aot_config(
    name: str,
    kernel: Any,
    dtype: str,
    config: LaunchConfig,
    constexprs: Mapping[str, Any],
    *,
    types: Mapping[str, str] | None = None,
    divisible: Iterable[str] = (),
    tensor_cores: bool = False,
    spill_budget: int = 0,
    may_serialize: bool = False,
) -> AotConfig:
    """Return the kernel as shipped, with the types of its run-time arguments by their names.

    A `_ptr` points to `dtype`, seeds and lengths to int64; scales and eps are float32, other scalars int32; `types` says what
    is otherwise. A pointer in `constexprs` is None: absent, as at run time. The launch says whether `PDL` is on.
    """
    constexprs = {**config.blocks, **constexprs}
    if "PDL" in kernel.arg_names:
        constexprs["PDL"] = config.pdl
    known = {n: "*i64" for n in _INT64} | {n: "fp32" for n in _FLOAT} | dict(types or {})
    parameters = inspect.signature(kernel.fn).parameters
    missing = [n for n, p in parameters.items() if "constexpr" in str(p.annotation) and n not in constexprs]
    unknown = sorted(constexprs.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(f"{name}: constexprs without a value: {missing}; values for what it does not take: {unknown}")
    signature = {
        n: known.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in kernel.arg_names if n not in constexprs
    }
    return AotConfig(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        dtype=dtype,
        launch=config,
        divisible=frozenset(divisible) & signature.keys(),
        tensor_cores=tensor_cores,
        spill_budget=spill_budget,
        may_serialize=may_serialize,
    )


def divisible_by_16(config: AotConfig) -> Iterable[str]:
    """Return the names of the arguments that Triton would specialise on at run time."""
    unaligned = {p.name for p in config.kernel.params if p.do_not_specialize_on_alignment}
    return [
        n for n, t in config.signature.items() if (t.startswith("*") or n in config.divisible) and n not in unaligned
    ]
