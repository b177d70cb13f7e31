// Asynchronous copies to shared memory, 8 x 8 matrices from it, and products of tensor cores, from sm_80 on.
#pragma once

#include "cuda/common.cuh"

#ifdef LCC_EMULATION
#include "emulation/tensor_cores.h"
#else

namespace lcc {

// Sixteen bytes to the i-th float of `to`, on their way until wait_for_copies; zeros instead if they are not `there`.
// Both addresses are multiples of 16; nothing is read from `from` if they are not.
__device__ inline void copy_async(const Shared& to, int i, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address(i)),
                 "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0));
}
// closes the group of this thread's copies so far
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
// until all but the last kPending groups of this thread are there; a barrier shows them to the other threads
template <int kPending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits; lane 8 k + r says by i where row r of matrix k is. Lane 4 r + c gets
// elements 2 c and 2 c + 1 of row r, or kTransposed of column r; matrix k in out[k].
template <bool kTransposed>
__device__ inline void load_matrices(uint32_t (&out)[4], const Shared& from, int i) {
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(from.address(i)));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(from.address(i)));
    }
}

// two elements of T in a register
template <class T>
__device__ inline uint32_t pack(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, __half>) {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    }
    return bits;
}

// c [16, 8] += a [16, 16] b [16, 8]. Lane 4 r + q has, two elements of T a register: of a, columns 2 q ... of rows r, r
// + 8, and columns 2 q + 8 ... of both; of b, rows 2 q ... and 2 q + 8 ... of column r; of c, columns 2 q, 2 q + 1 of
// rows r and r + 8.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace lcc
#endif
