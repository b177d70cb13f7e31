#include "cuda/glu_depthwise_conv.cuh"

#include <algorithm>

namespace lcc::cuda {
namespace {

// A lane makes kRows outputs in a row, so that a value read from shared memory is used kRows times.
// 16: 32 accumulators and 32 window registers of two channels fit 128 threads without spills.
constexpr int kRows = kGluConvRows;
constexpr int kGroup = kGluConvGroup;  // channels of a warp, two a lane
constexpr int kThreads = kGluConvWarps * kWarp;
constexpr int kBatch = 3;  // of loads in flight: a thread stages 6 Eights of a tile at K = 31, and 8 with LayerNorm
constexpr int kResidentBlocks = 132 * 4;  // of the backward pass on an H100 at K = 31
static_assert(kGroup == 2 * kWarp, "a lane owns two channels");
static_assert(glu_depthwise_conv_forward_shared(kGluConvMaxWidth, true) <= (99 << 10) &&
                  glu_depthwise_conv_backward_shared(kGluConvMaxWidth) <= (99 << 10),
              "sm_86, sm_89 and sm_120 have 99 KiB");

// warps side by side over channels, and one after the other over frames
template <bool kLayer>
struct Tiling {
    static constexpr int groups = kLayer ? kGluConvLayerGroups : 1;
    static constexpr int parts = kGluConvWarps / groups;
    static constexpr int channels = groups * kGroup;
    static constexpr int frames = parts * kRows;
    // floats between the weights of two taps: 8 taps of 4 adjacent channels are in 32 banks
    static constexpr int taps_pitch = channels + 4;
};
using Tiles = Tiling<false>;

__device__ inline void fma(float2& acc, float2 a, float2 b) {
    acc.x = fmaf(a.x, b.x, acc.x);
    acc.y = fmaf(a.y, b.y, acc.y);
}
__device__ inline void add(float2& acc, float2 a) { acc = make_float2(acc.x + a.x, acc.y + a.y); }

// Where a channel of a group is in a row of shared memory. A thread stages eight channels with two stores of four
// floats; the first halves of eight threads lie side by side, then the second halves, so that no two of them share a
// bank.
__device__ inline int position(int channel) { return channel % 8 / 4 * 32 + channel / 8 * 4 + channel % 4; }
// the first of the two channels at positions 2 * lane and 2 * lane + 1
__device__ inline int lane_channel(int lane) { return lane % 16 / 2 * 8 + lane / 16 * 4 + lane % 2 * 2; }

// acc[r] += sum over n < count of signal[r + n] * coef[n]: the correlation that forward, input gradient and weight
// gradient all are. The window of N signal rows slides through registers; rows are the pitches apart.
template <int kSignalPitch, int kCoefPitch, int N>
__device__ inline void slide(float2 (&acc)[N], Shared signal, Shared coef, int count) {
    float2 window[N];
    const auto step = [&](int j) {
        window[(j + N - 1) % N] = signal.load<float2>((j + N - 1) * kSignalPitch);
        const float2 c = coef.load<float2>(j * kCoefPitch);
#pragma unroll
        for (int r = 0; r < N; ++r) fma(acc[r], window[(j + r) % N], c);
    };
#pragma unroll
    for (int r = 0; r < N - 1; ++r) window[r] = signal.load<float2>(r * kSignalPitch);
    for (; count >= N; count -= N) {
#pragma unroll
        for (int j = 0; j < N; ++j) step(j);
        signal = signal + N * kSignalPitch;
        coef = coef + N * kCoefPitch;
    }
    // not zero coefficients past the end: zero times an infinite frame would be NaN
#pragma unroll
    for (int j = 0; j < N - 1; ++j) {
        if (j >= count) break;
        step(j);
    }
}

// body(aligned), where aligned.value is a constant
template <class Body>
__device__ inline void if_aligned(const GluDepthwiseConv& op, Body body) {
    if (op.aligned) {
        body(std::true_type());
    } else {
        body(std::false_type());
    }
}

struct Tile {
    int b;             // utterance
    int t0;            // first frame
    int frames, real;  // of b, with and without padding
};

template <bool kLayer>
__device__ inline Tile tile_at(const GluDepthwiseConv& op, int index) {
    const int frames = static_cast<int>(op.frames);
    const int per_utterance = (frames + Tiling<kLayer>::frames - 1) / Tiling<kLayer>::frames;
    const int b = index / per_utterance;
    const int real = op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames));
    return {b, index % per_utterance * Tiling<kLayer>::frames, frames, real};
}

