// The forward pass for elements of 16 bits, by products of tensor cores.
//
// 16 outputs in a row of one channel are a Toeplitz matrix of its taps, [16, 16 + K - 1], times 16 + K - 1 values after
// the GLU; eight such segments are the columns of one product. The values are rounded to the element type for it, as a
// GLU of its own would round them. Taps of zero are multiplied too: an infinite value makes NaN of the outputs of its
// segment and of those beside it, also where K does not reach.
#include "cuda/glu_depthwise_conv.cuh"
#include "cuda/tensor_cores.cuh"

namespace lcc::cuda {
namespace {

constexpr int kSegment = kGluConvSegment, kEight = 8;
constexpr int kColumns = 8;  // segments of a product
// from the taps of a channel to those of the next, and to those one tap on: the latter are half of the banks apart
constexpr int kTaps = glu_depthwise_conv_products_words(kGluConvMaxWidth), kOddTaps = kEight * kTaps + 16;
constexpr int kConstants = kOddTaps + kEight * kTaps;
static_assert(kOddTaps % 32 == 16 && kConstants + 3 * kEight == kGluConvTapsOfWarp);
static_assert(glu_depthwise_conv_products_segments(true) <= kColumns, "rows have one lane");
static_assert(glu_depthwise_conv_products_shared(kGluConvMaxWidth, true, glu_depthwise_conv_products_segments(true)) <=
                  (99 << 10),
              "sm_86, sm_89 and sm_120 have 99 KiB");

// a warp has eight channels of all frames of its block
template <bool kLayer>
struct Block {
    static constexpr int warps = glu_depthwise_conv_products_warps(kLayer), threads = warps * kWarp;
    static constexpr int channels = warps * kEight;
};

struct Tile {
    int b, t0;         // utterance, first frame
    int frames, real;  // of b, with and without padding
    int segments;      // of the tile
};

__device__ inline Tile tile_at(const GluDepthwiseConvForward& op, int index) {
    const int frames = static_cast<int>(op.frames), segments = (frames + kSegment - 1) / kSegment;
    const int b = index / op.tiles, first = index % op.tiles * op.segments;
    const int real = op.lengths == nullptr ? frames : static_cast<int>(min(op.lengths[b], op.frames));
    return {b, first * kSegment, frames, real, min(op.segments, segments - first)};
}

// Where eight channels begin in [channels, frames] of shared memory, two frames a word; the next one is 4 rows further.
// So lanes that write channels 0, 8, 16, 24 write adjacent rows, which are 8 or 24 banks apart.
__device__ inline int first_row(int eight) { return eight / 4 * 32 + eight % 4; }
constexpr int kNextRow = 4;
// where eight frames, number n of a row, are in it: segments are 8 words apart, 0 ... 3 and 4 ... 7 in other halves
__device__ inline int place_of_frames(int n) { return 4 * (n ^ (n >> 3 & 1)); }

// GLU [channels, rows] of frames first ... and channels c0 ...; zero in the padding and outside of the utterance
template <class T, bool kLayer, bool kAligned>
__device__ inline void stage_glu(const Shared& glu, const GluDepthwiseConvForward& op, const Tile& tile, int first,
                                 int rows, int c0) {
    // a warp takes 16 frames of 32 channels at a time, a lane two frames of eight
    constexpr int kAcross = Block<kLayer>::channels / 32, kStep = Block<kLayer>::warps / kAcross * kSegment;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int eight = warp % kAcross * 4 + lane % 4, c = c0 + eight * kEight;
    const int pitch = glu_depthwise_conv_products_pitch(op.width, op.segments);
    const int stride = static_cast<int>(op.x_frame_stride), real = c < op.channels ? tile.real : 0;
    int f0 = warp / kAcross * kSegment, t = first + f0 + lane / 4 * 2;
    const T* x = static_cast<const T*>(op.x) + tile.b * op.x_batch_stride + int64_t{t} * stride;
    for (; f0 < rows; f0 += kStep, t += kStep, x += int64_t{kStep} * stride) {
        Eight<T> value[2] = {}, gate[2] = {};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            // a select, not a product: padding may hold NaN
            if (t + n >= 0 && t + n < real) {
                const T* row = x + n * stride;
                value[n] = load_some<Eight<T>, kAligned>(row, c, op.channels);
                gate[n] = load_some<Eight<T>, kAligned>(row + op.channels, c, op.channels);
            }
        }
        float h[2][kEight];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int i = 0; i < kEight; i += 2) {
                const float2 v = to_floats(value[n].pairs[i / 2]), s = sigmoid<T>(to_floats(gate[n].pairs[i / 2]));
                h[n][i] = v.x * s.x;
                h[n][i + 1] = v.y * s.y;
            }
        }
        const int at = first_row(eight) * pitch + place_of_frames(f0 / 8 + lane / 16) + lane / 4 % 4;
#pragma unroll
        for (int i = 0; i < kEight; ++i) glu.store(at + i * kNextRow * pitch, pack<T>(h[0][i], h[1][i]));
    }
}

