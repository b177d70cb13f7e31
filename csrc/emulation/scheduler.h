// Runs the threads of a CUDA grid as fibers on one CPU thread.
//
// A thread runs until it waits (barrier, warp operation, grid barrier) or reaches an atomic; then a seeded random
// choice says who runs next, of all under an even seed, and mostly of the warp that ran last under an odd one. So what
// a kernel leaves to luck shows: a missing barrier reads poison or an old value, a barrier that some thread never
// reaches leaves nobody to run and is reported by block, thread, file and line. Two blocks are resident at a time, or
// all of them under a cooperative launch.
//
// An asynchronous copy poisons what it goes to when it is issued, and reads its source and lands at a random step of
// the schedule: at the latest when its thread waits for it. The steps are drawn by a generator of their own, from the
// same seed. Until that wait a touch of what it goes to is reported, even where it has landed already; of the other
// threads, until the barrier after the wait.
//
// A product of a warpgroup is issued when the last of its 128 threads has reached it, reads its factors in shared
// memory at a random later step, after the products before it, and gives its results to each thread at that thread's
// wait; until then they are NaN. What its factors were made of must have been shown to products (fence.proxy.async) by
// whoever wrote it, and be there when the product is issued.
//
// The blocks of a cluster are resident together, and one cluster at a time. A store to another block's shared memory
// lands when it is released: by its own thread, or by one of its block behind a barrier of the block. Until then nobody
// may touch where it goes; nor may it go where a block has returned.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Leaves the present stack, its pointer in *left, for `entered`. swapcontext would make a system call each time, and
// AddressSanitizer's clear the shadow of the whole stack.
extern "C" void emulation_switch(void** left, void* entered);
asm(R"(
    .pushsection .text
    .weak emulation_switch
    .hidden emulation_switch
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, .-emulation_switch
    .popsection
)");
#endif

struct uint3 {
    unsigned x, y, z;
};

namespace emulation {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 128 << 10;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating format, -1 in every integer

// a stack of its own
class Context {
   public:
#if defined(__x86_64__)
    void start(void* stack, size_t size, void (*entry)()) {
        // the six registers that a switch restores, where it returns to, and where that would return to
        constexpr int kWords = 8;
        auto** top = reinterpret_cast<void**>(static_cast<unsigned char*>(stack) + size) - kWords;
        std::fill_n(top, kWords, nullptr);
        top[kWords - 2] = reinterpret_cast<void*>(entry);
        at_ = top;
    }
    void leave_for(Context& other) { emulation_switch(&at_, other.at_); }

   private:
    void* at_ = nullptr;
#else
    void start(void* stack, size_t size, void (*entry)()) {
        getcontext(&context_);
        context_.uc_stack = {stack, 0, size};
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
    }
    void leave_for(Context& other) { swapcontext(&context_, &other.context_); }

