// The chain of norms and matrix products that a layer runs on each row between attention and convolution, for
// inference.
//
// A thread takes a block of rows through the whole chain: hidden activations never leave its cache, and weights, packed
// in panels of 64 columns, come from the outer cache once per block. The products are those of product.h: 115 GFLOP/s
// on one core of an EPYC 9004 at 3.7 GHz (peak 118), where oneDNN reaches 95 to 105 on packed weights and MKL 70 to 90.
#include "../kernels.h"
#include "activation.h"
#include "memory.h"
#include "parallel.h"
#include "product.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int64_t kBlockRows = 96;  // rows: their buffers fit the second-level cache beside a panel
static_assert(kBlockRows % kTileRows == 0 && kPanelColumns % (kTileColumns * W) == 0, "blocks are made of whole tiles");

struct Bytes {  // [rows, row], a scale for each row
    uint8_t* data;
    int64_t row;
    float* scales;
};

// a [rows, depth] in 8 bits, each row by its largest magnitude; whole registers are written. A value that is not finite
// makes its row's scale, and so its row of the product, NaN.
template <class T>
LeftQuads quantize(Bytes to, int64_t rows, const T* a, int64_t a_row, int64_t depth) {
    constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: the integer nearest to y is in the low bits of y + it
    uint8_t* bytes = to.data;
    for (int64_t i = 0; i < rows; i++, a += a_row, bytes += to.row) {
        vec largest = {}, wrong = {};
        for (int64_t d = 0; d < depth; d += W) {
            vec x = load_at(a, d, depth);
            largest = max(largest, x < 0.0f ? -x : x);
            wrong += x - x;
        }
        float most = max(largest);
        to.scales[i] = most / 127.0f + sum(wrong);
        float inverse = most > 1e-30f ? 127.0f / most : 0.0f;
        for (int64_t d = 0; d < depth; d += W) {
            vec y = load_at(a, d, depth) * inverse + kToInteger;
            store(bytes + d, (ivec)y + 128);
        }
    }
    return {to.data, to.row, to.scales};
}

// The product of P, the elements of the matrices: the elements that inputs are kept in, and its operands. Those of 8
// bits are made of others, in memory of their own.
template <class P>
struct Product;

template <>
struct Product<float> {
    using Input = float;
    static Left operand(Bytes, int64_t, const float* a, int64_t a_row, int64_t) { return left(a, a_row); }
    static Right right(const Matrix&, int64_t, int64_t, const float* panel) { return {panel, kPanelColumns, W}; }
};

template <>
struct Product<bf16> {
    using Input = bf16;
    static LeftPairs operand(Bytes, int64_t, const bf16* a, int64_t a_row, int64_t) { return left(a, a_row); }
    static RightPairs right(const Matrix&, int64_t, int64_t, const bf16* panel) {
        return {panel, 2 * kPanelColumns, 2 * W};
    }
};

template <>
struct Product<int8_t> {
    using Input = float;
    template <class T>
    static LeftQuads operand(Bytes to, int64_t rows, const T* a, int64_t a_row, int64_t depth) {
        return quantize(to, rows, a, a_row, depth);
    }
    static RightQuads right(const Matrix& w, int64_t from, int64_t column, const int8_t* panel) {
        const int32_t* starts = w.starts + from / kHiddenColumns * round_up(w.columns, kPanelColumns);
        return {panel, 4 * kPanelColumns, 4 * W, w.scales + column, starts + column};
    }
};

template <class P>
const P* panel_of(const Matrix& w, int64_t from, int64_t column) {
    return static_cast<const P*>(w.panels) + column * round_up(w.inputs, kStep<P>) + from * kPanelColumns;
}

// the inputs from ... from+depth-1 of the panel that begins with a column
template <class P>
Ahead ahead_of(const Matrix& w, int64_t from, int64_t depth, int64_t column) {
    if (!w.panels) return {};
    int64_t size = round_up(depth, kStep<P>) * kPanelColumns * (int64_t)sizeof(P);
    return {reinterpret_cast<const char*>(panel_of<P>(w, from, column)), size};
}

