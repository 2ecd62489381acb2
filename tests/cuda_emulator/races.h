// Finds accesses of a block's threads to the same memory with no barrier between them, in the
// checked build (`tools/build_cuda_emulator.sh --checked`).
//
// The compiler calls `__tsan_read4` and the like for every access of a kernel. A barrier of the
// block orders all that was before it; `__syncwarp` what its lanes did. Shuffles and the like order
// what lanes had read, and not what they had written: they "do not imply a memory barrier" (CUDA C++
// Programming Guide, "Warp Shuffle Functions"). Blocks are not compared with each other. Atomics race with
// other accesses and not with atomics. Writes of what is there already are none.
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
    void sync_warp(int warp, unsigned mask) { sync(written, warp, mask), sync(read, warp, mask); }
    // The lanes of `mask` exchange something.
    void exchange(int warp, unsigned mask) { sync(read, warp, mask); }
    // What is wrong with an access, or with the write before it, or nothing.
    std::string access(int thread, const void* p, size_t bytes, bool write, bool atomic, const void* code);
    // The same of the write before alone.
    std::string last();

  private:
    // What a lane knows of the lanes of its warp, itself included.
    typedef uint16_t Clocks[32][32][32];
    static void sync(Clocks& clocks, int warp, unsigned mask);
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
    static bool ordered(const Clocks& clocks, const Access& before, int thread);
    static std::string report(const Access& before, const char* did, const Access& now, const char* does,
        uintptr_t address);

    std::vector<Byte> table = std::vector<Byte>(1 << 12);
    size_t used = 0;
    uint32_t generation = 1;
    Clocks written = {}, read = {};
    // A write that is about to change what another thread wrote, unless it is the same again.
    struct Overwritten {
        const unsigned char* p;
        unsigned char value;
        Access before, now;
    };
    std::vector<Overwritten> overwritten;
};
