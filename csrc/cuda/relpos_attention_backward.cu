// The gradients of relpos_attention, for some heads at a time, in three kernels and without atomics:
//
//     rows        W = 2^(S log2 e - lse), dP = dout v', dS = W (dP - rowsum(dout out)), up to the factor 1 / sqrt(D);
//                 dq = dS k + dR pos, where dR[i, T - 1 - i + j] = dS[i, j]; W, dS and dR to the scratch
//     keys        dk = dS' (q + u), dv = W' dout; du = sum over keys j of (sum_i dS[i, j]) k_j
//     positions   dpos = dR' (q + v_bias), over the utterances
//
// with dropout in W and dP. What dq adds up to beside du is the gradient of v_bias. dR, which rows has in registers,
// goes to the scratch beside dS: two bytes a score more, and neither a rotation nor unaligned copies in positions.
//
// Floor: 8 D multiply-adds a score, five in rows, two in keys and one in positions, and 6 bytes of scratch written and
// read again within the L2. At B = 32, T = 400, H = 4, D = 64 these are 21 GFLOP and 2 x 123 MB.
//
// The loops as compiled (sm_90, bf16, D = 64; instructions, products and matrix loads of a warp):
//     rows        16 queries x 16 keys          300   40 HMMA   20 LDSM; 400 more for 32 keys, half of them dropout
//     keys        32 queries x 32 keys          227   36        12
//     positions   32 queries x 32 positions     171   32        12
#include "cuda/relpos_attention.cuh"

#include <algorithm>

namespace lcc::cuda {
namespace {

constexpr int kRowThreads = kRelposBackwardWarps * kWarp;
constexpr int kTileRows = kRelposBackwardWarps * kRows;
constexpr int kKeyThreads = kRelposBackwardWarps * kWarp;
constexpr int kPositionThreads = kRelposPositionWarps * kWarp;
constexpr int kQueries = 32;                  // at a time, two strips
constexpr int kColumns = kRelposColumns;      // of a block, 32 a warp
constexpr int kStrip = kRows * kColumns / 2;  // floats
constexpr int kMatrix = kQueries / kRows * kStrip;
static_assert(kTileRows == kColumns, "queries and keys have the same number of tiles");
static_assert(relpos_attention_rows_shared(128) <= (99 << 10), "sm_86, sm_89 and sm_120 have 99 KiB");
static_assert(relpos_attention_keys_shared(128) <= (99 << 10), "sm_86, sm_89 and sm_120 have 99 KiB");

enum Matrix { kWeights, kScoreGradients, kPositionGradients };

// the scratch of one head
template <class T, int D>
struct Scratch {
    int64_t strip;  // elements
    T *blocks, *qu, *qv;
    __device__ Scratch(const RelposAttentionBackward& op, int slot)
        : strip(relpos_attention_strip(op.frames)),
          blocks(static_cast<T*>(op.scratch) + slot * relpos_attention_scratch(op.frames, D)),
          qu(blocks + relpos_attention_strips(op.frames) * strip),
          qv(qu + relpos_attention_strips(op.frames) * kRows * D) {}
};

// elements from the start of a strip to the upper half of a block
__device__ inline int block_at(int block, Matrix matrix) { return (kRelposMatrices * block + matrix) * kRows * 8; }

// A lane's pairs of eight columns of a strip, in rows lane / 4 and lane / 4 + 8. `at` is where its first one of some
// block is, `block` counts from there.
__device__ inline void store_block(uint32_t* at, int block, Matrix matrix, uint32_t upper, uint32_t lower) {
    at += block_at(block, matrix) / 2;
    at[0] = upper;
    at[kWarp] = lower;
}

// The relative shift backwards: dR from dS, whose row r is r columns further to the left in it. Lane 4 g + q needs, of
// blocks of eight columns, those at 2 q + g and 2 q + 1 + g: of the block itself, or of the next one from 8 on, and for
// row g + 8 of the blocks one further on. As in Skew a block is rotated once and serves two.
struct SkewBack {
    int lanes;    // of the four lanes, those that have the columns 2 q + g and 2 q + 1 + g modulo 8
    bool swap;    // whether the first of these is the second of its pair
    bool own[2];  // whether the columns are of the block itself
    // Rows g in the lower 16 bits, rows g + 8 in the upper: the rotated block before, and the one before that with what
    // it takes from its next. Columns 2 q + g and 2 q + 1 + g.
    uint32_t last[2] = {}, older[2] = {};

