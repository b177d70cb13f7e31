"""The rows of a layer between attention and convolution, on the C++ kernels: every part, every SIMD level, odd widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lcconformer.loop.weights import Affine, Matrix, padded_columns
from lcconformer.quantization import quantized

from .cpu_kernels import ACTIVATIONS, CPU, LEVELS, kernels

PARTS = ["merge", "feed_forward", "next"]
F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8


def make(m: int, d: int, f: int, n: int, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    """Rows ``x``, a branch, a norm before the hidden layer and one after, and four matrices with biases, float64.

    Branch and matrices are rounded to ``dtype``.
    """
    sizes = {"merge": (d, inputs_of_merge(d)), "up": (f, d), "down": (d, f), "next": (n, d)}
    values = {"x": torch.randn(m, d) + 0.5, "branch": torch.randn(m, inputs_of_merge(d))}
    for name, (rows, columns) in sizes.items():
        values |= {f"{name}.weight": torch.randn(rows, columns) / columns**0.5, f"{name}.bias": torch.randn(rows)}
    for name in ("hidden_norm", "norm"):
        values |= {f"{name}.weight": torch.randn(d), f"{name}.bias": torch.randn(d)}
    rounded = [name for name in values if name == "branch" or (values[name].dim() == 2 and name != "x")]
    return {name: value.to(dtype if name in rounded else F32).double() for name, value in values.items()}


def inputs_of_merge(d: int) -> int:
    return d + 3 + (d + 3) % 2  # bfloat16 takes even numbers


def reference(v: dict[str, Tensor], parts: list[str], activation: str = "silu") -> tuple[Tensor, Tensor]:
    """x as it is left, and the output."""
    x, shape = v["x"], v["x"].shape[1:]
    if "merge" in parts:
        x = x + F.linear(v["branch"], v["merge.weight"], v["merge.bias"])
    if "feed_forward" in parts:
        h = F.layer_norm(x, shape, v["hidden_norm.weight"], v["hidden_norm.bias"])
        h = ACTIVATIONS[activation](F.linear(h, v["up.weight"], v["up.bias"]))
        x = x + F.linear(h, v["down.weight"], v["down.bias"])
    h = F.layer_norm(x, shape, v["norm.weight"], v["norm.bias"])
    if "next" in parts:
        return x, F.linear(h, v["next.weight"], v["next.bias"])
    return h, h


def run(
    v: dict[str, Tensor],
    parts: list[str],
    level: str | None = None,
    threads: int = 2,
    dtype: torch.dtype = F32,
    activation: str = "silu",
    matrices_in: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x and the output; ``dtype`` of branch, output and, unless ``matrices_in`` says otherwise, matrices."""
    m, d = v["x"].shape
    v = {name: value.float() for name, value in v.items()}
    names = [n for n in parts if n != "feed_forward"] + ["up", "down"] * ("feed_forward" in parts)
    if matrices_in == INT8:
        groups = {"down": CPU.HIDDEN_COLUMNS}
        matrices = {
            name: Matrix.of_int8(*rounded(v[f"{name}.weight"]), v[f"{name}.bias"], group=groups.get(name))
            for name in names
        }
    else:
        matrices = {name: Matrix.of(v[f"{name}.weight"], v[f"{name}.bias"], dtype=dtype) for name in names}
    norms = {name: Affine(v[f"{name}.weight"], v[f"{name}.bias"]) for name in ("hidden_norm", "norm")}
    n = matrices["next"].columns if "next" in parts else 0
    x, out = v["x"].clone(), torch.full((m + CPU.TILE_ROWS, padded_columns(n)), torch.nan, dtype=dtype)
    branch = torch.cat(
        (v["branch"], torch.full((CPU.TILE_ROWS, v["branch"].shape[1]), torch.nan))
    )  # rows of the last tile
    branch = branch.to(dtype)
    args = CPU.RowsForward(
        element=getattr(CPU.Element, "bfloat16" if dtype == BF16 else "float32"),
        **{name: part.args for name, part in (matrices | norms).items()},
        x=x.data_ptr(), branch=branch.data_ptr(), out=out.data_ptr(), out_row_stride=out.stride(0),
        rows=m, columns=d, eps=1e-5, threads=threads, activation=getattr(CPU.Activation, activation),
    )  # fmt: skip
    with kernels(level, threads):
        CPU.rows_forward(args)
    return x, out[:m, :n] if "next" in parts else x


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    buffers = quantized("weight", weight)
    return buffers["weight"], buffers["scale"]


