// One product of blocks that lie in the first-level cache, to time what the processor multiplies fastest.
#include "product.h"

namespace lcc::cpu {
namespace LCC_SIMD {

// c [48, 64] = a [48, 64] b [64, 64], in `memory` of kProductFloats
void product_in_cache(Element products, float* memory) {
    constexpr int64_t kRows = 48, kDepth = 64, kGroups = kPanelColumns / W;
    float *a = memory, *b = a + kRows * kDepth, *c = b + kDepth * kPanelColumns;
    static_assert(kRows * kDepth + kDepth * kPanelColumns + kRows * kPanelColumns <= kProductFloats, "all of it fits");
    Addend none = {nullptr, 0};
    if (products == Element::bfloat16) {
        RightPairs columns = {reinterpret_cast<const bf16*>(b), 2 * kPanelColumns, 2 * W};
        auto rows = left(reinterpret_cast<const bf16*>(a), kDepth);
        product(kRows, kGroups, kDepth / 2, rows, columns, none, c, kPanelColumns);
    } else {
        product(kRows, kGroups, kDepth, left(a, kDepth), Right{b, kPanelColumns, W}, none, c, kPanelColumns);
    }
}

}  // namespace LCC_SIMD
}  // namespace lcc::cpu
