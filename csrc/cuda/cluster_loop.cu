#include "cuda/cluster_loop.cuh"

#include <stdexcept>
#include <string>

namespace lcc::cuda {

constexpr int kHeadBlocks = kLoopBlocks / kLoopHeads;  // blocks that share a head
constexpr int kHeadDim = kLoopWidth / kLoopHeads;
constexpr int kHeadChunks = kHeadDim / 8;
constexpr int kPast = kLoopFrames;  // row of the positions that is of no distance

// A loop's weights in shared memory, rows of this block
struct Weights {
    Shared up1, down1, qkv, out, pointwise1, pointwise2, up2, down2, positions;

    __device__ Weights(SharedMemory<>& shared, const ClusterLoop& op, int rank)
        : up1(shared.take(kHiddenOwn * kLoopWidth / 2)), down1(shared.take(kLoopWidth * kHiddenOwn / 2)),
          qkv(shared.take(3 * kOwn * kLoopWidth / 2)), out(shared.take(kLoopWidth * kOwn / 2)),
          pointwise1(shared.take(2 * kOwn * kLoopWidth / 2)), pointwise2(shared.take(kLoopWidth * kOwn / 2)),
          up2(shared.take(kHiddenOwn * kLoopWidth / 2)), down2(shared.take(kLoopWidth * kHiddenOwn / 2)),
          positions(shared.take(kLoopPositions)) {
        load_up(up1, op.ffn1_up, rank);
        load_down(down1, op.ffn1_down, rank);
        for (int part = 0; part < 3; ++part) {
            load_rows<32>(qkv, kOwn * part, row_of(op.qkv, part, rank), kLoopWidth, kOwn);
        }
        load_rows<2>(out, 0, elements(op.attention_out.weight) + kOwn * rank, kLoopWidth, kLoopWidth);
        for (int part = 0; part < 2; ++part) {
            load_rows<32>(pointwise1, kOwn * part, row_of(op.pointwise1, part, rank), kLoopWidth, kOwn);
        }
        load_rows<2>(pointwise2, 0, elements(op.pointwise2.weight) + kOwn * rank, kLoopWidth, kLoopWidth);
        load_up(up2, op.ffn2_up, rank);
        load_down(down2, op.ffn2_down, rank);
        // row kPast + j - i is of key j for query i
        const int frames = static_cast<int>(op.frames);
        const Bf16* pos = elements(op.pos) + rank / kHeadBlocks * kHeadDim;
        for (int i = threadIdx.x; i < 2 * kPast * kHeadChunks; i += kLoopThreads) {
            const int row = i / kHeadChunks, chunk = i % kHeadChunks, from = row - kPast + frames - 1;
            const bool there = static_cast<unsigned>(from) < static_cast<unsigned>(2 * frames - 1);
            copy_async(positions, at_chunk<kHeadChunks>(row, chunk), pos + (there ? from * kLoopWidth + chunk * 8 : 0),
                       there);
        }
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
    }
    // the columns of this block in the part-th 256
    __device__ static const Bf16* row_of(const LoopPart& product, int part, int rank) {
        return elements(product.weight) + int64_t{kLoopWidth * part + kOwn * rank} * kLoopWidth;
    }
};

// Of the columns that a thread deals with
struct Biases {
    float2 up1, down1, qkv, out, value, gate, pointwise2, up2, down2;
    float2 u, v_bias;
    __device__ Biases(const ClusterLoop& op, const LoopBlock& block) {
        const int warp = threadIdx.x / kWarp, pair = static_cast<int>(threadIdx.x) % 4 * 2;
        const int own = block.owns() ? block.own_column() : 0;
        up1 = pair_of(op.ffn1_up.bias, hidden_column(block.rank));
        down1 = pair_of(op.ffn1_down.bias, own);
        out = pair_of(op.attention_out.bias, own);
        pointwise2 = pair_of(op.pointwise2.bias, own);
        up2 = pair_of(op.ffn2_up.bias, hidden_column(block.rank));
        down2 = pair_of(op.ffn2_down.bias, own);
        const int column = kOwn * block.rank + warp % 2 * 8 + pair;
        qkv = pair_of(op.qkv.bias, warp < 6 ? warp / 2 * kLoopWidth + column : 0);
        u = pair_of(op.u, column);
        v_bias = pair_of(op.v_bias, column);
        value = pair_of(op.pointwise1.bias, column);
        gate = pair_of(op.pointwise1.bias, kLoopWidth + column);
    }
};

// columns 2 q - g and the next of blocks of eight, by a rotation among the four lanes q of rows g and g + 8
__device__ inline void rotate(float (&r)[4], int lane) {
    const int g = lane / 4, q = lane % 4;
    const bool swap = g % 2 == 1;
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
        const float x = swap ? r[half + 1] : r[half], y = swap ? r[half] : r[half + 1];
        r[half] = __shfl_sync(kAllLanes, x, (q - (g + 1) / 2) & 3, 4);
        r[half + 1] = __shfl_sync(kAllLanes, y, (q - g / 2) & 3, 4);
    }
}

