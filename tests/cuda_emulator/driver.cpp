// The CUDA driver API on a CPU: devices, contexts, errors.
//
// As far as the CUDA backend uses it, and as the real driver answers, errors included. Streams run
// their work when somebody waits for it, so that a missing wait shows; see `streams.cpp`.
//
// In the environment, read by the first `cuInit`:
//   TRINE_EMULATOR_DEVICES=n        the number of devices; 0 is a driver without a GPU
//   TRINE_EMULATOR_MEMORY=bytes     of a device
//   TRINE_EMULATOR_DRIVER=12080     the version that the driver names
//   TRINE_EMULATOR_CC=9.0           the compute capability
//   TRINE_EMULATOR_SMS=n            the number of multiprocessors
//   TRINE_EMULATOR_FAIL_LAUNCH=n    the n-th kernel to run fails with an illegal address
//   TRINE_EMULATOR_CHECK=1          looks for writes beyond an allocation after every launch
//   TRINE_EMULATOR_EAGER=1          runs work when it is enqueued
//   TRINE_EMULATOR_SEED=n           draws another order of threads
//   TRINE_EMULATOR_WORKERS=n        threads of the CPU that run blocks
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>

std::mutex state;
std::condition_variable changed;

namespace {

bool is_initialized = false;
std::vector<Device> devices;
std::set<Context*> contexts;
// The stack of contexts of a thread; the last is current.
thread_local std::vector<std::weak_ptr<Context>> stack;

Settings read_settings() {
    Settings s;
    auto number = [](const char* name, long long otherwise) {
        const char* text = getenv(name);
        return text && *text ? strtoll(text, nullptr, 0) : otherwise;
    };
    s.devices = static_cast<int>(number("TRINE_EMULATOR_DEVICES", s.devices));
    s.memory = static_cast<size_t>(number("TRINE_EMULATOR_MEMORY", static_cast<long long>(s.memory)));
    s.driver = static_cast<int>(number("TRINE_EMULATOR_DRIVER", s.driver));
    s.multiprocessors = static_cast<int>(number("TRINE_EMULATOR_SMS", s.multiprocessors));
    s.fail_launch = static_cast<long>(number("TRINE_EMULATOR_FAIL_LAUNCH", 0));
    s.check = number("TRINE_EMULATOR_CHECK", 0) != 0;
    s.eager = number("TRINE_EMULATOR_EAGER", 0) != 0;
    if (const char* text = getenv("TRINE_EMULATOR_CC")) sscanf(text, "%d.%d", &s.major, &s.minor);
    return s;
}

struct Name {
    int result;
    const char* name;
    const char* text;
};
const Name NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        "the provided PTX was compiled with an unsupported toolchain."},
    {FILE_NOT_FOUND, "CUDA_ERROR_FILE_NOT_FOUND", "file not found"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CONTEXT_IS_DESTROYED, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        "operation not permitted when stream is capturing"},
    {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        "operation failed due to a previous error during capture"},
    {CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
        "capture was not initiated in this stream"},
    {CAPTURE_ISOLATION, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        "dependency created on uncaptured work in another stream"},
    {CAPTURE_IMPLICIT, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
        "operation would result in a disallowed implicit dependency on the legacy stream"},
    {CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT",
        "operation not permitted on an event last recorded in a capturing stream"},
    {CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
        "attempt to terminate a thread-local capture sequence from another thread"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {710, "CUDA_ERROR_ASSERT", "device-side assert triggered"},
    {714, "CUDA_ERROR_HARDWARE_STACK_ERROR", "hardware stack error"},
    {715, "CUDA_ERROR_ILLEGAL_INSTRUCTION", "an illegal instruction was encountered"},
    {214, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

std::shared_ptr<Context> new_context(CUdevice ordinal, bool primary) {
    auto context = std::make_shared<Context>();
    context->device = ordinal;
    context->primary = primary;
    context->null_stream->context = context.get();
    contexts.insert(context.get());
    return context;
}

// Waits for what runs, drops what does not, and frees all that the context has.
void destroy(Hold& hold, const std::shared_ptr<Context>& context) {
    auto busy = [&] {
        for (auto& [handle, stream] : context->streams) {
            if (stream->busy) return true;
        }
        return false;
    };
    changed.wait(hold, [&] { return !busy(); });
    for (auto& [handle, stream] : context->streams) stream->work.clear();
    free_all(*context);
    context->streams.clear();
    context->events.clear();
    context->functions.clear();
    context->modules.clear();
    contexts.erase(context.get());
}

Result find_device(CUdevice ordinal) {
    if (!is_initialized) return NOT_INITIALIZED;
    return ordinal >= 0 && ordinal < static_cast<int>(devices.size()) ? SUCCESS : INVALID_DEVICE;
}

} // namespace

const Settings& settings() {
    static const Settings all = read_settings();
    return all;
}
Device& device(CUdevice ordinal) { return devices[static_cast<size_t>(ordinal)]; }
bool initialized() { return is_initialized; }

Result current_context(std::shared_ptr<Context>& context) {
    if (!is_initialized) return NOT_INITIALIZED;
    if (stack.empty()) return INVALID_CONTEXT;
    context = stack.back().lock();
    if (!context || !contexts.count(context.get())) return CONTEXT_IS_DESTROYED;
    return context->error;
}

void break_context(Context& context, const Outcome& outcome) {
    fprintf(stderr, "CUDA emulator: error %d: %s\n", outcome.result, outcome.text.c_str());
    if (context.error == SUCCESS) context.error = outcome.result;
}

EXPORT Result cuInit(unsigned flags) {
    Hold hold(state);
    if (flags) return INVALID_VALUE;
    if (settings().devices <= 0) return NO_DEVICE;
    if (!is_initialized) {
        devices.resize(static_cast<size_t>(settings().devices));
        is_initialized = true;
    }
    return SUCCESS;
}
EXPORT Result cuDriverGetVersion(int* version) {
    *version = settings().driver;
    return SUCCESS;
}
EXPORT Result cuGetErrorName(int result, const char** name) {
    for (const Name& n : NAMES) {
        if (n.result == result) return *name = n.name, SUCCESS;
    }
    *name = nullptr;
    return INVALID_VALUE;
}
EXPORT Result cuGetErrorString(int result, const char** text) {
    for (const Name& n : NAMES) {
        if (n.result == result) return *text = n.text, SUCCESS;
    }
    *text = nullptr;
    return INVALID_VALUE;
}

// --- devices

EXPORT Result cuDeviceGetCount(int* count) {
    if (!is_initialized) return NOT_INITIALIZED;
    *count = static_cast<int>(devices.size());
    return SUCCESS;
}
EXPORT Result cuDeviceGet(CUdevice* result, int ordinal) {
    if (Result none = find_device(ordinal)) return none;
    *result = ordinal;
    return SUCCESS;
}
EXPORT Result cuDeviceGetName(char* name, int length, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    if (length <= 0) return INVALID_VALUE;
    snprintf(name, static_cast<size_t>(length), "CUDA emulator (a CPU)");
    return SUCCESS;
}
EXPORT Result cuDeviceGetUuid_v2(char* uuid, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    memcpy(uuid, "Trine emulator \0", 16);
    uuid[15] = static_cast<char>(ordinal);
    return SUCCESS;
}
EXPORT Result cuDeviceGetUuid(char* uuid, CUdevice ordinal) { return cuDeviceGetUuid_v2(uuid, ordinal); }
EXPORT Result cuDeviceGetPCIBusId(char* text, int length, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    snprintf(text, static_cast<size_t>(length), "0000:%02X:00.0", ordinal + 1);
    return SUCCESS;
}
EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    *bytes = settings().memory;
    return SUCCESS;
}
EXPORT Result cuDeviceComputeCapability(int* major, int* minor, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    *major = settings().major;
    *minor = settings().minor;
    return SUCCESS;
}
// Numbers of CUdevice_attribute. Of shared memory and threads per multiprocessor as in the CUDA
// programming guide's table of compute capabilities.
EXPORT Result cuDeviceGetAttribute(int* value, int attribute, CUdevice ordinal) {
    if (Result none = find_device(ordinal)) return none;
    const Settings& s = settings();
    const bool consumer = s.major == 8 && (s.minor == 6 || s.minor == 9);
    const bool blackwell = s.major == 12;
    const int shared = s.major == 8 && !consumer ? 164 : consumer || blackwell ? 100 : s.major == 7 ? 64 : 228;
    switch (attribute) {
        case 1: case 2: case 3: *value = 1024; break; // threads of a block, its x and y
        case 4: *value = 64; break; // its z
        case 5: *value = 2147483647; break; // the grid's x
        case 6: case 7: *value = 65535; break;
        case 8: *value = 48 * 1024; break; // shared memory of a block
        case 9: *value = 64 * 1024; break; // constant memory
        case 10: *value = 32; break; // a warp
        case 11: *value = 2147483647; break; // pitch
        case 12: case 82: *value = 64 * 1024; break; // registers of a block, of a multiprocessor
        case 13: *value = 1000000; break; // kHz
        case 14: *value = 512; break;
        case 16: *value = s.multiprocessors; break;
        case 31: case 40: case 41: *value = 1; break; // concurrent kernels, copy engines, one address space
        case 33: *value = ordinal + 1; break; // PCI bus
        case 36: *value = 1000000; break; // memory clock, kHz
        case 37: *value = 256; break; // its width
        case 38: *value = 4 << 20; break; // L2 cache
        case 39: *value = consumer || blackwell ? 1536 : s.major == 7 ? 1024 : 2048; break;
        case 75: *value = s.major; break;
        case 76: *value = s.minor; break;
        case 81: *value = shared * 1024; break;
        case 97: *value = (s.major == 7 ? shared : shared - 1) * 1024; break; // of a block, if it asks
        case 106: *value = consumer || blackwell ? 24 : s.major == 7 ? 16 : 32; break; // blocks of a multiprocessor
        case 111: *value = s.major == 7 ? 0 : 1024; break; // shared memory that the driver keeps
        case 120: *value = s.major >= 9; break; // clusters
        default: *value = 0; // memory pools among them
    }
    return SUCCESS;
}