// weights [K, channels] of the tile's channels from c0 on, from [C, K]; a warp takes 8 taps of 4 channels at a time
template <class T, bool kLayer>
__device__ void load_weights(Shared weights, const GluDepthwiseConv& op, int c0) {
    constexpr int kQuads = Tiling<kLayer>::channels / 4;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int k = lane / 4; k < op.width; k += 8) {
        T values[kQuads / kGluConvWarps] = {};
#pragma unroll
        for (int n = 0; n < kQuads / kGluConvWarps; ++n) {
            const int c = c0 + (n * kGluConvWarps + warp) * 4 + lane % 4;
            if (c < op.channels) values[n] = static_cast<const T*>(op.weight)[c * op.width + k];
        }
#pragma unroll
        for (int n = 0; n < kQuads / kGluConvWarps; ++n) {
            const int c = (n * kGluConvWarps + warp) * 4 + lane % 4;
            weights.store(k * Tiling<kLayer>::taps_pitch + c / kGroup * kGroup + position(c % kGroup),
                          to_float(values[n]));
        }
    }
}

// GLU [rows, channels] of frames first ... and channels c0 ...; zero in the padding and outside of the utterance
template <class T, bool kLayer, bool kAligned>
__device__ void stage_glu_as(Shared glu, const GluDepthwiseConv& op, const Tile& tile, int first, int rows, int c0) {
    constexpr int kInRow = Tiling<kLayer>::channels / 8, kStep = kThreads / kInRow, kLoads = kAligned ? kBatch : 1;
    const int eight = threadIdx.x % kInRow, c = c0 + 8 * eight;
    const T* x = static_cast<const T*>(op.x) + tile.b * op.x_batch_stride;
    const int to = eight / 8 * kGroup + eight % 8 * 4;
    for (int f0 = threadIdx.x / kInRow; f0 < rows; f0 += kLoads * kStep) {
        Eight<T> value[kLoads] = {}, gate[kLoads] = {};
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int f = f0 + n * kStep, t = first + f;
            // a select, not a product: padding may hold NaN
            if (f < rows && t >= 0 && t < tile.real && c < op.channels) {
                const T* row = x + int64_t{t} * static_cast<int>(op.x_frame_stride);
                value[n] = load_some<Eight<T>, kAligned>(row, c, op.channels);
                gate[n] = load_some<Eight<T>, kAligned>(row + op.channels, c, op.channels);
            }
        }
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            float h[8];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 v = to_floats(value[n].pairs[i]), s = sigmoid<T>(to_floats(gate[n].pairs[i]));
                h[2 * i] = v.x * s.x;
                h[2 * i + 1] = v.y * s.y;
            }
            const int f = f0 + n * kStep;
            if (f >= rows) break;
            glu.store(f * Tiling<kLayer>::channels + to, make_float4(h[0], h[1], h[2], h[3]));
            glu.store(f * Tiling<kLayer>::channels + to + 32, make_float4(h[4], h[5], h[6], h[7]));
        }
    }
}

template <class T, bool kLayer>
__device__ void stage_glu(Shared glu, const GluDepthwiseConv& op, const Tile& tile, int first, int rows, int c0) {
    if_aligned(op, [&](auto aligned) { stage_glu_as<T, kLayer, aligned.value>(glu, op, tile, first, rows, c0); });
}

// channels c, c + 1 of [C]
template <class T>
__device__ inline float2 pair_or(const T* values, int c, int channels, float otherwise) {
    if (values == nullptr) return make_float2(otherwise, otherwise);
    return to_floats(load_some<Pair<T>, false>(values, c, channels));
}

// v[r] summed over the lanes of the warp, in lanes 2 * r and 2 * r + 1: a lane keeps half of the rows, N / 2, at a time
template <int N>
__device__ inline float sum_rows(float (&v)[N], int lane) {
    if constexpr (N == 1) {
        return v[0] + __shfl_xor_sync(0xFFFFFFFFu, v[0], 1);
    } else {
        const bool upper = lane & N;
        float half[N / 2];
#pragma unroll
        for (int r = 0; r < N / 2; ++r) {
            const float mine = upper ? v[r + N / 2] : v[r], other = upper ? v[r] : v[r + N / 2];
            half[r] = mine + __shfl_xor_sync(0xFFFFFFFFu, other, N);
        }
        return sum_rows(half, lane);
    }
}