__device__ inline float max_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ inline float sum_of_four(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Sixteen columns of a head's output as a left factor, by every warp alike. Queries + u, queries + v_bias and keys are
// one after the other in `exchanged`, this block's columns of the values in `tile`.
__device__ inline void attend(uint32_t (&a)[4], const LoopBlock& block, const Shared& positions, int keys) {
    constexpr int kMatrix = kLoopFrames * kHeadDim / 2;
    const int lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
    float scores[2][4] = {}, shifted[4][4] = {};
    multiply<kHeadChunks>(scores, block.exchanged, block.exchanged + 2 * kMatrix, 0, 8);
    multiply<kHeadChunks>(shifted, block.exchanged + kMatrix, positions, 0, 8);
#pragma unroll
    for (int n = 0; n < 4; ++n) rotate(shifted[n], lane);
    // row i of the second product has the column of key j at kPast + j - i
    constexpr float kScale = 1.4426950408889634f * 0.125f;
    static_assert(kHeadDim == 64, "the scale is 1 / sqrt(64)");
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, j = 8 * n + 2 * q + i % 2;
            const float position = 2 * q + i % 2 >= g ? shifted[n + 2 - half][i] : shifted[n + 1 - half][i];
            scores[n][i] = j < keys ? (scores[n][i] + position) * kScale : -INFINITY;
        }
    }
    float scale[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float most = fmaxf(fmaxf(scores[0][2 * half], scores[0][2 * half + 1]),
                           fmaxf(scores[1][2 * half], scores[1][2 * half + 1]));
        most = max_of_four(most);
        if (keys == 0) most = 0.0f;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& score = scores[i / 2][2 * half + i % 2];
            score = exp2_fast(score - most);
            sum += score;
        }
        sum = sum_of_four(sum);
        scale[half] = sum > 0.0f ? 1.0f / sum : 0.0f;
    }
    uint32_t weights[4], values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        weights[i] = pack<Bf16>(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
    }
    load_matrices<true>(values, block.tile, at_chunk<2>(lane % 16, lane / 16));
    float o[2][4] = {};
    multiply_add<Bf16>(o[0], weights, values[0], values[1]);
    multiply_add<Bf16>(o[1], weights, values[2], values[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float by = scale[i % 2];
        a[i] = pack<Bf16>(by * o[i / 2][i % 2 * 2], by * o[i / 2][i % 2 * 2 + 1]);
    }
}

