"""Encoders in a directory: ``config.json``, ``model.safetensors`` and a model card.  Loading executes nothing.

The first two hold the configuration, so that files of two models are never taken for one: a save that is interrupted between
them, or one of them copied from elsewhere, is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

import torch

from . import model_card
from .config import ConformerConfig
from .runtime import read_json, replacing
from .sharing import sharing_map
from .stack import LayerStack
from .tensor_files import Entry, Header, differences, read_header, read_tensors, write_tensors

__all__ = ["MODEL_TYPE", "check_described", "check_layers", "load", "save"]

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
MODEL_TYPE = "lcconformer"
"""What ``config.json`` says the model is, as transformers has it."""
_TEXT = "lcconformer"  # of the header: the configuration
_LARGEST_CONFIG = 1 << 20  # bytes
_TENSORS = 20  # any layer has more, whatever its norms and biases

Stack = TypeVar("Stack", bound=LayerStack)


def check_layers(config: ConformerConfig, tensors: int) -> None:
    """Check that a file with so many tensors may hold the layers of ``config``, before any module is built for them.

    Raises:
        ValueError: it has too few; the message does not name the file.
    """
    layers = 1 + max(sharing_map(config.sharing, config.num_layers))
    if layers * _TENSORS > tensors:
        raise ValueError(f"they ask for {layers} layers, it has {tensors} tensors")


def check_described(name: str, encoder: LayerStack, otherwise: str = "") -> None:
    """Check that an encoder has the tensors that its configuration says.

    Raises:
        ValueError: it has others; the message begins with ``name`` and offers to ``otherwise``.
    """
    with torch.device("meta"):
        expected = type(encoder)(encoder.config).state_dict()  # type: ignore[call-arg]
    wrong = differences({key: Entry(x.dtype, tuple(x.shape)) for key, x in encoder.state_dict().items()}, expected)
    if wrong:
        raise ValueError(
            f"{name}: the {type(encoder).__name__} is not what its config describes ({_few(wrong)}): undo what changed its "
            "modules (merge adapters, remove parametrisations)" + (f", or {otherwise}" if otherwise else "")
        )


def save(encoder: LayerStack, directory: str | os.PathLike[str]) -> Path:
    """Write an encoder to a directory, which is made; returns it.

    Raises:
        ValueError: the encoder has other tensors than its configuration says.
        OSError: the files cannot be written.
    """
    directory, state = Path(directory), encoder.state_dict()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_pretrained: {directory} is a file; give the path of a directory")
    check_described("save_pretrained", encoder, "save its state_dict yourself")
    text = encoder.config.to_json()
    content = {"model_type": MODEL_TYPE, "architectures": [type(encoder).__name__], **json.loads(text)}
    # the name of the configuration is replaced right after that of the weights, both are written by then
    with replacing(directory / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        # transformers wants to know that the tensors are those of PyTorch
        write_tensors(directory / WEIGHTS_NAME, state, {"format": "pt", _TEXT: text})
    model_card.write(encoder, directory)
    return directory


def load(cls: type[Stack], directory: str | os.PathLike[str]) -> Stack:
    """Load an encoder that :func:`save` wrote: in evaluation mode, on the CPU, in the dtypes it was saved in.

    Raises:
        FileNotFoundError: there is no such directory, or a file is missing from it.
        ValueError: a file is damaged, of another class or version, or the two do not fit each other.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"no directory {directory}: give the one that save_pretrained wrote; a model of the Hugging Face Hub is "
            "downloaded by huggingface_hub.snapshot_download, which returns its directory"
        )
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}: expected the files {CONFIG_NAME} and {WEIGHTS_NAME} that save_pretrained writes"
            )
    config = _config(cls, directory / CONFIG_NAME)
    path = directory / WEIGHTS_NAME
    try:
        header = read_header(path)
        _compare(config, header)
        check_layers(config, len(header.tensors))
        with torch.device("meta"):
            encoder = cls(config)  # type: ignore[arg-type, call-arg]
        wrong = differences(header.tensors, encoder.state_dict())
        if not wrong:
            tensors = read_tensors(path, list(header.tensors))
            wrong = [
                f"{name} has values that are not finite"
                for name, x in tensors.items()
                if x.is_floating_point() and not x.isfinite().all()
            ]
        if wrong:
            raise ValueError(_few(wrong))
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit {CONFIG_NAME} beside it, or is damaged ({error}): save the encoder again, or copy both files"
        ) from error
    encoder.load_state_dict(tensors, assign=True)
    return encoder.eval()


def _config(cls: type[LayerStack], path: Path) -> ConformerConfig:
    values = read_json(path, _LARGEST_CONFIG)
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a JSON {type(values).__name__}; expected an object")
    kind, classes = values.pop("model_type", None), values.pop("architectures", None)
    if kind != MODEL_TYPE:
        raise ValueError(f"{path} describes a model of type {kind!r:.60}; expected {MODEL_TYPE!r}")
    if classes != [cls.__name__]:
        raise ValueError(
            f"{path} describes {classes!r:.100}; expected ['{cls.__name__}']: load it with the class that saved it"
        )
    try:
        return ConformerConfig.from_json(json.dumps(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; it is damaged, or was written by another version of lcconformer") from error


def _compare(config: ConformerConfig, header: Header) -> None:
    """Compare the configuration with the one that was saved with the weights, if the file has kept it."""
    text = header.texts.get(_TEXT)
    if text is None:
        return
    # through JSON, which knows no tuples
    now, then = json.loads(config.to_json()), json.loads(text)
    if not isinstance(then, dict):
        raise ValueError("its configuration is no JSON object")
    changed = [
        f"{name} is {now.get(name)!r:.40} there, {then.get(name)!r:.40} here"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
    ]
    if changed:
        raise ValueError(f"the files are of two models, or one was edited: {_few(changed)}")


def _few(wrong: list[str]) -> str:
    return "; ".join(wrong[:3]) + (f", and {len(wrong) - 3} more" if len(wrong) > 3 else "")
