// A register of floats as a portable vector type, and what the kernels do with one.
//
// Everything here is static and in a namespace of the SIMD level: a function shared between levels could be merged by
// the linker into the one copy that uses instructions the processor lacks. No templates of the standard library either.
#pragma once

#if defined(__AVX512F__)
// GCC 12 takes the "undefined" registers of its own header for a mistake (its bug 105593)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace lcc::cpu {
namespace LCC_SIMD {

#if defined(__AVX512F__)
constexpr int W = 16;            // floats in a register
constexpr int kTileColumns = 4;  // of a product's tile in registers: 6 x 4 sums, 4 columns, 1 broadcast of 32 registers
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kTileColumns = 2;  // 6 x 2 sums, 2 columns, 1 broadcast of 16 registers
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int kTileColumns = 4;
#else
constexpr int W = 4;
constexpr int kTileColumns = 2;
#endif

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ivec __attribute__((vector_size(4 * W)));
typedef uint32_t uvec __attribute__((vector_size(4 * W)));
typedef uint8_t bvec __attribute__((vector_size(W)));
typedef uint16_t hvec __attribute__((vector_size(2 * W)));
typedef float vec_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t hvec_memory __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

static inline int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t cdiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return cdiv(a, b) * b; }

static inline vec splat(float x) { return x - vec{}; }

static inline vec load(const float* p) { return *reinterpret_cast<const vec_memory*>(p); }
static inline void store(float* p, vec x) { *reinterpret_cast<vec_memory*>(p) = x; }

static inline vec load(const bf16* p) {
    hvec half = *reinterpret_cast<const hvec_memory*>(p);
    return (vec)(__builtin_convertvector(half, uvec) << 16);
}

// to nearest, ties to even; NaN stays NaN. AVX512-BF16 makes denormal numbers, below 1.2e-38, zero.
static inline void store(bf16* p, vec x) {
#if defined(__AVX512BF16__)
    *reinterpret_cast<hvec_memory*>(p) = (hvec)_mm512_cvtneps_pbh((__m512)x);
    return;
#endif
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = x != x ? (bits >> 16) | 0x40u : rounded;
    *reinterpret_cast<hvec_memory*>(p) = __builtin_convertvector(rounded, hvec);
}

// the lowest byte of each lane
static inline void store(uint8_t* p, ivec x) {
    bvec bytes = __builtin_convertvector(x, bvec);
    memcpy(p, &bytes, sizeof bytes);
}

// the first n < W elements, zeros after them
template <class T>
static inline vec load_first(const T* p, int64_t n) {
    T part[W];
    memset(part, 0, sizeof part);
    memcpy(part, p, n * sizeof(T));
    return load(part);
}

template <class T>
static inline void store_first(T* p, vec x, int64_t n) {
    T part[W];
    store(part, x);
    memcpy(p, part, n * sizeof(T));
}

// of a row of n elements, the W from i on
template <class T>
static inline vec load_at(const T* p, int64_t i, int64_t n) {
    return i + W <= n ? load(p + i) : load_first(p + i, n - i);
}

template <class T>
static inline void store_at(T* p, vec x, int64_t i, int64_t n) {
    if (i + W <= n) store(p + i, x);
    else store_first(p + i, x, n - i);
}

// x with zeros from lane n on
static inline vec first_lanes(vec x, int64_t n) {
    if (n >= W) return x;
    float lanes[W];
    store(lanes, x);
    return load_first(lanes, n);
}

static inline vec max(vec a, vec b) { return a > b ? a : b; }

// the order is the same with and without AVX-512
static inline float sum(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float s[W];
    store(s, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) s[i] += s[i + half];
    return s[0];
}

static inline float max(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#endif
    float m[W];
    store(m, x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) m[i] = m[i] > m[i + half] ? m[i] : m[i + half];
    return m[0];
}

// 2^x to 2 ulp; 0 below -126, 2^127 above; NaN stays NaN. A degree-6 minimax polynomial on [-1/2, 1/2].
static inline vec exp2(vec x) {
#if defined(__AVX512F__)
    // the second operand if one is NaN
    vec y = (vec)_mm512_min_ps((__m512)splat(127.0f), (__m512)x);
    vec whole = (vec)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vec f = y - whole;
#else
    vec y = x > 127.0f ? splat(127.0f) : x;
    y = y < -126.0f ? splat(-126.0f) : y;
    vec shifted = y + 12582912.0f;  // 1.5 * 2^23: the integer nearest to y is in the low bits
    vec f = y - (shifted - 12582912.0f);
#endif
    vec p = splat(0.000153533583f);
    p = p * f + 0.00133988785f;
    p = p * f + 0.00961843741f;
    p = p * f + 0.0555033246f;
    p = p * f + 0.240226479f;
    p = p * f + 0.693147203f;
    p = p * f + 1.0f;
#if defined(__AVX512F__)
    __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-126.0f), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)whole);
#else
    p *= (vec)(((ivec)shifted + 127) << 23);
    return x < -126.0f ? vec{} : p;
#endif
}

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// 1 / sqrt(variance + eps); NaN, as PyTorch's LayerNorm gives, where the variance overflows: not a norm that says all
// is zero
static inline float reciprocal_deviation(float variance, float eps) {
    return variance <= __FLT_MAX__ ? 1.0f / sqrtf(variance + eps) : NAN;
}

static inline vec sigmoid(vec x) { return 1.0f / (1.0f + exp2(x * -kLog2E)); }

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
