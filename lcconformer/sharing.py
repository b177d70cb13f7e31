"""Weight sharing: which of the unique layers each loop uses."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["sharing_map"]

_FORMS = (
    "'all', 'none', 'sequence:M', 'cycle:M', 'middle_cycle:M', 'prelude_core_coda:P,M,C' or a tuple of layer indices"
)


def sharing_map(sharing: str | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Indices of the unique layers used at depth 1 ... ``num_layers``.

    ========================  ===========================================  =====================
    sharing                   meaning                                      example, 6 layers
    ========================  ===========================================  =====================
    ``all``                   one layer (ALBERT, arXiv 2105.00812)         0 0 0 0 0 0
    ``none``                  a layer for every depth                      0 1 2 3 4 5
    ``sequence:3``            M layers, each repeated (arXiv 2104.06022)   0 0 1 1 2 2
    ``cycle:3``               M layers in turn (arXiv 2104.06022)          0 1 2 0 1 2
    ``middle_cycle:2``        separate first and last, M in turn between   0 1 2 1 2 3
    ``prelude_core_coda:..``  P, M in turn, C (arXiv 2502.05171)           1,2,1: 0 1 2 1 2 3
    ========================  ===========================================  =====================

    Raises:
        ValueError: an unknown form, or groups that do not fit into ``num_layers``.
    """

    def fail(why: str) -> ValueError:
        return ValueError(f"sharing is {sharing!r} with num_layers = {num_layers}: {why}; expected {_FORMS}")

    if not isinstance(sharing, str):
        layers = tuple(sharing)
        if len(layers) != num_layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
            raise fail("a tuple needs one integer per depth")
        # no gaps, so that no layer is left unused
        if sorted(set(layers)) != list(range(len(set(layers)))):
            raise fail("a tuple must use the indices 0, 1, ... without gaps")
        return layers
    form, _, argument = sharing.partition(":")
    try:
        numbers = [int(n) for n in argument.split(",")] if argument else []
    except ValueError:  # also an integer of thousands of digits
        raise fail("the numbers after ':' are not integers") from None
    if form in ("all", "none"):
        if argument:
            raise fail(f"{form!r} takes no number")
        return (0,) * num_layers if form == "all" else tuple(range(num_layers))
    if form in ("sequence", "cycle") and len(numbers) == 1:
        (m,) = numbers
        if not 1 <= m <= num_layers:
            raise fail("M must be from 1 to num_layers")
        if form == "cycle":
            return tuple(i % m for i in range(num_layers))
        return tuple(i * m // num_layers for i in range(num_layers))
    if form == "middle_cycle" and len(numbers) == 1:
        numbers = [1, numbers[0], 1]
        form = "prelude_core_coda"
    if form == "prelude_core_coda" and len(numbers) == 3:
        prelude, core, coda = numbers
        loops = num_layers - prelude - coda
        if prelude < 0 or coda < 0 or core < 1 or loops < core:
            raise fail("the parts do not fit")
        first = range(prelude)
        middle = (prelude + i % core for i in range(loops))
        last = range(prelude + core, prelude + core + coda)
        return (*first, *middle, *last)
    raise fail("unknown form")
