#include "cpu/bindings.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lcc {
namespace {

// the best level this processor runs of those csrc/cpu/simd is compiled for
const char* simd_level() {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return "avx512";
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
#endif
    return "generic";
}

int max_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

}  // namespace

void bind_cpu(pybind11::module_& m) {
    m.def("simd_level", &simd_level, "Instruction set the kernels use on this processor.");
    m.def("max_threads", &max_threads, "Threads an OpenMP region started now would get.");
}

}  // namespace lcc