// the moments of row lane / 2 over channels c, c + 1 of all lanes
__device__ inline Moments moments_of_rows(const float2 (&z)[kRows], int c, int channels, int lane) {
    const int first = c - lane_channel(lane);
    const float count = static_cast<float>(max(0, min(kGroup, channels - first)));
    const bool has_x = c < channels, has_y = c + 1 < channels;
    float v[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) v[r] = (has_x ? z[r].x : 0.0f) + (has_y ? z[r].y : 0.0f);
    const float mean = sum_rows(v, lane) / max(count, 1.0f);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const float m = __shfl_sync(0xFFFFFFFFu, mean, 2 * r);
        const float dx = has_x ? z[r].x - m : 0.0f, dy = has_y ? z[r].y - m : 0.0f;
        v[r] = fmaf(dx, dx, dy * dy);
    }
    return {count, mean, sum_rows(v, lane)};
}

// The kRows rows of a warp in a tensor [B, T, C], from frame t on, at channels c, c + 1: where the first is, and how
// many there are
template <class T>
struct Rows {
    T* at;
    int count;

    __device__ Rows(const GluDepthwiseConv& op, void* tensor, const Tile& tile, int t, int c)
        : at(static_cast<T*>(tensor) + (int64_t{tile.b} * tile.frames + t) * op.channels),
          count(c < op.channels ? min(kRows, tile.frames - t) : 0) {}
};

template <class T>
__device__ inline void load_rows(float2 (&z)[kRows], const GluDepthwiseConv& op, const Rows<T>& rows, int c) {
    if_aligned(op, [&](auto aligned) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            Pair<T> pair{};
            if (r < rows.count) pair = load_some<Pair<T>, aligned.value>(rows.at + r * op.channels, c, op.channels);
            z[r] = to_floats(pair);
        }
    });
}

template <class T>
__device__ inline void store_rows(const float2 (&z)[kRows], const GluDepthwiseConv& op, const Rows<T>& rows, int c) {
    if_aligned(op, [&](auto aligned) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r < rows.count) store_pair<aligned.value>(rows.at + r * op.channels, c, op.channels, z[r]);
        }
    });
}

// silu(z * scale + shift) in place, after (z - mean) * inverse deviation with LayerNorm: those of row r are lane 2 r's
template <class T, bool kLayer>
__device__ inline void finish(float2 (&z)[kRows], const GluDepthwiseConvForward& op, int c, float mean, float inverse) {
    float2 scale = pair_or(op.scale, c, op.channels, 1.0f), shift = pair_or(op.shift, c, op.channels, 0.0f);
    if (op.var != nullptr) {
        const float2 m = pair_or(op.mean, c, op.channels, 0.0f), v = pair_or(op.var, c, op.channels, 1.0f);
        scale = make_float2(rsqrtf(v.x + op.eps) * scale.x, rsqrtf(v.y + op.eps) * scale.y);
        shift = make_float2(fmaf(-m.x, scale.x, shift.x), fmaf(-m.y, scale.y, shift.y));
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        float2 a = z[r];
        if (kLayer) {
            const float m = __shfl_sync(0xFFFFFFFFu, mean, 2 * r), i = __shfl_sync(0xFFFFFFFFu, inverse, 2 * r);
            a = make_float2((a.x - m) * i, (a.y - m) * i);
        }
        a = make_float2(fmaf(a.x, scale.x, shift.x), fmaf(a.y, scale.y, shift.y));
        const float2 s = sigmoid<T>(a);
        z[r] = make_float2(a.x * s.x, a.y * s.y);
    }
}

