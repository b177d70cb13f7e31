// What feed_forward does to each element between its matrix products, forward and backward.
#include "../kernels.h"
#include "dropout.h"
#include "memory.h"
#include "threads.h"

namespace lcc {
namespace LCC_SIMD {
namespace {

constexpr int64_t COLUMNS = 1024;  // of a block: its random bits fit the stack
constexpr int64_t PARTS = 64;      // partial sums of the bias gradient
static_assert(COLUMNS % DROPOUT_PAD == 0, "blocks take whole groups of random bits");

// f(row, column, bias, dropout factor) for each W elements; `sums` [parts, N rounded up] holds a part's f, if wanted
template <typename F>
inline void each_element(const Pointwise& a, float* sums, F f) {
    int64_t each = imax(1, cdiv(a.M, PARTS)), parts = cdiv(a.M, each), pitch = round_up(a.N, W);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t part = 0; part < parts; part++)
        for (int64_t row = part * each; row < imin((part + 1) * each, a.M); row++)
            for (int64_t first = 0; first < a.N; first += COLUMNS) {
                uint16_t random[COLUMNS];
                int64_t n = imin(COLUMNS, a.N - first);
                if (a.dropout.seed) random_row(random, n, *a.dropout.seed, a.stream, 0, (uint32_t)row, first);
                for (int64_t c = first; c < first + n; c += W) {
                    vec bias = a.bias ? load_at(a.bias, c, a.N) : vec{};
                    vec factor = a.dropout.seed ? dropout_factor(random + c - first, a.dropout) : splat(1.0f);
                    vec result = f(row, c, bias, factor);
                    if (sums) store(sums + part * pitch + c, load(sums + part * pitch + c) + result);
                }
            }
}

// the same, and the sum of f over the rows into dbias
template <typename F>
inline void each_element_and_sum(const Pointwise& a, F f) {
    int64_t parts = cdiv(a.M, imax(1, cdiv(a.M, PARTS))), pitch = round_up(a.N, W);
    Scratch scratch(parts * pitch);
    float* sums = scratch.take(parts * pitch);
    each_element(a, sums, f);
    for (int64_t c = 0; c < a.N; c += W) {
        vec total = {};
        for (int64_t part = 0; part < parts; part++) total += load(sums + part * pitch + c);
        store_at(a.dbias, total, c, a.N);
    }
}

template <typename T>
const T* row_of(const void* x, int64_t row, int64_t stride) {
    return static_cast<const T*>(x) + row * stride;
}

template <typename T>
T* row_of(void* x, int64_t row, int64_t stride) {
    return static_cast<T*>(x) + row * stride;
}

template <typename T>
void activation(const Pointwise& a) {
    each_element(a, nullptr, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec u = load_at(row_of<T>(a.u, row, a.N), c, a.N) + bias;
        store_at(row_of<T>(a.out, row, a.N), u * sigmoid(u) * factor, c, a.N);
        return vec{};
    });
}

template <typename T>
void activation_gradient(const Pointwise& a) {
    each_element_and_sum(a, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec u = load_at(row_of<T>(a.u, row, a.N), c, a.N) + bias;
        vec s = sigmoid(u);
        store_at(row_of<T>(a.g, row, a.N), u * s * factor, c, a.N);
        // columns beyond N have d = 0
        vec du = load_at(row_of<T>(a.d, row, a.N), c, a.N) * factor * s * (1.0f + u * (1.0f - s));
        store_at(row_of<T>(a.out, row, a.N), du, c, a.N);
        return du;
    });
}

template <typename T>
void residual(const Pointwise& a) {
    each_element(a, nullptr, [&](int64_t row, int64_t c, vec bias, vec factor) {
        vec z = (load_at(row_of<T>(a.u, row, a.N), c, a.N) + bias) * factor;
        store_at(row_of<T>(a.out, row, a.N), load_at(row_of<T>(a.x, row, a.x_stride), c, a.N) + z * a.scale, c, a.N);
        return vec{};
    });
}

template <typename T>
void residual_gradient(const Pointwise& a) {
    each_element_and_sum(a, [&](int64_t row, int64_t c, vec, vec factor) {
        vec dz = load_at(row_of<T>(a.d, row, a.d_stride), c, a.N) * a.scale * factor;
        store_at(row_of<T>(a.out, row, a.N), dz, c, a.N);
        return dz;
    });
}

}  // namespace

void activation_forward(const Pointwise& a) { a.bf16 ? activation<bf16>(a) : activation<float>(a); }
void activation_backward(const Pointwise& a) { a.bf16 ? activation_gradient<bf16>(a) : activation_gradient<float>(a); }
void residual_forward(const Pointwise& a) { a.bf16 ? residual<bf16>(a) : residual<float>(a); }
void residual_backward(const Pointwise& a) { a.bf16 ? residual_gradient<bf16>(a) : residual_gradient<float>(a); }

}  // namespace LCC_SIMD
}  // namespace lcc
