// What the CPU kernels take: pointers, sizes, strides in elements. One set of kernels per SIMD level, chosen at run time.
//
// Big tensors are float32 or bfloat16 (`bf16`), their last dimension has stride 1; parameters and statistics are float32.
// Every result is independent of the number of threads: sums over rows go by parts that depend on the sizes alone.
#pragma once

#include <cstdint>

namespace lcc {

// Element (row, col) is dropped if 16 bits of Philox-4x32-7 are below the threshold; see lcconformer/kernels/_common.py.
struct Dropout {
    const int64_t* seed;  // null: none
    uint32_t threshold;
    float scale;  // 1 / probability of being kept
};

struct Heads {  // [B, T, H, D], or [frames, H, D] packed
    void* data;
    int64_t stride_b, stride_t, stride_h;
};

struct Attention {
    Heads q, k, v;
    const void* pos;  // [2T-1, H, D], or null
    int64_t pos_stride_t, pos_stride_h;
    const float* pos_panels;  // pos as pack_positions leaves it; null: forward packs it itself
    const float *u, *v_bias;  // [H, D], or null
    const int64_t* lengths;     // [B], or null
    const int64_t* cu_seqlens;  // [B+1], or null: utterance b is the frames cu_seqlens[b] ... cu_seqlens[b+1]-1
    void* out;                  // [rows, H, D] contiguous
    float* lse;                 // [H, rows], log2 of the sum of 2^score; null: not wanted
    Dropout dropout;
    int64_t B, T, H, D, rows;  // rows: B*T, or the packed frames; T: of an utterance at most
    bool bf16;
    int threads;
    // backward
    Heads dout;
    void *dq, *dk, *dv;          // [rows, H, D] contiguous
    float *dpos, *du, *dv_bias;  // [2T-1, H, D], [H, D], [H, D]
};

enum Norm : int { kNone = 0, kLayer = 1, kRunning = 2, kBatch = 3, kGroup = 4 };

struct Conv {
    const void* x;  // [B, T, 2C]
    int64_t x_stride_b, x_stride_t;
    const float *taps, *bias;  // [K, C], [C] or null
    const int64_t* lengths;    // [B], or null
    Norm norm;
    const float *norm_weight, *norm_bias;  // [C], or null
    float *mean, *var;                     // [C]; [B, G] for kGroup; unused for kNone, kLayer
    float* count;                          // [1], real frames (kBatch)
    void* out;                             // [B, T, C] contiguous
    void* y;                               // [B, T, C] contiguous, the convolution before the norm, or null
    int64_t B, T, C, K, groups;
    float eps;
    bool bf16;
    int threads;
    // backward
    const void* dout;
    int64_t dout_stride_b, dout_stride_t;
    void* dx;                     // [B, T, 2C] contiguous
    float *dtaps, *dbias, *dnorm;  // [K, C], [C], [2, C]: bias, then weight; null for kNone
};

struct LayerNorm {  // s = x + alpha * drop(y), n = LN(s)
    const void *x, *y;  // [M, D]; y null: s is x and not stored
    int64_t x_stride, y_stride;
    const float *weight, *bias;  // [D]
    void *s, *n;                 // [M, D] contiguous
    float *mean, *rstd;          // [M], or null
    float alpha, eps;
    Dropout dropout;
    int64_t M, D;
    bool bf16;
    int threads;
    // backward, from x as s: dx = ds + LN'(dn), dy = alpha * drop'(dx); n again if it is not null
    const void *dn, *ds;
    int64_t dn_stride, ds_stride;
    void *dx, *dy;   // [M, D] contiguous; dy may be null
    float* dparams;  // [2, D]: weight, then bias
};

struct Pointwise {  // the elementwise parts of feed_forward on [M, N], contiguous unless a stride is given
    const void *u, *x, *d;  // pre-activation; residual stream; incoming gradient
    int64_t x_stride, d_stride;
    const float* bias;  // [N], or null
    void *out, *g;
    float* dbias;  // [N]
    float scale;
    Dropout dropout;
    uint32_t stream;  // of the dropout
    int64_t M, N;
    bool bf16;
    int threads;
};

struct Matrix {  // y = x W + bias, float32
    static constexpr int64_t PANEL = 64;
    const float* panels;  // [columns / PANEL rounded up, inputs, PANEL]; null: no matrix
    const float* bias;    // [columns], zero up to a multiple of PANEL
    int64_t inputs, columns;
};

struct Affine {  // of a LayerNorm; null: no norm
    const float *weight, *bias;  // [D]
};

// What a layer does to each row between attention and convolution, for inference, float32. In this order, each if there:
//   x += merge(branch);   x += down(silu(up(LN(x))));   out = next(LN(x)), or without a matrix x = LN(x)
struct Rows {
    float* x;             // [M, D], changed in place
    const float* branch;  // [M, inputs of merge]
    Matrix merge, up, down, next;
    Affine hidden_norm, norm;
    float* out;          // [M, out_stride]
    int64_t out_stride;  // at least the columns of next, rounded up to PANEL
    float eps;
    int64_t M, D;  // branch and out have rows up to a multiple of 6
    int threads;
};

struct Kernels {
    void (*attention_forward)(const Attention&);
    void (*attention_backward)(const Attention&);
    int64_t (*position_floats)(int64_t T, int64_t D);  // of one head's pos_panels
    void (*pack_positions)(const Attention&);          // from pos into out
    void (*conv_forward)(const Conv&);
    void (*conv_backward)(const Conv&);
    void (*layer_norm_forward)(const LayerNorm&);
    void (*layer_norm_backward)(const LayerNorm&);
    void (*activation_forward)(const Pointwise&);   // out = drop(silu(u + bias))
    void (*activation_backward)(const Pointwise&);  // out = silu'(u + bias) * drop'(d), g = drop(silu(u + bias)), dbias
    void (*residual_forward)(const Pointwise&);     // out = x + scale * drop(u + bias)
    void (*residual_backward)(const Pointwise&);    // out = scale * drop'(d), dbias
    void (*rows_forward)(const Rows&);
};

const Kernels& kernels();

struct Bytes {
    const void* data;
    int64_t size;
};

// Of up to 64 words of 4 bytes of each part, first and last among them, evenly spread.
uint64_t fingerprint(const Bytes* parts, int64_t n);

// "generic", "avx2", "avx512": the level in use, those this processor runs, and a switch for tests (false: unknown).
const char* simd_level();
bool has_simd_level(const char* name);
bool use_simd_level(const char* name);

}  // namespace lcc
