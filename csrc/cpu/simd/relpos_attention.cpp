// Relative-position attention in blocks that stay in cache, forward and backward; scores are never whole in memory.
//
// For a block of M queries from i0 and N keys from j0, S[i, j] = (q_i + u) . k_j + (q_i + v_bias) . pos[T-1-i+j] needs
// a parallelogram of products (i, position). They are computed as a band of N + M columns x = (M-1-i) + j (indices
// local to the block) in rows of pitch P; the shift is then reading it with pitch P - 1 from column M - 1 on. The next
// key block needs the band N columns further: its first M columns are the last M of this one, so every product is
// formed once.
//
// Queries are scaled by log2(e) / sqrt(D), so that scores are exponents of 2. Keys, values and positions are packed: as
// panels of W columns, transposed, for products along D; as plain rows for products along keys or positions.
//
// The operands of the forward's products, P below, are float32 or, for inference, bfloat16; what is along the sum then
// lies in pairs, see product.h. Scores, softmax and sums are float32 either way.
#include "../kernels.h"
#include "dropout.h"
#include "memory.h"
#include "parallel.h"
#include "product.h"
#include "threads.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int64_t M = 48;               // queries of a block: a multiple of kTileRows and W
constexpr int64_t N = 192;              // keys of a block: likewise
constexpr int64_t kPitch = M + N + 32;  // of the band; columns beyond M + N stay zero. An odd number of cache lines
static_assert(M % kTileRows == 0 && M % W == 0 && N % kTileRows == 0 && N % W == 0 && N >= M,
              "blocks are made of whole tiles");

struct Sizes {
    explicit Sizes(const RelposAttention& a) : Sizes(a.frames, a.head_dim) {}
    Sizes(int64_t T, int64_t D)
        : T(T), D(D), row(round_up(D, W)), keys(round_up(T, N)), shift(M + (W - T % W) % W),
          positions(round_up(2 * T + 2 * M + N + W, W)), scale(1.0f / sqrtf((float)D)) {}
    int64_t T, D;
    int64_t row;        // pitch of packed rows of D
    int64_t keys;       // rows of packed keys, zero beyond the real ones
    int64_t shift;      // packed position of pos[0]: makes the first position of every block a multiple of W
    int64_t positions;  // packed positions, zero before pos[0] and after pos[2T-2]
    float scale;
    // packed position of column 0 of the band of the block (i0, j0)
    int64_t first_position(int64_t i0, int64_t j0) const { return T - M - i0 + j0 + shift; }
};

// Where the frames of utterance b are, and how many.
struct Utterance {
    Utterance(const RelposAttention& a, int64_t b)
        : b(b), first(a.cu_seqlens ? a.cu_seqlens[b] : b * a.frames),
          queries(a.cu_seqlens ? a.cu_seqlens[b + 1] - first : a.frames),
          keys(a.lengths ? imax(0, imin(a.lengths[b], a.frames)) : queries), packed(a.cu_seqlens) {}
    int64_t b, first, queries, keys;
    bool packed;

    template <class T>
    const T* head(const Heads& x, int64_t h) const {
        return static_cast<const T*>(x.data) + (packed ? first * x.frame_stride : b * x.batch_stride) +
               h * x.head_stride;
    }
};

// rows [n, D] of stride `stride` into rows of pitch s.row
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t n, const Sizes& s, float* rows) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < s.D; d += W) store(rows + i * s.row + d, load_at(x + i * stride, d, s.D));
}

// the same in pairs of rows: element (i, d) at pairs[(i / 2 * s.row + d) * 2 + i % 2], zero beyond an odd last row
void pack_rows(const bf16* x, int64_t stride, int64_t n, const Sizes& s, bf16* pairs) {
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t d = 0; d < s.D; d += W) {
            uvec low = (uvec)load_at(x + i * stride, d, s.D);
            uvec high = i + 1 < n ? (uvec)load_at(x + (i + 1) * stride, d, s.D) : uvec{};
            store(reinterpret_cast<float*>(pairs + i * s.row + 2 * d), (vec)(low >> 16 | high));
        }
}

// D as the sums of panels of P count it
template <class P>
int64_t depth(const Sizes& s) {
    return round_up(s.D, kStep<P>);
}

