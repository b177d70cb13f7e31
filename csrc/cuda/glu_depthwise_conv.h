// GLU, zeroed padding, depthwise convolution, norm and SiLU in one kernel; and its backward pass.
//
//     h[b, t, c] = x[b, t, c] * sigmoid(x[b, t, C + c]),   0 where t >= lengths[b] or t is outside of 0 ... T - 1
//     z[b, t, c] = bias[c] + sum_k weight[c, k] * h[b, t + k - (K - 1) / 2, c]
//     zhat = z, or with LayerNorm (z - mean) / sqrt(var + eps), mean and var over the channels of a frame
//     out = silu(zhat * scale[c] + shift[c])
//
// B batch, T frames, C channels (at most 1024 with LayerNorm), K kernel width (odd, at most 63). Elements are float32,
// float16 or bfloat16, sums float32; of 16 bits, h is rounded to the element type in the forward pass. `scale` and
// `shift` are LayerNorm's, or an evaluation BatchNorm, folded. GroupNorm and BatchNorm statistics need whole utterances
// or batches, which no block sees.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace lcc::cuda {

// The tile of a block of four warps. A warp has 16 frames of 64 channels, two a lane. Without LayerNorm the warps
// follow each other in time; with it, two by two, they cover 128 channels of 32 frames, and go over all channels.
constexpr int kGluConvWarps = 4;
constexpr int kGluConvRows = 16;
constexpr int kGluConvGroup = 64;
constexpr int kGluConvLayerGroups = 2;
constexpr int kGluConvMaxWidth = kGluConvWarps * kGluConvRows - 1;
constexpr int kGluConvMaxLayerChannels = 1024;

// bytes of dynamic shared memory of a block, by kernel width: GLU and weights (four floats apart), the moments of rows;
// backward also the gradient
constexpr size_t glu_depthwise_conv_forward_shared(int width, bool layer_norm) {
    const int groups = layer_norm ? kGluConvLayerGroups : 1, frames = kGluConvWarps / groups * kGluConvRows;
    const int channels = groups * kGluConvGroup;
    return ((frames + width - 1) * channels + width * (channels + 4) + (layer_norm ? groups * frames * 4 : 0)) *
           sizeof(float);
}

// Elements of 16 bits go forward by products of tensor cores, 16 frames of up to eight segments each. A warp has eight
// channels of a tile. Without LayerNorm four warps share a block and a tile has up to 16 segments; with it sixteen
// warps go over all channels of up to seven.
constexpr int kGluConvSegment = 16;
constexpr int glu_depthwise_conv_products_warps(bool layer_norm) { return layer_norm ? 16 : 4; }
constexpr int glu_depthwise_conv_products_segments(bool layer_norm) { return layer_norm ? 7 : 16; }
// Segments of a tile: as many as there can be, or so few that there are about this number of blocks; then tiles of an
// utterance alike. What a frame gets does not depend on it.
constexpr int glu_depthwise_conv_products_tile(int64_t batch, int64_t frames, int channels, bool layer_norm) {
    const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t segments = ceil(frames, kGluConvSegment), blocks = layer_norm ? 128 : 512;
    const int64_t groups = layer_norm ? 1 : ceil(channels, 8 * glu_depthwise_conv_products_warps(false));
    const int64_t least = ceil(segments, glu_depthwise_conv_products_segments(layer_norm));
    const int64_t wanted = ceil(blocks, batch * groups), most = wanted < segments ? wanted : segments;
    return static_cast<int>(ceil(segments, least < most ? most : least));
}
// products for a segment: it needs 16 + K - 1 frames
constexpr int glu_depthwise_conv_products_steps(int width) {
    return (width + 2 * kGluConvSegment - 2) / kGluConvSegment;
}
// words of two frames from a channel to the next: an odd number of segments, for the banks
constexpr int glu_depthwise_conv_products_pitch(int width, int segments) {
    return ((segments + glu_depthwise_conv_products_steps(width) - 1) | 1) * (kGluConvSegment / 2);
}
// words of two taps, with zeros around; and what a warp has for them, twice, and for bias, scale and shift
constexpr int glu_depthwise_conv_products_words(int width) { return 8 * glu_depthwise_conv_products_steps(width) + 4; }
constexpr int kGluConvTapsOfWarp = 16 * glu_depthwise_conv_products_words(kGluConvMaxWidth) + 16 + 3 * 8;
// words of the GLU, in whose place the moments of rows come
constexpr int glu_depthwise_conv_products_glu(int width, bool layer_norm, int segments) {
    const int warps = glu_depthwise_conv_products_warps(layer_norm), moments = layer_norm ? (4 * warps + 2) * 128 : 0;
    const int glu = 8 * warps * glu_depthwise_conv_products_pitch(width, segments);
    return glu < moments ? moments : glu;
}
constexpr size_t glu_depthwise_conv_products_shared(int width, bool layer_norm, int segments) {
    return (glu_depthwise_conv_products_glu(width, layer_norm, segments) +
            glu_depthwise_conv_products_warps(layer_norm) * kGluConvTapsOfWarp) *
           sizeof(float);
}