// Grid: channel tiles x frame tiles of all utterances, channels fastest; with LayerNorm a block walks over all channels
// of its frames, and z waits in y or out until the row's moments are known, that of the last channels in registers.
template <class T, bool kLayer>
__global__ void __launch_bounds__(kThreads, kLayer ? 4 : 5) forward(const GluDepthwiseConvForward op) {
    using G = Tiling<kLayer>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int group = warp % G::groups, part = warp / G::groups;
    const int channel_tiles = (op.channels + G::channels - 1) / G::channels;
    const Tile tile = tile_at<kLayer>(op, static_cast<int>(blockIdx.x) / (kLayer ? 1 : channel_tiles));
    const int t = tile.t0 + part * kRows, halo = op.width / 2;
    // without the rows that no output of the utterance needs
    const int rows = min(G::frames + op.width - 1, tile.frames + 2 * halo - tile.t0);

    SharedMemory shared;
    const Shared glu = shared.take((G::frames + op.width - 1) * G::channels);  // [frames + K - 1, channels]
    const Shared weights = shared.take(op.width * G::taps_pitch);              // [K, channels]
    const int own = group * kGroup + lane_channel(lane);

    int c0 = kLayer ? 0 : static_cast<int>(blockIdx.x) % channel_tiles * G::channels;
    Moments moments = {};
    float2 z[kRows];
    for (;; c0 += G::channels) {
        stage_glu<T, kLayer>(glu, op, tile, tile.t0 - halo, rows, c0);
        load_weights<T, kLayer>(weights, op, c0);
        __syncthreads();
        const float2 bias = pair_or(static_cast<const T*>(op.bias), c0 + own, op.channels, 0.0f);
#pragma unroll
        for (int r = 0; r < kRows; ++r) z[r] = bias;
        if (t < tile.frames) {
            slide<G::channels, G::taps_pitch>(z, glu + part * kRows * G::channels + group * kGroup + 2 * lane,
                                              weights + group * kGroup + 2 * lane, op.width);
        }
        const bool last = !kLayer || c0 + G::channels >= op.channels;
        if (kLayer) moments.merge(moments_of_rows(z, c0 + own, op.channels, lane));
        if (op.y != nullptr || !last) {
            store_rows(z, op, Rows<T>(op, op.y != nullptr ? op.y : op.out, tile, t, c0 + own), c0 + own);
        }
        if (last) break;
        __syncthreads();  // this chunk has been read by every warp
    }
    if (!kLayer) {
        finish<T, kLayer>(z, op, c0 + own, 0.0f, 1.0f);
        store_rows(z, op, Rows<T>(op, op.out, tile, t, c0 + own), c0 + own);
        return;
    }

    const Shared of_groups = shared.take(G::groups * G::frames * 4);  // Moments [groups, frames], four floats apart
    const int row = part * kRows + lane / 2;
    if (lane % 2 == 0) {
        of_groups.store((group * G::frames + row) * 4, make_float4(moments.count, moments.mean, moments.squares, 0.0f));
    }
    __syncthreads();
    moments = {};
    for (int g = 0; g < G::groups; ++g) {
        const auto m = of_groups.load<float4>((g * G::frames + row) * 4);
        moments.merge({m.x, m.y, m.z});
    }
    const float mean = moments.mean, inverse = rsqrtf(moments.squares / moments.count + op.eps);
    for (;;) {
        finish<T, kLayer>(z, op, c0 + own, mean, inverse);
        store_rows(z, op, Rows<T>(op, op.out, tile, t, c0 + own), c0 + own);
        if (c0 == 0) break;
        c0 -= G::channels;
        load_rows(z, op, Rows<T>(op, op.y != nullptr ? op.y : op.out, tile, t, c0 + own), c0 + own);
    }
}

// the gradient at a, from that at silu(a); rounded the same everywhere, so that LayerNorm's differences of it cancel
template <class T>
__device__ inline float silu_gradient(float dout, float a) {
    const float s = sigmoid<T>(a);
    return dout * (s * (1.0f + a * (1.0f - s)));
}

__device__ inline float sum_lanes(float x) {
#pragma unroll
    for (int bit = kWarp / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, bit);
    return x;
}