// the same into panels: element (i, d) at panels[i / W * depth * W + (d / kStep * W + i % W) * kStep + d % kStep], the
// rest of the last panel zero
template <class T, class P>
void pack_panels(const T* x, int64_t stride, int64_t n, int64_t first, const Sizes& s, P* panels) {
    auto column = [&](int64_t i) { return panels + i / W * depth<P>(s) * W + i % W * kStep<P>; };
    for (int64_t i = 0; i < n; i++) {
        P* to = column(first + i);
        for (int64_t d = 0; d < s.D; d += W, to += W * W) {
            P part[W];
            store(part, load_at(x + i * stride, d, s.D));
            if (d + W <= s.D) {
#pragma GCC unroll 16
                for (int l = 0; l < W; l += kStep<P>) memcpy(to + l * W, part + l, kStep<P> * sizeof(P));
            } else {
                for (int64_t l = 0; l < s.D - d; l += kStep<P>) memcpy(to + l * W, part + l, kStep<P> * sizeof(P));
            }
        }
    }
    for (int64_t i = first + n; i % W; i++)
        for (int64_t d = 0; d < depth<P>(s); d += kStep<P>) memset(column(i) + d * W, 0, kStep<P> * sizeof(P));
}

Right panels_from(const float* panels, int64_t column, const Sizes& s) { return {panels + column * s.D, W, s.D * W}; }
RightPairs panels_from(const bf16* panels, int64_t column, const Sizes& s) {
    return {panels + column * depth<bf16>(s), 2 * W, depth<bf16>(s) * W};
}
Right rows_from(const float* rows, int64_t row, const Sizes& s) { return {rows + row * s.row, s.row, W}; }
RightPairs rows_from(const bf16* pairs, int64_t row, const Sizes& s) { return {pairs + row * s.row, 2 * s.row, 2 * W}; }

// (x_i + bias) * factor of the queries of a block, and zeros to the end of the last tile
template <class T, class P>
void load_queries(const T* x, int64_t stride, int64_t m, const float* bias, float factor, const Sizes& s, P* out) {
    for (int64_t i = 0; i < round_up(m, kTileRows); i++)
        for (int64_t d = 0; d < s.row; d += W) {
            vec q = i < m ? load_at(x + i * stride, d, s.D) : vec{};
            if (bias && i < m) q += load_at(bias, d, s.D);
            store(out + i * s.row + d, q * factor);
        }
}

// One block of queries walking along the keys.
template <class P>
struct Walk {
    const Sizes& s;
    int64_t i0, m;                // first query, number of queries
    const P *content, *position;  // scaled queries with their biases, [M, s.row]
    float* band;                  // [M, kPitch]
    float* scores;                // [M, N]

    // scores of the keys j0 ... j0+n-1, in exponents of 2; to be called for j0 = 0, N, 2N, ...
    void scores_of(int64_t j0, int64_t n, const P* key_panels, const P* position_panels) {
        int64_t groups = cdiv(n, W), steps = cdiv(s.D, kStep<P>);
        Addend shifted = {nullptr, 0};
        if (position_panels) {
            int64_t known = 0;
            if (j0 > 0) {
                known = M;
                for (int64_t i = 0; i < m; i++) memcpy(band + i * kPitch, band + i * kPitch + N, M * sizeof(float));
            }
            auto columns = panels_from(position_panels, s.first_position(i0, j0) + known, s);
            Addend none = {nullptr, 0};
            product(m, (M - known) / W + groups, steps, left(position, s.row), columns, none, band + known, kPitch);
            shifted = {band + M - 1, kPitch - 1};
        }
        product(m, groups, steps, left(content, s.row), panels_from(key_panels, j0, s), shifted, scores, N);
    }
};

// panels (and rows, if asked for) of all positions of each head
template <class T, class P, class Arguments>
void pack_positions(const Arguments& a, const Sizes& s, bool own_threads, P* panels, float* rows) {
    parallel_for(a.threads, own_threads, a.heads, [&](int, int64_t h) {
        const T* pos = static_cast<const T*>(a.pos) + h * a.pos_head_stride;
        pack_panels(pos, a.pos_frame_stride, 2 * s.T - 1, s.shift, s, panels + h * s.positions * depth<P>(s));
        if (rows) pack_rows(pos, a.pos_frame_stride, 2 * s.T - 1, s, rows + (h * s.positions + s.shift) * s.row);
    });
}

// all that a caller keeps
template <class T, class P>
void pack_positions(const RelposAttentionPackPositions& a) {
    Sizes s(a.frames, a.head_dim);
    P* panels = static_cast<P*>(a.pos_panels);
    memset(panels, 0, a.heads * s.positions * depth<P>(s) * sizeof(P));
    pack_positions<T>(a, s, true, panels, nullptr);
}

