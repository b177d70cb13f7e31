// The names of CUDA that the kernels use, for a C++ compiler. cuda/common.cuh includes it with LCC_EMULATION; the
// threads run in emulation/scheduler.h. Only what a kernel needs is here: add a name when a kernel uses it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/scheduler.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define threadIdx (emulation::current()->fiber().thread)
#define blockIdx (emulation::current()->fiber().block->index)
#define blockDim (emulation::current()->block_dim())
#define gridDim (emulation::current()->grid_dim())

#define EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct dim3 : uint3 {
    dim3(unsigned x, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// --- a runtime of two devices, of one kind
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidDevice = 101;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "none" : "invalid device ordinal";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device(), cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidDevice;
    return emulation::device() = device, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    return *value = emulation::architecture() / 10, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}

// --- 16-bit floats, rounded to nearest even
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    _Float16 value;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// --- synchronisation
inline void __syncthreads(EMULATION_HERE) { emulation::current()->barrier({"__syncthreads", file, line}); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, EMULATION_HERE) {
    emulation::current()->exchange({"__syncwarp", file, line}, mask, 0);
}

namespace cooperative_groups {
struct grid_group {
    void sync(EMULATION_HERE) const { emulation::current()->grid_barrier({"grid.sync", file, line}); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

// --- warp operations: every lane of the mask brings 64 bits and sees what the others brought
namespace emulation {

template <class T>
T shuffle(const char* what, uint32_t mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const auto& lanes = current()->exchange({what, file, line}, mask, bits);
    if ((mask >> source & 1) == 0) throw Failure(std::string(what) + " reads a lane outside of its mask");
    std::memcpy(&value, &lanes[source], sizeof value);
    return value;
}

inline int lane() { return current()->fiber().rank % kWarpSize; }
// a source outside of the lane's group of `width` lanes is the lane itself
inline int within(int source, int width) { return source / width == lane() / width && source >= 0 ? source : lane(); }

}  // namespace emulation

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMULATION_HERE) {
    const int first = emulation::lane() / width * width;
    return emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, EMULATION_HERE) {
    return emulation::shuffle("__shfl_xor_sync", mask, value, emulation::within(emulation::lane() ^ bits, width), file,
                              line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32, EMULATION_HERE) {
    return emulation::shuffle("__shfl_down_sync", mask, value, emulation::within(emulation::lane() + by, width), file,
                              line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32, EMULATION_HERE) {
    return emulation::shuffle("__shfl_up_sync", mask, value, emulation::within(emulation::lane() - by, width), file,
                              line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATION_HERE) {
    const auto& lanes = emulation::current()->exchange({"__ballot_sync", file, line}, mask, predicate != 0);
    uint32_t ballot = 0;
    for (int i = 0; i < 32; ++i) ballot |= static_cast<uint32_t>((mask >> i & 1) && lanes[i]) << i;
    return ballot;
}
inline int __any_sync(uint32_t mask, int predicate, EMULATION_HERE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMULATION_HERE) {
    return __ballot_sync(mask, predicate, file, line) == mask;
}

// --- atomics: one CPU thread runs everything, so an update is whole; the others may run before and after it
template <class T, class Update>
T emulation_atomic(T* address, Update update) {
    emulation::current()->yield();
    const T old = *address;
    *address = update(old);
    emulation::current()->yield();
    return old;
}
template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
    return emulation_atomic(address, [=](T old) { return old + value; });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
    return emulation_atomic(address, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
    return emulation_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return emulation_atomic(address, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { emulation::current()->yield(); }

// --- shared memory and launches, as in cuda/common.cuh
#define LCC_SHARED(type, name, count) \
    type* const name =                \
        static_cast<type*>(emulation::current()->shared_array({#name, __FILE__, __LINE__}, sizeof(type) * (count)))

namespace lcc {

// a range of a piece that starts `offset` bytes into the block's dynamic shared memory
class Shared {
   public:
    Shared(float* piece, size_t offset, int at = 0) : piece_(piece), offset_(offset), at_(at) {}
    template <class V>
    V load(int i, EMULATION_HERE) const {
        access<V>(i, {"load", file, line});
        return *reinterpret_cast<const V*>(piece_ + at_ + i);
    }
    template <class V>
    void store(int i, const V& value, EMULATION_HERE) const {
        access<V>(i, {"store", file, line});
        emulation::current()->shared_written(place(i).second, sizeof(V));
        *reinterpret_cast<V*>(piece_ + at_ + i) = value;
    }
    Shared operator+(int floats) const { return Shared(piece_, offset_, at_ + floats); }
    // where the i-th float is, and in bytes from the start of dynamic shared memory
    std::pair<void*, size_t> place(int i) const { return {piece_ + at_ + i, offset_ + (at_ + i) * sizeof(float)}; }
    uint32_t address(int i) const { return static_cast<uint32_t>(place(i).second); }

   private:
    template <class V>
    void access(int i, emulation::Place at) const {
        const auto [address, offset] = place(i);
        emulation::current()->shared_access(at, address, offset, sizeof(V));
    }

    float* piece_;
    size_t offset_;
    int at_;
};

template <int kAlignment = 16>
class SharedMemory {
   public:
    Shared take(int floats) {
        const auto [memory, offset] = emulation::current()->shared_piece(sizeof(float) * floats);
        return Shared(static_cast<float*>(memory), offset);
    }
};

inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
template <class V>
V not_ahead(V x) {
    return x;
}

constexpr size_t kMaxShared = 99 << 10;         // of a block on sm_86, sm_89, sm_120: the least of all targets
constexpr size_t kMaxSharedOfSm90 = 227 << 10;  // which has clusters
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCluster = 16;

template <class... Params>
void emulate(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, bool cooperative,
             unsigned cluster, Params... args) {
    const auto refuse = [&](const char* why) { throw emulation::Failure(std::string(name) + ": " + why); };
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("empty grid");
    if (grid.y > 65535 || grid.z > 65535) refuse("grid.y or grid.z above 65535");
    if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > kMaxThreads) refuse("not 1 to 1024 threads");
    if (cluster == 0 || cluster > kMaxCluster || grid.x % cluster != 0) refuse("not whole clusters of 1 to 16 blocks");
    if (cluster == 1 && emulation::architecture() != 90 && shared > kMaxShared) {
        refuse("more than 99 KiB of dynamic shared memory");
    }
    if (shared > kMaxSharedOfSm90) refuse("more than 227 KiB of dynamic shared memory");
    emulation::Grid(grid, block, shared, cooperative, cluster, emulation::seed(), [&] { kernel(args...); }).run();
}

template <class... Params>
void start(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, uintptr_t /*stream*/,
           Params... args) {
    emulation::launched_on() = emulation::device();
    emulate(name, kernel, grid, block, shared, false, 1, args...);
}

template <class... Params>
void start_clusters(const char* name, void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, size_t shared,
                    uintptr_t /*stream*/, Params... args) {
    emulation::launched_on() = emulation::device();
    emulate(name, kernel, grid, block, shared, false, cluster, args...);
}

}  // namespace lcc
