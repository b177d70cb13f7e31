// A residual addition and the LayerNorm after it, row by row, forward and backward; feed_forward takes its norm from
// here.
#include "../kernels.h"
#include "dropout.h"
#include "memory.h"
#include "threads.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int64_t kParts = 64;  // partial sums of the parameters' gradients

// floats that hold the random bits of a row
int64_t random_size(const Dropout& dropout, int64_t columns) {
    return dropout.seed ? round_up(columns, kDropoutPad) / 2 : 0;
}

template <class T>
void forward(const ResidualLayerNormForward& a) {
    int64_t row = round_up(a.columns, W);
    int64_t thread_memory = Scratch::padded(row + random_size(a.dropout, a.columns));
    Scratch scratch(a.threads * thread_memory);
    float* memory = scratch.take(a.threads * thread_memory);
#pragma omp parallel num_threads(a.threads)
    {
        float* buffer = memory + thread_number() * thread_memory;  // a row of s
        uint16_t* random = reinterpret_cast<uint16_t*>(buffer + row);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a.rows; i++) {
            const T* x = static_cast<const T*>(a.x) + i * a.x_row_stride;
            T* n = static_cast<T*>(a.n) + i * a.columns;
            if (a.dropout.seed) random_row(random, a.columns, *a.dropout.seed, 0, 0, (uint32_t)i, 0);
            vec sums = {}, squares = {};
            for (int64_t d = 0; d < a.columns; d += W) {
                vec s = load_at(x, d, a.columns);
                if (a.y) {
                    vec y = load_at(static_cast<const T*>(a.y) + i * a.y_row_stride, d, a.columns) * a.alpha;
                    if (a.dropout.seed) y *= dropout_factor(random + d, a.dropout);
                    // the norm is that of s as stored
                    T* stored = static_cast<T*>(a.s) + i * a.columns;
                    store_at(stored, s + y, d, a.columns);
                    s = load_at(stored, d, a.columns);
                }
                store(buffer + d, s);
                sums += s;
            }
            float mean = sum(sums) / a.columns;
            for (int64_t d = 0; d < a.columns; d += W) {
                vec centred = first_lanes(load(buffer + d) - mean, a.columns - d);
                squares += centred * centred;
            }
            float rstd = reciprocal_deviation(sum(squares) / a.columns, a.eps);
            for (int64_t d = 0; d < a.columns; d += W) {
                vec normal = (load(buffer + d) - mean) * rstd;
                store_at(n, normal * load_at(a.weight, d, a.columns) + load_at(a.bias, d, a.columns), d, a.columns);
            }
            if (a.mean) {
                a.mean[i] = mean;
                a.rstd[i] = rstd;
            }
        }
    }
}

template <class T>
void backward(const ResidualLayerNormBackward& a) {
    int64_t row = round_up(a.columns, W), each = imax(1, cdiv(a.rows, kParts)), parts = cdiv(a.rows, each);
    int64_t thread_memory = Scratch::padded(row + random_size(a.dropout, a.columns));
    Scratch scratch(Scratch::padded(parts * 2 * row) + a.threads * thread_memory);
    float* sums = scratch.take(parts * 2 * row);
    float* memory = scratch.take(a.threads * thread_memory);
#pragma omp parallel num_threads(a.threads)
    {
        float* buffer = memory + thread_number() * thread_memory;  // dn * weight
        uint16_t* random = reinterpret_cast<uint16_t*>(buffer + row);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            float* dweight = sums + part * 2 * row;
            float* dbias = dweight + row;
            for (int64_t i = part * each; i < imin((part + 1) * each, a.rows); i++) {
                const T* s = static_cast<const T*>(a.s) + i * a.s_row_stride;
                const T* dn = static_cast<const T*>(a.dn) + i * a.dn_row_stride;
                const T* ds = static_cast<const T*>(a.ds) + i * a.ds_row_stride;
                float mean = a.mean[i], rstd = a.rstd[i];
                vec total = {}, total_normal = {};
                for (int64_t d = 0; d < a.columns; d += W) {
                    vec normal = (load_at(s, d, a.columns) - mean) * rstd, grad = load_at(dn, d, a.columns);
                    store(dweight + d, load(dweight + d) + grad * normal);
                    store(dbias + d, load(dbias + d) + grad);
                    grad *= load_at(a.weight, d, a.columns);
                    store(buffer + d, grad);
                    total += grad;
                    total_normal += grad * normal;
                }
                float mean_grad = sum(total) / a.columns, mean_normal = sum(total_normal) / a.columns;
                if (a.dy && a.dropout.seed) random_row(random, a.columns, *a.dropout.seed, 0, 0, (uint32_t)i, 0);
                for (int64_t d = 0; d < a.columns; d += W) {
                    vec normal = (load_at(s, d, a.columns) - mean) * rstd;
                    vec dx = (load(buffer + d) - mean_grad - normal * mean_normal) * rstd + load_at(ds, d, a.columns);
                    store_at(static_cast<T*>(a.dx) + i * a.columns, dx, d, a.columns);
                    if (a.n) {
                        vec n = normal * load_at(a.weight, d, a.columns) + load_at(a.bias, d, a.columns);
                        store_at(static_cast<T*>(a.n) + i * a.columns, n, d, a.columns);
                    }
                    if (!a.dy) continue;
                    vec dy = dx * a.alpha;
                    if (a.dropout.seed) dy *= dropout_factor(random + d, a.dropout);
                    store_at(static_cast<T*>(a.dy) + i * a.columns, dy, d, a.columns);
                }
            }
        }
    }
    for (int64_t d = 0; d < a.columns; d += W) {
        vec dweight = {}, dbias = {};
        for (int64_t part = 0; part < parts; part++) {
            dweight += load(sums + part * 2 * row + d);
            dbias += load(sums + part * 2 * row + row + d);
        }
        store_at(a.dparams, dweight, d, a.columns);
        store_at(a.dparams + a.columns, dbias, d, a.columns);
    }
}

}  // namespace

void residual_layer_norm_forward(const ResidualLayerNormForward& a) {
    a.element == Element::bfloat16 ? forward<bf16>(a) : forward<float>(a);
}
void residual_layer_norm_backward(const ResidualLayerNormBackward& a) {
    a.element == Element::bfloat16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
