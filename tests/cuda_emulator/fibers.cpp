// Fibers, their barriers, and the order in which they run.
//
// A thread runs until it waits. Which one is next is drawn anew for each block and after each
// barrier (from `TRINE_EMULATOR_SEED`, the kernel's name and the block's number), and the first in
// that order runs as far as it can get: a warp gets ahead of the others by as much as the barriers
// allow, which is where a missing barrier shows.
#include "barriers.h"
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>

namespace {

std::map<std::string, const TrineKernel*>& kernels() {
    static std::map<std::string, const TrineKernel*> all;
    return all;
}

uint64_t mix(uint64_t x) { // SplitMix64
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}
uint64_t seed() {
    static const uint64_t value = [] {
        const char* text = getenv("TRINE_EMULATOR_SEED");
        return text ? strtoull(text, nullptr, 0) : 1ull;
    }();
    return value;
}

#if FAST_SWITCH
extern "C" void trine_switch(void** save, void* load);
// What a called function must preserve goes on the stack; the two stack pointers are exchanged.
__asm__(
    ".text\n.p2align 4\n.globl trine_switch\n.hidden trine_switch\n.type trine_switch,@function\n"
    "trine_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n    movq %rsi, %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    // Not `ret`, which the processor would predict to go where this was called.
    "    popq %rcx\n    jmp *%rcx\n.size trine_switch, . - trine_switch\n");
#endif

Fiber* self() { return static_cast<Fiber*>(const_cast<TrineThread*>(trine_self())); }

// In the checked build: whether the last write of the running fiber raced.
void check_last_write(Worker* worker) {
    if (!worker->races || worker->failed) return;
    const std::string race = worker->races->last();
    if (!race.empty()) worker->fail(LAUNCH_FAILED, race);
}

} // namespace

// To the next fiber that can run, or to the worker where none can; until this one is resumed.
void leave(Fiber* fiber) {
    Worker* worker = fiber->worker;
    check_last_write(worker);
    Fiber* next = worker->next();
    if (next == fiber) return;
#if FAST_SWITCH
    trine_switch(&fiber->stack, next ? next->stack : worker->stack);
#else
    swapcontext(&fiber->context, next ? &next->context : &worker->context);
#endif
}

namespace {

// Runs fibers until none can.
void run_fibers(Worker* worker) {
    Fiber* first = worker->next();
#if FAST_SWITCH
    trine_switch(&worker->stack, first->stack);
#else
    swapcontext(&worker->context, &first->context);
#endif
    worker->running = nullptr;
}

void run_copies(Fiber* fiber, unsigned below) {
    auto& copies = *fiber->copies;
    size_t done = 0;
    for (; done < copies.size() && copies[done].group < below; done++) {
        const Copy& copy = copies[done];
        trine_access(copy.shared, 16, true, false, copy.code);
        if (copy.there) trine_access(copy.global, 16, false, false, copy.code);
        if (copy.there) memcpy(copy.shared, copy.global, 16);
        else memset(copy.shared, 0, 16);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(done));
}

void fiber_main() {
    Fiber* fiber = self();
    fiber->worker->job->kernel->call(fiber->worker->job->argument);
    run_copies(fiber, ~0u);
    if (!fiber->waited_for_previous) {
        fiber->worker->fail(LAUNCH_FAILED, "a thread returned without wait_for_previous_kernel()");
    }
    fiber->state = RETURNED;
    fiber->worker->alive--;
    leave(fiber);
    abort();
}

// Makes the fiber begin at `fiber_main` when it is resumed.
void begin(Fiber* fiber) {
#if FAST_SWITCH
    void** top = reinterpret_cast<void**>(fiber);
    // Six registers, where to return to, and a word so that the stack is aligned as after a call.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    top -= 6;
    memset(top, 0, 6 * sizeof(void*));
    fiber->stack = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->foot() + PAGE;
    fiber->context.uc_stack.ss_size = static_cast<size_t>(reinterpret_cast<char*>(fiber) - fiber->foot()) - PAGE;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
#endif
}

} // namespace

void* reserve(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        perror("CUDA emulator: no memory for a stack");
        abort();
    }
    return p;
}

thread_local Worker* current = nullptr;

Worker::Worker() {
    unsigned char* memory = static_cast<unsigned char*>(reserve(MOST_SHARED + PAGE));
    mprotect(memory + MOST_SHARED, PAGE, PROT_NONE);
    shared = memory + MOST_SHARED;
    // One more than needed, so that the first can begin at a multiple of the size.
    stacks = static_cast<char*>(reserve((MOST_THREADS + 1) * TRINE_FIBER_BYTES));
    stacks += -reinterpret_cast<size_t>(stacks) & (TRINE_FIBER_BYTES - 1);
}

