"""The card beside a saved encoder: what it says is so, and nobody's words are lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lcconformer import ConformerConfig, ConformerEncoder, quantize

CONFIG = ConformerConfig(d_model=64, num_heads=2, ffn_dim=128, num_layers=3, conv_kernel_size=5, input_dim=10)


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["shared", "own layers", "bfloat16", "int8", "subsampling"])
def test_its_example_runs_and_its_numbers_are_those_of_the_encoder(kind: str, tmp_path: Path, monkeypatch) -> None:
    changes = {"own layers": {"sharing": "none"}, "subsampling": {"subsampling": "stack", "subsampling_factor": 4}}
    encoder = ConformerEncoder(CONFIG.replace(**changes.get(kind, {}))).eval()
    stored = sum(p.numel() for p in encoder.parameters())
    if kind == "bfloat16":
        encoder.bfloat16()
    if kind == "int8":
        encoder = quantize(encoder)
    encoder.save_pretrained(tmp_path)
    text = card(tmp_path)
    layers = 3 if kind == "own layers" else 1
    assert f"3 loops of {layers} layer{'s' * (layers > 1)}, {stored:,} parameters" in text
    assert ("bfloat16" if kind == "bfloat16" else "float32") in text
    assert ("int8 matrices" in text) == (kind == "int8")
    assert ("4 input frames in one" in text) == (kind == "subsampling")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(program, found)
    assert type(found["encoder"]) is ConformerEncoder
    assert found["output"].shape[-1] == 64
    settings = dict(re.findall(r"^\| `(\w+)` \| `(.+)` \|$", text, re.M))
    assert settings == {name: repr(value) for name, value in vars(encoder.config).items()}


def test_what_only_the_author_knows_is_marked(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="pip install 'lcconformer[test]'")
    ConformerEncoder(CONFIG).save_pretrained(tmp_path)
    _, header, body = card(tmp_path).split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "lcconformer",
        "license": "unknown",
        "tags": ["speech", "conformer", "lcconformer"],
    }
    for field in ("Training data", "Training procedure", "Licence"):
        assert re.search(rf"\*\*{field}:\*\* \[More Information Needed\]", body)


def test_the_next_save_renews_it(tmp_path: Path) -> None:
    ConformerEncoder(CONFIG).save_pretrained(tmp_path)
    first = card(tmp_path)
    ConformerEncoder(CONFIG).save_pretrained(tmp_path)
    assert card(tmp_path) == first
    ConformerEncoder(CONFIG.replace(num_layers=2)).save_pretrained(tmp_path)
    assert "2 loops of 1 layer," in card(tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("[More Information Needed]", "23 minutes of prompts", 1),
        lambda text: text + "More words.\n",
        lambda text: text.partition("<!--")[0],
        lambda text: "",
        lambda text: "mine",
    ],
    ids=["field", "added", "mark removed", "empty", "of somebody else"],
)
def test_an_edited_card_stays(edit, tmp_path: Path) -> None:
    ConformerEncoder(CONFIG).save_pretrained(tmp_path)
    edited = edit(card(tmp_path))
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    ConformerEncoder(CONFIG.replace(num_layers=2)).save_pretrained(tmp_path)
    assert card(tmp_path) == edited
    assert ConformerEncoder.from_pretrained(tmp_path).config.num_layers == 2


def test_whatever_else_has_its_name_stays(tmp_path: Path) -> None:
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "README.md").write_bytes("modèle".encode("latin-1"))
    (tmp_path / "folder" / "README.md").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "README.md").symlink_to("nowhere")
    for name in ("latin", "folder", "link"):
        ConformerEncoder(CONFIG).save_pretrained(tmp_path / name)
    assert (tmp_path / "latin" / "README.md").read_bytes() == "modèle".encode("latin-1")
    assert (tmp_path / "folder" / "README.md").is_dir()
    assert (tmp_path / "link" / "README.md").is_symlink()


def test_it_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    ConformerEncoder(CONFIG).save_pretrained(tmp_path)
    before = card(tmp_path)
    write_text = Path.write_text

    def full_disk(path: Path, text: str, **options: str) -> int:
        if path.name.startswith(".README.md"):
            write_text(path, text[:100], **options)
            raise OSError("No space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ConformerEncoder(CONFIG.replace(num_layers=2)).save_pretrained(tmp_path)
    assert card(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.isfinite(ConformerEncoder.from_pretrained(tmp_path).layers[0].norm.weight).all()
