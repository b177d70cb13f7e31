#pragma once

#include "../pool.h"

namespace lcc::cpu {
namespace LCC_SIMD {

// f(slot, i) for i = 0 ... n-1 on the threads of pool.h. What runs between PyTorch's own operators, on the threads of
// OpenMP that they share with us, takes those instead.
template <class F>
static inline void parallel_for(int threads, int64_t n, const F& f) {
    run_chunks(
        threads, n, [](const void* context, int slot, int64_t i) { (*static_cast<const F*>(context))(slot, i); }, &f);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
