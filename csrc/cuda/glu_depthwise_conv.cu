#include "cuda/glu_depthwise_conv.h"

#include <algorithm>

#include "cuda/common.cuh"

namespace lcc::cuda {
namespace {

// A lane makes kRows outputs in a row, so that a value read from shared memory is used kRows times.
// 16: 32 accumulators and 32 window registers of two channels fit 128 threads without spills.
constexpr int kRows = kGluConvRows;
constexpr int kFrames = kGluConvFrames;      // of a tile
constexpr int kChannels = kGluConvChannels;  // of a tile
constexpr int kWarps = kFrames / kRows;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTargetBlocks = 1024;  // of the backward pass: 132 SMs x 3 resident blocks, two and a half times
static_assert(kChannels == 2 * kWarp, "a lane owns two channels");
static_assert(glu_depthwise_conv_backward_shared(kGluConvMaxWidth) <= (99 << 10),
              "sm_86, sm_89 and sm_120 have 99 KiB");

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

__device__ inline void fma(float2& acc, float2 a, float2 b) {
    acc.x = fmaf(a.x, b.x, acc.x);
    acc.y = fmaf(a.y, b.y, acc.y);
}

// acc[r] += sum over n < count of signal[r + n] * coef[n * step]: the correlation that forward, input gradient and
// weight gradient all are. The window of kRows signal rows slides through registers; `signal`, `coef` have rows of
// kWarp lanes.
__device__ inline void slide(float2 (&acc)[kRows], const float2* signal, const float2* coef, int step, int count) {
    float2 window[kRows];
#pragma unroll
    for (int r = 0; r < kRows - 1; ++r) window[r] = signal[r * kWarp];
    for (int n = 0; n < count; n += kRows) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
            // not zero coefficients past the end: zero times an infinite frame would be NaN
            if (n + j < count) {
                window[(j + kRows - 1) % kRows] = signal[(n + j + kRows - 1) * kWarp];
                const float2 c = coef[(n + j) * step * kWarp];
#pragma unroll
                for (int r = 0; r < kRows; ++r) fma(acc[r], window[(j + r) % kRows], c);
            }
        }
    }
}

struct Tile {
    int64_t b, t0, real;  // utterance, first frame, frames of b that are not padding
};

__device__ inline Tile tile_at(const GluDepthwiseConv& op, int64_t index) {
    const int64_t per_utterance = ceil_div(op.frames, kFrames);
    const int64_t b = index / per_utterance;
    const int64_t real = op.lengths == nullptr ? op.frames : min(op.lengths[b], op.frames);
    return {b, index % per_utterance * kFrames, real};
}

// weights [K, kChannels] of the block's channels, from [C, K]
template <class T>
__device__ void load_weights(float2* weights, const GluDepthwiseConv& op, int c0) {
    const T* weight = static_cast<const T*>(op.weight);
    float* flat = reinterpret_cast<float*>(weights);
    for (int i = threadIdx.x; i < kChannels * op.width; i += kThreads) {
        const int c = i / op.width, k = i % op.width;
        flat[k * kChannels + c] =
            c0 + c < op.channels ? to_float(weight[static_cast<int64_t>(c0) * op.width + i]) : 0.0f;
    }
}

template <class T>
__device__ inline float2 glu_at(const GluDepthwiseConv& op, const Tile& tile, int64_t t, int c, bool paired) {
    // a select, not a product: padding may hold NaN
    if (t < 0 || t >= tile.real) return make_float2(0.0f, 0.0f);
    const T* row = static_cast<const T*>(op.x) + tile.b * op.x_batch_stride + t * op.x_frame_stride;
    const float2 value = load_pair(row, c, op.channels, paired);
    const float2 gate = load_pair(row + op.channels, c, op.channels, paired);
    return make_float2(value.x * sigmoid(gate.x), value.y * sigmoid(gate.y));
}

__device__ inline float2 pair_or(const float* values, int c, int channels, float otherwise) {
    if (values == nullptr) return make_float2(otherwise, otherwise);
    return load_pair(values, c, channels, false);
}

