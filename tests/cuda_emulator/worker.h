// A fiber, and the worker that runs a block of them.
#pragma once

#include "fibers.h"
#include "races.h"

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__x86_64__)
#define FAST_SWITCH 1
#else
#include <ucontext.h>
#endif

void trine_access(const void* p, size_t bytes, bool write, bool atomic, const void* code);

#ifdef TRINE_CHECKED
constexpr bool CHECKED = true;
#else
constexpr bool CHECKED = false;
#endif

constexpr int MOST_THREADS = 1024;
constexpr size_t PAGE = 4096;
// Shared memory of a block at most, on any GPU.
constexpr size_t MOST_SHARED = 228 * 1024;

enum State : uint8_t { READY, AT_BARRIER, AT_WARP, RETURNED };

struct Copy {
    void* shared;
    const void* global;
    bool there;
    unsigned group;
    const void* code;
};

struct Worker;

// Lies at the top of a fiber's memory; the stack comes down from it to a page that faults.
struct alignas(64) Fiber : TrineThread {
    Worker* worker;
    int number;
    State state;
    bool waited_for_previous;
    // What it waits at.
    int line;
    unsigned mask;
    const char* file;
    const char* name;
    void* lane;
    TrineFinish finish;
    // Asynchronous copies under way, and the number of the group that is being filled.
    std::vector<Copy>* copies;
    unsigned group;
#if FAST_SWITCH
    void* stack;
#else
    ucontext_t context;
#endif
    char* foot() const { return reinterpret_cast<char*>(reinterpret_cast<size_t>(this) & ~(TRINE_FIBER_BYTES - 1)); }
};

struct Job {
    const TrineKernel* kernel;
    const void* argument;
    dim3 grid, block;
    size_t shared;
    uint64_t blocks;
    std::atomic<uint64_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex lock;
    Outcome outcome;
};

struct Worker {
    std::vector<Fiber*> fibers;
    char* stacks = nullptr;
    unsigned char* shared = nullptr; // its end is a page that faults
    TrineBlock block;
    Job* job = nullptr;
    Fiber* running = nullptr;
    bool failed = false;
    int count = 0, alive = 0, at_barrier = 0;
    // Threads in the order in which they are to run, the ready ones among them by this order.
    uint16_t order[MOST_THREADS], rank[MOST_THREADS];
    uint64_t ready[MOST_THREADS / 64];
    unsigned waiting[MOST_THREADS / 32]; // lanes of a warp that wait for others of it
    uint64_t random = 0;
    uint64_t waits = 0; // of its threads for each other
    std::unique_ptr<Races> races{CHECKED ? new Races() : nullptr};
    bool late_copies = false;
#if FAST_SWITCH
    void* stack = nullptr;
#else
    ucontext_t context;
#endif

    Worker();
    Fiber* fiber(int number);
    void draw_order();
    void set_ready(int number) { ready[rank[number] / 64] |= 1ull << rank[number] % 64; }
    // The first of the ready, which is then the one that runs; null if there is none.
    Fiber* next() {
        if (failed) return nullptr;
        for (int word = 0; 64 * word < count; word++) {
            if (!ready[word]) continue;
            const int bit = __builtin_ctzll(ready[word]);
            ready[word] &= ready[word] - 1;
            return running = fibers[order[64 * word + bit]];
        }
        return nullptr;
    }
    void run_block(uint64_t number);
    void fail(Result result, const std::string& text);
    std::string stuck(const char* what) const;
};

// Memory that costs nothing until it is touched.
void* reserve(size_t bytes);
// To the next fiber that can run, or to the worker where none can; until this one is resumed.
void leave(Fiber* fiber);
// The worker that runs on this thread, if it is inside a block.
extern thread_local Worker* current;
