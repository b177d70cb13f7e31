// What the CUDA part offers to Python: csrc/bindings.cpp makes the submodule `_C.cuda`, bind_cuda fills it.
#pragma once

#include <pybind11/pybind11.h>

namespace lcc {

void bind_cuda(pybind11::module_& m);

}  // namespace lcc