Fiber* Worker::fiber(int number) {
    while (fibers.size() <= static_cast<size_t>(number)) {
        char* foot = stacks + fibers.size() * TRINE_FIBER_BYTES;
        mprotect(foot, PAGE, PROT_NONE);
        static_assert(sizeof(Fiber) <= 1024, "a fiber's head fits its place");
        Fiber* fiber = new (trine_head(reinterpret_cast<size_t>(foot))) Fiber();
        fiber->worker = this;
        fiber->number = static_cast<int>(fibers.size());
        fiber->block = &block;
        fiber->copies = new std::vector<Copy>();
        fibers.push_back(fiber);
    }
    return fibers[static_cast<size_t>(number)];
}

void Worker::draw_order() {
    auto next = [&] { return random = mix(random); };
    int warps[MOST_THREADS / 32];
    const int n = (count + 31) / 32;
    for (int i = 0; i < n; i++) warps[i] = i;
    for (int i = n; i > 1; i--) std::swap(warps[i - 1], warps[next() % static_cast<uint64_t>(i)]);
    int place = 0;
    for (int i = 0; i < n; i++) {
        // Lanes in steps of an odd number, so that each comes once.
        const unsigned bits = static_cast<unsigned>(next());
        const unsigned step = bits << 1 | 1, start = bits >> 8;
        for (unsigned l = 0; l < 32; l++) {
            const int number = warps[i] * 32 + static_cast<int>((l * step + start) & 31);
            if (number >= count) continue;
            order[place] = static_cast<uint16_t>(number);
            rank[number] = static_cast<uint16_t>(place++);
        }
    }
}

static std::string index(const uint3& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

void Worker::fail(Result result, const std::string& text) {
    failed = true;
    job->failed = true;
    std::string where = "kernel " + std::string(job->kernel->name) + ", block " + index(block.index);
    if (running) where += ", thread " + index(running->index);
    std::lock_guard<std::mutex> hold(job->lock);
    if (job->outcome.result == SUCCESS) job->outcome = {result, where + ": " + text};
}

// Who waits where, when nobody can go on.
std::string Worker::stuck(const char* what) const {
    std::map<std::string, std::pair<int, int>> places; // count, first thread
    for (int i = 0; i < count; i++) {
        const Fiber& f = *fibers[static_cast<size_t>(i)];
        char text[200];
        if (f.state == RETURNED) snprintf(text, sizeof text, "returned");
        else if (f.state == AT_BARRIER) snprintf(text, sizeof text, "at __syncthreads (%s:%d)", f.file, f.line);
        else snprintf(text, sizeof text, "at %s with mask %08x", f.name, f.mask);
        auto& place = places.emplace(text, std::make_pair(0, i)).first->second;
        place.first++;
    }
    std::string result = what;
    const char* between = " ";
    for (const auto& [text, place] : places) {
        result += between + std::to_string(place.first) + " threads " + text + " (the first is " +
            std::to_string(place.second) + ")";
        between = ", ";
    }
    return result;
}

void Worker::run_block(uint64_t number) {
    const dim3 grid = job->grid, size = job->block;
    block.index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
        static_cast<unsigned>(number / grid.x / grid.y)};
    block.size = size;
    block.grid = grid;
    // Ends where the page begins that faults.
    block.shared = shared - (job->shared + 15) / 16 * 16;
    memset(block.shared, 0xcd, static_cast<size_t>(shared - block.shared));
    count = static_cast<int>(size.x * size.y * size.z);
    alive = count;
    at_barrier = 0;
    failed = false;
    waits = 0;
    spoil_static_shared();
    random = mix(seed() + other_order() + number);
    for (const char* c = job->kernel->name; *c; c++) random = mix(random + static_cast<unsigned char>(*c));
    late_copies = random >> 40 & 1;
    if (races) races->barrier();
    memset(ready, 0, sizeof ready);
    memset(waiting, 0, sizeof waiting);
    draw_order();
    for (int i = 0; i < count; i++) {
        Fiber* f = fiber(i);
        const unsigned n = static_cast<unsigned>(i);
        f->index = {n % size.x, n / size.x % size.y, n / size.x / size.y};
        f->state = READY;
        f->waited_for_previous = false;
        f->copies->clear();
        f->group = 0;
        begin(f);
        set_ready(i);
    }
    run_fibers(this);
    if (!failed && alive) fail(LAUNCH_FAILED, stuck("deadlock:"));
    block_has_waited(waits);
}

extern "C" void trine_register(TrineKernel* kernel) {
    auto [at, added] = kernels().emplace(kernel->name, kernel);
    if (!added) {
        fprintf(stderr, "CUDA emulator: two kernels are called %s\n", kernel->name);
        abort();
    }
}

const TrineKernel* find_kernel(const std::string& name) {
    auto at = kernels().find(name);
    return at == kernels().end() ? nullptr : at->second;
}

// A barrier that is left out may make a loop endless.
static void count_wait(Fiber* fiber) {
    if (++fiber->worker->waits <= most_waits()) return;
    fiber->worker->fail(LAUNCH_FAILED, "threads wait for each other without end");
    leave(fiber);
}

extern "C" bool trine_left_out(const char* name, const char* file, int line) {
    return barrier_is_left_out(name, file, line);
}

