// The SIMD level of the kernels: the best one this processor runs, unless a test asks for another.
#include <cstring>

#include "cpu/kernels.h"

#define LCC_DECLARE_LEVEL(level)                       \
    namespace lcc {                                    \
    namespace level {                                  \
    void attention_forward(const Attention&);          \
    void attention_backward(const Attention&);         \
    int64_t position_floats(int64_t, int64_t);         \
    void pack_positions(const Attention&);             \
    void conv_forward(const Conv&);                    \
    void conv_backward(const Conv&);                   \
    void layer_norm_forward(const LayerNorm&);         \
    void layer_norm_backward(const LayerNorm&);        \
    void activation_forward(const Pointwise&);         \
    void activation_backward(const Pointwise&);        \
    void residual_forward(const Pointwise&);           \
    void residual_backward(const Pointwise&);          \
    void rows_forward(const Rows&);                    \
    }                                                  \
    }

LCC_DECLARE_LEVEL(generic)
#if defined(__x86_64__)
LCC_DECLARE_LEVEL(avx2)
LCC_DECLARE_LEVEL(avx512)
#endif

namespace lcc {
namespace {

#define LCC_KERNELS_OF(level)                                                                        \
    {level::attention_forward,  level::attention_backward,  level::position_floats,                  \
     level::pack_positions,     level::conv_forward,        level::conv_backward,                    \
     level::layer_norm_forward, level::layer_norm_backward, level::activation_forward,               \
     level::activation_backward, level::residual_forward,   level::residual_backward,                \
     level::rows_forward}

struct Level {
    const char* name;
    bool (*runs)();
    Kernels kernels;
};

// best first
const Level levels[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     },
     LCC_KERNELS_OF(avx512)},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, LCC_KERNELS_OF(avx2)},
#endif
    {"generic", [] { return true; }, LCC_KERNELS_OF(generic)},
};

const Level* find(const char* name) {
    for (const Level& level : levels)
        if (level.runs() && (name == nullptr || std::strcmp(level.name, name) == 0)) return &level;
    return nullptr;
}

const Level*& current() {
    static const Level* level = find(nullptr);
    return level;
}

}  // namespace

const Kernels& kernels() { return current()->kernels; }
const char* simd_level() { return current()->name; }
bool has_simd_level(const char* name) { return find(name) != nullptr; }

bool use_simd_level(const char* name) {
    const Level* level = find(name);
    if (level != nullptr) current() = level;
    return level != nullptr;
}

}  // namespace lcc