   private:
    ucontext_t context_;
#endif
};

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// a wait or an access, by name and by place in the source
struct Place {
    const char* what = "";
    const char* file = "";
    int line = 0;
    bool operator==(const Place& o) const {
        const auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
        return line == o.line && same(what, o.what) && same(file, o.file);
    }
};

using Lanes = std::array<uint64_t, kWarpSize>;

// of dynamic shared memory, by one thread
struct Access {
    Place place;
    size_t offset, bytes;
};

// What the accesses of the worst block to its dynamic shared memory cost. A warp's access takes a wavefront for each
// 128 bytes of its lanes (16 lanes of 8 bytes, 8 of 16), and one more for each further word that a bank is asked for:
// conflicts.
struct Traffic {
    bool counted = false;
    uint64_t wavefronts = 0, conflicts = 0;
};

struct Block;
struct Fiber;

constexpr size_t kCopy = 16;  // bytes of an asynchronous copy
constexpr int kDelays = 17;   // powers of two: it takes 2^16 steps at most

struct Copy {
    void* to;
    const void* from;  // null: zeros
    uint64_t group;
    bool landed = false;
    void land() {
        if (landed) return;
        from == nullptr ? std::memset(to, 0, kCopy) : std::memcpy(to, from, kCopy);
        landed = true;
    }
};

// Sixteen bytes of shared memory that `owner` copies: nobody may touch them until it has waited, the others until the
// barrier after that.
struct Copied {
    Place place;
    const Fiber* owner;
    bool waited;
};

constexpr int kGroupSize = 4 * kWarpSize;  // threads of a warpgroup
constexpr int kProductRows = 64, kProductDepth = 16;

// a factor in shared memory, as its descriptor has it, in bytes
struct Factor {
    size_t start, panels, eights;  // where it starts; from panel to panel, from eight rows to the next
    size_t line;                   // of a row of a panel
    explicit Factor(uint64_t descriptor)
        : start((descriptor & 0x3FFF) << 4), panels((descriptor >> 16 & 0x3FFF) << 4),
          eights((descriptor >> 32 & 0x3FFF) << 4), line(descriptor >> 62 == 1   ? 128
                                                         : descriptor >> 62 == 2 ? 64
                                                                                 : 0) {}
    // of an element, in the order of the matrix there; rows of a panel are swizzled
    size_t at(size_t row, size_t column) const {
        const size_t panel = 2 * column / line, byte = 2 * column % line;
        const size_t plain = start + panel * panels + row / 8 * eights + row % 8 * line + byte;
        return plain ^ (plain >> 7 & (line / kCopy - 1)) << 4;
    }
};

// c [64, columns] += a [64, 16] b [16, columns] of a warpgroup, or = without `adds`; a from registers or shared memory
struct Product {
    Place place;
    int columns;
    bool transposed, adds, from_registers;
    uint64_t left, right;  // descriptors
    float (*number)(uint16_t);
    bool operator==(const Product& o) const {
        return place == o.place && left == o.left && right == o.right && columns == o.columns;
    }
};
struct PartOfProduct {
    float* c;
    const uint32_t* a;  // as it is until the wait, or null
    std::array<uint32_t, 4> registers;
};
struct IssuedProduct {
    Product product;
    int arrived = 0;
    std::array<PartOfProduct, kGroupSize> parts;
};
struct Warpgroup {
    int first;  // of its threads in the block
    std::vector<std::unique_ptr<IssuedProduct>> products;
    size_t done = 0;
    std::vector<Fiber*> waiting;  // for others to reach a product
};
// what products have made of a thread's registers, which are NaN meanwhile
struct Sums {
    std::vector<float> values;
    int pending = 0;  // products that the thread has not waited for
};

// to the shared memory of another block of the cluster
struct RemoteStore {
    Place place;
    const Fiber* owner;
    Block* target;
    size_t offset, bytes;
    void* to;
    std::array<unsigned char, kCopy> value;
    uint64_t barriers;  // of the owner's block so far
};

// a barrier object in shared memory
struct Mbarrier {
    int count, pending;
    uint64_t phase = 0;
    std::vector<Fiber*> waiting;
};

struct Cluster {
    std::vector<Block*> blocks;  // by rank
    int arrived = 0;             // of the threads that have not returned
    uint64_t phase = 0;
};

struct Fiber {
    Context context;
    Block* block = nullptr;
    uint3 thread;
    int rank = 0;  // of the thread in its block
    bool done = false;
    Place waits;                                // empty: can run
    Lanes lanes{};                              // what each lane brought to the last warp operation
    int pieces = 0;                             // of dynamic shared memory taken so far
    std::vector<std::shared_ptr<Copy>> copies;  // not waited for
    uint64_t copy_group = 0;                    // of the copies to come
    bool at_cluster_barrier = false;            // has arrived and not waited
    uint64_t cluster_phase = 0;                 // in which it has arrived
    std::vector<Access> accesses;
    size_t products = 0, products_waited = 0;  // so far
    std::vector<size_t> product_groups;        // products before the end of each
    std::map<float*, Sums> sums;               // of products that it has not waited for
    bool registers_ready = false;              // begin_products since its last wait
    std::vector<size_t> unshown;               // in units of kCopy, what it has written and not shown to products
    void* stack = nullptr;
    void* fake_stack = nullptr;  // of AddressSanitizer
};

// an operation that some lanes of a warp have reached; lanes of disjoint masks may be in different ones
struct WarpOperation {
    uint32_t mask = 0, arrived = 0;
    Place place;
    Lanes lanes{};
};

// separate allocations, so that AddressSanitizer sees an index past the end of each
struct SharedPiece {
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
    size_t offset = 0;  // in dynamic shared memory
};

struct Block {
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<std::vector<WarpOperation>> warps;
    std::vector<std::pair<Place, SharedPiece>> arrays;  // static shared memory, by declaration
    std::vector<SharedPiece> pieces;                    // dynamic shared memory, in the order it is taken
    std::unordered_map<void*, Copied> copied;
    size_t dynamic_bytes = 0;
    int at_barrier = 0, at_grid_barrier = 0, done = 0;
    Place barrier;
    std::shared_ptr<Cluster> cluster;
    int rank = 0;                              // in the cluster
    uint64_t barriers = 0;                     // passed
    std::map<size_t, Mbarrier> mbarriers;      // by offset in dynamic shared memory
    std::deque<RemoteStore> stores;            // of its threads, not released
    std::vector<const RemoteStore*> arriving;  // not released, by word of dynamic shared memory
    std::vector<std::shared_ptr<Warpgroup>> groups;
    std::vector<const Fiber*> unshown;  // who wrote each kCopy bytes of dynamic shared memory, until it shows them
    bool ended() const { return done == static_cast<int>(fibers.size()); }
};

class Grid {
   public:
    // cluster: blocks of a cluster, which follow one another in x
    Grid(uint3 grid, uint3 block, size_t shared, bool cooperative, unsigned cluster, unsigned seed,
         std::function<void()> body)
        : grid_(grid), block_(block), shared_(shared), cooperative_(cooperative), cluster_(cluster), uneven_(seed % 2),
          random_(seed), delays_(~seed), body_(std::move(body)) {}

    ~Grid() {
        for (void* stack : stacks_) {
            unpoison(stack);  // whoever gets these addresses next knows nothing of it
            munmap(stack, kStack);
        }
    }
    Grid(const Grid&) = delete;
    Grid& operator=(const Grid&) = delete;

    void run();

    // called by the running fiber
    void barrier(Place place);
    void grid_barrier(Place place);
    void yield();
    // `all` is called by the last lane, with what every lane has brought, before any goes on
    const Lanes& exchange(Place place, uint32_t mask, uint64_t value,
                          const std::function<void(const Lanes&)>& all = nullptr);
    void* shared_array(Place place, size_t bytes);
    std::pair<void*, size_t> shared_piece(size_t bytes);
    void shared_access(Place place, const void* address, size_t offset, size_t bytes);
    void shared_written(size_t offset, size_t bytes);
    void copy(Place place, void* to, size_t offset, const void* from);
    void commit_copies() { ++running_->copy_group; }
    void wait_for_copies(uint64_t pending);
    void show_to_products();
    void begin_products() { running_->registers_ready = true; }
    void multiply(const Product& product, float* c, const uint32_t* a);
    void commit_products() { running_->product_groups.push_back(running_->products); }
    void wait_for_products(size_t pending);
    void remote_store(Place place, int rank, size_t offset, const void* value, size_t bytes);
    void init_mbarrier(Place place, size_t offset, int count);
    void arrive_mbarrier(Place place, int rank, size_t offset);
    void wait_mbarrier(Place place, size_t offset, int parity);
    void arrive_cluster(Place place);
    void wait_cluster(Place place);