// grid: channel tiles x frame tiles of all utterances, channels fastest
template <class T>
__global__ void __launch_bounds__(kThreads) forward(const GluDepthwiseConvForward op, bool x_paired, bool out_paired) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int channel_tiles = static_cast<int>(ceil_div(op.channels, kChannels));
    const int c0 = static_cast<int>(blockIdx.x) % channel_tiles * kChannels, c = c0 + 2 * lane;
    const Tile tile = tile_at(op, blockIdx.x / channel_tiles);
    const int halo = op.width / 2;

    SharedMemory shared;
    float2* glu = shared.take<float2>((kFrames + op.width - 1) * kWarp);  // [kFrames + K - 1, kChannels]
    float2* weights = shared.take<float2>(op.width * kWarp);              // [K, kChannels]
    for (int f = warp; f < kFrames + op.width - 1; f += kWarps) {
        glu[f * kWarp + lane] = glu_at<T>(op, tile, tile.t0 + f - halo, c, x_paired);
    }
    load_weights<T>(weights, op, c0);
    __syncthreads();

    float2 acc[kRows];
    const float2 bias =
        op.bias == nullptr ? make_float2(0.0f, 0.0f) : load_pair(static_cast<const T*>(op.bias), c, op.channels, false);
#pragma unroll
    for (int r = 0; r < kRows; ++r) acc[r] = bias;
    slide(acc, glu + warp * kRows * kWarp + lane, weights + lane, 1, op.width);

    const float2 scale = pair_or(op.scale, c, op.channels, 1.0f), shift = pair_or(op.shift, c, op.channels, 0.0f);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int64_t t = tile.t0 + warp * kRows + r;
        if (t >= op.frames) break;
        const int64_t row = (tile.b * op.frames + t) * op.channels;
        if (op.y != nullptr) store_pair(static_cast<T*>(op.y) + row, c, op.channels, out_paired, acc[r]);
        const float2 a = make_float2(fmaf(acc[r].x, scale.x, shift.x), fmaf(acc[r].y, scale.y, shift.y));
        store_pair(static_cast<T*>(op.out) + row, c, op.channels, out_paired,
                   make_float2(a.x * sigmoid(a.x), a.y * sigmoid(a.y)));
    }
}

// gradient at a = z * scale + shift, from that at y; z of the frame goes to `z`
template <class T>
__device__ inline float2 gradient_at(const GluDepthwiseConvBackward& op, const Tile& tile, int64_t t, int c,
                                     bool paired, float2 scale, float2 shift, float2& z) {
    z = make_float2(0.0f, 0.0f);
    if (t < 0 || t >= op.frames) return z;
    const T* row = static_cast<const T*>(op.dout) + tile.b * op.dout_batch_stride + t * op.dout_frame_stride;
    float2 d = load_pair(row, c, op.channels, paired);
    z = load_pair(static_cast<const T*>(op.y) + (tile.b * op.frames + t) * op.channels, c, op.channels, paired);
    const float2 a = make_float2(fmaf(z.x, scale.x, shift.x), fmaf(z.y, scale.y, shift.y));
    const float2 s = make_float2(sigmoid(a.x), sigmoid(a.y));
    d.x *= s.x * (1.0f + a.x * (1.0f - s.x));
    d.y *= s.y * (1.0f + a.y * (1.0f - s.y));
    return d;
}

