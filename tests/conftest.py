"""What every test shares: seeds, threads, the GPU marker, made-up speech, and where the larger speech data lies."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key

from lcconformer.ops.registry import forget_choices
from lcconformer.tolerance import allowed_error, largest_error, passes

# Triton reads this when it decorates a kernel: without a GPU the kernels run in its interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tensors here are too small to share among threads, and on a busy machine threads wait for one another: in child processes
# by this, in this one below
os.environ.setdefault("OMP_NUM_THREADS", "1")

# ONNX Runtime reads this when it is imported, here and in child processes: no threads of its own that report to its makers
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

RATE = 16_000
PITCHES = {"SIL": 0.0, "AA": 300.0, "IY": 1200.0, "S": 3500.0}  # Hz, of the phones of made-up speech


DEATHS = pytest.StashKey[dict[str, str]]()  # of the process that distributes the tests: how a worker died


@pytest.hookimpl(trylast=True)  # pytest turns the fault handler on first, into the middle of a long output
def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if worker := getattr(config, "workerinput", None):
        # what a fatal signal prints, and what a test prints that is about to reach its time limit
        with fatal(worker).open("w") as file:
            os.dup2(file.fileno(), config.stash[fault_handler_stderr_fd_key])


# lines of a stack, or below it, that are the same for every test
OF_PYTEST = re.compile(r"/(_pytest|pluggy|xdist|execnet)/|^Extension modules")


def fatal(worker: dict[str, Any]) -> Path:
    """The file of a worker of pytest-xdist into which Python writes all stacks if a signal or a time limit ends it."""
    return Path(tempfile.gettempdir()) / f"lcconformer-tests-{worker['testrunuid']}-{worker['workerid']}.txt"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any, error: object) -> None:
    path = fatal(node.workerinput)
    if error:
        code = node.gateway._io.popen.wait(60)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        stacks = "\n".join(line for line in lines if not OF_PYTEST.search(line))
        how = f"signal {-code}" if code < 0 else f"code {code}; 1 is that of a time limit"
        node.config.stash.setdefault(DEATHS, {})[node.workerinput["workerid"]] = f"ended with {how}\n{stacks}"
    path.unlink(missing_ok=True)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, after the hook above
def pytest_handlecrashitem(report: pytest.TestReport) -> None:
    """How the worker died stands in the test's report: its place is at the end of a long output."""
    deaths = report.node.config.stash[DEATHS]  # type: ignore[attr-defined]
    report.longrepr = f"{report.longrepr}: {deaths[report.node.workerinput['workerid']]}"  # type: ignore[attr-defined]


