// Costs of launches, barriers and on-chip traffic on a GPU. Prints each as a line "name value" at once, so that a failure
// keeps the earlier ones, and leaves out what this GPU lacks. constants.py builds it with nvcc for the GPU at hand.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace cg = cooperative_groups;

#define CHECK(call)                                                                           \
  do {                                                                                        \
    cudaError_t error = (call);                                                               \
    if (error != cudaSuccess) {                                                               \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(error));     \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (0)

constexpr int kRounds = 1000;

void print(const char* name, double value) {
  std::printf("%s %.6g\n", name, value);
  std::fflush(stdout);
}

// Microseconds of the fastest of 10 runs after a warm-up.
template <class Run>
double best_us(Run run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float best = 1e30f;
  for (int i = 0; i < 11; i++) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0 && ms < best) best = ms;
  }
  CHECK(cudaGetLastError());
  return best * 1e3;
}

__global__ void nothing() {}

__global__ void dependent() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

__global__ void grid_barriers(int rounds) {
  cg::grid_group grid = cg::this_grid();
  for (int i = 0; i < rounds; i++) grid.sync();
}

// Block 0 and the last block answer each other through flags in global memory.
__global__ void flag_hops(unsigned* flags, int rounds) {
  if (threadIdx.x != 0 || (blockIdx.x != 0 && blockIdx.x != gridDim.x - 1)) return;
  const bool ping = blockIdx.x == 0;
  volatile unsigned* mine = flags + (ping ? 0 : 32);
  volatile unsigned* theirs = flags + (ping ? 32 : 0);
  for (unsigned i = 1; i <= static_cast<unsigned>(rounds); i++) {
    if (ping) {
      __threadfence();
      *mine = i;
      while (*theirs < i) {
      }
    } else {
      while (*theirs < i) {
      }
      __threadfence();
      *mine = i;
    }
  }
}

// Every block reads the whole buffer, 16 bytes a thread, from a different start.
__global__ void read_all(const uint4* data, size_t count, int rounds, unsigned* sink) {
  unsigned sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  const size_t start = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int r = 0; r < rounds; r++) {
    // each round shifts the assignment, so that no thread reads its own lines again
    const size_t shift = static_cast<size_t>(r) * 7919 * blockDim.x % count;
    for (size_t i = start; i < count; i += stride) {
      const size_t at = i + shift;
      uint4 v = __ldcg(data + (at < count ? at : at - count));
      sum += v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  if (sum == 0x12345678u) *sink = sum;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__global__ void cluster_barriers(int rounds) {
  cg::cluster_group cluster = cg::this_cluster();
  for (int i = 0; i < rounds; i++) cluster.sync();
}

// Every block reads its neighbour's shared memory.
__global__ void neighbour_reads(int rounds, unsigned* sink) {
  extern __shared__ uint4 tile[];
  cg::cluster_group cluster = cg::this_cluster();
  const int count = 2048;  // 32 KiB
  for (int i = threadIdx.x; i < count; i += blockDim.x) tile[i] = make_uint4(i, i, i, i);
  cluster.sync();
  const uint4* other = cluster.map_shared_rank(tile, (cluster.block_rank() + 1) % cluster.num_blocks());
  unsigned sum = 0;
  for (int r = 0; r < rounds; r++)
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      uint4 v = other[(i + r * 32) % count];
      sum += v.x ^ v.w;
    }
  cluster.sync();
  if (sum == 0x12345678u) *sink = sum;
}
#else
__global__ void cluster_barriers(int) {}
__global__ void neighbour_reads(int, unsigned*) {}
#endif

template <class... Formal, class... Actual>
cudaError_t launch_cluster(void (*kernel)(Formal...), int size, int blocks, size_t shared, Actual... args) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = shared;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(args)...);
}

