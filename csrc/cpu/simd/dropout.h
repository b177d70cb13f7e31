// Dropout by counter, the same decisions as kernels/common.py: 16 bits of Philox-4x32-7 an element.
#pragma once

#include "../kernels.h"
#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {

typedef uint64_t wide_vec __attribute__((vector_size(8 * W)));

constexpr int64_t kDropoutPad = 8 * W;  // random_row writes whole groups of that many

// The 16 bits of the elements (row, col ... col+n-1), col a multiple of 8; `out` has room for round_up(n, kDropoutPad).
static inline void random_row(uint16_t* out, int64_t n, int64_t seed, uint32_t stream, uint32_t major, uint32_t row,
                              int64_t col) {
    for (int64_t i = 0; i < n; i += kDropoutPad) {
        uint32_t columns[W];
        for (int l = 0; l < W; l++) columns[l] = (uint32_t)((col + i) / 8 + l);
        uvec c0, c1 = uvec{} + row, c2 = uvec{} + major, c3 = uvec{} + stream;
        memcpy(&c0, columns, sizeof c0);
        uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
        for (int round = 0; round < 7; round++) {
            wide_vec a = __builtin_convertvector(c0, wide_vec) * 0xD2511F53u;
            wide_vec b = __builtin_convertvector(c2, wide_vec) * 0xCD9E8D57u;
            c0 = __builtin_convertvector(b >> 32, uvec) ^ c1 ^ k0;
            c2 = __builtin_convertvector(a >> 32, uvec) ^ c3 ^ k1;
            c1 = __builtin_convertvector(b, uvec);
            c3 = __builtin_convertvector(a, uvec);
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        uint32_t words[4][W];
        memcpy(words[0], &c0, sizeof c0);
        memcpy(words[1], &c1, sizeof c1);
        memcpy(words[2], &c2, sizeof c2);
        memcpy(words[3], &c3, sizeof c3);
        for (int l = 0; l < W; l++)
            for (int w = 0; w < 4; w++) {
                out[i + 8 * l + 2 * w] = (uint16_t)words[w][l];
                out[i + 8 * l + 2 * w + 1] = (uint16_t)(words[w][l] >> 16);
            }
    }
}

// scale where kept, 0 where dropped
static inline vec dropout_factor(const uint16_t* random, const Dropout& dropout) {
    ivec bits = __builtin_convertvector(*reinterpret_cast<const hvec_memory*>(random), ivec);
    return bits >= (int32_t)dropout.threshold ? splat(dropout.scale) : vec{};
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
