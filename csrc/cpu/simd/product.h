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

// inputs that a product takes in one step
constexpr int64_t step_of(const float*) { return 1; }
constexpr int64_t step_of(const bf16*) { return 2; }
constexpr int64_t step_of(const int8_t*) { return 4; }
template <class T>
constexpr int64_t kStep = step_of((const T*)nullptr);

struct Addend {  // row i at data + i * row; null: none
    // added at the end, not the start: the sums stay small, and so does their rounding
    const float* data;
    int64_t row;
};

// What the caller multiplies next: a product fetches a cache line of it into the second-level cache in each step, until
// it has all. Weights that lie further out would else hold up the first tile of each panel: with them a Xeon of the
// Emerald Rapids class took 10% longer for a layer's products of 100 to 400 rows in float32.
struct Ahead {
    const char* data;
    int64_t bytes;
    void fetch() {
        constexpr int64_t kLine = 64;
        if (bytes <= 0) return;
        __builtin_prefetch(data, 0, 2);
        data += kLine, bytes -= kLine;
    }
};

// c [R, N * W] of float32 or, rounded, of bfloat16
template <int R, int N, class Out>
static inline void finish_tile(vec (&sums)[R][N], Addend addend, Out* c, int64_t c_row) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            if (addend.data) sums[i][v] += load(addend.data + i * addend.row + v * W);
            store(c + i * c_row + v * W, sums[i][v]);
        }
}

template <int R, int N, class Out>
static inline void product_tile(int64_t depth, Left a, Right b, Addend addend, Out* c, int64_t c_row, Ahead& ahead) {
    vec sums[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sums[i][v] = vec{};
    for (int64_t k = 0; k < depth; k++) {
        ahead.fetch();
        vec columns[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) columns[v] = load(b.data + v * b.group);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            vec x = splat(a.data[i * a.row]);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sums[i][v] += x * columns[v];
        }
        a.data += a.step;
        b.data += b.row;
    }
    finish_tile(sums, addend, c, c_row);
}

// The same of bfloat16, by pairs of neighbours along the depth, which is what the processor multiplies and adds at
// once.

struct LeftPairs {  // pair k of row i, its low half first, at data + i * row + 2 * k
    const bf16* data;
    int64_t row;
};

struct RightPairs {  // row k of pairs, columns v * W ... (v+1) * W at data + k * row + v * group
    const bf16* data;
    int64_t row, group;
};

static inline Left left(const float* a, int64_t row) { return {a, row, 1}; }
static inline LeftPairs left(const bf16* a, int64_t row) { return {a, row}; }

// sums += the first of the pairs' products + the second, in float32
static inline vec add_products(vec sums, uvec a, uvec b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    // products of bfloat16 are exact in float32; the order is that of the instruction
    sums += (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
    return sums + (vec)(a << 16) * (vec)(b << 16);
#endif
}

template <int R, int N, class Out>
static inline void product_tile(int64_t pairs, LeftPairs a, RightPairs b, Addend addend, Out* c, int64_t c_row,
                                Ahead& ahead) {
    vec sums[R][N];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sums[i][v] = vec{};
    for (int64_t k = 0; k < pairs; k++) {
        ahead.fetch();
        uvec columns[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) columns[v] = (uvec)load(reinterpret_cast<const float*>(b.data + v * b.group));
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            uint32_t pair;
            memcpy(&pair, a.data + i * a.row, sizeof pair);
            uvec x = pair - uvec{};
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sums[i][v] = add_products(sums[i][v], x, columns[v]);
        }
        a.data += 2;
        b.data += b.row;
    }
    finish_tile(sums, addend, c, c_row);
}

// The same of 8 bits, by four neighbours along the depth: unsigned bytes with signed ones, into int32, which are then
// scaled by row and column.

struct LeftQuads {  // quad k of row i, its first byte lowest, at data + i * row + 4 * k
    const uint8_t* data;
    int64_t row;
    const float* scales;  // of row i at scales[i]
};

struct RightQuads {  // row k of quads, columns v * W ... (v+1) * W at data + k * row + v * group
    const int8_t* data;
    int64_t row, group;
    const float* scales;    // of each column
    const int32_t* starts;  // of each column's sum
};

// sums += the four products, exactly
static inline ivec add_products(ivec sums, ivec a, ivec b) {
#if defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    for (int shift = 0; shift < 32; shift += 8) sums += ((a >> shift) & 255) * ((b << (24 - shift)) >> 24);
    return sums;
#endif
}

