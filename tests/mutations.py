"""Change lines of the kernels and of the dispatch to them one at a time, and require a named test to fail each time.

``python tests/mutations.py [--match TEXT] [--jobs N] [--out FILE]`` copies the tracked files to a temporary folder, builds the
C++ extension there if a chosen change needs it, and runs the named tests, which must pass.  Then each change is made, built,
tested and undone:

  caught    an assertion of the test failed
  MISSED    the test passed
  BROKEN    no answer: the build failed, or the test was skipped, not found, or stopped by something else, or does not pass
            without the change

With ``--jobs``, so many copies share the changes.  With ``--out``, each outcome is filed when it is known, and a change that
is filed as caught, in the same file by the same test file, is not made again: an interrupted run goes on.

The exit status is 0 if all were caught.  The checkout is only read, but for FILE.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

CHECKOUT = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds of one build or one run of pytest
# how junit's message starts where a test said no; anything else (a NameError in a kernel, ...) is no answer
ASSERTED = ("AssertionError", "assert ", "Failed: ")


@dataclass(frozen=True)
class Mutation:
    """``before``, which occurs once in ``file``, becomes ``after``, and ``test``, the node id of one test, fails."""

    name: str
    file: str
    before: str
    after: str
    test: str

    @property
    def needs_extension(self) -> bool:
        """Whether the C++ extension is changed, or loaded by the test: without one in the copy, the checkout's would be."""
        return self.file.startswith(("csrc/cpu/", "lcconformer/"))

    def of(self, text: str) -> str:
        if text.count(self.before) != 1:
            raise ValueError(f"{self.name}: {self.before!r} occurs {text.count(self.before)} times in {self.file}")
        return text.replace(self.before, self.after)


ATTENTION, ON_ATTENTION = "kernels/relpos_attention.py", "tests/kernels/test_relpos_attention.py"
CONVOLUTION, ON_CONVOLUTION = "kernels/glu_depthwise_conv.py", "tests/kernels/test_glu_depthwise_conv.py"
CONVOLUTION_BACKWARD = "kernels/glu_depthwise_conv_backward.py"
LAYER_NORM, ON_LAYER_NORM = "kernels/residual_layer_norm.py", "tests/kernels/test_residual_layer_norm.py"
FEED_FORWARD, ON_FEED_FORWARD = "kernels/feed_forward.py", "tests/kernels/test_feed_forward.py"
PRODUCTS, ON_PRODUCTS = "kernels/feed_forward_products.py", "tests/kernels/test_feed_forward_products.py"
ON_STRIDES = "tests/kernels/test_strides.py"
CHAIN_PRODUCTS, ON_CHAIN_PRODUCTS = "kernels/chain_products.py", "tests/kernels/test_chain_products.py"
CHAIN_CONVOLUTION, ON_CHAIN_CONVOLUTION = "kernels/chain_convolution.py", "tests/kernels/test_chain_convolution.py"
ON_PARTIALS = "tests/kernels/test_partials.py"

