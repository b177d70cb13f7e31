// What the CPU part offers to Python: csrc/bindings.cpp makes the submodule `_C.cpu`, bind_cpu fills it.
#pragma once

#include <pybind11/pybind11.h>

namespace lcc {

void bind_cpu(pybind11::module_& m);

}  // namespace lcc