__device__ inline Affine attention(LoopBlock& block, const Weights& weights, const Biases& biases, int keys,
                                   const LoopPart& next) {
    constexpr int kMatrix = kLoopFrames * kHeadDim / 2;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, part = warp / 2;
    const int chunk = block.rank % kHeadBlocks * 2 + warp % 2;
    if (part < 3) {
        float c[1][4] = {};
        multiply<32>(c, block.normalised, weights.qkv, 8 * warp, 8);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int frame = lane / 4 + 8 * half, at = at_chunk<kHeadChunks>(frame, chunk) + lane % 4;
            const float x = rounded(c[0][2 * half] + biases.qkv.x), y = rounded(c[0][2 * half + 1] + biases.qkv.y);
            if (part == 2) {
                block.tile.store(at_chunk<2>(frame, warp % 2) + lane % 4, pack<Bf16>(x, y));
                continue;
            }
#pragma unroll
            for (int n = 0; n < kHeadBlocks; ++n) {
                const int to = block.rank / kHeadBlocks * kHeadBlocks + n;
                if (part == 1) {
                    store_to(block.exchanged, 2 * kMatrix + at, to, pack<Bf16>(x, y));
                } else {
                    store_to(block.exchanged, at, to, pack<Bf16>(x + biases.u.x, y + biases.u.y));
                    store_to(block.exchanged, kMatrix + at, to, pack<Bf16>(x + biases.v_bias.x, y + biases.v_bias.y));
                }
            }
        }
    }
    block.meet();
    uint32_t a[4];
    attend(a, block, weights.positions, keys);
    float c[kTiles][4] = {};
    multiply_own(c, a, weights.out, 8 * kTiles * warp);
    block.give(c);
    return block.add(biases.out, 1.0f, next);
}

// The depthwise convolution of a thread's frame and pair of channels: the taps of all frames, and the norm
struct Depthwise {
    float2 taps[kLoopFrames], bias, norm_weight, norm_bias;
    bool layer;  // a LayerNorm follows; a BatchNorm is part of taps and bias

    __device__ Depthwise(const ClusterLoop& op, const LoopBlock& block) {
        const int frame = block.own_frame(), channel = block.owns() ? block.own_column() : 0;
        const int width = static_cast<int>(op.width);
        const Bf16* weight = elements(op.depthwise.weight) + int64_t{channel} * width;
        layer = op.depthwise_norm.weight != nullptr && op.running_mean == nullptr;
        bias = pair_of(op.depthwise.bias, channel);
        norm_weight = pair_of(op.depthwise_norm.weight, channel);
        norm_bias = pair_of(op.depthwise_norm.bias, channel);
        float2 scale = make_float2(1.0f, 1.0f);
        if (op.running_mean != nullptr) {
            const float2 mean = pair_of(op.running_mean, channel), var = pair_of(op.running_var, channel);
            const auto eps = static_cast<float>(op.eps);
            scale = make_float2(norm_weight.x * rsqrtf(var.x + eps), norm_weight.y * rsqrtf(var.y + eps));
            bias = make_float2((bias.x - mean.x) * scale.x + norm_bias.x, (bias.y - mean.y) * scale.y + norm_bias.y);
        }
#pragma unroll
        for (int j = 0; j < kLoopFrames; ++j) {
            const int tap = j - frame + width / 2;
            const bool there = block.owns() && static_cast<unsigned>(tap) < static_cast<unsigned>(width);
            taps[j] = make_float2(there ? scale.x * to_float(weight[tap]) : 0.0f,
                                  there ? scale.y * to_float(weight[width + tap]) : 0.0f);
        }
    }
};

__device__ inline float sum_of_eight(float x) {
    x = sum_of_four(x);
    return x + __shfl_xor_sync(kAllLanes, x, 4);
}

