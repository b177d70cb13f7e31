"""Checkpoints: complete or refused, and never code."""

import json
import os
import pickle
import stat
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lcconformer import ConformerConfig
from lcconformer.ssl import (
    FeatureSettings,
    ObjectiveSettings,
    PretrainingModel,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from lcconformer.ssl.checkpoint import checkpoint_path, find_checkpoints

CONFIG = ConformerConfig(d_model=16, num_heads=2, ffn_dim=32, num_layers=2, conv_kernel_size=3, input_dim=20)


@pytest.fixture
def model() -> PretrainingModel:
    return PretrainingModel(
        CONFIG, FeatureSettings(20, high_freq=5600.0), ObjectiveSettings("best_rq", codebook_size=16)
    )


def write(path: Path, model: PretrainingModel, **meta: object) -> Path:
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    tensors["optimizer.scale.step"] = torch.tensor(3.0)
    return save_checkpoint(path, tensors, {**model.describe(), "step": 3, **meta})


def test_round_trip_of_tensors_and_meta(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4, dtype=torch.float64),
        "b": torch.randn(4, 6).T,
        "c": torch.tensor(2),
        "d": torch.randn(2).bfloat16(),
    }
    path = save_checkpoint(tmp_path / "new" / "x.safetensors", tensors, {"step": 7, "list": [1, None, "ü"]})
    loaded = load_checkpoint(path)
    assert set(loaded.tensors) == set(tensors)
    for name, x in tensors.items():
        assert loaded.tensors[name].dtype == x.dtype
        assert torch.equal(loaded.tensors[name], x)
    assert loaded.meta["step"] == 7
    assert loaded.meta["list"] == [1, None, "ü"]
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_the_loaded_model_is_the_saved_one(tmp_path: Path, model: PretrainingModel) -> None:
    path = write(tmp_path / "x.safetensors", model)
    audio, lengths = 0.1 * torch.randn(2, 4000), torch.tensor([4000, 3000])
    loaded = load_model(path)
    assert not loaded.training
    expected, frames = model.eval().hidden_states(audio, lengths)
    got, got_frames = loaded.hidden_states(audio, lengths)
    assert torch.equal(frames, got_frames)
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
    assert torch.equal(loaded.objective.codebook, model.objective.codebook)
    assert loaded.features.high_freq == 5600.0
    assert "optimizer.scale.step" not in load_checkpoint(path, prefix="model.").tensors
    assert load_checkpoint(path, prefix=None).tensors == {}
    assert load_checkpoint(path, prefix=None).meta["step"] == 3


def test_a_folder_means_its_newest_checkpoint(tmp_path: Path, model: PretrainingModel) -> None:
    for step in (900, 1000, 20):
        write(checkpoint_path(tmp_path, step), model, step=step)
    (tmp_path / "steps.csv").touch()
    (tmp_path / ".step_00009999.safetensors.1.tmp").touch()
    assert [load_checkpoint(p).meta["step"] for p in find_checkpoints(tmp_path)] == [20, 900, 1000]
    assert load_checkpoint(tmp_path).meta["step"] == 1000