// y [rows, columns first ... first+n-1] = a [rows, depth] w[inputs from ... from+depth-1] + addend; `after`: what the
// product after this one starts with
template <class P, class L, class Out>
void multiply(const Matrix& w, int64_t rows, L a, int64_t from, int64_t depth, int64_t first, int64_t n, Addend addend,
              Out* y, int64_t y_row, Ahead after) {
    for (int64_t c = 0; c < n; c += kPanelColumns) {
        Addend more = {addend.data ? addend.data + c : nullptr, addend.row};
        Ahead next = c + kPanelColumns < n ? ahead_of<P>(w, from, depth, first + c + kPanelColumns) : after;
        product(rows, cdiv(imin(kPanelColumns, n - c), W), cdiv(depth, kStep<P>), a,
                Product<P>::right(w, from, first + c, panel_of<P>(w, from, first + c)), more, y + c, y_row, next);
    }
}

Addend bias_of(const Matrix& w, int64_t first = 0) { return {w.bias + first, 0}; }

// What a thread works in, for a block of rows. A pitch of `row` holds the columns; `sums` is one row.
template <class P>
struct Buffers {
    using Input = typename Product<P>::Input;
    Input *h, *hidden;              // [rows, row], [rows, kHiddenColumns]
    float *y, *u, *sums;            // [rows, row], [rows, kHiddenColumns], [row]
    Bytes bytes{}, hidden_bytes{};  // [rows, bytes_row], [rows, kHiddenColumns], of int8 matrices
    int64_t row;

    // floats of one thread
    static int64_t size(int64_t rows, int64_t row, int64_t bytes_row) {
        int64_t wide = rows * (row + kHiddenColumns);
        int64_t in_bytes = kInBytes ? rows * (2 + (bytes_row + kHiddenColumns) / 4) : 0;
        return wide + row + Scratch::padded(wide * sizeof(Input) / sizeof(float)) + in_bytes;
    }
    Buffers(float* memory, int64_t rows, int64_t row, int64_t bytes_row)
        : y(memory), u(y + rows * row), sums(u + rows * kHiddenColumns), row(row) {
        float* next = sums + row;
        h = reinterpret_cast<Input*>(next);
        hidden = h + rows * row;
        if constexpr (sizeof(Input) == sizeof(float)) hidden = u;  // in place: it is all to stay in cache
        if constexpr (kInBytes) {
            float* scales = next + rows * row;
            uint8_t* data = reinterpret_cast<uint8_t*>(scales + 2 * rows);
            bytes = {data, bytes_row, scales};
            hidden_bytes = {data + rows * bytes_row, kHiddenColumns, scales + rows};
        }
    }

   private:
    static constexpr bool kInBytes = sizeof(P) == 1;
};

// x += y (null: nothing), h = LN(x), or x without a norm; y has a pitch of `row`, h of h_row with `width` columns
// written
template <class Out>
void add_and_normalise(const RowsForward& a, const Affine& norm, int64_t rows, float* x, const float* y, int64_t row,
                       float* s, Out* h, int64_t h_row, int64_t width) {
    for (int64_t i = 0; i < rows; i++, x += a.columns, h += h_row) {
        vec sums = {}, squares = {};
        for (int64_t d = 0; d < a.columns; d += W) {
            vec value = load_at(x, d, a.columns);
            if (y) {
                value += load(y + i * row + d);
                store_at(x, value, d, a.columns);
            }
            store(s + d, value);
            sums += value;
        }
        float mean = 0.0f, rstd = 1.0f;
        if (norm.weight) {
            mean = sum(sums) / a.columns;
            for (int64_t d = 0; d < a.columns; d += W) {
                vec centred = first_lanes(load(s + d) - mean, a.columns - d);
                squares += centred * centred;
            }
            rstd = reciprocal_deviation(sum(squares) / a.columns, a.eps);
        }
        for (int64_t d = 0; d < a.columns; d += W) {
            vec value = load(s + d);
            if (norm.weight)
                value = (value - mean) * rstd * load_at(norm.weight, d, a.columns) + load_at(norm.bias, d, a.columns);
            store_at(h, value, d, width);
        }
    }
}

