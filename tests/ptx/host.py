"""Runs ops of the project on CPU tensors through compiled PTX; a process of its own, for Triton must not interpret here.

Reads a case, a line of JSON, and answers with a line of JSON; see ``cases.py`` for the cases and ``conftest.py`` for the
process. ``python -m tests.ptx.host '{"op": ...}'`` runs one by hand.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lcconformer.kernels import glu_depthwise_conv, glu_depthwise_conv_backward
from lcconformer.kernels.common import TRITON_DTYPE, AotConfig, dropout_scale, dropout_threshold
from lcconformer.kernels.report import configs, first_ir, kernel_modules

from lcconformer import extension, ops
from lcconformer.ops import availability
from lcconformer.ops.registry import backend
from lcconformer.tolerance import GRADIENT_FACTOR, OUTPUT_FACTOR, allowed_error, passes, relative_error
from tests.ptx import chain
from tests.ptx import program as ptx
from tests.ptx.interpreter import Fault, Memory, launch

SEED = 2**35 + 17
MODULES = [importlib.import_module(f"lcconformer.kernels.{name}") for name in kernel_modules()]
Key = tuple[Any, ...]
TEXTS: dict[Any, tuple[str, int]] = {}  # specialisation -> (PTX, bytes of shared memory)


# --- compiling


def to_ptx(source: ASTSource, arch: int, options: Mapping[str, Any]) -> tuple[str, int]:
    """(PTX, bytes of shared memory); ptxas is not asked."""
    module, compiler, parsed = first_ir(source, arch, options)
    metadata = {"target": compiler.target, **parsed.__dict__}
    stages: dict[str, Callable] = {}
    compiler.add_stages(stages, parsed, source.language)
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            return module, metadata["shared"]
    raise RuntimeError("Triton has no stage named ptx")


def plain(value: Any) -> Any:
    """A constexpr as its value."""
    return getattr(value, "value", value)


def key_of(kernel: Any, kinds: Mapping[str, str], constants: Mapping[str, Any], config: Any) -> Key:
    """What tells one shipped configuration from another; sizes of tensors and strides do not."""
    sizes = {n: plain(v) for n, v in constants.items() if n.isupper() or v is None}
    integers = {p.name for p in kernel.params if not p.is_constexpr and sizes.get(p.name, 0) is not None}
    # channels are constant in the kernels of the convolution, which hold them in registers: BLOCK_C tells them apart
    sizes = {n: v for n, v in sizes.items() if n not in integers and n != "C"}
    pointers = {n: t for n, t in kinds.items() if t.startswith("*")}
    tiles = tuple(sorted(map(str, sizes.items())))
    return kernel.fn.__name__, tuple(sorted(pointers.items())), tiles, config.num_warps, config.num_stages


def shipped_key(config: AotConfig) -> Key:
    return key_of(config.kernel, config.signature, config.constexprs, config.launch)


# --- launching


class Launcher:
    """In place of ``kernels.common.launch``: compile for the architecture and interpret; or only note what was asked for."""

    def __init__(self, arch: int, only_note: bool = False, change: Callable[[str], str] = lambda text: text):
        self.arch, self.only_note, self.change = arch, only_note, change
        self.asked: set[Key] = set()
        self.conflicts: dict[str, list[int]] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], config: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if 0 in grid:
            return
        options = {n: v for n, v in config.kwargs().items() if n not in config.blocks}
        given = (
            inspect.signature(kernel.fn)
            .bind(*args, **{n: v for n, v in kwargs.items() if n in kernel.arg_names}, **config.blocks)
            .arguments
        )
        options |= {n: v for n, v in kwargs.items() if n not in kernel.arg_names}
        kinds, constants, hints, values = specialise(kernel, given)
        self.asked.add(key_of(kernel, kinds, constants, config))
        if self.only_note:
            return
        names = kernel.arg_names
        key = kernel.fn.__name__, *(tuple(map(str, d.items())) for d in (kinds, constants, hints, options))
        key = self.arch, *key
        if key not in TEXTS:
            source = ASTSource(kernel, {n: kinds.get(n, "constexpr") for n in names}, constants, hints)
            TEXTS[key] = to_ptx(source, self.arch, options)
        text, shared = TEXTS[key]
        program = parsed(self.change(text))
        memory, raw = Memory(), []
        bases: dict[int, int] = {}
        for value in values:
            if isinstance(value, Tensor):
                at = storage(value, memory, bases) + value.data_ptr()
                raw.append(np.uint64(at).tobytes())
            elif isinstance(value, float):
                raw.append(np.float32(value).tobytes())
            else:
                raw.append(int(value).to_bytes(8, "little", signed=True))
        sizes = [size for _, size in program.params]
        raw = [r[:size] for r, size in zip(raw, sizes)] + [bytes(size) for size in sizes[len(raw) :]]
        for text, counts in launch(program, grid, raw, memory, shared).items():
            old = self.conflicts.setdefault(f"{kernel.fn.__name__}: {text}", [0, 0, 0])
            old[:] = [a + b for a, b in zip(old, counts)]

    @contextlib.contextmanager
    def active(self) -> Iterator[Launcher]:
        """The project's ops on CPU tensors go through this launcher."""
        with contextlib.ExitStack() as stack:
            for module in MODULES:
                for name, value in (
                    ("launch", self), ("arch_of", lambda x: self.arch), ("supports_pdl", lambda x: self.arch >= 90),
                ):  # fmt: skip
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, value))
            stack.enter_context(mock.patch.object(availability, "_triton_missing", return_value=""))
            stack.enter_context(backend("triton"))
            yield self


