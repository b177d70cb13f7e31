"""torch.jit.script and torch.jit.trace: alone, within torchaudio's RNN-T model, and loaded where this package is not."""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import io
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from lcconformer import Conformer, ConformerConfig, ConformerEncoder

SHAPES = [(3, 29), (1, 1), (2, 2), (1, 50), (5, 13)]
CONFORMERS = {
    "batch": {},
    "group": {"use_group_norm": True, "convolution_first": True},
    "shared": {"share_layers": True},
    "masked": {"padding": "masked"},
    "masked group": {"padding": "masked", "use_group_norm": True},
    "dropout": {"dropout": 0.3},
}
BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=3, conv_kernel_size=5, lora_rank=2)
ENCODERS = {
    "relative": {},
    "rotary": {"position": "rotary", "rotary_input": "hidden"},
    "unshared": {"sharing": "none"},
    "conditioned": {"conditioning": ("layer_norm", "step", "film", "lora")},
    "statistics per depth": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    "group": {"conv_norm": "group", "conv_norm_groups": 4},
    "stack": {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 3},
    "conv": {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 4},
}


def randomise(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for x in module.parameters():
            x.add_(0.1 * torch.randn_like(x))
        for name, x in module.named_buffers():
            if name.endswith("running_var"):
                x.uniform_(0.5, 2.0)
    return module


def batch(b: int, t: int, width: int, dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """One utterance of all frames, the others of fewer."""
    lengths = torch.randint(1, t + 1, (b,))
    lengths[0] = t
    return torch.randn(b, t, width), lengths.to(dtype)


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], masked: bool) -> None:
    assert torch.equal(got[1], want[1])
    real = torch.arange(want[0].shape[1]) < (want[1] if masked else torch.full_like(want[1], 1 << 30))[:, None]
    torch.testing.assert_close(got[0][real], want[0][real], rtol=1e-4, atol=1e-5)