// What a block of queries works in.
template <class P>
struct Block {
    float *output, *band, *scores;  // [M, s.row], [M, kPitch], [M, N]
    P *content, *position;          // [M, s.row]

    static int64_t size(const Sizes& s) { return 3 * M * s.row + M * kPitch + M * N; }
    Block(float* memory, const Sizes& s)
        : output(memory), band(output + M * s.row), scores(band + M * kPitch),
          content(reinterpret_cast<P*>(scores + M * N)), position(content + M * s.row) {}
};

template <class T, class P>
void forward_block(const RelposAttentionForward& a, const Sizes& s, const Utterance& at, int64_t h, int64_t i0,
                   const P* key_panels, const P* value_rows, const P* position_panels, const Block<P>& block) {
    auto [output, band, scores, content, position] = block;
    int64_t m = imin(M, at.queries - i0), keys = at.keys;
    const T* q = at.head<T>(a.q, h) + i0 * a.q.frame_stride;
    float factor = s.scale * kLog2E;
    load_queries(q, a.q.frame_stride, m, a.u ? a.u + h * s.D : nullptr, factor, s, content);
    if (position_panels) load_queries(q, a.q.frame_stride, m, a.v_bias + h * s.D, factor, s, position);
    memset(output, 0, round_up(m, kTileRows) * s.row * sizeof(float));
    float highest[M], total[M];
    for (int64_t i = 0; i < M; i++) {
        highest[i] = -INFINITY;
        total[i] = 0.0f;
    }

    Walk<P> walk = {s, i0, m, content, position, band, scores};
    for (int64_t j0 = 0; j0 < keys; j0 += N) {
        int64_t n = imin(N, keys - j0), n_padded = round_up(n, W);
        walk.scores_of(j0, n, key_panels, position_panels);
        for (int64_t i = 0; i < m; i++) {
            float* row = scores + i * N;
            P* weights = reinterpret_cast<P*>(row);  // in place
            for (int64_t j = n; j < n_padded; j++) row[j] = -INFINITY;
            vec row_max = load(row);
            for (int64_t j = W; j < n_padded; j += W) row_max = max(load(row + j), row_max);
            float old = highest[i], now = max(row_max);
            now = now > old ? now : old;
            if (now > old && j0 > 0) {
                vec shrink = exp2(splat(old - now));
                total[i] *= shrink[0];
                for (int64_t d = 0; d < s.row; d += W)
                    store(output + i * s.row + d, load(output + i * s.row + d) * shrink);
            }
            highest[i] = now;
            uint16_t random[N + kDropoutPad];
            if (a.dropout.seed)
                random_row(random, n_padded, *a.dropout.seed, 0, (uint32_t)(at.b * a.heads + h), (uint32_t)(i0 + i),
                           j0);
            vec sums = {};
            for (int64_t j = 0; j < n_padded; j += W) {
                vec p = exp2(load(row + j) - now);
                sums += p;
                if (a.dropout.seed) p *= dropout_factor(random + j, a.dropout);
                store(weights + j, p);
            }
            total[i] += sum(sums);
        }
        auto weights = left(reinterpret_cast<const P*>(scores), N * sizeof(float) / sizeof(P));
        product(m, s.row / W, cdiv(n, kStep<P>), weights, rows_from(value_rows, j0, s), {output, s.row}, output, s.row);
    }

    for (int64_t i = 0; i < m; i++) {
        T* out = static_cast<T*>(a.out) + ((at.first + i0 + i) * a.heads + h) * s.D;
        float factor = keys ? 1.0f / total[i] : 0.0f;
        for (int64_t d = 0; d < s.D; d += W) store_at(out, load(output + i * s.row + d) * factor, d, s.D);
        if (a.lse) a.lse[h * a.total_frames + at.first + i0 + i] = keys ? highest[i] + log2f(total[i]) : 0.0f;
    }
}