    __device__ explicit SkewBack(int lane) {
        const int g = lane / 4, q = lane % 4;
        const int first = (q + g / 2) & 3, second = (q + (g + 1) / 2) & 3;
        lanes = second << 2 | first;
        swap = g % 2 == 1;
        own[0] = 2 * q + g < 8;
        own[1] = 2 * q + 1 + g < 8;
    }
    template <class T>
    __device__ void rotate(uint32_t (&now)[2], const float (&ds)[4]) const {
        const int from = not_ahead(lanes);
        const uint32_t x = pack<T>(ds[0], ds[2]), y = pack<T>(ds[1], ds[3]);
        now[0] = __shfl_sync(kAll, swap ? y : x, from, 4);
        now[1] = __shfl_sync(kAll, swap ? x : y, from >> 2, 4);
    }
    // the two blocks of dR that begin sixteen columns before two rotated blocks of dS
    __device__ void next(uint32_t (&dr)[4], const uint32_t (&now)[2][2]) {
        uint32_t before[2], here[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            before[i] = own[i] ? last[i] : now[0][i];
            here[i] = own[i] ? now[0][i] : now[1][i];
            last[i] = now[1][i];
        }
        dr[0] = lower(older);
        dr[1] = upper(before);
        dr[2] = lower(before);
        dr[3] = upper(here);
        older[0] = here[0];
        older[1] = here[1];
    }
    __device__ static uint32_t lower(const uint32_t (&x)[2]) { return (x[0] & 0xFFFFu) | x[1] << 16; }
    __device__ static uint32_t upper(const uint32_t (&x)[2]) { return x[0] >> 16 | (x[1] & 0xFFFF0000u); }
};

// Adds up over the eight rows of lanes what each has for columns 8 n + 2 (lane % 4) ..., to shared memory
template <int D>
__device__ inline void sum_lanes(float2 (&x)[D / 8], const Shared& to, int lane) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int by = 4; by < kWarp; by *= 2) {
            x[n].x += __shfl_xor_sync(kAll, x[n].x, by);
            x[n].y += __shfl_xor_sync(kAll, x[n].y, by);
        }
        if (lane < 4) to.store<float2>(8 * n + 2 * lane, x[n]);
    }
}