TRITON = (
    Mutation(
        "attention: key mask removed",
        ATTENTION,
        '        s = tl.where(_inside(j0, keys, N)[None, :], s, float("-inf"))\n',
        "        s += 0.0\n",
        f"{ON_ATTENTION}::test_equals_the_oracle[1-2-16-None-fp32]",
    ),
    Mutation(
        "attention: a tile with missing keys taken for a full one",
        ATTENTION,
        "full = keys // N * N\n            for j0 in range(0, full, N):\n                m, ",
        "full = (keys + N - 1) // N * N\n            for j0 in range(0, full, N):\n                m, ",
        f"{ON_ATTENTION}::test_equals_the_oracle[7-2-32-lengths2-fp16]",
    ),
    Mutation(
        "attention: rotation of the relative shift off by one",
        ATTENTION,
        "input_precision=PRECISION), (j - i) & (N - 1), 1)",
        "input_precision=PRECISION), (j - i - 1) & (N - 1), 1)",
        f"{ON_ATTENTION}::test_equals_the_oracle[7-2-32-lengths2-fp32]",
    ),
    Mutation(
        "attention: rotated product of the previous tile not carried",
        ATTENTION,
        "return s, tl.where(age == 2, latest, r), r",
        "return s, tl.where(age == 2, latest, r), latest",
        f"{ON_ATTENTION}::test_equals_the_oracle[127-1-16-lengths5-fp16]",
    ),
    Mutation(
        "attention: accumulator not rescaled",
        ATTENTION,
        "acc * alpha[:, None]",
        "acc",
        f"{ON_ATTENTION}::test_equals_the_oracle[63-1-24-None-fp32]",
    ),
    Mutation(
        "attention: no guard for rows without keys",
        ATTENTION,
        "        denominator = tl.where(some, denominator, 1.0)\n",
        "",
        f"{ON_ATTENTION}::test_equals_the_oracle[65-1-64-lengths4-fp32]",
    ),
    Mutation(
        "attention: packed start ignored",
        ATTENTION,
        "stride_b + start * stride_t +",
        "stride_b +",
        f"{ON_ATTENTION}::test_packed[fp32]",
    ),
    Mutation(
        "attention: strides of `pos` assumed",
        ATTENTION,
        '"stride_pt": pos.stride(0), "stride_ph": pos.stride(1)',
        '"stride_pt": pos[0].numel(), "stride_ph": pos.shape[2]',
        f"{ON_STRIDES}::test_relpos_attention",
    ),
    Mutation(
        "attention: specialised on the number of frames",
        ATTENTION,
        'RUNTIME = ("T", "rows", ',
        'RUNTIME = ("rows", ',
        "tests/kernels/test_specialisations.py::test_one_specialisation_for_all_lengths_and_batches",
    ),
    Mutation(
        "attention: specialised on the alignment of the seed",
        ATTENTION,
        ', do_not_specialize_on_alignment=("seed_ptr",)',
        "",
        "tests/kernels/test_specialisations.py::test_one_specialisation_for_all_lengths_and_batches",
    ),
    Mutation(
        "attention: dropout words of another pitch",
        ATTENTION,
        "(j0 // 32) * _padded(T)",
        "(j0 // 32) * T",
        f"{ON_ATTENTION}::test_dropout_is_the_same_in_forward_and_backward[70-1-lengths0-dtype0]",
    ),
    Mutation(
        "attention: dropout bits of a word reversed",
        ATTENTION,
        "<< tl.arange(0, 32)[None, None, :]",
        "<< (31 - tl.arange(0, 32))[None, None, :]",
        f"{ON_ATTENTION}::test_dropout_words[2-3-70]",
    ),
    Mutation(
        "attention backward: delta not subtracted",
        ATTENTION,
        "w * (dp - delta[:, None])",
        "w * dp",
        f"{ON_ATTENTION}::test_equals_the_oracle[7-2-32-lengths2-fp32]",
    ),
    Mutation(
        "attention backward: scratch after the last key left as it was",
        ATTENTION,
        "// N * N, _padded(keys), N)",
        "// N * N, 0, N)",
        f"{ON_ATTENTION}::test_tiles_elsewhere[16-dtype0]",
    ),
    Mutation(
        "attention backward: positions of dq off by one",
        ATTENTION,
        "j = c0 - (M - 1) + ",
        "j = c0 - M + ",
        f"{ON_ATTENTION}::test_equals_the_oracle[7-2-32-lengths2-fp32]",
    ),
    Mutation(
        "attention backward: last positions of dq left out",
        ATTENTION,
        "tl.where(keys > 0, keys + M - 1, 0)",
        "keys",
        f"{ON_ATTENTION}::test_equals_the_oracle[65-1-64-lengths4-fp16]",
    ),
    Mutation(
        "attention backward: positions of dpos off by one",
        ATTENTION,
        "key = c0 - (T - 1) + ",
        "key = c0 - T + ",
        f"{ON_ATTENTION}::test_equals_the_oracle[7-2-32-lengths2-fp32]",
    ),
    Mutation(
        "attention backward: last queries of dpos left out",
        ATTENTION,
        "tl.minimum(queries, keys + T - 1 - c0), M)",
        "tl.minimum(queries, keys + T - 33 - c0), M)",
        f"{ON_ATTENTION}::test_equals_the_oracle[65-1-64-lengths4-fp16]",
    ),
    Mutation(
        "attention backward: only the first part of the batch in dpos",
        ATTENTION,
        "dpos.sum(0)",
        "dpos[0]",
        f"{ON_ATTENTION}::test_scratch_of_a_few_heads_at_a_time[10]",
    ),
    Mutation(
        "attention backward: dpos of the last heads alone",
        ATTENTION,
        "tl.where(first_head > 0, 2 * T - 1, 0)",
        "0",
        f"{ON_ATTENTION}::test_scratch_of_a_few_heads_at_a_time[3]",
    ),
    Mutation(
        "attention backward: scratch taken to start at the first head",
        ATTENTION,
        "own = (h + H - first_head % H) % H",
        "own = h",
        f"{ON_ATTENTION}::test_scratch_of_a_few_heads_at_a_time[3]",
    ),
    Mutation(
        "attention backward: dropout not applied to dP",
        ATTENTION,
        "        dp = tl.where(keep, dp * keep_scale, 0.0)\n",
        "",
        f"{ON_ATTENTION}::test_dropout_is_the_same_in_forward_and_backward[9-2-lengths1-dtype1]",
    ),
    Mutation(
        "attention backward: `u` assumed contiguous",
        ATTENTION,
        '"u_ptr": u.contiguous()',
        '"u_ptr": u',
        f"{ON_STRIDES}::test_relpos_attention",
    ),
    Mutation(
        "convolution: halo off by one",
        CONVOLUTION,
        "frame_at(x + (K - 1 - K // 2 + u) * (2 * C), mask",
        "frame_at(x + (K - K // 2 + u) * (2 * C), mask",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-1-5-1-None-fp32]",
    ),
    Mutation(
        "convolution: a frame beyond the length is read",
        CONVOLUTION,
        "(zero + t + (K - 1 - K // 2 + u) < n)",
        "(zero + t + (K - 1 - K // 2 + u) <= n)",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-203-40-3-lengths3-fp32]",
    ),
    Mutation(
        "convolution: a frame beyond the length is in the first window",
        CONVOLUTION,
        "(zero + t + j + u >= 0) & (zero + t + j + u < n)",
        "(zero + t + j + u >= 0) & (zero + t + j + u <= n)",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-7-24-31-lengths1-fp32]",
    ),
    Mutation(
        "convolution: frames before the first are read",
        CONVOLUTION,
        "mask_c & (zero + t + j + u >= 0)",
        "mask_c",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-7-24-31-lengths1-fp32]",
    ),
    Mutation(
        "convolution: window shifted one frame short",
        CONVOLUTION,
        "window = frames[STEP:]",
        "window = frames[STEP - 1 : STEP + K - 2]",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[running-65-24-3-lengths4-fp32]",
    ),
    Mutation(
        "convolution: frames assumed one after the other",
        CONVOLUTION,
        "return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()",
        "return x",
        f"{ON_CONVOLUTION}::test_strides[layer]",
    ),
    Mutation(
        "convolution: means of tiles not merged",
        CONVOLUTION,
        "mean + delta * (n / total)",
        "mean",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[batch-7-24-31-None-fp32]",
    ),
    Mutation(
        "convolution: distance of means left out of the variance",
        CONVOLUTION,
        "m2 + spread + delta * delta * (count * n / total)",
        "m2 + spread",
        f"{ON_CONVOLUTION}::test_statistics_of_many_tiles[batch]",
    ),
    Mutation(
        "convolution backward: bias accumulation dropped",
        CONVOLUTION_BACKWARD,
        "sum_dy += tl.where(mask_c & (zero + t + u < end), frames[u + K // 2], 0.0)",
        "sum_dy += 0.0",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-1-5-1-None-fp32]",
    ),
    Mutation(
        "convolution backward: taps not reversed",
        CONVOLUTION_BACKWARD,
        "taps_of(weight_ptr, offs_c, mask_c, K, True,",
        "taps_of(weight_ptr, offs_c, mask_c, K, False,",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-7-24-31-lengths1-fp32]",
    ),
    Mutation(
        "convolution backward: sums of taps not reversed",
        CONVOLUTION_BACKWARD,
        "sums[K - 1 - k]",
        "sums[k]",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-7-24-31-lengths1-fp32]",
    ),
    Mutation(
        "convolution backward: padding gets a gradient",
        CONVOLUTION_BACKWARD,
        "real = tl.minimum(real_frames(lengths_ptr, b, T), end)",
        "real = end",
        f"{ON_CONVOLUTION}::test_equals_the_oracle[none-7-24-31-lengths1-fp32]",
    ),
    Mutation(
        "convolution backward: statistics get gradients of padding",
        CONVOLUTION_BACKWARD,
        "tl.where((offs_t < n)[:, None], mean_dz + xhat * mean_dzx, 0.0)",
        "mean_dz + xhat * mean_dzx",
        f"{ON_CONVOLUTION}::test_statistics_of_many_tiles[group]",
    ),
    Mutation(
        "convolution backward: weights of the norm assumed contiguous",
        CONVOLUTION_BACKWARD,
        "\n    lengths, norm_weight, norm_bias = dense(lengths, norm_weight, norm_bias)",
        "\n    (lengths,) = dense(lengths)",
        f"{ON_STRIDES}::test_glu_depthwise_conv",
    ),
    Mutation(
        "LayerNorm: columns beyond D in the variance",
        LAYER_NORM,
        "tl.where(mask_d, s - mean[:, None], 0.0)",
        "s - mean[:, None]",
        f"{ON_LAYER_NORM}::test_equals_the_oracle[shape1-fp32]",
    ),
    Mutation(
        "LayerNorm backward: weight accumulation",
        LAYER_NORM,
        "sum_weight += tl.sum(dn * xhat, 0)",
        "sum_weight = tl.sum(dn * xhat, 0)",
        f"{ON_LAYER_NORM}::test_programs_of_several_row_blocks",
    ),
    Mutation(
        "feed-forward: both dropout masks from one stream",
        "kernels/common.py",
        "OUTPUT = tl.constexpr(1)",
        "OUTPUT = tl.constexpr(0)",
        f"{ON_FEED_FORWARD}::test_dropout",
    ),
    Mutation(
        "feed-forward backward: bias accumulation",
        FEED_FORWARD,
        "acc += dz",
        "acc = dz",
        f"{ON_FEED_FORWARD}::test_programs_of_several_row_blocks",
    ),
    Mutation(
        "feed-forward by products: LayerNorm's chunks not merged",
        PRODUCTS,
        "        squares += tl.sum(centred * centred, 1) + delta * delta * (start * share)\n",
        "        squares += tl.sum(centred * centred, 1)\n",
        f"{ON_PRODUCTS}::test_layer_norm_inside[fp16-shape3-64x64x64]",
    ),
    Mutation(
        "feed-forward by products: columns beyond K in the variance",
        PRODUCTS,
        "tl.where(mask, x - chunk[:, None], 0.0)",
        "x - chunk[:, None]",
        f"{ON_PRODUCTS}::test_layer_norm_inside[fp16-shape1-64x64x64]",
    ),
    Mutation(
        "feed-forward by products: statistics of the rows not filed",
        PRODUCTS,
        "            if col == 0:",
        "            if col == 1:",
        f"{ON_PRODUCTS}::test_layer_norm_inside[fp16-shape0-64x64x64]",
    ),
    Mutation(
        "feed-forward by products: rows of the residual assumed dense",
        PRODUCTS,
        "    x_at = _rows_from(x_ptr, row, stride_xm)",
        "    x_at = _rows_from(x_ptr, row, N)",
        f"{ON_PRODUCTS}::test_down[shape3-64x64x64]",
    ),
    Mutation(
        "feed-forward by products: strides of the weights assumed",
        PRODUCTS,
        "w1, w1.stride(1), w1.stride(0)",
        "w1, 1, d",
        f"{ON_PRODUCTS}::test_the_op_by_products[0.0-1]",
    ),
    Mutation(
        "feed-forward by products: every tile drops what the first one does",
        PRODUCTS,
        "HIDDEN, row + i, col, threshold, keep_scale, BLOCK_N)\n    tl.store",
        "HIDDEN, row + i, 0, threshold, keep_scale, BLOCK_N)\n    tl.store",
        f"{ON_PRODUCTS}::test_the_op_by_products[0.25-1]",
    ),
    Mutation(
        "feed-forward by products, backward: nothing dropped of g again",
        PRODUCTS,
        "(u * s * factor)",
        "(u * s)",
        f"{ON_PRODUCTS}::test_the_op_by_products[0.25-1]",
    ),
    Mutation(
        "feed-forward by products, backward: partial sums of one block",
        PRODUCTS,
        "row // BLOCK_M, N) + cols",
        "0, N) + cols",
        f"{ON_PRODUCTS}::test_up_backward[shape3-64x64x64]",
    ),
    Mutation(
        "partial sums: blocks of them not added",
        "kernels/partials.py",
        "acc += tl.load(",
        "acc = tl.load(",
        f"{ON_LAYER_NORM}::test_programs_of_several_row_blocks",
    ),
    Mutation(
        "small gradients: place of a part ignored",
        "kernels/partials.py",
        "out_ptr + at3,",
        "out_ptr,",
        f"{ON_PARTIALS}::test_accumulate[22]",
    ),
    Mutation(
        "small gradients: sums of earlier loops overwritten",
        "kernels/partials.py",
        "total + tl.sum(acc, 0)",
        "tl.sum(acc, 0)",
        f"{ON_PARTIALS}::test_accumulate[1]",
    ),
    Mutation(
        "small gradients: one block too many counted for each earlier part",
        "kernels/partials.py",
        "return block - blocks",
        "return block - blocks - 1",
        f"{ON_PARTIALS}::test_accumulate[3]",
    ),
    Mutation(
        "dropout: six rounds of Philox instead of seven",
        "kernels/common.py",
        "zero + stream, 7)",
        "zero + stream, 6)",
        f"{ON_ATTENTION}::test_dropout_is_the_same_in_forward_and_backward[9-2-lengths1-dtype1]",
    ),
    Mutation(
        "chain: columns beyond K in the variance",
        CHAIN_PRODUCTS,
        "tl.where((k < K)[None, :], x[c] - mean[:, None], 0.0)",
        "x[c] - mean[:, None]",
        f"{ON_CHAIN_PRODUCTS}::test_norm[(9, 144)]",
    ),
    Mutation(
        "chain: the previous loop's LayerNorm is not filed by all rows",
        CHAIN_PRODUCTS,
        "        if split == 0:  # every",
        "        if split == 0 and row == 0:  # every",
        f"{ON_CHAIN_PRODUCTS}::test_norm_product[silu-True-(35, 24, 16)-fp32]",
    ),
    Mutation(
        "chain: one LayerNorm where there are two",
        CHAIN_PRODUCTS,
        "        x = ()\n        for c in tl.static_range(CHUNKS):\n            x = x + (entered[c].to(tl.float32),)\n",
        "",
        f"{ON_CHAIN_PRODUCTS}::test_norm_product[silu-True-(7, 144, 40)-fp32]",
    ),
    Mutation(
        "chain: gates of a GLU from the rows of its values",
        CHAIN_PRODUCTS,
        "    w_gate = w_ptr + N * stride_wn\n",
        "    w_gate = w_ptr\n",
        f"{ON_CHAIN_PRODUCTS}::test_norm_product[glu-False-(1, 16, 24)-fp32]",
    ),
    Mutation(
        "chain: biases of a GLU's gates from its values",
        CHAIN_PRODUCTS,
        "tl.load(bias_ptr + N + cols",
        "tl.load(bias_ptr + cols",
        f"{ON_CHAIN_PRODUCTS}::test_norm_product[glu-False-(1, 16, 24)-fp32]",
    ),
    Mutation(
        "chain: programs of the same rows do the same columns",
        CHAIN_PRODUCTS,
        "for col in range(split * BLOCK_N, N, splits * BLOCK_N):",
        "for col in range(0, N, splits * BLOCK_N):",
        f"{ON_CHAIN_PRODUCTS}::test_several_tiles_of_columns_a_program[2-glu]",
    ),
    Mutation(
        "chain: first chunk of a product along K left out",
        CHAIN_PRODUCTS,
        "    acc = tl.dot(a, w, input_precision=PRECISION)\n",
        "    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)\n",
        f"{ON_CHAIN_PRODUCTS}::test_residual_product[(35, 200, 40)-fp16]",
    ),
    Mutation(
        "chain: half step left out",
        CHAIN_PRODUCTS,
        "residual + tl.cast(scale, tl.float32) * z",
        "residual + z",
        f"{ON_CHAIN_PRODUCTS}::test_residual_product[(1, 16, 24)-fp32]",
    ),
    Mutation(
        "chain: a frame beyond the length is read",
        CHAIN_CONVOLUTION,
        "inside = t.to(tl.uint32, bitcast=True) < tl.cast(n, tl.uint32)",
        "inside = t.to(tl.uint32, bitcast=True) <= tl.cast(n, tl.uint32)",
        f"{ON_CHAIN_CONVOLUTION}::test_depthwise[16-5-7-none-True]",
    ),
    Mutation(
        "chain: window of frames not moved",
        CHAIN_CONVOLUTION,
        "        window = frames[TAPS:]\n",
        "",
        f"{ON_CHAIN_CONVOLUTION}::test_depthwise[24-15-12-none-True]",
    ),
    Mutation(
        "chain: running mean left out of the folded BatchNorm",
        CHAIN_CONVOLUTION,
        "bias = (bias - tl.load(mean_ptr + c, mask=mask, other=0.0).to(tl.float32)) * scale",
        "bias = bias * scale",
        f"{ON_CHAIN_CONVOLUTION}::test_depthwise[16-5-7-batch-True]",
    ),
    Mutation(
        "chain: channels beyond C in the variance",
        CHAIN_CONVOLUTION,
        "centred = tl.where(mask_c[None, :], y - mean[:, None], 0.0)",
        "centred = y - mean[:, None]",
        f"{ON_CHAIN_CONVOLUTION}::test_depthwise[24-15-12-layer-True]",
    ),
    Mutation(
        "launching: 16-byte alignment not told apart",
        "kernels/common.py",
        "key += value.dtype, not value.data_ptr() & 15",
        "key.append(value.dtype)",
        "tests/kernels/test_common.py::test_a_bound_launch_is_what_triton_would_launch",
    ),
    Mutation(
        "launching: an integer of one not told apart",
        "kernels/common.py",
        "0 if not specialised else 1 if value == 1 else 16 if",
        "0 if not specialised else 16 if",
        "tests/kernels/test_common.py::test_a_bound_launch_is_what_triton_would_launch",
    ),
    Mutation(
        "launching: always on the first stream",
        "kernels/common.py",
        "            launch(stream, hooked)",
        "            launch(7, hooked)",
        "tests/kernels/test_common.py::test_a_bound_launch_is_what_triton_would_launch",
    ),
    Mutation(
        "launching: a profiler does not hear of bound launches",
        "kernels/common.py",
        "        if hooked:",
        "        if False:",
        "tests/kernels/test_common.py::test_a_bound_launch_is_what_triton_would_launch",
    ),
)

