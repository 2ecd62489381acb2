// Finds accesses of a block's threads to the same memory with no barrier between them, in the
// checked build (`tools/build_cuda_emulator.sh --checked`).
//
// The compiler calls `__tsan_read4` and the like for every access of a kernel. A barrier of the
// block orders all that was before it; `__syncwarp` what its lanes did; shuffles and matrix
// products order nothing (CUDA C++ Programming Guide, "Warp Shuffle Functions"). Blocks are not compared
// with each other. Atomics race with other accesses and not with atomics.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

class Races {
  public:
    // Every access so far is in front of every access from now on.
    void barrier();
    // The lanes of `mask` of a warp wait for each other.
    void sync_warp(int warp, unsigned mask);
    // What is wrong with an access, or nothing.
    std::string access(int thread, const void* p, size_t bytes, bool write, bool atomic, const void* code);

  private:
    struct Access {
        uint16_t thread;
        bool atomic;
        uint16_t clock;
        const void* code;
    };
    // Of one byte since the last barrier: the last write, the first read, the last read by another.
    struct Byte {
        uintptr_t address = 0;
        uint32_t generation = 0;
        uint8_t there = 0;
        Access write, read, other;
    };
    Byte& find(uintptr_t address);
    bool ordered(const Access& before, int thread) const;
    std::string report(const Access& before, const char* did, int thread, const char* does, uintptr_t address,
        const void* code) const;

    std::vector<Byte> table = std::vector<Byte>(1 << 12);
    size_t used = 0;
    uint32_t generation = 1;
    // What a lane knows of the lanes of its warp, itself included.
    uint16_t clocks[32][32][32] = {};
};
