// lcconformer._C. Kernels take structs of raw pointers as integers, sizes and strides in elements: no torch headers, so
// the build needs no torch and the module serves every torch version.

#include <pybind11/pybind11.h>

#include "arguments.h"
#include "build_info.h"
#include "cpu/bindings.h"
#ifdef LCC_CUDA
#include "cuda/bindings.h"
#endif

PYBIND11_MODULE(_C, m) {
    m.doc() = "Compiled kernels of lcconformer; called through lcconformer.ops.";
    m.attr("build_info") = LCC_BUILD_INFO;  // JSON, see lcconformer/extension.py
    m.attr("interface") = lcc::kInterface;
    lcc::bind_element(m);
    auto cpu = m.def_submodule("cpu", "C++ kernels for CPUs.");
    cpu.attr("Element") = m.attr("Element");
    lcc::cpu::bind(cpu);
#ifdef LCC_CUDA
    auto cuda = m.def_submodule("cuda", "CUDA kernels.");
    cuda.attr("Element") = m.attr("Element");
    lcc::cuda::bind(cuda);
#endif
}
