// What the kernels of relpos_attention share: where rows are, their way to shared memory, the relative shift, dropout.
#pragma once

#include <cmath>

#include "cuda/common.cuh"
#include "cuda/relpos_attention.h"
#include "cuda/tensor_cores.cuh"

namespace lcc::cuda {

constexpr int kRows = kRelposRows;
constexpr int kKeys = kRelposKeys;
constexpr uint32_t kAll = 0xFFFFFFFFu;
constexpr float kLog2E = 1.44269504f;
template <int D>
constexpr int kPitch = relpos_attention_pitch(D);
static_assert(kKeys == 32, "a lane draws dropout for one of four groups of eight keys");

struct Sequence {
    int64_t start, first;  // row within the batch entry, and of all
    int queries, keys;
};

__device__ inline Sequence sequence_of(const RelposAttention& op, int b) {
    const int frames = static_cast<int>(op.frames);
    if (op.cu_seqlens != nullptr) {
        const int64_t start = op.cu_seqlens[b];
        const int own = static_cast<int>(op.cu_seqlens[b + 1] - start);
        return {start, start, own, own};
    }
    const int keys = op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames));
    return {0, b * op.frames, frames, keys};
}

template <class T>
__device__ inline const T* head_of(const RelposHeads& x, int b, int64_t start, int h) {
    return static_cast<const T*>(x.data) + b * x.batch_stride + start * x.frame_stride + h * x.head_stride;
}

// Rows first ... first + 31 of a matrix with `rows` rows, zeros outside of it, to shared memory, on their way
template <class T, int D, int kThreads>
__device__ inline void copy_rows(const Shared& to, const T* matrix, int stride, int first, int rows) {
    constexpr int kEights = D / 8, kStep = kThreads / kEights;  // rows at a time
    const unsigned thread = not_ahead(threadIdx.x);
    const int row = static_cast<int>(thread / kEights), eight = static_cast<int>(thread % kEights);
    if (kThreads % kEights != 0 && row >= kStep) return;
    const T* from = matrix + int64_t{first + row} * stride + eight * 8;
#pragma unroll
    for (int n = 0; n < 32; n += kStep) {
        if (32 % kStep != 0 && row + n >= 32) break;
        const bool there = static_cast<unsigned>(first + row + n) < static_cast<unsigned>(rows);
        copy_async(to, (row + n) * kPitch<D> + eight * 4, from, there);
        from += kStep * stride;
    }
}

// Tiles of keys and values, and of the positions of a block's queries at them, on their way through shared memory
template <class T, int D, int kWarps>
struct Tiles {
    static constexpr int kTile = kKeys * kPitch<D>, kPositionTiles = relpos_attention_position_tiles(kWarps);
    static constexpr int kRing = kPositionTiles * kKeys;  // positions in shared memory
    const RelposAttention& op;
    int b, h;
    int i0;               // the first query
    Shared keys, values;  // [stages, kKeys, D]
    Shared positions;     // [kRing, D]

    __device__ Tiles(const RelposAttention& op, SharedMemory<>& shared, int b, int h, int i0)
        : op(op), b(b), h(h), i0(i0), keys(shared.take(kRelposStages * kTile)),
          values(shared.take(kRelposStages * kTile)), positions(shared.take(kPositionTiles * kTile)) {}

    __device__ void copy_positions(int tile) const {
        const int place = (tile + kPositionTiles) % kPositionTiles;
        const int origin = static_cast<int>(op.frames) - 1 - i0;  // of the first query at the first key: place 0
        copy_rows<T, D, kWarps * kWarp>(positions + place * kTile, head_of<T>(op.pos, 0, 0, not_ahead(h)),
                                        static_cast<int>(op.pos.frame_stride), origin + tile * kKeys,
                                        2 * static_cast<int>(op.frames) - 1);
    }
    // `left` keys are there from the tile on
    __device__ void copy(int tile, int left) const {
        const int stage = tile % kRelposStages * kTile, of_b = not_ahead(b), of_h = not_ahead(h);
        const int first = tile * kKeys, end = first + not_ahead(left);
        const int64_t start = sequence_of(op, of_b).start;
        copy_rows<T, D, kWarps * kWarp>(keys + stage, head_of<T>(op.k, of_b, start, of_h),
                                        static_cast<int>(op.k.frame_stride), first, end);
        copy_rows<T, D, kWarps * kWarp>(values + stage, head_of<T>(op.v, of_b, start, of_h),
                                        static_cast<int>(op.v.frame_stride), first, end);
        copy_positions(tile);
        commit_copies();
    }
    // the first tile, and the positions before it
    __device__ void copy_first(int left) const {
#pragma unroll 1
        for (int tile = -kWarps * kRows / kKeys; tile < 0; ++tile) copy_positions(tile);
        copy(0, left);
    }
    // where eight or sixteen positions of a warp are, counted from those of the whole block
    __device__ int place(int of_block, int warp) const {
        const int place = of_block - warp * kRows;
        return place < 0 ? place + kRing : place;
    }
};