CPU_ATTENTION, ON_CPU_ATTENTION = "csrc/cpu/simd/relpos_attention.cpp", "tests/extension/test_cpu_relpos_attention.py"
CPU_CONVOLUTION, ON_CPU_CONVOLUTION = (
    "csrc/cpu/simd/glu_depthwise_conv.cpp",
    "tests/extension/test_cpu_glu_depthwise_conv.py",
)
CPU_LAYER_NORM, ON_CPU_LAYER_NORM = (
    "csrc/cpu/simd/residual_layer_norm.cpp",
    "tests/extension/test_cpu_residual_layer_norm.py",
)
CPU_FEED_FORWARD, ON_CPU_FEED_FORWARD = "csrc/cpu/simd/feed_forward.cpp", "tests/extension/test_cpu_feed_forward.py"
ROWS, ON_ROWS = "csrc/cpu/simd/rows.cpp", "tests/extension/test_cpu_rows.py"
PRODUCT = "csrc/cpu/simd/product.h"
FINGERPRINT = "csrc/cpu/fingerprint.cpp"
POOL, ON_POOL = "csrc/cpu/pool.cpp", "tests/extension/test_cpu_pool.py"
DROPOUT = "csrc/cpu/simd/dropout.h"
CONVERT, ON_CONVERT = "csrc/cpu/simd/convert.cpp", "tests/extension/test_cpu_convert.py"

