// What a block of a cluster of 16 does for a loop over 16 frames of 256 channels, with its sixteenth of the weights in
// shared memory.
//
// A product that widens (up, queries keys values, pointwise1) is split by columns: each block has the whole left factor
// and 1/16 of the outputs. A product that narrows (down, out, pointwise2) is split by inputs, so that what lies between
// the two stays in the block: each block has a partial sum of all columns, gives it to the blocks that own them, and
// these, having added 16 of them in order, give the new stream to all. A pair of products is two exchanges.
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/cluster_loop.h"
#include "cuda/tensor_cores.cuh"

namespace lcc::cuda {

using Bf16 = __nv_bfloat16;

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
constexpr int kOwn = kLoopWidth / kLoopBlocks;  // columns of a block
constexpr int kHiddenOwn = kLoopHidden / kLoopBlocks;
constexpr int kOwners = kLoopFrames * kOwn / 2;                  // threads that have a pair of a block's columns each
constexpr int kTiles = kLoopWidth / 8 / (kLoopThreads / kWarp);  // of 8 columns, for each warp
static_assert(kOwn == 16, "a block's columns are one step of a product");

// Where a chunk of sixteen bytes is in rows of kChunks of them, as the number of a float: rotated so that a chunk of
// eight rows after one another lies in all banks.
template <int kChunks>
__device__ inline int at_chunk(int row, int chunk) {
    static_assert(kChunks == 2 || kChunks % 8 == 0, "else the chunk of another row");
    return (row * kChunks + (chunk ^ (kChunks == 2 ? row / 4 % 2 : row % 8))) * 4;
}

// Rows of kChunks chunks from global to shared memory, on their way
template <int kChunks>
__device__ inline void load_rows(const Shared& to, int first, const Bf16* from, int64_t stride, int rows) {
    for (int i = threadIdx.x; i < rows * kChunks; i += kLoopThreads) {
        const int row = i / kChunks, chunk = i % kChunks;
        copy_async(to, at_chunk<kChunks>(first + row, chunk), from + row * stride + chunk * 8, true);
    }
}

__device__ inline const Bf16* elements(const void* data) { return static_cast<const Bf16*>(data); }

// elements i and i + 1, or zeros
__device__ inline float2 pair_of(const void* data, int i) {
    if (data == nullptr) return make_float2(0.0f, 0.0f);
    return to_floats(*reinterpret_cast<const Pair<Bf16>*>(elements(data) + i));
}

__device__ inline float silu(float x) { return x * reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }
__device__ inline float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * x)); }
__device__ inline float rounded(float x) {
    Bf16 y;
    assign(y, x);
    return to_float(y);
}