// the first of a lane's two rows in its block, computed again where it is needed: kept, it would take a register
__device__ inline int lane_row() {
    const unsigned thread = not_ahead(threadIdx.x);
    return static_cast<int>(thread / kWarp * kRows + thread % kWarp / 4);
}

// q + bias of a warp's rows, rounded as the reference does, as left factors; `q` and `bias` start at the lane's columns
template <class T, int D>
__device__ inline void load_queries(uint32_t (&a)[D / 16][4], const T* q, int64_t stride, const bool (&there)[2],
                                    const T* bias) {
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = 16 * k + i / 2 * 8;
            Pair<T> x{};
            if (there[i % 2]) x = *reinterpret_cast<const Pair<T>*>(q + i % 2 * 8 * stride + column);
            const float2 value = to_floats(x), add = make_float2(to_float(bias[column]), to_float(bias[column + 1]));
            a[k][i] = pack<T>(value.x + add.x, value.y + add.y);
        }
    }
}

// where a lane's part of four matrices is: of eight rows from `row` on, columns 0 ... 7, 8 ... 15 and so on
template <int D>
__device__ inline int at_rows(int row, int lane) {
    return (row + lane % 8) * kPitch<D> + lane / 8 * 4;
}

// c [16, 8] += a [16, D] times eight rows of a matrix in shared memory
template <class T, int D>
__device__ inline void multiply_rows(float (&c)[4], const uint32_t (&a)[D / 16][4], const Shared& matrix, int row,
                                     int lane) {
#pragma unroll
    for (int k = 0; k < D / 16; k += 2) {
        uint32_t b[4];
        load_matrices<false>(b, matrix, at_rows<D>(row, lane) + k * 8);
        multiply_add<T>(c, a[k], b[0], b[1]);
        multiply_add<T>(c, a[k + 1], b[2], b[3]);
    }
}

// where a lane's part of four matrices is: of sixteen rows from `row` on, columns 0 ... 7 and 8 ... 15. Of these the
// tensor cores take two in adjacent registers.
template <int D>
__device__ inline int at_columns(int row, int lane) {
    return (row + lane % 16) * kPitch<D> + lane / 16 * 4;
}

// c [16, D] += a [16, 16] times sixteen rows of a matrix in shared memory
template <class T, int D>
__device__ inline void multiply_columns(float (&c)[D / 8][4], const uint32_t (&a)[4], const Shared& matrix, int row,
                                        int lane) {
#pragma unroll
    for (int d = 0; d < D / 8; d += 2) {
        uint32_t b[4];
        load_matrices<true>(b, matrix, at_columns<D>(row, lane) + 4 * d);
        multiply_add<T>(c[d], a, b[0], b[1]);
        multiply_add<T>(c[d + 1], a, b[2], b[3]);
    }
}