    uint3 grid_dim() const { return grid_; }
    uint3 block_dim() const { return block_; }
    Fiber& fiber() { return *running_; }
    void enter();

   private:
    void start_block(uint64_t index);
    void start_cluster(uint64_t index);
    Block& block_of_cluster(Place place, int rank, const char* does);
    static void* memory_at(const Block& block, size_t offset, size_t bytes);
    Mbarrier& mbarrier(Place place, Block& block, size_t offset);
    void release_stores();
    void touch_stores(Place place, size_t offset, size_t bytes);
    void touch_copies(Place place, const void* address);
    void check_factor(Place place, uint64_t descriptor, int rows, int columns);
    static void finish_products(Block& block, Warpgroup& group, size_t end);
    void land_later(std::function<void()> landing);
    void complete_cluster_barrier(Cluster& cluster);
    void start_fiber(Block& block, int rank);
    Fiber* pick();
    void resume(Fiber& fiber);
    void suspend(bool last = false);
    void wait(Place place);
    void wake(Fiber& fiber);
    void finish();
    void land_copies();
    [[noreturn]] void deadlock() const;
    [[noreturn]] void fail(const std::string& why) const;
    static std::string name(const Fiber& fiber);
    void* take_stack();
    static void unpoison(void* stack);
    static void count_traffic(const Block& block);

    uint3 grid_, block_;
    size_t shared_;
    bool cooperative_;
    unsigned cluster_;
    bool uneven_;                   // some warps run far ahead of others
    std::mt19937 random_, delays_;  // who runs next; how long copies take
    std::function<void()> body_;
    std::vector<std::unique_ptr<Block>> resident_;
    std::vector<Fiber*> runnable_;
    uint64_t step_ = 0;
    std::multimap<uint64_t, std::function<void()>> landings_;  // of copies and products, by step
    std::vector<void*> stacks_, free_stacks_;
    Fiber* running_ = nullptr;
    Context scheduler_;
    void* scheduler_fake_ = nullptr;
    const void* scheduler_stack_ = nullptr;
    size_t scheduler_size_ = 0;
    std::exception_ptr error_;
};

inline Grid*& current() {
    static Grid* grid = nullptr;
    return grid;
}

inline unsigned& seed() {
    static unsigned value = 0;
    return value;
}

// of the fake runtime: the current device, and that of the last launch
inline int& device() {
    static int value = 0;
    return value;
}
inline int& launched_on() {
    static int value = -1;
    return value;
}

// that of the devices: 80 for sm_80
inline int& architecture() {
    static int value = 80;
    return value;
}

inline Traffic& traffic() {
    static Traffic value;
    return value;
}

inline uint3 unravel(uint64_t i, uint3 size) {
    return {static_cast<unsigned>(i % size.x), static_cast<unsigned>(i / size.x % size.y),
            static_cast<unsigned>(i / size.x / size.y)};
}

inline void entry() { current()->enter(); }

inline void Grid::run() {
    const uint64_t blocks = uint64_t{grid_.x} * grid_.y * grid_.z / cluster_;  // or clusters
    std::vector<uint64_t> order(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    const size_t limit = cooperative_ ? blocks : cluster_ > 1 ? 1 : 2;
    uint64_t next = 0;
    Grid* outer = std::exchange(current(), this);
    while (next < blocks || !resident_.empty()) {
        while (next < blocks && resident_.size() < limit) start_cluster(order[next++]);
        if (runnable_.empty()) {
            current() = outer;
            deadlock();
        }
        land_copies();
        Fiber* fiber = pick();
        resume(*fiber);
        if (error_) {
            current() = outer;
            std::rethrow_exception(error_);
        }
        if (fiber->done) {
            free_stacks_.push_back(fiber->stack);
            if (traffic().counted && fiber->block->ended()) count_traffic(*fiber->block);
            const auto ended = [](const auto& b) {
                const auto& all = b->cluster->blocks;
                return std::all_of(all.begin(), all.end(), [](const Block* other) { return other->ended(); });
            };
            if (fiber->block->ended() && ended(fiber->block)) {
                const auto gone = std::partition(resident_.begin(), resident_.end(), std::not_fn(ended));
                resident_.erase(gone, resident_.end());
            }
        }
    }
    current() = outer;
}

// One of those that can run, under an odd seed mostly the one that was woken last: so a warp goes on to its next
// barrier before another has moved. Now and then it is any, for those that others wait for; the rest stay in their
// order, since a lane that went further down would hold up its warp until all others had moved.
inline Fiber* Grid::pick() {
    const bool any = !uneven_ || random_() % 64 == 0;
    const auto at = runnable_.end() - 1 - (any ? random_() % runnable_.size() : 0);
    Fiber* fiber = *at;
    if (uneven_) {
        runnable_.erase(at);
    } else {
        *at = runnable_.back();
        runnable_.pop_back();
    }
    return fiber;
}

inline void Grid::start_cluster(uint64_t index) {
    const auto cluster = std::make_shared<Cluster>();
    for (unsigned rank = 0; rank < cluster_; ++rank) {
        start_block(index * cluster_ + rank);
        Block& block = *resident_.back();
        block.cluster = cluster;
        block.rank = static_cast<int>(rank);
        cluster->blocks.push_back(&block);
    }
}

inline void Grid::start_block(uint64_t index) {
    auto block = std::make_unique<Block>();
    const unsigned threads = block_.x * block_.y * block_.z;
    block->index = unravel(index, grid_);
    block->fibers.resize(threads);
    block->warps.resize((threads + kWarpSize - 1) / kWarpSize);
    for (unsigned i = 0; i < threads; ++i) start_fiber(*block, static_cast<int>(i));
    resident_.push_back(std::move(block));
}

inline void Grid::start_fiber(Block& block, int rank) {
    Fiber& fiber = block.fibers[rank];
    fiber.block = &block;
    fiber.thread = unravel(rank, block_);
    fiber.rank = rank;
    fiber.stack = take_stack();
    unpoison(fiber.stack);
    fiber.context.start(fiber.stack, kStack, entry);
    runnable_.push_back(&fiber);
}

// AddressSanitizer's marks of the frames that a thread had there when it ended
inline void Grid::unpoison([[maybe_unused]] void* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStack);
#endif
}

inline void* Grid::take_stack() {
    if (free_stacks_.empty()) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) throw Failure("no memory for another thread of the grid");
        stacks_.push_back(stack);
        return stack;
    }
    void* stack = free_stacks_.back();
    free_stacks_.pop_back();
    return stack;
}

