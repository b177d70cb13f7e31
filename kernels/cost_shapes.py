"""What a launch of each kernel is at a shape: blocks, trips of its loops, bytes.  For :mod:`.cost`, by the name of the kernel.

A new kernel gets an entry in ``WORK``: a function of its configuration and a :class:`Shape`.  Loops count in the order in
which they begin in the code; ``python -m lcconformer.kernels.report --cost`` says where the code has another number of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from .common import AotConfig, cdiv
from .cost import Work
from .relpos_attention import _heads_at_a_time as heads_at_a_time
from .relpos_attention import _position_parts as position_parts

__all__ = ["SHAPES", "WORK", "Shape", "shape_of", "work"]


@dataclass(frozen=True)
class Shape:
    """B utterances of T frames, d_model wide; the kernel width of the convolution.

    `given` are the integer arguments of a launch, where there is one.
    """

    batch: int
    frames: int
    d_model: int
    kernel: int = 31
    given: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.batch * self.frames

    @property
    def hidden(self) -> int:
        return 4 * self.d_model


# (B, T) of the report: a single utterance, the usual batch
SHAPES = ((1, 100), (32, 400))


def _size(config: AotConfig) -> int:
    return 4 if config.dtype == "fp32" else 2


def _b(config: AotConfig, name: str) -> int:
    return int(config.launch.blocks[f"BLOCK_{name}"])


def _attention(config: AotConfig, s: Shape) -> tuple[int, int, float]:
    """(heads, head dimension, bytes of one [B, T, H, D] tensor)"""
    d = int(config.constexprs["D"])
    return max(1, s.d_model // d), d, float(s.rows * s.d_model * _size(config))


def _positions(config: AotConfig, s: Shape) -> float:
    return float((2 * s.frames - 1) * s.d_model * _size(config))


def _tiles_of_keys(config: AotConfig, frames: int) -> tuple[float, ...]:
    """Trips through whole tiles of keys, and through the last one; wide heads and float32 have one loop for both."""
    n = _b(config, "N")
    if config.dtype == "fp32" or _b(config, "D") > 64:
        return (cdiv(frames, n),)
    return (frames // n, float(frames % n > 0))


def _attention_draw(config: AotConfig, s: Shape) -> Work:
    heads, pitch = max(1, s.d_model // 64) * s.batch, cdiv(s.frames, 64) * 64
    grid = cdiv(s.frames, _b(config, "M")) * cdiv(s.frames, _b(config, "N")) * heads
    return Work(grid, (), heads * pitch**2 / 8)


def _attention_forward(config: AotConfig, s: Shape) -> Work:
    h, _, x = _attention(config, s)
    grid = cdiv(s.frames, 2 * _b(config, "N")) * s.batch * h
    return Work(grid, _tiles_of_keys(config, s.frames), 4 * x + _positions(config, s) + 4 * h * s.rows)


def _of_chunk(config: AotConfig, s: Shape) -> tuple[int, float, float, float]:
    """Heads that share the scratch, and bytes of these: of a [T, D] tensor, of the positions, of one [T, T] matrix."""
    h, d, _ = _attention(config, s)
    tile = 32 if config.dtype == "fp32" else 64  # queries of a program of backward_scores
    heads = heads_at_a_time(s.batch * h, s.frames, cdiv(s.frames, tile), _size(config))
    pitch = cdiv(s.frames, 64) * 64
    x = float(heads * s.frames * d * _size(config))
    return heads, x, _positions(config, s), float(heads * pitch**2 * _size(config))


def _attention_backward_scores(config: AotConfig, s: Shape) -> Work:
    heads, x, positions, matrix = _of_chunk(config, s)
    n = _b(config, "N")
    zeros = (cdiv(s.frames, 64) * 64 - cdiv(s.frames, n) * n) // n
    grid = cdiv(s.frames, 2 * n) * heads
    return Work(grid, (*_tiles_of_keys(config, s.frames), zeros), 7 * x + positions + 2 * matrix)


def _attention_backward_query(config: AotConfig, s: Shape) -> Work:
    heads, x, positions, matrix = _of_chunk(config, s)
    m, n = _b(config, "M"), _b(config, "N")
    trips = (cdiv(s.frames, n), cdiv(s.frames + m - 1, n))
    return Work(cdiv(s.frames, m) * heads, trips, 2 * x + positions + matrix)


def _attention_backward_key(config: AotConfig, s: Shape) -> Work:
    heads, x, _, matrix = _of_chunk(config, s)
    return Work(cdiv(s.frames, _b(config, "N")) * heads, (cdiv(s.frames, _b(config, "M")),), 4 * x + 2 * matrix)


def _attention_backward_position(config: AotConfig, s: Shape) -> Work:
    h, d, _ = _attention(config, s)
    heads, x, _, matrix = _of_chunk(config, s)
    n, m = _b(config, "N"), _b(config, "M")
    tiles = cdiv(2 * s.frames - 1, n)
    parts = position_parts(cdiv(heads, h), h, tiles)
    # a diagonal at offset o from the main one is T - |o| long: on average half of T, and a tile's share at the ends
    trips = (s.frames / 2 + n) / m
    written = 4.0 * parts * (2 * s.frames - 1) * h * d
    return Work(tiles * h * parts, (heads / (h * parts), trips), x + matrix + 2 * written)


def _residual_forward(config: AotConfig, s: Shape) -> Work:
    return Work(cdiv(s.rows, _b(config, "M")), (), 4.0 * s.rows * s.d_model * _size(config))


def _norm_forward(config: AotConfig, s: Shape) -> Work:
    return Work(cdiv(s.rows, _b(config, "M")), (), 2.0 * s.rows * s.d_model * _size(config))


def _norm_backward(config: AotConfig, s: Shape) -> Work:
    m = _b(config, "M")
    each = max(1, cdiv(cdiv(s.rows, 1056 // config.launch.num_warps), m)) * m
    programs = cdiv(s.rows, each)
    return Work(programs, (each / m,), 5.0 * s.rows * s.d_model * _size(config) + 8.0 * programs * s.d_model)


def _elementwise(columns: str, tensors: float) -> Callable[[AotConfig, Shape], Work]:
    """One program a tile; ``tensors`` of [rows, columns] cross."""

    def found(config: AotConfig, s: Shape) -> Work:
        n = getattr(s, columns)
        grid = cdiv(s.rows, _b(config, "M")) * cdiv(n, _b(config, "N"))
        return Work(grid, (), tensors * s.rows * n * _size(config))

    return found


def _elementwise_backward(columns: str, tensors: float) -> Callable[[AotConfig, Shape], Work]:
    """At most 128 programs a column of tiles, each walks its rows and leaves a partial sum."""

    def found(config: AotConfig, s: Shape) -> Work:
        n, m = getattr(s, columns), _b(config, "M")
        each = max(1, cdiv(cdiv(s.rows, 128), m)) * m
        programs = cdiv(s.rows, each)
        grid = programs * cdiv(n, _b(config, "N"))
        return Work(grid, (each / m,), tensors * s.rows * n * _size(config) + 4.0 * programs * n)

    return found


def _product(columns: str, inner: str, tensors: float, statistics: bool = False) -> Callable[[AotConfig, Shape], Work]:
    """[rows, columns] from [rows, inner]; ``tensors`` of the former's size cross beside the operands."""

    def found(config: AotConfig, s: Shape) -> Work:
        n, k = getattr(s, columns), getattr(s, inner)
        grid = cdiv(s.rows, _b(config, "M")) * cdiv(n, _b(config, "N"))
        trips = cdiv(k, _b(config, "K"))
        size = _size(config) * (s.rows * k + n * k + tensors * s.rows * n)
        return Work(grid, (trips, trips) if statistics else (trips,), size)

    return found


