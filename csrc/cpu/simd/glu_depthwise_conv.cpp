// GLU, padding zeroed, depthwise convolution, norm and activation over strips of frames that stay in cache, channels
// last.
//
// A strip computes the GLU of its frames and of K/2 frames on either side, so strips are independent. Weight gradients
// and statistics are sums over parts, in a fixed order; a part is a run of strips, and their number depends on the
// sizes alone. Rows in scratch have a pitch of C rounded up to W, zeros at the end.
#include "../kernels.h"
#include "activation.h"
#include "memory.h"
#include "parallel.h"
#include "threads.h"
#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int kFrames = W == 16 ? 12 : 8;  // of a tile in registers: as many sums, kTaps weights, one input
constexpr int kTaps = 4;
constexpr int64_t kStrip = 96;  // frames; the halo of K = 31 costs a third more GLUs, a smaller part of the whole
constexpr int64_t kParts = 64;

struct Sizes {
    explicit Sizes(const GluDepthwiseConv& a)
        : T(a.frames), C(a.channels), K(a.width), taps(round_up(a.width, kTaps)), half(a.width / 2),
          row(round_up(a.channels, W)), strips(imax(1, cdiv(a.frames, kStrip))),
          strip(round_up(cdiv(imax(a.frames, 1), strips), kFrames)), units(a.batch * strips),
          each(imax(1, cdiv(units, kParts))), parts(cdiv(units, each)) {}
    int64_t T, C, K;
    int64_t taps;  // K rounded up
    int64_t half, row;
    int64_t strips, strip;       // of an utterance; frames of one
    int64_t units, each, parts;  // strips of the batch, of a part; parts
    int64_t halo_rows() const { return strip + taps; }
};

struct Strip {
    Strip(const GluDepthwiseConv& a, const Sizes& s, int64_t unit)
        : b(unit / s.strips), first(unit % s.strips * s.strip), end(imin(first + s.strip, s.T)),
          real(a.lengths ? imax(0, imin(a.lengths[b], s.T)) : s.T) {}
    int64_t b, first, end;
    int64_t real;  // frames of the utterance
};

// sums[r] = sum over k of taps[k] * in[r + k], W channels; reads kFrames + taps - 1 rows
inline void convolve(const float* in, int64_t row, const float* taps, int64_t num_taps, vec (&sums)[kFrames]) {
    for (int64_t k = 0; k < num_taps; k += kTaps) {
        vec w[kTaps];
#pragma GCC unroll 4
        for (int q = 0; q < kTaps; q++) w[q] = load(taps + (k + q) * row);
#pragma GCC unroll 16
        for (int t = 0; t < kFrames + kTaps - 1; t++) {
            vec x = load(in + (k + t) * row);
#pragma GCC unroll 4
            for (int q = 0; q < kTaps; q++)
                if (t - q >= 0 && t - q < kFrames) sums[t - q] += w[q] * x;
        }
    }
}

// GLU of the frames first - K/2 ... end + K/2 - 1 of a strip; zeros where there is no real frame
template <class T>
void glu_rows(const GluDepthwiseConv& a, const Sizes& s, const Strip& strip, float* out) {
    int64_t rows = strip.end - strip.first + 2 * s.half;
    for (int64_t i = 0; i < rows; i++, out += s.row) {
        int64_t t = strip.first - s.half + i;
        if (t < 0 || t >= strip.real) {
            memset(out, 0, s.row * sizeof(float));
            continue;
        }
        const T* x = static_cast<const T*>(a.x) + strip.b * a.x_batch_stride + t * a.x_frame_stride;
        for (int64_t c = 0; c < s.C; c += W) store(out + c, load_at(x, c, s.C) * sigmoid(load_at(x + s.C, c, s.C)));
    }
    memset(out, 0, (s.halo_rows() - rows) * s.row * sizeof(float));
}

