// What feed_forward does to each element between its matrix products, forward and backward.
#include "../kernels.h"
#include "activation.h"
#include "dropout.h"
#include "memory.h"
#include "threads.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int64_t kBlockColumns = 1024;  // of a block: its random bits fit the stack
constexpr int64_t kParts = 64;           // partial sums of the bias gradient
// dropout streams: each has random bits of its own
constexpr uint32_t kHiddenStream = 0, kOutputStream = 1;
static_assert(kBlockColumns % kDropoutPad == 0, "blocks take whole groups of random bits");

// f(row, column, bias, dropout factor) for each W elements; `sums` [parts, N rounded up] holds a part's f, if wanted
template <class F>
inline void each_element(const FeedForwardElements& a, uint32_t stream, float* sums, F f) {
    int64_t each = imax(1, cdiv(a.rows, kParts)), parts = cdiv(a.rows, each), pitch = round_up(a.columns, W);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t row = part * each; row < imin((part + 1) * each, a.rows); row++)
            for (int64_t first = 0; first < a.columns; first += kBlockColumns) {
                uint16_t random[kBlockColumns];
                int64_t n = imin(kBlockColumns, a.columns - first);
                if (a.dropout.seed) random_row(random, n, *a.dropout.seed, stream, 0, (uint32_t)row, first);
                for (int64_t c = first; c < first + n; c += W) {
                    vec bias = a.bias ? load_at(a.bias, c, a.columns) : vec{};
                    vec factor = a.dropout.seed ? dropout_factor(random + c - first, a.dropout) : splat(1.0f);
                    vec result = f(row, c, bias, factor);
                    if (sums) store(sums + part * pitch + c, load(sums + part * pitch + c) + result);
                }
            }
}

// the same, and the sum of f over the rows into dbias
template <class F>
inline void each_element_and_sum(const FeedForwardElements& a, uint32_t stream, float* dbias, F f) {
    int64_t parts = cdiv(a.rows, imax(1, cdiv(a.rows, kParts))), pitch = round_up(a.columns, W);
    Scratch scratch(parts * pitch);
    float* sums = scratch.take(parts * pitch);
    each_element(a, stream, sums, f);
    for (int64_t c = 0; c < a.columns; c += W) {
        vec total = {};
        for (int64_t part = 0; part < parts; part++) total += load(sums + part * pitch + c);
        store_at(dbias, total, c, a.columns);
    }
}

template <class T>
const T* row_of(const void* x, int64_t row, int64_t stride) {
    return static_cast<const T*>(x) + row * stride;
}

template <class T>
T* row_of(void* x, int64_t row, int64_t stride) {
    return static_cast<T*>(x) + row * stride;
}

template <class T>
void activation(const FeedForwardActivationForward& a) {
    each_element(a, kHiddenStream, nullptr, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec u = load_at(row_of<T>(a.u, row, a.columns), c, a.columns) + bias;
        store_at(row_of<T>(a.out, row, a.columns), activate(a.activation, u) * factor, c, a.columns);
        return vec{};
    });
}

template <class T>
void activation_gradient(const FeedForwardActivationBackward& a) {
    each_element_and_sum(a, kHiddenStream, a.dbias, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec u = load_at(row_of<T>(a.u, row, a.columns), c, a.columns) + bias;
        Activated g = activate_with_slope(a.activation, u);
        store_at(row_of<T>(a.g, row, a.columns), g.value * factor, c, a.columns);
        // columns beyond N have d = 0
        vec du = load_at(row_of<T>(a.d, row, a.columns), c, a.columns) * factor * g.slope;
        store_at(row_of<T>(a.out, row, a.columns), du, c, a.columns);
        return du;
    });
}

template <class T>
void residual(const FeedForwardResidualForward& a) {
    each_element(a, kOutputStream, nullptr, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec z = (load_at(row_of<T>(a.u, row, a.columns), c, a.columns) + bias) * factor;
        store_at(row_of<T>(a.out, row, a.columns),
                 load_at(row_of<T>(a.x, row, a.x_row_stride), c, a.columns) + z * a.scale, c, a.columns);
        return vec{};
    });
}

template <class T>
void residual_gradient(const FeedForwardResidualBackward& a) {
    each_element_and_sum(a, kOutputStream, a.dbias, [&](int64_t row, int64_t c, vec, vec factor) {
        vec dz = load_at(row_of<T>(a.d, row, a.d_row_stride), c, a.columns) * a.scale * factor;
        store_at(row_of<T>(a.out, row, a.columns), dz, c, a.columns);
        return dz;
    });
}

}  // namespace

void feed_forward_activation_forward(const FeedForwardActivationForward& a) {
    a.element == Element::bfloat16 ? activation<bf16>(a) : activation<float>(a);
}
void feed_forward_activation_backward(const FeedForwardActivationBackward& a) {
    a.element == Element::bfloat16 ? activation_gradient<bf16>(a) : activation_gradient<float>(a);
}
void feed_forward_residual_forward(const FeedForwardResidualForward& a) {
    a.element == Element::bfloat16 ? residual<bf16>(a) : residual<float>(a);
}
void feed_forward_residual_backward(const FeedForwardResidualBackward& a) {
    a.element == Element::bfloat16 ? residual_gradient<bf16>(a) : residual_gradient<float>(a);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