// grid: channel tiles x slots; a block walks over every slots-th frame tile and keeps its weight gradient in registers
template <class T>
__global__ void __launch_bounds__(kThreads,
                                  3)  // shared memory allows 3 blocks on sm_90 at K = 31: so up to 168 registers
    backward(const GluDepthwiseConvBackward op, bool x_paired, bool dout_paired, bool dx_paired) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int c0 = static_cast<int>(blockIdx.x) * kChannels, c = c0 + 2 * lane;
    const int halo = op.width / 2;
    const int tap_groups = static_cast<int>(ceil_div(op.width, kRows));
    const int64_t tiles = op.batch * ceil_div(op.frames, kFrames);

    SharedMemory shared;
    // the taps of the last group past K read rows that nothing uses: they are there, and never set
    const int glu_rows = kFrames - 1 + tap_groups * kRows;
    float2* glu = shared.take<float2>(glu_rows * kWarp);                   // [kFrames + K - 1, kChannels]
    float2* grad = shared.take<float2>((kFrames + op.width - 1) * kWarp);  // dz, as glu
    float2* weights = shared.take<float2>(op.width * kWarp);               // [K, kChannels]
    load_weights<T>(weights, op, c0);

    // for the weight gradient a warp has kRows taps, and if there are more warps than that, a part of the frames
    const int parts = kWarps / tap_groups;
    const int part_frames = kFrames / parts;
    const int tap0 = warp % tap_groups * kRows, part = warp / tap_groups;
    float2 dweight[kRows] = {};
    float2 sum_da = {}, sum_daz = {};
    const float2 scale = pair_or(op.scale, c, op.channels, 1.0f), shift = pair_or(op.shift, c, op.channels, 0.0f);

    for (int64_t index = blockIdx.y; index < tiles; index += op.slots) {
        const Tile tile = tile_at(op, index);
        __syncthreads();  // the last tile has been read by every warp
        for (int f = warp; f < kFrames + op.width - 1; f += kWarps) {
            const int64_t t = tile.t0 + f - halo;
            float2 z;
            const float2 da = gradient_at<T>(op, tile, t, c, dout_paired, scale, shift, z);
            if (f >= halo && f < halo + kFrames) {
                sum_da = make_float2(sum_da.x + da.x, sum_da.y + da.y);
                fma(sum_daz, da, z);
            }
            grad[f * kWarp + lane] = make_float2(da.x * scale.x, da.y * scale.y);
            glu[f * kWarp + lane] = glu_at<T>(op, tile, t, c, x_paired);
        }
        __syncthreads();

        // dz is correlated with the weights from last to first
        float2 dglu[kRows] = {};
        slide(dglu, grad + warp * kRows * kWarp + lane, weights + (op.width - 1) * kWarp + lane, -1, op.width);
        T* dx = static_cast<T*>(op.dx);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t t = tile.t0 + warp * kRows + r;
            if (t >= op.frames) break;
            float2 dvalue = {}, dgate = {};
            if (t < tile.real) {
                const T* row = static_cast<const T*>(op.x) + tile.b * op.x_batch_stride + t * op.x_frame_stride;
                const float2 value = load_pair(row, c, op.channels, x_paired);
                const float2 gate = load_pair(row + op.channels, c, op.channels, x_paired);
                const float2 s = make_float2(sigmoid(gate.x), sigmoid(gate.y));
                dvalue = make_float2(dglu[r].x * s.x, dglu[r].y * s.y);
                dgate = make_float2(dvalue.x * value.x * (1.0f - s.x), dvalue.y * value.y * (1.0f - s.y));
            }
            T* row = dx + (tile.b * op.frames + t) * 2 * op.channels;
            store_pair(row, c, op.channels, dx_paired, dvalue);
            store_pair(row + op.channels, c, op.channels, dx_paired, dgate);
        }

        // dweight[tap] = sum over t of dz[t] * h[t + tap - halo]
        if (part < parts) {
            const int first = part * part_frames;
            slide(dweight, glu + (first + tap0) * kWarp + lane, grad + (first + halo) * kWarp + lane, 1, part_frames);
        }
    }

    // the parts of the frames, and the warps' sums, are added in their order
    __syncthreads();
    float2* parts_dweight = glu;  // [parts, tap_groups * kRows, kChannels]
    float2* warps_sums = grad;    // [2, kWarps, kChannels]
    if (part < parts) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            parts_dweight[(part * tap_groups * kRows + tap0 + r) * kWarp + lane] = dweight[r];
        }
    }
    warps_sums[warp * kWarp + lane] = sum_da;
    warps_sums[(kWarps + warp) * kWarp + lane] = sum_daz;
    __syncthreads();
    float* partial = op.partial + static_cast<int64_t>(blockIdx.y) * (op.width + 2) * op.channels;
    for (int row = warp; row < op.width + 2; row += kWarps) {
        const bool taps = row < op.width;
        const float2* from = taps ? parts_dweight + row * kWarp : warps_sums + (row - op.width) * kWarps * kWarp;
        const int count = taps ? parts : kWarps, pitch = taps ? tap_groups * kRows * kWarp : kWarp;
        float2 sum = {};
        for (int i = 0; i < count; ++i) {
            const float2 v = from[i * pitch + lane];
            sum = make_float2(sum.x + v.x, sum.y + v.y);
        }
        store_pair(partial + static_cast<int64_t>(row) * op.channels, c, op.channels, false, sum);
    }
}

constexpr int kReduceRows = 8;

