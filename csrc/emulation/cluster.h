// cuda/cluster.cuh for the emulator.
#pragma once

#include "emulation/cuda_host.h"

namespace lcc {

inline int cluster_rank() { return emulation::current()->fiber().block->rank; }

inline void cluster_arrive(EMULATION_HERE) { emulation::current()->arrive_cluster({"cluster_arrive", file, line}); }
inline void cluster_wait(EMULATION_HERE) { emulation::current()->wait_cluster({"cluster_wait", file, line}); }

template <class V>
void store_to(const Shared& to, int i, int rank, const V& value, EMULATION_HERE) {
    static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "words");
    emulation::current()->remote_store({"store_to", file, line}, rank, to.place(i).second, &value, sizeof value);
}

inline void init_barrier(const Shared& shared, int i, int count, EMULATION_HERE) {
    emulation::current()->init_mbarrier({"init_barrier", file, line}, shared.place(i).second, count);
}
inline void arrive_at(const Shared& shared, int i, int rank, EMULATION_HERE) {
    emulation::current()->arrive_mbarrier({"arrive_at", file, line}, rank, shared.place(i).second);
}
inline void wait_at(const Shared& shared, int i, int parity, EMULATION_HERE) {
    emulation::current()->wait_mbarrier({"wait_at", file, line}, shared.place(i).second, parity);
}

template <class... Params>
bool cluster_fits(const char*, void (*)(Params...), unsigned, dim3, size_t) {
    return true;
}

}  // namespace lcc
