"""`with backend(...)` and `with engine(...)` hold for the thread that enters them, and for what it recomputes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import lcconformer
from lcconformer import ConformerConfig, ConformerEncoder
from lcconformer.loop import forced_engine
from lcconformer.ops.registry import forced_backend, record

CONFIG = ConformerConfig(d_model=16, num_heads=2, ffn_dim=24, num_layers=2, conv_kernel_size=5, dropout=0.0)


def test_two_threads_do_not_disturb_each_other():
    encoder, x = ConformerEncoder(CONFIG).eval(), torch.randn(2, 9, 16)
    inside, outside = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def run(backend: str, engine: str) -> tuple[str, str, set[str]]:
        with lcconformer.backend(backend), lcconformer.engine(engine):
            inside.wait()  # both are in their blocks
            with torch.no_grad(), record() as served:
                encoder(x)
            found = forced_backend(), forced_engine(), set(served.values())
            outside.wait()
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(run, "torch", "modules"), pool.submit(run, "cpu", "loop")
        assert first.result(120) == ("torch", "modules", {"torch"})
        assert second.result(120) == ("cpu", "loop", {"cpu"})
    assert (forced_backend(), forced_engine()) == ("auto", "auto")


def test_blocks_nest_and_end_with_an_error():
    with lcconformer.backend("torch"):
        with lcconformer.backend("cpu"):
            assert forced_backend() == "cpu"
        with (
            pytest.raises(ValueError, match="unknown backend"),
            lcconformer.backend("auto"),
            lcconformer.backend("gpu"),
        ):
            pass
        assert forced_backend() == "torch"


def test_a_loop_is_recomputed_on_the_backends_of_its_forward():
    """On a GPU autograd recomputes on a thread of its own; here the backward is called from one."""
    encoder, x = ConformerEncoder(CONFIG), torch.randn(2, 9, 16)
    encoder.gradient_checkpointing = True
    with lcconformer.backend("torch"), lcconformer.engine("modules"):
        out = encoder(x)[0].square().mean()
    with ThreadPoolExecutor(1) as pool:

        def backward() -> set[str]:
            with record() as served:
                out.backward()
            return set(served.values())

        assert pool.submit(backward).result(120) == {"torch"}


def test_a_compiled_op_follows_the_block():
    x, weight = torch.randn(2, 9, 16), torch.ones(16)
    calls = []

    def count(graph, inputs):
        calls.append(graph)
        return graph

    compiled = torch.compile(lcconformer.ops.residual_layer_norm, fullgraph=True, backend=count)
    compiled(x, x, weight, weight)
    with lcconformer.backend("torch"):
        compiled(x, x, weight, weight)
    assert len(calls) == 2