class CudaLauncher:
    """The launchers of csrc/cuda, built from ``launches/``, with the PTX that nvcc makes of the same sources.

    A launch names its kernel by an address, and ``nm`` names the addresses.
    """

    def __init__(self, module: str, texts: list[str], arch: int):
        spec = importlib.util.spec_from_file_location("launches", module)
        assert spec is not None
        assert spec.loader is not None
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.module.set_architecture(arch)
        symbols = subprocess.run(["nm", "-C", module], check=True, capture_output=True, text=True).stdout
        self.names = {int(at, 16): name for at, name in re.findall(r"^(\w+) [tTwW] (.*)$", symbols, re.MULTILINE)}
        self.kernels: dict[str, tuple[str, str]] = {}
        for text in texts:
            mangled = list(ptx.kernels(text))
            plain_names = subprocess.run(["c++filt", *mangled], check=True, capture_output=True, text=True).stdout
            self.kernels |= {name: (text, m) for name, m in zip(plain_names.splitlines(), mangled)}
        self.asked: set[str] = set()
        self.conflicts: dict[str, list[int]] = {}

    def listener(self, offset: int, grid: tuple[int, ...], shared: int, params: list[bytes]) -> None:
        name = self.names[offset]
        self.asked.add(name)
        memory, seen = Memory(), set()
        # a kernel's arguments are structures: it may reach whatever tensor there is, where it really is
        for tensor in [x for x in gc.get_objects() if issubclass(type(x), Tensor)]:
            whole = tensor.untyped_storage()
            if whole.nbytes() and whole.data_ptr() not in seen and tensor.device.type == "cpu":
                seen.add(whole.data_ptr())
                memory.add(torch.empty(0, dtype=torch.uint8).set_(whole).numpy(), whole.data_ptr())
        text, mangled = self.kernels[name]
        # the taps of the last group past K read rows that nothing uses
        counted = launch(parsed(text, mangled), grid, params, memory, shared, unset_is_nan=True)
        for line, counts in counted.items():
            old = self.conflicts.setdefault(f"{name}: {line}", [0, 0, 0])
            old[:] = [a + b for a, b in zip(old, counts)]

    @contextlib.contextmanager
    def active(self) -> Iterator[CudaLauncher]:
        """The project's ops on CPU tensors take the CUDA kernels."""
        self.module.listener = self.listener
        with (
            mock.patch.object(extension, "load", return_value=types.SimpleNamespace(cuda=self.module)),
            mock.patch.object(availability, "_cuda_missing", return_value=[]),
            backend("cuda"),
        ):
            yield self


parsed = functools.cache(ptx.parse)


def storage(tensor: Tensor, memory: Memory, bases: dict[int, int]) -> int:
    """Map the storage of a tensor once; what to add to an address in it."""
    whole = tensor.untyped_storage()
    start = whole.data_ptr()
    if start not in bases:
        raw = torch.empty(0, dtype=torch.uint8).set_(whole).numpy() if whole.nbytes() else np.zeros(0, np.uint8)
        bases[start] = memory.add(raw) - start
    return bases[start]


