// cuda/warpgroup.cuh for the emulator.
#pragma once

#include "emulation/tensor_cores.h"

namespace lcc {

inline void show_to_products() { emulation::current()->show_to_products(); }
inline void begin_products() { emulation::current()->begin_products(); }
inline void commit_products() { emulation::current()->commit_products(); }
template <int kPending, class... Results>
void wait_for_products(Results&...) {
    emulation::current()->wait_for_products(kPending);
}

template <class T>
float number_of(uint16_t bits) {
    return emulation::half_of<T>(bits, 0);
}

template <class T, int N, bool kTransposed, bool kAdd>
void multiply_add_async(float (&c)[N / 8][4], const uint32_t (&a)[4], uint64_t b, EMULATION_HERE) {
    const emulation::Place place{"multiply_add_async", file, line};
    emulation::current()->multiply({place, N, kTransposed, kAdd, true, 0, b, number_of<T>}, c[0], a);
}
template <class T, int N, bool kTransposed, bool kAdd>
void multiply_add_async(float (&c)[N / 8][4], uint64_t a, uint64_t b, EMULATION_HERE) {
    const emulation::Place place{"multiply_add_async", file, line};
    emulation::current()->multiply({place, N, kTransposed, kAdd, false, a, b, number_of<T>}, c[0], nullptr);
}

}  // namespace lcc