// Grid: tiles of queries x heads here
template <class T, int D>
__global__ void __launch_bounds__(kRowThreads, D <= 64 ? 3 : 2) rows(const RelposAttentionBackward op) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quad = lane % 4;
    const int i0 = static_cast<int>(blockIdx.x) * kTileRows, slot = static_cast<int>(blockIdx.y);
    const auto bh = static_cast<int>(op.first + slot);
    const int b = bh / op.heads, h = bh % op.heads;
    const Sequence own = sequence_of(op, b);

    SharedMemory shared;
    const Tiles<T, D, kRelposBackwardWarps> tiles(op, shared, b, h, i0);
    const Shared sums = shared.take(kRelposBackwardWarps * D);
    const Shared of_rows = shared.take(2 * kTileRows);  // lse and delta, which would take registers from the loop
    int left = i0 < own.queries ? own.keys : 0;         // from this tile on
    if (left > 0) tiles.copy_first(own.keys);

    const int row = i0 + warp * kRows + lane / 4;  // and the one eight further
    const bool there[2] = {row < own.queries, row + 8 < own.queries};
    // rows from the warp's first on: without one it only copies; all of its lanes agree
    const int own_rows = not_ahead(own.queries - i0 - warp * kRows);
    const Scratch<T, D> scratch(op, slot);
    // in its strip, from tile to tile
    uint32_t* at = reinterpret_cast<uint32_t*>(scratch.blocks + (i0 / kRows + warp) * scratch.strip) + lane;

    uint32_t qu[D / 16][4], dout[D / 16][4];
    PositionScores<T, D> position;
    {
        float delta[2] = {}, lse[2];
        const T* gradient = head_of<T>(op.dout, b, own.start, h) + row * op.dout.frame_stride + 2 * quad;
        const int64_t first = own.first + row;
        const T* out = static_cast<const T*>(op.out) + (first * op.heads + h) * D + 2 * quad;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            lse[half] = INFINITY;  // beyond the last query: weights of zero
#pragma unroll
            for (int k = 0; k < D / 16; ++k) dout[k][half] = dout[k][half + 2] = 0;
            if (!there[half]) continue;
            lse[half] = op.lse[h * op.total_frames + first + 8 * half];
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
#pragma unroll
                for (int i = half; i < 4; i += 2) {
                    const int column = 16 * k + i / 2 * 8;
                    const Pair<T> given =
                        *reinterpret_cast<const Pair<T>*>(gradient + 8 * half * op.dout.frame_stride + column);
                    const Pair<T> got = *reinterpret_cast<const Pair<T>*>(out + 8 * half * op.heads * D + column);
                    const float2 x = to_floats(given), y = to_floats(got);
                    dout[k][i] = pack<T>(x.x, x.y);
                    delta[half] = fmaf(x.x, y.x, fmaf(x.y, y.y, delta[half]));
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float2 value = make_float2(lse[half], sum_of_row(delta[half]));
            if (quad == 0) of_rows.store<float2>(2 * (row - i0 + 8 * half), value);
        }
    }
    {
        const T* q = head_of<T>(op.q, b, own.start, h) + row * op.q.frame_stride + 2 * quad;
        const int bias = h * D + 2 * quad;
        load_queries<T, D>(qu, q, op.q.frame_stride, there, static_cast<const T*>(op.u) + bias);
        load_queries<T, D>(position.qv, q, op.q.frame_stride, there, static_cast<const T*>(op.v_bias) + bias);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!there[half]) continue;
            const int64_t to = int64_t{row + 8 * half} * D + 2 * quad;
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
#pragma unroll
                for (int i = half; i < 4; i += 2) {
                    const int column = 16 * k + i / 2 * 8;
                    *reinterpret_cast<uint32_t*>(scratch.qu + to + column) = qu[k][i];
                    *reinterpret_cast<uint32_t*>(scratch.qv + to + column) = position.qv[k][i];
                }
            }
        }
    }
    const float root = sqrtf(static_cast<float>(D)), scale = kLog2E / root;
    const Skew skew(lane);
    SkewBack back(lane);
    float acc[D / 8][4] = {};
    const auto add_positions = [&](const uint32_t (&rotated)[2][2], int place) {
        uint32_t dr[4];
        back.next(dr, rotated);
        store_block(at, 0, kPositionGradients, dr[0], dr[1]);
        store_block(at, 1, kPositionGradients, dr[2], dr[3]);
        multiply_columns<T, D>(acc, dr, tiles.positions, tiles.place(place, warp), lane);
    };

    int tile = 0;
#pragma unroll 1
    for (; left > 0; ++tile, left -= kKeys) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and the one before has been read by every warp
        if (left > kKeys) tiles.copy(tile + 1, left - kKeys);
        if (own_rows <= 0) continue;
        const int place = tile % tiles.kPositionTiles * kKeys, stage = tile % kRelposStages * tiles.kTile;
        if (tile == 0) {  // the positions before the first key
            float s[4];
            position.next(s, tiles.positions, tiles.place(tiles.kRing - 16, warp), skew, lane);
            position.next(s, tiles.positions, tiles.place(tiles.kRing - 8, warp), skew, lane);
        }
        uint32_t drawn = 0;
        if (op.seed != nullptr) drawn = draw_tile(op, static_cast<uint32_t>(bh), tile, i0 + lane_row(), lane);