// AddressSanitizer is told of every change of stack
inline void Grid::resume(Fiber& fiber) {
    running_ = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_, fiber.stack, kStack);
#endif
    scheduler_.leave_for(fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
}

inline void Grid::suspend([[maybe_unused]] bool last) {
    Fiber& fiber = *running_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_size_);
#endif
    fiber.context.leave_for(scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
}

inline void Grid::enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_size_);
#endif
    try {
        body_();
        finish();
    } catch (...) {
        error_ = std::current_exception();
    }
    suspend(true);
}

inline void Grid::finish() {
    Block& block = *running_->block;
    if (!running_->copies.empty()) fail(name(*running_) + " returns before its copies have landed");
    if (running_->products > running_->products_waited) fail(name(*running_) + " returns before its products are done");
    running_->done = true;
    ++block.done;
    Cluster& cluster = *block.cluster;
    if (running_->at_cluster_barrier && running_->cluster_phase == cluster.phase) --cluster.arrived;
    complete_cluster_barrier(cluster);
    if (!block.ended()) return;
    if (!block.stores.empty()) {
        const RemoteStore& store = block.stores.front();
        fail(name(*store.owner) + " has not released its store at line " + std::to_string(store.place.line) +
             ", and its block returns");
    }
    for (const RemoteStore* store : block.arriving) {
        if (store == nullptr) continue;
        fail(name(*running_) + " returns while the store at line " + std::to_string(store->place.line) + " of " +
             name(*store->owner) + " is on its way to its block");
    }
}

inline void Grid::wait(Place place) {
    running_->waits = place;
    suspend();
}

inline void Grid::wake(Fiber& fiber) {
    fiber.waits = {};
    if (&fiber != running_) runnable_.push_back(&fiber);
}

inline void Grid::yield() {
    runnable_.push_back(running_);
    suspend();
}

inline void Grid::barrier(Place place) {
    Block& block = *running_->block;
    if (block.at_barrier == 0) block.barrier = place;
    if (!(block.barrier == place)) {
        std::ostringstream why;
        why << "divergent barrier: " << name(*running_) << " is at " << place.file << ":" << place.line
            << " while others of its block wait at " << block.barrier.file << ":" << block.barrier.line;
        fail(why.str());
    }
    if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
        block.at_barrier = 0;
        ++block.barriers;
        for (auto i = block.copied.begin(); i != block.copied.end();) {
            i = i->second.waited ? block.copied.erase(i) : std::next(i);
        }
        // under an odd seed those that are woken last go on first: any warp may be the one that runs ahead
        const size_t all = block.fibers.size(), first = uneven_ ? random_() % all / kWarpSize * kWarpSize : 0;
        for (size_t i = 0; i < all; ++i) wake(block.fibers[(first + i) % all]);
        return yield();  // the last to arrive need not be the first to go on
    }
    wait(place);
}

inline void Grid::grid_barrier(Place place) {
    if (!cooperative_) fail("grid barrier in a launch that is not cooperative");
    ++running_->block->at_grid_barrier;
    const auto all = [](const auto& b) { return b->at_grid_barrier == static_cast<int>(b->fibers.size()); };
    if (std::all_of(resident_.begin(), resident_.end(), all) &&
        resident_.size() == size_t{grid_.x} * grid_.y * grid_.z) {
        for (auto& block : resident_) {
            block->at_grid_barrier = 0;
            for (Fiber& fiber : block->fibers) wake(fiber);
        }
        return yield();
    }
    wait(place);
}

