// What the CUDA kernels share: launching, shared memory, element types.
//
// Kernels include this and nothing of CUDA itself. nvcc compiles them for GPUs; with LCC_EMULATION a C++ compiler
// compiles the same text against emulation/cuda_host.h and runs it on the CPU, which is why launches and shared memory
// go through the names below instead of <<<>>> and __shared__.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef LCC_EMULATION
#include "emulation/cuda_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// a static array in shared memory: LCC_SHARED(float, partial, 256);
#define LCC_SHARED(type, name, count) __shared__ type name[count]

namespace lcc {

template <class... Params>
void start(const char* /*name*/, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, uintptr_t stream,
           Params... args) {
    kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
}

// A range of shared memory, counted in floats. Accesses are named so that the emulator can count bank conflicts.
class Shared {
   public:
    __device__ explicit Shared(float* at) : at_(at) {}
    template <class V>
    __device__ V load(int i) const {
        return *reinterpret_cast<const V*>(at_ + i);
    }
    template <class V>
    __device__ void store(int i, const V& value) const {
        *reinterpret_cast<V*>(at_ + i) = value;
    }
    __device__ Shared operator+(int floats) const { return Shared(at_ + floats); }
    // as PTX has it
    __device__ uint32_t address(int i) const { return static_cast<uint32_t>(__cvta_generic_to_shared(at_ + i)); }

   private:
    float* at_;
};

// Hands out the block's dynamic shared memory piece by piece; every thread takes the same pieces in the same order. The
// first starts at a multiple of kAlignment bytes.
template <int kAlignment = 16>
class SharedMemory {
   public:
    __device__ Shared take(int floats) {
        extern __shared__ __align__(kAlignment) unsigned char memory[];
        const Shared piece(reinterpret_cast<float*>(memory) + used_);
        used_ += (floats + 3) / 4 * 4;
        return piece;
    }

   private:
    int used_ = 0;
};

// 2^x within 2 ulp and 1 / x within 1 ulp, subnormal results flushed to zero: one instruction each
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// x, but what follows from it is not computed ahead of a loop, where it would take registers
template <class V>
__device__ inline V not_ahead(V x) {
    static_assert(sizeof(V) == 4 && std::is_integral_v<V>);
    asm volatile("" : "+r"(x));
    return x;
}

}  // namespace lcc
#endif

namespace lcc {

constexpr int kWarp = 32;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// makes `device` the current one, and the previous one again at the end of the scope
class DeviceGuard {
   public:
    DeviceGuard(int device, const char* what) : device_(device) {
        check(cudaGetDevice(&previous_), what);
        if (device_ != previous_) check(cudaSetDevice(device_), what);
    }
    ~DeviceGuard() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

   private:
    int device_, previous_ = 0;
};

// kernel<<<grid, block, shared, stream>>>(args...) on `device`, with an error instead of a silent nothing
template <class... Params>
void launch(const char* name, int device, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
            uintptr_t stream, Params... args) {
    const DeviceGuard guard(device, name);
    if (shared > (48u << 10)) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              name);
    }
    start(name, kernel, grid, block, shared, stream, args...);
    check(cudaGetLastError(), name);
}

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

// eight elements, loaded sixteen bytes at a time
template <class T>
struct alignas(16) Eight {
    Pair<T> pairs[4];
};

template <class T>
__device__ inline float2 to_floats(const Pair<T>& pair) {
    return make_float2(to_float(pair.x), to_float(pair.y));
}
// one instruction an element: bfloat16 is the upper half of float32
template <>
__device__ inline float2 to_floats(const Pair<__nv_bfloat16>& pair) {
    const auto bits = *reinterpret_cast<const uint32_t*>(&pair);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
}

// Elements first ... first + n - 1 of a row of `count`, as a Pair or an Eight; zero beyond the end.
// kWhole: they are all there, and aligned to the size of V or 16 bytes.
template <class V, bool kWhole, class T>
__device__ inline V load_some(const T* row, int first, int count) {
    if (kWhole) return *reinterpret_cast<const V*>(row + first);
    constexpr int n = sizeof(V) / sizeof(T);
    V some{};
    T* values = reinterpret_cast<T*>(&some);
    for (int i = 0; i < n; ++i) {
        if (first + i < count) values[i] = row[first + i];
    }
    return some;
}

// elements first, first + 1 of a row of `count`, those that are there
template <bool kWhole, class T>
__device__ inline void store_pair(T* row, int first, int count, float2 value) {
    Pair<T> pair;
    assign(pair.x, value.x);
    assign(pair.y, value.y);
    if (kWhole) {
        *reinterpret_cast<Pair<T>*>(row + first) = pair;
        return;
    }
    if (first < count) row[first] = pair.x;
    if (first + 1 < count) row[first + 1] = pair.y;
}

// whether rows at multiples of `strides` elements from `base` start at a multiple of 16 bytes and of 8 elements
template <class T, class... Strides>
bool rows_aligned(const T* base, Strides... strides) {
    return reinterpret_cast<uintptr_t>(base) % 16 == 0 && ((strides % 8 == 0) && ...);
}

}  // namespace lcc
