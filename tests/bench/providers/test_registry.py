"""Providers by name, and what each of them forces."""

import pytest
from lcconformer.bench.core.case import Case
from lcconformer.bench.providers import registry

from lcconformer import loop
from lcconformer.ops.registry import forced_backend

SMALL = Case("inference", 2, 9, d_model=32, layers=2, depth=2, kernel=7)


def test_unknown_provider():
    with pytest.raises(ValueError, match="no provider 'nemo'; use some of eager:torch"):
        registry.choose("nemo")


def test_each_engine_has_a_row_of_its_own():
    chosen = {str(p): p for p in registry.choose("lcconformer")}
    assert chosen["lcconformer:cpu"].engine == "modules"
    assert chosen["lcconformer:cpu+loop"].engine == "loop"
    with chosen["lcconformer:cpu+loop"].scope():
        assert (loop.forced_engine(), forced_backend()) == ("loop", "cpu")
    assert chosen["lcconformer:cpu+loop"].missing(SMALL.replace(mode="feed_forward:forward")) == "has no such op"
