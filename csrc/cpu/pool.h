// Threads of the inference kernels.
//
// A chunk of work goes to whichever thread is running: the caller takes chunks until none is left, and waits only for
// helpers that are in the middle of one. A helper that the system does not run costs nothing, where OpenMP's barriers
// spin until every thread has come: with other work on the cores that took a tick of the scheduler, 4 ms, per barrier.
// A helper without work spins for some microseconds, the time between two kernels of a loop, and then sleeps.
#pragma once

#include <cstdint>

namespace lcc::cpu {

// chunk(context, slot, i) for i = 0 ... n-1, on at most `threads` threads; those that run at once have different slots,
// from 0 to threads - 1. If the threads serve another caller, all chunks run here, so that callers do not wait for each
// other.
void run_chunks(int threads, int64_t n, void (*chunk)(const void* context, int slot, int64_t i), const void* context);

// Helpers that sleep are woken, for work that is about to come.
void wake_helpers();

}  // namespace lcc::cpu