// taps of a pitch, zeros beyond K and beyond C; flipped for the gradient of the input
void pack_taps(const GluDepthwiseConv& a, const Sizes& s, bool flipped, float* out) {
    for (int64_t k = 0; k < s.K; k++)
        memcpy(out + k * s.row, a.taps + (flipped ? s.K - 1 - k : k) * s.C, s.C * sizeof(float));
}

struct RowStatistics {
    float mean, rstd;
};

RowStatistics row_statistics(const float* y, int64_t C, float eps) {
    vec sums = {}, squares = {};
    for (int64_t c = 0; c < C; c += W) sums += load(y + c);
    float mean = sum(sums) / C;
    for (int64_t c = 0; c < C; c += W) {
        vec d = first_lanes(load(y + c) - mean, C - c);
        squares += d * d;
    }
    return {mean, reciprocal_deviation(sum(squares) / C, eps)};
}

// Per channel of one utterance: the norm is (y - mean) * rstd * weight + bias; mean and rstd of LayerNorm change per
// row.
struct ChannelNorm {
    float *mean, *rstd, *weight, *bias;  // [s.row]
    static int64_t size(const Sizes& s) { return 4 * s.row; }
    ChannelNorm(float* memory, const GluDepthwiseConv& a, const Sizes& s)
        : mean(memory), rstd(mean + s.row), weight(rstd + s.row), bias(weight + s.row) {
        for (int64_t c = 0; c < s.C; c++) {
            mean[c] = 0.0f;
            rstd[c] = 1.0f;
            weight[c] = a.norm == Norm::none ? 1.0f : a.norm_weight[c];
            bias[c] = a.norm == Norm::none ? 0.0f : a.norm_bias[c];
        }
    }
    void of_utterance(const GluDepthwiseConv& a, const Sizes& s, int64_t b) {
        if (a.norm != Norm::running && a.norm != Norm::batch && a.norm != Norm::group) return;
        for (int64_t c = 0; c < s.C; c++) {
            int64_t at = a.norm == Norm::group ? b * a.groups + c / (s.C / a.groups) : c;
            mean[c] = a.mean[at];
            rstd[c] = 1.0f / sqrtf(a.var[at] + a.eps);
        }
    }
    void of_row(const GluDepthwiseConv& a, const Sizes& s, const float* y) {
        if (a.norm != Norm::layer) return;
        RowStatistics row = row_statistics(y, s.C, a.eps);
        for (int64_t c = 0; c < s.row; c += W) {
            store(mean + c, splat(row.mean));
            store(rstd + c, splat(row.rstd));
        }
    }
    vec normal(vec y, int64_t c) const { return (y - load(mean + c)) * load(rstd + c); }
    vec apply(vec normal, int64_t c) const { return normal * load(weight + c) + load(bias + c); }
};

// mean and sum of squared deviations of n values
struct Moments {
    double n = 0, mean = 0, m2 = 0;
    void merge(double other_n, double other_mean, double other_m2) {
        if (other_n == 0) return;
        double delta = other_mean - mean, total = n + other_n;
        mean += delta * (other_n / total);
        m2 += other_m2 + delta * delta * (n * (other_n / total));
        n = total;
    }
};

void merge_statistics(const GluDepthwiseConv& a, const Sizes& s, const float* moments) {
    auto frames = [&](int64_t unit) {
        Strip strip(a, s, unit);
        return (double)imax(0, imin(strip.end, strip.real) - strip.first);
    };
    auto merge = [&](Moments& total, int64_t unit, int64_t c) {
        const float* part = moments + unit * 2 * s.row + c;
        total.merge(frames(unit), part[0], part[s.row]);
    };
    if (a.norm == Norm::batch) {
        double count = 0;
        for (int64_t unit = 0; unit < s.units; unit++) count += frames(unit);
        a.count[0] = (float)count;
#pragma omp parallel for num_threads(a.threads)
        for (int64_t c = 0; c < s.C; c++) {
            Moments total;
            for (int64_t unit = 0; unit < s.units; unit++) merge(total, unit, c);
            a.mean[c] = (float)total.mean;
            a.var[c] = total.n > 0 ? (float)(total.m2 / total.n) : 0.0f;
        }
        return;
    }
    int64_t width = s.C / a.groups;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t group = 0; group < a.batch * a.groups; group++) {
        int64_t b = group / a.groups, first = group % a.groups * width;
        Moments total;
        for (int64_t unit = b * s.strips; unit < (b + 1) * s.strips; unit++)
            for (int64_t c = first; c < first + width; c++) merge(total, unit, c);
        a.mean[group] = (float)total.mean;
        a.var[group] = total.n > 0 ? (float)(total.m2 / total.n) : 0.0f;
    }
}

