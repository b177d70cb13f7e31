// Thread-block clusters, from sm_90 on: stores to the shared memory of other blocks, barriers between them, launches.
#pragma once

#include "cuda/common.cuh"

#ifdef LCC_EMULATION
#include "emulation/cluster.h"
#else

namespace lcc {

// cycles that a block waits for the others before it stops the grid with an error: seconds, where microseconds are due
constexpr long long kWatchdog = 1ll << 33;

// of this block in its cluster, along x
__device__ inline int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The barrier of all threads of a cluster in two halves; what was stored before the first is seen after the second.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ inline uint32_t address_in(const Shared& shared, int i, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared.address(i)), "r"(rank));
    return address;
}

// Stores 4, 8 or 16 bytes at the i-th float of what is `to` here, in block `rank`.
template <class V>
__device__ inline void store_to(const Shared& to, int i, int rank, const V& value) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words");
    const auto* words = reinterpret_cast<const uint32_t*>(&value);
    const uint32_t address = address_in(to, i, rank);
    if constexpr (sizeof(V) == 4) {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(words[0]) : "memory");
    } else if constexpr (sizeof(V) == 8) {
        asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1])
                     : "memory");
    } else {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]),
                     "r"(words[2]), "r"(words[3])
                     : "memory");
    }
}

// A barrier object in the two floats from the i-th on, passed whenever `count` arrivals have come; by one thread. The
// other blocks see it after the next barrier of the cluster.
__device__ inline void init_barrier(const Shared& shared, int i, int count) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;\n"
        "fence.mbarrier_init.release.cluster;" ::"r"(shared.address(i)),
        "r"(count)
        : "memory");
}
// One arrival at the barrier of block `rank`. It shows what this thread has stored, and what the others of its block
// had stored before a barrier of the block, to those who wait.
__device__ inline void arrive_at(const Shared& shared, int i, int rank) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_in(shared, i, rank))
                 : "memory");
}
// Waits until the barrier of this block has been passed an odd (parity 0) or even number of times.
__device__ inline void wait_at(const Shared& shared, int i, int parity) {
    const uint32_t address = shared.address(i);
    const long long began = clock64();
    for (;;) {
        uint32_t passed;
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(passed)
            : "r"(address), "r"(parity)
            : "memory");
        if (passed) return;
        if (clock64() - began > kWatchdog) __trap();
    }
}

inline cudaLaunchConfig_t cluster_config(cudaLaunchAttribute& attribute, unsigned cluster, dim3 grid, dim3 block,
                                         size_t shared, uintptr_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return config;
}

template <class... Params>
void allow_clusters(const char* name, void (*kernel)(Params...), size_t shared) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
}

template <class... Params>
void start_clusters(const char* name, void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block, size_t shared,
                    uintptr_t stream, Params... args) {
    allow_clusters(name, kernel, shared);
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = cluster_config(attribute, cluster, grid, block, shared, stream);
    check(cudaLaunchKernelEx(&config, kernel, args...), name);
}

// Whether the GPU can hold a cluster of this launch
template <class... Params>
bool cluster_fits(const char* name, void (*kernel)(Params...), unsigned cluster, dim3 block, size_t shared) {
    allow_clusters(name, kernel, shared);
    cudaLaunchAttribute attribute{};
    const cudaLaunchConfig_t config = cluster_config(attribute, cluster, dim3(cluster), block, shared, 0);
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
    return clusters > 0;
}

}  // namespace lcc
#endif

namespace lcc {

// A launch on `device` whose blocks form clusters of `cluster`, one after the other along x
template <class... Params>
void launch_clusters(const char* name, int device, void (*kernel)(Params...), unsigned cluster, dim3 grid, dim3 block,
                     size_t shared, uintptr_t stream, Params... args) {
    const DeviceGuard guard(device, name);
    start_clusters(name, kernel, cluster, grid, block, shared, stream, args...);
    check(cudaGetLastError(), name);
}

}  // namespace lcc