inline const Lanes& Grid::exchange(Place place, uint32_t mask, uint64_t value,
                                   const std::function<void(const Lanes&)>& all) {
    Fiber& fiber = *running_;
    auto& pending = fiber.block->warps[fiber.rank / kWarpSize];
    const int lane = fiber.rank % kWarpSize;
    if ((mask >> lane & 1) == 0) fail(name(fiber) + " calls " + place.what + " with a mask that leaves itself out");
    auto operation = std::find_if(pending.begin(), pending.end(), [&](const auto& o) { return o.mask == mask; });
    if (operation == pending.end()) operation = pending.insert(operation, WarpOperation{mask, 0, place, {}});
    if (!(operation->place == place)) {
        std::ostringstream why;
        why << "divergent warp: " << name(fiber) << " is in " << place.what << " at line " << place.line
            << " while others of its warp wait in " << operation->place.what << " at line " << operation->place.line;
        fail(why.str());
    }
    operation->lanes[lane] = value;
    operation->arrived |= uint32_t{1} << lane;
    if (operation->arrived != mask) {
        wait(place);
        return fiber.lanes;
    }
    if (all) all(operation->lanes);
    for (int i = 0; i < kWarpSize; ++i) {
        if ((mask >> i & 1) == 0) continue;
        Fiber& other = fiber.block->fibers[fiber.rank - lane + i];
        other.lanes = operation->lanes;
        wake(other);
    }
    pending.erase(operation);
    yield();
    return fiber.lanes;
}

inline SharedPiece poisoned(size_t bytes) {
    SharedPiece piece{bytes, std::unique_ptr<unsigned char[]>(new unsigned char[bytes])};
    std::memset(piece.memory.get(), kPoison, bytes);
    return piece;
}

inline void* Grid::shared_array(Place place, size_t bytes) {
    auto& arrays = running_->block->arrays;
    for (auto& [at, piece] : arrays) {
        if (at == place) return piece.memory.get();
    }
    arrays.emplace_back(place, poisoned(bytes));
    return arrays.back().second.memory.get();
}

inline std::pair<void*, size_t> Grid::shared_piece(size_t bytes) {
    Block& block = *running_->block;
    const size_t number = running_->pieces++;
    if (number == block.pieces.size()) {
        block.dynamic_bytes += (bytes + 15) / 16 * 16;
        if (block.dynamic_bytes > shared_) {
            std::ostringstream why;
            why << name(*running_) << " takes " << block.dynamic_bytes
                << " bytes of dynamic shared memory; the launch gave " << shared_;
            fail(why.str());
        }
        block.pieces.push_back(poisoned(bytes));
        block.pieces.back().offset = block.dynamic_bytes - (bytes + 15) / 16 * 16;
    }
    if (block.pieces[number].bytes != bytes)
        fail(name(*running_) + " takes other pieces of shared memory than its block");
    return {block.pieces[number].memory.get(), block.pieces[number].offset};
}

inline void Grid::shared_access(Place place, const void* address, size_t offset, size_t bytes) {
    if (traffic().counted) running_->accesses.push_back({place, offset, bytes});
    touch_stores(place, offset, bytes);
    touch_copies(place, address);
}

inline void Grid::touch_copies(Place place, const void* address) {
    auto& copied = running_->block->copied;
    if (copied.empty()) return;
    // a copy begins at a multiple of kCopy, and no access is longer
    void* first = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(address) / kCopy * kCopy);
    const auto found = copied.find(first);
    if (found == copied.end() || (found->second.waited && found->second.owner == running_)) return;
    std::ostringstream why;
    const Copied& copy = found->second;
    why << name(*running_) << " is in " << place.what << " at " << place.file << ":" << place.line
        << " where the copy at line " << copy.place.line << " of " << name(*copy.owner)
        << (copy.waited ? " has landed, with no barrier since then" : " is on its way");
    fail(why.str());
}

inline void Grid::copy(Place place, void* to, size_t offset, const void* from) {
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % kCopy != 0) {
        fail(name(*running_) + " copies from or to a misaligned address at line " + std::to_string(place.line));
    }
#if defined(__SANITIZE_ADDRESS__)
    // here, where the place is known: when it lands another thread may be running
    if (from != nullptr && __asan_region_is_poisoned(const_cast<void*>(from), kCopy) != nullptr) {
        fail(name(*running_) + " copies from outside of an array at line " + std::to_string(place.line));
    }
#endif
    shared_access(place, to, offset, kCopy);
    shared_written(offset, kCopy);
    std::memset(to, kPoison, kCopy);
    running_->copies.push_back(std::make_shared<Copy>(Copy{to, from, running_->copy_group}));
    running_->block->copied[to] = {place, running_, false};
    land_later([copy = running_->copies.back()] { copy->land(); });
    yield();
}

inline void Grid::land_later(std::function<void()> landing) {
    // of every order of magnitude alike: between a copy and its wait a kernel takes ten steps or ten thousand
    const uint64_t longest = uint64_t{1} << delays_() % kDelays;
    landings_.emplace(step_ + 1 + delays_() % longest, std::move(landing));
}

inline void Grid::land_copies() {
    ++step_;
    for (; !landings_.empty() && landings_.begin()->first <= step_; landings_.erase(landings_.begin())) {
        landings_.begin()->second();
    }
}

inline void Grid::wait_for_copies(uint64_t pending) {
    auto& copies = running_->copies;
    const auto waited = std::remove_if(copies.begin(), copies.end(), [&](const auto& copy) {
        if (copy->group + pending >= running_->copy_group) return false;
        copy->land();
        running_->block->copied.at(copy->to).waited = true;
        return true;
    });
    copies.erase(waited, copies.end());
    yield();
}

inline void Grid::shared_written(size_t offset, size_t bytes) {
    auto& unshown = running_->block->unshown;
    unshown.resize(shared_ / kCopy + 1);
    for (size_t place = offset / kCopy; place < (offset + bytes + kCopy - 1) / kCopy; ++place) {
        if (std::exchange(unshown[place], running_) != running_) running_->unshown.push_back(place);
    }
}

