"""Encoders in a directory come back as they were, or are refused with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

from lcconformer import ConformerConfig, ConformerEncoder, ExitRule

FILES = ["README.md", "config.json", "model.safetensors"]
BASE = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=4, conv_kernel_size=5, lora_rank=2)
CONFIGS = {
    "shared": {},
    "unshared": {"sharing": "none"},
    "map": {"sharing": (0, 1, 1, 0)},
    "prelude": {"sharing": "prelude_core_coda:1,1,1"},
    "conditioned": {"conditioning": ("layer_norm", "step", "film", "lora")},
    "features": {"input_dim": 10},
    "stack": {"input_dim": 10, "subsampling": "stack", "subsampling_factor": 3},
    "conv": {"input_dim": 10, "subsampling": "conv", "subsampling_factor": 4},
    "batch": {"conv_norm": "batch", "padding": "peer"},
    "per depth": {"conv_norm": "batch", "conv_norm_statistics": "per_depth"},
    "group": {"conv_norm": "group", "conv_norm_groups": 4, "convolution_first": True},
    "no norm": {"conv_norm": "none", "position": "none", "attention_bias": False, "conv_bias": False},
    "rotary": {"position": "rotary", "activation": "gelu", "layer_norm_eps": 1e-3, "dropout": 0.0},
}


def made(**changes: object) -> ConformerEncoder:
    """An encoder none of whose tensors has its first value."""
    encoder = ConformerEncoder(BASE.replace(**changes))
    with torch.no_grad():
        for name, x in encoder.state_dict().items():
            if x.is_floating_point():
                x.add_(torch.rand_like(x) * 0.2) if name.endswith("running_var") else x.add_(0.1 * torch.randn_like(x))
            else:
                x.add_(3)
    return encoder.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    encoder = made(**CONFIGS[name])
    assert encoder.save_pretrained(tmp_path / "new" / "x") == tmp_path / "new" / "x"
    assert sorted(os.listdir(tmp_path / "new" / "x")) == FILES
    loaded = ConformerEncoder.from_pretrained(tmp_path / "new" / "x")
    assert not loaded.training
    assert loaded.config == encoder.config
    assert all(p.requires_grad for p in loaded.parameters())
    want, got = encoder.state_dict(), loaded.state_dict()
    assert list(want) == list(got)
    assert all(torch.equal(x, got[n]) and x.dtype == got[n].dtype for n, x in want.items())
    x, lengths = torch.randn(3, 17, encoder.config.input_dim or 16), torch.tensor([17, 9, 4])
    for depth in (1, 4):
        for a, b in zip(encoder(x, lengths, depth=depth), loaded(x, lengths, depth=depth)):
            assert torch.equal(a, b)
    rule = ExitRule("cosine", threshold=0.05)
    for a, b in zip(encoder.adaptive(x, lengths, rule), loaded.adaptive(x, lengths, rule)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    encoder = made(conv_norm="batch").to(dtype)
    encoder.layers[0].norm.float()
    encoder.save_pretrained(tmp_path)
    loaded = ConformerEncoder.from_pretrained(tmp_path)
    assert {n: x.dtype for n, x in loaded.state_dict().items()} == {n: x.dtype for n, x in encoder.state_dict().items()}


def test_a_loaded_encoder_trains_and_is_saved_again(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    loaded = ConformerEncoder.from_pretrained(tmp_path).train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    loaded(torch.randn(2, 9, 16))[0].square().mean().backward()
    optimizer.step()
    loaded.save_pretrained(tmp_path)
    again = ConformerEncoder.from_pretrained(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(loaded.state_dict().values(), again.state_dict().values()))


def test_another_process_loads_it_without_the_rest_of_the_package(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    program = (
        "import sys, lcconformer; e = lcconformer.ConformerEncoder.from_pretrained(sys.argv[1]); "
        "assert 'lcconformer.ssl' not in sys.modules; print(e.config.num_layers)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "4\n", done.stderr


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def tensors(folder: Path, change) -> None:
    """Write the tensors again, changed, without the configuration in their file."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


