// The launchers of _C.cuda, running on the CPU: same names, same arguments, host pointers. Built by tests/extension.
#include "arguments.h"
#include "cuda/bindings.h"
#include "emulation/scheduler.h"

PYBIND11_MODULE(emulated, m) {
    lcc::bind_element(m);
    lcc::cuda::bind(m);
    m.def("set_seed", [](unsigned seed) { emulation::seed() = seed; }, "Choose the schedule of the launches to come.");
}
