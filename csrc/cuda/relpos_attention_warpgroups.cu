// The forward pass by products of warpgroups, on sm_90a alone: for other architectures the kernel is a trap, which
// nothing launches. docs/backends.md says what bounds it.
#include "cuda/relpos_attention.cuh"
#include "cuda/warpgroup.cuh"

namespace lcc::cuda {

#if defined(LCC_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LCC_HAS_WARPGROUPS 1
#endif

namespace {

constexpr int kGroups = kRelposWarpgroups;
constexpr int kThreads = kGroups * kWarpgroup;
constexpr int kBlockRows = kGroups * kRelposWarpgroupRows;
constexpr int kGroupRows = kRelposWarpgroupRows;
constexpr int kGroupKeys = kRelposWarpgroupKeys;  // of a tile
constexpr int kBlocks = kGroupKeys / 8;
[[maybe_unused]] constexpr int kPositionTiles = kRelposWarpgroupPositionTiles;
// whether q + u and q + v_bias are in registers; heads of 128 have them in shared memory
template <int D>
constexpr bool kInRegisters = D <= 96;

using Scores = float[kBlocks][4];

// The relative shift of a warpgroup's rows: row r needs column j - r at column j. The blocks of warp w are rotated as
// Skew has it, and two blocks further back for each warp before it: back into those of the tile before.
template <int kWarpOfGroup>
__device__ inline void shift(Scores& s, const Scores& now, const Scores& before, const Skew& skew) {
    const auto rotated = [&](int n, int i) { return n < 0 ? before[n + kBlocks][i] : now[n][i]; };
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int own = n - 2 * kWarpOfGroup;
            s[n][i] = skew.own[i] ? rotated(own, i) : rotated(own - 1, i);
            s[n][2 + i] = skew.own[i] ? rotated(own - 1, 2 + i) : rotated(own - 2, 2 + i);
        }
    }
}

// Tiles of 64 keys and values, and of the positions of a block's queries at them, on their way through shared memory
template <class T, int D>
struct GroupTiles {
    using Tile = Swizzled<kGroupKeys, D>;
    const RelposAttention& op;
    int b, h;
    int i0;                          // the first query
    Shared keys, values, positions;  // [kRelposStages or kPositionTiles, kGroupKeys, D]

    __device__ GroupTiles(const RelposAttention& op, SharedMemory<1024>& shared, int b, int h, int i0)
        : op(op), b(b), h(h), i0(i0), keys(shared.take(kRelposStages * Tile::kFloats)),
          values(shared.take(kRelposStages * Tile::kFloats)), positions(shared.take(kPositionTiles * Tile::kFloats)) {}

    // rows first ... first + 63 of a matrix with `rows` rows, zeros outside of it
    __device__ static void copy_tile(const Shared& to, int tile, const T* matrix, int stride, int first, int rows) {
        constexpr int kEights = Tile::kPanel / 8, kStep = kThreads / kEights;  // rows at a time
        const unsigned thread = not_ahead(threadIdx.x);
        const int row = static_cast<int>(thread / kEights), eight = static_cast<int>(thread % kEights);
        const int place = tile * Tile::kFloats + Tile::at(row, eight);
        const T* from = matrix + int64_t{first + row} * stride + eight * 8;
        static_assert(kStep % 8 == 0 && kGroupKeys % kStep == 0, "rows of a thread are swizzled alike");
#pragma unroll
        for (int n = 0; n < kGroupKeys; n += kStep) {
            const bool there = static_cast<unsigned>(first + row + n) < static_cast<unsigned>(rows);
#pragma unroll
            for (int panel = 0; panel < D / Tile::kPanel; ++panel) {
                copy_async(to, place + (panel * kGroupKeys + n) * Tile::kLine, from + panel * Tile::kPanel, there);
            }
            from += kStep * stride;
        }
    }
    __device__ void copy_positions(int tile) const {
        const int origin = static_cast<int>(op.frames) - 1 - i0;  // of the first query at the first key
        copy_tile(positions, (tile + kPositionTiles) % kPositionTiles, head_of<T>(op.pos, 0, 0, h),
                  static_cast<int>(op.pos.frame_stride), origin + tile * kGroupKeys,
                  2 * static_cast<int>(op.frames) - 1);
    }
    // a tile of keys and values, and the positions of the next
    __device__ void copy(int tile, const Sequence& own) const {
        const int first = tile * kGroupKeys;
        copy_tile(keys, tile % kRelposStages, head_of<T>(op.k, b, own.start, h), static_cast<int>(op.k.frame_stride),
                  first, own.keys);
        copy_tile(values, tile % kRelposStages, head_of<T>(op.v, b, own.start, h), static_cast<int>(op.v.frame_stride),
                  first, own.keys);
        copy_positions(tile + 1);
        commit_copies();
    }
    // until what has been copied is there for the products of all, and what has been read before may be copied to
    __device__ static void wait() {
        wait_for_copies<0>();
        show_to_products();
        __syncthreads();
    }
};