template <class T, class P>
void forward(const RelposAttentionForward& a) {
    Sizes s(a);
    int64_t head_positions = s.positions * depth<P>(s);
    Scratch positions(a.pos ? a.heads * head_positions : 0);
    const P* position_panels = static_cast<const P*>(a.pos_panels);
    if (a.pos) {
        P* panels = reinterpret_cast<P*>(positions.take(a.heads * head_positions));
        pack_positions<T>(a, s, a.own_threads, panels, nullptr);
        position_panels = panels;
    }

    int64_t blocks = cdiv(s.T, M);
    // of query blocks: enough for all threads; each packs the keys for itself, and no result depends on their number
    int64_t pieces = imin(blocks, cdiv(2 * a.threads, a.batch * a.heads));
    int64_t each = cdiv(blocks, pieces);
    int64_t panel_floats = Scratch::padded(s.keys * depth<P>(s) * sizeof(P) / sizeof(float));
    int64_t row_floats = Scratch::padded(s.keys * s.row * sizeof(P) / sizeof(float));
    int64_t thread_memory = panel_floats + row_floats + Scratch::padded(Block<P>::size(s));
    Scratch scratch(a.threads * thread_memory, Fill::anything);
    float* memory = scratch.take(a.threads * thread_memory);
    parallel_for(a.threads, a.own_threads, a.batch * a.heads * pieces, [&](int slot, int64_t unit) {
        float* own = memory + slot * thread_memory;
        P* key_panels = reinterpret_cast<P*>(own);
        P* value_rows = reinterpret_cast<P*>(own + panel_floats);
        Block<P> block(own + panel_floats + row_floats, s);
        int64_t b = unit / pieces / a.heads, h = unit / pieces % a.heads, first = unit % pieces * each;
        Utterance at(a, b);
        if (first * M >= at.queries) return;
        pack_panels(at.head<T>(a.k, h), a.k.frame_stride, at.keys, 0, s, key_panels);
        pack_rows(at.head<T>(a.v, h), a.v.frame_stride, at.keys, s, value_rows);
        for (int64_t i0 = first * M; i0 < imin((first + each) * M, at.queries); i0 += M)
            forward_block<T>(a, s, at, h, i0, key_panels, value_rows,
                             position_panels ? position_panels + h * head_positions : nullptr, block);
    });
}

// Everything the backward of one head keeps while it walks over the blocks.
struct Gradients {
    float *key_panels, *value_panels, *key_rows;  // packed inputs
    float *dk, *dv;                               // [s.keys, s.row]
    float *content, *position, *dout;             // [M, s.row]
    float *dcontent, *dposition;                  // [M, s.row]
    float *band, *dband;                          // [M, kPitch]
    float *scores, *dscores;                      // [M, N]

    static int64_t size(const Sizes& s) {
        return 2 * s.keys * s.D + 3 * s.keys * s.row + 5 * M * s.row + 2 * M * kPitch + 2 * M * N;
    }
    Gradients(float* memory, const Sizes& s) {
        auto take = [&](int64_t n) {
            float* part = memory;
            memory += n;
            return part;
        };
        key_panels = take(s.keys * s.D);
        value_panels = take(s.keys * s.D);
        key_rows = take(s.keys * s.row);
        dk = take(s.keys * s.row);
        dv = take(s.keys * s.row);
        content = take(M * s.row);
        position = take(M * s.row);
        dout = take(M * s.row);
        dcontent = take(M * s.row);
        dposition = take(M * s.row);
        band = take(M * kPitch);
        dband = take(M * kPitch);
        scores = take(M * N);
        dscores = take(M * N);
    }
};

