#include "cpu/pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace lcc::cpu {
namespace {

// Between two kernels of a loop pass some microseconds of Python, and a thread that sleeps takes some tens to wake up.
constexpr auto kSpin = std::chrono::microseconds(100);
// A caller that sleeps looks for itself this often: a wake-up that the system loses costs milliseconds, not the process
// (glibc's condition variables lost some from 2.27 to 2.40, its bug 25847).
constexpr auto kLook = std::chrono::milliseconds(5);

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
        const bool wake = sleeping_.load() > 0;
        if (wake) leave_this_core();
        chunk_ = chunk, context_ = context, n_ = n, threads_ = threads;
        next_.store(0, std::memory_order_relaxed);
        gate_.fetch_add(kEpoch + kOpen);
        if (wake || sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            work_.notify_all();
        }
        take_chunks(0);
        gate_.fetch_sub(kOpen);
        auto idle = [this] { return gate_.load() % kOpen == 0; };
        if (spin(idle)) return;
        // a helper was stopped in the middle of a chunk: it gets this thread's core
        std::unique_lock<std::mutex> lock(mutex_);
        while (!done_.wait_for(lock, kLook, idle)) {
        }
    }

    void wake() {
        std::unique_lock<std::mutex> only(caller_, std::try_to_lock);
        if (sleeping_.load() == 0 || !only.owns_lock()) return;
        leave_this_core();
        std::lock_guard<std::mutex> lock(mutex_);
        calls_++;
        work_.notify_all();
    }

   private:
    // gate_: helpers at work on the job, in the bits below kOpen; whether more may join; the job's number
    static constexpr uint64_t kOpen = uint64_t{1} << 15, kEpoch = uint64_t{1} << 16;

    void start_helpers(int wanted) {
        try {
            while (static_cast<int>(helpers_.size()) < wanted) {
                helpers_.reserve(wanted);
                std::thread helper(&Pool::help, this, static_cast<int>(helpers_.size()) + 1);
                helpers_.push_back(helper.native_handle());
                helper.detach();
            }
        } catch (const std::system_error&) {
            // no more threads: those that there are do the work
        }
    }

    // Helpers that are to wake up do so on other cores than the caller's, of those that the caller may use. The system
    // tends to wake a thread where it was woken from, and leaves it there for a tick of its scheduler, longer than a
    // call: with 2 threads on 2 cores a call of 100 frames after a rest took 5.8 ms, where one thread takes 3.8.
    void leave_this_core() {
#if defined(__linux__)
        cpu_set_t cores;
        const int own = sched_getcpu();
        if (own < 0 || pthread_getaffinity_np(pthread_self(), sizeof cores, &cores) != 0) return;
        CPU_CLR(own, &cores);
        if (CPU_COUNT(&cores) == 0 || (placed_ == helpers_.size() && CPU_EQUAL(&cores, &cores_))) return;
        for (pthread_t helper : helpers_) pthread_setaffinity_np(helper, sizeof cores, &cores);
        cores_ = cores, placed_ = helpers_.size();
#endif
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
                const uint64_t calls = calls_;
                sleeping_++;
                work_.wait(lock, [&] { return calls_ != calls || fresh(); });
                sleeping_--;
                if (!fresh()) continue;  // spin for it
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

    std::mutex caller_;               // held by the one who runs a job
    std::vector<pthread_t> helpers_;  // detached: they end with the process
#if defined(__linux__)
    cpu_set_t cores_;    // where the first placed_ helpers may run
    size_t placed_ = 0;  // none: anywhere
#endif
    void (*chunk_)(const void*, int, int64_t) = nullptr;
    const void* context_ = nullptr;
    int64_t n_ = 0;
    int threads_ = 0;
    std::atomic<int64_t> next_{0};
    std::atomic<uint64_t> gate_{0};

    std::mutex mutex_;  // of those who sleep
    std::condition_variable work_, done_;
    uint64_t calls_ = 0;  // of wake
    std::atomic<int> sleeping_{0};
};

Pool* pool;

// A child of fork has the memory, but none of the threads: it gets a pool of its own, and leaves the old one as it is.
void renew() { pool = new Pool; }

Pool& the_pool() {
    static const bool ready = [] {
        renew();
        pthread_atfork(nullptr, nullptr, renew);
        return true;
    }();
    (void)ready;
    return *pool;
}

}  // namespace

void run_chunks(int threads, int64_t n, void (*chunk)(const void*, int, int64_t), const void* context) {
    the_pool().run(threads, n, chunk, context);
}

void wake_helpers() { the_pool().wake(); }

}  // namespace lcc::cpu