// grid: groups of kWarp channels x (K + 2) rows; adds the slots in their order
template <class T>
__global__ void __launch_bounds__(kReduceRows* kWarp) reduce(const GluDepthwiseConvBackward op) {
    LCC_SHARED(float, sums, kReduceRows* kWarp);
    const int lane = threadIdx.x % kWarp, part = threadIdx.x / kWarp;
    const int c = blockIdx.x * kWarp + lane, row = blockIdx.y;
    float sum = 0.0f;
    if (c < op.channels) {
        for (int slot = part; slot < op.slots; slot += kReduceRows) {
            sum += op.partial[(static_cast<int64_t>(slot) * (op.width + 2) + row) * op.channels + c];
        }
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (part != 0 || c >= op.channels) return;
    for (int i = 1; i < kReduceRows; ++i) sum += sums[i * kWarp + lane];
    if (row < op.width) {
        assign(static_cast<T*>(op.dtaps)[static_cast<int64_t>(row) * op.channels + c], sum);
    } else if (row == op.width) {  // gradient at a: of the shift, and scaled of the bias
        assign(static_cast<T*>(op.dbias)[c], op.scale == nullptr ? sum : sum * op.scale[c]);
        op.dshift[c] = sum;
    } else {
        op.dscale[c] = sum;
    }
}

unsigned grid_size(const char* name, int64_t blocks) {
    if (blocks >= (int64_t{1} << 31)) throw std::invalid_argument(std::string(name) + ": more than 2^31 tiles");
    return static_cast<unsigned>(blocks);
}

template <class T>
void forward_as(const GluDepthwiseConvForward& op) {
    const char* name = "glu_depthwise_conv_forward";
    const int64_t blocks = op.batch * ceil_div(op.frames, kFrames) * ceil_div(op.channels, kChannels);
    if (blocks == 0) return;
    const bool x_paired = rows_paired(static_cast<const T*>(op.x), op.x_batch_stride, op.x_frame_stride, op.channels);
    const bool out_paired =
        rows_paired(static_cast<const T*>(op.out), op.channels) && rows_paired(static_cast<const T*>(op.y));
    launch(name, op.device, forward<T>, dim3(grid_size(name, blocks)), dim3(kThreads),
           glu_depthwise_conv_forward_shared(op.width), op.stream, op, x_paired, out_paired);
}

template <class T>
void backward_as(const GluDepthwiseConvBackward& op) {
    const char* name = "glu_depthwise_conv_backward";
    const auto channel_tiles = static_cast<unsigned>(ceil_div(op.channels, kChannels));
    if (channel_tiles == 0) return;
    if (op.slots > 0) {
        const bool x_paired =
            rows_paired(static_cast<const T*>(op.x), op.x_batch_stride, op.x_frame_stride, op.channels);
        const bool dout_paired =
            rows_paired(static_cast<const T*>(op.dout), op.dout_batch_stride, op.dout_frame_stride, op.channels) &&
            rows_paired(static_cast<const T*>(op.y));
        launch(name, op.device, backward<T>, dim3(channel_tiles, static_cast<unsigned>(op.slots)), dim3(kThreads),
               glu_depthwise_conv_backward_shared(op.width), op.stream, op, x_paired, dout_paired,
               rows_paired(static_cast<const T*>(op.dx), op.channels));
    }
    launch(name, op.device, reduce<T>, dim3(static_cast<unsigned>(ceil_div(op.channels, kWarp)), op.width + 2u),
           dim3(kReduceRows * kWarp), 0, op.stream, op);
}

void check_sizes(const GluDepthwiseConv& op) {
    if (op.width % 2 == 0 || op.width < 1 || op.width > kGluConvMaxWidth) {
        throw std::invalid_argument("glu_depthwise_conv: K is " + std::to_string(op.width) + "; expected odd, 1 to 63");
    }
}

}  // namespace

void glu_depthwise_conv_forward(const GluDepthwiseConvForward& op) {
    check_sizes(op);
    switch (op.element) {
        case Element::float32: return forward_as<float>(op);
        case Element::float16: return forward_as<__half>(op);
        case Element::bfloat16: return forward_as<__nv_bfloat16>(op);
    }
}

int glu_depthwise_conv_slots(int64_t batch, int64_t frames, int channels) {
    const int64_t tiles = batch * ceil_div(frames, kFrames);
    const int64_t per_group = kTargetBlocks / std::max<int64_t>(ceil_div(channels, kChannels), 1);
    return static_cast<int>(std::min(tiles, std::max<int64_t>(per_group, 1)));
}

void glu_depthwise_conv_backward(const GluDepthwiseConvBackward& op) {
    check_sizes(op);
    switch (op.element) {
        case Element::float32: return backward_as<float>(op);
        case Element::float16: return backward_as<__half>(op);
        case Element::bfloat16: return backward_as<__nv_bfloat16>(op);
    }
}

}  // namespace lcc::cuda
