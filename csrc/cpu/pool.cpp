#include "cpu/pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace lcc::cpu {
namespace {

// Between two kernels of a loop pass some microseconds of Python, and a thread that sleeps takes some tens to wake up.
constexpr auto kSpin = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// whether `done` came true within kSpin
template <class Done>
bool spin(Done done) {
    const auto start = std::chrono::steady_clock::now();
    do {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            pause();
        }
    } while (std::chrono::steady_clock::now() - start < kSpin);
    return done();
}

class Pool {
   public:
    void run(int threads, int64_t n, void (*chunk)(const void*, int, int64_t), const void* context) {
        std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
        if (threads <= 1 || n <= 1 || !only.owns_lock()) {
            for (int64_t i = 0; i < n; i++) chunk(context, 0, i);
            return;
        }
        start_helpers(threads - 1);
        chunk_ = chunk, context_ = context, n_ = n, threads_ = threads;
        next_.store(0, std::memory_order_relaxed);
        gate_.fetch_add(kEpoch + kOpen);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            work_.notify_all();
        }
        take_chunks(0);
        gate_.fetch_sub(kOpen);
        auto idle = [this] { return gate_.load() % kOpen == 0; };
        if (spin(idle)) return;
        // a helper was stopped in the middle of a chunk: it gets this thread's core
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, idle);
    }

   private:
    // gate_: helpers at work on the job, in the bits below kOpen; whether more may join; the job's number
    static constexpr uint64_t kOpen = uint64_t{1} << 15, kEpoch = uint64_t{1} << 16;

    void start_helpers(int wanted) {
        try {
            for (; helpers_ < wanted; helpers_++) std::thread(&Pool::help, this, helpers_ + 1).detach();
        } catch (const std::system_error&) {
            // no more threads: those that there are do the work
        }
    }

    void take_chunks(int slot) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_;) chunk_(context_, slot, i);
    }

    [[noreturn]] void help(int slot) {
        uint64_t seen = 0;
        auto fresh = [&] {
            const uint64_t gate = gate_.load();
            return (gate & kOpen) != 0 && gate / kEpoch != seen;
        };
        for (;;) {
            if (!spin(fresh)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_++;
                work_.wait(lock, fresh);
                sleeping_--;
            }
            uint64_t gate = gate_.load();
            if ((gate & kOpen) == 0 || !gate_.compare_exchange_strong(gate, gate + 1)) continue;
            // the job stays as it is until this thread has left it
            seen = gate / kEpoch;
            if (slot < threads_) take_chunks(slot);
            if ((gate_.fetch_sub(1) - 1) % kOpen == 0) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    std::mutex caller_;  // held by the one who runs a job
    int helpers_ = 0;
    void (*chunk_)(const void*, int, int64_t) = nullptr;
    const void* context_ = nullptr;
    int64_t n_ = 0;
    int threads_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<uint64_t> gate_{0};

    std::mutex mutex_;  // of those who sleep
    std::condition_variable work_, done_;
    std::atomic<int> sleeping_{0};
};

Pool* pool;

// A child of fork has the memory, but none of the threads: it gets a pool of its own, and leaves the old one as it is.
void renew() { pool = new Pool; }

}  // namespace

void run_chunks(int threads, int64_t n, void (*chunk)(const void*, int, int64_t), const void* context) {
    static const bool ready = [] {
        renew();
        pthread_atfork(nullptr, nullptr, renew);
        return true;
    }();
    (void)ready;
    pool->run(threads, n, chunk, context);
}

}  // namespace lcc::cpu