def reloaded(program: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(program, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("name", CONFORMERS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64], ids=str)
def test_script(name: str, dtype: torch.dtype) -> None:
    module = randomise(Conformer(16, 2, 24, 3, 5, **CONFORMERS[name])).eval()
    program = reloaded(torch.jit.script(module))
    masked = CONFORMERS[name].get("padding") == "masked"
    for b, t in SHAPES:
        given = batch(b, t, 16, dtype)
        assert_same(program(*given), module(*given), masked)
        assert_same(program(*given, 2), module(*given, 2), masked)
        assert_same(program(*given, depth=1), module(*given, depth=1), masked)
    empty = torch.randn(2, 5, 16), torch.tensor([5, 0])
    assert_same(program(*empty), module(*empty), masked)
    with pytest.raises(Exception, match="depth is 4; expected an integer from 1 to num_layers = 3"):
        program(*batch(1, 3, 16), 4)


def test_script_of_fractional_lengths() -> None:
    module = randomise(Conformer(16, 2, 24, 2, 5)).eval()
    given = torch.randn(3, 9, 16), torch.tensor([9.5, 3.2, 7.0])
    assert_same(torch.jit.script(module)(*given), module(*given), False)


@pytest.mark.parametrize("name", ["batch", "group", "shared", "masked", "masked group"])
def test_script_trains_as_the_module_does(name: str) -> None:
    """Outputs, gradients and running statistics."""
    module = randomise(Conformer(16, 2, 24, 2, 5, **CONFORMERS[name])).train()
    program = reloaded(torch.jit.script(module))
    x, lengths = batch(3, 13, 16)
    real = (torch.arange(13) < lengths[:, None])[..., None]
    for each in (module, program):
        each(x, lengths)[0].masked_fill(~real, 0.0).square().sum().backward()
    assert module.encoder.layers[0].ffn1.up.weight.grad is not None
    theirs = dict(program.named_parameters())
    for key, p in module.named_parameters():
        torch.testing.assert_close(theirs[key].grad, p.grad, rtol=1e-3, atol=1e-4)
    theirs = dict(program.named_buffers())
    for key, x in module.named_buffers():
        torch.testing.assert_close(theirs[key], x, rtol=1e-4, atol=1e-5)


def test_script_drops_out_in_training_alone() -> None:
    module = Conformer(16, 2, 24, 2, 5, dropout=0.5)
    program = torch.jit.script(module)
    given = batch(2, 9, 16)
    assert not torch.equal(program(*given)[0], program(*given)[0])
    program.eval()
    assert torch.equal(program(*given)[0], program(*given)[0])


def test_script_of_an_encoder_is_refused() -> None:
    """Alone and within a model; the module is as it was, and a trace, which the message names, still works."""
    encoder = ConformerEncoder(BASE).eval()
    given = batch(2, 9, 16)
    want = encoder(*given)[0]
    for module in (encoder, nn.Sequential(encoder), nn.ModuleDict({"encoder": encoder})):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script cannot compile.*use torch\.jit\.trace"):
            torch.jit.script(module)
    assert torch.equal(encoder(*given)[0], want)
    torch.testing.assert_close(traced(encoder, given)(*given)[0], want, rtol=1e-4, atol=1e-5)


def test_script_of_a_copied_conformer() -> None:
    module = Conformer(16, 2, 24, 2, 5).eval()
    given = batch(2, 9, 16)
    assert_same(torch.jit.script(copy.deepcopy(module))(*given), module(*given), False)


def traced(module: nn.Module, example: tuple) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of shapes are not recorded
        return reloaded(torch.jit.trace(module, example))


@pytest.mark.parametrize("name", ENCODERS)
def test_trace_of_an_encoder_holds_for_every_shape(name: str) -> None:
    encoder = randomise(ConformerEncoder(BASE.replace(**ENCODERS[name]))).eval()
    width = encoder.config.input_dim or 16
    program = traced(encoder, batch(2, 13, width))
    assert not any(node.kind().startswith("lcconformer::") for node in program.inlined_graph.nodes())
    for b, t in SHAPES:
        given = batch(b, t, width)
        assert_same(program(*given), encoder(*given), True)


def test_trace_of_an_encoder_without_lengths() -> None:
    encoder = randomise(ConformerEncoder(BASE)).eval()

    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)[0]

    program = traced(Output(), (torch.randn(2, 13, 16),))
    for b, t in SHAPES:
        x = torch.randn(b, t, 16)
        torch.testing.assert_close(program(x), encoder(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["batch", "group", "shared", "masked"])
def test_trace_of_a_conformer_holds_for_every_shape(name: str) -> None:
    module = randomise(Conformer(16, 2, 24, 2, 5, **CONFORMERS[name])).eval()
    program = traced(module, batch(2, 13, 16))
    for b, t in SHAPES:
        given = batch(b, t, 16)
        assert_same(program(*given), module(*given), CONFORMERS[name].get("padding") == "masked")


def test_programs_run_without_this_package(tmp_path: Path) -> None:
    module, encoder = Conformer(16, 2, 24, 2, 5).eval(), ConformerEncoder(BASE).eval()
    given = batch(2, 13, 16)
    torch.jit.script(module).save(str(tmp_path / "script.pt"))
    traced(encoder, given).save(str(tmp_path / "trace.pt"))
    torch.save((given, module(*given)[0], encoder(*given)[0]), tmp_path / "want.pt")
    program = """
import sys, torch
sys.modules["lcconformer"] = None
given, script, trace = torch.load("want.pt")
for name, want in (("script.pt", script), ("trace.pt", trace)):
    torch.testing.assert_close(torch.jit.load(name)(*given)[0], want, rtol=1e-4, atol=1e-5)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr


@pytest.fixture
def rnnt(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """torchaudio's models/rnnt.py: its package does not import without the CUDA runtime that it was built for."""
    try:
        files = importlib.metadata.files("torchaudio") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchaudio is not installed; pip install 'lcconformer[test]'")
    (path,) = (Path(f.locate()) for f in files if str(f) == "torchaudio/models/rnnt.py")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)
    for name, folder in (("torchaudio", path.parents[1]), ("torchaudio.models", path.parent)):
        package = ModuleType(name)
        package.__path__ = [str(folder)]  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    sys.modules["torchaudio.models"].Emformer = importlib.import_module("torchaudio.models.emformer").Emformer
    module = importlib.import_module("torchaudio.models.rnnt")
    for name in ("torchaudio.models.emformer", "torchaudio.models.rnnt"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # forgotten after the test
    return module


class Transcriber(nn.Module):
    """As torchaudio's Conformer RNN-T has it: frames merged, projected, encoded, projected, normalised."""

    def __init__(self, rnnt: ModuleType, **options: object) -> None:
        super().__init__()
        self.time_reduction = rnnt._TimeReduction(2)
        self.input_linear = nn.Linear(20, 16)
        self.conformer = Conformer(16, 2, 24, 2, 5, **options)
        self.output_linear = nn.Linear(16, 12)
        self.layer_norm = nn.LayerNorm(12)

    def forward(self, input: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        reduced, lengths = self.time_reduction(input, lengths)
        x, lengths = self.conformer(self.input_linear(reduced), lengths)
        return self.layer_norm(self.output_linear(x)), lengths

    def infer(
        self, input: Tensor, lengths: Tensor, states: list[list[Tensor]] | None
    ) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        raise RuntimeError("a Conformer does not stream")


@pytest.mark.parametrize("name", ["batch", "group", "shared", "masked"])
def test_script_within_the_rnnt_of_torchaudio(rnnt: ModuleType, name: str) -> None:
    predictor = rnnt._Predictor(7, 12, 8, 1, 8)
    model = randomise(rnnt.RNNT(Transcriber(rnnt, **CONFORMERS[name]), predictor, rnnt._Joiner(12, 7))).eval()
    sources, lengths = torch.randn(3, 16, 10), torch.tensor([16, 8, 4], dtype=torch.int32)
    targets, counts = torch.randint(0, 7, (3, 5)), torch.tensor([5, 2, 3], dtype=torch.int32)
    program = reloaded(torch.jit.script(model))
    want, got = model(sources, lengths, targets, counts), program(sources, lengths, targets, counts)
    assert all(torch.equal(a, b) for a, b in zip(got[1:3], want[1:3]))
    real = torch.arange(8) < want[1][:, None]
    torch.testing.assert_close(got[0][real], want[0][real], rtol=1e-4, atol=1e-5)
    want, got = model.transcribe(sources, lengths), program.transcribe(sources, lengths)
    torch.testing.assert_close(got[0][real], want[0][real], rtol=1e-4, atol=1e-5)
    # the model that was scripted keeps its fast path
    assert type(model.transcriber.conformer.encoder) is ConformerEncoder