#pragma unroll 1
        for (int n = 0; n < kKeys / 8; n += 2) {
            uint32_t packed[4], rotated[2][2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float s[4], dp[4] = {};
                position.next(s, tiles.positions, tiles.place(place + 8 * (n + m), warp), skew, lane);
                multiply_rows<T, D>(s, qu, tiles.keys + stage, 8 * (n + m), lane);
                multiply_rows<T, D>(dp, dout, tiles.values + stage, 8 * (n + m), lane);
                if (left < kKeys) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (8 * (n + m) + 2 * quad + i % 2 >= left) s[i] = -INFINITY;
                    }
                }
                uint32_t kept = kAll;
                if (op.seed != nullptr) kept = kept_of_block(drawn, n + m, lane);
                const int mine = lane_row();
                const float2 lse_delta[2] = {of_rows.load<float2>(2 * mine), of_rows.load<float2>(2 * mine + 16)};
                float w[4], ds[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float factor = is_kept(kept, i) ? op.keep_scale : 0.0f;
                    w[i] = exp2_fast(fmaf(s[i], scale, -lse_delta[i / 2].x));
                    ds[i] = w[i] * fmaf(dp[i], factor, -lse_delta[i / 2].y);
                    w[i] *= factor;
                }
                store_block(at, m, kWeights, pack<T>(w[0], w[1]), pack<T>(w[2], w[3]));
                packed[2 * m] = pack<T>(ds[0], ds[1]);
                packed[2 * m + 1] = pack<T>(ds[2], ds[3]);
                store_block(at, m, kScoreGradients, packed[2 * m], packed[2 * m + 1]);
                back.rotate<T>(rotated[m], ds);
            }
            multiply_columns<T, D>(acc, packed, tiles.keys + stage, 8 * n, lane);
            add_positions(rotated, place + 8 * n - 16);
            at += block_at(2, kWeights) / 2;
        }
    }
    if (tile > 0 && own_rows > 0) {  // the positions after the last key
        const uint32_t nothing[2][2] = {};
        add_positions(nothing, (tile - 1) % tiles.kPositionTiles * kKeys + kKeys - 16);
    }

    const float factor = 1.0f / root;
    // where the lane is, found again: kept, it would take registers from the loop
    const int of_all = not_ahead(bh), of_b = of_all / op.heads, of_h = of_all % op.heads, last = i0 + lane_row();
    const Sequence again = sequence_of(op, of_b);
    float2 total_of[D / 8];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) total_of[n] = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (last + 8 * half >= again.queries) continue;
        T* dq = static_cast<T*>(op.dq) + ((again.first + last + 8 * half) * op.heads + of_h) * D + 2 * quad;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float2 value = make_float2(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
            store_pair<true>(dq, 8 * n, D, value);
            total_of[n] = make_float2(total_of[n].x + value.x, total_of[n].y + value.y);
        }
    }
    sum_lanes<D>(total_of, sums + warp * D, lane);
    __syncthreads();
    for (int d = static_cast<int>(threadIdx.x); d < D; d += kRowThreads) {
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kRelposBackwardWarps; ++n) total += sums.load<float>(n * D + d);
        const int64_t part = int64_t{of_b} * gridDim.x + blockIdx.x;
        op.dv_bias[(part * op.heads + of_h) * D + d] = total;
    }
}

// Of two strips from `strip` on, eight blocks of a matrix from block `first` on, `shift` further in the second; zeros
// outside of `strips` and `blocks`. To shared memory, on their way.
template <int kThreads, class T, int D>
__device__ inline void copy_blocks(const Shared& to, const Scratch<T, D>& scratch, Matrix matrix, int strip, int strips,
                                   int first, int shift, int blocks) {
    constexpr int kEights = kColumns * kRows / 8;  // of a strip, sixteen a block
#pragma unroll
    for (int n = 0; n < kQueries / kRows * kEights / kThreads; ++n) {
        const int i = n * kThreads + static_cast<int>(threadIdx.x);
        const int second = i / kEights, eight = i % kEights, block = first + second * shift + eight / 16;
        const bool there = strip + second < strips && static_cast<unsigned>(block) < static_cast<unsigned>(blocks);
        const T* from = scratch.blocks + (strip + second) * scratch.strip + block_at(block, matrix) + eight % 16 * 8;
        copy_async(to, i * 4, from, there);
    }
}

