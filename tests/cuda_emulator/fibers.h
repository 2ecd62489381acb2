// Runs the blocks of a launch, a fiber for each thread.
#pragma once

#include "emulator.h"

#include <cstdint>
#include <string>

// The results of the CUDA driver API that the emulator gives.
enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    FILE_NOT_FOUND = 301,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    CONTEXT_IS_DESTROYED = 709,
    MISALIGNED_ADDRESS = 716,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_ISOLATION = 905,
    CAPTURE_IMPLICIT = 906,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

// How a launch ended; the text says what a kernel did wrong.
struct Outcome {
    Result result = SUCCESS;
    std::string text;
};

// The kernel of this name, or null.
const TrineKernel* find_kernel(const std::string& name);

// Runs all blocks. `argument` is the kernel's struct, `shared` the bytes of dynamic shared memory.
Outcome run_grid(const TrineKernel& kernel, const void* argument, dim3 grid, dim3 block, size_t shared);
