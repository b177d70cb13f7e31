"""Structs of kernel arguments as Python classes, made by csrc/arguments.h: what they take, and what they say of the rest."""

from __future__ import annotations

import pytest
import torch

from .cpu_kernels import CPU

ROWS = {"element": CPU.Element.float32, "rows": 2, "columns": 16, "threads": 1, "x": 0}
ELEMENTS = {"element": CPU.Element.float32, "rows": 0, "columns": 1, "threads": 1, "out": 0, "u": 0}
ELEMENTS["activation"] = CPU.Activation.silu


def test_fields_can_be_read_and_changed():
    args = CPU.RowsForward(**ROWS, eps=0.5)
    assert (args.rows, args.columns, args.x, args.eps, args.branch) == (2, 16, 0, 0.5, 0)
    args.rows, args.branch = 3, 1 << 63
    assert (args.rows, args.branch) == (3, 1 << 63)
    matrix = CPU.Matrix(panels=8, bias=16, inputs=5, columns=7)
    args.up = matrix
    matrix.inputs = 6  # a copy was taken
    assert (args.up.panels, args.up.inputs) == (8, 5)
    args.up.inputs = 9
    assert args.up.inputs == 9
    conv = CPU.GluDepthwiseConvForward(
        element=CPU.Element.bfloat16, batch=0, frames=0, channels=1, width=1, threads=1, x=0, x_batch_stride=0,
        x_frame_stride=0, taps=0, norm=CPU.Norm.group, eps=0, out=0,
        activation=CPU.Activation.gelu,
    )  # fmt: skip
    assert (conv.element, conv.norm, conv.groups) == (CPU.Element.bfloat16, CPU.Norm.group, 1)
    assert (conv.activation, args.activation) == (CPU.Activation.gelu, CPU.Activation.silu)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rows", 1.5, "rows is 1.5 (float); expected an int from 0 to 9223372036854775807"),
        ("rows", -1, "rows is -1 (int); expected an int from 0"),
        ("threads", 1 << 31, "threads is 2147483648 (int); expected an int from 0 to 2147483647"),
        ("x", None, "x is None (NoneType); expected an address as int, 0 for null"),
        ("x", -8, "x is -8 (int); expected an address"),
        ("eps", "small", "eps is 'small' (str); expected a float"),
        ("up", (1, 2, 3, 4), "up is (1, 2, 3, 4) (tuple); expected lcconformer._C.cpu.Matrix"),
        ("norm", None, "norm is None (NoneType); expected lcconformer._C.cpu.Affine"),
    ],
)
def test_a_wrong_value_is_named(name, value, said):
    with pytest.raises(TypeError) as made:
        CPU.RowsForward(**{**ROWS, name: value})
    args = CPU.RowsForward(**ROWS)
    with pytest.raises(TypeError) as changed:
        setattr(args, name, value)
    for error in (made, changed):
        assert str(error.value).startswith(f"RowsForward: {said}")


def test_missing_and_unknown_arguments_are_named():
    with pytest.raises(TypeError, match=r"^RowsForward: missing element, rows, x$"):
        CPU.RowsForward(columns=1, threads=1)
    with pytest.raises(
        TypeError, match=r"^RowsForward: there is no argument 'stride'; there are element, rows, columns, threads, x,"
    ):
        CPU.RowsForward(**ROWS, stride=1)
    with pytest.raises(AttributeError, match="stride"):
        CPU.RowsForward(**ROWS).stride = 1


def test_a_kernel_takes_its_own_arguments_alone():
    with pytest.raises(TypeError, match=r"rows_forward\(\): incompatible function arguments"):
        CPU.rows_forward(CPU.FeedForwardActivationForward(**ELEMENTS))
    with pytest.raises(ValueError, match=r"^rows_forward: threads is 0; expected at least 1$"):
        CPU.rows_forward(CPU.RowsForward(**{**ROWS, "threads": 0}))
    half = CPU.FeedForwardActivationForward(**{**ELEMENTS, "element": CPU.Element.float16})
    with pytest.raises(ValueError, match="activation_forward: element is float16; expected float32 or bfloat16"):
        CPU.feed_forward_activation_forward(half)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_probability_outside_of_its_range_is_refused(p):
    with pytest.raises(ValueError, match=r"^Dropout: p is .*; expected 0 to 1$"):
        CPU.Dropout(0, p)


def test_every_kernel_has_the_class_of_its_name():
    kernels = [n for n in dir(CPU) if n.endswith(("_forward", "_backward"))]
    assert len(kernels) == 11
    for name in kernels:
        owner = name.title().replace("_", "")
        assert f"args: lcconformer._C.cpu.{owner}" in getattr(CPU, name).__doc__


def test_arguments_are_launched_again_after_a_change():
    x, out, g = torch.randn(3, 8), torch.empty(3, 8), torch.empty(3, 8)
    args = CPU.FeedForwardActivationForward(
        **{**ELEMENTS, "rows": 3, "columns": 8, "u": x.data_ptr(), "out": out.data_ptr()}
    )
    CPU.feed_forward_activation_forward(args)
    args.out = g.data_ptr()
    CPU.feed_forward_activation_forward(args)
    torch.testing.assert_close(out, torch.nn.functional.silu(x))
    assert torch.equal(out, g)