# tested at the level that every processor has
CXX = (
    Mutation(
        "attention: pitch of the relative shift off by one",
        CPU_ATTENTION,
        "shifted = {band + M - 1, kPitch - 1};",
        "shifted = {band + M - 1, kPitch};",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[7-generic]",
    ),
    Mutation(
        "attention: no -inf after the last key",
        CPU_ATTENTION,
        "            for (int64_t j = n; j < n_padded; j++) row[j] = -INFINITY;\n            vec row_max",
        "            vec row_max",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[1-generic]",
    ),
    Mutation(
        "attention: output not rescaled by a new maximum",
        CPU_ATTENTION,
        "load(output + i * s.row + d) * shrink);",
        "load(output + i * s.row + d));",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[203-generic]",
    ),
    Mutation(
        "attention: band of positions carried one column off",
        CPU_ATTENTION,
        "memcpy(band + i * kPitch, band + i * kPitch + N,",
        "memcpy(band + i * kPitch, band + i * kPitch + N + 1,",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[203-generic]",
    ),
    Mutation(
        "attention backward: last columns of the band dropped",
        CPU_ATTENTION,
        "N : M + n_padded;",
        "N : M + n_padded - W;",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[190-generic]",
    ),
    Mutation(
        "attention backward: delta not subtracted",
        CPU_ATTENTION,
        "p * (dp - delta[i])",
        "p * dp",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[7-generic]",
    ),
    Mutation(
        "attention backward: only the first part of the batch in dpos",
        CPU_ATTENTION,
        "for (int64_t part = 0; part < parts; part++)",
        "for (int64_t part = 0; part < 1; part++)",
        f"{ON_CPU_ATTENTION}::test_odd_lengths[7-generic]",
    ),
    Mutation(
        "attention by pairs: the value after an odd last one is read",
        CPU_ATTENTION,
        "i + 1 < n ? (uvec)load_at",
        "true ? (uvec)load_at",
        f"{ON_CPU_ATTENTION}::test_padding_never_leaks_by_pairs[generic]",
    ),
    Mutation(
        "attention by pairs: the second value of a pair twice",
        CPU_ATTENTION,
        "(vec)(low >> 16 | high)",
        "(vec)(high >> 16 | high)",
        f"{ON_CPU_ATTENTION}::test_odd_lengths_by_pairs[7-generic]",
    ),
    Mutation(
        "attention by pairs: last of an odd number of weights left out",
        CPU_ATTENTION,
        "cdiv(n, kStep<P>), weights",
        "n / kStep<P>, weights",
        f"{ON_CPU_ATTENTION}::test_odd_lengths_by_pairs[7-generic]",
    ),
    Mutation(
        "attention by pairs: last of an odd number of columns left out",
        CPU_ATTENTION,
        "steps = cdiv(s.D, kStep<P>)",
        "steps = s.D / kStep<P>",
        f"{ON_CPU_ATTENTION}::test_head_widths_by_pairs[33-generic]",
    ),
    Mutation(
        "convolution: GLU ignores lengths",
        CPU_CONVOLUTION,
        "if (t < 0 || t >= strip.real) {",
        "if (t < 0 || t >= s.T) {",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[1-none-generic]",
    ),
    Mutation(
        "convolution: halo one frame short",
        CPU_CONVOLUTION,
        "strip.first + 2 * s.half;",
        "strip.first + 2 * s.half - 1;",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[127-none-generic]",
    ),
    Mutation(
        "convolution: channels of the pad in the variance",
        CPU_CONVOLUTION,
        "first_lanes(load(y + c) - mean, C - c)",
        "load(y + c) - mean",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[1-layer-generic]",
    ),
    Mutation(
        "convolution: padding in the statistics of the batch",
        CPU_CONVOLUTION,
        "imax(0, imin(strip.end, strip.real) - strip.first)",
        "imax(0, strip.end - strip.first)",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[1-batch in training-generic]",
    ),
    Mutation(
        "convolution backward: taps not reversed",
        CPU_CONVOLUTION,
        "pack_taps(a, s, true, taps);",
        "pack_taps(a, s, false, taps);",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[7-none-generic]",
    ),
    Mutation(
        "convolution backward: last taps counted twice",
        CPU_CONVOLUTION,
        "for (int64_t q = k - start; q < n; q++) {",
        "for (int64_t q = 0; q < n; q++) {",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[63-none-generic]",
    ),
    Mutation(
        "convolution backward: statistics get gradients of padding",
        CPU_CONVOLUTION,
        "statistics && t < strip.real ? sums",
        "statistics ? sums",
        f"{ON_CPU_CONVOLUTION}::test_odd_lengths[7-group-generic]",
    ),
    Mutation(
        "convolution backward: last partial sum dropped",
        CPU_CONVOLUTION,
        "for (int64_t part = 0; part < s.parts; part++)\n        for",
        "for (int64_t part = 0; part < s.parts - 1; part++)\n        for",
        f"{ON_CPU_CONVOLUTION}::test_kernel_widths[1-generic]",
    ),
    Mutation(
        "LayerNorm: columns beyond D in the variance",
        CPU_LAYER_NORM,
        "first_lanes(load(buffer + d) - mean, a.columns - d)",
        "load(buffer + d) - mean",
        f"{ON_CPU_LAYER_NORM}::test_widths[7-generic]",
    ),
    Mutation(
        "LayerNorm backward: mean of the gradient not subtracted",
        CPU_LAYER_NORM,
        "(load(buffer + d) - mean_grad - normal * mean_normal)",
        "(load(buffer + d) - normal * mean_normal)",
        f"{ON_CPU_LAYER_NORM}::test_widths[1-generic]",
    ),
    Mutation(
        "LayerNorm backward: last partial sum dropped",
        CPU_LAYER_NORM,
        "part < parts; part++) {\n            dweight",
        "part < parts - 1; part++) {\n            dweight",
        f"{ON_CPU_LAYER_NORM}::test_widths[1-generic]",
    ),
    Mutation(
        "feed-forward: both dropout masks from one stream",
        CPU_FEED_FORWARD,
        "*a.dropout.seed, stream, 0,",
        "*a.dropout.seed, 0, 0,",
        f"{ON_CPU_FEED_FORWARD}::test_dropout_is_that_of_the_counters[generic]",
    ),
    Mutation(
        "feed-forward backward: last partial sum dropped",
        CPU_FEED_FORWARD,
        "part < parts; part++) total +=",
        "part < parts - 1; part++) total +=",
        f"{ON_CPU_FEED_FORWARD}::test_widths[1-1-generic]",
    ),
    Mutation(
        "dropout: random bits repeated",
        DROPOUT,
        "(uint16_t)(words[w][l] >> 16)",
        "(uint16_t)words[w][l]",
        f"{ON_CPU_FEED_FORWARD}::test_dropout_is_that_of_the_counters[generic]",
    ),
    Mutation(
        "dropout: six rounds of Philox instead of seven",
        DROPOUT,
        "round < 7",
        "round < 6",
        f"{ON_CPU_LAYER_NORM}::test_dropout_is_that_of_the_counters[20-generic]",
    ),
    Mutation(
        "products of bfloat16: the first of a pair twice",
        PRODUCT,
        "(vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u)",
        "(vec)(a << 16) * (vec)(b << 16)",
        f"{ON_ROWS}::test_widths[16-64-48-generic-torch.bfloat16]",
    ),
    Mutation(
        "products: half a tile of four rows left out",
        PRODUCT,
        "product_tile<4, N>(depth",
        "product_tile<2, N>(depth",
        f"{ON_ROWS}::test_widths[16-64-48-generic-torch.float32]",
    ),
    Mutation(
        "rows: panels of bfloat16 with the pitch of float32",
        ROWS,
        "{panel, 2 * kPanelColumns, 2 * W}",
        "{panel, kPanelColumns, W}",
        f"{ON_ROWS}::test_widths[16-64-48-generic-torch.bfloat16]",
    ),
    Mutation(
        "pool: the caller does not wait for its helpers",
        POOL,
        "        if (spin(idle)) return;\n",
        "        return;\n",
        f"{ON_POOL}::test_every_caller_gets_its_own_result",
    ),
    Mutation(
        "pool: helpers share a slot",
        POOL,
        "take_chunks(slot);",
        "take_chunks(0);",
        f"{ON_POOL}::test_every_caller_gets_its_own_result",
    ),
    Mutation(
        "pool: a child of fork waits for its parent's threads",
        POOL,
        "pthread_atfork(nullptr, nullptr, renew);",
        "",
        f"{ON_POOL}::test_a_child_of_fork_has_threads_of_its_own",
    ),
    Mutation(
        "pool: helpers wake up on the caller's core",
        POOL,
        "        CPU_CLR(own, &cores);\n",
        "",
        f"{ON_POOL}::test_helpers_wake_up_on_other_cores_than_the_caller_s",
    ),
    Mutation(
        "pool: helpers that are woken go on sleeping",
        POOL,
        "calls_ != calls || fresh()",
        "fresh()",
        f"{ON_POOL}::test_helpers_are_woken_ahead_of_work",
    ),
    Mutation(
        "convert: elements of the last register left out",
        CONVERT,
        "i < end; i += W",
        "i + W <= end; i += W",
        f"{ON_CONVERT}::test_sizes_and_threads[of0-to1-40001-generic]",
    ),
    Mutation(
        "rows: chunks of the hidden layer not added",
        ROWS,
        "f ? Addend{b.y, b.row} : bias_of(a.down)",
        "bias_of(a.down)",
        f"{ON_ROWS}::test_widths[256-1030-768-generic-torch.float32]",
    ),
    Mutation(
        "products of int8: sums start at zero",
        PRODUCT,
        "for (int i = 0; i < R; i++) sums[i][v] = start;",
        "for (int i = 0; i < R; i++) sums[i][v] = start - start;",
        f"{ON_ROWS}::test_products_of_int8_are_exact[5-7-torch.float32-generic]",
    ),
    Mutation(
        "products of int8: one row's scale for all of a tile",
        PRODUCT,
        "(a.scales[i] * scale)",
        "(a.scales[0] * scale)",
        f"{ON_ROWS}::test_products_of_int8_are_exact[5-7-torch.float32-generic]",
    ),
    Mutation(
        "products of int8: scales of the first tile for all",
        PRODUCT,
        "a.row, a.scales + i}",
        "a.row, a.scales}",
        f"{ON_ROWS}::test_products_of_int8_are_exact[20-65-torch.float32-generic]",
    ),
    Mutation(
        "rows: groups of the hidden layer start as the first",
        ROWS,
        "w.starts + from / kHiddenColumns *",
        "w.starts + 0 * from *",
        f"{ON_ROWS}::test_rows_by_int8[64-600-70-torch.float32-generic]",
    ),
    Mutation(
        "rows: 8 bits hide what is not finite",
        ROWS,
        "most / 127.0f + sum(wrong)",
        "most / 127.0f",
        f"{ON_ROWS}::test_int8_hides_no_value_that_is_not_finite[generic-nan]",
    ),
    Mutation(
        "fingerprint: bytes after the last word left out",
        FINGERPRINT,
        "mix(hash, last);",
        "(void)last;",
        f"{ON_ROWS}::test_fingerprint_sees_bytes_after_the_last_word",
    ),
    Mutation(
        "rows: last row left out",
        ROWS,
        "blocks * kTileRows, a.rows)",
        "blocks * kTileRows, a.rows - 1)",
        f"{ON_ROWS}::test_widths[1-1-1-generic-torch.float32]",
    ),
    Mutation(
        "rows: columns beyond D in the variance",
        ROWS,
        "first_lanes(load(s + d) - mean, a.columns - d)",
        "load(s + d) - mean",
        f"{ON_ROWS}::test_widths[7-30-14-generic-torch.float32]",
    ),
)

CUDA_CONVOLUTION = "csrc/cuda/glu_depthwise_conv.cu"
CUDA_PRODUCTS = "csrc/cuda/glu_depthwise_conv_products.cu"
ON_CUDA_CONVOLUTION = "tests/extension/test_cuda_glu_depthwise_conv.py"

