// What the parts of the driver share: devices, contexts, and their streams.
#pragma once

#include "fibers.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
// Handles are addresses that nobody looks behind.
typedef void* CUcontext;
typedef void* CUstream;
typedef void* CUevent;
typedef void* CUmodule;
typedef void* CUfunction;
typedef void* CUgraph;
typedef void* CUgraphExec;

// What the environment asked for, read by the first `cuInit`.
struct Settings {
    int devices = 1;
    size_t memory = 4ull << 30;
    int driver = 12080;
    int major = 9, minor = 0;
    int multiprocessors = 8;
    long fail_launch = 0; // counted from 1
    bool check = false; // the redzones, after every launch
    bool eager = false; // runs work when it is enqueued and not when it is waited for
};
const Settings& settings();

// One piece of a stream's work, or of a graph's.
struct Stream;
struct Event;
struct Work {
    std::function<Outcome()> run; // empty for an event's
    bool launch = false;
    std::shared_ptr<Stream> before; // which must have come to `target` first
    uint64_t target = 0;
    std::shared_ptr<Event> record;
    uint64_t generation = 0;
};

struct Graph {
    std::vector<Work> nodes;
};

// A capture, shared by the streams that were drawn into it by events.
struct Capture {
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
    Stream* origin = nullptr;
    int mode = 0; // 0 global, 1 of the thread, 2 relaxed
    std::thread::id thread;
    bool valid = true;
};

struct Context;
struct Stream {
    Context* context = nullptr;
    bool blocking = true; // with respect to the null stream
    std::deque<Work> work;
    uint64_t enqueued = 0, done = 0;
    bool busy = false;
    std::shared_ptr<Capture> capture;
};

struct Event {
    Context* context = nullptr;
    bool timing = true;
    std::shared_ptr<Stream> stream; // null until recorded
    uint64_t target = 0, generation = 0;
    bool stamped = false;
    std::chrono::steady_clock::time_point time;
    std::shared_ptr<Capture> capture;
};

struct Module {
    Context* context = nullptr;
    std::string image;
    bool ptx = false;
};

struct Function {
    std::shared_ptr<Module> module;
    const TrineKernel* kernel = nullptr;
    int most_shared = 48 * 1024;
};

struct Allocation {
    size_t bytes = 0; // as asked for
    char* map = nullptr;
    size_t mapped = 0;
};

struct Context {
    CUdevice device = 0;
    bool primary = true;
    // Once set, every call gives it.
    Result error = SUCCESS;
    std::map<CUdeviceptr, Allocation> memory;
    std::map<const char*, size_t> pinned;
    std::unordered_map<void*, std::shared_ptr<Stream>> streams;
    std::unordered_map<void*, std::shared_ptr<Event>> events;
    std::unordered_map<void*, std::shared_ptr<Module>> modules;
    std::unordered_map<void*, std::shared_ptr<Function>> functions;
    std::shared_ptr<Stream> null_stream = std::make_shared<Stream>();
};

struct Device {
    size_t used = 0;
    unsigned retained = 0;
    std::shared_ptr<Context> primary;
};

// One lock for all state. It is released while a kernel runs.
extern std::mutex state;
typedef std::unique_lock<std::mutex> Hold;
extern std::condition_variable changed;

Device& device(CUdevice ordinal);
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, CUdevice ordinal);
bool initialized();
// The context of this thread, or why there is none or it is broken.
Result current_context(std::shared_ptr<Context>& context);
// Prints what went wrong, and breaks the context.
void break_context(Context& context, const Outcome& outcome);

// Begins a call that needs a context: takes the lock, and returns early where there is none.
#define IN_CONTEXT(context) \
    Hold hold(state); \
    std::shared_ptr<Context> context; \
    if (Result none = current_context(context)) return none

// --- streams.cpp
std::shared_ptr<Stream> find_stream(Context& context, CUstream handle);
Result enqueue(Hold& hold, Context& context, const std::shared_ptr<Stream>& stream, Work work);
void run_until(Hold& hold, const std::shared_ptr<Stream>& stream, uint64_t target);
void run_all(Hold& hold, Context& context, bool blocking_only);
// An error, and the end of the capture, where a stream of this thread is being captured.
Result not_in_capture(Context& context);

// --- memory.cpp
void free_all(Context& context);
// What writes beyond an allocation's end have overwritten, or nothing.
Outcome check_memory(Context& context);

template <typename T>
std::shared_ptr<T> find(const std::unordered_map<void*, std::shared_ptr<T>>& all, void* handle) {
    auto at = all.find(handle);
    return at == all.end() ? nullptr : at->second;
}
