// What the CUDA kernels share: launching, shared memory, element types.
//
// Kernels include this and nothing of CUDA itself. nvcc compiles them for GPUs; with LCC_EMULATION a C++ compiler
// compiles the same text against emulation/cuda_host.h and runs it on the CPU, which is why launches and shared memory
// go through the names below instead of <<<>>> and __shared__.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef LCC_EMULATION
#include "emulation/cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// a static array in shared memory: LCC_SHARED(float, partial, 256);
#define LCC_SHARED(type, name, count) __shared__ type name[count]

namespace lcc {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<grid, block, shared, stream>>>(args...) on `device`, with an error instead of a silent nothing
template <class... Params>
void launch(const char* name, int device, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
            uintptr_t stream, Params... args) {
    check(cudaSetDevice(device), name);
    if (shared > (48u << 10)) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              name);
    }
    kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
    check(cudaGetLastError(), name);
}

// Hands out the block's dynamic shared memory piece by piece; every thread takes the same pieces in the same order.
class SharedMemory {
   public:
    template <class T>
    __device__ T* take(int count) {
        extern __shared__ __align__(16) unsigned char memory[];
        T* piece = reinterpret_cast<T*>(memory + used_);
        used_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        return piece;
    }

   private:
    int used_ = 0;
};

}  // namespace lcc
#endif

namespace lcc {

constexpr int kWarp = 32;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(__half& to, float x) { to = __float2half_rn(x); }
__device__ inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

// channels c, c + 1 of a row of `channels`; zero where there is none. `paired`: the row allows loads of two.
template <class T>
__device__ inline float2 load_pair(const T* row, int c, int channels, bool paired) {
    if (paired && c + 1 < channels) {
        const auto pair = *reinterpret_cast<const Pair<T>*>(row + c);
        return make_float2(to_float(pair.x), to_float(pair.y));
    }
    return make_float2(c < channels ? to_float(row[c]) : 0.0f, c + 1 < channels ? to_float(row[c + 1]) : 0.0f);
}

template <class T>
__device__ inline void store_pair(T* row, int c, int channels, bool paired, float2 value) {
    if (paired && c + 1 < channels) {
        Pair<T> pair;
        assign(pair.x, value.x);
        assign(pair.y, value.y);
        *reinterpret_cast<Pair<T>*>(row + c) = pair;
        return;
    }
    if (c < channels) assign(row[c], value.x);
    if (c + 1 < channels) assign(row[c + 1], value.y);
}

// whether rows at multiples of `strides` elements from `base` start at a multiple of two elements
template <class T, class... Strides>
bool rows_paired(const T* base, Strides... strides) {
    return reinterpret_cast<uintptr_t>(base) % (2 * sizeof(T)) == 0 && ((strides % 2 == 0) && ...);
}

}  // namespace lcc
