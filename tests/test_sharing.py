"""Sharing maps: the documented examples, and properties over all forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcconformer.sharing import sharing_map


@pytest.mark.parametrize(
    ("sharing", "layers"),
    [
        ("all", "000000"),
        ("none", "012345"),
        ("sequence:3", "001122"),
        ("sequence:4", "001223"),
        ("cycle:3", "012012"),
        ("cycle:4", "012301"),
        ("middle_cycle:2", "012123"),
        ("middle_cycle:1", "011112"),
        ("prelude_core_coda:1,2,1", "012123"),
        ("prelude_core_coda:2,1,1", "012223"),
        ("prelude_core_coda:0,3,0", "012012"),
        ("prelude_core_coda:0,1,2", "000012"),
        ((0, 0, 1, 1, 2, 0), "001120"),
        ([1, 0, 1, 0, 1, 0], "101010"),
    ],
    ids=str,
)
def test_examples(sharing, layers):
    assert sharing_map(sharing, 6) == tuple(map(int, layers))


@st.composite
def forms(draw):
    """A valid form and its ``num_layers`` and number of unique layers."""
    n = draw(st.integers(1, 40))
    m = draw(st.integers(1, n))
    kind = draw(st.sampled_from(["all", "none", "sequence", "cycle", "prelude_core_coda"]))
    if kind == "all":
        return "all", n, 1
    if kind == "none":
        return "none", n, n
    if kind in ("sequence", "cycle"):
        return f"{kind}:{m}", n, m
    prelude = draw(st.integers(0, n - m))
    coda = draw(st.integers(0, n - m - prelude))
    return f"{kind}:{prelude},{m},{coda}", n, prelude + m + coda


@given(forms())
@settings(deadline=None)
def test_every_layer_is_used_and_numbered_by_first_use(form):
    sharing, n, unique = form
    layers = sharing_map(sharing, n)
    assert len(layers) == n
    assert list(dict.fromkeys(layers)) == list(range(unique))
    assert sharing_map(layers, n) == layers


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
@settings(deadline=None)
def test_groups_are_balanced(sizes):
    n, m = sizes
    for form in ("sequence", "cycle"):
        layers = sharing_map(f"{form}:{m}", n)
        uses = [layers.count(i) for i in range(m)]
        assert max(uses) - min(uses) <= 1
    assert sharing_map(f"sequence:{m}", n) == tuple(sorted(sharing_map(f"sequence:{m}", n)))


@pytest.mark.parametrize(
    ("sharing", "why"),
    [
        ("", "unknown form"),
        ("All", "unknown form"),
        ("cycle", "unknown form"),
        ("cycle:", "unknown form"),
        ("cycle:1,2", "unknown form"),
        ("cycle:0", "M must be from 1 to num_layers"),
        ("cycle:7", "M must be from 1 to num_layers"),
        ("sequence:-1", "M must be from 1 to num_layers"),
        ("cycle:two", "the numbers after ':' are not integers"),
        ("all:2", "'all' takes no number"),
        ("middle_cycle:5", "the parts do not fit"),
        ("middle_cycle:0", "the parts do not fit"),
        ("prelude_core_coda:3,1,3", "the parts do not fit"),
        ("prelude_core_coda:-1,1,1", "the parts do not fit"),
        ("prelude_core_coda:1,1", "unknown form"),
        ((0, 1), "a tuple needs one integer per depth"),
        ((0, 0, 0, 0, 0, 1.0), "a tuple needs one integer per depth"),
        ((0, 0, 0, 0, 0, True), "a tuple needs one integer per depth"),
        ((0, 0, 0, 0, 0, 2), "a tuple must use the indices 0, 1, ... without gaps"),
        ((-1, 0, 0, 0, 0, 0), "a tuple must use the indices"),
    ],
    ids=str,
)
def test_errors(sharing, why):
    with pytest.raises(ValueError, match="with num_layers = 6: " + why) as error:
        sharing_map(sharing, 6)
    assert "expected 'all', 'none', 'sequence:M'" in str(error.value)
