// What the CPU part offers to Python: csrc/bindings.cpp makes the submodule `_C.cpu`, bind fills it.
#pragma once

#include <pybind11/pybind11.h>

namespace lcc::cpu {

void bind(pybind11::module_& m);

}  // namespace lcc::cpu
