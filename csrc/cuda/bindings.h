// What the CUDA part offers to Python: csrc/bindings.cpp makes the submodule `_C.cuda`, bind fills it.
#pragma once

#include <pybind11/pybind11.h>

namespace lcc::cuda {

void bind(pybind11::module_& m);

}  // namespace lcc::cuda