template <class T>
void forward(const GluDepthwiseConvForward& a) {
    Sizes s(a);
    bool statistics = a.norm == Norm::batch || a.norm == Norm::group;
    int64_t thread_memory = Scratch::padded((s.halo_rows() + s.strip) * s.row + ChannelNorm::size(s));
    int64_t moments_size = statistics ? s.units * 2 * s.row : 0;
    Scratch shared(Scratch::padded((s.taps + 1) * s.row) + moments_size);
    float* taps = shared.take((s.taps + 1) * s.row);
    float* bias = taps + s.taps * s.row;
    float* moments = shared.take(moments_size);
    Scratch scratch(a.threads * thread_memory, Fill::anything);
    float* memory = scratch.take(a.threads * thread_memory);
    pack_taps(a, s, false, taps);
    if (a.bias) memcpy(bias, a.bias, s.C * sizeof(float));
    parallel_for(a.threads, a.own_threads, s.units, [&](int slot, int64_t unit) {
        float* glu = memory + slot * thread_memory;
        float* y = glu + s.halo_rows() * s.row;  // [s.strip, s.row]
        ChannelNorm norm(y + s.strip * s.row, a, s);
        Strip strip(a, s, unit);
        glu_rows<T>(a, s, strip, glu);
        int64_t rows = strip.end - strip.first;
        for (int64_t i = 0; i < rows; i += kFrames)
            for (int64_t c = 0; c < s.C; c += W) {
                vec sums[kFrames];
                for (int r = 0; r < kFrames; r++) sums[r] = load(bias + c);
                convolve(glu + i * s.row + c, s.row, taps + c, s.taps, sums);
                for (int r = 0; r < kFrames; r++) store(y + (i + r) * s.row + c, sums[r]);
            }
        int64_t base = (strip.b * s.T + strip.first) * s.C;
        if (a.y)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t c = 0; c < s.C; c += W)
                    store_at(static_cast<T*>(a.y) + base + i * s.C, load(y + i * s.row + c), c, s.C);
        if (statistics) {
            float* part = moments + unit * 2 * s.row;
            int64_t real = imin(rows, strip.real - strip.first);
            if (real <= 0) return;
            for (int64_t c = 0; c < s.C; c += W) {
                vec mean = {}, m2 = {};
                for (int64_t i = 0; i < real; i++) mean += load(y + i * s.row + c);
                mean *= 1.0f / real;
                for (int64_t i = 0; i < real; i++) {
                    vec d = load(y + i * s.row + c) - mean;
                    m2 += d * d;
                }
                store(part + c, mean);
                store(part + s.row + c, m2);
            }
            return;
        }
        norm.of_utterance(a, s, strip.b);
        for (int64_t i = 0; i < rows; i++) {
            norm.of_row(a, s, y + i * s.row);
            for (int64_t c = 0; c < s.C; c += W)
                store_at(static_cast<T*>(a.out) + base + i * s.C,
                         activate(a.activation, norm.apply(norm.normal(load(y + i * s.row + c), c), c)), c, s.C);
        }
    });
    if (!statistics) return;
    merge_statistics(a, s, moments);
    parallel_for(a.threads, a.own_threads, s.units, [&](int slot, int64_t unit) {
        ChannelNorm norm(memory + slot * thread_memory, a, s);
        Strip strip(a, s, unit);
        norm.of_utterance(a, s, strip.b);
        for (int64_t t = strip.first; t < strip.end; t++) {
            int64_t at = (strip.b * s.T + t) * s.C;
            for (int64_t c = 0; c < s.C; c += W) {
                vec y = load_at(static_cast<const T*>(a.y) + at, c, s.C);
                store_at(static_cast<T*>(a.out) + at, activate(a.activation, norm.apply(norm.normal(y, c), c)), c, s.C);
            }
        }
    });
}

