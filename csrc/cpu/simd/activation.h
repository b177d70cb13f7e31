// The activations of a layer and their slopes.
#pragma once

#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {

// Distribution and density of the normal distribution: Phi(x) to 1.2e-7, relative to a few ulp for x < 0.
struct Normal {
    vec below, density;
};

// Phi(-|x|) = exp(-x^2 / 2) t p(t), t = 1 / (1 + 0.3 |x|), as Abramowitz and Stegun have it in 26.2.17; p is of degree
// 7 and minimax on |x| < 14, to 7.1e-9 of Phi and, in the tail, to 7.1e-7 of the value.
static inline Normal normal(vec x) {
    vec size = x < 0.0f ? -x : x;
    vec e = exp2(x * x * (-0.5f * kLog2E));
    vec t = 1.0f / (1.0f + 0.3f * size);
    vec p = splat(0.0353510698f);
    p = p * t - 0.155251114f;
    p = p * t + 0.201846611f;
    p = p * t - 0.0483984094f;
    p = p * t + 0.125135524f;
    p = p * t + 0.101141646f;
    p = p * t + 0.120529216f;
    p = p * t + 0.119645458f;
    vec tail = p * t * e;
    return {x < 0.0f ? tail : 1.0f - tail, e * 0.398942280f};
}

static inline vec activate(Activation activation, vec x) {
    if (activation == Activation::silu) return x * sigmoid(x);
    if (activation == Activation::gelu) return x * normal(x).below;
    return x < 0.0f ? vec{} : x;
}

struct Activated {
    vec value, slope;
};

static inline Activated activate_with_slope(Activation activation, vec x) {
    if (activation == Activation::silu) {
        vec s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
    if (activation == Activation::gelu) {
        Normal n = normal(x);
        return {x * n.below, n.below + x * n.density};
    }
    return {x < 0.0f ? vec{} : x, x <= 0.0f ? vec{} : splat(1.0f)};
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
