"""The README's Python runs as written, and its two commands are where CI looks for them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def text():
    return README.read_text()


def test_python_blocks_run(text, transformers):
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


@pytest.mark.parametrize(
    ("marker", "ends"),
    [
        ("<!-- demo command -->", "python -m lcconformer demo"),
        ("<!-- test command -->", 'pytest -n auto --dist loadfile -m "not slow"'),
    ],
)
def test_commands_stand_behind_their_markers(text, marker, ends):
    command = re.search(re.escape(marker) + r"\n```bash\n(.+)\n```", text).group(1)
    assert "-c constraints.txt" in command
    assert command.endswith("&& " + ends)


def test_images_and_links_exist(text):
    paths = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert [p for p in paths if not (README.parent / p).exists()] == []