// c [32, D] += X' Y over 32 rows, of columns 32 `part` ... of X, which is in blocks; `sums` [32] += the sums of these
// columns, if they are wanted: every lane of a row has them, as c has its elements
template <class T, int D>
__device__ inline void multiply_transposed(float (&c)[2][D / 8][4], float (&sums)[2][4], bool sums_wanted,
                                           const Shared& x, const Shared& y, int part, int lane) {
#pragma unroll
    for (int strip = 0; strip < kQueries / kRows; ++strip) {
        uint32_t a[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            // four matrices: the upper halves of two blocks, then the lower ones
            const int block = 4 * part + 2 * m + lane / 8 % 2, half = lane / 16;
            load_matrices<true>(a[m], x, strip * kStrip + (2 * block + half) * kWarp + lane % 8 * 4);
            const uint32_t ones = pack<T>(1.0f, 1.0f);
            if (sums_wanted) multiply_add<T>(sums[m], a[m], ones, ones);
        }
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
            uint32_t b[4];
            load_matrices<true>(b, y, at_columns<D>(strip * kRows, lane) + 4 * d);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                multiply_add<T>(c[m][d], a[m], b[0], b[1]);
                multiply_add<T>(c[m][d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// Grid: tiles of keys x heads here. Half of the warps have dk, the others dv.
template <class T, int D>
__global__ void __launch_bounds__(kKeyThreads, D <= 64 ? 3 : 2) keys(const RelposAttentionBackward op) {
    constexpr int kHalf = kRelposBackwardWarps / 2, kTile = kQueries * kPitch<D>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quad = lane % 4;
    const int j0 = static_cast<int>(blockIdx.x) * kColumns, slot = static_cast<int>(blockIdx.y);
    const auto bh = static_cast<int>(op.first + slot);
    const int b = bh / op.heads, h = bh % op.heads;
    const Sequence own = sequence_of(op, b);
    const Scratch<T, D> scratch(op, slot);

    SharedMemory shared;
    // dS and q + u, W and dout
    const Shared x = shared.take(2 * kRelposStages * kMatrix), y = shared.take(2 * kRelposStages * kTile);
    const Shared sums = shared.take(kHalf * D);
    const auto strips = static_cast<int>(relpos_attention_strips(own.queries));
    const auto blocks = static_cast<int>(relpos_attention_blocks(own.keys));
    const auto copy = [&](int tile) {
        const int stage = tile % kRelposStages * 2, strip = tile * (kQueries / kRows), block = j0 / 8;
        copy_blocks<kKeyThreads>(x + stage * kMatrix, scratch, kScoreGradients, strip, strips, block, 0, blocks);
        copy_blocks<kKeyThreads>(x + (stage + 1) * kMatrix, scratch, kWeights, strip, strips, block, 0, blocks);
        copy_rows<T, D, kKeyThreads>(y + stage * kTile, scratch.qu, D, tile * kQueries, own.queries);
        copy_rows<T, D, kKeyThreads>(y + (stage + 1) * kTile, head_of<T>(op.dout, b, own.start, h),
                                     static_cast<int>(op.dout.frame_stride), tile * kQueries, own.queries);
        commit_copies();
    };

    const int kind = warp / kHalf, part = warp % kHalf;  // dk or dv, and of which keys
    float acc[2][D / 8][4] = {}, columns[2][4] = {};
    int left = j0 < own.keys ? own.queries : 0;  // from this tile on
    if (left > 0) copy(0);
#pragma unroll 1
    for (int tile = 0; left > 0; ++tile, left -= kQueries) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and the one before has been read by every warp
        if (left > kQueries) copy(tile + 1);
        const int stage = tile % kRelposStages * 2 + kind;
        multiply_transposed<T, D>(acc, columns, kind == 0, x + stage * kMatrix, y + stage * kTile, part, lane);
    }

    const float factor = kind == 0 ? 1.0f / sqrtf(static_cast<float>(D)) : 1.0f;
    float2 of_keys[D / 8];
#pragma unroll
    for (int n = 0; n < D / 8; ++n) of_keys[n] = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = j0 + 32 * part + 16 * m + 8 * half + lane / 4;
            if (key >= own.queries) continue;
            T* to = static_cast<T*>(kind == 0 ? op.dk : op.dv) + ((own.first + key) * op.heads + h) * D + 2 * quad;
            const T* k = head_of<T>(op.k, b, own.start, h) + key * op.k.frame_stride + 2 * quad;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float* c = &acc[m][n][2 * half];
                store_pair<true>(to, 8 * n, D, make_float2(c[0] * factor, c[1] * factor));
                if (kind != 0 || key >= own.keys) continue;
                const float2 value = to_floats(*reinterpret_cast<const Pair<T>*>(k + 8 * n));
                const float sum = columns[m][2 * half] * factor;  // every column has it
                of_keys[n] = make_float2(fmaf(sum, value.x, of_keys[n].x), fmaf(sum, value.y, of_keys[n].y));
            }
        }
    }
    if (kind == 0) sum_lanes<D>(of_keys, sums + part * D, lane);
    __syncthreads();
    for (int d = static_cast<int>(threadIdx.x); d < D; d += kKeyThreads) {
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kHalf; ++n) total += sums.load<float>(n * D + d);
        const int64_t tiles = gridDim.x, tile = b * tiles + blockIdx.x;
        op.du[(tile * op.heads + h) * D + d] = total;
        // behind the sums of dq
        op.dv_bias[((op.batch * tiles + tile) * op.heads + h) * D + d] = -total;
    }
}