// position_panels, position_rows and the sums dpos [s.positions, s.row], du, dv_bias [s.row] are those of head h
template <class T>
void backward_block(const RelposAttentionBackward& a, const Sizes& s, const Utterance& at, int64_t h, int64_t i0,
                    Gradients& g, const float* position_panels, const float* position_rows, float* dpos, float* du,
                    float* dv_bias) {
    int64_t m = imin(M, at.queries - i0), keys = at.keys;
    const T* q = at.head<T>(a.q, h) + i0 * a.q.frame_stride;
    float factor = s.scale * kLog2E;
    load_queries(q, a.q.frame_stride, m, a.u ? a.u + h * s.D : nullptr, factor, s, g.content);
    if (position_panels) load_queries(q, a.q.frame_stride, m, a.v_bias + h * s.D, factor, s, g.position);
    load_queries(at.head<T>(a.dout, h) + i0 * a.dout.frame_stride, a.dout.frame_stride, m, nullptr, 1.0f, s, g.dout);
    float delta[M];
    for (int64_t i = 0; i < m; i++) {
        const T* out = static_cast<const T*>(a.out) + ((at.first + i0 + i) * a.heads + h) * s.D;
        vec sums = {};
        for (int64_t d = 0; d < s.D; d += W) sums += load(g.dout + i * s.row + d) * load_at(out, d, s.D);
        delta[i] = sum(sums);
    }
    const float* lse = a.lse + h * a.total_frames + at.first + i0;
    memset(g.dcontent, 0, M * s.row * sizeof(float));
    memset(g.dposition, 0, M * s.row * sizeof(float));
    memset(g.dband, 0, M * kPitch * sizeof(float));

    Walk<float> walk = {s, i0, m, g.content, g.position, g.band, g.scores};
    int64_t groups = s.row / W;
    for (int64_t j0 = 0; j0 < keys; j0 += N) {
        int64_t n = imin(N, keys - j0), n_padded = round_up(n, W);
        walk.scores_of(j0, n, g.key_panels, position_panels);
        product(m, n_padded / W, s.D, {g.dout, s.row, 1}, panels_from(g.value_panels, j0, s), {nullptr, 0}, g.dscores,
                N);
        for (int64_t i = 0; i < m; i++) {
            float *row = g.scores + i * N, *drow = g.dscores + i * N, *dband = g.dband + i * kPitch + M - 1 - i;
            for (int64_t j = n; j < n_padded; j++) row[j] = -INFINITY;
            uint16_t random[N + kDropoutPad];
            if (a.dropout.seed)
                random_row(random, n_padded, *a.dropout.seed, 0, (uint32_t)(at.b * a.heads + h), (uint32_t)(i0 + i),
                           j0);
            for (int64_t j = 0; j < n_padded; j += W) {
                vec p = exp2(load(row + j) - lse[i]), dp = load(drow + j), kept = p;
                if (a.dropout.seed) {
                    vec keep = dropout_factor(random + j, a.dropout);
                    kept *= keep;
                    dp *= keep;
                }
                vec ds = p * (dp - delta[i]);
                store(row + j, kept);
                store(drow + j, ds);
                if (position_panels) store(dband + j, ds);
            }
            // whole tiles of keys are multiplied below
            for (int64_t j = n_padded; j < imin(round_up(n_padded, kTileRows), N); j++) row[j] = drow[j] = 0.0f;
        }
        product(n, groups, m, {g.scores, 1, N}, rows_from(g.dout, 0, s), {g.dv + j0 * s.row, s.row}, g.dv + j0 * s.row,
                s.row);
        product(n, groups, m, {g.dscores, 1, N}, rows_from(g.content, 0, s), {g.dk + j0 * s.row, s.row},
                g.dk + j0 * s.row, s.row);
        product(m, groups, n, {g.dscores, N, 1}, rows_from(g.key_rows, j0, s), {g.dcontent, s.row}, g.dcontent, s.row);
        if (position_panels) {
            // the first N columns of the band are complete; the last block completes all
            int64_t columns = j0 + N < keys ? N : M + n_padded;
            int64_t first = s.first_position(i0, j0);
            product(m, groups, columns, {g.dband, kPitch, 1}, rows_from(position_rows, first, s), {g.dposition, s.row},
                    g.dposition, s.row);
            float* sums = dpos + first * s.row;
            product(columns, groups, m, {g.dband, 1, kPitch}, rows_from(g.position, 0, s), {sums, s.row}, sums, s.row);
            for (int64_t i = 0; i < m; i++) {
                memcpy(g.dband + i * kPitch, g.dband + i * kPitch + N, M * sizeof(float));
                memset(g.dband + i * kPitch + M, 0, (kPitch - M) * sizeof(float));
            }
        }
    }

    for (int64_t i = 0; i < m; i++) {
        T* dq = static_cast<T*>(a.dq) + ((at.first + i0 + i) * a.heads + h) * s.D;
        for (int64_t d = 0; d < s.row; d += W) {
            vec content = load(g.dcontent + i * s.row + d) * s.scale;
            vec position = load(g.dposition + i * s.row + d) * s.scale;
            if (d < s.D) store_at(dq, content + position, d, s.D);
            store(du + d, load(du + d) + content);
            store(dv_bias + d, load(dv_bias + d) + position);
        }
    }
}

// scaled rows of one head into [rows, H, D]; zeros beyond the real keys
template <class T>
void store_head(const RelposAttention& a, const Sizes& s, const Utterance& at, int64_t h, const float* rows,
                float scale, void* out) {
    for (int64_t t = 0; t < at.queries; t++) {
        T* row = static_cast<T*>(out) + ((at.first + t) * a.heads + h) * s.D;
        for (int64_t d = 0; d < s.D; d += W)
            store_at(row, t < at.keys ? load(rows + t * s.row + d) * scale : vec{}, d, s.D);
    }
}

