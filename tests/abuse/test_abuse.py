"""Random settings, calls and damaged files: each works or is refused with a reason."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcconformer import Conformer, ConformerConfig, ConformerEncoder, DepthSampler, ExitRule, ops
from lcconformer.cli.pretrain import add_arguments, options_of, settings_from
from lcconformer.data import LogMel, load_corpus
from lcconformer.ops.samples import CALLS, Sizes
from lcconformer.ssl import (
    FeatureSettings,
    ObjectiveSettings,
    PretrainingModel,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from lcconformer.ssl.pretraining import PretrainSettings

SMALL: dict[str, Any] = {"d_model": 16, "num_heads": 2, "ffn_dim": 24, "num_layers": 2, "conv_kernel_size": 3}
CONFIG = ConformerConfig(**SMALL, input_dim=20)

numbers = st.one_of(
    st.integers(1, 16),
    st.floats(0, 1),
    st.integers(-3, 70),
    st.sampled_from([0, -1, 10**9, 10**30, 2**63, -(2**64)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1e-300, 1e308, float("inf"), float("nan")]),
)
anything = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.text(max_size=20),
    st.sampled_from(["all", "none", "cycle:2", "cycle:x", "relative", "batch", "uniform", "step", "1e-3", "cuda:99"]),
    st.lists(st.one_of(st.integers(-2, 5), st.text(max_size=4), st.none()), max_size=4),
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def changes(cls: type, values: st.SearchStrategy = anything) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three fields of a dataclass with any value."""
    names = [field.name for field in dataclasses.fields(cls)]
    return st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=3)


# --- settings --------------------------------------------------------------------------------------------------------


@given(change=changes(ConformerConfig))
def test_configs(attempt, change):
    attempt(lambda: ConformerConfig.from_json(CONFIG.replace(**change).to_json()))


@given(cls=st.sampled_from([DepthSampler, ExitRule, ObjectiveSettings]), data=st.data())
def test_small_settings(attempt, cls, data):
    change = data.draw(changes(cls))

    def use():
        made = cls(**change)
        if isinstance(made, DepthSampler):
            assert all(1 <= d <= made.num_layers for step in (0, 7, 10**9) for d in made.depths(step))
            made.mean_depth(50)

    attempt(use)


@given(change=changes(PretrainSettings))
def test_run_settings(attempt, change):
    settings = PretrainSettings(CONFIG, FeatureSettings(20))
    change.pop("config", None), change.pop("features", None), change.pop("objective", None)
    # what a checkpoint would hold of them must be JSON
    attempt(lambda: json.dumps(dataclasses.replace(settings, **change).describe(), allow_nan=False))


@given(bins=anything, low=anything, high=anything)
def test_features(attempt, bins, low, high):
    attempt(lambda: LogMel(bins, low, high))


# every option of a run that takes a value
OPTIONS = [
    name.replace("_", "-") for name in options_of(PretrainSettings(CONFIG, FeatureSettings(20))) if name != "device"
]


@given(
    options=st.dictionaries(st.sampled_from(OPTIONS), st.one_of(anything, st.text(max_size=8)), min_size=1, max_size=3)
)
def test_command_lines(attempt, options):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)

    def parse():
        try:
            args = parser.parse_args([f"--{name}={value}" for name, value in options.items()])
        except (argparse.ArgumentError, SystemExit) as error:
            raise ValueError(f"usage ({error})") from error
        settings_from(args)

    attempt(parse)


@given(
    text=st.one_of(
        st.text(max_size=60), st.integers(0, 200_000).map(lambda n: "[" * n), st.binary(max_size=60).map(repr)
    )
)
def test_config_json(attempt, text):
    attempt(lambda: ConformerConfig.from_json(text))


# --- calls -----------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)
dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]
)


@st.composite
def tensors(draw: st.DrawFn, shape: st.SearchStrategy = shapes) -> Any:
    """A tensor of some shape and dtype, rarely something that is none."""
    other = draw(st.integers(0, 12))
    size = draw(shape)
    if other == 0:
        return draw(st.sampled_from([None, 3, "x", [1.0], np.zeros(size)]))
    x = torch.randn(size) * draw(st.sampled_from([1.0, 0.0, 1e30, float("nan")]))
    return x.to(draw(dtypes) if other < 3 else torch.float32)


@st.composite
def batches(draw: st.DrawFn, width: int) -> tuple[Any, Any]:
    """``[B, T, width]`` and lengths; half of them fit."""
    b, t = draw(st.integers(0, 3)), draw(st.integers(0, 7))
    lengths = st.one_of(st.none(), st.lists(st.integers(0, t), min_size=b, max_size=b).map(torch.LongTensor))
    if draw(st.booleans()):
        return torch.randn(b, t, width) * draw(st.sampled_from([1.0, 0.0, 1e30, float("nan")])), draw(lengths)
    others = (
        st.lists(st.integers(-2, 9), max_size=4).map(torch.tensor),
        st.lists(st.floats(-1, 9), max_size=4),
        st.lists(st.floats(-1, 9), max_size=4).map(torch.tensor),
        st.just("lengths"),
    )
    return draw(tensors(st.one_of(st.just((b, t, width)), shapes))), draw(st.one_of(lengths, *others))


@pytest.fixture(scope="module")
def encoders() -> list[ConformerEncoder]:
    front_ends = ({}, {"input_dim": 16, "subsampling": "conv", "subsampling_factor": 4})
    norms = ("layer", "batch", "group")
    return [
        ConformerEncoder(ConformerConfig(**SMALL, conv_norm=norm, **front)) for norm in norms for front in front_ends
    ]