// Gradients of one frame in front of the norm, and what the frame adds to those of the norm's parameters.
// `sums` [2, s.row]: for Norm::batch and Norm::group the sums of dz and dz * normal that the statistics' gradients
// need, divided by the count; zero for frames that have no part in the statistics.
template <class T>
void norm_backward_row(const GluDepthwiseConvBackward& a, const Sizes& s, int64_t b, int64_t t, ChannelNorm& norm,
                       const float* sums, float* y, float* dy, float* dnorm) {
    const T* saved = static_cast<const T*>(a.y) + (b * s.T + t) * s.C;
    const T* dout = static_cast<const T*>(a.dout) + b * a.dout_batch_stride + t * a.dout_frame_stride;
    for (int64_t c = 0; c < s.C; c += W) store(y + c, load_at(saved, c, s.C));
    norm.of_row(a, s, y);
    vec total = {}, total_normal = {};
    for (int64_t c = 0; c < s.C; c += W) {
        vec normal = norm.normal(load(y + c), c);
        vec dz = load_at(dout, c, s.C) * activate_with_slope(a.activation, norm.apply(normal, c)).slope;
        if (dnorm) {
            store(dnorm + c, load(dnorm + c) + dz);
            store(dnorm + s.row + c, load(dnorm + s.row + c) + dz * normal);
        }
        vec dnormal = dz * load(norm.weight + c);
        total += dnormal;
        total_normal += dnormal * normal;
        store(dy + c, dnormal);
    }
    if (a.norm == Norm::none) return;
    vec mean = {}, mean_normal = {};
    if (a.norm == Norm::layer) {
        mean = splat(sum(total) / s.C);
        mean_normal = splat(sum(total_normal) / s.C);
    }
    for (int64_t c = 0; c < s.C; c += W) {
        vec normal = norm.normal(load(y + c), c);
        if (sums) {
            mean = load(sums + c);
            mean_normal = load(sums + s.row + c);
        }
        vec d = (load(dy + c) - mean - normal * mean_normal) * load(norm.rstd + c);
        store(dy + c, first_lanes(d, s.C - c));
    }
}

void add_parts(const Sizes& s, const float* parts, int64_t part_size, float* total) {
    for (int64_t part = 0; part < s.parts; part++)
        for (int64_t i = 0; i < part_size; i += W)
            store(total + i, load(total + i) + load(parts + part * part_size + i));
}