// Two taps a word: word j of a channel has taps 2 j - 8 and 2 j - 7, zero beyond the taps; and kOddTaps further are
// taps 2 j - 7 and 2 j - 6. So a pair from an even or an odd tap on is one load. A lane has the same word of eight
// channels.
struct LaneTaps {
    uint32_t tap[kEight][3] = {};

    __device__ LaneTaps(const GluDepthwiseConvForward& op, int c, int j) {
        const int k = 2 * j - 8, there = op.channels - c;
        const uint16_t* weight = static_cast<const uint16_t*>(op.weight) + c * op.width + k;
#pragma unroll
        for (int i = 0; i < kEight; ++i, weight += op.width) {
#pragma unroll
            for (int n = 0; n < 3; ++n) {
                if (k + n >= 0 && k + n < op.width && i < there) tap[i][n] = weight[n];
            }
        }
    }
    __device__ void store(const Shared& taps, int j) const {
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            taps.store(i * kTaps + j, tap[i][0] | tap[i][1] << 16);
            taps.store(kOddTaps + i * kTaps + j, tap[i][1] | tap[i][2] << 16);
        }
    }
};

// bias, scale and shift of eight channels, [3, 8], are behind the taps; what a lane has there
template <class T, bool kLayer>
__device__ inline float constant_of_lane(const GluDepthwiseConvForward& op, int c, int lane) {
    const int kind = lane / kEight, channel = c + lane % kEight;
    const auto* bias = kind == 0 && channel < op.channels ? static_cast<const T*>(op.bias) : nullptr;
    const float* affine = kind == 0 || channel >= op.channels ? nullptr : kind == 1 ? op.scale : op.shift;
    float value = kind == 1 ? 1.0f : 0.0f;
    if (affine != nullptr) value = affine[channel];
    if (!kLayer && affine != nullptr && op.var != nullptr) {
        const float scale = rsqrtf(op.var[channel] + op.eps) * op.scale[channel];
        value = kind == 1 ? scale : fmaf(-op.mean[channel], scale, value);
    }
    return bias != nullptr ? to_float(bias[channel]) : value;
}

// the last eight lanes have none, and store to what is free ahead of the odd taps: so no lane goes ahead
__device__ inline int place_of_constant(int lane) {
    return lane < 3 * kEight ? kConstants + lane : kOddTaps - kEight + lane % kEight;
}

