// GLU, zeroed padding, depthwise convolution, folded norm and SiLU in one kernel; and its backward pass.
//
//     h[b, t, c] = x[b, t, c] * sigmoid(x[b, t, C + c]),   0 where t >= lengths[b] or t is outside of 0 ... T - 1
//     z[b, t, c] = bias[c] + sum_k weight[c, k] * h[b, t + k - (K - 1) / 2, c]
//     out = silu(z * scale[c] + shift[c])
//
// B batch, T frames, C channels, K kernel width (odd, at most 63). Elements are float32, float16 or bfloat16, sums
// float32. `scale` and `shift` are an evaluation BatchNorm, folded. LayerNorm, GroupNorm and BatchNorm statistics need
// whole rows, utterances or batches, which a block of 64 channels x 64 frames does not see: they follow outside, on z.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace lcc::cuda {

// the tile of a block: one warp covers 64 channels, two a lane, and 16 frames; four warps
constexpr int kGluConvRows = 16;
constexpr int kGluConvFrames = 4 * kGluConvRows;
constexpr int kGluConvChannels = 64;
constexpr int kGluConvMaxWidth = kGluConvFrames - 1;

// bytes of dynamic shared memory of a block, by kernel width: GLU and weights; backward also the gradient
constexpr size_t glu_depthwise_conv_forward_shared(int width) {
    return (kGluConvFrames + 2 * width - 1) * kGluConvChannels * sizeof(float);
}
constexpr size_t glu_depthwise_conv_backward_shared(int width) {
    const int taps = (width + kGluConvRows - 1) / kGluConvRows * kGluConvRows;
    return (2 * kGluConvFrames - 2 + taps + 2 * width) * kGluConvChannels * sizeof(float);
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
    int device;
    uintptr_t stream;  // cudaStream_t
};

struct GluDepthwiseConvForward : GluDepthwiseConv {
    const void* bias;  // [C] or null
    void* out;         // [B, T, C]
    void* y;           // [B, T, C], z, which the backward pass needs; or null
};

void glu_depthwise_conv_forward(const GluDepthwiseConvForward& op);

struct GluDepthwiseConvBackward : GluDepthwiseConv {
    const void* dout;  // [B, T, C], channels adjacent
    int64_t dout_batch_stride, dout_frame_stride;
    const void* y;   // [B, T, C], z of the forward pass
    void* dx;        // [B, T, 2C]
    void* dtaps;     // [K, C], the gradient of weight
    void* dbias;     // [C]
    float* dshift;   // [C], of a shift that is 0 where there is none
    float* dscale;   // [C], of a scale that is 1 where there is none
    float* partial;  // [slots, K + 2, C] scratch; need not be set
    int slots;       // of glu_depthwise_conv_slots
};

// Blocks that share the frames of one group of channels. A function of the sizes alone: the order of every sum, and so
// every bit of the gradients, is the same on each run and each device.
int glu_depthwise_conv_slots(int64_t batch, int64_t frames, int channels);

void glu_depthwise_conv_backward(const GluDepthwiseConvBackward& op);

}  // namespace lcc::cuda
