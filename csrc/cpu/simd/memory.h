// Scratch memory of a kernel, see workspace.h: aligned, given back at the end of the scope. Made outside of parallel
// regions, which no exception may leave.
#pragma once

#include "../workspace.h"
#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {

enum class Fill : int { zeros, anything };

class Scratch {
   public:
    explicit Scratch(int64_t floats, Fill fill = Fill::zeros) {
        int64_t bytes = round_up(imax(floats, 1) * 4, 64);
        block_ = take_block(bytes);
        if (fill == Fill::zeros) memset(block_.data, 0, bytes);
    }
    ~Scratch() { give_back(block_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // the next `floats` of it, from a fresh cache line on
    float* take(int64_t floats) {
        float* part = static_cast<float*>(block_.data) + used_;
        used_ += padded(floats);
        return part;
    }
    static int64_t padded(int64_t floats) { return round_up(floats, 16); }

   private:
    Block block_;
    int64_t used_ = 0;
};

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
