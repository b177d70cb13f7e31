#pragma once

#include "../pool.h"
#include "threads.h"

namespace lcc::cpu {
namespace LCC_SIMD {

// f(slot, i) for i = 0 ... n-1, on the threads of pool.h (`own`) or on those of OpenMP. PyTorch's operators run on
// OpenMP's, which go on spinning for a while: a kernel between two such operators takes the same, for others would not
// get the core.
template <class F>
static inline void parallel_for(int threads, bool own, int64_t n, const F& f) {
    if (own) {
        auto chunk = [](const void* context, int slot, int64_t i) { (*static_cast<const F*>(context))(slot, i); };
        run_chunks(threads, n, chunk, &f);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < n; i++) f(thread_number(), i);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
