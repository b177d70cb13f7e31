"""A page of headings, paragraphs, tables and plots, written as Markdown and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from ...runtime import write_atomically
from ..evaluation.output import html_document

__all__ = ["Page"]


class Page:
    """A page that grows from top to bottom.

    Args:
        title: its heading.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._markdown = [f"# {title}"]
        self._html = [f"<h1>{html.escape(title)}</h1>"]
        self._images: dict[str, bytes] = {}

    def heading(self, text: str) -> None:
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._markdown.append(text)
        self._html.append(f"<p>{html.escape(text)}</p>")

    def warning(self, text: str) -> None:
        """A paragraph that must not be missed."""
        self._markdown.append(f"**{text}**")
        self._html.append(f'<p class="warning"><strong>{html.escape(text)}</strong></p>')

    def items(self, texts: Sequence[str]) -> None:
        self._markdown.append("\n".join(f"- {text}" for text in texts))
        self._html.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def code(self, text: str) -> None:
        self._markdown.append(f"```\n{text}\n```")
        self._html.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
        self._markdown.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
        self._html.append(f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>")

    def image(self, name: str, png: bytes, text: str) -> None:
        """A plot; ``text`` says what it shows to those who do not see it."""
        self._images[f"{name}.png"] = png
        self._markdown.append(f"![{text}]({name}.png)")
        data = base64.b64encode(png).decode()
        self._html.append(f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></p>')

    def write(self, out: Path) -> Path:
        """Write ``report.md`` with its plots beside it, and ``report.html``, whose path is returned."""
        for name, png in self._images.items():
            write_atomically(out / name, png)
        write_atomically(out / "report.md", "\n\n".join(self._markdown) + "\n")
        document = html_document(self._title, "\n".join(self._html))
        return write_atomically(out / "report.html", document)
