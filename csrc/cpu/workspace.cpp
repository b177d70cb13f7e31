#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

namespace lcc::cpu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kMostKept = 0;  // a block as long as asked for, so that no access beyond it is missed
#else
constexpr int64_t kMostKept = 1 << 21;  // bytes, of a thread: enough for two threads on 400 frames, d_model 256
#endif

struct Kept {
    Block block;
    ~Kept() { std::free(block.data); }
};

thread_local Kept kept;

}  // namespace

Block take_block(int64_t bytes) {
    if (kept.block.bytes >= bytes) {
        const Block block = kept.block;
        kept.block = {};
        return block;
    }
    Block block = {nullptr, bytes};
    if (posix_memalign(&block.data, 64, bytes) != 0) throw std::bad_alloc();
    return block;
}

void give_back(Block block) {
    if (block.bytes <= kMostKept && block.bytes > kept.block.bytes) {
        const Block shorter = kept.block;
        kept.block = block;
        block = shorter;
    }
    std::free(block.data);
}

}  // namespace lcc::cpu