// blocks of eight positions before T - 1, and tiles of blocks that begin with the first of these
__host__ __device__ constexpr int64_t blocks_before(int64_t frames) { return ceil_div(frames - 1, 8); }
constexpr int64_t position_tiles(int64_t frames) {
    return ceil_div(blocks_before(frames) + (frames - 1) / 8 + 1, kColumns / 8);
}

// Grid: tiles of positions x heads x parts
template <class T, int D>
__global__ void __launch_bounds__(kPositionThreads, D <= 64 ? 6 : 4) positions(const RelposAttentionBackward op) {
    constexpr int kTile = kQueries * kPitch<D>, kMore = kRelposMoreBlocks;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quad = lane % 4;
    const int h = static_cast<int>(blockIdx.y), part = static_cast<int>(blockIdx.z);
    // The first position is T - 1 + 8 a, and begins block a + 2 n + 2 of strip n, whose blocks begin 16 before its key
    // 0.
    const int a = static_cast<int>(blockIdx.x) * (kColumns / 8) - static_cast<int>(blocks_before(op.frames));

    SharedMemory shared;
    const Shared x = shared.take(kRelposStages * kMatrix), y = shared.take(kRelposStages * kTile);
    float acc[2][D / 8][4] = {}, no_sums[2][4] = {};
    // of the heads here, those that are this one, and of these one in so many as there are parts
    const auto own_slot = static_cast<int>((h - op.first % op.heads + op.heads) % op.heads);
#pragma unroll 1
    for (int slot = own_slot + part * op.heads; slot < op.here; slot += op.parts * op.heads) {
        const Sequence own = sequence_of(op, static_cast<int>((op.first + slot) / op.heads));
        if (own.keys == 0) continue;
        const Scratch<T, D> scratch(op, slot);
        const int blocks = static_cast<int>(relpos_attention_blocks(own.keys)) + kMore;
        // the strips that have a block of these
        const int begin = max(0, (-kColumns / 8 - a) / 2);
        const int end = min(static_cast<int>(relpos_attention_strips(own.queries)), (blocks - kMore - a + 1) / 2);
        const auto copy = [&](int strip, int stage) {
            copy_blocks<kPositionThreads>(x + stage * kMatrix, scratch, kPositionGradients, strip, end,
                                          a + 2 * strip + 2, 2, blocks);
            copy_rows<T, D, kPositionThreads>(y + stage * kTile, scratch.qv, D, strip * kRows, own.queries);
            commit_copies();
        };
        __syncthreads();  // every warp has read the last tile
        if (begin < end) copy(begin, 0);
        int stage = 0;
#pragma unroll 1
        for (int strip = begin; strip < end; strip += kQueries / kRows) {
            wait_for_copies<0>();
            __syncthreads();  // the tile is there, and the one before has been read by every warp
            if (strip + kQueries / kRows < end) copy(strip + kQueries / kRows, 1 - stage);
            multiply_transposed<T, D>(acc, no_sums, false, x + stage * kMatrix, y + stage * kTile, warp, lane);
            stage = 1 - stage;
        }
    }

    const float factor = 1.0f / sqrtf(static_cast<float>(D));
    const auto all = static_cast<int>(2 * op.frames - 1);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = static_cast<int>(op.frames) - 1 + 8 * (a + 4 * warp + 2 * m + half) + lane / 4;
            if (position < 0 || position >= all) continue;
            float* dpos = op.dpos + ((int64_t{part} * all + position) * op.heads + h) * D + 2 * quad;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                auto& sum = *reinterpret_cast<float2*>(dpos + 8 * n);
                // the first heads find nothing there
                const float2 before = op.first == 0 ? make_float2(0.0f, 0.0f) : sum;
                sum = make_float2(fmaf(acc[m][n][2 * half], factor, before.x),
                                  fmaf(acc[m][n][2 * half + 1], factor, before.y));
            }
        }
    }
}

}  // namespace