def product_of_int8(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x [M, K]`` and ``weight`` rounded to 8 bits by rows, multiplied in float64."""
    q, scale = rounded(weight.float())
    most = x.float().abs().amax(1, keepdim=True)
    x8 = (x.float() * (127 / most)).round()
    return F.linear(x8.double() * (most / 127), q.double() * scale[:, None].double(), bias)


def reference_of_int8(v: dict[str, Tensor], parts: list[str]) -> tuple[Tensor, Tensor]:
    """x as it is left, and the output, by matrices of int8."""

    def multiply(name: str, x: Tensor) -> Tensor:
        return product_of_int8(x, v[f"{name}.weight"], v[f"{name}.bias"])

    x, shape = v["x"], v["x"].shape[1:]
    if "merge" in parts:
        x = x + multiply("merge", v["branch"])
    if "feed_forward" in parts:
        h = F.silu(multiply("up", F.layer_norm(x, shape, v["hidden_norm.weight"], v["hidden_norm.bias"])))
        q, scale = rounded(v["down.weight"].float())
        weight = q.double() * scale[:, None].double()
        for h_part, w_part in zip(h.split(CPU.HIDDEN_COLUMNS, 1), weight.split(CPU.HIDDEN_COLUMNS, 1)):
            most = h_part.abs().amax(1, keepdim=True)
            x = x + F.linear((h_part * (127 / most)).round() * (most / 127), w_part)
        x = x + v["down.bias"]
    h = F.layer_norm(x, shape, v["norm.weight"], v["norm.bias"])
    return (x, multiply("next", h)) if "next" in parts else (h, h)


def check(assert_close, v: dict[str, Tensor], parts: list[str], **options) -> None:
    activation = options.get("activation", "silu")
    low = reference({name: value.to(options.get("dtype", F32)) for name, value in v.items()}, parts, activation)
    for name, out, ref, eager in zip(("x", "out"), run(v, parts, **options), reference(v, parts, activation), low):
        assert_close(name, out, ref, eager, 2)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("d", "f", "n"), [(1, 1, 1), (7, 30, 14), (16, 64, 48), (65, 131, 195), (256, 1030, 768)])
def test_widths(assert_close, level, d, f, n, dtype):
    check(assert_close, make(20, d, f, n, dtype), PARTS, level=level, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_activations(assert_close, activation, level, dtype):
    check(assert_close, make(33, 24, 300, 40, dtype), PARTS, level=level, dtype=dtype, activation=activation)


@pytest.mark.parametrize("m", [1, 5, 6, 7, 95, 97, 203, 400])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_and_threads(assert_close, m, threads, dtype):
    check(assert_close, make(m, 24, 40, 30, dtype), PARTS, threads=threads, dtype=dtype)


@pytest.mark.parametrize(
    "parts", [[], ["merge"], ["feed_forward"], ["next"], ["merge", "next"], ["feed_forward", "next"]]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parts_alone(assert_close, parts, dtype):
    check(assert_close, make(33, 20, 30, 40, dtype), parts, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype):
    v = make(203, 24, 300, 40, dtype)
    x, out = run(v, PARTS, dtype=dtype)
    for first, last in ((0, 1), (50, 57), (96, 203)):
        part = v | {"x": v["x"][first:last], "branch": v["branch"][first:last]}
        for whole, alone in zip((x, out), run(part, PARTS, threads=3, dtype=dtype)):
            assert torch.equal(whole[first:last], alone)


def test_bfloat16_products_add_up_in_float32_and_keep_the_residual(assert_close):
    """Sums and x are far more exact than bfloat16, whose rounding is that of norms, hidden layer and output alone."""
    v = make(40, 64, 128, 64, BF16)
    x, _ = run(v, ["merge", "next"], dtype=BF16)
    exact = reference(v, ["merge", "next"])[0]
    assert (x - exact).abs().max() < 1e-5 * exact.abs().max()
    v["up.weight"] *= 0
    v["up.bias"] *= 0
    x, _ = run(v, ["feed_forward", "next"], dtype=BF16)
    assert torch.equal(x, v["x"].float() + v["down.bias"].float())


def without_ties(x: Tensor) -> None:
    """Zero what is half way between two steps, as bfloat16 values often are, and may be rounded to either."""
    steps = x * (127 / x.abs().amax(1, keepdim=True))
    x[(steps % 1 - 0.5).abs() < 1e-4] = 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("m", "d"), [(1, 2), (5, 7), (20, 65), (97, 257)])
def test_products_of_int8_are_exact(level, dtype, m, d):
    """Of inputs that nothing was computed for, sums are whole numbers, and what is left are roundings of float32."""
    v = make(m, d, 1, 1, dtype)
    without_ties(v["branch"])
    x, _ = run(v, ["merge"], level, dtype=dtype, matrices_in=INT8)
    expected = v["x"] + product_of_int8(v["branch"], v["merge.weight"], v["merge.bias"])
    expected = F.layer_norm(expected, (d,), v["norm.weight"], v["norm.bias"])
    bound = 1e-5 if d > 2 else 1e-3  # two values apart by little are amplified
    torch.testing.assert_close(x.double(), expected, rtol=bound, atol=bound)


def off(out: Tensor, expected: Tensor) -> Tensor:
    return (out.double() - expected).norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(("d", "f", "n"), [(7, 30, 14), (65, 131, 195), (64, 600, 70), (256, 1030, 768)])
def test_rows_by_int8(level, dtype, d, f, n):
    """Far nearer to products of rounded operands than these are to exact ones: the norms' last bits decide a few steps."""
    v = make(21, d, f, n, dtype)
    without_ties(v["branch"])
    for out, ref, exact in zip(
        run(v, PARTS, level, dtype=dtype, matrices_in=INT8), reference_of_int8(v, PARTS), reference(v, PARTS)
    ):
        assert off(ref, exact) < 0.05 * exact.norm()
        assert off(out, ref.to(out.dtype).double()) < 0.3 * off(ref, exact)


def test_a_row_by_int8_does_not_depend_on_the_others():
    v = make(203, 24, 300, 40)
    x, out = run(v, PARTS, matrices_in=INT8)
    for first, last in ((0, 1), (50, 57), (96, 203)):
        part = v | {"x": v["x"][first:last], "branch": v["branch"][first:last]}
        for whole, alone in zip((x, out), run(part, PARTS, threads=3, matrices_in=INT8)):
            assert torch.equal(whole[first:last], alone)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_int8_hides_no_value_that_is_not_finite(level, value):
    v = make(5, 24, 300, 40)
    v["branch"][2, 3] = value
    x, out = run(v, PARTS, level, matrices_in=INT8)
    assert x[2].isnan().all()
    assert out[2].isnan().all()
    others = [0, 1, 3, 4]
    assert x[others].isfinite().all()
    assert out[others].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_int8_of_nothing(level):
    """Rows of zeros, and of values too small for a scale, add nothing but the bias."""
    v = make(4, 24, 300, 40)
    v["branch"][0], v["branch"][1] = 0, 1e-39
    x, _ = run(v, ["merge", "next"], level, matrices_in=INT8)
    assert torch.equal(x[:2], (v["x"][:2].float() + v["merge.bias"].float()))


def test_bfloat16_inputs_in_odd_number_are_refused():
    args = CPU.RowsForward(element=CPU.Element.bfloat16, rows=0, columns=3, threads=1, x=0,
                           merge=CPU.Matrix(panels=64, bias=64, inputs=3, columns=3))  # fmt: skip
    with pytest.raises(ValueError, match="merge has 3 inputs; expected an even number with bfloat16"):
        CPU.rows_forward(args)


@pytest.mark.parametrize("inputs", [5, 6])
def test_packed_matrix_of_bfloat16(inputs):
    """Inputs by pairs, a zero after the last of an odd number."""
    linear = nn.Linear(inputs, 70)
    panels = Matrix.of(linear.weight.detach(), None, 0.5, BF16).panels
    assert (panels.dtype, panels.shape) == (BF16, (2, 3, CPU.PANEL_COLUMNS, 2))
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)  # [128, 6]
    assert torch.equal(weight[:70, :inputs], (linear.weight * 0.5).bfloat16())
    assert weight[70:].abs().sum() + weight[:, inputs:].abs().sum() == 0