CUDA = (
    Mutation(
        "halo off by one",
        CUDA_CONVOLUTION,
        "op, tile, tile.t0 - halo, rows, c0);\n        load_weights",
        "op, tile, tile.t0 - halo + 1, rows, c0);\n        load_weights",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-1-1-float32]",
    ),
    Mutation(
        "tail of the halo dropped",
        CUDA_CONVOLUTION,
        "const int rows = min(G::frames + op.width - 1,",
        "const int rows = min(G::frames,",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-65-3-float32]",
    ),
    Mutation(
        "mask off by one",
        CUDA_CONVOLUTION,
        "t >= 0 && t < tile.real",
        "t >= 0 && t <= tile.real",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-1-1-float32]",
    ),
    Mutation(
        "padding mask dropped",
        CUDA_CONVOLUTION,
        "op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames))",
        "frames",
        f"{ON_CUDA_CONVOLUTION}::test_lengths[emulated-lengths0]",
    ),
    Mutation(
        "missing barrier after the load",
        CUDA_CONVOLUTION,
        "        __syncthreads();\n        const float2 bias",
        "        const float2 bias",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-1-1-float32]",
    ),
    Mutation(
        "missing barrier between tiles",
        CUDA_CONVOLUTION,
        "        __syncthreads();  // the last tile has been read by every warp\n",
        "",
        f"{ON_CUDA_CONVOLUTION}::test_blocks_that_walk_over_several_tiles[emulated-1]",
    ),
    Mutation(
        "missing barrier in the reduction over slots",
        CUDA_CONVOLUTION,
        "    sums[threadIdx.x] = sum;\n    __syncthreads();\n",
        "    sums[threadIdx.x] = sum;\n",
        f"{ON_CUDA_CONVOLUTION}::test_blocks_that_walk_over_several_tiles[emulated-3]",
    ),
    Mutation(
        "reduction over slots left out",
        CUDA_CONVOLUTION,
        "slot < op.slots;",
        "slot < 1;",
        f"{ON_CUDA_CONVOLUTION}::test_blocks_that_walk_over_several_tiles[emulated-3]",
    ),
    Mutation(
        "taps not reversed in the backward",
        CUDA_CONVOLUTION,
        "-Tiles::taps_pitch>(dglu, grad + f * kGroup + 2 * lane,\n"
        "                                              weights + (op.width - 1) * Tiles::taps_pitch + 2 * lane,",
        "Tiles::taps_pitch>(dglu, grad + f * kGroup + 2 * lane, weights + 2 * lane,",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-7-3-float32]",
    ),
    Mutation(
        "partial sums over frames not added",
        CUDA_CONVOLUTION,
        "count = taps ? parts : kGluConvWarps",
        "count = taps ? parts / 2 : kGluConvWarps",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-63-1-float32]",
    ),
    Mutation(
        "frames of the halo in the bias gradient",
        CUDA_CONVOLUTION,
        "if (f >= halo && f < halo + Tiles::frames) {",
        "if (f >= halo) {",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-65-3-float32]",
    ),
    Mutation(
        "bias gradient without the folded scale",
        CUDA_CONVOLUTION,
        "add(sums.dz, dz);",
        "add(sums.dz, da);",
        f"{ON_CUDA_CONVOLUTION}::test_folded_batch_norm[emulated-True-float32]",
    ),
    Mutation(
        "padding gets a gradient",
        CUDA_CONVOLUTION,
        "if (t + r < tile.real) {",
        "if (t + r < tile.frames) {",
        f"{ON_CUDA_CONVOLUTION}::test_lengths[emulated-lengths0]",
    ),
    Mutation(
        "alignment of rows assumed",
        CUDA_CONVOLUTION,
        "op.aligned = aligned<T>(op) && rows_aligned(static_cast<T*>(op.out)) && rows_aligned(static_cast<T*>(op.y));",
        "op.aligned = true;",
        f"{ON_CUDA_CONVOLUTION}::test_strided_input_and_gradient[emulated-5-float32-none]",
    ),
    Mutation(
        "taps of one channel in one bank",
        CUDA_CONVOLUTION,
        "int taps_pitch = channels + 4;",
        "int taps_pitch = channels;",
        f"{ON_CUDA_CONVOLUTION}::test_no_bank_conflicts[none-31-float32]",
    ),
    Mutation(
        "halves of eight channels staged in one place",
        CUDA_CONVOLUTION,
        "position(int channel) { return channel % 8 / 4 * 32",
        "position(int channel) { return channel % 8 / 4 * 0",
        f"{ON_CUDA_CONVOLUTION}::test_rows_of_whole_eights[emulated-8-float32]",
    ),
    Mutation(
        "LayerNorm: channels beyond C in the moments",
        CUDA_CONVOLUTION,
        "has_y = c + 1 < channels",
        "has_y = has_x",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-65-float32]",
    ),
    Mutation(
        "LayerNorm: moments of the first channels only",
        CUDA_CONVOLUTION,
        "for (int g = 0; g < G::groups; ++g)",
        "for (int g = 0; g < 1; ++g)",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-128-float32]",
    ),
    Mutation(
        "LayerNorm: moments of earlier chunks dropped",
        CUDA_CONVOLUTION,
        "moments.merge(moments_of_rows(",
        "moments = (moments_of_rows(",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-264-float32]",
    ),
    Mutation(
        "LayerNorm: missing barrier between chunks",
        CUDA_CONVOLUTION,
        "        __syncthreads();  // this chunk has been read by every warp\n",
        "",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-264-float32]",
    ),
    Mutation(
        "LayerNorm: missing barrier before the moments are read",
        CUDA_CONVOLUTION,
        "    __syncthreads();\n    moments = {};",
        "    moments = {};",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-128-float32]",
    ),
    Mutation(
        "LayerNorm backward: mean of g * zhat not subtracted",
        CUDA_CONVOLUTION,
        "(dz.x - m.z - zhat.x * m.w) * m.y",
        "(dz.x - m.z) * m.y",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-6-float32]",
    ),
    Mutation(
        "products: halo off by one",
        CUDA_PRODUCTS,
        "tile.t0 - op.width / 2, rows",
        "tile.t0 - op.width / 2 + 1, rows",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-1-1-bfloat16]",
    ),
    Mutation(
        "products: padding mask dropped",
        CUDA_PRODUCTS,
        "op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames))",
        "frames",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-7-3-bfloat16]",
    ),
    Mutation(
        "products: frame before the utterance taken",
        CUDA_PRODUCTS,
        "t + n >= 0 && t + n < real",
        "t + n >= -1 && t + n < real",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-7-3-bfloat16]",
    ),
    Mutation(
        "products: frames behind the tile stored",
        CUDA_PRODUCTS,
        "min(tile.frames, tile.t0 + tile.segments * kSegment) - t",
        "tile.frames - t",
        f"{ON_CUDA_CONVOLUTION}::test_tiles_of_several_segments[emulated-none-203-5]",
    ),
    Mutation(
        "products: later segments stored in the place of the first",
        CUDA_PRODUCTS,
        "first += kColumns, t += kColumns * kSegment",
        "first += kColumns",
        f"{ON_CUDA_CONVOLUTION}::test_tiles_of_several_segments[emulated-none-203-9]",
    ),
    Mutation(
        "products: pairs from odd taps on taken from even ones",
        CUDA_PRODUCTS,
        "row % 2 * kOddTaps + lane",
        "lane",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-7-3-bfloat16]",
    ),
    Mutation(
        "products: taps of the lower rows kept for the upper",
        CUDA_PRODUCTS,
        "before[i] = next;",
        "before[i] = now;",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-65-31-bfloat16]",
    ),
    Mutation(
        "products: taps behind the last word of a warp left out",
        CUDA_PRODUCTS,
        "for (int j = lane + kWarp; j < words; j += kWarp)",
        "for (int j = lane + kWarp; j < 0; j += kWarp)",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-65-63-bfloat16]",
    ),
    Mutation(
        "products: segments in the same banks",
        CUDA_PRODUCTS,
        "return 4 * (n ^ (n >> 3 & 1));",
        "return 4 * n;",
        f"{ON_CUDA_CONVOLUTION}::test_no_bank_conflicts[none-31-bfloat16]",
    ),
    Mutation(
        "products: missing barrier after the GLU",
        CUDA_PRODUCTS,
        "        __syncthreads();\n    };",
        "    };",
        f"{ON_CUDA_CONVOLUTION}::test_odd_shapes[emulated-65-31-bfloat16]",
    ),
    Mutation(
        "products: mean of BatchNorm not subtracted",
        CUDA_PRODUCTS,
        "fmaf(-op.mean[channel], scale, value)",
        "value",
        f"{ON_CUDA_CONVOLUTION}::test_folded_batch_norm[emulated-True-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: missing barrier between chunks",
        CUDA_PRODUCTS,
        "        __syncthreads();  // this chunk has been read by every warp\n",
        "",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-264-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: missing barrier before the moments are read",
        CUDA_PRODUCTS,
        "    __syncthreads();\n    if (warp < 4) {",
        "    if (warp < 4) {",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-128-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: missing barrier before mean and deviation are read",
        CUDA_PRODUCTS,
        "    __syncthreads();\n    float2 normal[4];",
        "    float2 normal[4];",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-128-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: channels beyond C in the moments",
        CUDA_PRODUCTS,
        "kAll || i < there ? z[i][r] - own : 0.0f",
        "z[i][r] - own",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-6-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: moments of earlier chunks dropped",
        CUDA_PRODUCTS,
        "mean[r] = fmaf(by, share, mean[r]);",
        "mean[r] = own;",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-264-bfloat16]",
    ),
    Mutation(
        "products, LayerNorm: scale and shift of the last channels for all",
        CUDA_PRODUCTS,
        "        taps.store(place_of_constant(lane), constant);\n        __syncwarp();\n    }",
        "        if (c < 0) taps.store(place_of_constant(lane), constant);\n        __syncwarp();\n    }",
        f"{ON_CUDA_CONVOLUTION}::test_layer_norm[emulated-264-bfloat16]",
    ),
)

CUDA_ATTENTION = "csrc/cuda/relpos_attention.cu"
CUDA_ATTENTION_SHARED = "csrc/cuda/relpos_attention.cuh"
CUDA_ATTENTION_BACKWARD = "csrc/cuda/relpos_attention_backward.cu"
CUDA_ATTENTION_SIZES = "csrc/cuda/relpos_attention.h"
ON_CUDA_ATTENTION = "tests/extension/test_cuda_relpos_attention.py"