// y = down(act(up(h)))
template <class P>
void feed_forward(const RowsForward& a, int64_t rows, const Buffers<P>& b) {
    auto h = Product<P>::operand(b.bytes, rows, b.h, b.row, a.columns);
    for (int64_t f = 0; f < a.up.columns; f += kHiddenColumns) {
        int64_t n = imin(kHiddenColumns, a.up.columns - f);
        multiply<P>(a.up, rows, h, 0, a.columns, f, n, bias_of(a.up, f), b.u, kHiddenColumns,
                    ahead_of<P>(a.down, f, n, 0));
        for (int64_t i = 0; i < rows; i++)
            for (int64_t c = i * kHiddenColumns; c < i * kHiddenColumns + n; c += W)
                store(b.hidden + c, activate(a.activation, load(b.u + c)));
        Addend before = f ? Addend{b.y, b.row} : bias_of(a.down);
        bool more = f + n < a.up.columns;
        multiply<P>(a.down, rows, Product<P>::operand(b.hidden_bytes, rows, b.hidden, kHiddenColumns, n), f, n, 0,
                    a.columns, before, b.y, b.row, ahead_of<P>(more ? a.up : a.next, 0, a.columns, more ? f + n : 0));
    }
}

template <class P, class T>
void block(const RowsForward& a, int64_t first, int64_t rows, const Buffers<P>& b) {
    float* x = a.x + first * a.columns;
    const float* pending = nullptr;  // a branch that is still to be added to x
    if (a.merge.panels) {
        int64_t inputs = a.merge.inputs;
        const T* branch = static_cast<const T*>(a.branch) + first * inputs;
        multiply<P>(a.merge, rows, Product<P>::operand(b.bytes, rows, branch, inputs, inputs), 0, inputs, 0, a.columns,
                    bias_of(a.merge), b.y, b.row, ahead_of<P>(a.up.panels ? a.up : a.next, 0, a.columns, 0));
        pending = b.y;
    }
    if (a.up.panels) {
        add_and_normalise(a, a.hidden_norm, rows, x, pending, b.row, b.sums, b.h, b.row, b.row);
        feed_forward(a, rows, b);
        pending = b.y;
    }
    if (!a.next.panels) {
        add_and_normalise(a, a.norm, rows, x, pending, b.row, b.sums, x, a.columns, a.columns);
        return;
    }
    add_and_normalise(a, a.norm, rows, x, pending, b.row, b.sums, b.h, b.row, b.row);
    T* out = static_cast<T*>(a.out) + first * a.out_row_stride;
    multiply<P>(a.next, rows, Product<P>::operand(b.bytes, rows, b.h, b.row, a.columns), 0, a.columns, 0,
                a.next.columns, bias_of(a.next), out, a.out_row_stride, {});
}

template <class P, class T>
void forward(const RowsForward& a) {
    int64_t row = round_up(a.columns, kPanelColumns), tiles = cdiv(a.rows, kTileRows);
    int64_t bytes_row = round_up(imax(imax(row, kHiddenColumns), a.merge.panels ? a.merge.inputs : 0), kPanelColumns);
    // as many blocks for each thread, all of much the same size
    int64_t blocks = imin(tiles, round_up(cdiv(a.rows, kBlockRows), a.threads));
    int64_t most = cdiv(tiles, imax(1, blocks)) * kTileRows;
    int64_t thread_memory = Scratch::padded(Buffers<P>::size(most, row, bytes_row));
    Scratch scratch(a.threads * thread_memory, Fill::anything);
    float* memory = scratch.take(a.threads * thread_memory);
    parallel_for(a.threads, true, blocks, [&](int slot, int64_t b) {
        Buffers<P> buffers(memory + slot * thread_memory, most, row, bytes_row);
        int64_t first = b * tiles / blocks * kTileRows, end = imin((b + 1) * tiles / blocks * kTileRows, a.rows);
        block<P, T>(a, first, end - first, buffers);
    });
}

template <class T>
void forward_by_matrices(const RowsForward& a) {
    bool int8 = a.merge.scales || a.up.scales || a.down.scales || a.next.scales;
    int8 ? forward<int8_t, T>(a) : forward<T, T>(a);
}

}  // namespace

void rows_forward(const RowsForward& a) {
    a.element == Element::bfloat16 ? forward_by_matrices<bf16>(a) : forward_by_matrices<float>(a);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