def test_packed_matrix():
    linear = nn.Linear(5, 70)
    matrix = Matrix.of(linear.weight.detach(), None, 0.5)
    assert matrix.panels.shape == (2, 5, CPU.PANEL_COLUMNS)
    assert torch.equal(matrix.panels.mT.flatten(0, 1)[:70], linear.weight * 0.5)
    assert matrix.panels.mT.flatten(0, 1)[70:].abs().sum() == 0
    assert torch.equal(matrix.bias, torch.zeros(128))


def test_packed_matrix_of_int8():
    """Inputs by fours, zeros after the last; sums start at what 128 in every input would add."""
    weight, scale = torch.randint(-127, 128, (70, 6), dtype=torch.int8), torch.rand(70)
    matrix = Matrix.of_int8(weight, scale, torch.ones(70), 0.5)
    assert (matrix.panels.dtype, matrix.panels.shape) == (INT8, (2, 2, CPU.PANEL_COLUMNS, 4))
    back = matrix.panels.transpose(1, 2).flatten(2).flatten(0, 1)  # [128, 8]
    assert torch.equal(back[:70, :6], weight)
    assert back[70:].count_nonzero() + back[:, 6:].count_nonzero() == 0
    assert matrix.scales is not None
    assert matrix.starts is not None
    assert torch.equal(matrix.scales, F.pad(scale * 0.5, (0, 58)))
    assert torch.equal(matrix.starts, F.pad(-128 * weight.sum(1).int(), (0, 58))[None])
    groups = Matrix.of_int8(weight, scale, None, group=4).starts
    assert groups is not None
    assert torch.equal(groups[:, :70], -128 * torch.stack([weight[:, :4].sum(1), weight[:, 4:].sum(1)]).int())
    assert torch.equal(matrix.bias, F.pad(torch.full((70,), 0.5), (0, 58)))


