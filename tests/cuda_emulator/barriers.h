// Shows that each barrier of the kernels is needed: leaves it out, one at a time, while tests run.
//
// Where `TRINE_EMULATOR_BARRIERS` names a file, every launch that comes to a barrier which nothing
// has missed so far runs several times more from the same memory: with other orders of threads, and
// with that barrier left out. A barrier is needed where a launch without it fails, or leaves other
// bytes in memory than all launches with it; the program that waits for the launch gets what it
// gives with all barriers. What was found is appended to the file when the process ends, for
// `tools/check_barriers.py`.
#pragma once

#include "fibers.h"

#include <functional>
#include <shared_mutex>

struct Context;

// Whether barriers are to be left out.
bool barriers_are_tested();
// Held by work that is no launch, which would see memory of launches without a barrier.
std::shared_lock<std::shared_mutex> beside_barriers();

// Called at every barrier of a kernel, by its name and its place: whether it is left out.
bool barrier_is_left_out(const char* name, const char* file, int line);
// Added to the seed of all orders.
uint64_t other_order();
// How often the threads of a block may wait before it counts as endless.
uint64_t most_waits();
// A block has ended, in which threads have waited so often.
void block_has_waited(uint64_t times);

// Runs the launch; all that it does to memory has happened when this returns.
Outcome run_with_and_without_barriers(Context& context, const char* kernel, const std::function<Outcome()>& run);

// Overwrites the static shared memory of this thread's kernels, which no block may count on.
void spoil_static_shared();
