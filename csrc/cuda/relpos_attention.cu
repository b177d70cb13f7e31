#include "cuda/relpos_attention.h"

#include <cmath>

#include "cuda/common.cuh"
#include "cuda/tensor_cores.cuh"

namespace lcc::cuda {
namespace {

constexpr int kThreads = kRelposWarps * kWarp;
constexpr int kRows = kRelposRows;
constexpr int kBlockRows = kRelposWarps * kRows;
constexpr int kKeys = kRelposKeys;
constexpr int kRing = kRelposPositionTiles * kKeys;  // positions in shared memory
constexpr uint32_t kAll = 0xFFFFFFFFu;
template <int D>
constexpr int kPitch = relpos_attention_pitch(D);
static_assert(kKeys == 32, "a lane draws dropout for one of four groups of eight keys");
static_assert(relpos_attention_shared(128) <= (99 << 10), "sm_86, sm_89 and sm_120 have 99 KiB");

struct Sequence {
    int64_t start, first;  // row within the batch entry, and of all
    int queries, keys;
};

__device__ inline Sequence sequence_of(const RelposAttentionForward& op, int b) {
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

// Rows first ... first + kKeys - 1 of a matrix with `rows` rows, zeros outside of it, to shared memory, on their way
template <class T, int D>
__device__ inline void copy_rows(const Shared& to, const T* matrix, int stride, int first, int rows) {
    constexpr int kEights = D / 8;
#pragma unroll
    for (int n = 0; n < (kKeys * kEights + kThreads - 1) / kThreads; ++n) {
        const int i = n * kThreads + static_cast<int>(threadIdx.x);
        if ((kKeys * kEights) % kThreads != 0 && i >= kKeys * kEights) break;
        const int row = i / kEights, eight = i % kEights;
        const bool there = static_cast<unsigned>(first + row) < static_cast<unsigned>(rows);
        const T* from = there ? matrix + int64_t{first + row} * stride + eight * 8 : matrix;
        copy_async(to, row * kPitch<D> + eight * 4, from, there);
    }
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

// The relative shift. The products R[i, c] of a warp's queries with positions are skewed against the scores: local row
// r needs column j - r at column j. Lane 4 g + q has columns 2 q and 2 q + 1 of rows g and g + 8, and needs, of blocks
// of eight columns, those at 2 q - g and 2 q + 1 - g: of the block itself, or of the one before where that is negative,
// and for row g + 8 of the blocks one further back. So a block is rotated once among the four lanes of a row, by g, and
// then serves two blocks of scores.
struct Skew {
    int even, odd;  // of the four lanes, those that have the columns 2 q - g and 2 q + 1 - g modulo 8
    bool swap;      // whether the second of their pair is wanted first
    bool own[2];    // whether columns 2 q - g and 2 q + 1 - g are of the block itself
    __device__ explicit Skew(int lane) {
        const int g = lane / 4, q = lane % 4;
        even = (q - (g + 1) / 2) & 3;
        odd = (q - g / 2) & 3;
        swap = g % 2 == 1;
        own[0] = 2 * q >= g;
        own[1] = 2 * q + 1 >= g;
    }
    __device__ void rotate(float (&r)[4]) const {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
            const float x = swap ? r[half + 1] : r[half], y = swap ? r[half] : r[half + 1];
            r[half] = __shfl_sync(kAll, x, even, 4);
            r[half + 1] = __shfl_sync(kAll, y, odd, 4);
        }
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

__device__ inline float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAll, x, 2));
}
__device__ inline float sum_of_row(float x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}

// Grid: tiles of queries x heads x utterances
template <class T, int D>
__global__ void __launch_bounds__(kThreads, D <= 64 ? 2 : 1) forward(const RelposAttentionForward op) {
    constexpr int kTile = kKeys * kPitch<D>, kBlocks = kKeys / 8;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quad = lane % 4;
    const int frames = static_cast<int>(op.frames), i0 = static_cast<int>(blockIdx.x) * kBlockRows;
    const int h = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
    const Sequence own = sequence_of(op, b);
    if (i0 >= own.queries) return;

    SharedMemory shared;
    const Shared keys = shared.take(kRelposStages * kTile);              // [stages, kKeys, D]
    const Shared values = shared.take(kRelposStages * kTile);            // as keys
    const Shared positions = shared.take(kRelposPositionTiles * kTile);  // [kRing, D]
    // position of the first query at the first key: place 0 of the ring
    const int origin = frames - 1 - i0;
    const auto copy_positions = [&](int tile) {
        const int place = (tile + kRelposPositionTiles) % kRelposPositionTiles;
        copy_rows<T, D>(positions + place * kTile, head_of<T>(op.pos, 0, 0, h), static_cast<int>(op.pos.frame_stride),
                        origin + tile * kKeys, 2 * frames - 1);
    };
    // the heads are found again each time: kept, they would take registers that D = 64 does not have
    const auto copy_tile = [&](int tile) {
        const int stage = tile % kRelposStages * kTile;
        copy_rows<T, D>(keys + stage, head_of<T>(op.k, b, own.start, h), static_cast<int>(op.k.frame_stride),
                        tile * kKeys, own.keys);
        copy_rows<T, D>(values + stage, head_of<T>(op.v, b, own.start, h), static_cast<int>(op.v.frame_stride),
                        tile * kKeys, own.keys);
        copy_positions(tile);
        commit_copies();
    };

    if (own.keys > 0) {
#pragma unroll 1
        for (int tile = -kBlockRows / kKeys; tile < 0; ++tile) copy_positions(tile);
        copy_tile(0);
    }

    const int row = i0 + warp * kRows + lane / 4;  // and the one eight further
    const bool there[2] = {row < own.queries, row + 8 < own.queries};
    uint32_t qu[D / 16][4], qv[D / 16][4];
    {
        const T* q = head_of<T>(op.q, b, own.start, h) + row * op.q.frame_stride + 2 * quad;
        const int bias = h * D + 2 * quad;
        load_queries<T, D>(qu, q, op.q.frame_stride, there, static_cast<const T*>(op.u) + bias);
        load_queries<T, D>(qv, q, op.q.frame_stride, there, static_cast<const T*>(op.v_bias) + bias);
    }
    const float scale = 1.44269504f / sqrtf(static_cast<float>(D));
    const Skew skew(lane);
    float acc[D / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    // the rotated blocks of positions before this tile: the last, and the second half of the one before
    float last[4] = {}, older[2] = {};
    // eight positions, counted from the warp's own first, at which the tile begins: rotated products
    const auto products_at = [&](float (&r)[4], int place) {
        place -= warp * kRows;
        if (place < 0) place += kRing;
#pragma unroll
        for (int i = 0; i < 4; ++i) r[i] = 0.0f;
        multiply_rows<T, D>(r, qv, positions, place, lane);
        skew.rotate(r);
    };
    // without a query the warp only copies; all of its lanes agree
    const bool idle = i0 + warp * kRows >= own.queries;

    int left = own.keys;  // from this tile on
#pragma unroll 1
    for (int tile = 0; left > 0; ++tile, left -= kKeys) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and the one before has been read by every warp
        if (left > kKeys) copy_tile(tile + 1);
        if (idle) continue;
        const int place = tile % kRelposPositionTiles * kKeys, stage = tile % kRelposStages * kTile;
        if (tile == 0) {
            products_at(last, kRing - 16);
            older[0] = last[2];
            older[1] = last[3];
            products_at(last, kRing - 8);
        }

        float s[kBlocks][4];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            float now[4];
            products_at(now, place + 8 * n);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                s[n][i] = skew.own[i] ? now[i] : last[i];
                s[n][2 + i] = skew.own[i] ? last[2 + i] : older[i];
                older[i] = last[2 + i];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) last[i] = now[i];
            multiply_rows<T, D>(s[n], qu, keys + stage, 8 * n, lane);
        }
        if (left < kKeys) {
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
        if (op.seed != nullptr) {
            // a lane draws for the eight keys of block `quad`: bits 0 ... 7 of its first row, 8 ... 15 of its second
            const auto columns = static_cast<uint32_t>(tile * kBlocks + quad);
            const auto seed = static_cast<uint64_t>(*op.seed);
            const uint32_t major = blockIdx.z * gridDim.y + blockIdx.y;
            const uint32_t drawn = kept_of_eight(seed, columns, row, major, op.threshold) |
                                   kept_of_eight(seed, columns, row + 8, major, op.threshold) << 8;
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                const uint32_t kept = __shfl_sync(kAll, drawn, lane - quad + n) >> (2 * quad);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if ((kept >> (i / 2 * 8 + i % 2) & 1) == 0) s[n][i] = 0.0f;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; n += 2) {
            const uint32_t w[4] = {pack<T>(s[n][0], s[n][1]), pack<T>(s[n][2], s[n][3]),
                                   pack<T>(s[n + 1][0], s[n + 1][1]), pack<T>(s[n + 1][2], s[n + 1][3])};
#pragma unroll
            for (int d = 0; d < D / 8; d += 4) {
                uint32_t upper[4], lower[4];  // 32 columns of eight keys each
                load_matrices<true>(upper, values + stage, at_rows<D>(8 * n, lane) + 4 * d);
                load_matrices<true>(lower, values + stage, at_rows<D>(8 * n + 8, lane) + 4 * d);
#pragma unroll
                for (int i = 0; i < 4; ++i) multiply_add<T>(acc[d + i], w, upper[i], lower[i]);
            }
        }
    }