template <int R, int N, class Out>
static inline void product_tile(int64_t quads, LeftQuads a, RightQuads b, Addend addend, Out* c, int64_t c_row,
                                Ahead& ahead) {
    ivec sums[R][N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) {
        ivec start = *reinterpret_cast<const ivec_memory*>(b.starts + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) sums[i][v] = start;
    }
    for (int64_t k = 0; k < quads; k++) {
        ahead.fetch();
        ivec columns[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) columns[v] = (ivec)load(reinterpret_cast<const float*>(b.data + v * b.group));
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            int32_t quad;
            memcpy(&quad, a.data + i * a.row, sizeof quad);
            ivec x = quad - ivec{};
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sums[i][v] = add_products(sums[i][v], x, columns[v]);
        }
        a.data += 4;
        b.data += b.row;
    }
    vec scaled[R][N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) {
        vec scale = load(b.scales + v * W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) scaled[i][v] = __builtin_convertvector(sums[i][v], vec) * (a.scales[i] * scale);
    }
    finish_tile(scaled, addend, c, c_row);
}

static inline Left skip_rows(Left a, int64_t i) { return {a.data + i * a.row, a.row, a.step}; }
static inline LeftPairs skip_rows(LeftPairs a, int64_t i) { return {a.data + i * a.row, a.row}; }
static inline LeftQuads skip_rows(LeftQuads a, int64_t i) { return {a.data + i * a.row, a.row, a.scales + i}; }

static inline Right skip_groups(Right b, int64_t v) { return {b.data + v * b.group, b.row, b.group}; }
static inline RightPairs skip_groups(RightPairs b, int64_t v) { return {b.data + v * b.group, b.row, b.group}; }
static inline RightQuads skip_groups(RightQuads b, int64_t v) {
    return {b.data + v * b.group, b.row, b.group, b.scales + v * W, b.starts + v * W};
}

template <int N, class L, class G, class Out>
static inline void product_columns(int64_t rows, int64_t depth, L a, G b, Addend addend, Out* c, int64_t c_row,
                                   Ahead& ahead) {
    while (rows > 0) {
        // 8 rows, half of 16 frames, as 4 + 4: a tile of two waits for its columns
        int64_t tile = rows > 8 || rows == 5 || rows == 6 ? 6 : rows > 2 ? 4 : 2;
        if (tile == 6) product_tile<6, N>(depth, a, b, addend, c, c_row, ahead);
        else if (tile == 4) product_tile<4, N>(depth, a, b, addend, c, c_row, ahead);
        else product_tile<2, N>(depth, a, b, addend, c, c_row, ahead);
        rows -= tile;
        a = skip_rows(a, tile);
        if (addend.data) addend.data += tile * addend.row;
        c += tile * c_row;
    }
}

template <class L, class G, class Out>
static inline void product_tiles(int64_t rows, int64_t groups, int64_t depth, L a, G b, Addend addend, Out* c,
                                 int64_t c_row, Ahead ahead) {
    for (int64_t v = 0; v < groups; v += kTileColumns) {
        int64_t n = imin(kTileColumns, groups - v);
        G b_v = skip_groups(b, v);
        Addend more = {addend.data ? addend.data + v * W : nullptr, addend.row};
        Out* c_v = c + v * W;
        if (n == kTileColumns) product_columns<kTileColumns>(rows, depth, a, b_v, more, c_v, c_row, ahead);
        else if (n == 1) product_columns<1>(rows, depth, a, b_v, more, c_v, c_row, ahead);
        else if (n == 2) product_columns<2>(rows, depth, a, b_v, more, c_v, c_row, ahead);
        else product_columns<3>(rows, depth, a, b_v, more, c_v, c_row, ahead);
    }
}

// c [rows, groups * W] = a [rows, depth] b [depth, groups * W] + addend. Tiles of an even number of rows are written:
// an odd last row of a, addend and c needs one after it. An element has the same bits in any tile.
template <class Out>
static inline void product(int64_t rows, int64_t groups, int64_t depth, Left a, Right b, Addend addend, Out* c,
                           int64_t c_row, Ahead ahead = {}) {
    product_tiles(rows, groups, depth, a, b, addend, c, c_row, ahead);
}

// the same, depth counted in pairs
template <class Out>
static inline void product(int64_t rows, int64_t groups, int64_t pairs, LeftPairs a, RightPairs b, Addend addend,
                           Out* c, int64_t c_row, Ahead ahead = {}) {
    product_tiles(rows, groups, pairs, a, b, addend, c, c_row, ahead);
}

// the same, depth counted in quads
template <class Out>
static inline void product(int64_t rows, int64_t groups, int64_t quads, LeftQuads a, RightQuads b, Addend addend,
                           Out* c, int64_t c_row, Ahead ahead = {}) {
    product_tiles(rows, groups, quads, a, b, addend, c, c_row, ahead);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
