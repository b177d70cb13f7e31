// Memory of kernels. A thread keeps the last block that it used for its next kernel, so that calls of few frames take
// none from the system.
#pragma once

#include <cstdint>

namespace lcc::cpu {

struct Block {
    void* data = nullptr;
    int64_t bytes = 0;
};

// at least that many bytes, from a cache line on, with anything in them; throws std::bad_alloc
Block take_block(int64_t bytes);
void give_back(Block block);

}  // namespace lcc::cpu