inline void Grid::show_to_products() {
    Block& block = *running_->block;
    auto& mine = running_->unshown;
    const auto shown = std::remove_if(mine.begin(), mine.end(), [&](size_t place) {
        if (block.unshown[place] != running_) return true;
        const auto copy = block.copied.find(memory_at(block, place * kCopy, kCopy));
        if (copy != block.copied.end() && !copy->second.waited) return false;
        block.unshown[place] = nullptr;
        return true;
    });
    mine.erase(shown, mine.end());
    yield();
}

// where a product of the running thread is issued
inline void Grid::check_factor(Place place, uint64_t descriptor, int rows, int columns) {
    const Factor factor(descriptor);
    Block& block = *running_->block;
    const std::string where = " of the product at line " + std::to_string(place.line);
    if (factor.line == 0) fail("the rows" + where + " are not swizzled by 64 or 128 bytes");
    for (int row = 0; row < rows; ++row) {
        for (int column = 0; column < columns; column += 8) {
            const size_t offset = factor.at(row, column);
            const void* address = memory_at(block, offset, kCopy);
            if (address == nullptr) fail("a factor" + where + " reaches beyond the block's shared memory");
            touch_stores(place, offset, kCopy);
            touch_copies(place, address);
            if (block.unshown.empty() || block.unshown[offset / kCopy] == nullptr) continue;
            fail("a factor" + where + " has not been shown to products by " + name(*block.unshown[offset / kCopy]));
        }
    }
}

inline void Grid::multiply(const Product& product, float* c, const uint32_t* a) {
    Fiber& fiber = *running_;
    Block& block = *fiber.block;
    const Place place = product.place;
    if (block.fibers.size() % kGroupSize != 0) fail("a block of parts of warpgroups multiplies");
    if (!fiber.registers_ready) {
        fail(name(fiber) + " multiplies at line " + std::to_string(place.line) + " without begin_products");
    }
    block.groups.resize(block.fibers.size() / kGroupSize);
    auto& shared_group = block.groups[fiber.rank / kGroupSize];
    if (!shared_group) shared_group.reset(new Warpgroup{fiber.rank / kGroupSize * kGroupSize, {}, 0, {}});
    Warpgroup& group = *shared_group;
    const size_t number = fiber.products++;
    if (number == group.products.size()) {
        group.products.push_back(std::make_unique<IssuedProduct>(IssuedProduct{product, 0, {}}));
    }
    IssuedProduct& issued = *group.products[number];
    if (!(issued.product == product)) {
        fail("divergent warpgroup: " + name(fiber) + " multiplies at line " + std::to_string(place.line) +
             " while others do at line " + std::to_string(issued.product.place.line) + ", or by other factors");
    }
    PartOfProduct& part = issued.parts[fiber.rank % kGroupSize];
    part = {c, a, {}};
    if (a != nullptr) std::copy_n(a, part.registers.size(), part.registers.begin());
    const int registers = product.columns / 2;
    Sums& sums = fiber.sums[c];
    if (sums.pending++ == 0) {
        sums.values.assign(c, c + registers);
        std::memset(static_cast<void*>(c), kPoison, registers * sizeof(float));
    }
    if (++issued.arrived < kGroupSize) return;
    const int k = kProductDepth, n = product.columns;
    check_factor(place, product.right, product.transposed ? k : n, product.transposed ? n : k);
    if (!product.from_registers) check_factor(place, product.left, kProductRows, k);
    for (Fiber* other : std::exchange(group.waiting, {})) wake(*other);
    // the block may have ended by then, behind its waits: they leave nothing to do
    land_later([&block, group = shared_group, number] { finish_products(block, *group, number + 1); });
    yield();
}