// What LayerNorm's gradient needs of a row: mean and inverse deviation of z, and the means of g and g * zhat, where
// zhat is the normalised row and g the gradient there. A warp takes a row and keeps it in registers; grid: rows in
// fours.
template <class T>
__global__ void __launch_bounds__(kThreads) row_moments(const GluDepthwiseConvBackward op) {
    const int64_t row = int64_t{blockIdx.x} * kGluConvWarps + threadIdx.x / kWarp;
    if (row >= op.batch * op.frames) return;
    constexpr int kEights = kGluConvMaxLayerChannels / (8 * kWarp);
    const int lane = threadIdx.x % kWarp;
    const T* z_row = static_cast<const T*>(op.y) + row * op.channels;
    const T* dout_row = static_cast<const T*>(op.dout) + row / op.frames * op.dout_batch_stride +
                        row % op.frames * op.dout_frame_stride;
    Eight<T> z[kEights] = {}, dout[kEights] = {};
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
        const int c = (n * kWarp + lane) * 8;
        if (c >= op.channels) break;
        if_aligned(op, [&](auto aligned) {
            z[n] = load_some<Eight<T>, aligned.value>(z_row, c, op.channels);
            dout[n] = load_some<Eight<T>, aligned.value>(dout_row, c, op.channels);
        });
    }
    // term(n, i, c) summed over the channels of the row
    const auto sum = [&](auto term) {
        float total = 0.0f;
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
            const int c = (n * kWarp + lane) * 8;
            if (c >= op.channels) break;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (c + i < op.channels) total += term(n, i, c + i);
            }
        }
        return sum_lanes(total);
    };
    const float share = 1.0f / static_cast<float>(op.channels);
    const auto element = [](const Eight<T>& from, int i) {
        const float2 pair = to_floats(from.pairs[i / 2]);
        return i % 2 == 0 ? pair.x : pair.y;
    };
    const auto value = [&](int n, int i) { return element(z[n], i); };
    const float mean = share * sum([&](int n, int i, int) { return value(n, i); });
    const float variance = share * sum([&](int n, int i, int) { return (value(n, i) - mean) * (value(n, i) - mean); });
    const float inverse = rsqrtf(variance + op.eps);
    float total_zhat = 0.0f;
    const float total = sum([&](int n, int i, int c) {
        const float zhat = (value(n, i) - mean) * inverse, a = fmaf(zhat, op.scale[c], op.shift[c]);
        const float g = silu_gradient<T>(element(dout[n], i), a) * op.scale[c];
        total_zhat = fmaf(g, zhat, total_zhat);
        return g;
    });
    const float4 moments = make_float4(mean, inverse, share * total, share * sum_lanes(total_zhat));
    if (lane == 0) reinterpret_cast<float4*>(op.rows)[row] = moments;
}

// sums over frames of dz, of the gradient at a, and of that times zhat, which is z without LayerNorm
struct Sums {
    float2 dz, da, dazhat;
};

// dz [frames + K - 1, channels], 0 outside of the utterance; padding has one
template <class T, bool kLayer, bool kAligned>
__device__ inline void stage_gradient(Shared grad, const GluDepthwiseConvBackward& op, const Tile& tile, int rows,
                                      int c, Sums& sums) {
    constexpr int kLoads = kAligned ? 4 : 1;
    const int lane = threadIdx.x % kWarp, halo = op.width / 2;
    const float2 scale = pair_or(op.scale, c, op.channels, 1.0f), shift = pair_or(op.shift, c, op.channels, 0.0f);
    const T* dout = static_cast<const T*>(op.dout) + tile.b * op.dout_batch_stride;
    const T* z = static_cast<const T*>(op.y) + tile.b * op.frames * op.channels;
    for (int f0 = threadIdx.x / kWarp; f0 < rows; f0 += kLoads * kGluConvWarps) {
        Pair<T> d[kLoads] = {}, values[kLoads] = {};
        float4 moments[kLoads] = {};
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int f = f0 + n * kGluConvWarps, t = tile.t0 + f - halo;
            if (f < rows && t >= 0 && t < tile.frames && c < op.channels) {
                d[n] = load_some<Pair<T>, kAligned>(dout + int64_t{t} * static_cast<int>(op.dout_frame_stride), c,
                                                    op.channels);
                values[n] = load_some<Pair<T>, kAligned>(z + int64_t{t} * op.channels, c, op.channels);
                if (kLayer) moments[n] = reinterpret_cast<const float4*>(op.rows)[tile.b * op.frames + t];
            }
        }
#pragma unroll
        for (int n = 0; n < kLoads; ++n) {
            const int f = f0 + n * kGluConvWarps;
            if (f >= rows) break;
            float2 zhat = to_floats(values[n]);
            const float4 m = moments[n];
            if (kLayer) zhat = make_float2((zhat.x - m.x) * m.y, (zhat.y - m.x) * m.y);
            const float2 a = make_float2(fmaf(zhat.x, scale.x, shift.x), fmaf(zhat.y, scale.y, shift.y));
            const float2 from = to_floats(d[n]);
            const float2 da = make_float2(silu_gradient<T>(from.x, a.x), silu_gradient<T>(from.y, a.y));
            float2 dz = make_float2(da.x * scale.x, da.y * scale.y);
            if (kLayer) {
                dz = make_float2((dz.x - m.z - zhat.x * m.w) * m.y, (dz.y - m.z - zhat.y * m.w) * m.y);
            }
            if (f >= halo && f < halo + Tiles::frames) {
                add(sums.dz, dz);
                add(sums.da, da);
                fma(sums.dazhat, da, zhat);
            }
            grad.store(f * kGroup + 2 * lane, dz);
        }
    }
}

