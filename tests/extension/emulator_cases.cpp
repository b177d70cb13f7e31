// Small kernels, right and wrong, for the emulator itself: emulator_cases CASE SEED. Exit 0: right result; 3: wrong
// result; 4: the emulator stopped the kernel and says why on stderr; a sanitizer's own exit otherwise.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "cuda/cluster.cuh"
#include "cuda/common.cuh"
#include "cuda/tensor_cores.cuh"
#include "cuda/warpgroup.cuh"

namespace {

constexpr int kThreads = 96, kBlocks = 3;

using Kernel = void (*)(float*);

int run(Kernel kernel, size_t shared, bool cooperative);

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

// A warp has many operations of its own after a read, and then overwrites what the others have read, or, since a
// barrier is missing, have yet to read.
template <int kWarp>
void warp_runs_ahead(float* out) {
    LCC_SHARED(float, values, kThreads);
    const int i = threadIdx.x, lane = i % 32, next = (i + 32) % kThreads;
    values[i] = static_cast<float>(i);
    __syncthreads();
    float first = values[next];
    for (int n = 0; n < 50; ++n) first = __shfl_sync(0xFFFFFFFFu, first, lane);
    if (i / 32 == kWarp) {
        for (int j = lane; j < kThreads; j += 32) values[j] = -1.0f;
    }
    out[blockIdx.x * kThreads + i] = rotated(i) + first - next;
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

// Sixteen bytes a thread, which its neighbour reads. What is missing is 'w'ait, 'b'arrier, 'c'ommit of the copy, the
// 'r'ead's barrier before the next copy; or the copy is left on its way at the 'e'nd.
template <char kMissing>
void copies(float* out) {
    alignas(16) static const float source[4 * kThreads] = {};
    lcc::SharedMemory shared;
    const lcc::Shared rows = shared.take(4 * kThreads);
    const int i = threadIdx.x, next = (i + 1) % kThreads;
    lcc::copy_async(rows, 4 * i, source + 4 * i, i % 2 == 0);
    if (kMissing != 'c') lcc::commit_copies();
    if (kMissing != 'w') lcc::wait_for_copies<0>();
    if (kMissing != 'b') __syncthreads();
    const float first = rows.load<float>(4 * next);
    if (kMissing != 'r') __syncthreads();
    lcc::copy_async(rows, 4 * i, source, true);
    lcc::commit_copies();
    if (kMissing != 'e') lcc::wait_for_copies<0>();
    out[blockIdx.x * kThreads + i] = rotated(i) + first;
}

// two groups in flight: the older one has landed, the younger one not
void copies_in_two_groups(float* out) {
    alignas(16) static const float source[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    lcc::SharedMemory shared;
    const lcc::Shared rows = shared.take(8 * kThreads);
    const int i = threadIdx.x;
    for (int n = 0; n < 2; ++n) {
        lcc::copy_async(rows, 8 * i + 4 * n, source, true);
        lcc::commit_copies();
    }
    lcc::wait_for_copies<1>();
    const float third = rows.load<float>(8 * i + 2);
    lcc::wait_for_copies<0>();
    out[blockIdx.x * kThreads + i] = rotated(i) + third + rows.load<float>(8 * i + 7) - 7.0f;
}

// tiles of sixteen bytes a thread through a ring of two stages; each thread reads what one of another warp copied
template <bool kTooEarly>
void ring_of_copies(float* out) {
    constexpr int kTiles = 5, kStage = 4 * kThreads;
    alignas(16) static const float source[kTiles][4] = {{1.0f}, {2.0f}, {4.0f}, {8.0f}, {16.0f}};
    lcc::SharedMemory shared;
    const lcc::Shared ring = shared.take(2 * kStage);
    const int i = threadIdx.x, other = (i + 32) % kThreads;
    const auto copy_tile = [&](int tile) {
        if (tile < kTiles) lcc::copy_async(ring, tile % 2 * kStage + 4 * i, source[tile], true);
        lcc::commit_copies();
    };
    float sum = 0.0f;
    copy_tile(0);
    for (int tile = 0; tile < kTiles; ++tile) {
        lcc::wait_for_copies<0>();
        if (kTooEarly) copy_tile(tile + 1);  // where another warp may still read the tile before
        __syncthreads();
        if (!kTooEarly) copy_tile(tile + 1);
        sum += ring.load<float>(tile % 2 * kStage + 4 * other);
    }
    out[blockIdx.x * kThreads + i] = rotated(i) + sum - 31.0f;
}

// a thread's source changes from 0 to 1 between its copy and the wait
alignas(16) float changing[4 * kThreads];
void copy_of_what_changes(float* out) {
    lcc::SharedMemory shared;
    const lcc::Shared rows = shared.take(4 * kThreads);
    const int i = threadIdx.x, next = (i + 1) % kThreads;
    lcc::copy_async(rows, 4 * i, changing + 4 * i, true);
    lcc::commit_copies();
    __syncthreads();
    changing[4 * next] = 1.0f;
    __syncthreads();
    lcc::wait_for_copies<0>();
    out[i] = rows.load<float>(4 * i);
}

// prints what each thread has got
int run_copy_of_what_changes() {
    std::vector<float> out(kThreads, -2.0f);
    lcc::emulate("case", copy_of_what_changes, dim3(1), dim3(kThreads), 4 * kThreads * sizeof(float), false, 1,
                 out.data());
    for (const float x : out) std::printf("%g ", x);
    return 0;
}

void copy_from_past_the_end(float* out) {
    lcc::SharedMemory shared;
    lcc::copy_async(shared.take(4 * kThreads), 4 * threadIdx.x, out + kBlocks * kThreads, true);
    lcc::commit_copies();
    lcc::wait_for_copies<0>();
}

// A [16, 32] B [32, 16] of small integers by each warp: A as the manual lays out fragments, B from rows of n or,
// kTransposed, transposed, from rows of n
template <class T, bool kTransposed>
void products(float* out) {
    const auto a_at = [](int m, int k) { return static_cast<float>((3 * m + 5 * k) % 11 - 5); };
    const auto b_at = [](int k, int n) { return static_cast<float>((7 * k + 2 * n + k * n) % 13 - 6); };
    constexpr int kRows = kTransposed ? 32 : 16, kPitch = (kTransposed ? 16 : 32) / 2 + 4;  // in pairs, as floats
    lcc::SharedMemory shared;
    const lcc::Shared b = shared.take(3 * kRows * kPitch) + static_cast<int>(threadIdx.x / 32) * kRows * kPitch;
    const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
    for (int pair = lane; pair < 256; pair += 32) {
        const int row = pair / (256 / kRows), first = pair % (256 / kRows) * 2;
        const float low = kTransposed ? b_at(row, first) : b_at(first, row);
        const float high = kTransposed ? b_at(row, first + 1) : b_at(first + 1, row);
        b.store(row * kPitch + first / 2, lcc::pack<T>(low, high));
    }
    __syncwarp();
    float c[2][4] = {};  // columns 0 ... 7 and 8 ... 15
    for (int k0 = 0; k0 < 32; k0 += 16) {
        uint32_t a[4], m[4];
        for (int i = 0; i < 4; ++i) {
            const int row = r + i % 2 * 8, k = k0 + 2 * q + i / 2 * 8;
            a[i] = lcc::pack<T>(a_at(row, k), a_at(row, k + 1));
        }
        // matrices: n 0 ... 7 with the lower half of k, with the upper half, then n 8 ... 15
        const int part = lane / 8, n = part / 2 * 8, k = k0 + part % 2 * 8;
        const int at = kTransposed ? (k + lane % 8) * kPitch + n / 2 : (n + lane % 8) * kPitch + k / 2;
        lcc::load_matrices<kTransposed>(m, b, at);
        lcc::multiply_add<T>(c[0], a, m[0], m[1]);
        lcc::multiply_add<T>(c[1], a, m[2], m[3]);
    }
    bool right = true;
    for (int i = 0; i < 8; ++i) {
        const int row = r + i % 4 / 2 * 8, column = i / 4 * 8 + 2 * q + i % 2;
        float expected = 0.0f;
        for (int k = 0; k < 32; ++k) expected += a_at(row, k) * b_at(k, column);
        right = right && c[i / 4][i % 4] == expected;
    }
    out[blockIdx.x * kThreads + threadIdx.x] = right ? rotated(threadIdx.x) : -1.0f;
}

template <class T, bool kTransposed>
int run_products() {
    return run(products<T, kTransposed>, 3 * 32 * 20 * sizeof(float), false);
}
template <char kMissing>
int run_copies() {
    return run(copies<kMissing>, 4 * kThreads * sizeof(float), false);
}

constexpr int kGroupThreads = 2 * lcc::kWarpgroup;
using Halves = __nv_bfloat16;

float left_at(int m, int k) { return static_cast<float>((3 * m + 5 * k) % 11 - 5); }
float right_at(int k, int n) { return static_cast<float>((7 * k + 2 * n + k * n) % 13 - 6); }

// [kRows, kColumns] of value(row, column), stored as a factor of products by all threads of the block
template <class T, int kRows, int kColumns, class Value>
lcc::Shared stored(lcc::SharedMemory<1024>& shared, const Value& value) {
    using Matrix = lcc::Swizzled<kRows, kColumns>;
    const lcc::Shared memory = shared.take(Matrix::kFloats);
    for (int i = threadIdx.x; i < kRows * kColumns / 2; i += static_cast<int>(blockDim.x)) {
        const int row = i / (kColumns / 2), column = i % (kColumns / 2) * 2;
        memory.store(Matrix::at(row, column / 8) + column % 8 / 2,
                     lcc::pack<T>(value(row, column), value(row, column + 1)));
    }
    return memory;
}

// the registers of left_at [64, 16] from column k0 on
template <class T>
void left_registers(uint32_t (&a)[4], int k0) {
    const int thread = threadIdx.x % lcc::kWarpgroup, row = thread / 32 * 16 + thread % 32 / 4;
    for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 8, k = k0 + 2 * (thread % 4) + i / 2 * 8;
        a[i] = lcc::pack<T>(left_at(r, k), left_at(r, k + 1));
    }
}

template <int N>
bool is_product(const float (&c)[N / 8][4], int depth) {
    const int thread = threadIdx.x % lcc::kWarpgroup, row = thread / 32 * 16 + thread % 32 / 4;
    for (int i = 0; i < N / 2; ++i) {
        const int r = row + i % 4 / 2 * 8, n = i / 4 * 8 + 2 * (thread % 4) + i % 2;
        float expected = 0.0f;
        for (int k = 0; k < depth; ++k) expected += left_at(r, k) * right_at(k, n);
        if (c[i / 4][i % 4] != expected) return false;
    }
    return true;
}

// left [64, K] right [K, N] of small integers by each of two warpgroups: right from rows of n or, kTransposed, of k;
// left from registers, or kFromShared
template <class T, int K, int N, bool kTransposed, bool kFromShared>
void products_of_groups(float* out) {
    using Left = lcc::Swizzled<64, K>;
    using Right = std::conditional_t<kTransposed, lcc::Swizzled<K, N>, lcc::Swizzled<N, K>>;
    lcc::SharedMemory<1024> shared;
    const lcc::Shared left = stored<T, 64, K>(shared, left_at);
    const lcc::Shared right = kTransposed ? stored<T, K, N>(shared, right_at)
                                          : stored<T, N, K>(shared, [](int n, int k) { return right_at(k, n); });
    lcc::show_to_products();
    __syncthreads();
    const uint64_t a = Left::factor(left, 0), b = Right::factor(right, 0);
    float c[N / 8][4];
    uint32_t registers[K / 16][4];
    for (int k = 0; k < K / 16; ++k) left_registers<T>(registers[k], 16 * k);
    lcc::begin_products();
    const auto step = [&](int k, auto adds) {
        const uint64_t from = b + (kTransposed ? Right::rows_from(k) : Right::columns_from(k));
        if constexpr (kFromShared) {
            lcc::multiply_add_async<T, N, kTransposed, adds()>(c, a + Left::columns_from(k), from);
        } else {
            lcc::multiply_add_async<T, N, kTransposed, adds()>(c, registers[k], from);
        }
    };
    step(0, std::false_type{});
    for (int k = 1; k < K / 16; ++k) step(k, std::true_type{});
    lcc::commit_products();
    lcc::wait_for_products<0>(c);
    out[threadIdx.x] = is_product<N>(c, K) ? 1.0f : -1.0f;
}

// What is missing of a product, and of a second one with another sum: 's'howing, the 'b'arrier, 'B'eginning, the
// 'w'ait, the 'f'irst wait, for all but the last group, the 'c'ommit, the last warp's 'p'art; the left factor 'k'eeping
// its value; warps with the same 'd'escriptor; shared memory as far as the descriptor 'r'eaches; or it is left at the
// 'e'nd.
template <char kMissing>
void products(float* out) {
    using Right = lcc::Swizzled<64, 32>;
    lcc::SharedMemory<1024> shared;
    const lcc::Shared right = stored<Halves, 64, 32>(shared, [](int n, int k) { return right_at(k, n); });
    if (kMissing != 's') lcc::show_to_products();
    if (kMissing != 'b') __syncthreads();
    uint64_t b = Right::factor(right, 0);
    if (kMissing == 'd' && threadIdx.x >= 96) b += 2;
    if (kMissing == 'r') b += Right::rows_from(3);
    if (kMissing == 'p' && threadIdx.x >= 96 && threadIdx.x < 128) return;
    float c[8][4], second[8][4];
    uint32_t a[4];
    left_registers<Halves>(a, 0);
    if (kMissing != 'B') lcc::begin_products();
    lcc::multiply_add_async<Halves, 64, false, false>(c, a, b);
    if (kMissing != 'c') lcc::commit_products();
    lcc::multiply_add_async<Halves, 64, false, false>(second, a, b);
    lcc::commit_products();
    if (kMissing == 'k') a[2] = 0;
    if (kMissing != 'f' && kMissing != 'w') lcc::wait_for_products<1>(c);
    const bool first = is_product<64>(c, 16);
    if (kMissing != 'e' && kMissing != 'w') lcc::wait_for_products<0>(second);
    out[threadIdx.x] = first && is_product<64>(second, 16) ? 1.0f : -1.0f;
    if (kMissing == 'w') lcc::wait_for_products<0>(second);
}

// The right factor changes from 0 to 1 between a product and its wait; prints the first of each thread's results.
void product_of_what_changes(float* out) {
    using Right = lcc::Swizzled<64, 32>;
    lcc::SharedMemory<1024> shared;
    const lcc::Shared right = stored<Halves, 64, 32>(shared, [](int, int) { return 0.0f; });
    lcc::show_to_products();
    __syncthreads();
    float c[8][4];
    uint32_t a[4];
    for (uint32_t& pair : a) pair = lcc::pack<Halves>(1.0f, 1.0f);
    lcc::begin_products();
    lcc::multiply_add_async<Halves, 64, false, false>(c, a, Right::factor(right, 0));
    lcc::commit_products();
    __syncthreads();
    for (int i = threadIdx.x; i < Right::kFloats; i += kGroupThreads) right.store(i, lcc::pack<Halves>(1.0f, 1.0f));
    __syncthreads();
    lcc::wait_for_products<0>(c);
    out[threadIdx.x] = c[0][0];
}
int run_product_of_what_changes() {
    std::vector<float> out(kGroupThreads, -2.0f);
    lcc::emulate("case", product_of_what_changes, dim3(1), dim3(kGroupThreads), 4096, false, 1, out.data());
    for (const float x : out) std::printf("%g ", x);
    return 0;
}

int run_groups(Kernel kernel, size_t shared) {
    std::vector<float> out(kGroupThreads, -2.0f);
    lcc::emulate("case", kernel, dim3(1), dim3(kGroupThreads), shared, false, 1, out.data());
    for (int i = 0; i < kGroupThreads; ++i) {
        if (out[i] == 1.0f) continue;
        std::fprintf(stderr, "thread %d has %g\n", i, out[i]);
        return 3;
    }
    return 0;
}
template <class T, int K, int N, bool kTransposed, bool kFromShared = false>
int run_products_of_groups() {
    return run_groups(products_of_groups<T, K, N, kTransposed, kFromShared>, (64 + N) * K * 2);
}
template <char kMissing>
int run_products_without() {
    return run_groups(products<kMissing>, 4096);
}

constexpr int kCluster = 4, kClusters = 2;

// Each thread gives its block's successor in the cluster a pair, twice in the same place. What is missing is the
// barrier of the cluster after the 'i'nit, the 'b'lock's barrier ahead of the arrival, an 'a'rrival, the 'w'ait, the
// wait before the place is taken a'g'ain; or block 1 returns 'e'arly, or stores to a block that is 'n'ot there.
template <char kMissing>
void ring_of_blocks(float* out) {
    lcc::SharedMemory shared;
    const lcc::Shared values = shared.take(2 * kThreads), barrier = shared.take(2);
    const int i = threadIdx.x, rank = lcc::cluster_rank(), next = (rank + 1) % kCluster;
    if (i == 0) lcc::init_barrier(barrier, 0, kCluster);
    if (kMissing != 'i') {
        lcc::cluster_arrive();
        lcc::cluster_wait();
    }
    if (kMissing == 'e' && rank == 1) return;
    const auto meet = [&](int parity) {
        if (kMissing != 'b') __syncthreads();
        if (i < kCluster && !(kMissing == 'a' && rank == 2)) lcc::arrive_at(barrier, 0, i);
        if (kMissing != 'w') lcc::wait_at(barrier, 0, parity);
    };
    float sum = 0.0f;
    for (int round = 0; round < 2; ++round) {
        lcc::store_to(values, 2 * i, kMissing == 'n' ? kCluster : next, make_float2(i, 10.0f * rank + round));
        meet(0);
        const auto got = values.load<float2>(2 * ((i + 1) % kThreads));
        sum += got.x + got.y;
        if (kMissing != 'g') meet(1);
        if (kMissing == 'g') meet(0);
    }
    const int before = (rank + kCluster - 1) % kCluster;
    const bool right = sum == 2.0f * ((i + 1) % kThreads + 10.0f * before) + 1.0f;
    out[blockIdx.x * kThreads + i] = right ? rotated(i) : -1.0f;
}

// the same by the barrier of all threads; some return ahead of it and are not waited for
template <char kMissing>
void barrier_of_all_threads(float* out) {
    lcc::SharedMemory shared;
    const lcc::Shared values = shared.take(kThreads);
    const int i = threadIdx.x, rank = lcc::cluster_rank(), me = blockIdx.x * kThreads + i;
    lcc::cluster_arrive();
    if (kMissing == 't') lcc::cluster_arrive();
    lcc::cluster_wait();
    out[me] = rotated(i);
    lcc::store_to(values, i, (rank + 1) % kCluster, 1.0f * i);
    if (kMissing != 'a') lcc::cluster_arrive();
    lcc::cluster_wait();
    out[me] += values.load<float>((i + 5) % kThreads) - (i + 5) % kThreads;
    if (i % 3 == 0) return;
    lcc::cluster_arrive();
    lcc::cluster_wait();
}

// a store that nothing has released when its block returns
void store_left_on_its_way(float*) {
    lcc::SharedMemory shared;
    const lcc::Shared values = shared.take(kThreads);
    lcc::cluster_arrive();
    lcc::cluster_wait();
    if (threadIdx.x == 3) lcc::store_to(values, 0, (lcc::cluster_rank() + 1) % kCluster, 1.0f);
}

// two threads store to one place without a barrier between them
void stores_to_one_place(float*) {
    lcc::SharedMemory shared;
    const lcc::Shared values = shared.take(kThreads);
    lcc::cluster_arrive();
    lcc::cluster_wait();
    if (threadIdx.x < 2) lcc::store_to(values, 0, 0, 1.0f);
    lcc::cluster_arrive();
    lcc::cluster_wait();
}

int run_clusters(Kernel kernel, int blocks = kCluster * kClusters, size_t shared = 4 * kThreads * sizeof(float)) {
    std::vector<float> out(blocks * kThreads, -2.0f);
    lcc::emulate("case", kernel, dim3(blocks), dim3(kThreads), shared, false, kCluster, out.data());
    for (int i = 0; i < blocks * kThreads; ++i) {
        if (out[i] == rotated(i % kThreads)) continue;
        std::fprintf(stderr, "out[%d] is %g, expected %g\n", i, out[i], rotated(i % kThreads));
        return 3;
    }
    return 0;
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
                 kThreads * kPitch * sizeof(float), false, 1, out.data());
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
    lcc::emulate("case", kernel, dim3(kBlocks), dim3(kThreads), shared, cooperative, 1, out.data());
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
        {"first_warp_runs_ahead", [] { return run(warp_runs_ahead<0>, 0, false); }},
        {"second_warp_runs_ahead", [] { return run(warp_runs_ahead<1>, 0, false); }},
        {"third_warp_runs_ahead", [] { return run(warp_runs_ahead<2>, 0, false); }},
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
        {"copies", run_copies<' '>},
        {"copies_in_two_groups", [] { return run(copies_in_two_groups, 8 * kThreads * sizeof(float), false); }},
        {"copy_without_wait", run_copies<'w'>},
        {"copy_without_commit", run_copies<'c'>},
        {"copy_without_barrier", run_copies<'b'>},
        {"copy_into_what_is_read", run_copies<'r'>},
        {"copy_left_on_its_way", run_copies<'e'>},
        {"copy_from_past_the_end", [] { return run(copy_from_past_the_end, 4 * kThreads * sizeof(float), false); }},
        {"copy_of_what_changes", run_copy_of_what_changes},
        {"ring_of_copies", [] { return run(ring_of_copies<false>, 8 * kThreads * sizeof(float), false); }},
        {"ring_copied_to_too_early", [] { return run(ring_of_copies<true>, 8 * kThreads * sizeof(float), false); }},
        {"products_of_float16", run_products<__half, false>},
        {"products_of_bfloat16", run_products<__nv_bfloat16, false>},
        {"transposed_products_of_float16", run_products<__half, true>},
        {"transposed_products_of_bfloat16", run_products<__nv_bfloat16, true>},
        {"products_of_groups_32x32", run_products_of_groups<__half, 32, 32, true>},
        {"products_of_groups_32x64", run_products_of_groups<Halves, 32, 64, false>},
        {"products_of_groups_96x64", run_products_of_groups<__half, 96, 64, false>},
        {"products_of_groups_128x64", run_products_of_groups<Halves, 128, 64, false>},
        {"products_of_groups_64x96", run_products_of_groups<Halves, 64, 96, true>},
        {"products_of_groups_64x128", run_products_of_groups<__half, 64, 128, true>},
        {"products_of_shared_memory_128x64", run_products_of_groups<Halves, 128, 64, false, true>},
        {"products_of_shared_memory_96x64", run_products_of_groups<__half, 96, 64, false, true>},
        {"two_products", run_products_without<' '>},
        {"products_not_shown", run_products_without<'s'>},
        {"products_without_barrier", run_products_without<'b'>},
        {"products_without_beginning", run_products_without<'B'>},
        {"products_without_wait", run_products_without<'w'>},
        {"products_without_the_first_wait", run_products_without<'f'>},
        {"products_without_commit", run_products_without<'c'>},
        {"product_without_a_warp", run_products_without<'p'>},
        {"product_of_a_changed_factor", run_products_without<'k'>},
        {"product_of_two_descriptors", run_products_without<'d'>},
        {"product_past_the_end", run_products_without<'r'>},
        {"product_left_on_its_way", run_products_without<'e'>},
        {"product_of_what_changes", run_product_of_what_changes},
        {"traffic_of_floats", traffic<float, 1>},
        {"traffic_of_floats_in_two_banks", traffic<float, 16>},
        {"traffic_of_pairs", traffic<float2, 2>},
        {"traffic_of_pairs_of_every_other_pair", traffic<float2, 4>},
        {"traffic_of_fours", traffic<float4, 4>},
        {"traffic_of_fours_of_every_other_four", traffic<float4, 8>},
        {"device_after_a_launch", device_after_a_launch},
        {"missing_device", launch_on_a_missing_device},
        {"ring_of_blocks", [] { return run_clusters(ring_of_blocks<' '>); }},
        {"barrier_not_seen_yet", [] { return run_clusters(ring_of_blocks<'i'>); }},
        {"arrival_ahead_of_the_block", [] { return run_clusters(ring_of_blocks<'b'>); }},
        {"missing_arrival", [] { return run_clusters(ring_of_blocks<'a'>); }},
        {"missing_wait_of_the_cluster", [] { return run_clusters(ring_of_blocks<'w'>); }},
        {"store_to_what_is_read", [] { return run_clusters(ring_of_blocks<'g'>); }},
        {"block_that_has_returned", [] { return run_clusters(ring_of_blocks<'e'>); }},
        {"block_that_is_not_there", [] { return run_clusters(ring_of_blocks<'n'>); }},
        {"barrier_of_all_threads", [] { return run_clusters(barrier_of_all_threads<' '>); }},
        {"arrives_twice", [] { return run_clusters(barrier_of_all_threads<'t'>); }},
        {"waits_without_arrival", [] { return run_clusters(barrier_of_all_threads<'a'>); }},
        {"store_left_on_its_way", [] { return run_clusters(store_left_on_its_way); }},
        {"stores_to_one_place", [] { return run_clusters(stores_to_one_place); }},
        {"part_of_a_cluster", [] { return run_clusters(nothing, kCluster + 1); }},
        {"clusters_beyond_device", [] { return run_clusters(nothing, kCluster, 228 << 10); }},
        {"order",
         [] {
             lcc::emulate("case", order, dim3(1), dim3(kThreads), 0, false, 1, static_cast<float*>(nullptr));
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
