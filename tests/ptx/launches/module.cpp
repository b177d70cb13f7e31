// The launchers of _C.cuda, which call `listener`, a function that Python puts into the module, with what they would
// launch.
#include <dlfcn.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "emulation/cuda_host.h"

namespace py = pybind11;

PYBIND11_MODULE(launches, m) {
    lcc::bind_element(m);
    lcc::cuda::bind(m);
    m.def("set_architecture", [](int of) { emulation::architecture() = of; });
    recording::listener() = [module = py::handle(m)](const recording::Launch& launch) {
        const py::gil_scoped_acquire python;  // the bindings launch without it
        Dl_info info{};
        dladdr(launch.kernel, &info);
        const auto offset = static_cast<const char*>(launch.kernel) - static_cast<const char*>(info.dli_fbase);
        py::list params;
        for (const auto& p : launch.params) params.append(py::bytes(reinterpret_cast<const char*>(p.data()), p.size()));
        const auto grid = py::make_tuple(launch.grid[0], launch.grid[1], launch.grid[2]);
        module.attr("listener")(offset, grid, launch.shared, params);
    };
}
