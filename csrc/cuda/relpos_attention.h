// Attention with relative positions.
//
//     S[i, j] = ((q_i + u) . k_j + (q_i + v_bias) . pos[T - 1 - i + j]) / sqrt(D)
//     out_i = sum_j dropout(softmax(S)[i, j]) v_j,    lse_i = log2 sum_j 2^(S[i, j] log2 e)
//
// over the keys that an utterance has: all, the first lengths[b], or its own range of packed frames. An utterance
// without keys gives zeros. B batch, T frames, H heads, D head dim; elements are float16 or bfloat16, sums float32.
// Dropout is that of kernels/common.py, bit by bit, and lse that of kernels/relpos_attention.py. Forward the scores
// exist in registers only; backward the weights and the gradient of the scores go through a scratch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace lcc::cuda {

// A block has a row of warps with 16 queries each, and walks over the keys, 32 at a time.
constexpr int kRelposWarps = 8;
constexpr int kRelposRows = 16;
constexpr int kRelposKeys = 32;
constexpr int kRelposStages = 2;  // of what a block walks over: a tile and the next
// of positions: a tile of 32 for the tile of keys, older ones, which the later rows are still at, and the next
constexpr int relpos_attention_position_tiles(int warps) { return warps * kRelposRows / kRelposKeys + 2; }

// Backward, blocks of four warps for 64 queries, two of which share 64 keys for each of dk and dv, and of two warps for
// 64 positions.
constexpr int kRelposBackwardWarps = 4;
constexpr int kRelposColumns = 64;
constexpr int kRelposPositionWarps = 2;

// floats from one row of D elements to the next: eight rows of eight elements lie in 32 banks
constexpr int relpos_attention_pitch(int head_dim) { return head_dim / 2 + 4; }
// bytes of dynamic shared memory of a block that walks over keys: keys, values and positions
constexpr size_t relpos_attention_shared(int head_dim, int warps = kRelposWarps) {
    return (2 * kRelposStages + relpos_attention_position_tiles(warps)) * kRelposKeys *
           relpos_attention_pitch(head_dim) * sizeof(float);
}
// The forward pass by warpgroups, on sm_90a: two with 64 queries each, which walk over the keys 64 at a time. Of
// positions there is a tile for each, and the next; heads of 128 have their queries with either bias in shared memory.
constexpr int kRelposWarpgroups = 2;
constexpr int kRelposWarpgroupRows = 64;
constexpr int kRelposWarpgroupKeys = 64;
constexpr int kRelposWarpgroupPositionTiles = kRelposWarpgroups + 2;
constexpr size_t relpos_attention_warpgroups_shared(int head_dim) {
    const int queries = head_dim > 96 ? 2 * kRelposWarpgroups * kRelposWarpgroupRows : 0;
    return ((2 * kRelposStages + kRelposWarpgroupPositionTiles) * kRelposWarpgroupKeys + queries) * head_dim * 2;
}
// ... backward also two numbers of each row, and sums over the rows of each warp
constexpr size_t relpos_attention_rows_shared(int head_dim) {
    return relpos_attention_shared(head_dim, kRelposBackwardWarps) +
           kRelposBackwardWarps * (2 * kRelposRows + head_dim) * sizeof(float);
}
// ... of a block that walks over queries, 32 at a time: `factors` matrices [32, kRelposColumns] and [32, D]
constexpr size_t relpos_attention_columns_shared(int head_dim, int factors) {
    return kRelposStages * factors * 32 * (kRelposColumns / 2 + relpos_attention_pitch(head_dim)) * sizeof(float);
}
constexpr size_t relpos_attention_keys_shared(int head_dim) {
    return relpos_attention_columns_shared(head_dim, 2) + kRelposBackwardWarps / 2 * head_dim * sizeof(float);
}

// The scratch of a head backward, in elements: blocks of 8 x 8, then q + u and q + v_bias. The blocks are in order of
// their strip of 16 rows, their columns, their matrix (dropped weights, dS, dR), and which half of the strip they are.
constexpr int64_t relpos_attention_strips(int64_t frames) { return (frames + kRelposRows - 1) / kRelposRows; }
constexpr int64_t relpos_attention_blocks(int64_t frames) {
    return (frames + kRelposKeys - 1) / kRelposKeys * (kRelposKeys / 8);
}
// dR[i, T - 1 - i + j] = dS[i, j]: 16 more columns for the 16 rows
constexpr int kRelposMoreBlocks = kRelposRows / 8;
constexpr int kRelposMatrices = 3;
constexpr int64_t relpos_attention_strip(int64_t frames) {
    return (relpos_attention_blocks(frames) + kRelposMoreBlocks) * kRelposMatrices * kRelposRows * 8;
}
constexpr int64_t relpos_attention_scratch(int64_t frames, int head_dim) {
    return relpos_attention_strips(frames) * (relpos_attention_strip(frames) + 2 * kRelposRows * head_dim);
}

// rows of D adjacent elements, by utterance, frame and head: multiples of 8 elements apart, the first at one of 16
// bytes
struct RelposHeads {
    const void* data;  // [B, T, H, D], or [frames in all, H, D] with cu_seqlens
    int64_t batch_stride, frame_stride, head_stride;
};

struct RelposAttention {
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
    int device;
    uintptr_t stream;    // cudaStream_t
    uint32_t threshold;  // set by the launcher: of 2^16, the share of weights that are dropped
    float keep_scale;    // set by the launcher: what the others are multiplied by
};

struct RelposAttentionForward : RelposAttention {
    bool warpgroups;  // by their products; the device has them
    void* out;        // as q, contiguous
    float* lse;       // [H, frames in all]
};

// whether the device has products of warpgroups, sm_90, and the kernel is built for them
bool relpos_attention_has_warpgroups(int device);

void relpos_attention_forward(const RelposAttentionForward& op);
// the same by products of warpgroups, with arguments that are prepared
void relpos_attention_forward_by_warpgroups(const RelposAttentionForward& op);

struct RelposAttentionBackward : RelposAttention {
    const void* out;   // of the forward pass
    const float* lse;  // of the forward pass
    RelposHeads dout;
    void* dq;        // as q, contiguous
    void* dk;        // as k, contiguous
    void* dv;        // as v, contiguous
    float* dpos;     // [parts, 2 T - 1, H, D], parts of the gradient's sum
    float* du;       // [B tiles, H, D], parts of the sum; tiles of 64 frames
    float* dv_bias;  // [2 B tiles, H, D], parts of the sum
    void* scratch;   // [slots, relpos_attention_scratch], aligned to 16 bytes; need not be set
    int64_t slots;   // heads that are worked on at a time
    int parts;       // of relpos_attention_parts
    int64_t first;   // set by the launcher: the first of these heads, of B H
    int64_t here;    // set by the launcher: how many they are
};

// Functions of the sizes alone: the order of every sum, and so every bit of the gradients, is the same on each run and
// each device.
//
// Heads whose scratch stays in the L2 of an H100 or H200, 50 MB, or more where those would not fill 132 multiprocessors
int64_t relpos_attention_slots(int64_t batch, int64_t frames, int heads, int head_dim);
// in how many parts the utterances of `slots` heads are added up: about four blocks for each of 132 multiprocessors
int relpos_attention_parts(int64_t slots, int64_t frames, int heads);

void relpos_attention_backward(const RelposAttentionBackward& op);

}  // namespace lcc::cuda
