#include "cuda/relpos_attention.cuh"

namespace lcc::cuda {
namespace {

constexpr int kThreads = kRelposWarps * kWarp;
constexpr int kBlockRows = kRelposWarps * kRows;
static_assert(relpos_attention_shared(128) <= (99 << 10), "sm_86, sm_89 and sm_120 have 99 KiB");

// Grid: tiles of queries x heads x utterances
template <class T, int D>
__global__ void __launch_bounds__(kThreads, D <= 64 ? 2 : 1) forward(const RelposAttentionForward op) {
    constexpr int kBlocks = kKeys / 8;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, quad = lane % 4;
    const int i0 = static_cast<int>(blockIdx.x) * kBlockRows;
    const int h = static_cast<int>(blockIdx.y), b = static_cast<int>(blockIdx.z);
    const Sequence own = sequence_of(op, b);
    if (i0 >= own.queries) return;

    SharedMemory shared;
    const Tiles<T, D, kRelposWarps> tiles(op, shared, b, h, i0);
    if (own.keys > 0) tiles.copy_first(own.keys);

    const int row = i0 + warp * kRows + lane / 4;  // and the one eight further
    const bool there[2] = {row < own.queries, row + 8 < own.queries};
    uint32_t qu[D / 16][4];
    PositionScores<T, D> position;
    {
        const T* q = head_of<T>(op.q, b, own.start, h) + row * op.q.frame_stride + 2 * quad;
        const int bias = h * D + 2 * quad;
        load_queries<T, D>(qu, q, op.q.frame_stride, there, static_cast<const T*>(op.u) + bias);
        load_queries<T, D>(position.qv, q, op.q.frame_stride, there, static_cast<const T*>(op.v_bias) + bias);
    }
    const Skew skew(lane);
    RowSums<D> rows;
    // from the warp's first on: without one it only copies; all of its lanes agree
    const int own_rows = not_ahead(own.queries - i0 - warp * kRows);

    int left = own.keys;  // from this tile on
#pragma unroll 1
    for (int tile = 0; left > 0; ++tile, left = not_ahead(left - kKeys)) {
        wait_for_copies<0>();
        __syncthreads();  // the tile is there, and the one before has been read by every warp
        if (left > kKeys) tiles.copy(tile + 1, left - kKeys);
        if (own_rows <= 0) continue;
        const int place = tile % tiles.kPositionTiles * kKeys, stage = tile % kRelposStages * tiles.kTile;
        float s[kBlocks][4];
        if (tile == 0) {  // the positions before the first key
            position.next(s[0], tiles.positions, tiles.place(tiles.kRing - 16, warp), skew, lane);
            position.next(s[0], tiles.positions, tiles.place(tiles.kRing - 8, warp), skew, lane);
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            position.next(s[n], tiles.positions, tiles.place(place + 8 * n, warp), skew, lane);
            multiply_rows<T, D>(s[n], qu, tiles.keys + stage, 8 * n, lane);
        }
        rows.weigh(s, left, quad);
        if (op.seed != nullptr) {
            const uint32_t drawn = draw_tile(op, blockIdx.z * gridDim.y + blockIdx.y, tile, i0 + lane_row(), lane);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                const uint32_t kept = kept_of_block(drawn, n, lane);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (!is_kept(kept, i)) s[n][i] = 0.0f;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; n += 2) {
            const uint32_t w[4] = {pack<T>(s[n][0], s[n][1]), pack<T>(s[n][2], s[n][3]),
                                   pack<T>(s[n + 1][0], s[n + 1][1]), pack<T>(s[n + 1][2], s[n + 1][3])};
            multiply_columns<T, D>(rows.acc, w, tiles.values + stage, 8 * n, lane);
        }
    }

    if (own_rows > 0) rows.template store<T>(op, b, h, i0, quad);
}

}  // namespace

bool relpos_attention_has_warpgroups([[maybe_unused]] int device) {
#if defined(LCC_EMULATION) || defined(LCC_SM90A)
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "relpos_attention_has_warpgroups");
    return major == 9;
#else
    return false;
#endif
}

void relpos_attention_forward(const RelposAttentionForward& given) {
    RelposAttentionForward op = given;
    prepare(op);
    if (op.batch == 0 || op.heads == 0 || op.frames == 0) return;
    if (op.warpgroups) return relpos_attention_forward_by_warpgroups(op);
    const dim3 grid(static_cast<unsigned>(ceil_div(op.frames, kBlockRows)), static_cast<unsigned>(op.heads),
                    static_cast<unsigned>(op.batch));
    with_types(op, [&](auto t, auto d) {
        launch("relpos_attention_forward", op.device, forward<decltype(t), d()>, grid, dim3(kThreads),
               relpos_attention_shared(d()), op.stream, op);
    });
}

}  // namespace lcc::cuda
