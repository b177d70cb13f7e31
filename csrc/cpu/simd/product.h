// Matrix products of blocks that lie in cache.
#pragma once

#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {

struct Left {  // element (i, k) at data[i * row + k * step]
    const float* data;
    int64_t row, step;
};

struct Right {  // row k, columns v * W ... (v+1) * W at data + k * row + v * group
    const float* data;
    int64_t row, group;
};

struct Addend {  // row i at data + i * row; null: none
    // added at the end, not the start: the sums stay small, and so does their rounding
    const float* data;
    int64_t row;
};

template <int N>
static inline void product_tile(int64_t depth, Left a, Right b, Addend addend, float* c, int64_t c_row) {
    vec sums[kTileRows][N];
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sums[i][v] = vec{};
    for (int64_t k = 0; k < depth; k++) {
        vec columns[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) columns[v] = load(b.data + v * b.group);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; i++) {
            vec x = splat(a.data[i * a.row]);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sums[i][v] += x * columns[v];
        }
        a.data += a.step;
        b.data += b.row;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            if (addend.data) sums[i][v] += load(addend.data + i * addend.row + v * W);
            store(c + i * c_row + v * W, sums[i][v]);
        }
}

// c [rows, groups * W] = a [rows, depth] b [depth, groups * W] + addend. Whole tiles are written: the rows of a, addend
// and c must exist up to the next multiple of kTileRows.
static inline void product(int64_t rows, int64_t groups, int64_t depth, Left a, Right b, Addend addend, float* c,
                           int64_t c_row) {
    for (int64_t v = 0; v < groups; v += kTileColumns) {
        int64_t n = imin(kTileColumns, groups - v);
        for (int64_t i = 0; i < rows; i += kTileRows) {
            Left a_i = {a.data + i * a.row, a.row, a.step};
            Right b_v = {b.data + v * b.group, b.row, b.group};
            Addend more = {addend.data ? addend.data + i * addend.row + v * W : nullptr, addend.row};
            float* c_i = c + i * c_row + v * W;
            if (n == kTileColumns) product_tile<kTileColumns>(depth, a_i, b_v, more, c_i, c_row);
            else if (n == 1) product_tile<1>(depth, a_i, b_v, more, c_i, c_row);
            else if (n == 2) product_tile<2>(depth, a_i, b_v, more, c_i, c_row);
            else product_tile<3>(depth, a_i, b_v, more, c_i, c_row);
        }
    }
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