// dx from the gradient at GLU's output of N rows, which start at frame t and in `glu`
template <class T, bool kAligned, int N>
__device__ inline void store_dx(const GluDepthwiseConvBackward& op, const Tile& tile, int t, int c, Shared glu,
                                const float2 (&dglu)[N]) {
    if (c >= op.channels) return;
    const T* gates = static_cast<const T*>(op.x) + tile.b * op.x_batch_stride + op.channels;
    T* dx = static_cast<T*>(op.dx) + (int64_t{tile.b} * op.frames + t) * 2 * op.channels;
    Pair<T> gate[N] = {};
#pragma unroll
    for (int r = 0; r < N; ++r) {
        if (t + r >= tile.real) continue;
        const T* row = gates + int64_t{t + r} * static_cast<int>(op.x_frame_stride);
        gate[r] = load_some<Pair<T>, kAligned>(row, c, op.channels);
    }
#pragma unroll
    for (int r = 0; r < N; ++r) {
        if (t + r >= tile.frames) break;
        float2 dvalue = {}, dgate = {};
        if (t + r < tile.real) {
            const float2 s = sigmoid<T>(to_floats(gate[r])), h = glu.load<float2>(r * kGroup);
            dvalue = make_float2(dglu[r].x * s.x, dglu[r].y * s.y);
            dgate = make_float2(dglu[r].x * h.x * (1.0f - s.x), dglu[r].y * h.y * (1.0f - s.y));
        }
        store_pair<kAligned>(dx + 2 * r * op.channels, c, op.channels, dvalue);
        store_pair<kAligned>(dx + (2 * r + 1) * op.channels, c, op.channels, dgate);
    }
}