// q + u and q + v_bias of a warpgroup's rows
template <class T, int D, bool kRegisters = kInRegisters<D>>
struct Queries;

template <class T, int D>
struct Queries<T, D, true> {
    uint32_t values[2][D / 16][4];

    __device__ Queries(const RelposAttention& op, SharedMemory<1024>& /*shared*/, const Sequence& own, int b, int h,
                       int i0) {
        const int row = i0 + lane_row(), column = static_cast<int>(threadIdx.x) % 4 * 2;
        const bool there[2] = {row < own.queries, row + 8 < own.queries};
        const T* q = head_of<T>(op.q, b, own.start, h) + row * op.q.frame_stride + column;
        const void* biases[2] = {op.u, op.v_bias};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_queries<T, D>(values[i], q, op.q.frame_stride, there,
                               static_cast<const T*>(biases[i]) + h * D + column);
        }
    }
    // scores [64, 64] += (q + u, or q + v_bias) times the rows of a tile, or = without kAdd
    template <int kWhich, bool kAdd>
    __device__ void multiply(Scores& scores, uint64_t tile) const {
        using Tile = Swizzled<kGroupKeys, D>;
        multiply_add_async<T, kGroupKeys, false, kAdd>(scores, values[kWhich][0], tile);
#pragma unroll
        for (int k = 1; k < D / 16; ++k) {
            multiply_add_async<T, kGroupKeys, false, true>(scores, values[kWhich][k], tile + Tile::columns_from(k));
        }
    }
};

template <class T, int D>
struct Queries<T, D, false> {
    using Rows = Swizzled<kGroupRows, D>;
    Shared memory;  // [2, kGroups, kGroupRows, D]
    int group;

    __device__ Queries(const RelposAttention& op, SharedMemory<1024>& shared, const Sequence& own, int b, int h, int i0)
        : memory(shared.take(2 * kGroups * Rows::kFloats)), group(static_cast<int>(threadIdx.x) / kWarpgroup) {
        constexpr int kEights = D / 8;
        const T* q = head_of<T>(op.q, b, own.start, h);
        for (int i = static_cast<int>(threadIdx.x); i < kBlockRows * kEights; i += kThreads) {
            const int row = i / kEights, eight = i % kEights;
            Eight<T> values{};
            if (i0 + row < own.queries) {
                values = *reinterpret_cast<const Eight<T>*>(q + (i0 + row) * op.q.frame_stride + eight * 8);
            }
            const int to = row / kGroupRows * Rows::kFloats + Rows::at(row % kGroupRows, eight);
            const T* u = static_cast<const T*>(op.u) + h * D + eight * 8;
            const T* v_bias = static_cast<const T*>(op.v_bias) + h * D + eight * 8;
            memory.store(to, sums(values, u));
            memory.store(to + kGroups * Rows::kFloats, sums(values, v_bias));
        }
    }
    __device__ static uint4 sums(const Eight<T>& values, const T* bias) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 value = to_floats(values.pairs[i]);
            words[i] = pack<T>(value.x + to_float(bias[2 * i]), value.y + to_float(bias[2 * i + 1]));
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
    template <int kWhich, bool kAdd>
    __device__ void multiply(Scores& scores, uint64_t tile) const {
        using Tile = Swizzled<kGroupKeys, D>;
        const uint64_t rows = Rows::factor(memory, (kWhich * kGroups + group) * Rows::kFloats);
        multiply_add_async<T, kGroupKeys, false, kAdd>(scores, rows, tile);
#pragma unroll
        for (int k = 1; k < D / 16; ++k) {
            multiply_add_async<T, kGroupKeys, false, true>(scores, rows + Rows::columns_from(k),
                                                           tile + Tile::columns_from(k));
        }
    }
};