// Sums over all frames of dz and dz * normal, then `sums` of norm_backward_row for each utterance: [B, 2, s.row].
// The mean of `normal` over real frames is zero but for rounding, which a small variance magnifies: it is taken off.
template <class T>
void statistics_backward(const GluDepthwiseConvBackward& a, const Sizes& s, float* memory, int64_t thread_memory,
                         float* sums) {
    int64_t part_size = 3 * s.row;  // dz, dz * normal, normal
    Scratch scratch(Scratch::padded(s.units * part_size) + Scratch::padded(part_size));
    float* parts = scratch.take(s.units * part_size);
    float* total = scratch.take(part_size);
#pragma omp parallel num_threads(a.threads)
    {
        float* y = memory + thread_number() * thread_memory;
        float* dy = y + s.row;
        ChannelNorm norm(dy + s.row, a, s);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < s.units; unit++) {
            Strip strip(a, s, unit);
            norm.of_utterance(a, s, strip.b);
            float* part = parts + unit * part_size;
            for (int64_t t = strip.first; t < strip.end; t++) {
                norm_backward_row<T>(a, s, strip.b, t, norm, nullptr, y, dy, part);
                if (t >= strip.real) continue;
                float* normal = part + 2 * s.row;
                for (int64_t c = 0; c < s.C; c += W) store(normal + c, load(normal + c) + norm.normal(load(y + c), c));
            }
        }
    }
    for (int64_t unit = 0; unit < s.units; unit++)
        for (int64_t i = 0; i < part_size; i += W)
            store(total + i, load(total + i) + load(parts + unit * part_size + i));
    for (int64_t c = 0; c < s.C; c++) {
        a.dnorm[c] = total[c];
        a.dnorm[s.C + c] = total[s.row + c];
    }
    int64_t width = s.C / a.groups;
    for (int64_t b = 0; b < a.batch; b++) {
        float* out = sums + b * 2 * s.row;
        if (a.norm == Norm::batch) {
            double count = fmax(a.count[0], 1.0);
            for (int64_t c = 0; c < s.C; c++) {
                double of_normal = total[s.row + c] * (a.norm_weight[c] / count), mean = total[2 * s.row + c] / count;
                out[c] = (float)(total[c] * (a.norm_weight[c] / count) - mean * of_normal);
                out[s.row + c] = (float)of_normal;
            }
            continue;
        }
        int64_t real = a.lengths ? imax(0, imin(a.lengths[b], s.T)) : s.T;
        for (int64_t group = 0; group < a.groups; group++) {
            double of_dz = 0, of_normal = 0, mean = 0, count = (double)(imax(real, 1) * width);
            for (int64_t unit = b * s.strips; unit < (b + 1) * s.strips; unit++)
                for (int64_t c = group * width; c < (group + 1) * width; c++) {
                    const float* part = parts + unit * part_size + c;
                    of_dz += (double)part[0] * a.norm_weight[c] / count;
                    of_normal += (double)part[s.row] * a.norm_weight[c] / count;
                    mean += (double)part[2 * s.row] / count;
                }
            for (int64_t c = group * width; c < (group + 1) * width; c++) {
                out[c] = (float)(of_dz - mean * of_normal);
                out[s.row + c] = (float)of_normal;
            }
        }
    }
}

// sums[k] += sum over the strip's frames of dy[t] * glu[t + k - K/2]
void taps_backward(const Sizes& s, int64_t rows, const float* dy, const float* glu, float* sums) {
    constexpr int kBlock = kFrames;
    for (int64_t c = 0; c < s.C; c += W)
        for (int64_t k = 0; k < s.K; k += kBlock) {
            vec acc[kBlock] = {};
            // the last block starts early enough to end with the last tap, and stores only what is new
            int64_t start = imax(0, imin(k, s.K - kBlock)), n = imin(kBlock, s.K - start);
            const float* in = glu + start * s.row + c;
            if (n == kBlock) {
                for (int64_t t = 0; t < rows; t++) {
                    vec d = load(dy + t * s.row + c);
#pragma GCC unroll 16
                    for (int q = 0; q < kBlock; q++) acc[q] += d * load(in + (t + q) * s.row);
                }
            } else {
                for (int64_t t = 0; t < rows; t++)
                    for (int64_t q = 0; q < n; q++) acc[q] += load(dy + t * s.row + c) * load(in + (t + q) * s.row);
            }
            for (int64_t q = k - start; q < n; q++) {
                float* out = sums + (start + q) * s.row + c;
                store(out, load(out) + acc[q]);
            }
        }
}

