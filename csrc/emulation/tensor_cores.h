// cuda/tensor_cores.cuh for the emulator: asynchronous copies, 8 x 8 matrices from shared memory, products of tensor
// cores. Which lane has which element is what the PTX manual says; a warp operation is done by the last lane that
// reaches it, for all.
#pragma once

#include "emulation/cuda_host.h"

namespace emulation {

inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float to_float(__half x) { return __half2float(x); }
inline void assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
inline void assign(__half& to, float x) { to = __float2half_rn(x); }

// the lower (0) or upper (1) 16 bits of a register
template <class T>
float half_of(uint32_t bits, int half) {
    const auto some = static_cast<uint16_t>(bits >> (16 * half));
    T value;
    std::memcpy(&value, &some, sizeof value);
    return to_float(value);
}

template <class Part>
Part& part_of(const Lanes& lanes, int lane) {
    return *reinterpret_cast<Part*>(static_cast<uintptr_t>(lanes[lane]));
}

}  // namespace emulation

namespace lcc {

inline void copy_async(const Shared& to, int i, const void* from, bool there, EMULATION_HERE) {
    const auto [address, offset] = to.place(i);
    emulation::current()->copy({"copy_async", file, line}, address, offset, there ? from : nullptr);
}
inline void commit_copies() { emulation::current()->commit_copies(); }
template <int kPending>
void wait_for_copies() {
    emulation::current()->wait_for_copies(kPending);
}

template <bool kTransposed>
void load_matrices(uint32_t (&out)[4], const Shared& from, int i, EMULATION_HERE) {
    struct Part {
        uint16_t row[8];
        uint32_t* out;
    } mine;
    const emulation::Place place{"load_matrices", file, line};
    const auto [address, offset] = from.place(i);
    emulation::current()->shared_access(place, address, offset, sizeof mine.row);
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) throw emulation::Failure("load_matrices: misaligned address");
    std::memcpy(mine.row, address, sizeof mine.row);
    mine.out = out;
    emulation::current()->exchange(
        place, 0xFFFFFFFFu, reinterpret_cast<uintptr_t>(&mine), [](const emulation::Lanes& lanes) {
            const auto part = [&](int lane) -> Part& { return emulation::part_of<Part>(lanes, lane); };
            for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
                const int row = lane / 4, pair = 2 * (lane % 4);
                for (int k = 0; k < 4; ++k) {
                    const uint32_t low = kTransposed ? part(8 * k + pair).row[row] : part(8 * k + row).row[pair];
                    const uint32_t high =
                        kTransposed ? part(8 * k + pair + 1).row[row] : part(8 * k + row).row[pair + 1];
                    part(lane).out[k] = low | high << 16;
                }
            }
        });
}

template <class T>
uint32_t pack(float low, float high) {
    T values[2];
    emulation::assign(values[0], low);
    emulation::assign(values[1], high);
    uint32_t bits;
    std::memcpy(&bits, values, sizeof bits);
    return bits;
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATION_HERE) {
    struct Part {
        const uint32_t* a;
        uint32_t b[2];
        float* c;
    } mine{a, {b0, b1}, c};
    emulation::current()->exchange(
        {"multiply_add", file, line}, 0xFFFFFFFFu, reinterpret_cast<uintptr_t>(&mine),
        [](const emulation::Lanes& lanes) {
            float left[16][16], right[16][8];
            for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
                const auto& part = emulation::part_of<Part>(lanes, lane);
                const int row = lane / 4, pair = 2 * (lane % 4);
                for (int half = 0; half < 2; ++half) {
                    for (int r = 0; r < 4; ++r) {
                        left[row + 8 * (r % 2)][pair + half + 8 * (r / 2)] = emulation::half_of<T>(part.a[r], half);
                    }
                    for (int r = 0; r < 2; ++r) {
                        right[pair + half + 8 * r][row] = emulation::half_of<T>(part.b[r], half);
                    }
                }
            }
            for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
                const auto& part = emulation::part_of<Part>(lanes, lane);
                for (int r = 0; r < 4; ++r) {
                    const int row = lane / 4 + 8 * (r / 2), column = 2 * (lane % 4) + r % 2;
                    for (int k = 0; k < 16; ++k) part.c[r] += left[row][k] * right[k][column];
                }
            }
        });
}

}  // namespace lcc