// grid: groups of channels x slots; a block walks over every slots-th frame tile and keeps its weight gradient in
// registers
template <class T, bool kLayer>
__global__ void __launch_bounds__(kThreads, 4) backward(const GluDepthwiseConvBackward op) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int c0 = static_cast<int>(blockIdx.x) * kGroup, c = c0 + lane_channel(lane);
    const int halo = op.width / 2;
    const int tiles = static_cast<int>(op.batch * ((op.frames + Tiles::frames - 1) / Tiles::frames));

    SharedMemory shared;
    // the taps of the last group past K read rows that nothing uses: they are there, and never set
    const Shared glu =
        shared.take((Tiles::frames - 1 + (op.width + kRows - 1) / kRows * kRows) * kGroup);  // [frames + K - 1, kGroup]
    const Shared grad = shared.take((Tiles::frames + op.width - 1) * kGroup);                // dz, as glu
    const Shared weights = shared.take(op.width * Tiles::taps_pitch);                        // [K, kGroup]
    load_weights<T, false>(weights, op, c0);

    // for the weight gradient 1, 2 or all 4 warps have kRows taps each, and the others a part of the frames
    const int tap_warps = op.width <= kRows ? 1 : op.width <= 2 * kRows ? 2 : 4;
    const int parts = kGluConvWarps / tap_warps, part_frames = kRows * tap_warps;
    const int tap0 = (warp & (tap_warps - 1)) * kRows, part = tap_warps == 1 ? warp : tap_warps == 2 ? warp / 2 : 0;
    float2 dweight[kRows] = {};
    Sums sums = {};

    for (int index = blockIdx.y; index < tiles; index += op.slots) {
        const Tile tile = tile_at<false>(op, index);
        // without the rows that no frame of the utterance needs
        const int rows = min(Tiles::frames + op.width - 1, tile.frames + 2 * halo - tile.t0);
        __syncthreads();  // the last tile has been read by every warp
        stage_glu<T, false>(glu, op, tile, tile.t0 - halo, rows, c0);
        if_aligned(op, [&](auto aligned) { stage_gradient<T, kLayer, aligned.value>(grad, op, tile, rows, c, sums); });
        __syncthreads();

        // dweight[tap] = sum over t of dz[t] * h[t + tap - halo]
        if (tap0 < op.width) {
            const int first = part * part_frames;
            const int count = min(part_frames, tile.frames - tile.t0 - first);
            if (count > 0) {
                slide<kGroup, kGroup>(dweight, glu + (first + tap0) * kGroup + 2 * lane,
                                      grad + (first + halo) * kGroup + 2 * lane, count);
            }
        }

        // dz is correlated with the weights from last to first; half of the rows at a time, for dweight needs registers
#pragma unroll 1
        for (int r0 = 0; r0 < kRows; r0 += kRows / 2) {
            const int f = warp * kRows + r0;
            if (tile.t0 + f >= tile.frames) break;
            float2 dglu[kRows / 2] = {};
            slide<kGroup, -Tiles::taps_pitch>(dglu, grad + f * kGroup + 2 * lane,
                                              weights + (op.width - 1) * Tiles::taps_pitch + 2 * lane, op.width);
            const Shared h = glu + (halo + f) * kGroup + 2 * lane;
            if_aligned(op, [&](auto aligned) { store_dx<T, aligned.value>(op, tile, tile.t0 + f, c, h, dglu); });
        }
    }

    // the parts of the frames, and the warps' sums, are added in their order
    __syncthreads();
    const Shared parts_dweight = glu + 2 * lane;  // [parts, tap_warps * kRows, kGroup]
    const Shared warps_sums = grad + 2 * lane;    // [3, warps, kGroup]
#pragma unroll
    for (int r = 0; r < kRows; ++r) parts_dweight.store((warp * kRows + r) * kGroup, dweight[r]);
    warps_sums.store(warp * kGroup, sums.dz);
    warps_sums.store((kGluConvWarps + warp) * kGroup, sums.da);
    warps_sums.store((2 * kGluConvWarps + warp) * kGroup, sums.dazhat);
    __syncthreads();
    if (c >= op.channels) return;
    float* partial = op.partial + int64_t{blockIdx.y} * (op.width + 3) * op.channels;
    for (int row = warp; row < op.width + 3; row += kGluConvWarps) {
        const bool taps = row < op.width;
        const Shared from =
            taps ? parts_dweight + row * kGroup : warps_sums + (row - op.width) * kGluConvWarps * kGroup;
        const int count = taps ? parts : kGluConvWarps, pitch = taps ? tap_warps * kRows * kGroup : kGroup;
        float2 sum = {};
        for (int i = 0; i < count; ++i) add(sum, from.load<float2>(i * pitch));
        store_pair<false>(partial + int64_t{row} * op.channels, c, op.channels, sum);
    }
}

constexpr int kReduceRows = 8;

