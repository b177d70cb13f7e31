// Small kernels, right and wrong, for the emulator itself: emulator_cases CASE SEED. Exit 0: right result; 3: wrong
// result; 4: the emulator stopped the kernel and says why on stderr; a sanitizer's own exit otherwise.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "cuda/common.cuh"

namespace {

constexpr int kThreads = 96, kBlocks = 3;

using Kernel = void (*)(float*);

template <bool kSecondBarrier>
void rotate(float* out) {  // each thread reads what its neighbour wrote, twice
    LCC_SHARED(float, values, kThreads);
    const int i = threadIdx.x;
    values[i] = static_cast<float>(i);
    __syncthreads();
    const float first = values[(i + 1) % kThreads];
    if (kSecondBarrier) __syncthreads();
    values[i] = 100.0f + i;
    __syncthreads();
    out[blockIdx.x * kThreads + i] = first + values[(i + 2) % kThreads];
}
float rotated(int i) { return (i + 1) % kThreads + 100.0f + (i + 2) % kThreads; }

void no_first_barrier(float* out) {
    LCC_SHARED(float, values, kThreads);
    const int i = threadIdx.x;
    values[i] = 100.0f + i;
    out[blockIdx.x * kThreads + i] = (i + 1) % kThreads + values[(i + 2) % kThreads];
}

void static_index_past_the_end(float* out) {
    LCC_SHARED(float, values, kThreads);
    values[threadIdx.x + 1] = 0.0f;
    out[threadIdx.x] = values[threadIdx.x];
}

void dynamic_index_past_the_piece(float* out) {
    lcc::SharedMemory shared;
    const lcc::Shared first = shared.take(kThreads), second = shared.take(kThreads);
    second.store(threadIdx.x, 0.0f);
    out[threadIdx.x] = first.load<float>(threadIdx.x + 1);  // the last thread reads second[0]
}

void take_too_much(float* out) {
    lcc::SharedMemory shared;
    out[threadIdx.x] = shared.take(1 << 20).load<float>(0);
}

void global_index_past_the_end(float* out) { out[kBlocks * kThreads + threadIdx.x % 4] = 0.0f; }

void misaligned_pair(float* out) {
    const auto pair = *reinterpret_cast<lcc::Pair<float>*>(out + 1);
    out[0] = pair.x;
}

void divergent_barrier(float* out) {
    if (threadIdx.x < 40) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 0.0f;
}

void thread_returns_before_barrier(float* out) {
    if (blockIdx.x == 1 && threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = 0.0f;
}

void lane_misses_shuffle(float* out) {
    if (threadIdx.x == 7) return;
    out[threadIdx.x] = __shfl_down_sync(0xFFFFFFFFu, 1.0f, 1);
}

void divergent_warp(float* out) {
    out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1) : __shfl_up_sync(0xFFFFFFFFu, 1.0f, 1);
}

void warp_operations(float* out) {
    const int i = threadIdx.x, lane = i % 32;
    float sum = static_cast<float>(i);
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, by);
    sum = __shfl_sync(0xFFFFFFFFu, sum, 0);  // sum of the warp
    const int neighbour = __shfl_xor_sync(0xFFFFFFFFu, lane, 1);
    const double before = __shfl_up_sync(0xFFFFFFFFu, static_cast<double>(lane), 3);
    const uint32_t odd = __ballot_sync(0xFFFFFFFFu, lane % 2);
    int low = -1;
    if (lane < 8) low = __shfl_sync(0xFFu, lane * 2, 7 - lane);  // a part of the warp
    const int all = __all_sync(0xFFFFFFFFu, 1), any = __any_sync(0xFFFFFFFFu, lane == 31),
              none = __any_sync(0xFFFFFFFFu, 0);
    const int first = i / 32 * 32;
    const bool right = sum == 32.0f * first + 496.0f && neighbour == (lane ^ 1) &&
                       before == (lane < 3 ? lane : lane - 3) && odd == 0xAAAAAAAAu &&
                       low == (lane < 8 ? (7 - lane) * 2 : -1) && all && any && !none;
    out[blockIdx.x * kThreads + i] = right ? rotated(i) : -1.0f;
}

int arrivals, order_hash;

void atomics(float* out) {
    const int mine = atomicAdd(&arrivals, 1);
    atomicMax(&order_hash, mine);
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = rotated(threadIdx.x);
}

// rows of `kPitch` floats: a lane writes V to its row, and reads it
template <class V, int kPitch>
void rows_in_shared_memory(float* out) {
    lcc::SharedMemory shared;
    const lcc::Shared rows = shared.take(kThreads * kPitch);
    const int i = threadIdx.x;
    V value = {};
    rows.store(i * kPitch, value);
    value = rows.load<V>(i * kPitch);
    std::memcpy(&out[blockIdx.x * kThreads + i], &value, sizeof(float));
}