def _chunks(batch: int, frames: int, programs: int, least: int) -> tuple[int, int]:
    chunk = max(least, cdiv(frames, max(1, programs // max(batch, 1))))
    return cdiv(frames, chunk), chunk


def _kernel_width(config: AotConfig, s: Shape) -> int:
    found = re.search(r" K=(\d+)", config.name)
    return int(found[1]) if found else int(config.constexprs.get("K", s.kernel))


def _conv_forward(config: AotConfig, s: Shape) -> Work:
    """Loops: window, frames; LayerNorm's over blocks of channels outside of them, its rows after them; or M2.

    The compiler unrolls the loop over the taps, and does away with a window of one step.
    """
    c, step, size = s.d_model, _step(config), _size(config)
    k = _kernel_width(config, s)
    layer, statistics = config.constexprs["NORM"] == 2, config.constexprs["NORM"] == 3
    chunks, chunk = _chunks(s.batch, s.frames, 264 if layer else 264 * 256 // c, step)
    blocks = cdiv(c, _b(config, "C"))
    window, steps = cdiv(k - 1, step), cdiv(chunk, step)
    walk = (window, steps) if window > 1 else (steps,)
    crossed = (3.0 + 2.0 * (layer or statistics)) * s.rows * c * size
    if layer:
        rows = cdiv(chunk, _b(config, "T"))
        # one block of channels is no loop
        trips = (*walk, rows) if blocks == 1 else (blocks, *walk, rows)
        return Work(s.batch * chunks, trips, crossed)
    return Work(s.batch * chunks * blocks, (*walk, steps) if statistics else walk, crossed)


def _step(config: AotConfig) -> int:
    return int(config.launch.blocks["STEP"])


def _conv_backward(config: AotConfig, s: Shape) -> Work:
    """Loops: window, frames.  The compiler unrolls the loop over the taps, and a window of up to four steps."""
    c, step, k = s.d_model, _step(config), _kernel_width(config, s)
    chunks, chunk = _chunks(s.batch, s.frames, 132 * 256 // c, step)
    grid = s.batch * chunks * cdiv(c, _b(config, "C"))
    window, steps = cdiv(k - 1, step), cdiv(chunk, step)
    written = 4.0 * s.batch * chunks * (k + 1) * c
    trips = (window, steps) if window > 4 else (steps,)
    return Work(grid, trips, 5.0 * s.rows * c * _size(config) + written)


def _conv_norm_backward(config: AotConfig, s: Shape) -> Work:
    t, c = _b(config, "T"), s.d_model
    blocks = cdiv(c, _b(config, "C"))
    layer = config.constexprs["NORM"] == 2
    chunks, chunk = _chunks(s.batch, s.frames, (1056 if layer else 512) // blocks, t)
    tensors = 2 if config.constexprs["NORM"] == 3 else 3
    return Work(s.batch * chunks * blocks, (cdiv(chunk, t),), float(tensors * s.rows * c * _size(config)))


def _conv_pointwise(tensors: float) -> Callable[[AotConfig, Shape], Work]:
    def found(config: AotConfig, s: Shape) -> Work:
        grid = s.batch * cdiv(s.frames, _b(config, "T")) * cdiv(s.d_model, _b(config, "C"))
        return Work(grid, (), tensors * s.rows * s.d_model * _size(config))

    return found


def _sum_rows(config: AotConfig, s: Shape) -> Work:
    # of a hidden bias, unless a launch says otherwise
    p, n = s.given.get("P", 128), s.given.get("N", s.hidden)
    return Work(cdiv(n, _b(config, "N")), (cdiv(p, _b(config, "P")),), 4.0 * p * n)


def _accumulate(config: AotConfig, s: Shape) -> Work:
    # each block adds up a part of one of the tensors, each of which has a loop of its own
    tensors = [n for n in range(len(config.signature)) if f"part{n}_ptr" in config.signature]
    sizes = [(s.given.get(f"P{n}", 128), s.given.get(f"N{n}", s.d_model)) for n in tensors]
    blocks = [cdiv(n, _b(config, "N")) for _, n in sizes]
    grid = sum(blocks)
    trips = tuple(cdiv(p, _b(config, "P")) * own / grid for (p, _), own in zip(sizes, blocks))
    return Work(grid, trips, 4.0 * sum(p * n for p, n in sizes), 1 / len(tensors))


# --- the inference chain ---------------------------------------------------------------------------------------------------


def _stated(config: AotConfig, letter: str) -> int:
    found = re.search(rf" {letter}=(\d+)", config.name)
    return int(found[1]) if found else 0


def _for_rows(config: AotConfig, s: Shape) -> bool:
    """Whether this is the configuration for so many rows: up to 128, up to 512, or more (``M=128``, ``M=512``, others)."""
    m = _stated(config, "M")
    least, most = (0, 128) if m <= 128 else (129, 512) if m == 512 else (513, s.rows)
    return bool(s.given) or least <= s.rows <= most


def _norm_product(config: AotConfig, s: Shape) -> Work | None:
    if not _for_rows(config, s):
        return None
    epilogue, k = config.name.split()[1], s.given.get("K", _stated(config, "K"))
    n = s.given.get("N", {"none": 3, "silu": 4, "glu": 1}[epilogue] * k)
    tiles, row_tiles = cdiv(n, _b(config, "N")), cdiv(s.rows, _b(config, "M"))
    one_tile = config.constexprs["ONE_TILE"]
    splits = tiles if one_tile else min(tiles, cdiv(264, row_tiles))
    weights = n * k * (2 if epilogue == "glu" else 1)
    trips = () if one_tile else (tiles / splits,)
    return Work(row_tiles * splits, trips, float(_size(config) * (s.rows * (k + n) + weights)))


def _residual_product(config: AotConfig, s: Shape) -> Work | None:
    if not _for_rows(config, s):
        return None
    k = s.given.get("K", _stated(config, "K"))
    n = s.given.get("N", k // 4)
    grid = cdiv(s.rows, _b(config, "M")) * cdiv(n, _b(config, "N"))
    # the first of the products is ahead of the loop
    trips = cdiv(k, _b(config, "K")) - 1
    return Work(grid, (trips,), float(_size(config) * (s.rows * (k + 2 * n) + n * k)))


def _chain_norm(config: AotConfig, s: Shape) -> Work:
    k = s.given.get("K", _stated(config, "K"))
    return Work(cdiv(s.rows, _b(config, "M")), (), 2.0 * s.rows * k * _size(config))


def _chain_depthwise(config: AotConfig, s: Shape) -> Work | None:
    if not _for_rows(config, s):
        return None
    tiles = cdiv(s.frames, _b(config, "S") * _b(config, "R"))
    grid = s.batch * tiles * cdiv(s.d_model, _b(config, "C"))
    trips = cdiv(s.kernel, config.launch.blocks["TAPS"])
    return Work(grid, (trips,), 2.0 * s.rows * s.d_model * _size(config))


def _chain_taps(config: AotConfig, s: Shape) -> Work:
    rows = cdiv(s.kernel, 8) * 8 + 1
    return Work(rows * cdiv(s.d_model, _b(config, "C")), (), 6.0 * rows * s.d_model)


# name of the kernel up to its first space and, where its uses differ, the word after -> its work
WORK: Mapping[str, Callable[[AotConfig, Shape], Work | None]] = {
    "relpos_attention.forward": _attention_forward,
    "relpos_attention.draw": _attention_draw,
    "relpos_attention.backward_scores": _attention_backward_scores,
    "relpos_attention.backward_query": _attention_backward_query,
    "relpos_attention.backward_key": _attention_backward_key,
    "relpos_attention.backward_position": _attention_backward_position,
    "residual_layer_norm.residual_fwd": _residual_forward,
    "residual_layer_norm.residual_bwd": _norm_backward,
    "residual_layer_norm.layer_norm_fwd": _norm_forward,
    "residual_layer_norm.layer_norm_bwd": _norm_backward,
    "feed_forward.activation_fwd": _elementwise("hidden", 2),
    "feed_forward.activation_bwd": _elementwise_backward("hidden", 4),
    "feed_forward.residual_fwd": _elementwise("d_model", 3),
    "feed_forward.residual_bwd": _elementwise_backward("d_model", 2),
    "feed_forward_products.norm_up": _product("hidden", "d_model", 2, statistics=True),
    "feed_forward_products.up": _product("hidden", "d_model", 2),
    "feed_forward_products.down": _product("d_model", "hidden", 2),
    "feed_forward_products.up_backward": _product("hidden", "d_model", 3),
    "glu_depthwise_conv.conv_fwd": _conv_forward,
    "glu_depthwise_conv.conv_bwd": _conv_backward,
    "glu_depthwise_conv.norm_bwd": _conv_norm_backward,
    "glu_depthwise_conv.norm_fwd": _conv_pointwise(2),
    "glu_depthwise_conv.stats_bwd": _conv_pointwise(3),
    "partials.sum_rows": _sum_rows,
    "partials.accumulate": _accumulate,
    "chain_products.norm_product": _norm_product,
    "chain_products.residual_product": _residual_product,
    "chain_products.norm": _chain_norm,
    "chain_convolution.depthwise": _chain_depthwise,
    "chain_convolution.taps": _chain_taps,
}


def shape_of(config: AotConfig, batch: int, frames: int, d_model: int = 256) -> Shape:
    """Return the shape to evaluate a configuration at: of its own width where its name states one (``D=512``, ``C=512``)."""
    stated = re.search(r" [DC]=(\d+)", config.name)
    own = stated is not None and not config.name.startswith("relpos_attention")
    return Shape(batch, frames, int(stated[1]) if own and stated else d_model)


def work(config: AotConfig, shape: Shape) -> Work | None:
    """Return the work of a launch; None for a kernel that states none, or that is not launched at this shape."""
    words = config.name.split()
    found = WORK.get(" ".join(words[:2])) or WORK.get(words[0])
    return found(config, shape) if found else None
