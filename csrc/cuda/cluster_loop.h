// The shared loop of 16 frames or fewer in the shared memory of a cluster: all loops of a layer in one launch, in
// bfloat16. A matrix is [outputs, inputs], contiguous; every row starts at a multiple of 16 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lcc::cuda {

constexpr int kLoopBlocks = 16;  // of the cluster that an utterance has to itself
constexpr int kLoopThreads = 256;
constexpr int kLoopFrames = 16;    // rows of a product of tensor cores
constexpr int kLoopWidth = 256;    // d_model
constexpr int kLoopHidden = 1024;  // of the feed-forwards
constexpr int kLoopHeads = 4;
constexpr int kLoopWeights = 4 * kLoopWidth * kLoopHidden + 7 * kLoopWidth * kLoopWidth;  // elements of the matrices

// Floats of a block's shared memory. A block has a sixteenth of every matrix, and of the activations
constexpr int kLoopReceived = kLoopBlocks * kLoopFrames * kLoopWidth / kLoopBlocks;  // partial sums of its columns
constexpr int kLoopGathered = kLoopFrames * kLoopWidth / 2;                          // the stream in bfloat16
constexpr int kLoopNormalised = kLoopFrames * kLoopWidth / 2;     // left factor of the products that come first
constexpr int kLoopPositions = 32 * kLoopWidth / kLoopHeads / 2;  // positions of its head
constexpr int kLoopExchanged = 3 * kLoopFrames * kLoopWidth / kLoopHeads / 2;  // queries + u, queries + v_bias, keys
constexpr int kLoopTile = kLoopFrames * kLoopWidth / kLoopBlocks / 2;          // 16 columns in bfloat16
constexpr int kLoopSums = 2 * kLoopThreads / 32;                               // of a warp each: change, size
constexpr int kLoopBarrier = 4;

constexpr size_t cluster_loop_shared() {
    return (kLoopWeights / kLoopBlocks / 2 + kLoopReceived + kLoopGathered + kLoopNormalised + kLoopPositions +
            kLoopExchanged + kLoopTile + kLoopSums + kLoopBarrier) *
           sizeof(float);
}
static_assert(cluster_loop_shared() <= (227 << 10), "a block of sm_90 has 227 KiB");

// weight and bias of a norm, or a matrix and its bias; null: no bias
struct LoopPart {
    const void* weight;
    const void* bias;
};

struct ClusterLoop {
    int64_t batch, frames;   // B, T
    int64_t depth;           // loops at most
    int64_t min_depth;       // loops before the first test of the exit rule
    double threshold;        // of the normalised change between two loops, below which an utterance stops; 0: never
    const void* x;           // [B, T, d_model]
    const int64_t* lengths;  // [B] or null
    bool masked;             // whether the convolution takes frames beyond the length for zeros
    LoopPart ffn1_norm, ffn1_up, ffn1_down;
    LoopPart attention_norm, qkv, attention_out;
    const void* pos;     // [2 T - 1, d_model], projected
    const void* u;       // [H, D]
    const void* v_bias;  // [H, D]
    LoopPart conv_norm, pointwise1, depthwise, pointwise2;
    int64_t width;             // of the depthwise convolution, odd
    LoopPart depthwise_norm;   // null: none
    const void* running_mean;  // [d_model] of a BatchNorm, or null: a LayerNorm
    const void* running_var;
    LoopPart ffn2_norm, ffn2_up, ffn2_down;
    LoopPart norm;
    double eps;
    void* out;             // [B, T, d_model] of the last loop of each utterance, or null
    void* states;          // [depth, B, T, d_model] of all loops, or null
    int64_t* exit_depths;  // [B] or null
    int device;
    uintptr_t stream;  // cudaStream_t
};

void cluster_loop(const ClusterLoop& op);
// whether the GPU can hold a cluster
bool cluster_loop_fits(int device);

}  // namespace lcc::cuda
