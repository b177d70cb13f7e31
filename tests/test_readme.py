"""The Python of the README and of the documentation runs as written; commands are where CI looks; links lead somewhere."""

import json
import re
from pathlib import Path

import pytest

from lcconformer import ConformerConfig
from lcconformer.ssl import FeatureSettings, ObjectiveSettings, PretrainingModel, save_checkpoint
from lcconformer.ssl.demo.summary import format_results, percent

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def text():
    return README.read_text()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.fixture
def after_pretraining(tmp_path, monkeypatch):
    """A working directory with the run that the snippets load."""
    config = ConformerConfig(
        d_model=32, num_heads=2, ffn_dim=64, num_layers=6, conv_kernel_size=7, input_dim=80,
        subsampling="stack", subsampling_factor=4,
    )  # fmt: skip
    model = PretrainingModel(config, FeatureSettings(), ObjectiveSettings())
    tensors = {f"model.{name}": x for name, x in model.state_dict().items()}
    save_checkpoint(tmp_path / "runs" / "shared" / "step_00000001.safetensors", tensors, model.describe())
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=lambda p: p.name)
def test_python_blocks_run(page, transformers, after_pretraining):
    """Each by itself, in the order of the page, in one folder."""
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), {})


def test_the_readme_shows_each_step_after_pretraining(text):
    code = "".join(python_blocks(README))
    for name in ("load_model(", ".hidden_states(", "ExitRule(", ".adaptive(", "torch.export.export("):
        assert name in code


def test_the_demo_is_quoted_from_its_results(text):
    results = json.loads((ROOT / "bench/results/demo/results.json").read_text())
    printed = format_results(results).split("\nloss:")[0].splitlines()
    assert len(printed) > 20
    assert [line for line in printed if line.rstrip() not in text] == []
    smallest = results["smallest_depth"]["linear"]
    for said in (
        f"{results['parameters']['ratio']:.2f}x fewer in the [demo",
        f"saved {percent(results['saving']['time_saved'])} of\n  the demo's training time",
        f"{smallest['depth']} of {results['setup']['config']['num_layers']} loops are within 1% of the best",
        f"for {percent(smallest['time_saved'])} less inference time",
    ):
        assert said in text


def test_the_gain_in_speed_is_quoted_from_the_table(text):
    """The least and the largest factor of each mode; the table itself is generated from rows."""
    said = []
    for mode in ("inference", "training"):
        table = text[text.index(f"\n| {mode} |") :].split("\n\n")[0]
        factors = [float(x) for x in re.findall(r" \| ([\d.]+)x \| [\d.]+x \|$", table, re.M)]
        assert len(factors) > 2
        said.append(f"{min(factors):.1f} to {max(factors):.1f} times")
    assert f"inference is {said[0]} and training {said[1]} as fast as" in " ".join(text.split())


def test_long_audio_is_quoted_from_rows(text):
    said = " ".join(text.split())
    (link,) = re.findall(r"\((bench/results/[^)]*/long-[^)]*\.json)\)", text)
    found = json.loads((ROOT / link).read_text())
    rows = {(r["provider"], r["frames"]): r for r in found["rows"]}
    assert all((r["d_model"], r["layers"], r["batch"], r["mode"]) == (256, 1, 1, "inference") for r in rows.values())
    for frames in (6000, 22500):
        ours = rows["lcconformer", frames]
        assert f"{ours['median_ms'] / 1e3:.2g} s and {ours['peak_memory_mb'] / 1e3:.2g} GB" in said
    peer = rows["transformers", 6000]
    assert f"{peer['median_ms'] / 1e3:.2g} s and {peer['peak_memory_mb'] / 1e3:.2g} GB" in said
    assert ("transformers", 22500) not in rows
    (why,) = (s["reason"] for s in found["skipped"] if s["provider"].startswith("transformers"))
    assert "GB are free" in why


def test_packed_batches_and_streams_are_quoted_from_rows():
    said = " ".join((ROOT / "docs/streaming.md").read_text().split())
    (path,) = re.findall(r"`(bench/results/[^`]*/speech-[^`]*\.json)`", said)
    rows = {(r["way"], r["mode"], r["batch"]): r for r in json.loads((ROOT / path).read_text())["rows"]}
    ms = {key: row["median_ms"] for key, row in rows.items()}
    packed = [f"{ms[way, mode, 16]:,.0f}" for mode in ("inference", "training") for way in ("packed", "padded")]
    streams = [rows["as chosen", "inference", batch] for batch in (1, 8)]
    gains = [ms["plain PyTorch", "inference", batch] / ms["as chosen", "inference", batch] for batch in (1, 8)]
    for text in (
        "took {} ms packed and {} ms padded in inference, {} and {} ms in training".format(*packed),
        "took {:.1f} ms for one stream and {:.1f} ms for eight".format(*(r["median_ms"] for r in streams)),
        "(real-time factors {:.4f} and {:.4f})".format(*(r["rtf"] for r in streams)),
        "{:.2f} and {:.2f} times as fast as plain PyTorch".format(*gains),
    ):
        assert text in said


@pytest.mark.parametrize(
    ("marker", "ends"),
    [
        ("<!-- demo command -->", "python -m lcconformer demo"),
        ("<!-- test command -->", 'pytest -n auto --dist worksteal -m "not slow"'),
    ],
)
def test_commands_stand_behind_their_markers(text, marker, ends):
    command = re.search(re.escape(marker) + r"\n```bash\n(.+)\n```", text).group(1)
    assert "-c constraints.txt" in command
    assert command.endswith("&& " + ends)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and Sphinx form them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_images_and_links_lead_somewhere(page):
    wrong = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append((target, anchor))
    assert wrong == []
