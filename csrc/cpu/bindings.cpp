#include "cpu/bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "cpu/kernels.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace lcc {
namespace {

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

std::vector<std::string> simd_levels() {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "generic"})
        if (has_simd_level(name)) names.emplace_back(name);
    return names;
}

void set_simd_level(const std::string& name) {
    if (!use_simd_level(name.c_str())) throw py::value_error("this processor or build has no SIMD level " + name);
}

// Fills a struct of arguments from keywords: pointers and sizes as int, Heads as (pointer, stride_b, stride_t, stride_h),
// Dropout as (pointer to the seed, threshold, scale). What is not given stays zero.
class Reader {
   public:
    explicit Reader(const py::kwargs& fields) : fields_(fields) {}

    template <typename V>
    Reader& operator()(const char* name, V& value) {
        py::str key(name);
        if (fields_.contains(key)) {
            convert(fields_[key], value);
            used_++;
        }
        return *this;
    }

    void done() const {
        if (used_ != fields_.size()) throw py::type_error("the kernel does not know one of the arguments given");
    }

   private:
    template <typename V>
    static void convert(py::handle from, V*& value) {
        value = reinterpret_cast<V*>(from.cast<uintptr_t>());
    }
    template <typename V>
    static void convert(py::handle from, V& value) {
        value = from.cast<V>();
    }
    static void convert(py::handle from, Norm& value) { value = static_cast<Norm>(from.cast<int>()); }
    static void convert(py::handle from, Heads& value) {
        auto x = from.cast<std::array<int64_t, 4>>();
        value = {reinterpret_cast<void*>(x[0]), x[1], x[2], x[3]};
    }
    static void convert(py::handle from, Affine& value) {
        auto x = from.cast<std::array<uintptr_t, 2>>();
        value = {reinterpret_cast<const float*>(x[0]), reinterpret_cast<const float*>(x[1])};
    }
    static void convert(py::handle from, Matrix& value) {
        auto x = from.cast<std::array<int64_t, 4>>();
        value = {reinterpret_cast<const float*>(x[0]), reinterpret_cast<const float*>(x[1]), x[2], x[3]};
    }
    static void convert(py::handle from, Dropout& value) {
        py::tuple x = from.cast<py::tuple>();
        convert(x[0], value.seed);
        value.threshold = x[1].cast<uint32_t>();
        value.scale = x[2].cast<float>();
    }

    const py::kwargs& fields_;
    size_t used_ = 0;
};

#define LCC_FIELD(name) (#name, a.name)

void read(Reader r, Attention& a) {
    r LCC_FIELD(q) LCC_FIELD(k) LCC_FIELD(v) LCC_FIELD(pos) LCC_FIELD(pos_stride_t) LCC_FIELD(pos_stride_h)
        LCC_FIELD(pos_panels) LCC_FIELD(u) LCC_FIELD(v_bias) LCC_FIELD(lengths) LCC_FIELD(cu_seqlens) LCC_FIELD(out) LCC_FIELD(lse) LCC_FIELD(dropout)
        LCC_FIELD(B) LCC_FIELD(T) LCC_FIELD(H) LCC_FIELD(D) LCC_FIELD(rows) LCC_FIELD(bf16) LCC_FIELD(threads)
        LCC_FIELD(dout) LCC_FIELD(dq) LCC_FIELD(dk) LCC_FIELD(dv) LCC_FIELD(dpos) LCC_FIELD(du) LCC_FIELD(dv_bias).done();
}

void read(Reader r, Conv& a) {
    r LCC_FIELD(x) LCC_FIELD(x_stride_b) LCC_FIELD(x_stride_t) LCC_FIELD(taps) LCC_FIELD(bias) LCC_FIELD(lengths)
        LCC_FIELD(norm) LCC_FIELD(norm_weight) LCC_FIELD(norm_bias) LCC_FIELD(mean) LCC_FIELD(var) LCC_FIELD(count)
        LCC_FIELD(out) LCC_FIELD(y) LCC_FIELD(B) LCC_FIELD(T) LCC_FIELD(C) LCC_FIELD(K) LCC_FIELD(groups) LCC_FIELD(eps)
        LCC_FIELD(bf16) LCC_FIELD(threads) LCC_FIELD(dout) LCC_FIELD(dout_stride_b) LCC_FIELD(dout_stride_t)
        LCC_FIELD(dx) LCC_FIELD(dtaps) LCC_FIELD(dbias) LCC_FIELD(dnorm).done();
}

