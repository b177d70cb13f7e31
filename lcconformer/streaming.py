"""Streaming: an encoder that runs chunk by chunk, and the same computation on whole utterances.

Frames are those of the layers, behind the front end.  An utterance is cut into chunks of C frames.  With each goes a view of
the R frames after it; chunk and view are a block, and every loop computes all frames of a block, from

- attention: ``left`` frames before the chunk, as they left their own chunk's block, and the block;
- convolution: frames before the chunk likewise, and zeros behind the block.

So the view does not grow with the depth: what is output waits for R frames, whatever the number of loops.  The frames of the
view are computed again in the next block, (C + R) / C times the work, as in Emformer (Shi et al. 2020, arXiv 2010.10759).
Zeros behind the block make the convolution a chunk's own, as in dynamic chunk convolution (Li et al. 2023, arXiv 2304.09325),
so that the weights of an encoder with a centred convolution can be used.  With R = 0 attention has the chunk mask of WeNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import loop
from .blocks import Chunking, Neighbours, Past, Remembered
from .layer import Positions
from .loop import modules, streams
from .ops.checks import check_lengths, check_shape, check_tensor, frame_mask
from .stack import LayerStack
from .validation import is_integer

__all__ = ["StreamState", "StreamingEncoder"]


class StreamState(NamedTuple):
    """What streams remember between chunks; a tuple of tensors with static shapes.

    Attributes:
        seen: ``[B]`` int64 frames of the utterance that are output.
        keys, values: ``[N, B, left, H, D]`` of each loop.
        convolution: ``[N, B, K // 2, 2 d_model]`` of each loop: what its convolution sees before a chunk.
        front_end: ``[B, channels, 1, width]`` of each convolution of the front end: the last frame of its input.
    """

    seen: Tensor
    keys: Tensor
    values: Tensor
    convolution: Tensor
    front_end: tuple[Tensor, ...]

    def restart(self, rows: Tensor) -> StreamState:
        """Return the state with the streams of ``rows [B]`` bool at the start of an utterance."""

        def cleared(x: Tensor, dim: int) -> Tensor:
            return x.masked_fill(rows.view(*(1,) * dim, -1, *(1,) * (x.dim() - dim - 1)), 0)

        return StreamState(
            cleared(self.seen, 0),
            cleared(self.keys, 1),
            cleared(self.values, 1),
            cleared(self.convolution, 1),
            tuple(cleared(x, 0) for x in self.front_end),
        )


class StreamingEncoder(nn.Module):
    """An encoder that runs chunk by chunk (:meth:`lcconformer.ConformerEncoder.streaming`), with the encoder's parameters.

    Calling it takes the next block of each of B streams, which are independent: some may be in the middle of an utterance
    while others begin or wait.  It is a function of tensors with static shapes, for ``torch.export``.

    An utterance of T frames takes ceil(T / chunk) calls; call i gets its frames ``i * chunk ... (i + 1) * chunk + right - 1``,
    as many as there are, and returns the outputs of ``i * chunk ... (i + 1) * chunk - 1``.  Where less than a block is left,
    the lengths say so; after the last call the stream is restarted by :meth:`StreamState.restart`.  A length of 0 lets a
    stream wait.

    Args:
        encoder: which one.
        chunk, left, right: frames at the layers: of a chunk, of attention before it, and of the view after it.
        depth: loops, 1 ... ``num_layers``; None: all.
    """

    encoder: Any  # a ConformerEncoder, whose module imports this one

    def __init__(self, encoder: Any, chunk: int, left: int, right: int, depth: int | None) -> None:
        super().__init__()
        config = encoder.config
        for name, value, least in (("chunk", chunk, 1), ("left", left, 0), ("right", right, 0)):
            if not is_integer(value) or value < least:
                raise ValueError(f"streaming: {name} is {value!r}; expected an integer of at least {least}")
        if config.conv_norm == "group":
            raise NotImplementedError(
                "streaming: a GroupNorm takes statistics over all frames of an utterance; use conv_norm='layer', 'batch' or "
                "'none'"
            )
        if config.position == "rotary" and config.rotary_input == "hidden":
            raise NotImplementedError(
                "streaming: rotary_input='hidden' makes keys depend on where the utterance began; use 'query_key', or "
                "position='relative'"
            )
        if config.subsampling != "none" and config.padding == "peer":
            raise NotImplementedError(
                f"streaming: subsampling={config.subsampling!r} with padding='peer' sees padding, which a stream has none of; "
                "use padding='masked'"
            )
        self.encoder, self.training = encoder, encoder.training
        self.chunking = Chunking(chunk, left, right, config.conv_kernel_size // 2)
        self.depth = encoder._check_depth(depth)

    def extra_repr(self) -> str:
        chunk, left, right, _ = self.chunking
        return f"chunk={chunk}, left={left}, right={right}, depth={self.depth}"

    def start(self, batch: int) -> StreamState:
        """Return the state of ``batch`` streams at the start of their utterances."""
        config, like = self.encoder.config, next(self.encoder.layers.parameters())
        n, d, h = self.depth, config.d_model, config.num_heads
        keys = like.new_zeros(n, batch, self.chunking.left, h, d // h)
        front_end = self.encoder.front_end
        return StreamState(
            torch.zeros(batch, dtype=torch.int64, device=like.device),
            keys,
            keys.clone(),
            like.new_zeros(n, batch, self.chunking.reach, 2 * d),
            () if front_end is None else front_end.start(batch),
        )

    def forward(self, x: Tensor, lengths: Tensor, state: StreamState) -> tuple[Tensor, Tensor, StreamState]:
        """Run the next block of each stream.

        Args:
            x: ``[B, (chunk + right) * factor, input_dim]``, with the front end's ``subsampling_factor``; or
                ``[B, chunk + right, d_model]`` without ``input_dim``.
            lengths: ``[B]`` int64 or int32 real frames of ``x``: all of them but for the last blocks of an utterance; 0: the
                stream waits.
            state: as :meth:`start` or the last call returned it.

        Returns:
            ``(output [B, chunk, d_model], lengths [B], state)``.  Frames beyond the length carry no meaning.

        Raises:
            ValueError: shapes, dtypes or lengths that do not fit.
            NotImplementedError: a BatchNorm is in training mode.
        """
        encoder, chunking = self.encoder, self.chunking
        config = encoder.config
        self._check_norms()
        check_tensor("streaming", "input", x)
        width = config.input_dim or config.d_model
        batch = state.seen.shape[0]
        check_shape(
            "streaming", "input", x, (batch, chunking.block * config.subsampling_factor, width), "[B, frames, width]"
        )
        check_tensor("streaming", "lengths", lengths)
        check_lengths("streaming", lengths, batch, x.shape[1], x.device)
        past_of_front_end = state.front_end
        if encoder.front_end is not None:
            goes_on = lengths > 0
            x, lengths, past_of_front_end = encoder.front_end.step(x, lengths, chunking.chunk, state.front_end)
            past_of_front_end = tuple(
                torch.where(goes_on[:, None, None, None], new, old)
                for new, old in zip(past_of_front_end, state.front_end)
            )
        x = x.masked_fill(~frame_mask(lengths, chunking.block)[..., None], 0.0)
        pasts = [Past(*of_loop) for of_loop in zip(state.keys, state.values, state.convolution)]
        run = streams.run if self._packed(x) else _run_modules
        x, pasts = run(encoder, x, lengths, state.seen, pasts, chunking)
        lengths = lengths.clamp(max=chunking.chunk)
        keys, values, convolution = (torch.stack(x) for x in zip(*pasts))
        after = StreamState(state.seen + lengths, keys, values, convolution, past_of_front_end)
        return x[:, : chunking.chunk], lengths, after

    def whole(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        return_hidden_states: bool = False,
        backprop_depth: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, list[Tensor]]:
        """Compute what a stream would output, all chunks of whole utterances at once: for training, and to test with.

        Args:
            x, lengths, return_hidden_states, backprop_depth: as for :meth:`lcconformer.ConformerEncoder.forward`.

        Returns:
            as that does; hidden states are those of a chunk in its own block.

        Raises:
            ValueError: shapes, lengths or backprop_depth out of range.
            NotImplementedError: a BatchNorm is in training mode.
        """
        self._check_norms()
        encoder, (chunk, _, right, _) = self.encoder, self.chunking
        x, lengths = encoder._enter(x, lengths)
        backprop_depth = encoder._check_backprop_depth(backprop_depth, self.depth)
        b, t, _ = x.shape
        count = -(-t // chunk)
        real = torch.full((b,), t, device=x.device) if lengths is None else lengths
        x = x.masked_fill(~frame_mask(real, t)[..., None], 0.0)
        if not x.numel():
            outputs = [x] * self.depth
        else:
            after = F.pad(x, (0, 0, 0, count * chunk + right - t))
            blocks = after.unfold(1, chunk + right, chunk).movedim(-1, 2).flatten(0, 1)  # [B * n, Q, d_model]
            outputs = [
                y[:, :chunk].reshape(b, count * chunk, -1)[:, :t]
                for y in modules.run(
                    encoder,
                    blocks,
                    Neighbours(self.chunking, real, count),
                    self.depth,
                    return_hidden_states,
                    backprop_depth=backprop_depth,
                )
            ]
        if return_hidden_states:
            return outputs[-1], lengths, [x, *outputs]
        return outputs[-1], lengths

    def blocks(self, x: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut whole utterances into the inputs of successive calls, ``(x [B, frames, width], lengths [B])``.

        Args:
            x: ``[B, T, input_dim or d_model]``.
            lengths: ``[B]`` real frames.
        """
        factor = self.encoder.config.subsampling_factor
        step, size = self.chunking.chunk * factor, self.chunking.block * factor
        x = F.pad(x, (0, 0, 0, size))
        for first in range(0, x.shape[1] - size, step):
            yield x[:, first : first + size], (lengths - first).clamp(0, size)

    def _packed(self, x: Tensor) -> bool:
        """Whether the packed weights of the CPU serve ``x``, by the same rules as for whole utterances."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
            return False
        return loop.decide(self.encoder, x, self.depth).engine == "inference"

    def _check_norms(self) -> None:
        if self.encoder.config.conv_norm == "batch" and any(
            m.training for m in self.encoder.layers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ):
            raise NotImplementedError(
                "streaming: a BatchNorm in training mode takes statistics over blocks, whose frames overlap; call .eval() on "
                "it, or use conv_norm='layer'"
            )


def _run_modules(
    stack: LayerStack, x: Tensor, lengths: Tensor, seen: Tensor, pasts: list[Past], chunking: Chunking
) -> tuple[Tensor, list[Past]]:
    """Run the loops of the next blocks module by module, as :func:`lcconformer.loop.streams.run` does on packed weights."""
    positions: dict[int, Positions] = {}
    after = []
    for k, past in enumerate(pasts):
        blocks = Remembered(chunking, lengths, seen, past)
        x = stack.step(k, x, blocks, positions)
        after.append(blocks.past)
    return x, after
