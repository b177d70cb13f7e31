// Attention with relative positions, forward: the scores exist in registers only.
//
//     S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos[T - 1 - i + j]) / sqrt(D)
//     out_i = sum_j dropout(softmax(S)[i, j]) v_j,    lse_i = log2 sum_j 2^(S[i, j] log2 e)
//
// over the keys that an utterance has: all, the first lengths[b], or its own range of packed frames. An utterance
// without keys gives zeros. B batch, T frames, H heads, D head dim; elements are float16 or bfloat16, sums float32.
// Dropout is that of kernels/common.py, bit by bit, and lse what the backward pass of kernels/relpos_attention.py
// takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace lcc::cuda {

// A block has a row of warps with 16 queries each, and walks over the keys, 32 at a time.
constexpr int kRelposWarps = 8;
constexpr int kRelposRows = 16;
constexpr int kRelposKeys = 32;
constexpr int kRelposStages = 2;  // of keys and values: a tile and the next
// of positions: a tile of 32 for the tile of keys, four older ones, which the later rows are still at, and the next
constexpr int kRelposPositionTiles = kRelposWarps * kRelposRows / kRelposKeys + 2;

// floats from one row of D elements to the next: eight rows of eight elements lie in 32 banks
constexpr int relpos_attention_pitch(int head_dim) { return head_dim / 2 + 4; }
// bytes of dynamic shared memory of a block
constexpr size_t relpos_attention_shared(int head_dim) {
    return (2 * kRelposStages + kRelposPositionTiles) * kRelposKeys * relpos_attention_pitch(head_dim) * sizeof(float);
}

// rows of D adjacent elements, by utterance, frame and head: multiples of 8 elements apart, the first at one of 16
// bytes
struct RelposHeads {
    const void* data;  // [B, T, H, D], or [frames in all, H, D] with cu_seqlens
    int64_t batch_stride, frame_stride, head_stride;
};

struct RelposAttentionForward {
    Element element;
    int64_t batch, frames, total_frames;  // B, T, frames of all utterances
    int heads, head_dim;                  // H; D is 32, 64, 96 or 128
    RelposHeads q, k, v;
    RelposHeads pos;            // [2 T - 1, H, D], no batch_stride
    const void* u;              // [H, D]
    const void* v_bias;         // [H, D]
    const int64_t* lengths;     // [B] or null
    const int64_t* cu_seqlens;  // [B + 1] or null
    const int64_t* seed;        // [1], or null: no dropout
    double dropout_p;           // the probability that a weight is dropped
    void* out;                  // as q, contiguous
    float* lse;                 // [H, frames in all]
    int device;
    uintptr_t stream;    // cudaStream_t
    uint32_t threshold;  // set by the launcher: of 2^16, the share of weights that are dropped
    float keep_scale;    // set by the launcher: what the others are multiplied by
};

void relpos_attention_forward(const RelposAttentionForward& op);

}  // namespace lcc::cuda