template <class T>
void backward(const RelposAttentionBackward& a) {
    Sizes s(a);
    Scratch positions(a.pos ? a.heads * s.positions * (s.D + s.row) + 32 : 0);
    float* position_panels = a.pos ? positions.take(a.heads * s.positions * s.D) : nullptr;
    float* position_rows = a.pos ? positions.take(a.heads * s.positions * s.row) : nullptr;
    if (a.pos) pack_positions<T>(a, s, false, position_panels, position_rows);

    // a part is a run of utterances that share one sum of dpos, du and dv_bias; their number depends on the sizes alone
    int64_t parts = imin(a.batch, cdiv(32, a.heads)), each = cdiv(a.batch, parts);
    int64_t sums_size = (a.pos ? s.positions + kTileRows : 0) * s.row + 2 * s.row;
    int64_t thread_memory = Scratch::padded(Gradients::size(s));
    Scratch scratch(Scratch::padded(parts * a.heads * sums_size) + a.threads * thread_memory);
    float* sums = scratch.take(parts * a.heads * sums_size);
    float* memory = scratch.take(a.threads * thread_memory);
#pragma omp parallel num_threads(a.threads)
    {
        Gradients g(memory + thread_number() * thread_memory, s);
#pragma omp for schedule(dynamic)
        for (int64_t unit = 0; unit < parts * a.heads; unit++) {
            int64_t h = unit % a.heads, part = unit / a.heads;
            float *du = sums + unit * sums_size, *dv_bias = du + s.row, *dpos = dv_bias + s.row;
            for (int64_t b = part * each; b < imin((part + 1) * each, a.batch); b++) {
                Utterance at(a, b);
                pack_panels(at.head<T>(a.k, h), a.k.frame_stride, at.keys, 0, s, g.key_panels);
                pack_panels(at.head<T>(a.v, h), a.v.frame_stride, at.keys, 0, s, g.value_panels);
                pack_rows(at.head<T>(a.k, h), a.k.frame_stride, at.keys, s, g.key_rows);
                memset(g.dk, 0, s.keys * s.row * sizeof(float));
                memset(g.dv, 0, s.keys * s.row * sizeof(float));
                for (int64_t i0 = 0; i0 < at.queries; i0 += M)
                    backward_block<T>(a, s, at, h, i0, g, a.pos ? position_panels + h * s.positions * s.D : nullptr,
                                      a.pos ? position_rows + h * s.positions * s.row : nullptr, dpos, du, dv_bias);
                store_head<T>(a, s, at, h, g.dk, kLn2, a.dk);
                store_head<T>(a, s, at, h, g.dv, 1.0f, a.dv);
            }
        }
    }
    if (!a.pos) return;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t row = -2; row < 2 * s.T - 1; row++) {
        for (int64_t h = 0; h < a.heads; h++) {
            float* out = (row == -2 ? a.du : row == -1 ? a.dv_bias : a.dpos + row * a.heads * s.D) + h * s.D;
            int64_t from = row < 0 ? row + 2 : 2 + s.shift + row;
            for (int64_t d = 0; d < s.D; d += W) {
                vec total = {};
                for (int64_t part = 0; part < parts; part++)
                    total += load(sums + (part * a.heads + h) * sums_size + from * s.row + d);
                store_at(out, row < 0 ? total : total * kLn2, d, s.D);
            }
        }
    }
}

}  // namespace

void relpos_attention_forward(const RelposAttentionForward& a) {
    if (a.element == Element::float32) forward<float, float>(a);
    else a.products == Element::float32 ? forward<bf16, float>(a) : forward<bf16, bf16>(a);
}
void relpos_attention_backward(const RelposAttentionBackward& a) {
    a.element == Element::bfloat16 ? backward<bf16>(a) : backward<float>(a);
}
void relpos_attention_pack_positions(const RelposAttentionPackPositions& a) {
    bool wide = a.element == Element::float32;
    if (a.products == Element::float32) wide ? pack_positions<float, float>(a) : pack_positions<bf16, float>(a);
    else wide ? pack_positions<float, bf16>(a) : pack_positions<bf16, bf16>(a);
}
int64_t relpos_attention_position_size(Element products, int64_t frames, int64_t head_dim) {
    Sizes s(frames, head_dim);
    return s.positions * (products == Element::float32 ? depth<float>(s) : depth<bf16>(s));
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
