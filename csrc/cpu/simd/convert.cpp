// Copies between float32 and bfloat16 on the threads of pool.h. PyTorch's copies would run on OpenMP's, which go on
// spinning for some milliseconds on the cores that the kernels after them need.
#include "../kernels.h"
#include "parallel.h"
#include "vec.h"

namespace lcc::cpu {
namespace LCC_SIMD {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements: some microseconds

template <class From, class To>
void convert(const Convert& a) {
    const From* from = static_cast<const From*>(a.from);
    To* to = static_cast<To*>(a.to);
    parallel_for(a.threads, true, cdiv(a.size, kChunk), [&](int, int64_t chunk) {
        int64_t end = imin((chunk + 1) * kChunk, a.size);
        for (int64_t i = chunk * kChunk; i < end; i += W) store_at(to, load_at(from, i, end), i, end);
    });
}

}  // namespace

void convert(const Convert& a) {
    bool wide = a.element == Element::float32;
    if (a.to_element == Element::float32) wide ? convert<float, float>(a) : convert<bf16, float>(a);
    else wide ? convert<float, bf16>(a) : convert<bf16, bf16>(a);
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
