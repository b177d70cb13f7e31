// Products of a warpgroup, four warps that follow one another, on sm_90a alone: they are on their way while the threads
// go on, and take their right factor from shared memory, where its rows are swizzled.
#pragma once

#include "cuda/tensor_cores.cuh"

namespace lcc {

constexpr int kWarpgroup = 4 * kWarp;

// A matrix of `kRows` rows and `kColumns` columns of 16 bits in shared memory, as products take it: panels of 64
// columns, or of 32, one behind the other, each with its rows one behind the other. The sixteen bytes of a row are
// permuted by the number of the 128 bytes that they are in, so that those of eight rows are in different banks. It
// starts at a multiple of 1024 bytes.
template <int kRows, int kColumns>
struct Swizzled {
    static constexpr int kPanel = kColumns % 64 == 0 ? 64 : 32;  // columns
    static constexpr int kLine = kPanel / 2;                     // floats of a row of a panel
    static constexpr int kFloats = kRows * kColumns / 2;
    static_assert(kRows % 8 == 0 && kColumns % kPanel == 0, "whole panels of whole swizzles");

    // the float at which columns 8 * eight ... 8 * eight + 7 of a row start
    __host__ __device__ static constexpr int at(int row, int eight) {
        const int line = eight / (kPanel / 8) * kRows + row;
        return line * kLine + (eight % (kPanel / 8) ^ line * kLine / 32 % (kPanel / 8)) * 4;
    }
    // The matrix in `memory` from float `first` on, for products: where it starts, the distances of panels and of eight
    // rows, and its swizzle, as the PTX manual packs them.
    __device__ static uint64_t factor(const Shared& memory, int first) {
        constexpr uint64_t kPanels = kRows * kLine / 4, kEights = 8 * kLine / 4, kSwizzle = kPanel == 64 ? 1 : 2;
        return kSwizzle << 62 | kEights << 32 | kPanels << 16 | (memory.address(first) >> 4 & 0x3FFF);
    }
    // what to add to it for columns from 16 * k on, and for rows from 16 * k on
    __device__ static constexpr int columns_from(int k) {
        return 16 * k / kPanel * (kRows * kLine / 4) + 16 * k % kPanel / 8;
    }
    __device__ static constexpr int rows_from(int k) { return 16 * k * kLine / 4; }
};

}  // namespace lcc

#ifdef LCC_EMULATION
#include "emulation/warpgroup.h"
#else

namespace lcc {

// What this thread has stored to shared memory, or copied there and waited for, products may read from now on; those of
// other threads behind a barrier.
__device__ inline void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// between the last use of registers and the products that they take part in
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// closes the group of the products so far
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// the values of registers are not needed before this, nor known
template <int N>
__device__ inline void keep_behind(float (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
    }
}
// until all but the last kPending groups are done; `results` are those of the others
template <int kPending, class... Results>
__device__ inline void wait_for_products(Results&... results) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    (keep_behind(results), ...);
}

// the registers of a sum of so many columns, as names and as operands
#define LCC_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LCC_NAMES_64 LCC_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LCC_NAMES_96 LCC_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define LCC_NAMES_128 LCC_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LCC_FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define LCC_SUMS_32 LCC_FOUR(0), LCC_FOUR(1), LCC_FOUR(2), LCC_FOUR(3)
#define LCC_SUMS_64 LCC_SUMS_32, LCC_FOUR(4), LCC_FOUR(5), LCC_FOUR(6), LCC_FOUR(7)
#define LCC_SUMS_96 LCC_SUMS_64, LCC_FOUR(8), LCC_FOUR(9), LCC_FOUR(10), LCC_FOUR(11)
#define LCC_SUMS_128 LCC_SUMS_96, LCC_FOUR(12), LCC_FOUR(13), LCC_FOUR(14), LCC_FOUR(15)
#define LCC_PRODUCT(columns, type, factors, adds, order, ...)                                                   \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " adds                                                 \
                 ", 0;\n"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" LCC_NAMES_##columns \
                 "}, " factors ", adds, 1, 1, " order ";\n}"                                                    \
                 : LCC_SUMS_##columns                                                                           \
                 : __VA_ARGS__)
#define LCC_PRODUCT_OF(T, columns, factors, adds, order, ...)            \
    if constexpr (std::is_same_v<T, __half>) {                           \
        LCC_PRODUCT(columns, "f16", factors, adds, order, __VA_ARGS__);  \
    } else {                                                             \
        LCC_PRODUCT(columns, "bf16", factors, adds, order, __VA_ARGS__); \
    }
#define LCC_FROM_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd), "n"(kTransposed)

// c [64, N] += a [64, 16] b [16, N], or = without kAdd, for a warpgroup; warp w of it has rows 16 w ... 16 w + 15 of a
// and c, in registers as multiply_add has them. b is a factor in shared memory: its columns are rows of the matrix
// there or, kTransposed, its rows are.
template <class T, int N, bool kTransposed, bool kAdd>
__device__ inline void multiply_add_async(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 32 || N == 64 || N == 96 || N == 128, "columns");
    if constexpr (N == 32) {
        LCC_PRODUCT_OF(T, 32, "{%16, %17, %18, %19}, %20", "%21", "%22", LCC_FROM_REGISTERS)
    } else if constexpr (N == 64) {
        LCC_PRODUCT_OF(T, 64, "{%32, %33, %34, %35}, %36", "%37", "%38", LCC_FROM_REGISTERS)
    } else if constexpr (N == 96) {
        LCC_PRODUCT_OF(T, 96, "{%48, %49, %50, %51}, %52", "%53", "%54", LCC_FROM_REGISTERS)
    } else {
        LCC_PRODUCT_OF(T, 128, "{%64, %65, %66, %67}, %68", "%69", "%70", LCC_FROM_REGISTERS)
    }
}
// the same with a in shared memory, too, in the order of its rows
template <class T, int N, bool kTransposed, bool kAdd>
__device__ inline void multiply_add_async(float (&c)[N / 8][4], uint64_t a, uint64_t b) {
    static_assert(N == 64, "columns");
    LCC_PRODUCT_OF(T, 64, "%32, %33", "%34", "0, %35", "l"(a), "l"(b), "n"(kAdd), "n"(kTransposed))
}

#undef LCC_NAMES_32
#undef LCC_NAMES_64
#undef LCC_NAMES_96
#undef LCC_NAMES_128
#undef LCC_FOUR
#undef LCC_SUMS_32
#undef LCC_SUMS_64
#undef LCC_SUMS_96
#undef LCC_SUMS_128
#undef LCC_PRODUCT
#undef LCC_PRODUCT_OF
#undef LCC_FROM_REGISTERS

}  // namespace lcc
#endif