// prints wavefronts and conflicts of a block
template <class V, int kPitch>
int traffic() {
    std::vector<float> out(kBlocks * kThreads);
    emulation::traffic() = {true};
    lcc::emulate("case", rows_in_shared_memory<V, kPitch>, dim3(kBlocks), dim3(kThreads),
                 kThreads * kPitch * sizeof(float), false, out.data());
    std::printf("%d %d\n", static_cast<int>(emulation::traffic().wavefronts),
                static_cast<int>(emulation::traffic().conflicts));
    return 0;
}

void nothing(float*) {}

// the current device after a launch on device 1, or 10 and more if that one was not launched on
int device_after_a_launch() {
    lcc::launch("case", 1, nothing, dim3(1), dim3(1), 0, 0, static_cast<float*>(nullptr));
    return emulation::device() + 10 * (emulation::launched_on() != 1);
}

int launch_on_a_missing_device() {
    try {
        lcc::launch("case", 2, nothing, dim3(1), dim3(1), 0, 0, static_cast<float*>(nullptr));
    } catch (const std::runtime_error& error) {
        std::printf("%s\n", error.what());
    }
    return emulation::device();
}

float exchange_buffer[kBlocks * kThreads];

void grid_barrier(float* out) {  // reads what the next block wrote
    const int i = threadIdx.x, me = blockIdx.x * kThreads + i;
    exchange_buffer[me] = rotated(i);
    cooperative_groups::this_grid().sync();
    out[me] = exchange_buffer[(blockIdx.x + 1) % kBlocks * kThreads + i];
}

void order(float*) { order_hash = (order_hash * 31 + static_cast<int>(threadIdx.x)) % 1000003; }

int run(Kernel kernel, size_t shared, bool cooperative) {
    std::vector<float> out(kBlocks * kThreads, -2.0f);
    lcc::emulate("case", kernel, dim3(kBlocks), dim3(kThreads), shared, cooperative, out.data());
    for (int i = 0; i < kBlocks * kThreads; ++i) {
        if (!(out[i] == rotated(i % kThreads))) {
            std::fprintf(stderr, "out[%d] is %g, expected %g\n", i, out[i], rotated(i % kThreads));
            return 3;
        }
    }
    return 0;
}

}  // namespace

int main(int, char** argv) {
    const std::map<std::string, std::function<int()>> cases = {
        {"barriers", [] { return run(rotate<true>, 0, false); }},
        {"missing_barrier_before_read", [] { return run(no_first_barrier, 0, false); }},
        {"missing_barrier_before_write", [] { return run(rotate<false>, 0, false); }},
        {"static_index", [] { return run(static_index_past_the_end, 0, false); }},
        {"dynamic_index", [] { return run(dynamic_index_past_the_piece, 2 * kThreads * sizeof(float), false); }},
        {"shared_too_small", [] { return run(take_too_much, 1024, false); }},
        {"shared_beyond_device", [] { return run(take_too_much, 1 << 22, false); }},
        {"global_index", [] { return run(global_index_past_the_end, 0, false); }},
        {"misaligned", [] { return run(misaligned_pair, 0, false); }},
        {"divergent_barrier", [] { return run(divergent_barrier, 0, false); }},
        {"missing_thread", [] { return run(thread_returns_before_barrier, 0, false); }},
        {"missing_lane", [] { return run(lane_misses_shuffle, 0, false); }},
        {"divergent_warp", [] { return run(divergent_warp, 0, false); }},
        {"warp_operations", [] { return run(warp_operations, 0, false); }},
        {"atomics",
         [] { return run(atomics, 0, false) | (arrivals != kBlocks * kThreads) | (order_hash != arrivals - 1); }},
        {"grid_barrier", [] { return run(grid_barrier, 0, true); }},
        {"grid_barrier_without_cooperation", [] { return run(grid_barrier, 0, false); }},
        {"traffic_of_floats", traffic<float, 1>},
        {"traffic_of_floats_in_two_banks", traffic<float, 16>},
        {"traffic_of_pairs", traffic<float2, 2>},
        {"traffic_of_pairs_of_every_other_pair", traffic<float2, 4>},
        {"traffic_of_fours", traffic<float4, 4>},
        {"traffic_of_fours_of_every_other_four", traffic<float4, 8>},
        {"device_after_a_launch", device_after_a_launch},
        {"missing_device", launch_on_a_missing_device},
        {"order",
         [] {
             lcc::emulate("case", order, dim3(1), dim3(kThreads), 0, false, static_cast<float*>(nullptr));
             std::printf("%d\n", order_hash);
             return 0;
         }},
    };
    emulation::seed() = static_cast<unsigned>(std::atoi(argv[2]));
    try {
        return cases.at(argv[1])();
    } catch (const emulation::Failure& failure) {
        std::fprintf(stderr, "%s\n", failure.what());
        return 4;
    }
}
