"""Generate the tables of the README and of docs/engines.md from result files: ``python -m lcconformer.bench.reports.readme``.

``<date>-<commit>.json`` has rows of PyTorch's implementations, ``runtimes-<date>-<commit>.json`` those of inference runtimes;
those of models under ``accelerate`` are read by :mod:`.accelerated`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lcconformer.runtime import write_atomically

from ..core.rows import Results, Row
from . import RESULTS, accelerated
from .table import number

__all__ = [
    "ENGINES",
    "README",
    "RUNTIMES",
    "contention_section",
    "refresh",
    "runtimes_section",
    "runtimes_summary",
    "section",
]

README = RESULTS.parents[1] / "README.md"
ENGINES = README.parent / "docs" / "engines.md"
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_Size = tuple[int, int, list[Row]]  # d_model, layers, the rows through all of them
BESIDE = {"": "nothing", "1": "a busy thread", "torch": "a PyTorch job of as many threads"}
# columns of the table; all do the same maths but torchaudio, which has no relative positions
COLUMNS = ("eager", "sdpa", "compile", "transformers", "torchaudio")


def refresh(readme: Path = README, engines: Path = ENGINES, results: Path = RESULTS) -> None:
    """Rewrite the text between the markers of a README and of the page about engines.

    Raises:
        ValueError: a file lacks markers.
    """
    _rewrite(readme, "bench", section(results))
    _rewrite(readme, "accelerated", accelerated.section(results))
    _rewrite(readme, "runtimes", runtimes_summary(results))
    _rewrite(engines, "runtimes", runtimes_section(results))
    _rewrite(engines, "contention", contention_section(results))


def _rewrite(page: Path, name: str, section: str) -> None:
    text, begin, end = page.read_text(), f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"bench: {page} lacks the lines {begin} and {end}; add them where the section belongs")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    write_atomically(page, f"{head}{begin}\n{section}\n{end}{tail}")


def runtimes_section(results: Path = RESULTS) -> str:
    """Markdown of each machine's latest rows against inference runtimes: a table for each width and number of layers."""
    parts = []
    for path, found, sizes in _latest(results, lambda r: not r.beside):
        lines = [f"{_origin(path, found)} Median ms; x: how many times as fast as the faster runtime."]
        for d_model, layers, rows in sizes:
            alone = [r for r in rows if not r.beside]
            lines += ["", *_runtimes_table(f"d = {d_model}, N = {layers}", alone), *_dtypes(alone)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No results are filed yet."


def runtimes_summary(results: Path = RESULTS) -> str:
    """Markdown of the same rows in one table: how many times as fast as the faster runtime, from the least to the most."""
    dtypes = ("float32", "bfloat16", "int8")
    lines = []
    for path, found, sizes in _latest(results, lambda r: not r.beside):
        for d_model, layers, rows in sizes:
            ratios: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
            for shape in dict.fromkeys((r.batch, r.frames) for r in rows):
                ms = {(r.provider, r.dtype): r.median_ms for r in rows if not r.beside and (r.batch, r.frames) == shape}
                for dtype in dtypes:
                    if (ratio := _to_the_faster(ms, dtype)) is not None:
                        ratios[dtype].append(ratio)
            cells = [
                f"{min(x):.2f} to {max(x):.2f} ({len(x)} shape{'s' * (len(x) > 1)})" if x else "-"
                for x in ratios.values()
            ]
            link = f"[{found.rows[0].device_name}](bench/results/{path.parent.name}/{path.name})"
            lines.append("| " + " | ".join([link, f"{d_model}", f"{layers}", *cells]) + " |")
    if not lines:
        return "No results are filed yet."
    return "\n".join([f"| rows | d | N | {' | '.join(dtypes)} |", "|---|---:|---:|" + "---:|" * len(dtypes), *lines])


def _to_the_faster(ms: dict[tuple[str, str], float], dtype: str) -> float | None:
    """How many times as fast lcconformer is as the faster runtime, from milliseconds by provider and dtype."""
    ours = ms.get(("lcconformer", dtype))
    best = min((ms[name, dtype] for name in RUNTIMES if (name, dtype) in ms), default=None)
    return None if ours is None or best is None else best / ours


def _dtypes(rows: Sequence[Row]) -> list[str]:
    """Say what the dtypes of lcconformer gain over its own float32, from the least to the most of all shapes."""
    ms = {(r.batch, r.frames, r.dtype): r.median_ms for r in rows if r.provider == "lcconformer"}
    said = []
    for dtype in ("bfloat16", "int8"):
        gains = [ms[b, t, "float32"] / ms[b, t, dtype] for b, t, d in ms if d == dtype and (b, t, "float32") in ms]
        if gains:
            said.append(f"{dtype} {min(gains):.2f} to {max(gains):.2f} times as fast")
    return ["", f"lcconformer against its own float32: {', '.join(said)}."] if said else []


def contention_section(results: Path = RESULTS) -> str:
    """Markdown of each machine's latest rows beside other work: a table for each width and number of layers."""
    parts = []
    for path, found, sizes in _latest(results, lambda r: bool(r.beside)):
        lines = [f"{_origin(path, found)} Median ms; x: how many times as long as beside nothing."]
        for d_model, layers, rows in sizes:
            for dtype in dict.fromkeys(r.dtype for r in rows if r.beside):
                title = f"d = {d_model}, N = {layers}, {dtype}"
                lines += ["", *_contention_table(title, [r for r in rows if r.dtype == dtype])]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or "No results are filed yet."


def _latest(results: Path, kind: Callable[[Row], bool]) -> Iterator[tuple[Path, Results, list[_Size]]]:
    """Yield of each machine the files against inference runtimes that are the latest with rows of a kind, for some size."""
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        files = [(path, Results(path)) for path in sorted(folder.glob("runtimes-*.json"))]
        latest: dict[tuple[int, int], Path] = {}  # by d_model and layers
        for path, found in sorted(files, key=lambda file: file[1].date):
            latest |= {(r.d_model, r.layers): path for r in found.rows if kind(r)}
        for path, found in files:
            sizes = sorted(size for size, of in latest.items() if of == path)
            rows = [[r for r in found.rows if (r.d_model, r.layers, r.depth) == (d, n, n)] for d, n in sizes]
            if sizes:
                yield path, found, [(d, n, members) for (d, n), members in zip(sizes, rows)]


def _origin(path: Path, found: Results) -> str:
    first = found.rows[0]
    versions = ", ".join(f"{said} {first.versions[name]}" for name, said in RUNTIMES.items() if name in first.versions)
    return (
        f"**{first.device_name}**, {found.date[:10]}, commit {first.commit}, {versions} "
        f"(`bench/results/{path.parent.name}/{path.name}`)."
    )


def _contention_table(title: str, rows: Sequence[Row]) -> list[str]:
    names = {**RUNTIMES, "lcconformer": "lcconformer"}
    there = [name for name in names if any(r.provider == name for r in rows)]
    lines = [
        f"| {title} | beside | " + " | ".join(f"{names[name]} | x" for name in there) + " |",
        "|---|---|" + "---:|" * 2 * len(there),
    ]
    for shape in dict.fromkeys((r.batch, r.frames) for r in rows if r.beside):
        ms = {(r.provider, r.beside): r.median_ms for r in rows if (r.batch, r.frames) == shape}
        for beside in dict.fromkeys(["", *(r.beside for r in rows)]):
            cells = ["{} x {}".format(*shape), BESIDE.get(beside, f"{beside} busy threads")]
            for name in there:
                time, alone = ms.get((name, beside)), ms.get((name, ""))
                cells += [number(time), f"{time / alone:.1f}" if time and alone and beside else "-"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _runtimes_table(title: str, rows: Sequence[Row]) -> list[str]:
    columns: list[
        tuple[str | None, str, str]
    ] = []  # (provider, dtype, title); without a provider: how many times as fast
    for dtype in ("float32", "bfloat16", "int8"):
        there = [name for name in RUNTIMES if any((r.provider, r.dtype) == (name, dtype) for r in rows)]
        if there:
            columns += [(name, dtype, f"{RUNTIMES[name]} {dtype}") for name in there]
            columns += [("lcconformer", dtype, f"lcconformer {dtype}"), (None, dtype, "x")]
    lines = [
        "| " + " | ".join([title, *(said for _, _, said in columns)]) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for batch, frames in dict.fromkeys((r.batch, r.frames) for r in rows):
        ms = {(r.provider, r.dtype): r.median_ms for r in rows if (r.batch, r.frames) == (batch, frames)}
        cells = [f"{batch} x {frames}"]
        for provider, dtype, _ in columns:
            if provider is not None:
                cells.append(number(ms.get((provider, dtype))))
            else:
                ratio = _to_the_faster(ms, dtype)
                cells.append("-" if ratio is None else f"**{ratio:.2f}**")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(results: Path = RESULTS) -> str:
    """Markdown of the latest result file of each machine in ``results``, GPUs first."""
    latest: list[tuple[bool, Path, Results]] = []
    for folder in sorted(p for p in results.iterdir() if p.is_dir()):
        files = [(path, Results(path)) for path in sorted(folder.glob("20*.json"))]
        if files:
            path, found = max(files, key=lambda file: file[1].date)
            latest.append((found.rows[0].device != "cuda", path, found))
    if not latest:
        return "No results are filed yet."
    parts = [_machine(path, found) for _, path, found in sorted(latest, key=lambda x: (x[0], x[1]))]
    if all(cpu for cpu, _, _ in latest):
        parts.append("No GPU result is filed yet: every number above was taken on a CPU.")
    return "\n\n".join(parts)


def _machine(path: Path, found: Results) -> str:
    first = found.rows[0]
    kind = "" if first.device == "cuda" else " (CPU)"
    where = path.parent.name + "/" + path.name
    torch = first.versions["torch"]
    lines = [
        f"**{first.device_name}{kind}**, {found.date[:10]}, commit {first.commit}, torch {torch} "
        f"([rows](bench/results/{where})). Median ms; the last columns say how many times as fast lcconformer is."
    ]
    for mode in ("inference", "training"):
        rows = [r for r in found.rows if r.mode == mode and r.depth == r.layers and not r.beside]
        if rows:
            lines += ["", *_table(mode, rows)]
    return "\n".join(lines)


def _fastest(rows: Sequence[Row]) -> Row | None:
    return min(rows, key=lambda r: r.median_ms, default=None)


def _table(mode: str, rows: Sequence[Row]) -> list[str]:
    header = [mode, *COLUMNS, "lcconformer", "vs eager", "vs fastest peer"]
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    cases = dict.fromkeys((r.d_model, r.layers, r.dtype, r.batch, r.frames) for r in rows)
    for case in sorted(cases):
        members = [r for r in rows if (r.d_model, r.layers, r.dtype, r.batch, r.frames) == case]
        d_model, layers, dtype, batch, frames = case
        best = {name: _fastest([r for r in members if r.provider == name]) for name in (*COLUMNS, "lcconformer")}
        ours = best["lcconformer"]
        peers = [r for name, r in best.items() if r is not None and name not in ("lcconformer", "torchaudio")]
        cells = [f"B={batch} T={frames} d={d_model} N={layers} {dtype}"]
        cells += ["-" if (r := best[name]) is None else number(r.median_ms) for name in COLUMNS]
        if ours is None:
            cells += ["-", "-", "-"]
        else:
            peer = _fastest(peers)
            cells.append(f"**{number(ours.median_ms)}** ({ours.backend})")
            cells.append("-" if (e := best["eager"]) is None else f"{e.median_ms / ours.median_ms:.2f}x")
            cells.append("-" if peer is None else f"{peer.median_ms / ours.median_ms:.2f}x")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", _footnote(mode)]
    return lines


def _footnote(mode: str) -> str:
    text = "Each column is the fastest backend of that provider; torchaudio computes less (no relative positions)."
    if mode == "training":
        text += " Training is forward and backward with dropout 0.1, without the optimiser."
    return text


if __name__ == "__main__":
    refresh()
    sys.exit(0)