CUDA_OF_ATTENTION = (
    Mutation(
        "positions one off",
        CUDA_ATTENTION_SHARED,
        "const int origin = static_cast<int>(op.frames) - 1 - i0;",
        "const int origin = static_cast<int>(op.frames) - i0;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows of odd number rotated too far",
        CUDA_ATTENTION_SHARED,
        "odd = (q - g / 2) & 3;",
        "odd = (q - (g + 1) / 2) & 3;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "columns of a pair not swapped",
        CUDA_ATTENTION_SHARED,
        "swap = g % 2 == 1;",
        "swap = false;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "negative shift not from the block before",
        CUDA_ATTENTION_SHARED,
        "s[i] = skew.own[i] ? now[i] : last[i];",
        "s[i] = now[i];",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "second rows not a block further back",
        CUDA_ATTENTION_SHARED,
        "s[2 + i] = skew.own[i] ? last[2 + i] : older[i];",
        "s[2 + i] = skew.own[i] ? now[2 + i] : last[2 + i];",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "one bias for both factors",
        CUDA_ATTENTION,
        "static_cast<const T*>(op.v_bias) + bias",
        "static_cast<const T*>(op.u) + bias",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "keys beyond the last have weight",
        CUDA_ATTENTION_SHARED,
        "if (left < 8 * kBlocks) {",
        "if (left < 0) {",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "padding mask dropped",
        CUDA_ATTENTION_SHARED,
        "op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames))",
        "frames",
        f"{ON_CUDA_ATTENTION}::test_lengths[emulated-lengths0]",
    ),
    Mutation(
        "tile not waited for",
        CUDA_ATTENTION,
        "        wait_for_copies<0>();\n",
        "",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "missing barrier between tiles",
        CUDA_ATTENTION,
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n",
        "",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "next tile copied before every warp has read the last",
        CUDA_ATTENTION,
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kKeys) tiles.copy(tile + 1, left - kKeys);\n",
        "        if (left > kKeys) tiles.copy(tile + 1, left - kKeys);\n        __syncthreads();\n",
        f"{ON_CUDA_ATTENTION}::test_lengths[emulated-lengths0]",
    ),
    Mutation(
        "next tile copied over this one",
        CUDA_ATTENTION_SHARED,
        "const int stage = tile % kRelposStages * kTile, ",
        "const int stage = (tile + 1) % kRelposStages * kTile, ",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "sum not corrected for a new maximum",
        CUDA_ATTENTION_SHARED,
        "sum[half] = fmaf(sum[half], factor, part);",
        "sum[half] += part;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "output not corrected for a new maximum",
        CUDA_ATTENTION_SHARED,
        "                acc[n][2 * half] *= factor;\n",
        "",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "zero divided by zero without a key",
        CUDA_ATTENTION_SHARED,
        "some ? op.keep_scale / total : 0.0f",
        "op.keep_scale / total",
        f"{ON_CUDA_ATTENTION}::test_lengths[emulated-lengths0]",
    ),
    Mutation(
        "dropout of the first rows for the second",
        CUDA_ATTENTION_SHARED,
        "kept >> (i / 2 * 8 + i % 2)",
        "kept >> (i % 2)",
        f"{ON_CUDA_ATTENTION}::test_dropout[emulated-0.3-bfloat16]",
    ),
    Mutation(
        "dropout of one head for all",
        CUDA_ATTENTION,
        "blockIdx.z * gridDim.y + blockIdx.y, tile",
        "blockIdx.z, tile",
        f"{ON_CUDA_ATTENTION}::test_dropout[emulated-0.3-bfloat16]",
    ),
    Mutation(
        "packed utterance begins with the first",
        CUDA_ATTENTION_SHARED,
        "const int64_t start = op.cu_seqlens[b];",
        "const int64_t start = op.cu_seqlens[0];",
        f"{ON_CUDA_ATTENTION}::test_packed_utterances_are_each_alone[emulated-packed0]",
    ),
    Mutation(
        "ring of positions a tile too short",
        CUDA_ATTENTION_SIZES,
        "return warps * kRelposRows / kRelposKeys + 2;",
        "return warps * kRelposRows / kRelposKeys + 1;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-203]",
    ),
    Mutation(
        "rows of a matrix in four banks",
        CUDA_ATTENTION_SIZES,
        "return head_dim / 2 + 4;",
        "return head_dim / 2;",
        f"{ON_CUDA_ATTENTION}::test_no_bank_conflicts[64-forward-80]",
    ),
)

CUDA_OF_ATTENTION_BACKWARD = (
    Mutation(
        "rows: tile not waited for",
        CUDA_ATTENTION_BACKWARD,
        "        wait_for_copies<0>();\n"
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kKeys) tiles",
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kKeys) tiles",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "rows: missing barrier between tiles",
        CUDA_ATTENTION_BACKWARD,
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kKeys) tiles",
        "        if (left > kKeys) tiles",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "keys: tile not waited for",
        CUDA_ATTENTION_BACKWARD,
        "        wait_for_copies<0>();\n"
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kQueries) copy",
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kQueries) copy",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "keys: missing barrier between tiles",
        CUDA_ATTENTION_BACKWARD,
        "        __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "        if (left > kQueries) copy",
        "        if (left > kQueries) copy",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-203]",
    ),
    Mutation(
        "positions: tile not waited for",
        CUDA_ATTENTION_BACKWARD,
        "            wait_for_copies<0>();\n"
        "            __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "            if (strip + kQueries / kRows < end)",
        "            __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "            if (strip + kQueries / kRows < end)",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "positions: missing barrier between tiles",
        CUDA_ATTENTION_BACKWARD,
        "            __syncthreads();  // the tile is there, and the one before has been read by every warp\n"
        "            if (strip + kQueries / kRows < end)",
        "            if (strip + kQueries / kRows < end)",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-203]",
    ),
    Mutation(
        "positions: missing barrier between utterances",
        CUDA_ATTENTION_BACKWARD,
        "        __syncthreads();  // every warp has read the last tile\n",
        "",
        f"{ON_CUDA_ATTENTION}::test_backward_of_several_utterances_by_one_block[emulated-30]",
    ),
    Mutation(
        "rows: dR of odd rows rotated too little",
        CUDA_ATTENTION_BACKWARD,
        "second = (q + (g + 1) / 2) & 3;",
        "second = (q + g / 2) & 3;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows: columns of a pair not swapped",
        CUDA_ATTENTION_BACKWARD,
        "swap = g % 2 == 1;",
        "swap = false;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows: dR not from the next block",
        CUDA_ATTENTION_BACKWARD,
        "before[i] = own[i] ? last[i] : now[0][i];",
        "before[i] = last[i];",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows: second rows of dR not a block further on",
        CUDA_ATTENTION_BACKWARD,
        "dr[1] = upper(before);",
        "dr[1] = upper(older);",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "rows: dR of the positions after the last key left out",
        CUDA_ATTENTION_BACKWARD,
        "if (tile > 0 && own_rows > 0) {",
        "if (tile < 0) {",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "rows: positions of dR sixteen further on",
        CUDA_ATTENTION_BACKWARD,
        "place + 8 * n - 16);",
        "place + 8 * n);",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows: sum of dP not subtracted",
        CUDA_ATTENTION_BACKWARD,
        "fmaf(dp[i], factor, -lse_delta[i / 2].y)",
        "dp[i] * factor",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "rows: no dropout in dP",
        CUDA_ATTENTION_BACKWARD,
        "fmaf(dp[i], factor, -lse_delta[i / 2].y)",
        "(dp[i] - lse_delta[i / 2].y)",
        f"{ON_CUDA_ATTENTION}::test_dropout[emulated-0.3-bfloat16]",
    ),
    Mutation(
        "scratch shared by two heads",
        CUDA_ATTENTION_BACKWARD,
        "static_cast<T*>(op.scratch) + slot * relpos",
        "static_cast<T*>(op.scratch) + slot / 2 * relpos",
        f"{ON_CUDA_ATTENTION}::test_backward_of_some_heads_at_a_time[emulated-4-None]",
    ),
    Mutation(
        "keys: fragments of the wrong half",
        CUDA_ATTENTION_BACKWARD,
        "const int block = 4 * part + 2 * m + lane / 8 % 2, half = lane / 16;",
        "const int block = 4 * part + 2 * m + lane / 16, half = lane / 8 % 2;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "keys: dv for dk",
        CUDA_ATTENTION_BACKWARD,
        "const int stage = tile % kRelposStages * 2 + kind;",
        "const int stage = tile % kRelposStages * 2 + 1 - kind;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "keys: du of the padding",
        CUDA_ATTENTION_BACKWARD,
        "if (kind != 0 || key >= own.keys) continue;",
        "if (kind != 0) continue;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-65]",
    ),
    Mutation(
        "keys: du not taken from the gradient of v_bias",
        CUDA_ATTENTION_BACKWARD,
        "D + d] = -total;",
        "D + d] = 0.0f;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-7]",
    ),
    Mutation(
        "scratch read with strips a row of a block apart",
        CUDA_ATTENTION_BACKWARD,
        "scratch.blocks + (strip + second) * scratch.strip",
        "scratch.blocks + (strip + second) * (scratch.strip + 8)",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "positions: second strip where the first is",
        CUDA_ATTENTION_BACKWARD,
        "a + 2 * strip + 2, 2, blocks);",
        "a + 2 * strip + 2, 0, blocks);",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-63]",
    ),
    Mutation(
        "positions: a strip left out",
        CUDA_ATTENTION_BACKWARD,
        "max(0, (-kColumns / 8 - a) / 2);",
        "max(0, (-kColumns / 8 - a) / 2 + 1);",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-203]",
    ),
    Mutation(
        "positions: sum over earlier heads forgotten",
        CUDA_ATTENTION_BACKWARD,
        "op.first == 0 ? make_float2(0.0f, 0.0f) : sum;",
        "make_float2(0.0f, 0.0f);",
        f"{ON_CUDA_ATTENTION}::test_backward_of_some_heads_at_a_time[emulated-1-None]",
    ),
)

WARPGROUPS, PRODUCTS_OF_GROUPS = "csrc/cuda/relpos_attention_warpgroups.cu", "csrc/cuda/warpgroup.cuh"

CUDA_OF_WARPGROUPS = (
    Mutation(
        "all warps of a warpgroup shifted alike",
        WARPGROUPS,
        "const int own = n - 2 * kWarpOfGroup;",
        "const int own = n;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-63]",
    ),
    Mutation(
        "positions before the first key not rotated",
        WARPGROUPS,
        "            for (int n = 0; n < kBlocks; ++n) skew.rotate(positions[1][n]);\n",
        "            for (int n = 0; n < 0; ++n) skew.rotate(positions[1][n]);\n",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "second warpgroup at the positions of the first",
        WARPGROUPS,
        "(tile - group + kPositionTiles) % kPositionTiles",
        "(tile + kPositionTiles) % kPositionTiles",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-127]",
    ),
    Mutation(
        "ring of positions a tile short",
        WARPGROUPS,
        "kPositionTiles = kRelposWarpgroupPositionTiles;",
        "kPositionTiles = kRelposWarpgroupPositionTiles - 1;",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-203]",
    ),
    Mutation(
        "values of the first keys of a tile for all",
        WARPGROUPS,
        "values + Tile::rows_from(k)",
        "values",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-63]",
    ),
    Mutation(
        "copies not shown to products",
        WARPGROUPS,
        "        show_to_products();\n",
        "",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "barrier between copies and products left out",
        WARPGROUPS,
        "        show_to_products();\n        __syncthreads();\n",
        "        show_to_products();\n",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "scores used before their wait",
        WARPGROUPS,
        "wait_for_products<1>(s)",
        "wait_for_products<2>(s)",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "sums of values not waited for",
        WARPGROUPS,
        "wait_for_products<0>(rows.acc, before)",
        "wait_for_products<1>(rows.acc, before)",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "products of weights begun without a fence",
        WARPGROUPS,
        "        begin_products();\n#pragma unroll\n        for (int k = 0; k < kGroupKeys / 16",
        "#pragma unroll\n        for (int k = 0; k < kGroupKeys / 16",
        f"{ON_CUDA_ATTENTION}::test_odd_shapes[emulated-warpgroups-7]",
    ),
    Mutation(
        "dropout of the first 32 keys for a tile",
        WARPGROUPS,
        "tile * (kGroupKeys / kKeys) + half / 4",
        "tile * (kGroupKeys / kKeys)",
        f"{ON_CUDA_ATTENTION}::test_dropout[emulated-warpgroups-0.3-bfloat16]",
    ),
    Mutation(
        "wide queries of the first warpgroup for both",
        WARPGROUPS,
        "(kWhich * kGroups + group) * Rows::kFloats",
        "kWhich * kGroups * Rows::kFloats",
        f"{ON_CUDA_ATTENTION}::test_wide_heads_of_several_tiles[emulated-warpgroups-128]",
    ),
)