def test_fingerprint_sees_bytes_after_the_last_word():
    tensor = torch.zeros(7, dtype=INT8)
    table = torch.tensor([[tensor.data_ptr(), 7]])
    before = CPU.fingerprint(table.data_ptr(), 1, True)
    tensor[6] = 1
    assert CPU.fingerprint(table.data_ptr(), 1, True) != before


@pytest.mark.parametrize("complete", [False, True])
def test_fingerprint(complete):
    """All of up to 64 words, and both ends of more, or every word; other tensors do not matter."""
    tensors = [torch.randn(64), torch.randn(1, 1), torch.randn(1000)]
    table = torch.tensor([[t.data_ptr(), t.numel() * 4] for t in tensors])

    def taken() -> int:
        return CPU.fingerprint(table.data_ptr(), len(table), complete)

    before = taken()
    assert taken() == before
    places: list = [(0, 0), (0, 31), (0, 63), (1, (0, 0)), (2, 0), (2, 999)]
    if complete:
        places += [(2, i) for i in range(1, 999)]
    for tensor, index in places:
        value = tensors[tensor][index].clone()
        tensors[tensor][index] += 1
        assert taken() != before
        tensors[tensor][index] = value
    assert taken() == before
    assert CPU.fingerprint(0, 0, complete) == 0


def test_packed_positions_give_the_same_bits():
    """Attention on positions packed before, without its log-sum-exp, against attention that packs them."""
    b, t, h, d = 2, 70, 2, 24
    q, k, v = torch.randn(3, b, t, h, d)
    pos, u, v_bias = torch.randn(2 * t - 1, h, d), torch.randn(h, d), torch.randn(h, d)
    strides = dict(batch_stride=t * h * d, frame_stride=h * d, head_stride=d)
    heads = {n: CPU.Heads(data=x.data_ptr(), **strides) for n, x in zip("qkv", (q, k, v))}
    sizes = dict(element=CPU.Element.float32, frames=t, heads=h, head_dim=d, threads=2)
    position = dict(pos=pos.data_ptr(), pos_frame_stride=h * d, pos_head_stride=d)
    inputs = dict(**heads, **sizes, u=u.data_ptr(), v_bias=v_bias.data_ptr(), batch=b, total_frames=b * t)
    for level in LEVELS:
        with kernels(level):
            outs, lse = torch.full((2, b, t, h, d), torch.nan), torch.empty(h, b * t)
            args = CPU.RelposAttentionForward(**inputs, **position, out=outs[0].data_ptr(), lse=lse.data_ptr())
            CPU.relpos_attention_forward(args)
            panels = torch.full((h * CPU.relpos_attention_position_size(CPU.Element.float32, t, d),), torch.nan)
            packed = CPU.RelposAttentionPackPositions(
                **sizes, **position, pos_panels=panels.data_ptr(), products=CPU.Element.float32
            )
            CPU.relpos_attention_pack_positions(packed)
            # the same object, changed
            args.pos, args.pos_panels, args.lse, args.out = 0, panels.data_ptr(), 0, outs[1].data_ptr()
            CPU.relpos_attention_forward(args)
        assert outs.isfinite().all()
        assert torch.equal(outs[0], outs[1])