def specialise(kernel: Any, given: Mapping[str, Any]) -> tuple[dict, dict, dict, list]:
    """(types, constants, hints of divisibility, values of the run-time arguments), as Triton's launcher decides them."""
    kinds, constants, hints, values = {}, {}, {}, []
    for i, p in enumerate(kernel.params):
        value = plain(given.get(p.name)) if p.is_constexpr else given.get(p.name)
        if p.is_constexpr or value is None:
            constants[p.name] = value
            continue
        free = not p.do_not_specialize
        if isinstance(value, Tensor):
            kinds[p.name] = f"*{TRITON_DTYPE[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kinds[p.name], divisible = "fp32", False
        elif free and value == 1:
            constants[p.name] = 1
            continue
        else:
            kinds[p.name], divisible = "i32" if -(2**31) <= value < 2**31 else "i64", free and value % 16 == 0
        values.append(value)
        if divisible:
            hints[(i,)] = [["tt.divisibility", 16]]
    return kinds, constants, hints, values


# --- the oracle


def kept(shape: tuple[int, ...], stream: int, p: float) -> Tensor:
    """Which elements the counters of kernels/common.py keep: rows [..., N], or attention weights [B, H, T, T]."""
    majors = shape[0] * shape[1] if len(shape) == 4 else 1
    columns = shape[-1]
    major, row, column = np.meshgrid(
        np.arange(majors), np.arange(int(np.prod(shape[:-1])) // majors), np.arange(columns), indexing="ij"
    )
    low32 = np.uint64(0xFFFFFFFF)
    c = [x.astype(np.uint64) for x in (column // 8, row, major, np.full_like(row, stream))]
    key = [np.uint64(SEED & 0xFFFFFFFF), np.uint64(SEED >> 32)]
    for _ in range(7):
        low, high = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [high >> np.uint64(32) ^ c[1] ^ key[0], high & low32, low >> np.uint64(32) ^ c[3] ^ key[1], low & low32]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low32, (key[1] + np.uint64(0xBB67AE85)) & low32]
    word = np.take_along_axis(np.stack(c), (column % 8 // 2)[None], 0)[0]
    half = np.where(column % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return torch.from_numpy((half >= dropout_threshold(p)).reshape(shape))


@contextlib.contextmanager
def counted_dropout() -> Iterator[None]:
    """``F.dropout`` draws as the kernels do: call n of an op is stream n."""
    calls = iter(range(10))

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if p == 0.0:
            return x
        return x * kept(tuple(x.shape), next(calls), p).to(x.dtype) * dropout_scale(p)

    with mock.patch("torch.nn.functional.dropout", dropout):
        yield


def attention(case: Mapping[str, Any], tensor: Callable[..., Tensor]) -> dict[str, Any]:
    b, t, h, d = case["b"], case["t"], case["h"], case["d"]
    lengths = torch.tensor(case["lengths"])
    frames = (int(lengths.sum()),) if case.get("packed") else (b, t)
    inputs = {n: tensor(n, *frames, h, d) for n in "qkv"}
    inputs |= {"pos": tensor("pos", 2 * t - 1, h, d), "u": tensor("u", h, d), "v_bias": tensor("v_bias", h, d)}
    if case.get("packed"):
        return inputs | {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}
    return inputs | {"lengths": lengths}


def convolution(case: Mapping[str, Any], tensor: Callable[..., Tensor]) -> dict[str, Any]:
    b, t, c, k, norm = case["b"], case["t"], case["c"], case["k"], case["norm"]
    inputs: dict[str, Any] = {
        "x": tensor("x", b, t, 2 * c),
        "weight": tensor("weight", c, k),
        "bias": tensor("bias", c),
    }
    inputs |= {"lengths": torch.tensor(case["lengths"]), "norm": norm.removesuffix("-training")}
    if norm != "none":
        inputs |= {"norm_weight": tensor("norm_weight", c), "norm_bias": tensor("norm_bias", c)}
    if norm == "group":
        inputs["num_groups"] = 4
    if norm.startswith("batch"):
        generator = torch.Generator().manual_seed(1)
        inputs["running_mean"] = torch.randn(c, generator=generator)
        inputs["running_var"] = 0.5 + torch.rand(c, generator=generator)
        inputs["training"] = norm.endswith("training")
    return inputs


def feed_forward(case: Mapping[str, Any], tensor: Callable[..., Tensor]) -> dict[str, Any]:
    b, t, d, f = case["b"], case["t"], case["d"], case["f"]
    inputs = {"x": tensor("x", b, t, d), "norm_weight": tensor("norm_weight", d), "norm_bias": tensor("norm_bias", d)}
    return inputs | {"w1": tensor("w1", f, d), "b1": tensor("b1", f), "w2": tensor("w2", d, f), "b2": tensor("b2", d)}


def residual(case: Mapping[str, Any], tensor: Callable[..., Tensor]) -> dict[str, Any]:
    b, t, d = case["b"], case["t"], case["d"]
    inputs: dict[str, Any] = {n: tensor(n, b, t, d) for n in "xy"}
    return inputs | {"weight": tensor("weight", d), "bias": tensor("bias", d), "alpha": 0.5}


INPUTS = {
    "relpos_attention": attention,
    "glu_depthwise_conv": convolution,
    "feed_forward": feed_forward,
    "residual_layer_norm": residual,
    **{name: inputs for name, (inputs, _, _) in chain.KERNELS.items()},
}


def functions(op: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(what launches the kernels, the formula)"""
    if op in chain.KERNELS:
        return chain.KERNELS[op][1:]
    return getattr(ops, op), getattr(importlib.import_module(f"lcconformer.ops.{op}"), f"{op}_reference")


def call(case: Mapping[str, Any], function: Callable, dtype: torch.dtype, rounded: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by name, of inputs rounded to ``rounded`` and given in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    leaves: dict[str, Tensor] = {}

    def tensor(name: str, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if name in ("w1", "w2", "weight") and len(shape) > 1:
            x /= shape[1] ** 0.5
        leaves[name] = x.to(rounded).to(dtype).requires_grad_()
        return leaves[name]

    inputs = INPUTS[case["op"]](case, tensor)
    if case["op"] not in ("glu_depthwise_conv", *chain.KERNELS):
        inputs["dropout_p"] = case.get("dropout", 0.0)
    for name in ("running_mean", "running_var"):
        if name in inputs and dtype == torch.float64:
            inputs[name] = inputs[name].double()
    out = function(**inputs)
    outputs = out if isinstance(out, tuple) else (out,)
    if "lengths" in inputs:  # values in the padding are undefined
        real = torch.arange(outputs[0].shape[1]) < inputs["lengths"][:, None]
        outputs = tuple(torch.where(real.view(*real.shape, *[1] * (o.dim() - 2)), o, 0.0) for o in outputs)
    cotangents = [torch.randn(o.shape, generator=generator).to(rounded).to(dtype) for o in outputs]
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if case.get("forward_only") or case["op"] in chain.KERNELS:
        return found
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    return found | {f"gradient of {n}": g for n, g in zip(leaves, gradients)}


@contextlib.contextmanager
def settings(case: Mapping[str, Any]) -> Iterator[None]:
    """TF32, the product kernels of the feed-forward, programs of the convolution and a fixed seed, as the case asks."""
    if case["op"] in chain.KERNELS:
        with chain.settings(case), torch.no_grad():
            yield
        return
    op = importlib.import_module(f"lcconformer.ops.{case['op']}")
    with contextlib.ExitStack() as stack:
        if hasattr(op, "dropout_seed"):
            seed = lambda x, p, *_: torch.tensor([SEED]) if p else None  # noqa: E731
            stack.enter_context(mock.patch.object(op, "dropout_seed", seed))
        if case.get("tf32"):
            matmul = torch.backends.cuda.matmul  # computes its attributes: mock cannot restore them
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = "tf32"
        if "products" in case:
            products = importlib.import_module("lcconformer.kernels.feed_forward_products")

            def choice(product: str, *_: Any) -> Any:
                if product == "norm_up" and not case["norm"]:
                    return products.LIBRARY
                return products.CONFIGS[product][min(case["products"], len(products.CONFIGS[product]) - 1)]

            stack.enter_context(mock.patch.object(products, "choice", choice))
        if "programs" in case:
            # chunks of several steps, as long utterances have them
            chunks_of = glu_depthwise_conv.chunks_of
            fewer = lambda b, t, _, least: chunks_of(b, t, case["programs"], least)  # noqa: E731
            for module in (glu_depthwise_conv, glu_depthwise_conv_backward):
                stack.enter_context(mock.patch.object(module, "chunks_of", fewer))
        yield


def tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def run(case: Mapping[str, Any], change: Callable[[str], str] = lambda text: text) -> dict[str, Any]:
    """Answer a case: per tensor its error, what the tolerance rule allows, and how often the banks were passed."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case["dtype"]]
    function, reference = functions(case["op"])
    rounded = dtype
    with counted_dropout():
        exact = call(case, reference, torch.float64, rounded)
    # a product in TF32 rounds its factors to 11 bits, as float16 does: what plain PyTorch gives in float16 is its measure
    measure = torch.float16 if case.get("tf32") else dtype
    with counted_dropout():
        low = call(case, reference, measure, rounded)
    launcher: Launcher | CudaLauncher
    if "module" in case:
        launcher = CudaLauncher(case["module"], [Path(path).read_text() for path in case["texts"]], case["arch"])
    else:
        launcher = Launcher(case["arch"], change=change)
    with settings(case), launcher.active():
        found = call(case, function, dtype, rounded)
    errors = {name: relative_error(value, exact[name]) for name, value in found.items()}
    worst = {
        output: max(
            (relative_error(low[n], v) for n, v in exact.items() if n.startswith("output") == output), default=0.0
        )
        for output in (True, False)
    }
    answer = {}
    for name, error in errors.items():
        output = name.startswith("output")
        allowed = allowed_error(worst[output], OUTPUT_FACTOR if output else GRADIENT_FACTOR, measure)
        answer[name] = {"error": error, "allowed": allowed, "passed": passes(error, allowed)}
    return {"tensors": answer, "launches": len(launcher.asked), "conflicts": launcher.conflicts}


def mutations(case: Mapping[str, Any], mutation: Mapping[str, str]) -> dict[str, Any]:
    """Run the forward once for each match of a pattern in a kernel's PTX, without it: how many, and which went unnoticed.

    Noticed is a fault or a result that breaks the tolerance rule.
    """
    spots: list[str] = []
    unseen: list[str] = []
    index = 0

    def change(text: str) -> str:
        if f".entry {mutation['kernel']}(" not in text:
            return text
        found = list(re.finditer(mutation["pattern"], text))
        spots[:] = [text[m.start() : m.end()].strip() for m in found]
        return text[: found[index].start()] + text[found[index].end() :]

    while index == 0 or index < len(spots):
        try:
            noticed = not all(t["passed"] for t in run({**case, "forward_only": True}, change)["tensors"].values())
        except Fault as fault:
            noticed = True
            print(f"{index}: {spots[index]}: {fault}", file=sys.stderr)
        if not noticed:
            unseen.append(f"{index}: {spots[index]}")
        index += 1
    return {"taken_out": spots, "unseen": unseen}


def uncovered(cases: list[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Architecture -> names of the shipped configurations that none of the cases launches; nothing is run."""
    found = {}
    for arch in sorted({c["arch"] for c in cases}):
        launcher = Launcher(arch, only_note=True)
        for case in cases:
            if case["arch"] == arch:
                with settings(case), launcher.active():
                    call(
                        case,
                        functions(case["op"])[0],
                        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case["dtype"]],
                        torch.float32,
                    )
        found[str(arch)] = [
            f"{c.name} {c.dtype}"
            for module in kernel_modules()
            for c in configs(module, arch)
            if shipped_key(c) not in launcher.asked
        ]
    return found


def answer(question: Mapping[str, Any]) -> Any:
    if "mutations" in question:
        return mutations({n: v for n, v in question.items() if n != "mutations"}, question["mutations"])
    if "uncovered" in question:
        return uncovered(question["uncovered"])
    return run(question)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written is NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    if len(sys.argv) > 1:
        print(json.dumps(answer(json.loads(sys.argv[1])), indent=1))
        return
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"fault": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