// Grid: tiles of queries x heads x utterances
template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) warpgroups(const RelposAttentionForward op) {
#ifdef LCC_HAS_WARPGROUPS
    using Tile = Swizzled<kGroupKeys, D>;
    const int lane = threadIdx.x % kWarp, quad = lane % 4;
    // the same in all lanes, as the compiler sees by the shuffle
    const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x) / kWarp, 0), group = warp / 4;
    const int i0 = static_cast<int>(blockIdx.x) * kBlockRows;
    const int h = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
    const Sequence own = sequence_of(op, b);
    if (i0 >= own.queries) return;

    SharedMemory<1024> shared;
    const GroupTiles<T, D> tiles(op, shared, b, h, i0);
    if (own.keys > 0) {
#pragma unroll 1
        for (int tile = -kGroups; tile < 1; ++tile) tiles.copy_positions(tile);
        tiles.copy(0, own);
    }
    const Queries<T, D> queries(op, shared, own, b, h, i0);
    const Skew skew(lane);
    RowSums<D> rows;
    // without a row of its own a warpgroup only copies
    const bool some_rows = own.queries > i0 + group * kGroupRows;

    const auto positions_at = [&](int tile) {
        return Tile::factor(tiles.positions, (tile - group + kPositionTiles) % kPositionTiles * Tile::kFloats);
    };
    // of the tile and of the one before, rotated
    Scores positions[2];
    if (own.keys > 0) {
        tiles.wait();
        if (some_rows) {
            begin_products();
            queries.template multiply<1, false>(positions[1], positions_at(-1));
            queries.template multiply<1, false>(positions[0], positions_at(0));
            commit_products();
            wait_for_products<0>(positions[0], positions[1]);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) skew.rotate(positions[1][n]);
        }
    }

    const auto step = [&](int tile, Scores& now, Scores& before) {
        const int left = own.keys - tile * kGroupKeys, stage = tile % kRelposStages * Tile::kFloats;
        tiles.wait();
        if (left > kGroupKeys) tiles.copy(tile + 1, own);
        if (!some_rows) return;
        Scores s;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) skew.rotate(now[n]);
        switch (warp % 4) {
            case 0: shift<0>(s, now, before, skew); break;
            case 1: shift<1>(s, now, before, skew); break;
            case 2: shift<2>(s, now, before, skew); break;
            default: shift<3>(s, now, before, skew);
        }
        begin_products();
        queries.template multiply<0, true>(s, Tile::factor(tiles.keys, stage));
        commit_products();
        // behind the last tile as well, where nobody uses it: in a branch, ptxas would let no two products overlap
        queries.template multiply<1, false>(before, positions_at(tile + 1));
        commit_products();
        wait_for_products<1>(s);

        rows.weigh(s, left, quad);
        if (op.seed != nullptr) {
#pragma unroll
            for (int half = 0; half < kBlocks; half += 4) {
                const int columns = tile * (kGroupKeys / kKeys) + half / 4;  // 32 of them
                const uint32_t drawn =
                    draw_tile(op, blockIdx.z * gridDim.y + blockIdx.y, columns, i0 + lane_row(), lane);
#pragma unroll
                for (int n = half; n < half + 4; ++n) {
                    const uint32_t kept = kept_of_block(drawn, n % 4, lane);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        if (!is_kept(kept, i)) s[n][i] = 0.0f;
                    }
                }
            }
        }
        uint32_t weights[kBlocks / 2][4];
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            weights[n / 2][n % 2 * 2] = pack<T>(s[n][0], s[n][1]);
            weights[n / 2][n % 2 * 2 + 1] = pack<T>(s[n][2], s[n][3]);
        }
        const uint64_t values = Tile::factor(tiles.values, stage);
        begin_products();
#pragma unroll
        for (int k = 0; k < kGroupKeys / 16; ++k) {
            multiply_add_async<T, D, true, true>(rows.acc, weights[k], values + Tile::rows_from(k));
        }
        commit_products();
        wait_for_products<0>(rows.acc, before);
    };
#pragma unroll 1
    for (int tile = 0; tile * kGroupKeys < own.keys; tile += 2) {
        step(tile, positions[0], positions[1]);
        if ((tile + 1) * kGroupKeys < own.keys) step(tile + 1, positions[1], positions[0]);
    }
    if (some_rows) rows.template store<T>(op, b, h, i0, quad);
#else
    asm volatile("trap;");
#endif
}

}  // namespace

void relpos_attention_forward_by_warpgroups(const RelposAttentionForward& op) {
    const dim3 grid(static_cast<unsigned>(ceil_div(op.frames, kBlockRows)), static_cast<unsigned>(op.heads),
                    static_cast<unsigned>(op.batch));
    with_types(op, [&](auto t, auto d) {
        launch("relpos_attention_forward", op.device, warpgroups<decltype(t), d()>, grid, dim3(kThreads),
               relpos_attention_warpgroups_shared(d()), op.stream, op);
    });
}

}  // namespace lcc::cuda
