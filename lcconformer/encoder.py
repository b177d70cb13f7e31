"""The encoder: one shared layer (or a few) looped as deep as asked."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import loop, pretrained
from .config import ConformerConfig
from .depth import ExitRule
from .layer import Positions
from .loop import weights
from .ops.checks import check_lengths, check_tensor, frame_mask
from .packing import Packing, check_packed, longest_utterance, pack, unpack
from .quantization import count_weights
from .stack import LayerStack
from .streaming import StreamingEncoder
from .subsampling import FrontEnd

__all__ = ["ConformerEncoder", "Summary"]


@dataclass(frozen=True)
class Summary:
    """Parameters and arithmetic of an encoder (:meth:`lcconformer.ConformerEncoder.summary`).

    ``unique`` counts stored parameters, ``effective`` what the same depth would hold without sharing; ``flops[k]`` is the
    forward cost of depth k+1 in floating-point operations (a multiply-add is two) for one utterance of ``frames`` frames
    at the layers, front end included; ``front_end_flops`` is the front end's part of it, the same at every depth.
    """

    unique: int
    effective: int
    per_layer: int
    frames: int
    flops: tuple[int, ...]
    front_end_flops: int

    @property
    def ratio(self) -> float:
        """How many times fewer parameters sharing stores."""
        return self.effective / self.unique

    def __str__(self) -> str:
        rows = [
            f"parameters stored    {self.unique:>13,}",
            f"without sharing      {self.effective:>13,}   ({self.ratio:.2f}x)",
            f"one layer            {self.per_layer:>13,}",
            f"depth   GFLOP for {self.frames} frames",
        ]
        if self.front_end_flops:
            rows[-1] += f" (front end {self.front_end_flops / 1e9:.3f})"
        rows += [f"{k:>5}   {flops / 1e9:.3f}" for k, flops in enumerate(self.flops, 1)]
        return "\n".join(rows)


class ConformerEncoder(LayerStack):
    """A Conformer whose depth is a run-time choice and whose layers may share one set of weights (arXiv 2105.00812).

    Args:
        config: see :class:`~lcconformer.ConformerConfig`.

    Attributes:
        gradient_checkpointing: keep no more than the input of each loop for the backward, which recomputes the loop
            (arXiv 1604.06174); False to begin with.

    Example:
        >>> encoder = ConformerEncoder(ConformerConfig(input_dim=80, num_layers=12))
        >>> output, lengths = encoder(torch.randn(2, 400, 80), torch.tensor([400, 320]))
        >>> shallow, _ = encoder(torch.randn(2, 400, 80), depth=5)
    """

    # of the encoder within a Conformer, whose forward has a path for torch.jit.script that does not call the encoder's
    _has_scripted_path = False

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__(config, FrontEnd(config) if config.input_dim is not None else None)

    def __prepare_scriptable__(self) -> ConformerEncoder:
        """Refuse ``torch.jit.script``, which asks this of every module it is about to compile."""
        if not self._has_scripted_path:
            raise NotImplementedError(
                "ConformerEncoder: torch.jit.script cannot compile it: its forward returns what its options ask for, which "
                "TorchScript has no type for, and chooses among kernels in Python; use torch.jit.trace, whose program takes "
                "any batch size and length, or torch.export, or script a lcconformer.Conformer, torchaudio's model"
            )
        return self

    def subsampled_lengths(self, lengths: Tensor) -> Tensor:
        """Return the number of output frames for ``lengths`` input frames."""
        return lengths if self.front_end is None else self.front_end.lengths(lengths)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        depth: int | None = None,
        return_hidden_states: bool = False,
        backprop_depth: int | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, list[Tensor]]:
        """Run ``depth`` loops.

        Args:
            x: ``[B, T, input_dim]``, or ``[B, T, d_model]`` without ``input_dim``.
            lengths: ``[B]`` int64 real frames (0 ... T); None: all T.
            depth: number of loops, 1 ... ``num_layers``; None: all.  The loops are the first ``depth`` of a full run.
            return_hidden_states: also return the input of the first loop and the output of each: ``depth + 1`` tensors.
            backprop_depth: gradients flow through the last ``backprop_depth`` loops only, 1 ... ``depth`` (truncated
                backpropagation, arXiv 2502.05171): the memory of that many, and none for the front end unless it is all
                of them.  None: all.

        Returns:
            ``(output [B, T', d_model], lengths [B] or None[, hidden_states])``.  The output at depth k equals hidden state
            k of a full run exactly.  Frames beyond the length carry no meaning.

        Raises:
            ValueError: shapes, lengths, depth or backprop_depth out of range.
        """
        x, lengths = self._enter(x, lengths)
        outputs = self._loops(x, lengths, depth, return_hidden_states, backprop_depth)
        if return_hidden_states:
            return outputs[-1], lengths, [x, *outputs]
        return outputs[-1], lengths

    def packed(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        *,
        longest: int | None = None,
        depth: int | None = None,
        return_hidden_states: bool = False,
        backprop_depth: int | None = None,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        """Run ``depth`` loops over a packed batch, whose utterances stand behind one another without padding.

        Each utterance gets what it gets in a padded batch under ``padding="masked"``, statistics of a BatchNorm included.

        Args:
            x: ``[total, input_dim]``, or ``[total, d_model]`` without ``input_dim``; :func:`~lcconformer.pack` makes it.
            cu_seqlens: ``[B+1]`` int32 or int64; utterance b is the frames ``cu_seqlens[b] ... cu_seqlens[b+1]-1``.
            longest: frames of the longest utterance, or more; None: read from ``cu_seqlens``, for which a GPU is waited for.
                So it is where a front end merges frames, whatever ``longest`` is.
            depth, return_hidden_states, backprop_depth: as for :meth:`forward`.

        Returns:
            ``(output [total', d_model], cu_seqlens [B+1][, hidden_states])``, frames merged by the front end counted once.

        Raises:
            ValueError: shapes, values, depth or backprop_depth out of range.
            NotImplementedError: a front end merges frames with ``padding="peer"``, which lets it see padding.
        """
        x, packing = self._enter_packed(x, cu_seqlens, longest)
        outputs = self._loops(x, packing, depth, return_hidden_states, backprop_depth)
        if return_hidden_states:
            return outputs[-1][0], packing.cu_seqlens, [x[0], *(y[0] for y in outputs)]
        return outputs[-1][0], packing.cu_seqlens

    def _loops(
        self,
        x: Tensor,
        lengths: Tensor | Packing | None,
        depth: int | None,
        return_hidden_states: bool,
        backprop_depth: int | None,
    ) -> list[Tensor]:
        """Run the loops of ``x [B, T, d_model]``, or of a packed ``[1, total, d_model]``; return the output of each if
        ``return_hidden_states``, else of the last.
        """
        depth = self._check_depth(depth)
        through = self._check_backprop_depth(backprop_depth, depth)
        run = loop.choose(self, x, through, packed=isinstance(lengths, Packing))
        return run(self, x, lengths, depth, return_hidden_states)

    def streaming(
        self, *, chunk: int = 16, left: int = 64, right: int = 4, depth: int | None = None
    ) -> StreamingEncoder:
        """Return this encoder as one that runs chunk by chunk; the parameters are shared.

        Args:
            chunk: frames at the layers that a call outputs.
            left: frames before a chunk that attention sees.
            right: frames after a chunk that it sees, which the output waits for, whatever the depth.
            depth: number of loops, 1 ... ``num_layers``; None: all.

        Raises:
            ValueError: an argument is out of range.
            NotImplementedError: a module sees the whole utterance: a GroupNorm, rotary positions of hidden states, a front end
                that sees padding.
        """
        return StreamingEncoder(self, chunk, left, right, depth)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``config.json``, ``model.safetensors`` and a model card to a directory, which is made.

        Each file is replaced atomically.  The card, ``README.md``, says what the configuration tells and how to load it;
        training data and licence are marked places for you to fill in.  One that was edited is left as it is.

        Returns:
            The directory.

        Raises:
            ValueError: adapters, parametrisations and the like have changed the encoder, so that its configuration no longer
                describes it.
            OSError: the files cannot be written.
        """
        return pretrained.save(self, directory)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> ConformerEncoder:
        """Load an encoder that :meth:`save_pretrained` wrote.

        Nothing in the files is executed, and they are checked before memory is taken for what they describe.

        Returns:
            The encoder, in evaluation mode, on the CPU, every tensor in the dtype it was saved in.

        Raises:
            FileNotFoundError: there is no such directory, or a file is missing from it.
            ValueError: a file is damaged, of another class or version, or the two do not fit each other.
        """
        return pretrained.load(cls, directory)

    @torch.no_grad()
    def adaptive(
        self,
        x: Tensor,
        lengths: Tensor | None,
        rule: ExitRule,
        *,
        measure: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run each utterance until ``rule`` stops it; finished utterances leave the batch.

        Reads values on the host after every loop, so it cannot be compiled or captured in a CUDA graph; but within
        ``with lcconformer.engine("cluster")``, where all loops are one launch.

        Args:
            x, lengths: as for :meth:`forward`.
            rule: when to stop.
            measure: what falls below the threshold of ``rule``, called with two successive hidden states
                ``[B', T', d_model]``, the new one first, and their frames ``[B']`` or None; returns ``[B']``.  None:
                :meth:`ExitRule.distance`.

        Returns:
            ``(output [B, T', d_model], lengths [B] or None, exit_depths [B] int64)``.

        Raises:
            NotImplementedError: ``engine("cluster")`` cannot serve.
        """
        most, measure = self._check_depth(rule.depth), measure or rule.distance
        x, lengths = self._enter(x, lengths)
        at_once = loop.adaptive(self, x, lengths, rule, most)
        if at_once is not None:
            return at_once[0], lengths, at_once[1]
        positions: dict[int, Positions] = {}
        output, all_lengths = torch.empty_like(x), lengths
        exit_depths = torch.full((x.shape[0],), most, dtype=torch.int64, device=x.device)
        active = torch.arange(x.shape[0], device=x.device)  # rows of the original batch that still run
        for k in range(1, most + 1):
            new = self.step(k - 1, x, lengths, positions)
            done = torch.zeros(len(active), dtype=torch.bool, device=x.device)
            if rule.kind != "fixed" and k >= rule.min_depth and k < most:
                done = measure(new, x, lengths) < rule.threshold
            if k == most:
                done = ~done
            output[active[done]] = new[done]
            exit_depths[active[done]] = k
            x, active = new[~done], active[~done]
            lengths = None if lengths is None else lengths[~done]
            if not len(active):
                break
        return output, all_lengths, exit_depths

    def summary(self, frames: int = 400) -> Summary:
        """Count parameters, unique and effective, and FLOPs per depth for one utterance of ``frames`` frames at the layers.

        Counted: every matrix product, 6 T^2 d for relative attention (4 T^2 d without), 2 K d T for the depthwise
        convolution, the position projection once per unique layer, and the front end, whose input is
        ``frames * subsampling_factor`` frames long.
        """
        c, t, d = self.config, frames, self.config.d_model
        unique, per_layer = count_weights(self), count_weights(self.layers[0])
        effective = unique + per_layer * (c.num_layers - len(self.layers))
        matrices = 2 * t * (4 * d * c.ffn_dim + 7 * d * d)
        attention = (6 if c.position == "relative" else 4) * t * t * d
        loop = matrices + attention + 2 * c.conv_kernel_size * d * t
        positions = 2 * (2 * t - 1) * d * d if c.position == "relative" else 0
        front = 0 if self.front_end is None else self.front_end.flops(frames)
        flops = tuple(front + k * loop + len(set(self.layer_map[:k])) * positions for k in range(1, c.num_layers + 1))
        return Summary(unique, effective, per_layer, frames, flops, front)

    def extra_repr(self) -> str:
        loops, layers = self.config.num_layers, len(self.layers)
        return f"{loops} loop{'s' * (loops > 1)} of {layers} layer{'s' * (layers > 1)}, sharing={self.config.sharing!r}"

    def explain(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        depth: int | None = None,
    ) -> loop.Explanation:
        """Say which engine and which backend of each op would serve a call, and why nothing faster would.

        It holds for the present grad mode, training modes, ``with engine(...)`` and ``with backend(...)`` blocks.

        Args:
            x, lengths, depth: as for :meth:`forward`; the front end runs, the loops do not.
            cu_seqlens: explain a call of :meth:`packed`, with its ``x``.

        Returns:
            An object with fields, which prints as a few lines to read.

        Example:
            >>> print(encoder.eval().explain(torch.randn(1, 100, 80)))
        """
        self._check_depth(depth)
        if cu_seqlens is None:
            return loop.explain(self, self._enter(x, lengths)[0])
        if lengths is not None:
            raise ValueError(
                "ConformerEncoder: explain got lengths and cu_seqlens; a packed batch has cu_seqlens alone"
            )
        return loop.explain(self, self._enter_packed(x, cu_seqlens, None)[0], packed=True)

    def forget_packed_weights(self) -> None:
        """Drop the packed copies of the weights that inference keeps; the next call packs them anew.

        Needed only after writing a few elements in ways that PyTorch does not count (through ``p.data`` or ``p.numpy()``) and
        ahead of short calls; longer ones compare every value.
        """
        weights.forget(self)

    def _check_depth(self, depth: int | None) -> int:
        n = self.config.num_layers
        if depth is None:
            return n
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= n:
            raise ValueError(f"ConformerEncoder: depth is {depth!r}; expected an integer from 1 to num_layers = {n}")
        return depth

    def _check_backprop_depth(self, backprop_depth: int | None, depth: int) -> int:
        through = depth if backprop_depth is None else backprop_depth
        if not isinstance(through, int) or isinstance(through, bool) or not 1 <= through <= depth:
            raise ValueError(
                f"ConformerEncoder: backprop_depth is {backprop_depth!r}; expected an integer from 1 to depth = {depth}"
            )
        return through

    def _enter(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        width = self.config.input_dim or self.config.d_model
        check_tensor("ConformerEncoder", "input", x)
        if x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"ConformerEncoder: input has shape {list(x.shape)}; expected [B, T, {width}]")
        if not x.is_floating_point():
            raise ValueError(f"ConformerEncoder: input has dtype {x.dtype}; expected a floating dtype")
        check_lengths("ConformerEncoder", lengths, x.shape[0], x.shape[1], x.device)
        if self.front_end is not None:
            x, lengths = self.front_end(x, lengths)
        if lengths is not None and self.config.padding == "masked":
            # whatever the padding holds, NaN included, ends here
            x = x.masked_fill(~frame_mask(lengths, x.shape[1])[..., None], 0.0)
        return x, lengths

    def _enter_packed(self, x: Tensor, cu_seqlens: Tensor, longest: int | None) -> tuple[Tensor, Packing]:
        """Check a packed batch and run the front end: ``[total, input_dim] -> [1, total', d_model]``."""
        config = self.config
        check_packed("ConformerEncoder", x, config.input_dim or config.d_model, cu_seqlens)
        longest = longest_utterance("ConformerEncoder", cu_seqlens, longest)
        if self.front_end is not None and config.subsampling == "none":
            x, _ = self.front_end(x[None], None)
            x = x[0]
        elif self.front_end is not None:
            if config.padding == "peer":
                raise NotImplementedError(
                    f"ConformerEncoder: subsampling={config.subsampling!r} with padding='peer' sees padding, and a packed "
                    "batch has none; use padding='masked', or a padded batch"
                )
            y, lengths = self.front_end(unpack(x, cu_seqlens, longest), cu_seqlens.diff())
            x, cu_seqlens = pack(y, lengths)
            longest = y.shape[1]
        return x[None], Packing.of(cu_seqlens, x.shape[0], longest)