// grid: kWarp channels x (K + 3) rows; adds the slots in their order
template <class T>
__global__ void __launch_bounds__(kReduceRows* kWarp) reduce(const GluDepthwiseConvBackward op) {
    LCC_SHARED(float, sums, kReduceRows* kWarp);
    const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
    const int c = blockIdx.x * kWarp + lane, row = blockIdx.y;
    float sum = 0.0f;
    if (c < op.channels) {
#pragma unroll 4
        for (int slot = part; slot < op.slots; slot += kReduceRows) {
            sum += op.partial[(int64_t{slot} * (op.width + 3) + row) * op.channels + c];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part != 0 || c >= op.channels) return;
    for (int i = 1; i < kReduceRows; ++i) sum += sums[i * kWarp + lane];
    if (row < op.width) {
        assign(static_cast<T*>(op.dtaps)[row * op.channels + c], sum);
    } else if (row == op.width) {
        assign(static_cast<T*>(op.dbias)[c], sum);
    } else {
        (row == op.width + 1 ? op.dshift : op.dscale)[c] = sum;
    }
}

void check_sizes(const GluDepthwiseConv& op) {
    if (op.width % 2 == 0 || op.width < 1 || op.width > kGluConvMaxWidth) {
        throw std::invalid_argument("glu_depthwise_conv: K is " + std::to_string(op.width) + "; expected odd, 1 to 63");
    }
    if (op.layer_norm && op.channels > kGluConvMaxLayerChannels) {
        throw std::invalid_argument("glu_depthwise_conv: C is " + std::to_string(op.channels) +
                                    " with LayerNorm; expected at most " + std::to_string(kGluConvMaxLayerChannels));
    }
    // kernels count frames, and elements between two of them, with int
    constexpr int64_t kMost = (int64_t{1} << 31) - 1024;
    if (op.frames > kMost || op.x_frame_stride > kMost) {
        throw std::invalid_argument("glu_depthwise_conv: 2^31 frames, or elements from one to the next");
    }
}

template <class T, bool kLayer>
void launch_forward(GluDepthwiseConvForward op) {
    const char* name = "glu_depthwise_conv_forward";
    const int64_t tiles = op.batch * ceil_div(op.frames, Tiling<kLayer>::frames);
    const int64_t blocks = kLayer ? tiles : tiles * ceil_div(op.channels, Tiling<kLayer>::channels);
    if (blocks == 0 || op.channels == 0) return;
    op.aligned = aligned<T>(op) && rows_aligned(static_cast<T*>(op.out)) && rows_aligned(static_cast<T*>(op.y));
    launch(name, op.device, forward<T, kLayer>, dim3(grid_size(name, blocks)), dim3(kThreads),
           glu_depthwise_conv_forward_shared(op.width, kLayer), op.stream, op);
}

template <class T, bool kLayer>
void launch_backward(GluDepthwiseConvBackward op) {
    const char* name = "glu_depthwise_conv_backward";
    if (op.channels == 0) return;
    if (op.slots > 0) {
        op.aligned = aligned<T>(op) &&
                     rows_aligned(static_cast<const T*>(op.dout), op.dout_batch_stride, op.dout_frame_stride) &&
                     rows_aligned(static_cast<const T*>(op.y)) && rows_aligned(static_cast<T*>(op.dx));
        if (kLayer) {
            const int64_t blocks = ceil_div(op.batch * op.frames, kGluConvWarps);
            launch(name, op.device, row_moments<T>, dim3(grid_size(name, blocks)), dim3(kThreads), 0, op.stream, op);
        }
        launch(name, op.device, backward<T, kLayer>,
               dim3(static_cast<unsigned>(ceil_div(op.channels, kGroup)), static_cast<unsigned>(op.slots)),
               dim3(kThreads), glu_depthwise_conv_backward_shared(op.width), op.stream, op);
    }
    launch(name, op.device, reduce<T>, dim3(static_cast<unsigned>(ceil_div(op.channels, kWarp)), op.width + 3u),
           dim3(kReduceRows * kWarp), 0, op.stream, op);
}

template <class T>
void backward_with(const GluDepthwiseConvBackward& op) {
    op.layer_norm ? launch_backward<T, true>(op) : launch_backward<T, false>(op);
}

}  // namespace

void glu_depthwise_conv_forward(const GluDepthwiseConvForward& op) {
    check_sizes(op);
    if (op.element != Element::float32) return glu_depthwise_conv_forward_by_products(op);
    op.layer_norm ? launch_forward<float, true>(op) : launch_forward<float, false>(op);
}

int glu_depthwise_conv_slots(int64_t batch, int64_t frames, int channels) {
    const int64_t tiles = batch * ceil_div(frames, Tiles::frames);
    const int64_t rounds = ceil_div(tiles * ceil_div(channels, kGroup), kResidentBlocks);
    return static_cast<int>(ceil_div(tiles, std::max<int64_t>(rounds, 1)));
}

void glu_depthwise_conv_backward(const GluDepthwiseConvBackward& op) {
    check_sizes(op);
    switch (op.element) {
        case Element::float32: return backward_with<float>(op);
        case Element::float16: return backward_with<__half>(op);
        case Element::bfloat16: return backward_with<__nv_bfloat16>(op);
    }
}

}  // namespace lcc::cuda