// c[n] [16, 8] += left [16, 8 kChunks] times rows first + n * step ... of right; two chains of products a tile
template <int kChunks, int kCount>
__device__ inline void multiply(float (&c)[kCount][4], const Shared& left, const Shared& right, int first, int step) {
    const int lane = threadIdx.x % kWarp;
    float other[kCount][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 4) {
        uint32_t a[2][4];
        load_matrices<false>(a[0], left, at_chunk<kChunks>(lane % 16, chunk + lane / 16));
        load_matrices<false>(a[1], left, at_chunk<kChunks>(lane % 16, chunk + 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
            uint32_t b[4];
            load_matrices<false>(b, right, at_chunk<kChunks>(first + n * step + lane % 8, chunk + lane / 8));
            multiply_add<Bf16>(c[n], a[0], b[0], b[1]);
            multiply_add<Bf16>(other[n], a[1], b[2], b[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[n][i] += other[n][i];
    }
}

// c[n] [16, 8] += a [16, 16] times rows first + 8 n ... of a matrix of two chunks a row
__device__ inline void multiply_own(float (&c)[kTiles][4], const uint32_t (&a)[4], const Shared& right, int first) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        load_matrices<false>(b, right, at_chunk<2>(first + 8 * n + lane / 16 * 8 + lane % 8, lane / 8 % 2));
        multiply_add<Bf16>(c[n], a, b[0], b[1]);
        multiply_add<Bf16>(c[n + 1], a, b[2], b[3]);
    }
}

// Sixteen elements of a frame in bfloat16, those 8 l ... and 128 + 8 l ... of frame t / 16 for thread t with l = t % 16
struct Sixteen {
    Eight<Bf16> parts[2];
    __device__ static Sixteen of_vector(const void* data) {
        const auto* vector = static_cast<const Eight<Bf16>*>(data);
        return {{vector[threadIdx.x % 16], vector[16 + threadIdx.x % 16]}};
    }
};

// of a LayerNorm, loaded ahead of the barrier that its input comes with
struct Affine {
    Sixteen weight, bias;
    __device__ explicit Affine(const LoopPart& norm)
        : weight(Sixteen::of_vector(norm.weight)), bias(Sixteen::of_vector(norm.bias)) {}
};

// the same sixteen in float32
struct Row {
    float at[16];
    __device__ explicit Row(const Sixteen& sixteen) {
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            const float2 pair = to_floats(sixteen.parts[i / 8].pairs[i % 8 / 2]);
            at[i] = pair.x;
            at[i + 1] = pair.y;
        }
    }
    __device__ Sixteen round() const {
        Sixteen to;
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            Pair<Bf16>& pair = to.parts[i / 8].pairs[i % 8 / 2];
            assign(pair.x, at[i]);
            assign(pair.y, at[i + 1]);
        }
        return to;
    }
    // over a frame, by its sixteen threads
    __device__ static float sum(float x) {
#pragma unroll
        for (int by = 1; by < 16; by *= 2) x += __shfl_xor_sync(kAllLanes, x, by);
        return x;
    }
    __device__ void normalise(const Affine& norm, float eps) {
        const Row weight(norm.weight), bias(norm.bias);
        float total = 0.0f, squares = 0.0f;
#pragma unroll
        for (int i = 0; i < 16; ++i) total += at[i];
        const float mean = sum(total) / kLoopWidth;
#pragma unroll
        for (int i = 0; i < 16; ++i) squares += (at[i] - mean) * (at[i] - mean);
        const float scale = rsqrtf(sum(squares) / kLoopWidth + eps);
#pragma unroll
        for (int i = 0; i < 16; ++i) at[i] = (at[i] - mean) * scale * weight.at[i] + bias.at[i];
    }
};

// The shared memory of a block, what its threads keep of the stream, and how it meets the other blocks.
struct LoopBlock {
    Shared received;    // [16 blocks, 16 frames, 16 columns], partial sums
    Shared gathered;    // [16 frames, 256], the stream
    Shared normalised;  // [16 frames, 256] in rotated chunks
    Shared exchanged;   // queries + u, queries + v_bias, keys; or hidden; or output of the GLU, and moments
    Shared tile;        // [16 frames, 16 columns] in rotated chunks
    Shared barrier;
    float eps;
    int rank, parity;
    float2 own;  // of thread t < kOwners: the stream of frame t / 8, columns 16 rank + 2 (t % 8) and the next

    __device__ LoopBlock(SharedMemory<>& shared, float eps)
        : received(shared.take(kLoopReceived)), gathered(shared.take(kLoopGathered)),
          normalised(shared.take(kLoopNormalised)), exchanged(shared.take(kLoopExchanged)),
          tile(shared.take(kLoopTile)), barrier(shared.take(kLoopBarrier)), eps(eps), rank(cluster_rank()), parity(0),
          own(make_float2(0.0f, 0.0f)) {
        if (threadIdx.x == 0) init_barrier(barrier, 0, kLoopBlocks);
        cluster_arrive();
        cluster_wait();
    }

    // what the blocks have stored in one another so far is there behind it
    __device__ void meet() {
        __syncthreads();
        if (threadIdx.x < kLoopBlocks) arrive_at(barrier, 0, static_cast<int>(threadIdx.x));
        wait_at(barrier, 0, parity);
        parity ^= 1;
    }

    __device__ bool owns() const { return threadIdx.x < kOwners; }
    __device__ int own_frame() const { return static_cast<int>(threadIdx.x) / 8; }
    __device__ int own_pair() const { return static_cast<int>(threadIdx.x) % 8; }
    __device__ int own_column() const { return kOwn * rank + 2 * own_pair(); }

