// The dtypes of big tensors.
#pragma once

namespace lcc {

enum class Element : int { float32, float16, bfloat16 };

}  // namespace lcc