    if (idle) return;
    const int64_t first = sequence_of(op, b).first + row;  // computed again: it would take registers from the loop
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = sum_of_row(sum[half]);
        if (!there[half]) continue;
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

void check_heads(const char* name, const RelposHeads& x) {
    if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0 || x.batch_stride % 8 != 0 || x.frame_stride % 8 != 0 ||
        x.head_stride % 8 != 0) {
        throw std::invalid_argument(std::string("relpos_attention: ") + name +
                                    " has rows that do not start at multiples of 16 bytes; copy it");
    }
    if (x.frame_stride >= (int64_t{1} << 31)) {
        throw std::invalid_argument(std::string("relpos_attention: ") + name +
                                    " has 2^31 elements from frame to frame");
    }
}

template <class T, int D>
void launch_forward(RelposAttentionForward op) {
    const char* name = "relpos_attention_forward";
    if (op.batch == 0 || op.heads == 0 || op.frames == 0) return;
    constexpr int64_t kMostBlocks = 65535;  // of the second and third dimension of a grid
    if (op.batch > kMostBlocks || op.heads > kMostBlocks || op.frames >= (int64_t{1} << 30)) {
        throw std::invalid_argument(
            "relpos_attention: more than 65535 utterances or heads, or 2^30 frames; use the "
            "triton backend");
    }
    const dim3 grid(static_cast<unsigned>(ceil_div(op.frames, kBlockRows)), static_cast<unsigned>(op.heads),
                    static_cast<unsigned>(op.batch));
    // as kernels/common.py has them
    constexpr double kLevels = 1 << 16;
    const double threshold = op.seed == nullptr ? 0.0 : std::fmin(std::nearbyint(op.dropout_p * kLevels), kLevels - 1);
    op.threshold = static_cast<uint32_t>(threshold);
    op.keep_scale = static_cast<float>(kLevels / (kLevels - threshold));
    launch(name, op.device, forward<T, D>, grid, dim3(kThreads), relpos_attention_shared(D), op.stream, op);
}

template <class T>
void forward_with(const RelposAttentionForward& op) {
    switch (op.head_dim) {
        case 32: return launch_forward<T, 32>(op);
        case 64: return launch_forward<T, 64>(op);
        case 96: return launch_forward<T, 96>(op);
        case 128: return launch_forward<T, 128>(op);
        default:
            throw std::invalid_argument("relpos_attention: D is " + std::to_string(op.head_dim) +
                                        "; expected 32, 64, 96 or 128");
    }
}

}  // namespace

void relpos_attention_forward(const RelposAttentionForward& op) {
    check_heads("q", op.q);
    check_heads("k", op.k);
    check_heads("v", op.v);
    check_heads("pos", op.pos);
    switch (op.element) {
        case Element::float16: return forward_with<__half>(op);
        case Element::bfloat16: return forward_with<__nv_bfloat16>(op);
        case Element::float32: throw std::invalid_argument("relpos_attention: float32; expected float16 or bfloat16");
    }
}

}  // namespace lcc::cuda