// in the order in which they were issued
inline void Grid::finish_products(Block& block, Warpgroup& group, size_t end) {
    for (; group.done < end; ++group.done) {
        const IssuedProduct& issued = *group.products[group.done];
        const Product& product = issued.product;
        const auto read = [&](const Factor& factor, int row, int column) {
            uint16_t bits;
            std::memcpy(&bits, memory_at(block, factor.at(row, column), sizeof bits), sizeof bits);
            return product.number(bits);
        };
        float left[kProductRows][kProductDepth];
        std::vector<float> right(product.columns * kProductDepth);
        for (int n = 0; n < product.columns; ++n) {
            for (int k = 0; k < kProductDepth; ++k) {
                right[n * kProductDepth + k] =
                    product.transposed ? read(Factor(product.right), k, n) : read(Factor(product.right), n, k);
            }
        }
        // lane 4 r + q of warp w has rows 16 w + r and 16 w + r + 8; of a, register i is of row r + 8 (i % 2) and
        // columns 2 q + 8 (i / 2) on, two of them; of c, of each eight columns 2 q and 2 q + 1 of both rows
        for (int thread = 0; thread < kGroupSize; ++thread) {
            const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4, pair = 2 * (thread % 4);
            for (int i = 0; i < 4 * 2 && product.from_registers; ++i) {
                const auto bits = static_cast<uint16_t>(issued.parts[thread].registers[i / 2] >> (16 * (i % 2)));
                left[row + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = product.number(bits);
            }
        }
        for (int row = 0; row < kProductRows && !product.from_registers; ++row) {
            for (int k = 0; k < kProductDepth; ++k) left[row][k] = read(Factor(product.left), row, k);
        }
        for (int thread = 0; thread < kGroupSize; ++thread) {
            const int row = thread / kWarpSize * 16 + thread % kWarpSize / 4, pair = 2 * (thread % 4);
            auto& values = block.fibers[group.first + thread].sums.at(issued.parts[thread].c).values;
            for (size_t i = 0; i < values.size(); ++i) {
                const float* a = left[row + i % 4 / 2 * 8];
                const float* b = &right[(i / 4 * 8 + pair + i % 2) * kProductDepth];
                float sum = product.adds ? values[i] : 0.0f;
                for (int k = 0; k < kProductDepth; ++k) sum += a[k] * b[k];
                values[i] = sum;
            }
        }
    }
}

inline void Grid::wait_for_products(size_t pending) {
    Fiber& fiber = *running_;
    fiber.registers_ready = false;
    const size_t groups = fiber.product_groups.size();
    const size_t end = groups > pending ? fiber.product_groups[groups - 1 - pending] : 0;
    if (end > fiber.products_waited) {
        Warpgroup& group = *fiber.block->groups[fiber.rank / kGroupSize];
        while (group.products[end - 1]->arrived < kGroupSize) {
            group.waiting.push_back(&fiber);
            wait(group.products[end - 1]->product.place);
        }
        finish_products(*fiber.block, group, end);
        for (; fiber.products_waited < end; ++fiber.products_waited) {
            const IssuedProduct& issued = *group.products[fiber.products_waited];
            const PartOfProduct& part = issued.parts[fiber.rank % kGroupSize];
            if (part.a != nullptr && !std::equal(part.registers.begin(), part.registers.end(), part.a)) {
                fail(name(fiber) + " changes a factor of the product at line " +
                     std::to_string(issued.product.place.line) + " before its wait");
            }
            const auto sums = fiber.sums.find(part.c);
            if (--sums->second.pending > 0) continue;
            std::copy(sums->second.values.begin(), sums->second.values.end(), part.c);
            fiber.sums.erase(sums);
        }
    }
    yield();
}

inline Block& Grid::block_of_cluster(Place place, int rank, const char* does) {
    const auto& blocks = running_->block->cluster->blocks;
    const bool there = rank >= 0 && rank < static_cast<int>(blocks.size());
    if (there && !blocks[rank]->ended()) return *blocks[rank];
    std::ostringstream why;
    why << name(*running_) << ' ' << does << " block " << rank << " of its cluster at " << place.file << ":"
        << place.line << (there ? ", which has returned" : ", which there is not");
    fail(why.str());
}

// null: the block has not taken it
inline void* Grid::memory_at(const Block& block, size_t offset, size_t bytes) {
    for (const SharedPiece& piece : block.pieces) {
        if (offset < piece.offset || offset + bytes > piece.offset + piece.bytes) continue;
        return piece.memory.get() + (offset - piece.offset);
    }
    return nullptr;
}

inline void Grid::remote_store(Place place, int rank, size_t offset, const void* value, size_t bytes) {
    constexpr size_t kWord = 4;
    Block& target = block_of_cluster(place, rank, "stores to");
    void* to = memory_at(target, offset, bytes);
    if (to == nullptr) {
        fail(name(*running_) + " stores at line " + std::to_string(place.line) + " to shared memory that block " +
             std::to_string(rank) + " of its cluster has not taken");
    }
    if (reinterpret_cast<uintptr_t>(to) % bytes != 0) {
        fail(name(*running_) + " stores to a misaligned address at line " + std::to_string(place.line));
    }
    target.arriving.resize(std::max(target.arriving.size(), shared_ / kWord));
    auto& stores = running_->block->stores;
    stores.push_back({place, running_, &target, offset, bytes, to, {}, running_->block->barriers});
    RemoteStore& store = stores.back();
    std::memcpy(store.value.data(), value, bytes);
    for (size_t word = offset / kWord; word < (offset + bytes) / kWord; ++word) {
        const RemoteStore* before = std::exchange(target.arriving[word], &store);
        if (before == nullptr) continue;
        fail(name(*running_) + " stores at line " + std::to_string(place.line) + " where the store at line " +
             std::to_string(before->place.line) + " of " + name(*before->owner) + " is on its way");
    }
}

// those that a release of the running thread covers
inline void Grid::release_stores() {
    constexpr size_t kWord = 4;
    Block& block = *running_->block;
    const auto covered = [&](const RemoteStore& s) { return s.owner == running_ || s.barriers < block.barriers; };
    std::deque<RemoteStore> others;
    for (RemoteStore& store : block.stores) {
        auto& arriving = store.target->arriving;
        const bool released = covered(store);
        if (released) std::memcpy(store.to, store.value.data(), store.bytes);
        if (!released) others.push_back(store);
        const RemoteStore* now = released ? nullptr : &others.back();
        std::fill_n(arriving.begin() + store.offset / kWord, store.bytes / kWord, now);
    }
    block.stores.swap(others);
}

inline void Grid::touch_stores(Place place, size_t offset, size_t bytes) {
    constexpr size_t kWord = 4;
    const auto& arriving = running_->block->arriving;
    if (arriving.empty()) return;
    for (size_t word = offset / kWord; word < (offset + bytes + kWord - 1) / kWord; ++word) {
        if (arriving[word] == nullptr) continue;
        std::ostringstream why;
        why << name(*running_) << " is in " << place.what << " at " << place.file << ":" << place.line
            << " where the store at line " << arriving[word]->place.line << " of " << name(*arriving[word]->owner)
            << " is on its way";
        fail(why.str());
    }
}

inline void Grid::init_mbarrier(Place place, size_t offset, int count) {
    shared_access(place, memory_at(*running_->block, offset, sizeof(uint64_t)), offset, sizeof(uint64_t));
    running_->block->mbarriers[offset] = {count, count, 0, {}};
    yield();
}

inline Mbarrier& Grid::mbarrier(Place place, Block& block, size_t offset) {
    const auto found = block.mbarriers.find(offset);
    if (found != block.mbarriers.end()) return found->second;
    fail(name(*running_) + " is in " + place.what + " at line " + std::to_string(place.line) +
         ", where there is no barrier yet");
}

inline void Grid::arrive_mbarrier(Place place, int rank, size_t offset) {
    yield();
    release_stores();
    Mbarrier& barrier = mbarrier(place, block_of_cluster(place, rank, "arrives at a barrier of"), offset);
    if (--barrier.pending == 0) {
        barrier.pending = barrier.count;
        ++barrier.phase;
        for (Fiber* fiber : std::exchange(barrier.waiting, {})) wake(*fiber);
    }
    yield();
}

inline void Grid::wait_mbarrier(Place place, size_t offset, int parity) {
    yield();
    Mbarrier& barrier = mbarrier(place, *running_->block, offset);
    if (static_cast<int>(barrier.phase % 2) != parity) return;
    barrier.waiting.push_back(running_);
    wait(place);
}

inline void Grid::complete_cluster_barrier(Cluster& cluster) {
    int running = 0;
    for (const Block* block : cluster.blocks) running += static_cast<int>(block->fibers.size()) - block->done;
    if (cluster.arrived < running || running == 0) return;
    cluster.arrived = 0;
    ++cluster.phase;
    for (Block* block : cluster.blocks) {
        for (Fiber& fiber : block->fibers) {
            if (std::strcmp(fiber.waits.what, "cluster_wait") == 0) wake(fiber);
        }
    }
}

inline void Grid::arrive_cluster(Place place) {
    yield();
    if (running_->at_cluster_barrier) {
        fail(name(*running_) + " arrives again without a wait at line " + std::to_string(place.line));
    }
    release_stores();
    Cluster& cluster = *running_->block->cluster;
    running_->at_cluster_barrier = true;
    running_->cluster_phase = cluster.phase;
    ++cluster.arrived;
    complete_cluster_barrier(cluster);
    yield();
}

inline void Grid::wait_cluster(Place place) {
    if (!std::exchange(running_->at_cluster_barrier, false)) {
        fail(name(*running_) + " waits without having arrived at line " + std::to_string(place.line));
    }
    if (running_->block->cluster->phase == running_->cluster_phase) wait(place);
    yield();
}

// The n-th access of each lane from one place in the source is one access of the warp.
inline void Grid::count_traffic(const Block& block) {
    constexpr int kBanks = 32, kWord = 4;
    uint64_t wavefronts = 0, conflicts = 0;
    for (size_t first = 0; first < block.fibers.size(); first += kWarpSize) {
        std::map<std::tuple<std::string, int, int>, std::vector<std::pair<int, const Access*>>> of_warp;
        for (size_t i = first; i < std::min(first + kWarpSize, block.fibers.size()); ++i) {
            std::map<std::pair<std::string, int>, int> seen;
            for (const Access& access : block.fibers[i].accesses) {
                const std::pair<std::string, int> at{access.place.what, access.place.line};
                of_warp[{at.first, at.second, seen[at]++}].emplace_back(static_cast<int>(i - first), &access);
            }
        }
        for (const auto& [at, lanes] : of_warp) {
            const int together = 128 / static_cast<int>(lanes.front().second->bytes);
            for (int from = 0; from < kWarpSize; from += std::min(together, kWarpSize)) {
                std::array<std::set<size_t>, kBanks> words;
                for (const auto& [lane, access] : lanes) {
                    if (lane < from || lane >= from + together) continue;
                    for (size_t byte = access->offset; byte < access->offset + access->bytes; byte += kWord) {
                        words[byte / kWord % kBanks].insert(byte / kWord);
                    }
                }
                size_t most = 0;
                for (const auto& bank : words) most = std::max(most, bank.size());
                wavefronts += most;
                conflicts += most > 0 ? most - 1 : 0;
            }
        }
    }
    traffic().wavefronts = std::max(traffic().wavefronts, wavefronts);
    traffic().conflicts = std::max(traffic().conflicts, conflicts);
}

inline std::string Grid::name(const Fiber& fiber) {
    std::ostringstream text;
    const uint3 b = fiber.block->index, t = fiber.thread;
    text << "block (" << b.x << ", " << b.y << ", " << b.z << ") thread (" << t.x << ", " << t.y << ", " << t.z << ")";
    return text.str();
}

inline void Grid::fail(const std::string& why) const { throw Failure(why); }

inline void Grid::deadlock() const {
    std::ostringstream why;
    why << "deadlock: ";
    int told = 0;
    for (const auto& block : resident_) {
        for (const Fiber& fiber : block->fibers) {
            if (fiber.done) continue;
            if (told++ == 0) {
                why << name(fiber) << " waits in " << fiber.waits.what << " at " << fiber.waits.file << ":"
                    << fiber.waits.line << "; ";
            }
        }
        const auto ended =
            std::find_if(block->fibers.begin(), block->fibers.end(), [](const Fiber& f) { return f.done; });
        if (ended != block->fibers.end()) why << name(*ended) << " has returned; ";
    }
    why << told << " threads wait and none can run";
    throw Failure(why.str());
}

}  // namespace emulation