def kernels_of(item: pytest.Item) -> str:
    """The same for tests that compile the same kernels: lengths do not count."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return " ".join([item.nodeid.partition("[")[0], *(f"{k}={v}" for k, v in parameters.items() if k != "t")])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # bench/gpu/gpu_tests.py: this process runs the tests of share i of n
    if shard := os.environ.get("LCCONFORMER_TEST_SHARD"):
        i, n = map(int, shard.split("/"))
        keys = dict.fromkeys(kernels_of(item) for item in items if item.get_closest_marker("gpu"))
        mine = {key for k, key in enumerate(keys) if k % n == i}
        config.hook.pytest_deselected(items=[item for item in items if kernels_of(item) not in mine])
        items[:] = [item for item in items if kernels_of(item) in mine]
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _triton_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter patches ``triton.language`` for a launch, and again for every call of a helper, a quarter of its
    time that changes nothing: what a launch has patched is left alone until it ends.
    """
    # imported with the first kernel, when tests are collected
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    patch, tl = interpreter._patch_lang, interpreter.tl
    patched: set[ModuleType] = set()

    @functools.cache
    def languages(fn: Callable[..., Any]) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(value is module for value in fn.__globals__.values())]

    def patch_lang(fn: Callable[..., Any]) -> Any:
        needed = languages(fn)
        if needed and patched.issuperset(needed):
            return None  # within a launch nobody asks for it
        scope = patch(fn)
        if not patched:
            restore = scope.restore

            def restored() -> None:
                patched.clear()
                restore()

            scope.restore = restored
        patched.update(needed)
        return scope

    with mock.patch.object(interpreter, "_patch_lang", patch_lang):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    # what an earlier test patched may have decided them
    forget_choices()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the speech archives (``ls_dev20.zip``, ...): LCCONFORMER_SHARED_DATA, or shared/data beside the checkout."""
    given = os.environ.get("LCCONFORMER_SHARED_DATA")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        if given:
            raise FileNotFoundError(f"LCCONFORMER_SHARED_DATA is {given!r}, which is no folder")
        pytest.skip(f"no speech data at {path}; set LCCONFORMER_SHARED_DATA to the folder of the archives")
    return path


@pytest.fixture(scope="session")
def speech_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder corpus: 14 utterances of 0.4 to 1.2 s, four speakers a, b, c, d, splits train and test; no alignments."""
    soundfile = pytest.importorskip("soundfile", reason="pip install 'lcconformer[test]'")
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(14):
        count = int(RATE * rng.uniform(0.4, 1.2))
        t = np.arange(count) / RATE
        voice = sum(np.sin(2 * np.pi * k * (100 + 15 * i + 40 * np.sin(9 * t)) * t) / k for k in range(1, 9))
        sound = 0.1 * voice * (0.3 + np.sin(20 * t) ** 2) + 0.01 * rng.standard_normal(count)
        soundfile.write(folder / f"u{i:02}.flac", sound.astype(np.float32), RATE)
        rows.append({"utt": f"u{i:02}", "spk": "abcd"[i % 4], "split": "test" if i == 13 else "train", "n": count})
    (folder / "meta.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _tones(phones: list[tuple[str, int]], rng: np.random.Generator) -> np.ndarray:
    """A tone of its own for each phone, in noise; silence is noise alone."""
    parts = []
    for phone, frames in phones:
        t = np.arange(frames * 160) / RATE
        parts.append(0.2 * np.sin(2 * np.pi * PITCHES[phone] * t))
    samples = np.concatenate(parts)
    return (samples + 0.01 * rng.standard_normal(len(samples))).astype(np.float32)


@pytest.fixture(scope="session")
def make_speech(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_speech(name, count=8, splits=True, aligned=True)`` -> folder of a corpus of speakers s0, s1, s2; about 1 s each.

    Splits are ``train`` (s0, s1) and ``test`` (s2), or none; phone times are exact.
    """
    soundfile = pytest.importorskip("soundfile", reason="pip install 'lcconformer[test]'")

    def make(name: str, count: int = 8, *, splits: bool = True, aligned: bool = True, seed: int = 0) -> Path:
        folder = tmp_path_factory.mktemp(name)
        rng = np.random.default_rng(seed)
        rows = []
        for i in range(count):
            names = [*rng.permutation(list(PITCHES)), *rng.permutation(list(PITCHES))]
            phones = [(str(p), int(n)) for p, n in zip(names, rng.integers(5, 20, len(names)))]
            samples = _tones(phones, rng)
            soundfile.write(folder / f"{name}{i:02}.flac", samples, RATE)
            rows.append(
                {
                    "utt": f"{name}{i:02}",
                    "spk": f"s{i % 3}",
                    "split": ("test" if i % 3 == 2 else "train") if splits else "",
                    "text": "",
                    "n": len(samples),
                    "phones": " ".join(f"{p}:{n}" for p, n in phones) if aligned else "",
                }
            )
        (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture(scope="session")
def speech(make_speech: Callable[..., Path]) -> Path:
    """Twelve aligned utterances of :func:`make_speech`."""
    return make_speech("speech", 12)


@pytest.fixture
def tiny_model() -> torch.nn.Module:
    """A PretrainingModel: 3 loops of width 16 over pairs of frames, 20 mel bins, seeded, in evaluation mode."""
    from lcconformer import ConformerConfig
    from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel

    torch.manual_seed(0)
    config = ConformerConfig(
        d_model=16,
        num_heads=2,
        ffn_dim=32,
        num_layers=3,
        conv_kernel_size=5,
        dropout=0.0,
        input_dim=20,
        subsampling="stack",
        subsampling_factor=2,
    )
    return PretrainingModel(config, FeatureSettings(num_bins=20), ObjectiveSettings()).eval()


@pytest.fixture
def tiny_checkpoint(tiny_model: Any, tmp_path: Path) -> Path:
    from lcconformer.ssl import save_checkpoint

    tensors = {f"model.{name}": x for name, x in tiny_model.state_dict().items()}
    return save_checkpoint(tmp_path / "tiny.safetensors", tensors, tiny_model.describe())


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """transformers imports torchaudio wherever it is installed, which fails where that wants a CUDA runtime: hide it."""
    pytest.importorskip("transformers", reason="pip install 'lcconformer[test]'")
    import transformers.utils

    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        with mock.patch.object(transformers.utils, "is_torchaudio_available", return_value=False):
            import transformers.audio_utils
    return transformers


def _assert_close(
    name: str, out: torch.Tensor, ref: torch.Tensor, low: torch.Tensor, r: float, scale: float = 0.0
) -> None:
    assert out.shape == ref.shape, name
    assert out.isfinite().all(), f"{name} has values that are not finite"
    if not out.numel():
        return
    error, eager = (largest_error(x, ref) for x in (out, low))
    bound = allowed_error(eager, r, out.dtype, max(scale, ref.abs().max().item()))
    assert passes(error, bound), f"{name}: error {error:.3g} > {bound:.3g}; eager PyTorch has {eager:.3g}"


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """``assert_close(name, out, ref, low, r, scale=0.0)``: the rule of ``lcconformer.tolerance``.

    ``scale`` replaces the largest value of ``ref`` where it is larger.
    """
    return _assert_close


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory handed out by ``new_empty`` and ``empty_like`` is NaN until someone writes it."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


def _lay_out(data: Any, x: torch.Tensor) -> torch.Tensor:
    """The values of ``x`` in strides and at an offset that Hypothesis draws from ``data``, NaN between them."""
    from hypothesis import strategies as st

    order = data.draw(st.permutations(range(x.dim())))
    steps = [data.draw(st.integers(1, 2)) for _ in order]
    offset = data.draw(st.integers(0, 1))
    around = x.new_full([x.shape[d] * steps[d] + offset for d in order], float("nan"))
    laid_out = around.permute([order.index(d) for d in range(x.dim())])
    return laid_out[tuple(slice(offset, None, step) for step in steps)].copy_(x)


@pytest.fixture(scope="session")
def lay_out() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """``lay_out(data, x)``: ``x`` in other strides, for tests with Hypothesis' ``data()``."""
    return _lay_out


def with_random_values(encoder: torch.nn.Module) -> None:
    """Move every parameter and running statistic away from its initial value."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in encoder.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