void read(Reader r, LayerNorm& a) {
    r LCC_FIELD(x) LCC_FIELD(y) LCC_FIELD(x_stride) LCC_FIELD(y_stride) LCC_FIELD(weight) LCC_FIELD(bias) LCC_FIELD(s)
        LCC_FIELD(n) LCC_FIELD(mean) LCC_FIELD(rstd) LCC_FIELD(alpha) LCC_FIELD(eps) LCC_FIELD(dropout) LCC_FIELD(M)
        LCC_FIELD(D) LCC_FIELD(bf16) LCC_FIELD(threads) LCC_FIELD(dn) LCC_FIELD(ds) LCC_FIELD(dn_stride)
        LCC_FIELD(ds_stride) LCC_FIELD(dx) LCC_FIELD(dy) LCC_FIELD(dparams).done();
}

void read(Reader r, Pointwise& a) {
    r LCC_FIELD(u) LCC_FIELD(x) LCC_FIELD(d) LCC_FIELD(x_stride) LCC_FIELD(d_stride) LCC_FIELD(bias) LCC_FIELD(out)
        LCC_FIELD(g) LCC_FIELD(dbias) LCC_FIELD(scale) LCC_FIELD(dropout) LCC_FIELD(stream) LCC_FIELD(M) LCC_FIELD(N)
        LCC_FIELD(bf16) LCC_FIELD(threads).done();
}

void read(Reader r, Rows& a) {
    r LCC_FIELD(x) LCC_FIELD(branch) LCC_FIELD(merge) LCC_FIELD(up) LCC_FIELD(down) LCC_FIELD(next) LCC_FIELD(hidden_norm)
        LCC_FIELD(norm) LCC_FIELD(out) LCC_FIELD(out_stride) LCC_FIELD(eps) LCC_FIELD(M) LCC_FIELD(D)
        LCC_FIELD(threads).done();
}

#undef LCC_FIELD

template <typename Arguments>
void bind(py::module_& m, const char* name, void (*const Kernels::*kernel)(const Arguments&)) {
    m.def(name, [kernel](const py::kwargs& fields) {
        Arguments a{};
        read(Reader(fields), a);
        py::gil_scoped_release release;
        (kernels().*kernel)(a);
    });
}

}  // namespace

void bind_cpu(py::module_& m) {
    m.def("simd_level", &simd_level, "Instruction set the kernels use on this processor.");
    m.def("simd_levels", &simd_levels, "Those it could use, best first.");
    m.def("set_simd_level", &set_simd_level, "Use another; for tests.");
    m.def("max_threads", &max_threads, "Threads an OpenMP region started now would get.");
    m.def(
        "fingerprint", [](uintptr_t parts, int64_t n) { return fingerprint(reinterpret_cast<const Bytes*>(parts), n); },
        "Of n pairs (pointer, bytes) of int64.");
    // arguments: the fields of the structs in csrc/cpu/kernels.h
    bind<Attention>(m, "attention_forward", &Kernels::attention_forward);
    bind<Attention>(m, "attention_backward", &Kernels::attention_backward);
    bind<Attention>(m, "pack_positions", &Kernels::pack_positions);
    m.def("position_floats", [](int64_t T, int64_t D) { return kernels().position_floats(T, D); });
    bind<Conv>(m, "conv_forward", &Kernels::conv_forward);
    bind<Conv>(m, "conv_backward", &Kernels::conv_backward);
    bind<LayerNorm>(m, "layer_norm_forward", &Kernels::layer_norm_forward);
    bind<LayerNorm>(m, "layer_norm_backward", &Kernels::layer_norm_backward);
    bind<Pointwise>(m, "activation_forward", &Kernels::activation_forward);
    bind<Pointwise>(m, "activation_backward", &Kernels::activation_backward);
    bind<Pointwise>(m, "residual_forward", &Kernels::residual_forward);
    bind<Pointwise>(m, "residual_backward", &Kernels::residual_backward);
    bind<Rows>(m, "rows_forward", &Kernels::rows_forward);
}

}  // namespace lcc
