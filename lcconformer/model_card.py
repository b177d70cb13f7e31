"""``README.md`` beside a saved encoder: what it is and how to load it, with marked places for what only its author knows."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from .quantization import count_weights
from .runtime import replacing
from .stack import LayerStack

__all__ = ["CARD_NAME", "write"]

CARD_NAME = "README.md"
_TO_DO = "[More Information Needed]"  # the Hub's own words for it
_LARGEST = 1 << 20  # bytes; no card of ours is that long

_CARD = """\
---
library_name: lcconformer
license: unknown
tags:
- speech
- conformer
- lcconformer
---

# {title}

A Conformer encoder of the Python package lcconformer: {loops}, {parameters} parameters ({dtypes}).
It takes {input}, and gives `[B, T, {width}]` at any depth from 1 to
{num_layers}{frames}.

- **Training data:** {to_do}
- **Training procedure:** {to_do}
- **Licence:** {to_do}, and the field `license` at the top of this file
- **Evaluation, intended uses, limits:** {to_do}

## Use

```python
import torch
from {module} import {name}

directory = "."  # that of this file; from the Hub: huggingface_hub.snapshot_download("user/model")
encoder = {name}.from_pretrained(directory)
x, lengths = torch.randn(2, 400, {features}), torch.tensor([400, 250])
with torch.no_grad():
    output, frames = encoder(x.to(next(encoder.parameters()).dtype), lengths, depth={num_layers})
```

## Files

- `config.json`: the configuration below, as JSON.
- `model.safetensors`: the weights, and the configuration once more in the header. Loading executes nothing.

## Configuration

| setting | value |
|---|---|
{settings}
"""


def write(encoder: LayerStack, directory: Path) -> None:
    """Write the card of an encoder to its directory, unless there is one that somebody wrote or edited."""
    path = directory / CARD_NAME
    if os.path.lexists(path) and not _is_as_written(path):
        return
    text = _card(encoder)
    with replacing(path) as temporary:
        temporary.write_text(text + _mark(text), encoding="utf-8")


def _mark(text: str) -> str:
    """The last line of a card: by it a later save knows that nobody has edited the text above."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"\n<!-- written by lcconformer, and again by the next save unless it was edited: {digest} -->\n"


def _is_as_written(path: Path) -> bool:
    try:
        if path.stat().st_size > _LARGEST:
            return False
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a folder, or somebody else's
        return False
    above = text[: text.rstrip("\n").rfind("\n<!--")]
    return text == above + _mark(above)


def _card(encoder: LayerStack) -> str:
    config, cls = encoder.config, type(encoder)
    layers = len(encoder.layers)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in encoder.parameters()})
    int8 = config.weights == "int8"
    shown = "lcconformer" if cls.__module__.startswith("lcconformer.") else cls.__module__
    features = config.input_dim or config.d_model
    return _CARD.format(
        title=f"Conformer encoder, {config.num_layers} x {config.d_model}",
        loops=f"{_counted(config.num_layers, 'loop')} of {_counted(layers, 'layer')}",
        parameters=f"{count_weights(encoder):,}",
        dtypes=", ".join([*dtypes, *(["int8 matrices"] if int8 else [])]),
        input=f"features `[B, T, {features}]` and, for padded batches, the lengths `[B]`",
        width=config.d_model,
        frames="" if config.subsampling == "none" else f", with {config.subsampling_factor} input frames in one",
        num_layers=config.num_layers,
        features=features,
        module=shown,
        name=cls.__name__,
        settings="\n".join(f"| `{f.name}` | `{getattr(config, f.name)!r}` |" for f in dataclasses.fields(config)),
        to_do=_TO_DO,
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
