"""The encoders that each phase of ``bench/gpu.sh`` times, the most informative first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lcconformer.ops.samples import Sizes
from lcconformer.tune import LayerShape

from ..core.case import Case

__all__ = ["DOCTOR", "Timed", "layer_shapes", "odd_shapes", "timed"]

# a batch with padding that fills no tile
DOCTOR = Sizes(batch=3, frames=203)
OURS = "lcconformer:triton,lcconformer:triton+graphs,lcconformer:triton+loop,lcconformer:triton+loop+graphs"
LOOP = "lcconformer:triton+loop,lcconformer:triton+loop+graphs"
CLUSTER = "lcconformer:cuda+cluster,lcconformer:cuda+cluster+graphs"
PEERS = "eager,sdpa,torchaudio,transformers,lcconformer:triton+loop,lcconformer:triton+loop+graphs"
GOALS = (
    ("inference", 1, 100), ("training", 32, 400), ("inference", 32, 400),
    ("training", 8, 400), ("inference", 32, 1500),
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """A case, the names of its providers, and whether it is the ladder instead."""

    case: Case
    providers: str
    ladder: bool = False

    def __str__(self) -> str:
        return f"ladder: {self.case}" if self.ladder else str(self.case)


def timed(phase: int, small: bool) -> list[Timed]:
    """What phase 4, 6 or 7 times.

    Args:
        small: tiny shapes on the CPU.
    """
    if small:
        tiny = Case("inference", 2, 8, d_model=32, layers=2, depth=2, kernel=7)
        training = tiny.replace(mode="training")
        ours = "eager,lcconformer:triton,lcconformer:triton+loop"
        return {
            4: [Timed(tiny, ours), Timed(training, ours)],
            6: [Timed(tiny.replace(d_model=48), "eager,lcconformer:triton")],
            7: [
                Timed(tiny, PEERS),
                Timed(training.replace(dtype="amp"), "eager,lcconformer:torch"),
                Timed(tiny, "", True),
            ],
        }[phase]

    def case(mode: str, batch: int, frames: int, d_model: int = 256, dtype: str = "bfloat16") -> Case:
        return Case(mode, batch, frames, d_model, dtype=dtype, device="cuda")

    long = ("training", 32, 1500)
    if phase == 4:
        chunk = Timed(case("inference", 1, 16), f"eager,compile:graphs,{LOOP},{CLUSTER}")
        return [*(Timed(case(*goal), f"eager,compile,{OURS}") for goal in GOALS), chunk]
    if phase == 6:
        wide = [(*goal, d) for d in (512, 768) for goal in (*GOALS, long)]
        return [Timed(case(*goal), f"eager,compile:graphs,{LOOP}") for goal in ((*long, 256), *wide)]
    return [
        *(Timed(case(*goal, dtype="amp"), f"eager,compile:graphs,{OURS}") for goal in GOALS[1::2]),
        *(Timed(case(*goal), PEERS) for goal in GOALS[1:3]),
        *(Timed(case(*goal), "", ladder=True) for goal in GOALS[:2]),
    ]


def layer_shapes(small: bool) -> Sequence[LayerShape]:
    """Shapes at which kernels are timed alone, with dropout as in training and without."""
    if small:
        return [LayerShape(2, 8, 32, heads=1, kernel_size=7, dropout=0.1, dtype="float32")]
    return [LayerShape(b, t, dropout=p) for b, t in ((32, 400), (32, 1500), (1, 100)) for p in (0.1, 0.0)]


def odd_shapes(small: bool) -> Sequence[LayerShape]:
    """Shapes that fill no tile, for the sanitizers."""
    if small:
        return [LayerShape(3, 7, 32, heads=1, dropout=0.1, dtype="float32")]
    return [LayerShape(3, frames, dropout=0.1) for frames in (77, 203)]
