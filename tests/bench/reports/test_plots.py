"""Plots: the same providers in the same order in every panel, the spread of the rounds, and a warning where it is wide."""

import pytest
from lcconformer.bench.core.rows import Results, Row
from lcconformer.bench.providers.registry import PROVIDERS
from lcconformer.bench.reports import plots

from .test_filing import row


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Plot rows and return the figures by kind, still open."""
    plt = plots._pyplot()
    monkeypatch.setattr(plt, "close", lambda figure: None)

    def draw(rows):
        results = Results()
        results.ceilings[f"{rows[0].device_name} {rows[0].dtype}"] = {"gemm_tflops": 0.2, "copy_gb_s": 30.0}
        first = len(plt.get_fignums())
        paths = plots.plot(rows, results, tmp_path)
        figures = [plt.figure(n) for n in plt.get_fignums()[first:]]
        return {path.stem.rpartition("-")[2]: figure for path, figure in zip(paths, figures)}

    yield draw
    monkeypatch.undo()
    plt.close("all")


def timed(provider: str, backend: str, ms: float, frames: int, spread: float = 0.05, **changes) -> Row:
    ends = {"p20_ms": ms * (1 - spread / 2), "p80_ms": ms * (1 + spread / 2)}
    return row(provider, ms, backend, frames=frames, speedup_vs_eager=8.0 / ms, **ends, **changes)


# as a run would finish them: another order at each length
ROWS = [
    timed("lcconformer", "triton", 2.0, 100),
    timed("eager", "torch", 8.0, 100),
    timed("torchaudio", "torch", 4.0, 100),
    timed("torchaudio", "torch", 1.0, 400),
    timed("lcconformer", "triton", 2.0, 400, depth=6),
    timed("lcconformer", "triton", 4.0, 400),
    timed("eager", "torch", 8.0, 400),
]
ORDER = ["eager", "torchaudio:torch", "lcconformer:triton", "lcconformer:triton depth 6"]


def test_every_provider_has_a_colour_and_so_a_place():
    assert {str(p) for p in PROVIDERS} == set(plots.COLOURS)


def test_one_order_in_all_panels(drawn):
    figures = drawn(ROWS)
    speedup, scaling = figures["speedup"], figures["scaling"]
    assert [t.get_text() for t in speedup.axes[0].get_yticklabels()] == ORDER
    # bars lie where their names are, in the panel that lacks one of them too
    for axis, expected in zip(speedup.axes, ([1.0, 2.0, 4.0], [1.0, 8.0, 2.0, 4.0])):
        assert [bar.get_width() for bar in axis.patches] == expected
    assert [t.get_text() for t in scaling.axes[1].get_legend().get_texts()] == ORDER
    legend = [t.get_text() for t in figures["roofline"].axes[0].get_legend().get_texts()]
    assert legend == [*ORDER, "B = 8, T = 100", "B = 8, T = 400"]


def test_axes_have_units(drawn):
    figures = drawn(ROWS)
    assert [a.get_ylabel() for a in figures["scaling"].axes] == ["latency, ms", "throughput, frames/s"]
    assert figures["roofline"].axes[0].get_xlabel() == "arithmetic intensity, FLOP/byte"
    assert figures["speedup"]._suptitle.get_text() == "inference, d = 256, N = 12, bfloat16, Some GPU 9"


def test_the_spread_is_that_of_the_rounds(drawn):
    axis = drawn([timed("eager", "torch", 8.0, 100), timed("lcconformer", "triton", 2.0, 100, spread=0.5)])[
        "speedup"
    ].axes[0]
    whisker = axis.containers[-1].errorbar.lines[2][0].get_segments()[0]
    assert whisker[:, 0] == pytest.approx([8 / 2.5, 8 / 1.5])


def test_rounds_that_disagree_are_told(drawn):
    assert all(figure._supxlabel is None for figure in drawn(ROWS).values())
    figures = drawn([*ROWS, timed("sdpa", "torch", 6.0, 400, spread=0.11)])
    hatched = [bar.get_hatch() for axis in figures["speedup"].axes for bar in axis.patches if bar.get_hatch()]
    assert len(hatched) == 1
    for kind, sign in (("speedup", "hatched"), ("scaling", "hollow")):
        text = figures[kind]._supxlabel.get_text()
        assert text.startswith(f"{sign}: rounds disagree, p20 to p80 is more than 10% of the median")