// --- contexts

EXPORT Result cuDevicePrimaryCtxRetain(CUcontext* result, CUdevice ordinal) {
    Hold hold(state);
    if (Result none = find_device(ordinal)) return none;
    Device& d = device(ordinal);
    if (!d.primary) d.primary = new_context(ordinal, true);
    d.retained++;
    *result = d.primary.get();
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
    Hold hold(state);
    if (Result none = find_device(ordinal)) return none;
    Device& d = device(ordinal);
    if (!d.retained) return INVALID_CONTEXT;
    if (--d.retained == 0) {
        auto context = std::move(d.primary);
        d.primary = nullptr;
        destroy(hold, context);
    }
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxReset_v2(CUdevice ordinal) {
    Hold hold(state);
    if (Result none = find_device(ordinal)) return none;
    Device& d = device(ordinal);
    if (d.primary) {
        auto context = std::move(d.primary);
        d.primary = nullptr;
        d.retained = 0;
        destroy(hold, context);
    }
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
    Hold hold(state);
    if (Result none = find_device(ordinal)) return none;
    *flags = 0;
    *active = device(ordinal).primary != nullptr;
    return SUCCESS;
}
EXPORT Result cuDevicePrimaryCtxSetFlags_v2(CUdevice ordinal, unsigned) { return find_device(ordinal); }

EXPORT Result cuCtxSetCurrent(CUcontext handle) {
    Hold hold(state);
    if (!is_initialized) return NOT_INITIALIZED;
    if (!stack.empty()) stack.pop_back();
    if (!handle) return SUCCESS;
    if (!contexts.count(static_cast<Context*>(handle))) return INVALID_CONTEXT;
    for (Device& d : devices) {
        if (d.primary.get() == handle) stack.push_back(d.primary);
    }
    return SUCCESS;
}
EXPORT Result cuCtxPushCurrent_v2(CUcontext handle) {
    stack.emplace_back();
    return cuCtxSetCurrent(handle);
}
EXPORT Result cuCtxPopCurrent_v2(CUcontext* handle) {
    if (stack.empty()) return INVALID_CONTEXT;
    if (handle) *handle = stack.back().lock().get();
    stack.pop_back();
    return SUCCESS;
}
EXPORT Result cuCtxGetCurrent(CUcontext* handle) {
    if (!is_initialized) return NOT_INITIALIZED;
    *handle = stack.empty() ? nullptr : stack.back().lock().get();
    return SUCCESS;
}
EXPORT Result cuCtxGetDevice(CUdevice* ordinal) {
    IN_CONTEXT(context);
    *ordinal = context->device;
    return SUCCESS;
}
EXPORT Result cuCtxGetApiVersion(CUcontext, unsigned* version) {
    *version = 3020;
    return SUCCESS;
}
EXPORT Result cuCtxSynchronize() {
    IN_CONTEXT(context);
    if (Result no = not_in_capture(*context)) return no;
    run_all(hold, *context, false);
    return context->error;
}
EXPORT Result cuCtxSetFlags(unsigned) {
    IN_CONTEXT(context);
    return SUCCESS;
}
EXPORT Result cuCtxGetFlags(unsigned* flags) {
    IN_CONTEXT(context);
    *flags = 0;
    return SUCCESS;
}
EXPORT Result cuCtxSetLimit(int, size_t) {
    IN_CONTEXT(context);
    return SUCCESS;
}
EXPORT Result cuCtxGetLimit(size_t* value, int) {
    IN_CONTEXT(context);
    *value = 1024;
    return SUCCESS;
}
EXPORT Result cuCtxGetCacheConfig(int* config) {
    IN_CONTEXT(context);
    *config = 0;
    return SUCCESS;
}
EXPORT Result cuCtxSetCacheConfig(int) {
    IN_CONTEXT(context);
    return SUCCESS;
}
EXPORT Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    IN_CONTEXT(context);
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}
