// The SIMD level of the kernels: the best one this processor runs, unless a test asks for another.
#include <chrono>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

#define LCC_DECLARE(kernel, Arguments) void kernel(const Arguments&);
#define LCC_DECLARE_LEVEL(level)                                       \
    namespace lcc::cpu {                                               \
    namespace level {                                                  \
    LCC_KERNELS(LCC_DECLARE)                                           \
    int64_t relpos_attention_position_size(Element, int64_t, int64_t); \
    void product_in_cache(Element, float*);                            \
    }                                                                  \
    }

LCC_DECLARE_LEVEL(generic)
#if defined(__x86_64__)
LCC_DECLARE_LEVEL(avx2)
LCC_DECLARE_LEVEL(avx512)
LCC_DECLARE_LEVEL(avx512bf16)
#endif

namespace lcc::cpu {
namespace {

struct Level {
    const char* name;
    bool (*runs)();
    Kernels kernels;
};

#define LCC_NAME(kernel, Arguments) kernel,
// the functions of a level in the order of Kernels
#define LCC_TABLE(level)                                     \
    Kernels table_of_##level() {                             \
        using namespace level;                               \
        return {                                             \
            LCC_KERNELS(LCC_NAME)                            \
            relpos_attention_position_size, product_in_cache \
        };                                                   \
    }

LCC_TABLE(generic)
#if defined(__x86_64__)
LCC_TABLE(avx2)
LCC_TABLE(avx512)
LCC_TABLE(avx512bf16)
#endif

#if defined(__x86_64__)
bool runs_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool runs_avx512bf16() {
    return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
#endif

// best first
const Level levels[] = {
#if defined(__x86_64__)
    {"avx512bf16", runs_avx512bf16, table_of_avx512bf16()},
    {"avx512", runs_avx512, table_of_avx512()},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, table_of_avx2()},
#endif
    {"generic", [] { return true; }, table_of_generic()},
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

// the shortest of 64 times: what else runs on the core does not count
double seconds_of_product(const Kernels& kernels, Element products, float* memory) {
    double best = INFINITY;
    for (int i = 0; i < 64; i++) {
        const auto start = std::chrono::steady_clock::now();
        kernels.product_in_cache(products, memory);
        const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
        best = std::fmin(best, spent.count());
    }
    return best;
}

}  // namespace

double bfloat16_gain() {
    static const double gain = [] {
        std::vector<float> memory(kProductFloats);
        const Kernels& best = find(nullptr)->kernels;
        const double in_float32 = seconds_of_product(best, Element::float32, memory.data());
        return in_float32 / seconds_of_product(best, Element::bfloat16, memory.data());
    }();
    return gain;
}

const Kernels& kernels() { return current()->kernels; }
const char* simd_level() { return current()->name; }
bool has_simd_level(const char* name) { return find(name) != nullptr; }

bool use_simd_level(const char* name) {
    const Level* level = find(name);
    if (level != nullptr) current() = level;
    return level != nullptr;
}

Dropout make_dropout(const int64_t* seed, double p) {
    constexpr double kLevels = 1 << 16;
    double threshold = std::fmin(std::nearbyint(p * kLevels), kLevels - 1);
    return {seed, static_cast<uint32_t>(threshold), static_cast<float>(kLevels / (kLevels - threshold))};
}

}  // namespace lcc::cpu
