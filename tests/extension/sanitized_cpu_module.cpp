// The CPU part of _C alone, for a build under sanitizers.
#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cpu/bindings.h"

PYBIND11_MODULE(_C, m) {
    m.attr("build_info") = "{}";
    m.attr("interface") = lcc::kInterface;
    auto cpu = m.def_submodule("cpu");
    lcc::bind_element(cpu);
    lcc::cpu::bind(cpu);
}