template <class Enqueue>
double graph_us(cudaStream_t stream, int nodes, Enqueue enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < nodes; i++) enqueue();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  double us = best_us([&] { CHECK(cudaGraphLaunch(executable, 0)); });
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaGraphDestroy(graph));
  return us;
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const bool hopper = device.major >= 9;
  const int sms = device.multiProcessorCount;
  print("multiprocessors", sms);
  print("l2_mb", device.l2CacheSize / 1e6);
  print("shared_memory_kb", device.sharedMemPerBlockOptin / 1024.0);

  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  // the difference of two lengths leaves the cost of starting the graph out
  auto plain = [&] { nothing<<<sms, 128, 0, stream>>>(); };
  print("graph_node_us", (graph_us(stream, 500, plain) - graph_us(stream, 100, plain)) / 400);
  if (hopper) {
    auto chained = [&] {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(sms);
      config.blockDim = dim3(128);
      config.stream = stream;
      config.attrs = &attribute;
      config.numAttrs = 1;
      CHECK(cudaLaunchKernelEx(&config, dependent));
    };
    print("dependent_launch_node_us", (graph_us(stream, 500, chained) - graph_us(stream, 100, chained)) / 400);
  }

  int rounds = kRounds;
  void* barrier_args[] = {&rounds};
  print("grid_sync_us", best_us([&] {
          CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(grid_barriers), dim3(sms), dim3(128), barrier_args));
        }) / rounds);

  unsigned* flags;
  CHECK(cudaMalloc(&flags, 4096));
  void* hop_args[] = {&flags, &rounds};
  print("flag_hop_us", best_us([&] {
          CHECK(cudaMemsetAsync(flags, 0, 4096));
          CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(flag_hops), dim3(sms), dim3(32), hop_args));
        }) / (2.0 * rounds));

  uint4* data;
  CHECK(cudaMalloc(&data, size_t{64} << 20));
  CHECK(cudaMemset(data, 1, size_t{64} << 20));
  for (int mb : {1, 8, 30}) {
    const size_t bytes = static_cast<size_t>(mb) << 20;
    const int passes = 64 / mb + 20;
    auto read = [&](int n) {
      return best_us([&] { read_all<<<2 * sms, 1024>>>(data, bytes / 16, n, flags); });
    };
    char name[32];
    std::snprintf(name, sizeof name, "l2_read_%dmb_gb_per_s", mb);
    print(name, bytes * double(passes) / ((read(2 * passes) - read(passes)) * 1e-6) / 1e9);
  }

  if (hopper) {
    for (int size : {8, 16}) {
      char name[40];
      cudaError_t status = launch_cluster(cluster_barriers, size, size, 0, 1);
      if (status == cudaSuccess) status = cudaDeviceSynchronize();
      if (status != cudaSuccess) {
        cudaGetLastError();
        std::fprintf(stderr, "cluster of %d: %s\n", size, cudaGetErrorString(status));
        continue;
      }
      auto sync = [&](int n) {
        return best_us([&] { CHECK(launch_cluster(cluster_barriers, size, size, 0, n)); });
      };
      std::snprintf(name, sizeof name, "cluster_sync_%d_us", size);
      print(name, (sync(2 * kRounds) - sync(kRounds)) / kRounds);

      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(size);
      config.blockDim = dim3(256);
      config.dynamicSmemBytes = 200 << 10;
      config.attrs = &attribute;
      config.numAttrs = 1;
      CHECK(cudaFuncSetAttribute(neighbour_reads, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
      CHECK(cudaFuncSetAttribute(neighbour_reads, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
      int clusters = 0;
      CHECK(cudaOccupancyMaxActiveClusters(&clusters, neighbour_reads, &config));
      std::snprintf(name, sizeof name, "max_clusters_of_%d_with_200kb", size);
      print(name, clusters);

      const int blocks = sms / size * size;
      auto neighbour = [&](int n) {
        return best_us([&] { CHECK(launch_cluster(neighbour_reads, size, blocks, 32 << 10, n, flags)); });
      };
      std::snprintf(name, sizeof name, "dsmem_%d_gb_per_s_per_sm", size);
      print(name, 100 * 32768.0 / ((neighbour(200) - neighbour(100)) * 1e-6) / 1e9);
    }
  }
  return 0;
}
