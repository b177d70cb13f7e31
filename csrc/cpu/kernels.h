// What the CPU kernels take: pointers, sizes, strides in elements. Each SIMD level has its set, chosen at run time.
//
// Big tensors are float32 or bfloat16, their last dimension has stride 1; parameters and statistics are float32.
// Every result is independent of the number of threads: sums over rows go by parts that depend on the sizes alone.
// csrc/cpu/bindings.cpp makes a Python class of each struct and says which fields it demands.
#pragma once

#include <cstdint>

#include "element.h"

namespace lcc::cpu {

constexpr int64_t kPanelColumns = 64;      // of a packed matrix
constexpr int64_t kHiddenColumns = 256;    // of the feed-forward's hidden layer that rows_forward has at a time
constexpr int64_t kProductFloats = 12288;  // of the memory that product_in_cache works in
constexpr int64_t kTileRows = 2;           // rows_forward touches rows of its inputs and outputs up to a multiple

// An element is dropped if its 16 bits of Philox-4x32-7 are below the threshold; see kernels/common.py.
struct Dropout {
    const int64_t* seed = nullptr;  // null: none
    uint32_t threshold = 0;
    float scale = 1.0f;  // 1 / probability of being kept
};

Dropout make_dropout(const int64_t* seed, double p);

struct Heads {  // [B, T, H, D], or [frames, H, D] packed
    const void* data;
    int64_t batch_stride, frame_stride, head_stride;
};

struct RelposAttention {
    Element element;
    int64_t batch, frames, heads, head_dim;  // B, T (of an utterance at most), H, D
    int64_t total_frames;                    // B*T, or the packed frames
    Heads q, k, v;
    const void* pos;  // [2T-1, H, D], or null
    int64_t pos_frame_stride, pos_head_stride;
    const float *u, *v_bias;    // [H, D], or null
    const int64_t* lengths;     // [B], or null
    const int64_t* cu_seqlens;  // [B+1], or null: utterance b is the frames cu_seqlens[b] ... cu_seqlens[b+1]-1
    void* out;                  // [total_frames, H, D] contiguous
    float* lse;                 // [H, total_frames], log2 of the sum of 2^score
    Dropout dropout;
    int threads;
};

// lse may be null: not wanted
struct RelposAttentionForward : RelposAttention {
    const void* pos_panels;  // pos as relpos_attention_pack_positions leaves it, instead of pos
    // of the operands of the three products, summed up in float32; bfloat16 with elements of bfloat16 alone
    Element products = Element::float32;
    bool own_threads = false;  // for a call between others of ours alone: the threads of pool.h instead of OpenMP's
};

struct RelposAttentionBackward : RelposAttention {
    Heads dout;
    void *dq, *dk, *dv;          // [total_frames, H, D] contiguous
    float *dpos, *du, *dv_bias;  // [2T-1, H, D], [H, D], [H, D]
};

struct RelposAttentionPackPositions {
    Element element;
    int64_t frames, heads, head_dim;  // T, H, D
    const void* pos;                  // [2T-1, H, D]
    int64_t pos_frame_stride, pos_head_stride;
    void* pos_panels;  // [H, relpos_attention_position_size(products, T, D)] of `products`
    Element products;  // of the attention that they are for
    int threads;
};

// the exact gelu, x Phi(x)
enum class Activation : int { silu, gelu, relu };

// running: statistics are given; batch, group: taken from the input
enum class Norm : int { none, layer, running, batch, group };

struct GluDepthwiseConv {
    Element element;
    int64_t batch, frames, channels, width;  // B, T, C, K
    const void* x;                           // [B, T, 2C]
    int64_t x_batch_stride, x_frame_stride;
    const float* taps;       // [K, C]
    const int64_t* lengths;  // [B], or null
    Norm norm;
    int64_t groups = 1;                    // G, of Norm::group
    const float *norm_weight, *norm_bias;  // [C], or null
    void* y;                               // [B, T, C] contiguous, the convolution before the norm
    float *mean, *var;                     // [C]; [B, G] for group; unused for none, layer
    float* count;                          // [1], real frames (batch)
    float eps;
    Activation activation;
    int threads;
};

// y may be null, except with batch and group
struct GluDepthwiseConvForward : GluDepthwiseConv {
    const float* bias;         // [C] or null
    void* out;                 // [B, T, C] contiguous
    bool own_threads = false;  // as in RelposAttentionForward
};

struct GluDepthwiseConvBackward : GluDepthwiseConv {
    const void* dout;  // [B, T, C]
    int64_t dout_batch_stride, dout_frame_stride;
    void* dx;                      // [B, T, 2C] contiguous
    float *dtaps, *dbias, *dnorm;  // [K, C], [C], [2, C]: bias, then weight; null for none
};

struct ResidualLayerNormForward {  // s = x + alpha * drop(y), n = LN(s)
    Element element;
    int64_t rows, columns;  // M, D
    const void *x, *y;      // [M, D]; y null: s is x and not stored
    int64_t x_row_stride, y_row_stride;
    const float *weight, *bias;  // [D]
    void *s, *n;                 // [M, D] contiguous
    float *mean, *rstd;          // [M], or null
    float alpha = 1.0f, eps;
    Dropout dropout;
    int threads;
};

struct ResidualLayerNormBackward {  // dx = ds + LN'(dn), dy = alpha * drop'(dx); n again if it is not null
    Element element;
    int64_t rows, columns;    // M, D
    const void *s, *dn, *ds;  // [M, D]
    int64_t s_row_stride, dn_row_stride, ds_row_stride;
    const float *weight, *bias;  // [D]; bias for n alone
    const float *mean, *rstd;    // [M]
    void *n, *dx, *dy;           // [M, D] contiguous; n and dy may be null
    float* dparams;              // [2, D]: weight, then bias
    float alpha = 1.0f;
    Dropout dropout;
    int threads;
};

// The elementwise parts of feed_forward on [M, N], contiguous unless a stride is given.
struct FeedForwardElements {
    Element element;
    int64_t rows, columns;  // M, N
    const float* bias;      // [N], or null
    void* out;
    Dropout dropout;
    int threads;
};

struct FeedForwardActivationForward : FeedForwardElements {  // out = drop(act(u + bias))
    Activation activation;
    const void* u;
};

struct FeedForwardActivationBackward
    : FeedForwardElements {  // out = act'(u + bias) * drop'(d), g = drop(act(u + bias))
    Activation activation;
    const void *u, *d;
    void* g;
    float* dbias;  // [N], sum of out
};

struct FeedForwardResidualForward : FeedForwardElements {  // out = x + scale * drop(u + bias)
    const void *u, *x;
    int64_t x_row_stride;
    float scale;
};

struct FeedForwardResidualBackward : FeedForwardElements {  // out = scale * drop'(d)
    const void* d;
    int64_t d_row_stride;
    float* dbias;  // [N], sum of out
    float scale;
};

struct Matrix {  // y = x W + bias
    const void*
        panels;         // [columns / kPanelColumns rounded up, inputs, kPanelColumns]; null: no matrix. In bfloat16 two
                        // inputs are neighbours, [..., inputs / 2 rounded up, kPanelColumns, 2], zero beyond the last
    const float* bias;  // [columns], zero up to a multiple of kPanelColumns
    int64_t inputs, columns;
    // of int8 weights, W = panels * scales, [..., inputs / 4 rounded up, kPanelColumns, 4], zero beyond the last; null:
    // others. Each row of x is rounded to bytes before, x = (bytes - 128) * its largest magnitude / 127, so that the
    // sums of a column start at -128 times that of its weights, for each group of kHiddenColumns inputs in `down`
    const float* scales = nullptr;    // [columns rounded up]
    const int32_t* starts = nullptr;  // [groups, columns rounded up]
};

struct Affine {                  // of a LayerNorm; null: no norm
    const float *weight, *bias;  // [D]
};

// What a layer does to each row between attention and convolution, for inference. In this order, each if there:
//   x += merge(branch);   x += down(act(up(LN(x))));   out = next(LN(x)), or without a matrix x = LN(x)
// In bfloat16 the matrices multiply bfloat16 into float32, and x and the norms are float32. Matrices of int8 are so all
// of them; the hidden layer of the feed-forward is rounded to 8 bits by groups of kHiddenColumns.
struct RowsForward {
    Element element;        // of branch, of panels that are not int8, and of out
    int64_t rows, columns;  // M, D
    float* x;               // [M, D], changed in place
    const void* branch;     // [M, inputs of merge]
    Matrix merge, up, down, next;
    Activation activation = Activation::silu;
    Affine hidden_norm, norm;
    void* out;               // [M, out_row_stride]
    int64_t out_row_stride;  // at least the columns of next, rounded up to kPanelColumns
    float eps;
    int threads;  // branch and out have rows up to a multiple of kTileRows
};

struct Convert {  // to = from, rounded to nearest
    Element element, to_element;
    int64_t size;  // elements
    const void* from;
    void* to;
    int threads;
};

// kernel, struct of its arguments
#define LCC_KERNELS(KERNEL)                                                 \
    KERNEL(relpos_attention_forward, RelposAttentionForward)                \
    KERNEL(relpos_attention_backward, RelposAttentionBackward)              \
    KERNEL(relpos_attention_pack_positions, RelposAttentionPackPositions)   \
    KERNEL(glu_depthwise_conv_forward, GluDepthwiseConvForward)             \
    KERNEL(glu_depthwise_conv_backward, GluDepthwiseConvBackward)           \
    KERNEL(residual_layer_norm_forward, ResidualLayerNormForward)           \
    KERNEL(residual_layer_norm_backward, ResidualLayerNormBackward)         \
    KERNEL(feed_forward_activation_forward, FeedForwardActivationForward)   \
    KERNEL(feed_forward_activation_backward, FeedForwardActivationBackward) \
    KERNEL(feed_forward_residual_forward, FeedForwardResidualForward)       \
    KERNEL(feed_forward_residual_backward, FeedForwardResidualBackward)     \
    KERNEL(rows_forward, RowsForward)                                       \
    KERNEL(convert, Convert)

struct Kernels {
#define LCC_MEMBER(kernel, Arguments) void (*kernel)(const Arguments&);
    LCC_KERNELS(LCC_MEMBER)
#undef LCC_MEMBER
    // elements of one head's pos_panels
    int64_t (*relpos_attention_position_size)(Element products, int64_t frames, int64_t head_dim);
    void (*product_in_cache)(Element products, float* memory);
};

const Kernels& kernels();

struct Bytes {
    const void* data;
    int64_t size;
};

// How many times as fast as products of float32 those of bfloat16 are, measured once, at the best level. The processors
// differ: an EPYC 9004 starts as many vdpbf16ps as fused multiply-adds, a Xeon of the Emerald Rapids class one in two
// cycles instead of four: without its AMX it multiplies twice as fast in float32.
double bfloat16_gain();

// A hash of all words of 4 bytes of each part, or of up to 64, first and last among them, evenly spread.
uint64_t fingerprint(const Bytes* parts, int64_t n, bool complete);

// "generic", "avx2", "avx512", "avx512bf16": the level in use, those this processor runs, and a switch for tests
// (false: unknown).
const char* simd_level();
bool has_simd_level(const char* name);
bool use_simd_level(const char* name);

}  // namespace lcc::cpu