CLUSTER_BLOCK, CLUSTER_LOOP = "csrc/cuda/cluster_loop.cuh", "csrc/cuda/cluster_loop.cu"
ON_CLUSTER_LOOP = "tests/extension/test_cuda_cluster_loop.py"

CUDA_OF_CLUSTERS = (
    Mutation(
        "barrier of the cluster after the partial sums left out",
        CLUSTER_BLOCK,
        "        meet();\n        if (owns()) {\n            float2 sum",
        "        if (owns()) {\n            float2 sum",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "arrival ahead of the block's other threads",
        CLUSTER_BLOCK,
        "        __syncthreads();\n        if (threadIdx.x < kLoopBlocks) arrive_at",
        "        if (threadIdx.x < kLoopBlocks) arrive_at",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "partial sums of the first blocks alone",
        CLUSTER_BLOCK,
        "source < kLoopBlocks; ++source",
        "source < kLoopBlocks - 1; ++source",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "second rows of the partial sums where the first are",
        CLUSTER_BLOCK,
        "const int frame = lane / 4 + 8 * half;\n                store_to(received",
        "const int frame = lane / 4 + 0 * half;\n                store_to(received",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "half step of the feed-forward left out",
        CLUSTER_BLOCK,
        "return add(down_bias, 0.5f, next);",
        "return add(down_bias, 1.0f, next);",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "chunks of a row not rotated",
        CLUSTER_BLOCK,
        "chunk ^ (kChunks == 2 ? row / 4 % 2 : row % 8)",
        "chunk ^ (kChunks == 2 ? row / 4 % 2 : 0)",
        f"{ON_CLUSTER_LOOP}::test_no_bank_conflicts",
    ),
    Mutation(
        "barrier ahead of keys and queries left out",
        CLUSTER_LOOP,
        "    block.meet();\n    uint32_t a[4];\n    attend(",
        "    uint32_t a[4];\n    attend(",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "keys given to three blocks of four",
        CLUSTER_LOOP,
        "n < kHeadBlocks; ++n",
        "n < kHeadBlocks - 1; ++n",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "positions one off",
        CLUSTER_LOOP,
        "from = row - kPast + frames - 1;",
        "from = row - kPast + frames;",
        f"{ON_CLUSTER_LOOP}::test_lengths[emulated]",
    ),
    Mutation(
        "negative distance from its own block of columns",
        CLUSTER_LOOP,
        "2 * q + i % 2 >= g ?",
        "2 * q + i % 2 > g ?",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "keys beyond the length have weight",
        CLUSTER_LOOP,
        "j < keys ? (scores",
        "j <= keys ? (scores",
        f"{ON_CLUSTER_LOOP}::test_lengths[emulated]",
    ),
    Mutation(
        "zero divided by zero without a key",
        CLUSTER_LOOP,
        "        if (keys == 0) most = 0.0f;\n",
        "",
        f"{ON_CLUSTER_LOOP}::test_lengths[emulated]",
    ),
    Mutation(
        "frames beyond the length enter the convolution",
        CLUSTER_LOOP,
        "const bool there = frame < frames;",
        "const bool there = frame <= frames;",
        f"{ON_CLUSTER_LOOP}::test_lengths[emulated]",
    ),
    Mutation(
        "taps one frame late",
        CLUSTER_LOOP,
        "const int tap = j - frame + width / 2;",
        "const int tap = j - frame + width / 2 + 1;",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "barrier ahead of the moments left out",
        CLUSTER_LOOP,
        "        block.meet();\n        if (block.owns()) {\n            float2 moments",
        "        if (block.owns()) {\n            float2 moments",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "distance of means left out of the variance",
        CLUSTER_LOOP,
        "squares += moments[n].y + kOwn * (moments[n].x - mean) * (moments[n].x - mean);",
        "squares += moments[n].y;",
        f"{ON_CLUSTER_LOOP}::test_every_depth[emulated]",
    ),
    Mutation(
        "running mean left out",
        CLUSTER_LOOP,
        "(bias.x - mean.x) * scale.x + norm_bias.x",
        "bias.x * scale.x + norm_bias.x",
        f"{ON_CLUSTER_LOOP}::test_batch_norm_and_padding_that_is_seen[emulated]",
    ),
    Mutation(
        "padding counted in the change",
        CLUSTER_LOOP,
        "threadIdx.x) / 16 < frames)",
        "threadIdx.x) / 16 < (frames > 0 ? kLoopFrames : 0))",
        f"{ON_CLUSTER_LOOP}::test_each_utterance_stops_at_the_depth_of_adaptive[emulated]",
    ),
    Mutation(
        "change compared with the input of all loops",
        CLUSTER_LOOP,
        "        before = now;\n",
        "",
        f"{ON_CLUSTER_LOOP}::test_each_utterance_stops_at_the_depth_of_adaptive[emulated]",
    ),
)

SCHEDULER, ON_EMULATOR = "csrc/emulation/scheduler.h", "tests/extension/test_emulator.py"
ON_LANDING = f"{ON_EMULATOR}::test_a_copy_reads_its_source_at_a_random_step_before_its_wait"

EMULATOR = (
    Mutation("copies land only at their wait", SCHEDULER, "        land_copies();\n", "", ON_LANDING),
    Mutation(
        "copies land at once",
        SCHEDULER,
        "step_ + 1 + delays_() % longest",
        "step_ + 1 + 0 * longest",
        ON_LANDING,
    ),
    Mutation(
        "a lane that another overtakes holds up its warp",
        SCHEDULER,
        "    if (uneven_) {\n        runnable_.erase(at);",
        "    if (false) {\n        runnable_.erase(at);",
        f"{ON_EMULATOR}::test_any_warp_may_run_ahead_to_where_a_barrier_is_missing[third]",
    ),
    Mutation(
        "the last warp always runs ahead",
        SCHEDULER,
        "first = uneven_ ? random_()",
        "first = false ? random_()",
        f"{ON_EMULATOR}::test_any_warp_may_run_ahead_to_where_a_barrier_is_missing[first]",
    ),
    Mutation(
        "products read their factors only at their wait",
        SCHEDULER,
        "    land_later([&block, group = shared_group, number] { finish_products(block, *group, number + 1); });\n",
        "",
        f"{ON_EMULATOR}::test_a_product_reads_its_factors_at_a_random_step_before_its_wait",
    ),
    Mutation(
        "factors read that were not shown to products",
        SCHEDULER,
        "if (block.unshown.empty() || block.unshown[offset / kCopy] == nullptr) continue;",
        "continue;",
        f"{ON_EMULATOR}::test_what_goes_wrong_with_products_is_named[products_not_shown]",
    ),
    Mutation(
        "columns of a row not swizzled",
        PRODUCTS_OF_GROUPS,
        "(eight % (kPanel / 8) ^ line * kLine / 32 % (kPanel / 8)) * 4",
        "eight % (kPanel / 8) * 4",
        f"{ON_EMULATOR}::test_right_kernels_pass_in_every_schedule[products_of_groups_32x64]",
    ),
    Mutation(
        "first columns of a panel multiplied by all of the left factor",
        PRODUCTS_OF_GROUPS,
        "16 * k / kPanel * (kRows * kLine / 4) + 16 * k % kPanel / 8",
        "16 * k / kPanel * (kRows * kLine / 4)",
        f"{ON_EMULATOR}::test_right_kernels_pass_in_every_schedule[products_of_groups_96x64]",
    ),
    Mutation(
        "stores to other blocks read before their release",
        SCHEDULER,
        "    touch_stores(place, offset, bytes);\n",
        "",
        f"{ON_EMULATOR}::test_what_goes_wrong_in_a_cluster_is_named[missing_wait_of_the_cluster]",
    ),
    Mutation(
        "an arrival releases the stores of its own thread alone",
        SCHEDULER,
        "s.owner == running_ || s.barriers < block.barriers",
        "s.owner == running_",
        f"{ON_EMULATOR}::test_right_kernels_pass_in_every_schedule[ring_of_blocks]",
    ),
    Mutation(
        "the barrier of a cluster waits for threads that have returned",
        SCHEDULER,
        "static_cast<int>(block->fibers.size()) - block->done;",
        "static_cast<int>(block->fibers.size());",
        f"{ON_EMULATOR}::test_right_kernels_pass_in_every_schedule[barrier_of_all_threads]",
    ),
)

REGISTRY = "lcconformer/ops/registry.py"
ON_INFO, ON_POLICY = "tests/test_info.py", "tests/test_policy.py"

