"""What is measured: a :class:`Case` is one mode, shape, width, depth and dtype on one device."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DTYPES", "FRAME_SECONDS", "OPS", "Case", "parse_shapes"]

# "amp" is autocast to bfloat16 over float32 weights, "int8" has the weights of linear maps in 8 bits, the rest in float32
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "amp": torch.float32,
    "int8": torch.float32,
}
OPS = ("relpos_attention", "glu_depthwise_conv", "feed_forward", "residual_layer_norm")
# the real-time factor counts a frame as 10 ms of speech, the hop of the log-mel features
FRAME_SECONDS = 0.01


@dataclass(frozen=True)
class Case:
    """One measurement of the suite.

    Attributes:
        mode: ``"inference"``, ``"training"`` (forward and backward, without the optimiser, which would favour shared
            weights), or ``"OP:forward"``, ``"OP:training"`` for an op of :data:`OPS`.
        batch, frames: B and T; every utterance has T frames.
        d_model: width; heads are 64 wide, the hidden layer of a feed-forward module is 4 d_model wide.
        layers: N, the number of layers that peers run.
        depth: number of loops that lcconformer runs, at most ``layers``.
        dtype: a key of :data:`DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
        dropout: rate in training.
        kernel: width of the depthwise convolution.

    Raises:
        ValueError: one of them is out of range; the message says what is expected.
    """

    mode: str
    batch: int
    frames: int
    d_model: int = 256
    layers: int = 12
    depth: int = 12
    dtype: str = "float32"
    device: str = "cpu"
    dropout: float = 0.1
    kernel: int = 31

    def __post_init__(self) -> None:
        op, _, direction = self.mode.partition(":")
        if self.mode not in ("inference", "training") and (op not in OPS or direction not in ("forward", "training")):
            raise ValueError(f"bench: mode is {self.mode!r}; expected inference, training, or OP:forward|training")
        if self.dtype not in DTYPES:
            raise ValueError(f"bench: dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.dtype == "int8" and (self.mode != "inference" or self.device != "cpu"):
            raise ValueError(f"bench: {self.mode} in int8 on {self.device}; int8 is for inference on a CPU")
        if min(self.batch, self.frames, self.layers) < 1:
            raise ValueError(f"bench: {self.batch}x{self.frames}, {self.layers} layers; expected positive sizes")
        if self.d_model < 2 or self.d_model % 2 or (self.d_model > 64 and self.d_model % 64):
            raise ValueError(f"bench: d_model is {self.d_model}; expected a multiple of 64 (or a smaller even number)")
        if not 1 <= self.depth <= self.layers:
            raise ValueError(f"bench: depth is {self.depth}; expected 1 to the number of layers, {self.layers}")

    @property
    def op(self) -> str | None:
        """Name of the op; None for the encoder."""
        return self.mode.partition(":")[0] if ":" in self.mode else None

    @property
    def backward(self) -> bool:
        return self.mode.endswith("training")

    @property
    def num_heads(self) -> int:
        return max(self.d_model // 64, 1)

    @property
    def ffn_dim(self) -> int:
        return 4 * self.d_model

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of weights and input."""
        return DTYPES[self.dtype]

    @property
    def element_size(self) -> int:
        """Bytes of one activation where a GEMM reads it."""
        return 2 if self.dtype == "amp" else self.torch_dtype.itemsize

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == "amp":
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()

    def place(self, module: nn.Module) -> nn.Module:
        return module.to(device=self.device, dtype=self.torch_dtype)

    def input(self, seed: int = 0) -> Tensor:
        """Random input of the encoder or op: the same numbers on every device, rounded to the dtype."""
        generator = torch.Generator().manual_seed(seed)
        b, t, d = self.batch, self.frames, self.d_model
        shape = {
            "relpos_attention": (b, t, 3, self.num_heads, d // self.num_heads),  # q, k, v
            "glu_depthwise_conv": (b, t, 2 * d),
            "residual_layer_norm": (b, 2, t, d),  # x, y
        }.get(self.op or "", (b, t, d))
        x = torch.randn(shape, generator=generator)
        return x.to(device=self.device, dtype=self.torch_dtype).requires_grad_(self.backward)

    def __str__(self) -> str:
        text = f"{self.mode} B={self.batch} T={self.frames} d={self.d_model}"
        return text + (f" {self.dtype}" if self.op else f" N={self.layers} {self.dtype}")


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """``"1x400,8x400"`` -> ``[(1, 400), (8, 400)]``, pairs of batch and frames.

    Raises:
        ValueError: the text is anything else.
    """
    try:
        shapes = [(int(b), int(t)) for b, t in (part.lower().split("x") for part in text.split(","))]
    except ValueError:
        raise ValueError(f"bench: shapes are {text!r}; expected BATCHxFRAMES,... such as 1x400,8x400") from None
    return shapes