NAME = "layers.0.ffn1.up.weight"
DAMAGES = {
    "config missing": (
        lambda d: (d / "config.json").unlink(),
        FileNotFoundError,
        "has no config.json: expected the files",
    ),
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "has no model.safetensors"),
    "config empty": (lambda d: (d / "config.json").write_text(""), ValueError, r"config\.json is no JSON"),
    "config a list": (
        lambda d: (d / "config.json").write_text("[]"),
        ValueError,
        "holds a JSON list; expected an object",
    ),
    "config large": (
        lambda d: (d / "config.json").write_text(" " * (1 << 21)),
        ValueError,
        "has more than 1048576 bytes",
    ),
    "other type": (
        lambda d: edit(d / "config.json", model_type="bert"),
        ValueError,
        "of type 'bert'; expected 'lcconformer'",
    ),
    "other class": (
        lambda d: edit(d / "config.json", architectures=["Conformer"]),
        ValueError,
        r"describes \['Conformer'\]; expected \['ConformerEncoder'\]: load it with the class that saved it",
    ),
    "no class": (lambda d: edit(d / "config.json", architectures=None), ValueError, "describes None; expected"),
    "unknown key": (
        lambda d: edit(d / "config.json", magic=1, auto_map={"AutoModel": "evil.Model"}),
        ValueError,
        "unknown keys auto_map, magic; expected some of .*; it is damaged, or was written by another version",
    ),
    "value": (lambda d: edit(d / "config.json", d_model=-1), ValueError, "d_model is -1; expected .*it is damaged, or"),
    "edited": (
        lambda d: edit(d / "config.json", activation="relu"),
        ValueError,
        "the files are of two models, or one was edited: activation is 'relu' there, 'silu' here",
    ),
    "of another encoder": (
        lambda d: made(d_model=32).save_pretrained(d / "o") and os.replace(d / "o" / "config.json", d / "config.json"),
        ValueError,
        "of two models, or one was edited: d_model is 32 there, 16 here",
    ),
    "weights truncated": (
        lambda d: os.truncate(d / "model.safetensors", 3000),
        ValueError,
        r"model\.safetensors does not fit config\.json beside it, or is damaged \(",
    ),
    "tensor missing": (lambda d: tensors(d, lambda s: s.pop(NAME)), ValueError, f"{NAME} is missing"),
    "tensor too many": (lambda d: tensors(d, lambda s: s.update(x=torch.ones(1))), ValueError, "x is not part of it"),
    "shape": (
        lambda d: tensors(d, lambda s: s.update({NAME: s[NAME].T.contiguous()})),
        ValueError,
        rf"{NAME} has shape \[16, 24\], not \[24, 16\]",
    ),
    "integers": (
        lambda d: tensors(d, lambda s: s.update({NAME: s[NAME].int()})),
        ValueError,
        f"{NAME} has dtype torch.int32, not torch.float32",
    ),
    "float8": (
        lambda d: tensors(d, lambda s: s.update({NAME: s[NAME].to(torch.float8_e5m2)})),
        ValueError,
        f"tensor '{NAME}' has dtype 'F8_E5M2'; expected one of F64",
    ),
    "not finite": (
        lambda d: tensors(d, lambda s: s[NAME].fill_(float("nan"))),
        ValueError,
        f"{NAME} has values that are not",
    ),
    "more layers": (
        lambda d: (tensors(d, lambda s: None), edit(d / "config.json", num_layers=10_000, sharing="none")),
        ValueError,
        "they ask for 10000 layers, it has",
    ),
    "more memory": (  # 270 GB of weights
        lambda d: (tensors(d, lambda s: None), edit(d / "config.json", d_model=65536, ffn_dim=1 << 20)),
        ValueError,
        r"has shape \[16\], not \[65536\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_refused(name: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGES[name]
    made().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message):
        ConformerEncoder.from_pretrained(tmp_path)


def test_weights_that_another_tool_wrote_again_are_read(tmp_path: Path) -> None:
    encoder = made()
    encoder.save_pretrained(tmp_path)
    tensors(tmp_path, lambda s: None)
    assert torch.equal(ConformerEncoder.from_pretrained(tmp_path).layers[0].norm.weight, encoder.layers[0].norm.weight)


def test_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no directory .*gone: give the one .*snapshot_download"):
        ConformerEncoder.from_pretrained(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file; give the path of a directory"):
        made().save_pretrained(tmp_path / "file")


def test_subclasses_load_as_themselves(tmp_path: Path) -> None:
    class Own(ConformerEncoder):
        pass

    Own(BASE).save_pretrained(tmp_path)
    assert type(Own.from_pretrained(tmp_path)) is Own
    with pytest.raises(ValueError, match=r"describes \['Own'\]; expected \['ConformerEncoder'\]"):
        ConformerEncoder.from_pretrained(tmp_path)


def test_a_changed_encoder_is_not_saved(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    encoder = made()
    parametrize.register_parametrization(encoder.layers[0].ffn1.up, "weight", Twice())
    with pytest.raises(ValueError, match=r"is not what its config describes \(layers\.0\.ffn1\.up\.weight is missing"):
        encoder.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = made()
    encoder.save_pretrained(tmp_path)

    def full_disk(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        made(d_model=32).save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    loaded = ConformerEncoder.from_pretrained(tmp_path)
    assert torch.equal(loaded.layers[0].norm.weight, encoder.layers[0].norm.weight)