constexpr size_t glu_depthwise_conv_backward_shared(int width) {
    const int frames = kGluConvWarps * kGluConvRows, taps = (width + kGluConvRows - 1) / kGluConvRows * kGluConvRows;
    return ((2 * frames - 2 + taps + width) * kGluConvGroup + width * (kGluConvGroup + 4)) * sizeof(float);
}

struct GluDepthwiseConv {
    Element element;
    int64_t batch, frames;  // B, T
    int channels, width;    // C, K
    const void* x;          // [B, T, 2C], channels adjacent
    int64_t x_batch_stride, x_frame_stride;
    const void* weight;      // [C, K]
    const int64_t* lengths;  // [B] or null
    const float* scale;      // [C], or null with shift
    const float* shift;      // [C], or null with scale
    bool layer_norm;         // with scale and shift
    float eps;               // of LayerNorm
    int device;
    uintptr_t stream;  // cudaStream_t
    bool aligned;      // set by the launchers: eight elements can be loaded at a time
};

struct GluDepthwiseConvForward : GluDepthwiseConv {
    const void* bias;   // [C] or null
    const float* mean;  // [C] of an evaluation BatchNorm whose weight and bias are scale and shift, or null with var
    const float* var;
    void* out;     // [B, T, C]
    void* y;       // [B, T, C], z, which the backward pass needs; or null
    int segments;  // of a tile of products; 0: glu_depthwise_conv_products_tile
    int tiles;     // set by the launcher: of an utterance
};

void glu_depthwise_conv_forward(const GluDepthwiseConvForward& op);
// the part of it for elements of 16 bits
void glu_depthwise_conv_forward_by_products(const GluDepthwiseConvForward& op);

struct GluDepthwiseConvBackward : GluDepthwiseConv {
    const void* dout;  // [B, T, C], channels adjacent
    int64_t dout_batch_stride, dout_frame_stride;
    const void* y;   // [B, T, C], z of the forward pass
    void* dx;        // [B, T, 2C]
    void* dtaps;     // [K, C], the gradient of weight
    void* dbias;     // [C]
    float* dshift;   // [C], of a shift that is 0 where there is none
    float* dscale;   // [C], of a scale that is 1 where there is none
    float* partial;  // [slots, K + 3, C] scratch; need not be set
    int slots;       // of glu_depthwise_conv_slots
    float* rows;     // [B, T, 4] scratch of LayerNorm, aligned to 16 bytes; need not be set
};

// Blocks that share the frames of one group of channels. A function of the sizes alone: the order of every sum, and so
// every bit of the gradients, is the same on each run and each device.
int glu_depthwise_conv_slots(int64_t batch, int64_t frames, int channels);

void glu_depthwise_conv_backward(const GluDepthwiseConvBackward& op);

}  // namespace lcc::cuda