// z[i][r] = bias + the correlation of channel c + i at frame_of_lane(r) of segments `first` ...: rows of the product
// are the frames of a segment, columns are segments
template <class T>
__device__ inline void convolve(float (&z)[kEight][4], const Shared& glu, const Shared& taps,
                                const GluDepthwiseConvForward& op, const Tile& tile, int first, int lane) {
    const int pitch = glu_depthwise_conv_products_pitch(op.width, op.segments), row = lane / 4;
    // matrices: two channels, of each frames 0 ... 7 and 8 ... 15; columns without a segment repeat the last
    const int segment = min(first + lane % 8, tile.segments - 1), half = lane / 8 % 2;
    const Shared own = glu + lane / 16 * kNextRow * pitch;
    // row r has tap k at column r + k: lane (row, column) begins at tap 2 column - row
    Shared pairs = taps + (row % 2 * kOddTaps + lane % 4 - (row + 1) / 2 + 4);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) z[i][r] = 0.0f;
    }
    uint32_t before[kEight] = {};  // taps - 8 and - 7 of the lane's row 8: none
    int n = 2 * segment + half;
    const int end = n + 2 * glu_depthwise_conv_products_steps(op.width);
#pragma unroll 1
    do {
        uint32_t b[kEight / 2][4];
#pragma unroll
        for (int i = 0; i < kEight / 2; ++i) {
            load_matrices<false>(b[i], own, place_of_frames(n) + 2 * i * kNextRow * pitch);
        }
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            const auto now = pairs.load<uint32_t>(i * kTaps), next = pairs.load<uint32_t>(i * kTaps + 4);
            multiply_add<T>(z[i], {now, before[i], next, now}, b[i / 2][2 * (i % 2)], b[i / 2][2 * (i % 2) + 1]);
            before[i] = next;
        }
        pairs = pairs + 8;
        n += 2;
    } while (n < end);
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        const float bias = taps.load<float>(kConstants + i);
#pragma unroll
        for (int r = 0; r < 4; ++r) z[i][r] += bias;
    }
}

// the frame that z[i][r] is of, from the lane's first on, and that one from the first segment on
constexpr int frame_of(int r) { return r % 2 * kSegment + r / 2 * 8; }
__device__ inline int frame_of_lane(int lane) { return lane % 4 * 2 * kSegment + lane / 4; }

// The four rows of a lane in a tensor [B, T, C], from frame t on, at channel c
template <class T>
struct Rows {
    T* at;
    int frames, channels, pitch;  // that are there

    __device__ Rows(const GluDepthwiseConvForward& op, void* tensor, const Tile& tile, int t, int c)
        : at(static_cast<T*>(tensor) + (int64_t{tile.b} * tile.frames + t) * op.channels + c),
          frames(c < op.channels ? min(tile.frames, tile.t0 + tile.segments * kSegment) - t : 0),
          channels(op.channels - c), pitch(op.channels) {}
    __device__ bool has(int r) const { return frame_of(r) < frames; }
    __device__ T* row(int r) const { return at + frame_of(r) * pitch; }
};

// eight channels, of which `count` are there
template <bool kAligned, class T>
__device__ inline void store_eight(T* to, const float (&values)[kEight], [[maybe_unused]] int count) {
    if constexpr (kAligned) {
        *reinterpret_cast<uint4*>(to) = make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]),
                                                   pack<T>(values[4], values[5]), pack<T>(values[6], values[7]));
    } else {
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            if (i < count) assign(to[i], values[i]);
        }
    }
}

template <bool kAligned, class T>
__device__ inline void store_rows(const Rows<T>& rows, const float (&z)[kEight][4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (!rows.has(r)) continue;
        const float row[kEight] = {z[0][r], z[1][r], z[2][r], z[3][r], z[4][r], z[5][r], z[6][r], z[7][r]};
        store_eight<kAligned>(rows.row(r), row, rows.channels);
    }
}

template <bool kAligned, class T>
__device__ inline void load_rows(float (&z)[kEight][4], const Rows<T>& rows) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        Eight<T> row{};
        if (rows.has(r)) row = load_some<Eight<T>, kAligned>(rows.row(r), 0, rows.channels);
