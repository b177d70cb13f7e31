// Scratch memory of a kernel: aligned, zeroed, freed at the end of the scope. Made outside of parallel regions, which
// no exception may leave.
#pragma once

#include <stdlib.h>

#include <new>

#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {

class Scratch {
   public:
    explicit Scratch(int64_t floats) : bytes_(round_up(imax(floats, 1) * 4, 64)) {
        if (posix_memalign(&data_, 64, bytes_) != 0) throw std::bad_alloc();
        memset(data_, 0, bytes_);
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // the next `floats` of it, from a fresh cache line on
    float* take(int64_t floats) {
        float* part = static_cast<float*>(data_) + used_;
        used_ += padded(floats);
        return part;
    }
    static int64_t padded(int64_t floats) { return round_up(floats, 16); }

   private:
    void* data_ = nullptr;
    int64_t bytes_, used_ = 0;
};

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