__device__ inline Affine convolution(LoopBlock& block, const Weights& weights, const Biases& biases,
                                     const Depthwise& depthwise, int frames, const LoopPart& next) {
    constexpr int kMoments = kLoopFrames * kOwn;  // behind the output of the GLU
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    if (warp < 2) {
        float c[2][4] = {};  // values, gates
        multiply<32>(c, block.normalised, weights.pointwise1, 8 * warp, kOwn);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int frame = lane / 4 + 8 * half;
            const float x = (c[0][2 * half] + biases.value.x) * sigmoid(c[1][2 * half] + biases.gate.x);
            const float y = (c[0][2 * half + 1] + biases.value.y) * sigmoid(c[1][2 * half + 1] + biases.gate.y);
            const bool there = frame < frames;
            block.exchanged.store(frame * kOwn + 8 * warp + lane % 4 * 2,
                                  make_float2(there ? x : 0.0f, there ? y : 0.0f));
        }
    }
    __syncthreads();
    float2 d = depthwise.bias;
    if (block.owns()) {
#pragma unroll
        for (int j = 0; j < kLoopFrames; ++j) {
            const auto x = block.exchanged.load<float2>(j * kOwn + 2 * block.own_pair());
            d.x += depthwise.taps[j].x * x.x;
            d.y += depthwise.taps[j].y * x.y;
        }
    }
    if (depthwise.layer) {
        if (block.owns()) {
            const float mean = sum_of_eight(d.x + d.y) / kOwn;
            const float x = d.x - mean, y = d.y - mean, squares = sum_of_eight(x * x + y * y);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                store_to(block.exchanged, kMoments + 2 * (block.rank * kLoopFrames + block.own_frame()),
                         block.own_pair() + 8 * n, make_float2(mean, squares));
            }
        }
        block.meet();
        if (block.owns()) {
            float2 moments[kLoopBlocks];
            float mean = 0.0f, squares = 0.0f;
#pragma unroll
            for (int n = 0; n < kLoopBlocks; ++n) {
                moments[n] = block.exchanged.load<float2>(kMoments + 2 * (n * kLoopFrames + block.own_frame()));
                mean += moments[n].x / kLoopBlocks;
            }
#pragma unroll
            for (int n = 0; n < kLoopBlocks; ++n) {
                squares += moments[n].y + kOwn * (moments[n].x - mean) * (moments[n].x - mean);
            }
            const float scale = rsqrtf(squares / kLoopWidth + block.eps);
            d.x = (d.x - mean) * scale * depthwise.norm_weight.x + depthwise.norm_bias.x;
            d.y = (d.y - mean) * scale * depthwise.norm_weight.y + depthwise.norm_bias.y;
        }
    }
    if (block.owns()) block.store_in_tile(make_float2(silu(d.x), silu(d.y)));
    __syncthreads();
    uint32_t a[4];
    load_matrices<false>(a, block.tile, at_chunk<2>(lane % 16, lane / 16));
    float c[kTiles][4] = {};
    multiply_own(c, a, weights.pointwise2, 8 * kTiles * warp);
    block.give(c);
    return block.add(biases.pointwise2, 1.0f, next);
}

// |new - old| / |old| over the frames of an utterance, the same in all threads of all blocks
__device__ inline float normalised_change(const Shared& sums, const Sixteen& now, const Sixteen& before, int frames) {
    const Row x(now), y(before);
    float change = 0.0f, size = 0.0f;
    if (static_cast<int>(threadIdx.x) / 16 < frames) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            change += (x.at[i] - y.at[i]) * (x.at[i] - y.at[i]);
            size += y.at[i] * y.at[i];
        }
    }
    for (int by = 1; by < kWarp; by *= 2) {
        change += __shfl_xor_sync(kAllLanes, change, by);
        size += __shfl_xor_sync(kAllLanes, size, by);
    }
    if (threadIdx.x % kWarp == 0) sums.store(static_cast<int>(threadIdx.x) / kWarp * 2, make_float2(change, size));
    __syncthreads();
    change = size = 0.0f;
    for (int warp = 0; warp < kLoopThreads / kWarp; ++warp) {
        const auto sum = sums.load<float2>(2 * warp);
        change += sum.x;
        size += sum.y;
    }
    return sqrtf(change) / fmaxf(sqrtf(size), 1.17549435e-38f);
}