#pragma unroll
        for (int i = 0; i < kEight; i += 2) {
            const float2 pair = to_floats(row.pairs[i / 2]);
            z[i][r] = pair.x;
            z[i + 1][r] = pair.y;
        }
    }
}

// Moments of the rows of a lane, over its channels of all chunks so far
struct LaneMoments {
    float count = 0.0f, mean[4] = {}, squares[4] = {};

    // of `there` channels, or with kAll of eight
    template <bool kAll>
    __device__ void add(const float (&z)[kEight][4], int there) {
        if (there <= 0) return;
        const float some = kAll ? 8.0f : static_cast<float>(min(there, kEight));
        const float share = some * reciprocal_fast(count + some), each = kAll ? 0.125f : reciprocal_fast(some);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            float sum = 0.0f, spread = 0.0f;
#pragma unroll
            for (int i = 0; i < kEight; ++i) sum += kAll || i < there ? z[i][r] : 0.0f;
            const float own = sum * each;
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                const float by = kAll || i < there ? z[i][r] - own : 0.0f;
                spread = fmaf(by, by, spread);
            }
            const float by = own - mean[r];
            mean[r] = fmaf(by, share, mean[r]);
            squares[r] += fmaf(by * by, count * share, spread);
        }
        count += some;
    }
};

// silu(z * scale + shift), after (z - mean) * inverse deviation with LayerNorm
template <bool kLayer, bool kAligned, class T>
__device__ inline void finish(const Rows<T>& rows, const float (&z)[kEight][4], const Shared& taps,
                              const float2 (&normal)[4]) {
    float scale[kEight], shift[kEight];
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        scale[i] = taps.load<float>(kConstants + kEight + i);
        shift[i] = taps.load<float>(kConstants + 2 * kEight + i);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        if (!rows.has(r)) continue;
        float out[kEight];
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            const float zhat = kLayer ? (z[i][r] - normal[r].x) * normal[r].y : z[i][r];
            const float a = fmaf(zhat, scale[i], shift[i]);
            out[i] = a * sigmoid<T>(a);
        }
        store_eight<kAligned>(rows.row(r), out, rows.channels);
    }
}