    // a thread's sixteen of the stream
    __device__ int at_sixteen() const {
        return static_cast<int>(threadIdx.x) / 16 * (kLoopWidth / 2) + static_cast<int>(threadIdx.x) % 16 * 4;
    }
    __device__ Sixteen stream() const {
        return {{gathered.load<Eight<Bf16>>(at_sixteen()), gathered.load<Eight<Bf16>>(at_sixteen() + 64)}};
    }
    __device__ void set_stream(const Sixteen& x) const {
        gathered.store(at_sixteen(), x.parts[0]);
        gathered.store(at_sixteen() + 64, x.parts[1]);
    }
    // a norm of it as the left factor of the next product
    __device__ void normalise(const Affine& norm) const {
        const int frame = static_cast<int>(threadIdx.x) / 16, l = static_cast<int>(threadIdx.x) % 16;
        Row row(stream());
        row.normalise(norm, eps);
        const Sixteen x = row.round();
        normalised.store(at_chunk<32>(frame, l), x.parts[0]);
        normalised.store(at_chunk<32>(frame, 16 + l), x.parts[1]);
        __syncthreads();
    }

    // The partial sums of a warp, 32 columns from 32 warp on, to the blocks that own them
    __device__ void give(const float (&c)[kTiles][4]) const {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            const int owner = (kTiles * warp + n) / 2, at = n % 2 * 8 + lane % 4 * 2;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int frame = lane / 4 + 8 * half;
                store_to(received, (rank * kLoopFrames + frame) * kOwn + at, owner,
                         make_float2(c[n][2 * half], c[n][2 * half + 1]));
            }
        }
    }

    // The stream plus `factor` times what all blocks gave and the bias, to all blocks; returns the norm that comes next
    __device__ Affine add(float2 bias, float factor, const LoopPart& next) {
        meet();
        if (owns()) {
            float2 sum = bias;
#pragma unroll
            for (int source = 0; source < kLoopBlocks; ++source) {
                const auto part = received.load<float2>((source * kLoopFrames + own_frame()) * kOwn + 2 * own_pair());
                sum.x += part.x;
                sum.y += part.y;
            }
            own.x += factor * sum.x;
            own.y += factor * sum.y;
            store_in_tile(own);
        }
        __syncthreads();
        const int chunk = threadIdx.x % kWarp, frame = chunk / 2;
        const auto columns = tile.load<Eight<Bf16>>(at_chunk<2>(frame, chunk % 2));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            store_to(gathered, frame * (kLoopWidth / 2) + (2 * rank + chunk % 2) * 4,
                     static_cast<int>(threadIdx.x) / kWarp + n * kLoopBlocks / 2, columns);
        }
        const Affine norm(next);
        meet();
        return norm;
    }
    // by the owners
    __device__ void store_in_tile(float2 pair) const {
        tile.store(at_chunk<2>(own_frame(), own_pair() / 4) + own_pair() % 4, pack<Bf16>(pair.x, pair.y));
    }
    __device__ void take_stream() {
        if (owns()) own = to_floats(gathered.load<Pair<Bf16>>(own_frame() * (kLoopWidth / 2) + own_column() / 2));
    }

    // Half a feed-forward of what `normalised` holds; up [64, 256], down [256, 64]: rows of this block
    __device__ Affine feed_forward(const Shared& up, float2 up_bias, const Shared& down, float2 down_bias,
                                   const LoopPart& next) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        float h[1][4] = {};
        multiply<32>(h, normalised, up, 8 * warp, 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float x = silu(h[0][2 * half] + up_bias.x), y = silu(h[0][2 * half + 1] + up_bias.y);
            exchanged.store(at_chunk<8>(lane / 4 + 8 * half, warp) + lane % 4, pack<Bf16>(x, y));
        }
        __syncthreads();
        float c[kTiles][4] = {};
        multiply<8>(c, exchanged, down, 8 * kTiles * warp, 8);
        give(c);
        return add(down_bias, 0.5f, next);
    }
};

// columns 64 rank + 8 warp + 2 (lane % 4) and the next: what a lane has of the up product
__device__ inline int hidden_column(int rank) {
    return kHiddenOwn * rank + static_cast<int>(threadIdx.x) / kWarp * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
}
__device__ inline void load_up(const Shared& to, const LoopPart& up, int rank) {
    load_rows<32>(to, 0, elements(up.weight) + int64_t{kHiddenOwn} * rank * kLoopWidth, kLoopWidth, kHiddenOwn);
}
__device__ inline void load_down(const Shared& to, const LoopPart& down, int rank) {
    load_rows<8>(to, 0, elements(down.weight) + kHiddenOwn * rank, kLoopHidden, kLoopWidth);
}

}  // namespace lcc::cuda
