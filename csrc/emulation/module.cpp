// The launchers of _C.cuda, running on the CPU: same names, same arguments, host pointers. Built by tests/extension.
#include "arguments.h"
#include "cuda/bindings.h"
#include "cuda/common.cuh"

PYBIND11_MODULE(emulated, m) {
    lcc::bind_element(m);
    lcc::cuda::bind(m);
    m.def("count_traffic", [] { emulation::traffic() = {true}; }, "Count accesses to shared memory from here on.");
    m.def(
        "traffic", [] { return std::make_pair(emulation::traffic().wavefronts, emulation::traffic().conflicts); },
        "Wavefronts and bank conflicts of the worst blocks since count_traffic.");
    m.def("set_device", [](int device) { lcc::check(cudaSetDevice(device), "set_device"); });
    m.def(
        "devices", [] { return std::make_pair(emulation::device(), emulation::launched_on()); },
        "The current device, and that of the last launch.");
    m.def(
        "set_architecture", [](int of) { emulation::architecture() = of; }, "Choose the devices' kind: 90 for sm_90.");
    m.def("set_seed", [](unsigned seed) { emulation::seed() = seed; }, "Choose the schedule of the launches to come.");
}
