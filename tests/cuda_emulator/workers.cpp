// The threads that run blocks, and faults of the processor in kernels, which become results of the launch.
#include "worker.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <thread>

namespace {

#if FAST_SWITCH
struct sigaction former[2];

void fault_of_kernel() {
    Fiber* fiber = current->running;
    fiber->state = RETURNED;
    leave(fiber);
    abort();
}

void on_fault(int signal, siginfo_t* info, void* context) {
    Worker* worker = current;
    if (!worker || !worker->running) {
        const struct sigaction& old = former[signal == SIGBUS];
        if (old.sa_flags & SA_SIGINFO && old.sa_sigaction) old.sa_sigaction(signal, info, context);
        else if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN) old.sa_handler(signal);
        else {
            // The instruction runs again, and the signal ends the process.
            ::signal(signal, SIG_DFL);
        }
        return;
    }
    // A fault is synchronous, in the kernel's own code, so no lock is held.
    const size_t at = reinterpret_cast<size_t>(info->si_addr), foot = reinterpret_cast<size_t>(worker->running->foot());
    char text[160];
    if (at >= foot && at < foot + PAGE) snprintf(text, sizeof text, "a thread's stack overflowed");
    else if (info->si_code == SI_KERNEL) snprintf(text, sizeof text, "illegal access to a misaligned or impossible address");
    else snprintf(text, sizeof text, "illegal access to address %p", info->si_addr);
    worker->fail(ILLEGAL_ADDRESS, text);
    // Goes on in `fault_of_kernel`, on the fiber's stack.
    ucontext_t* machine = static_cast<ucontext_t*>(context);
    machine->uc_mcontext.gregs[REG_RIP] = static_cast<greg_t>(reinterpret_cast<size_t>(fault_of_kernel));
    machine->uc_mcontext.gregs[REG_RSP] = reinterpret_cast<greg_t>(worker->running) - 8;
}
#endif

void watch_faults() {
#if FAST_SWITCH
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &former[0]);
        sigaction(SIGBUS, &action, &former[1]);
    });
    // A stack for the handler, since the fault may be an overflow of the fiber's.
    static thread_local bool there = false;
    if (there) return;
    there = true;
    stack_t stack = {};
    sigaltstack(nullptr, &stack);
    if (stack.ss_flags & SS_DISABLE) {
        stack.ss_sp = reserve(64 * 1024);
        stack.ss_size = 64 * 1024;
        stack.ss_flags = 0;
        sigaltstack(&stack, nullptr);
    }
#endif
}

struct Pool {
    std::mutex lock;
    std::condition_variable come;
    std::deque<std::shared_ptr<Job>> jobs;
    std::vector<Worker*> idle;
    unsigned helpers = 0;

    Worker* take() {
        std::lock_guard<std::mutex> hold(lock);
        if (idle.empty()) return new Worker();
        Worker* worker = idle.back();
        idle.pop_back();
        return worker;
    }
    void give(Worker* worker) {
        std::lock_guard<std::mutex> hold(lock);
        idle.push_back(worker);
    }
};

Pool& pool();

void work(Job& job) {
    watch_faults();
    Worker* worker = pool().take();
    worker->job = &job;
    current = worker;
    while (!job.failed) {
        const uint64_t number = job.next.fetch_add(1);
        if (number >= job.blocks) break;
        worker->run_block(number);
    }
    current = nullptr;
    pool().give(worker);
}

// Never destroyed: its threads run until the process ends.
Pool& pool() {
    static Pool* const the = [] {
        Pool* pool = new Pool();
        const char* text = getenv("TRINE_EMULATOR_WORKERS");
        const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
        pool->helpers = (text ? std::max(1, atoi(text)) : std::min(2u, cores)) - 1;
        return pool;
    }();
    return *the;
}

// A job with the number of those that work on it.
struct Shared : Job {
    unsigned at_work = 0;
    std::condition_variable left;
};

void help() {
    Pool& all = pool();
    std::unique_lock<std::mutex> hold(all.lock);
    for (;;) {
        all.come.wait(hold, [&] { return !all.jobs.empty(); });
        auto job = std::static_pointer_cast<Shared>(all.jobs.front());
        all.jobs.pop_front();
        job->at_work++;
        hold.unlock();
        work(*job);
        hold.lock();
        job->at_work--;
        job->left.notify_all();
    }
}

} // namespace

Outcome run_grid(const TrineKernel& kernel, const void* argument, dim3 grid, dim3 block, size_t shared) {
    auto job = std::make_shared<Shared>();
    job->kernel = &kernel;
    job->argument = argument;
    job->grid = grid;
    job->block = block;
    job->shared = shared;
    job->blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
    Pool& all = pool();
    if (all.helpers && job->blocks > 1) {
        static std::once_flag once;
        std::call_once(once, [&] {
            for (unsigned i = 0; i < all.helpers; i++) std::thread(help).detach();
        });
        std::lock_guard<std::mutex> hold(all.lock);
        for (unsigned i = 0; i < all.helpers && i + 1 < job->blocks; i++) all.jobs.push_back(job);
        all.come.notify_all();
    }
    work(*job);
    std::unique_lock<std::mutex> hold(all.lock);
    // Whoever has not come yet need not.
    all.jobs.erase(std::remove_if(all.jobs.begin(), all.jobs.end(),
        [&](const std::shared_ptr<Job>& other) { return other == job; }), all.jobs.end());
    job->left.wait(hold, [&] { return job->at_work == 0; });
    return job->outcome;
}