// The relative shift. The products R[i, c] of a warp's queries with positions are skewed against the scores: local row
// r needs column j - r at column j. Lane 4 g + q has columns 2 q and 2 q + 1 of rows g and g + 8, and needs, of blocks
// of eight columns, those at 2 q - g and 2 q + 1 - g: of the block itself, or of the one before where that is negative,
// and for row g + 8 of the blocks one further back. So a block is rotated once among the four lanes of a row, by g, and
// then serves two blocks of scores.
struct Skew {
    int lanes;    // of the four lanes, those that have the columns 2 q - g and 2 q + 1 - g modulo 8
    bool swap;    // whether the second of their pair is wanted first
    bool own[2];  // whether columns 2 q - g and 2 q + 1 - g are of the block itself
    __device__ explicit Skew(int lane) {
        const int g = lane / 4, q = lane % 4;
        const int even = (q - (g + 1) / 2) & 3, odd = (q - g / 2) & 3;
        lanes = odd << 2 | even;
        swap = g % 2 == 1;
        own[0] = 2 * q >= g;
        own[1] = 2 * q + 1 >= g;
    }
    __device__ void rotate(float (&r)[4]) const {
        const int from = not_ahead(lanes);
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            const float x = swap ? r[half + 1] : r[half], y = swap ? r[half] : r[half + 1];
            r[half] = __shfl_sync(kAll, x, from, 4);
            r[half + 1] = __shfl_sync(kAll, y, from >> 2, 4);
        }
    }
};

// The scores of a warp's queries with positions, block of eight keys by block.
template <class T, int D>
struct PositionScores {
    uint32_t qv[D / 16][4];
    // the rotated blocks before: the last, and the second half of the one before
    float last[4] = {}, older[2] = {};

    // s: the scores, from the eight positions at `row`
    __device__ void next(float (&s)[4], const Shared& positions, int row, const Skew& skew, int lane) {
        float now[4] = {};
        multiply_rows<T, D>(now, qv, positions, row, lane);
        skew.rotate(now);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s[i] = skew.own[i] ? now[i] : last[i];
            s[2 + i] = skew.own[i] ? last[2 + i] : older[i];
            older[i] = last[2 + i];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) last[i] = now[i];
    }
};

// kernels/common.py: 7 rounds of Philox 4x32; bit n is whether column 8 * columns + n of the row is kept
__device__ inline uint32_t kept_of_eight(uint64_t seed, uint32_t columns, uint32_t row, uint32_t major,
                                         uint32_t threshold) {
    uint32_t c[4] = {columns, row, major, 0}, key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint64_t low = uint64_t{0xD2511F53u} * c[0], high = uint64_t{0xCD9E8D57u} * c[2];
        c[0] = static_cast<uint32_t>(high >> 32) ^ c[1] ^ key[0];
        c[1] = static_cast<uint32_t>(high);
        c[2] = static_cast<uint32_t>(low >> 32) ^ c[3] ^ key[1];
        c[3] = static_cast<uint32_t>(low);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    uint32_t kept = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        kept |= static_cast<uint32_t>((n % 2 == 0 ? c[n / 2] & 0xFFFFu : c[n / 2] >> 16) >= threshold) << n;
    }
    return kept;
}

// A lane draws for eight keys of a tile, those of block `lane % 4`: bits 0 ... 7 of its first row, 8 ... 15 of its
// second.
__device__ inline uint32_t draw_tile(const RelposAttention& op, uint32_t major, int tile, int row, int lane) {
    const auto columns = static_cast<uint32_t>(tile * (kKeys / 8) + lane % 4);
    const auto seed = static_cast<uint64_t>(*op.seed);
    return kept_of_eight(seed, columns, row, major, op.threshold) |
           kept_of_eight(seed, columns, row + 8, major, op.threshold) << 8;
}
// of block `n` of the tile: bits 0, 1, 8 and 9 are for the lane's own four scores
__device__ inline uint32_t kept_of_block(uint32_t drawn, int n, int lane) {
    return __shfl_sync(kAll, drawn, lane - lane % 4 + n) >> (2 * (lane % 4));
}
__device__ inline bool is_kept(uint32_t kept, int i) { return (kept >> (i / 2 * 8 + i % 2) & 1) != 0; }