template <class T>
void backward(const GluDepthwiseConvBackward& a) {
    Sizes s(a);
    bool statistics = a.norm == Norm::batch || a.norm == Norm::group;
    int64_t part_size = (s.K + 3) * s.row;  // taps, bias, norm's bias and weight
    int64_t thread_memory = Scratch::padded((2 * s.halo_rows() + 1) * s.row + ChannelNorm::size(s));
    int64_t sums_size = statistics ? a.batch * 2 * s.row : 0;
    Scratch scratch(Scratch::padded(s.taps * s.row) + Scratch::padded(sums_size) + Scratch::padded(part_size) +
                    Scratch::padded(s.parts * part_size) + a.threads * thread_memory);
    float* taps = scratch.take(s.taps * s.row);
    float* sums = scratch.take(sums_size);
    float* total = scratch.take(part_size);
    float* parts = scratch.take(s.parts * part_size);
    float* memory = scratch.take(a.threads * thread_memory);
    pack_taps(a, s, true, taps);
    if (statistics) statistics_backward<T>(a, s, memory, thread_memory, sums);
#pragma omp parallel num_threads(a.threads)
    {
        float* glu = memory + thread_number() * thread_memory;
        float* dy = glu + s.halo_rows() * s.row;
        float* y = dy + s.halo_rows() * s.row;
        ChannelNorm norm(y + s.row, a, s);
#pragma omp for schedule(dynamic)
        for (int64_t part = 0; part < s.parts; part++) {
            float* dtaps = parts + part * part_size;
            float* dbias = dtaps + s.K * s.row;
            float* dnorm = dbias + s.row;
            for (int64_t unit = part * s.each; unit < imin((part + 1) * s.each, s.units); unit++) {
                Strip strip(a, s, unit);
                int64_t rows = strip.end - strip.first;
                glu_rows<T>(a, s, strip, glu);
                norm.of_utterance(a, s, strip.b);
                memset(dy, 0, s.halo_rows() * s.row * sizeof(float));
                for (int64_t t = imax(0, strip.first - s.half); t < imin(s.T, strip.end + s.half); t++) {
                    bool own = t >= strip.first && t < strip.end;
                    const float* correction = statistics && t < strip.real ? sums + strip.b * 2 * s.row : nullptr;
                    norm_backward_row<T>(a, s, strip.b, t, norm, correction, y, dy + (t - strip.first + s.half) * s.row,
                                         own ? dnorm : nullptr);
                }
                taps_backward(s, rows, dy + s.half * s.row, glu, dtaps);
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t c = 0; c < s.C; c += W)
                        store(dbias + c, load(dbias + c) + load(dy + (i + s.half) * s.row + c));
                for (int64_t i = 0; i < rows; i += kFrames)
                    for (int64_t c = 0; c < s.C; c += W) {
                        vec dglu[kFrames] = {};
                        convolve(dy + i * s.row + c, s.row, taps + c, s.taps, dglu);
                        for (int64_t r = 0; r < imin(kFrames, rows - i); r++) {
                            int64_t t = strip.first + i + r;
                            T* dx = static_cast<T*>(a.dx) + (strip.b * s.T + t) * 2 * s.C;
                            vec dvalue = {}, dgate = {};
                            if (t < strip.real) {
                                const T* x =
                                    static_cast<const T*>(a.x) + strip.b * a.x_batch_stride + t * a.x_frame_stride;
                                vec gate = sigmoid(load_at(x + s.C, c, s.C));
                                dvalue = dglu[r] * gate;
                                dgate = dvalue * load_at(x, c, s.C) * (1.0f - gate);
                            }
                            store_at(dx, dvalue, c, s.C);
                            store_at(dx + s.C, dgate, c, s.C);
                        }
                    }
            }
        }
    }
    add_parts(s, parts, part_size, total);
    for (int64_t k = 0; k < s.K; k++) memcpy(a.dtaps + k * s.C, total + k * s.row, s.C * sizeof(float));
    memcpy(a.dbias, total + s.K * s.row, s.C * sizeof(float));
    if (statistics || a.norm == Norm::none) return;
    memcpy(a.dnorm, total + (s.K + 1) * s.row, s.C * sizeof(float));
    memcpy(a.dnorm + s.C, total + (s.K + 2) * s.row, s.C * sizeof(float));
}

}  // namespace

void glu_depthwise_conv_forward(const GluDepthwiseConvForward& a) {
    a.element == Element::bfloat16 ? forward<bf16>(a) : forward<float>(a);
}
void glu_depthwise_conv_backward(const GluDepthwiseConvBackward& a) {
    a.element == Element::bfloat16 ? backward<bf16>(a) : backward<float>(a);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