def test_a_failed_write_leaves_the_old_checkpoint(
    tmp_path: Path, model: PretrainingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.safetensors", model, step=1)

    def full_disk(tensors: dict, file: Path, metadata: dict) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(path, model, step=2)
    assert load_checkpoint(path).meta["step"] == 1
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_permissions_follow_the_umask(tmp_path: Path, model: PretrainingModel, umask: int) -> None:
    old = os.umask(umask)
    try:
        path = write(tmp_path / "x.safetensors", model)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("part", [0.0, 0.001, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, model: PretrainingModel, part: float) -> None:
    path = write(tmp_path / "x.safetensors", model)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"x\.safetensors is no checkpoint, or a damaged one.*take an older one"):
        load_model(path)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("echo executed > executed",)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pickle.safetensors").write_bytes(pickle.dumps({"model": Bomb()}))
    torch.save({"model": Bomb()}, "torch.safetensors")
    for name in ("pickle.safetensors", "torch.safetensors"):
        with pytest.raises(ValueError, match="is no checkpoint"):
            load_checkpoint(name)
    assert not Path("executed").exists()


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of lcconformer: its header has no 'lcconformer' entry"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "damaged header"),
        ("{}", "damaged header"),
        ("[]", "damaged header"),
        ("[" * 100_000, "damaged header"),
        (
            json.dumps({"format": 1, "text": "x" * (1 << 24)}),
            r"its header has 16777\d+ bytes; expected at most 8388608",
        ),
        (json.dumps({"format": 99, "version": "9.0"}), "format 99, written by lcconformer 9.0.*install the version"),
    ],
)
def test_a_strange_header_is_refused(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(2)}, path, metadata={"lcconformer": header})
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, model: PretrainingModel) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    save_checkpoint(path, tensors, {**model.describe(), "config": {**model.describe()["config"], "ffn_dim": 48}})
    with pytest.raises(ValueError, match="does not fit its own settings"):
        load_model(path)
    save_checkpoint(path, tensors, {"step": 3})
    with pytest.raises(ValueError, match=r"does not fit this version.*config"):
        load_model(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 10**9}, "num_layers is 1000000000; expected a positive integer, at most 10000"),
        ({"num_layers": 10_000, "sharing": "none"}, r"they ask for 10000 layers, it has \d+ tensors"),
        ({"num_layers": 3, "sharing": "none"}, r"they ask for 3 layers, it has \d+ tensors"),
        ({"num_layers": 2, "sharing": "none"}, r"encoder.layers.1.* is missing; .*, and \d+ more"),
        # 270 GB of weights
        ({"d_model": 65536, "ffn_dim": 1 << 20}, r"has shape \[16\], not \[65536\]"),
        ({"conditioning": 5}, "conditioning is 5; expected a tuple"),
        ({"sharing": None}, "sharing is None; expected"),
        ({"input_dim": [20]}, r"input_dim is \[20\]; expected None or a positive integer"),
        ({"magic": 1}, "does not fit this version .*magic"),
    ],
    ids=str,
)
def test_no_memory_for_what_the_file_does_not_hold(
    changes: dict, message: str, tmp_path: Path, model: PretrainingModel
) -> None:
    path = write(tmp_path / "x.safetensors", model, config={**model.describe()["config"], **changes})
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load_model(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["nan", "inf", "integers", "missing", "more"])
def test_damaged_weights_are_refused_by_name(damage: str, tmp_path: Path, model: PretrainingModel) -> None:
    name = "encoder.layers.0.ffn1.up.weight"
    tensors = {f"model.{n}": x for n, x in model.state_dict().items()}
    weight = tensors.pop(f"model.{name}").clone()
    if damage in ("nan", "inf"):
        weight[1, 2] = float(damage)
    if damage == "integers":
        weight = weight.int()
    if damage != "missing":
        tensors[f"model.{name}{'2' if damage == 'more' else ''}"] = weight
    expected = {
        "nan": "has values that are not finite",
        "inf": "has values that are not finite",
        "integers": r"has dtype torch\.int32, not torch\.float32",
        "missing": "is missing",
        "more": "is missing; .*2 is not part of it",
    }
    path = save_checkpoint(tmp_path / "x.safetensors", tensors, model.describe())
    with pytest.raises(ValueError, match=rf"{path} does not fit its own settings: {name} {expected[damage]}"):
        load_model(path)


def describe_tensor(**changes: object) -> bytes:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes
    return json.dumps({"model.x": {k: v for k, v in entry.items() if v is not None}}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (describe_tensor(dtype="F8_E4M3"), r"'model\.x' has dtype 'F8_E4M3'; expected one of F64, F32, F16, BF16"),
        (describe_tensor(dtype="C64"), "has dtype 'C64'"),
        (describe_tensor(dtype=None), "has dtype None"),
        (describe_tensor(shape=[2, 4]), r"has 24 bytes, which is not its shape \[2, 4\] in F32"),
        (describe_tensor(shape=[-2, -3]), "has shape .*; expected at most 16 sizes"),
        (describe_tensor(shape=[2.0, 3]), "has shape"),
        (describe_tensor(shape=[1] * 17), "has shape"),
        (describe_tensor(data_offsets=[8, 32]), "is at bytes 8 to 32 of 24: the file is truncated or damaged"),
        (describe_tensor(data_offsets=[24, 0]), "is at bytes 24 to 0"),
        (describe_tensor(data_offsets=[0]), "has data_offsets"),
        # 20 bytes that are no tensor's: safetensors refuses them
        (describe_tensor(shape=[1], data_offsets=[0, 4]), "."),
        (b'{"x": 3}', "describes tensor 'x' by a JSON int"),
        (b"[]", "no object of tensors and texts"),
        (b'{"__metadata__": {"lcconformer": 1}}', "no object of tensors and texts"),
        (b"[" * 100_000, "its header is no JSON"),
        (b"\xff", "its header is no JSON"),
    ],
)
def test_a_header_that_the_file_does_not_bear_out(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    with pytest.raises(ValueError, match=rf"no checkpoint, or a damaged one \(.*{message}"):
        load_checkpoint(path)


def test_a_header_beyond_the_cap_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"would need a header of \d+ bytes.*expected at most 8388608"):
        save_checkpoint(tmp_path / "x.safetensors", {}, {"text": "x" * (1 << 23)})
    assert not list(tmp_path.iterdir())


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone"):
        load_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*expected files like step_00000500"):
        load_checkpoint(tmp_path)