__device__ inline float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ inline float sum_of_row(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

// The softmax of a lane's two rows, tile of scores by tile, and what has been summed of the values so far
template <int D>
struct RowSums {
    float scale = kLog2E / sqrtf(static_cast<float>(D));
    float acc[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};

    // s: scores of 8 * kBlocks keys, of which `left` are there; then their weights
    template <int kBlocks>
    __device__ void weigh(float (&s)[kBlocks][4], int left, int quad) {
        if (left < 8 * kBlocks) {
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (8 * n + 2 * quad + i % 2 >= left) s[n][i] = -INFINITY;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = s[0][2 * half];
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            const float now = fmaxf(maximum[half], max_of_row(most) * scale);
            const float factor = exp2_fast(maximum[half] - now);
            maximum[half] = now;
            float part = 0.0f;
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[n][i] = exp2_fast(fmaf(s[n][i], scale, -now));
                    part += s[n][i];
                }
            }
            sum[half] = fmaf(sum[half], factor, part);
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                acc[n][2 * half] *= factor;
                acc[n][2 * half + 1] *= factor;
            }
        }
    }
    template <class T>
    __device__ void store(const RelposAttentionForward& op, int b, int h, int i0, int quad) const {
        const Sequence own = sequence_of(op, not_ahead(b));  // kept, it would take registers from the loop
        const int row = i0 + lane_row();
        const int64_t first = own.first + row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = sum_of_row(sum[half]);
            if (row + 8 * half >= own.queries) continue;
            const bool some = total > 0.0f;
            const float norm = some ? op.keep_scale / total : 0.0f;
            T* out = static_cast<T*>(op.out) + ((first + 8 * half) * op.heads + h) * D + 2 * quad;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                store_pair<true>(out, 8 * n, D, make_float2(acc[n][2 * half] * norm, acc[n][2 * half + 1] * norm));
            }
            // no key, no weight
            const float lse = some ? maximum[half] + log2f(total) : 0.0f;
            if (quad == 0) op.lse[h * op.total_frames + first + 8 * half] = lse;
        }
    }
};

inline void check_heads(const char* name, const RelposHeads& x) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || x.batch_stride % 8 != 0 || x.frame_stride % 8 != 0 ||
        x.head_stride % 8 != 0) {
        throw std::invalid_argument(std::string("relpos_attention: ") + name +
                                    " has rows that do not start at multiples of 16 bytes; copy it");
    }
    // so that 64 frames, which copy_rows steps by, are below 2^31
    if (x.frame_stride >= (int64_t{1} << 25)) {
        throw std::invalid_argument(std::string("relpos_attention: ") + name +
                                    " has 2^25 elements or more from frame to frame; copy it");
    }
}

// checks what all launches share, and sets what the launchers set
inline void prepare(RelposAttention& op) {
    check_heads("q", op.q);
    check_heads("k", op.k);
    check_heads("v", op.v);
    check_heads("pos", op.pos);
    constexpr int64_t kMostBlocks = 65535;  // of the second and third dimension of a grid
    if (op.batch > kMostBlocks || op.heads > kMostBlocks || op.frames >= (int64_t{1} << 30)) {
        throw std::invalid_argument(
            "relpos_attention: more than 65535 utterances or heads, or 2^30 frames; use the "
            "triton backend");
    }
    // as kernels/common.py has them
    constexpr double kLevels = 1 << 16;
    const double threshold = op.seed == nullptr ? 0.0 : std::fmin(std::nearbyint(op.dropout_p * kLevels), kLevels - 1);
    op.threshold = static_cast<uint32_t>(threshold);
    op.keep_scale = static_cast<float>(kLevels / (kLevels - threshold));
}

// launch(T{}, std::integral_constant<int, D>{}) of the element type and the head dim of the arguments
template <class T, class Launch>
void with_head_dim(const RelposAttention& op, const Launch& launch) {
    switch (op.head_dim) {
        case 32: return launch(T{}, std::integral_constant<int, 32>{});
        case 64: return launch(T{}, std::integral_constant<int, 64>{});
        case 96: return launch(T{}, std::integral_constant<int, 96>{});
        case 128: return launch(T{}, std::integral_constant<int, 128>{});
        default:
            throw std::invalid_argument("relpos_attention: D is " + std::to_string(op.head_dim) +
                                        "; expected 32, 64, 96 or 128");
    }
}
template <class Launch>
void with_types(const RelposAttention& op, const Launch& launch) {
    switch (op.element) {
        case Element::float16: return with_head_dim<__half>(op, launch);
        case Element::bfloat16: return with_head_dim<__nv_bfloat16>(op, launch);
        case Element::float32: throw std::invalid_argument("relpos_attention: float32; expected float16 or bfloat16");
    }
}

}  // namespace lcc::cuda