// Grid: frame tiles of all utterances x groups of channels; with LayerNorm a block walks over all channels of its
// frames, and z waits in y or out until the row's moments are known, that of the last channels in registers.
template <class T, bool kLayer, bool kAligned>
__global__ void __launch_bounds__(Block<kLayer>::threads, kLayer ? 1 : 4) products(const GluDepthwiseConvForward op) {
    using B = Block<kLayer>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Tile tile = tile_at(op, static_cast<int>(blockIdx.x));
    const int rows = (tile.segments + glu_depthwise_conv_products_steps(op.width) - 1) * kSegment;

    SharedMemory shared;
    const Shared glu = shared.take(glu_depthwise_conv_products_glu(op.width, kLayer, op.segments));
    const Shared taps = shared.take(B::warps * kGluConvTapsOfWarp) + warp * kGluConvTapsOfWarp;
    const Shared own = glu + first_row(warp) * glu_depthwise_conv_products_pitch(op.width, op.segments);
    const auto stage = [&](int c) {
        // loads of few bytes are on their way while the GLU is made
        const LaneTaps first(op, c, lane);
        const float constant = constant_of_lane<T, kLayer>(op, c, lane);
        stage_glu<T, kLayer, kAligned>(glu, op, tile, tile.t0 - op.width / 2, rows, c - warp * kEight);
        const int words = glu_depthwise_conv_products_words(op.width);
        if (lane < words) first.store(taps, lane);
        for (int j = lane + kWarp; j < words; j += kWarp) LaneTaps(op, c, j).store(taps, j);
        taps.store(place_of_constant(lane), constant);
        __syncthreads();
    };

    int c = static_cast<int>(blockIdx.y) * B::channels + warp * kEight, t = tile.t0 + frame_of_lane(lane);
    float z[kEight][4];
    if (!kLayer) {
        stage(c);
#pragma unroll 1
        for (int first = 0; first < tile.segments; first += kColumns, t += kColumns * kSegment) {
            convolve<T>(z, own, taps, op, tile, first, lane);
            if (op.y != nullptr) store_rows<kAligned>(Rows<T>(op, op.y, tile, t, c), z);
            finish<kLayer, kAligned>(Rows<T>(op, op.out, tile, t, c), z, taps, {});
        }
        return;
    }

    LaneMoments moments;
    void* const waiting = op.y != nullptr ? op.y : op.out;
    for (;; c += B::channels) {
        stage(c);
        convolve<T>(z, own, taps, op, tile, 0, lane);
        moments.add<kAligned>(z, op.channels - c);
        const bool last = c - warp * kEight + B::channels >= op.channels;
        if (op.y != nullptr || !last) store_rows<kAligned>(Rows<T>(op, waiting, tile, t, c), z);
        __syncthreads();  // this chunk has been read by every warp
        if (last) break;
    }
    // Moments [warps, 4, lanes] in place of the GLU, then mean and inverse deviation [4, lanes]
    const Shared normals = glu + B::warps * 4 * kWarp * 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        glu.store(((warp * 4 + r) * kWarp + lane) * 4,
                  make_float4(moments.count, moments.mean[r], moments.squares[r], 0.0f));
    }
    __syncthreads();
    if (warp < 4) {
        Moments all = {};
        for (int w = 0; w < B::warps; ++w) {
            const auto m = glu.load<float4>((w * 4 * kWarp + static_cast<int>(threadIdx.x)) * 4);
            all.merge({m.x, m.y, m.z});
        }
        normals.store(2 * threadIdx.x, make_float2(all.mean, rsqrtf(all.squares / all.count + op.eps)));
    }
    __syncthreads();
    float2 normal[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) normal[r] = normals.load<float2>(2 * (r * kWarp + lane));
    for (;;) {
        finish<kLayer, kAligned>(Rows<T>(op, op.out, tile, t, c), z, taps, normal);
        c -= B::channels;
        if (c < 0) break;
        load_rows<kAligned>(z, Rows<T>(op, waiting, tile, t, c));
        const float constant = constant_of_lane<T, kLayer>(op, c, lane);
        __syncwarp();  // those of the channels before have been read
        taps.store(place_of_constant(lane), constant);
        __syncwarp();
    }
}

template <class T, bool kLayer>
void launch_products(GluDepthwiseConvForward op) {
    const char* name = "glu_depthwise_conv_forward";
    const int64_t groups = kLayer ? 1 : ceil_div(op.channels, Block<kLayer>::channels);
    const int64_t segments = ceil_div(op.frames, kSegment);
    if (op.batch * segments * op.channels == 0) return;
    if (op.segments == 0) op.segments = glu_depthwise_conv_products_tile(op.batch, op.frames, op.channels, kLayer);
    op.tiles = static_cast<int>(ceil_div(segments, op.segments));
    op.aligned = aligned<T>(op) && rows_aligned(static_cast<T*>(op.out)) && rows_aligned(static_cast<T*>(op.y));
    launch(name, op.device, op.aligned ? products<T, kLayer, true> : products<T, kLayer, false>,
           dim3(grid_size(name, op.batch * op.tiles), static_cast<unsigned>(groups)), dim3(Block<kLayer>::threads),
           glu_depthwise_conv_products_shared(op.width, kLayer, op.segments), op.stream, op);
}

}  // namespace

void glu_depthwise_conv_forward_by_products(const GluDepthwiseConvForward& op) {
    const auto with = [&](auto t) {
        using T = decltype(t);
        op.layer_norm ? launch_products<T, true>(op) : launch_products<T, false>(op);
    };
    op.element == Element::float16 ? with(__half()) : with(__nv_bfloat16());
}

}  // namespace lcc::cuda