namespace {

// Grid: clusters of 16 blocks, one for each utterance
__global__ void __launch_bounds__(kLoopThreads, 1) loops(const ClusterLoop op) {
#if defined(LCC_EMULATION) || __CUDA_ARCH__ == 900  // sm_90 and 90a
    SharedMemory shared;
    LoopBlock block(shared, static_cast<float>(op.eps));
    const Weights weights(shared, op, block.rank);
    const Shared sums = shared.take(kLoopSums);
    const Biases biases(op, block);
    const Depthwise depthwise(op, block);
    const int b = static_cast<int>(blockIdx.x) / kLoopBlocks, frames = static_cast<int>(op.frames);
    const int length = op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames));
    const int frame = static_cast<int>(threadIdx.x) / 16, depth = static_cast<int>(op.depth);

    Sixteen before{};
    if (frame < frames) {
        before = Sixteen::of_vector(elements(op.x) + (b * op.frames + frame) * kLoopWidth);
    }
    Affine norm(op.ffn1_norm);
    block.set_stream(before);
    for (int k = 1;; ++k) {
        __syncthreads();
        block.take_stream();
        block.normalise(norm);
        norm = block.feed_forward(weights.up1, biases.up1, weights.down1, biases.down1, op.attention_norm);
        block.normalise(norm);
        norm = attention(block, weights, biases, length, op.conv_norm);
        block.normalise(norm);
        norm = convolution(block, weights, biases, depthwise, op.masked ? length : frames, op.ffn2_norm);
        block.normalise(norm);
        norm = block.feed_forward(weights.up2, biases.up2, weights.down2, biases.down2, op.norm);

        Row row(block.stream());
        row.normalise(norm, block.eps);
        const Sixteen now = row.round();
        bool last = k == depth;
        if (op.threshold > 0.0 && k >= op.min_depth && !last) {
            last = normalised_change(sums, now, before, length) < static_cast<float>(op.threshold);
        }
        if (frame == block.rank && frame < frames) {
            const int64_t at = (b * op.frames + frame) * kLoopWidth + static_cast<int>(threadIdx.x) % 16 * 8;
            const auto write = [&](void* to, int64_t first) {
                auto* eights = reinterpret_cast<Eight<Bf16>*>(static_cast<Bf16*>(to) + first);
                eights[0] = now.parts[0];
                eights[16] = now.parts[1];
            };
            if (op.states != nullptr) write(op.states, (k - 1) * op.batch * op.frames * kLoopWidth + at);
            if (op.out != nullptr && last) write(op.out, at);
        }
        if (last) {
            if (op.exit_depths != nullptr && block.rank == 0 && threadIdx.x == 0) op.exit_depths[b] = k;
            break;
        }
        norm = Affine(op.ffn1_norm);
        block.set_stream(now);
        before = now;
    }
    // no block may return while another one reaches into it
    cluster_arrive();
    cluster_wait();
#else
    asm volatile("trap;");
#endif
}

void check_sizes(const ClusterLoop& op) {
    if (op.frames < 1 || op.frames > kLoopFrames || op.width % 2 == 0 || op.depth < 1) {
        throw std::invalid_argument("cluster_loop: T is " + std::to_string(op.frames) + ", the convolution " +
                                    std::to_string(op.width) + " wide, depth " + std::to_string(op.depth) +
                                    "; expected T from 1 to 16, an odd width and a depth of 1 or more");
    }
}

}  // namespace

void cluster_loop(const ClusterLoop& op) {
    check_sizes(op);
    if (op.batch == 0) return;
    launch_clusters("cluster_loop", op.device, loops, kLoopBlocks, dim3(static_cast<unsigned>(op.batch * kLoopBlocks)),
                    dim3(kLoopThreads), cluster_loop_shared(), op.stream, op);
}

bool cluster_loop_fits(int device) {
    const DeviceGuard guard(device, "cluster_loop_fits");
    return cluster_fits("cluster_loop_fits", loops, kLoopBlocks, dim3(kLoopThreads), cluster_loop_shared());
}

}  // namespace lcc::cuda