@given(data=st.data(), which=st.integers(0, 5), training=st.booleans())
def test_encoder_calls(attempt, encoders, data, which, training):
    encoder = encoders[which].train(training)
    x, lengths = data.draw(batches(16))
    depth = data.draw(anything) if data.draw(st.integers(0, 4)) == 0 else data.draw(st.sampled_from([None, 1, 2]))
    with torch.set_grad_enabled(training):
        attempt(lambda: encoder(x, lengths, depth=depth))


@given(data=st.data())
def test_conformer_calls(attempt, data):
    x, lengths = data.draw(batches(8))
    conformer = Conformer(8, 2, 8, 1, 3).eval()
    attempt(lambda: conformer(x, lengths))


@given(op=st.sampled_from(list(CALLS)), data=st.data(), batch=st.integers(0, 3), frames=st.integers(0, 6))
def test_op_calls(attempt, op, data, batch, frames):
    """One input of a typical call replaced by some other tensor."""
    sizes = Sizes(batch=batch, frames=frames, d_model=8, heads=2, ffn_dim=12, kernel_size=3)
    wrong, count = data.draw(st.integers(0, 9)), 0

    def make(name, *shape):
        nonlocal count
        count += 1
        right = [max(n, 0) for n in shape]
        return data.draw(tensors()) if count == wrong else torch.randn(right)

    lengths = data.draw(st.one_of(st.just(torch.full((batch,), frames)), st.lists(st.integers(-1, 7), max_size=4)))
    attempt(lambda: CALLS[op](getattr(ops, op), make, sizes, lengths))


# --- files -----------------------------------------------------------------------------------------------------------


@st.composite
def damages(draw: st.DrawFn, content: bytes) -> bytes:
    """The content truncated, with bytes changed, a piece removed or doubled, or bytes inserted."""
    kind = draw(st.sampled_from(["cut", "bytes", "remove", "double", "insert"]))
    start = draw(st.integers(0, len(content)))
    end = min(len(content), start + draw(st.integers(1, 200)))
    if kind == "cut":
        return content[:start]
    if kind == "remove":
        return content[:start] + content[end:]
    if kind == "double":
        return content[:end] + content[start:]
    if kind == "insert":
        return content[:start] + draw(st.binary(min_size=1, max_size=30)) + content[start:]
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        # headers are at the beginning, the directory of a zip is at the end
        near = draw(st.sampled_from([min(200, len(content) - 1), len(content) - 1]))
        at = draw(st.integers(0, near))
        changed[at if draw(st.booleans()) else len(content) - 1 - at] = draw(st.integers(0, 255))
    return bytes(changed)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model = PretrainingModel(CONFIG, FeatureSettings(20), ObjectiveSettings())
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    return save_checkpoint(tmp_path_factory.mktemp("abuse") / "x.safetensors", tensors, {**model.describe(), "step": 3})


@given(data=st.data())
def test_checkpoint_files(attempt, checkpoint, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(data.draw(damages(checkpoint.read_bytes())))
    attempt(lambda: load_model(path))


json_values = st.recursive(
    anything.filter(lambda x: not isinstance(x, float)), lambda x: st.lists(x, max_size=3), max_leaves=5
)


@given(section=st.sampled_from(["", "config", "features", "objective"]), data=st.data())
def test_checkpoint_headers(attempt, checkpoint, tmp_path_factory, section, data):
    loaded = load_checkpoint(checkpoint)
    meta = json.loads(json.dumps(loaded.meta))
    place = meta[section] if section else meta
    name = data.draw(st.sampled_from(sorted(place)))
    if data.draw(st.booleans()):
        del place[name]
    else:
        place[name] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "header.safetensors"

    def load():
        save_checkpoint(path, loaded.tensors, meta)
        load_model(path)

    attempt(load)


@pytest.fixture(scope="module")
def corpora() -> dict[str, bytes]:
    """The same corpus as a zip, by method of compression."""
    rng, files = np.random.default_rng(0), {}
    for i, suffix in enumerate(("flac", "wav", "ogg")):
        sound = io.BytesIO()
        soundfile.write(sound, (0.1 * rng.standard_normal(6400)).astype(np.float32), 16_000, format=suffix)
        files[f"u{i}.{suffix}"] = sound.getvalue()
    rows = [
        {"utt": f"u{i}", "spk": "s", "split": "train", "text": "AH", "n": 6400, "phones": "SIL:3 AH:9"}
        for i in range(3)
    ]
    files["meta.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    found = {}
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        found[str(method)] = packed.getvalue()
    return found


def read(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_corpus(path).preload()


@given(data=st.data())
def test_zip_files(attempt, corpora, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(data.draw(damages(corpora[data.draw(st.sampled_from(sorted(corpora)))])))
    attempt(lambda: read(path))


@given(data=st.data())
def test_corpus_files(attempt, corpora, tmp_path_factory, data):
    """One file of a folder damaged, meta.jsonl or audio."""
    folder = tmp_path_factory.getbasetemp() / "corpus"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(corpora[str(zipfile.ZIP_STORED)])) as archive:
        names = archive.namelist()
        archive.extractall(folder)
    damaged = data.draw(st.sampled_from(names))
    (folder / damaged).write_bytes(data.draw(damages((folder / damaged).read_bytes())))
    attempt(lambda: read(folder))