DISPATCH = (
    Mutation(
        "backends on request chosen without a request",
        REGISTRY,
        "if name in self.on_request and (reasons or self.on_request[name](traits)):",
        "if name in self.on_request and reasons:",
        f"{ON_INFO}::test_a_backend_on_request_serves_only_where_it_is_forced",
    ),
    Mutation(
        "choices not kept apart by the forced backend",
        REGISTRY,
        "key = (traits, forced_backend(), strict())",
        "key = (traits, strict())",
        f"{ON_INFO}::test_a_backend_on_request_serves_only_where_it_is_forced",
    ),
    Mutation(
        "`with backend(...)` leaves its backend forced",
        REGISTRY,
        "        _forced.reset(token)\n",
        "",
        f"{ON_POLICY}::test_blocks_nest_and_end_with_an_error",
    ),
    Mutation(
        "chain: all loops leave their output in one place",
        "lcconformer/loop/chain.py",
        "k if all_states else 0), self._begin",
        "0), self._begin",
        "tests/loop/test_chain.py::test_launches_are_bound_once_for_all_loops_and_calls",
    ),
    Mutation(
        "chain: a copy of weights is bound",
        "lcconformer/loop/chain.py",
        "if not all(t.is_contiguous() for t in watch(stack).tensors()):",
        "if False:",
        "tests/loop/test_chain.py::test_weights_that_are_not_contiguous_are_left_to_the_modules",
    ),
)

MUTATIONS = (
    *TRITON,
    *CXX,
    *CUDA,
    *CUDA_OF_ATTENTION,
    *CUDA_OF_ATTENTION_BACKWARD,
    *CUDA_OF_WARPGROUPS,
    *CUDA_OF_CLUSTERS,
    *EMULATOR,
    *DISPATCH,
)


# pytest, and then where the package came from: behind the copy an editable install of the checkout lies in wait
RUN = """
import sys
from pathlib import Path
import pytest
pytest.main(sys.argv[2:])
used = [m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "lcconformer" and getattr(m, "__file__", None)]
foreign = [f for f in used if not Path(f).resolve().is_relative_to(sys.argv[1])]
sys.exit(f"not from the copy: {foreign[0]}" if foreign else 0)
"""


def run(command: Sequence[str], root: Path) -> tuple[int, str]:
    """Exit status and output of a command in ``root``, whose Python finds the package there."""
    # no bytecode: a change within a second, of the same length, would not be seen
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "LCCONFORMER_CUDA": "0"}
    process = subprocess.Popen(
        command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except BaseException as error:
        # with the process of the emulated kernels
        os.killpg(process.pid, signal.SIGKILL)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124, f"took more than {LIMIT} s"
    return process.returncode, output.strip()


def lacking_for_the_build() -> list[str]:
    """Requirements that pip's isolated build brings for itself."""
    lacking = []
    for name, least in (("setuptools", 77), ("pybind11", 2), ("ninja", 1)):
        try:
            major = int(importlib.metadata.version(name).split(".")[0])
        except importlib.metadata.PackageNotFoundError:
            major = 0
        if major < least and not (name == "ninja" and shutil.which("ninja")):
            lacking.append(f"{name}>={least}")
    return lacking


def build(root: Path) -> str:
    """The C++ extension, into the package; returns what went wrong, or nothing."""
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], root)
    return f"build failed: {output[-3000:]}" if status else ""


def run_tests(root: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Whether the tests in ``root`` passed, failed or gave no answer: "passed", "failed" or "broken", and why."""
    report = root / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    status, output = run([sys.executable, "-c", RUN, str(root), *options, *tests], root)
    if status or not report.exists():
        return "broken", output[-3000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    answers = [(child.tag, child.get("message", ""), child.text or "") for case in cases for child in case]
    for kind, message, text in answers:
        # a module that was built but does not load stops the process of the emulated kernels: no answer either
        if kind != "failure" or not message.startswith(ASSERTED) or "ImportError" in text:
            return "broken", f"{kind}: {message}\n{text[-3000:]}"
    if len(cases) != len(tests):
        return "broken", f"{len(cases)} tests ran instead of {len(tests)}: {output[-3000:]}"
    return ("failed", answers[0][1]) if answers else ("passed", "")


def check(mutation: Mutation, root: Path, build: Callable[[Path], str]) -> tuple[str, str]:
    """What becomes of one change: "caught", "MISSED" or "BROKEN", and why; the sources are left as they were."""
    path = root / mutation.file
    text = path.read_text()
    path.write_text(mutation.of(text))
    try:
        problem = build(root)
        answer, why = ("broken", problem) if problem else run_tests(root, [mutation.test])
    finally:
        path.write_text(text)
    return {"failed": "caught", "passed": "MISSED", "broken": "BROKEN"}[answer], why


def copy(root: Path) -> None:
    """The tracked files as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True)
    for name in listed.stdout.split("\0"):
        if (CHECKOUT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, root / name)
    # where an install has these two packages
    for name in ("kernels", "bench"):
        (root / "lcconformer" / name).symlink_to(root / name)


def sources(mutation: Mutation) -> str:
    """A name for the change and for the two files, of the checkout, that its outcome is read from."""
    texts = [(CHECKOUT / name).read_text() for name in (mutation.file, mutation.test.partition("::")[0])]
    return hashlib.sha256("\0".join([mutation.before, mutation.after, mutation.test, *texts]).encode()).hexdigest()[:16]


class Filed:
    """The outcomes in ``path``, a list of rows in JSON, or in no file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = json.loads(path.read_text()) if path and path.exists() else []
        self._lock = threading.Lock()

    def caught(self, mutation: Mutation) -> bool:
        row = next((row for row in self.rows if self._is_of(row, mutation)), {})
        return row.get("result") == "caught" and row["sources"] == sources(mutation)

    def file(self, mutation: Mutation, result: str) -> None:
        if self.path is None:
            return
        row = {"file": mutation.file, "name": mutation.name, "test": mutation.test, "result": result}
        row |= {"sources": sources(mutation), "commit": commit(self.path)}
        with self._lock:
            known = {(m.file, m.name) for m in MUTATIONS if m is not mutation}
            rows = [other for other in self.rows if (other["file"], other["name"]) in known]
            self.rows = sorted([*rows, row], key=lambda row: (row["file"], row["name"]))
            beside = self.path.with_name(f"{self.path.name}.tmp")
            beside.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
            beside.replace(self.path)

    @staticmethod
    def _is_of(row: dict[str, str], mutation: Mutation) -> bool:
        return (row["file"], row["name"]) == (mutation.file, mutation.name)


def commit(out: Path) -> str:
    """The checkout's commit, with ``-dirty`` where a tracked file but ``out`` was changed."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=CHECKOUT, check=True, stdout=subprocess.PIPE, text=True).stdout

    changed = [CHECKOUT / line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]
    dirty = any(path != out.resolve() for path in changed)
    return git("describe", "--always", "--exclude=*").strip() + "-dirty" * dirty


class Copies:
    """Copies of the checkout, built if need be; each serves one thread at a time."""

    def __init__(self, roots: Sequence[Path], build: Callable[[Path], str]) -> None:
        self.build = build
        self.count = len(roots)
        self.free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for root in roots:
            self.free.put(root)

    @contextmanager
    def one(self) -> Iterator[Path]:
        root = self.free.get()
        try:
            yield root
        finally:
            self.free.put(root)

    def prepare(self, root: Path) -> str:
        root.mkdir()
        copy(root)
        return self.build(root)

    def test(self, tests: Sequence[str]) -> tuple[str, str]:
        with self.one() as root:
            return run_tests(root, tests)

    def check(self, mutation: Mutation) -> tuple[str, str, float]:
        with self.one() as root:
            start = time.monotonic()
            result, why = check(mutation, root, self.build if mutation.needs_extension else lambda _: "")
            return result, why, time.monotonic() - start


def without_a_change(tests: Sequence[str], copies: Copies, pool: ThreadPoolExecutor) -> dict[str, str]:
    """The tests that do not pass on the sources as they are, and why: their changes have no answer."""
    wrong, parts = {}, [part for k in range(copies.count) if (part := tests[k :: copies.count])]
    while parts:
        halves = []
        for part, (answer, why) in zip(parts, pool.map(copies.test, parts)):
            if answer != "passed" and len(part) > 1:
                halves += [part[: len(part) // 2], part[len(part) // 2 :]]
            elif answer != "passed":
                wrong[part[0]] = f"{answer}: {why}"
        parts = halves
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="only changes with this in their name, file or test"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies that share the changes (default: 1)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="outcomes, in JSON; what is caught there is not made again"
    )
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs {asked.jobs}: at least 1")
    filed = Filed(asked.out)
    chosen = [m for m in MUTATIONS if asked.match in f"{m.name} {m.file} {m.test}"]
    if not chosen:
        parser.error(f"no change has {asked.match!r} in its name, file or test")
    # those that leave a changed extension behind come last
    left = sorted((m for m in chosen if not filed.caught(m)), key=lambda m: m.needs_extension)
    print(f"{len(chosen) - len(left)} of {len(chosen)} changes are filed as caught")
    extension = any(m.needs_extension for m in left)
    if extension and (lacking := lacking_for_the_build()):
        parser.error(f"the C++ extension needs what this environment lacks: pip install {shlex.join(lacking)}")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.jobs) as pool:
        roots = [Path(folder).resolve() / str(k) for k in range(min(asked.jobs, len(left)))]
        copies = Copies(roots, build if extension else lambda _: "")
        print(f"building and testing without a change in {folder}", flush=True)
        for problem in pool.map(copies.prepare, roots):
            if problem:
                sys.exit(problem)
        wrong = without_a_change(list(dict.fromkeys(m.test for m in left)), copies, pool)
        caught = len(chosen) - len(left)
        tried = [m for m in left if m.test not in wrong]
        for mutation in left:
            if mutation.test in wrong:
                print(
                    f"BROKEN  {mutation.name}  {mutation.test} without the change: {wrong[mutation.test]}", flush=True
                )
        for mutation, (result, why, seconds) in zip(tried, pool.map(copies.check, tried), strict=True):
            filed.file(mutation, result)
            print(f"{result}  {mutation.name}  {mutation.test}  {seconds:.1f} s", flush=True)
            if result == "BROKEN":
                print(why, flush=True)
            caught += result == "caught"
    print(f"{caught} of {len(chosen)} caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
