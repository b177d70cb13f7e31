// What the kernels of glu_depthwise_conv share.
#pragma once

#include "cuda/common.cuh"
#include "cuda/glu_depthwise_conv.h"

namespace lcc::cuda {

// of the element type's precision: within 4 ulp of float32 for float32, which moves twice the bytes in any case
template <class T>
__device__ inline float sigmoid(float x) {
    if (std::is_same_v<T, float>) return 1.0f / (1.0f + expf(-x));
    return reciprocal_fast(1.0f + exp2_fast(-1.44269504f * x));
}

template <class T>
__device__ inline float2 sigmoid(float2 x) {
    return make_float2(sigmoid<T>(x.x), sigmoid<T>(x.y));
}

// Mean and sum of squared deviations of `count` numbers. Chan et al. 1979, "Updating formulae ... for computing sample
// variances".
struct Moments {
    float count, mean, squares;

    __device__ void merge(const Moments& o) {
        const float total = count + o.count;
        if (total == 0.0f) return;
        const float by = o.mean - mean, share = o.count * reciprocal_fast(total);
        mean += by * share;
        squares += o.squares + by * by * count * share;
        count = total;
    }
};

// blocks of `name`, which are in the first dimension
inline unsigned grid_size(const char* name, int64_t blocks) {
    if (blocks >= (int64_t{1} << 31)) throw std::invalid_argument(std::string(name) + ": more than 2^31 tiles");
    return static_cast<unsigned>(blocks);
}

template <class T>
bool aligned(const GluDepthwiseConv& op) {
    return rows_aligned(static_cast<const T*>(op.x), op.x_batch_stride, op.x_frame_stride, op.channels) &&
           rows_aligned(op.scale) && rows_aligned(op.shift);
}

}  // namespace lcc::cuda