int64_t relpos_attention_slots(int64_t batch, int64_t frames, int heads, int head_dim) {
    constexpr int64_t kScratch = 32 << 20, kMultiprocessors = 132, kMostBlocks = 65535;
    if (batch * heads * frames == 0) return 1;
    const int64_t fit = kScratch / (2 * relpos_attention_scratch(frames, head_dim));
    const int64_t most =
        std::min(kMostBlocks, std::max(fit, ceil_div(2 * kMultiprocessors, ceil_div(frames, kTileRows))));
    const int64_t all = batch * heads;
    return ceil_div(all, ceil_div(all, most));
}

int relpos_attention_parts(int64_t slots, int64_t frames, int heads) {
    constexpr int64_t kMultiprocessors = 132;
    if (heads * frames == 0) return 1;
    const int64_t enough = ceil_div(4 * kMultiprocessors, heads * position_tiles(frames));
    return static_cast<int>(std::max(int64_t{1}, std::min(ceil_div(slots, heads), enough)));
}

void relpos_attention_backward(const RelposAttentionBackward& given) {
    RelposAttentionBackward op = given;
    prepare(op);
    check_heads("dout", op.dout);
    const int64_t all = op.batch * op.heads;
    if (all == 0 || op.frames == 0) return;
    if (op.slots < 1 || op.slots > 65535 || op.parts < 1 || op.parts > 65535) {
        throw std::invalid_argument(
            "relpos_attention: slots or parts are not from 1 to 65535; take those of "
            "relpos_attention_slots and relpos_attention_parts");
    }
    const char* name = "relpos_attention_backward";
    const auto tiles = static_cast<unsigned>(ceil_div(op.frames, kTileRows));
    with_types(op, [&](auto t, auto d) {
        using T = decltype(t);
        constexpr int D = d();
        for (op.first = 0; op.first < all; op.first += op.slots) {
            op.here = std::min(op.slots, all - op.first);
            const dim3 grid(tiles, static_cast<unsigned>(op.here));
            launch(name, op.device, rows<T, D>, grid, dim3(kRowThreads), relpos_attention_rows_shared(D), op.stream,
                   op);
            launch(name, op.device, keys<T, D>, grid, dim3(kKeyThreads), relpos_attention_keys_shared(D), op.stream,
                   op);
            launch(name, op.device, positions<T, D>,
                   dim3(static_cast<unsigned>(position_tiles(op.frames)), static_cast<unsigned>(op.heads),
                        static_cast<unsigned>(op.parts)),
                   dim3(kPositionThreads), relpos_attention_columns_shared(D, 1), op.stream, op);
        }
    });
}

}  // namespace lcc::cuda
