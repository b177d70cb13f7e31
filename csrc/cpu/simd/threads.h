#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace lcc::cpu {
namespace LCC_SIMD {

static inline int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