extern "C" void trine_barrier(const char* file, int line) {
    if (barrier_is_left_out("__syncthreads", file, line)) return;
    Fiber* fiber = self();
    Worker* worker = fiber->worker;
    count_wait(fiber);
    fiber->state = AT_BARRIER;
    fiber->file = file;
    fiber->line = line;
    // All threads of the block, at one place: what the hardware does with others depends on it.
    if (++worker->at_barrier == worker->count) {
        worker->at_barrier = 0;
        for (int i = 0; i < worker->count; i++) {
            Fiber& other = *worker->fibers[static_cast<size_t>(i)];
            if (other.line != line || strcmp(other.file, file) != 0) {
                worker->fail(LAUNCH_FAILED, worker->stuck("divergent barrier:"));
                leave(fiber);
            }
        }
        check_last_write(worker);
        if (worker->races) worker->races->barrier();
        worker->draw_order();
        for (int i = 0; i < worker->count; i++) {
            worker->fibers[static_cast<size_t>(i)]->state = READY;
            worker->set_ready(i);
        }
    }
    leave(fiber);
}

extern "C" void trine_warp(const char* name, unsigned mask, void* lane, TrineFinish finish) {
    Fiber* fiber = self();
    Worker* worker = fiber->worker;
    const int warp = fiber->number / 32;
    const unsigned me = 1u << fiber->number % 32;
    count_wait(fiber);
    fiber->state = AT_WARP;
    fiber->name = name;
    fiber->mask = mask;
    fiber->lane = lane;
    fiber->finish = finish;
    if (!(mask & me)) {
        worker->fail(LAUNCH_FAILED, std::string(name) + " with a mask that lacks the lane itself");
        leave(fiber);
    }
    unsigned& waiting = worker->waiting[warp];
    waiting |= me;
    if ((waiting & mask) == mask) {
        Fiber** lanes = &worker->fibers[static_cast<size_t>(warp) * 32];
        void* brought[32] = {};
        bool same = true;
        for (int i = 0; i < 32; i++) {
            if (!(mask >> i & 1)) continue;
            same = same && lanes[i]->mask == mask && lanes[i]->name == name && lanes[i]->finish == finish;
            brought[i] = lanes[i]->lane;
        }
        if (same) {
            finish(brought, mask);
            if (worker->races && strcmp(name, "__syncwarp") == 0) worker->races->sync_warp(warp, mask);
            else if (worker->races) worker->races->exchange(warp, mask);
            waiting &= ~mask;
            for (int i = 0; i < 32; i++) {
                if (!(mask >> i & 1)) continue;
                lanes[i]->state = READY;
                if (lanes[i] != fiber) worker->set_ready(warp * 32 + i);
            }
            return;
        }
    }
    leave(fiber);
}

// A kernel's access to memory, in the checked build. See `races.h`.
void trine_access(const void* p, size_t bytes, bool write, bool atomic, const void* code) {
    Worker* worker = CHECKED ? current : nullptr;
    if (!worker || !worker->running) return;
    // Stacks are their fibers' own, and what lanes bring to an operation of their warp.
    const char* at = static_cast<const char*>(p);
    if (at >= worker->stacks && at < worker->stacks + MOST_THREADS * TRINE_FIBER_BYTES) return;
    Fiber* fiber = worker->running;
    const std::string race = worker->races->access(fiber->number, p, bytes, write, atomic, code);
    if (race.empty()) return;
    worker->fail(LAUNCH_FAILED, race);
    leave(fiber);
}

void trine_undefined(Result result, const char* what, const char* file, unsigned line) {
    if (!current || !current->running) abort();
    current->fail(result, std::string("undefined: ") + what + " (" + file + ":" + std::to_string(line) + ")");
    leave(current->running);
}

extern "C" void trine_wait_for_previous_kernel() { self()->waited_for_previous = true; }

// A copy may arrive at once or as late as the wait for it; which, is drawn for each block.
extern "C" void trine_copy_async(void* shared, const void* global, bool there) {
    Fiber* fiber = self();
    if (reinterpret_cast<size_t>(shared) % 16 || reinterpret_cast<size_t>(global) % 16) {
        fiber->worker->fail(MISALIGNED_ADDRESS, "copy_async of an address that is not a multiple of 16");
        leave(fiber);
    }
    const void* code = __builtin_return_address(0);
    // It may write as soon as it is asked to.
    trine_access(shared, 16, true, false, code);
    fiber->copies->push_back({shared, global, there, fiber->group, code});
    if (!fiber->worker->late_copies) run_copies(fiber, fiber->group + 1);
}
extern "C" void trine_copy_async_commit() { self()->group++; }
extern "C" void trine_copy_async_wait(int groups) {
    Fiber* fiber = self();
    const unsigned kept = static_cast<unsigned>(groups);
    // A copy that is in no group yet is not waited for.
    run_copies(fiber, fiber->group > kept ? fiber->group - kept : 0);
}
