// Memory of devices and of pinned host memory, copies and fills.
//
// An allocation ends, in multiples of 256 bytes, at a page that faults, and begins with bytes of
// 0xCD. What is left of the 256 bytes and of the first page has a pattern that `check_memory` looks at.
#include "driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr size_t PAGE = 4096;
constexpr size_t GRAIN = 256;
constexpr unsigned char FRESH = 0xcd, RED = 0xa5;
// From this size on fresh memory is one file of 0xCD, mapped again and again until it is written.
constexpr size_t BLOCK = 4 << 20;

size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
char* pointer(CUdeviceptr p) { return reinterpret_cast<char*>(static_cast<size_t>(p)); }

int fresh_file() {
    static const int file = [] {
        const int fd = static_cast<int>(syscall(SYS_memfd_create, "trine-emulator", 0));
        std::vector<unsigned char> bytes(BLOCK, FRESH);
        if (fd >= 0 && write(fd, bytes.data(), BLOCK) != static_cast<ssize_t>(BLOCK)) return -1;
        return fd;
    }();
    return file;
}

void fill_fresh(char* from, char* to) {
    char* first = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(from), PAGE));
    if (fresh_file() >= 0 && to >= first + BLOCK) {
        memset(from, FRESH, static_cast<size_t>(first - from));
        for (; first + BLOCK <= to; first += BLOCK) {
            if (mmap(first, BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE,
                    fresh_file(), 0) == MAP_FAILED) abort();
        }
        from = first;
    }
    memset(from, FRESH, static_cast<size_t>(to - from));
}

std::string overwritten(CUdeviceptr p, const Allocation& a) {
    const char* begin = pointer(p);
    auto is_red = [](const char* from, const char* to) {
        for (; from < to; from++) {
            if (static_cast<unsigned char>(*from) != RED) return false;
        }
        return true;
    };
    const char* side = nullptr;
    if (!is_red(begin + a.bytes, begin + round_up(a.bytes, GRAIN))) side = "behind";
    if (!is_red(a.map, begin)) side = "in front of";
    if (!side) return "";
    char text[120];
    snprintf(text, sizeof text, "something wrote %s the %zu bytes at 0x%llx", side, a.bytes, p);
    return text;
}

void release(Context& context, const Allocation& a) {
    device(context.device).used -= round_up(a.bytes, GRAIN);
    munmap(a.map, a.mapped);
}

bool inside(const Context& context, CUdeviceptr p, size_t bytes) {
    auto next = context.memory.upper_bound(p);
    if (next == context.memory.begin()) return bytes == 0;
    const auto& [start, allocation] = *std::prev(next);
    return p - start <= allocation.bytes && bytes <= allocation.bytes - (p - start);
}
bool is_pinned(const Context& context, const void* p, size_t bytes) {
    const char* at = static_cast<const char*>(p);
    auto next = context.pinned.upper_bound(at);
    if (next == context.pinned.begin()) return false;
    const auto& [start, size] = *std::prev(next);
    return at + bytes <= start + size;
}

Result bad_range(const char* call, CUdeviceptr p, size_t bytes) {
    fprintf(stderr, "CUDA emulator: %s: %zu bytes at 0x%llx are in no allocation of this context\n", call, bytes, p);
    return INVALID_VALUE;
}

enum Direction { TO_DEVICE, TO_HOST, ON_DEVICE };

Result copy(Direction direction, void* to, const void* from, size_t bytes, CUstream handle, bool wait) {
    IN_CONTEXT(context);
    const CUdeviceptr to_device = reinterpret_cast<size_t>(to), from_device = reinterpret_cast<size_t>(from);
    if (direction != TO_HOST && !inside(*context, to_device, bytes)) return bad_range("copy to", to_device, bytes);
    if (direction != TO_DEVICE && !inside(*context, from_device, bytes)) {
        return bad_range("copy from", from_device, bytes);
    }
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    if (wait) {
        if (Result no = not_in_capture(*context)) return no;
    }
    Work work;
    if (direction == TO_DEVICE && !stream->capture && !is_pinned(*context, from, bytes)) {
        // The driver is done with pageable memory when it returns.
        auto kept = std::make_shared<std::vector<char>>(static_cast<const char*>(from),
            static_cast<const char*>(from) + bytes);
        work.run = [=] { return memcpy(to, kept->data(), bytes), Outcome(); };
    } else {
        work.run = [=] { return memmove(to, from, bytes), Outcome(); };
    }
    if (Result failed = enqueue(hold, *context, stream, std::move(work))) return failed;
    if (wait || (direction == TO_HOST && !stream->capture && !is_pinned(*context, to, bytes))) {
        run_until(hold, stream, stream->enqueued);
    }
    return context->error;
}

template <typename T>
Result fill(CUdeviceptr p, T value, size_t count, CUstream handle, bool wait) {
    IN_CONTEXT(context);
    if (p % sizeof(T)) return INVALID_VALUE;
    if (!inside(*context, p, count * sizeof(T))) return bad_range("fill", p, count * sizeof(T));
    auto stream = find_stream(*context, handle);
    if (!stream) return INVALID_HANDLE;
    if (wait) {
        if (Result no = not_in_capture(*context)) return no;
    }
    Work work;
    work.run = [=] {
        T* at = reinterpret_cast<T*>(pointer(p));
        for (size_t i = 0; i < count; i++) at[i] = value;
        return Outcome();
    };
    if (Result failed = enqueue(hold, *context, stream, std::move(work))) return failed;
    if (wait) run_until(hold, stream, stream->enqueued);
    return context->error;
}

} // namespace

void free_all(Context& context) {
    for (auto& [p, allocation] : context.memory) {
        const std::string text = overwritten(p, allocation);
        if (!text.empty()) fprintf(stderr, "CUDA emulator: %s\n", text.c_str());
        release(context, allocation);
    }
    context.memory.clear();
    for (auto& [p, bytes] : context.pinned) free(const_cast<char*>(p));
    context.pinned.clear();
}

Outcome check_memory(Context& context) {
    for (auto& [p, allocation] : context.memory) {
        const std::string text = overwritten(p, allocation);
        if (!text.empty()) return {ILLEGAL_ADDRESS, text};
    }
    return {};
}

EXPORT Result cuMemAlloc_v2(CUdeviceptr* result, size_t bytes) {
    IN_CONTEXT(context);
    if (!bytes) return INVALID_VALUE;
    if (Result no = not_in_capture(*context)) return no;
    const size_t rounded = round_up(bytes, GRAIN);
    Device& d = device(context->device);
    if (rounded < bytes || rounded > settings().memory - d.used) return OUT_OF_MEMORY;
    const size_t body = round_up(rounded, PAGE);
    void* map = mmap(nullptr, body + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    Allocation a;
    a.bytes = bytes;
    a.map = static_cast<char*>(map);
    a.mapped = body + PAGE;
    mprotect(a.map + body, PAGE, PROT_NONE);
    char* p = a.map + (body - rounded);
    memset(a.map, RED, static_cast<size_t>(p - a.map));
    fill_fresh(p, p + bytes);
    memset(p + bytes, RED, rounded - bytes);
    d.used += rounded;
    *result = reinterpret_cast<size_t>(p);
    context->memory[*result] = a;
    return SUCCESS;
}
EXPORT Result cuMemFree_v2(CUdeviceptr p) {
    IN_CONTEXT(context);
    if (!p) return SUCCESS;
    if (Result no = not_in_capture(*context)) return no;
    if (!context->memory.count(p)) return INVALID_VALUE;
    // What still uses it runs first.
    run_all(hold, *context, false);
    auto at = context->memory.find(p);
    if (at == context->memory.end()) return INVALID_VALUE;
    const std::string text = overwritten(p, at->second);
    release(*context, at->second);
    context->memory.erase(at);
    if (!text.empty()) break_context(*context, {ILLEGAL_ADDRESS, text});
    return context->error;
}
EXPORT Result cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    IN_CONTEXT(context);
    *total = settings().memory;
    *free_bytes = *total - device(context->device).used;
    return SUCCESS;
}
EXPORT Result cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr p) {
    IN_CONTEXT(context);
    auto next = context->memory.upper_bound(p);
    if (next == context->memory.begin() || !inside(*context, p, 1)) return NOT_FOUND;
    *base = std::prev(next)->first;
    *bytes = std::prev(next)->second.bytes;
    return SUCCESS;
}

EXPORT Result cuMemHostAlloc(void** result, size_t bytes, unsigned) {
    IN_CONTEXT(context);
    if (!bytes) return INVALID_VALUE;
    if (Result no = not_in_capture(*context)) return no;
    char* p = static_cast<char*>(aligned_alloc(PAGE, round_up(bytes, PAGE)));
    if (!p) return OUT_OF_MEMORY;
    memset(p, FRESH, bytes);
    context->pinned[p] = bytes;
    *result = p;
    return SUCCESS;
}
EXPORT Result cuMemAllocHost_v2(void** result, size_t bytes) { return cuMemHostAlloc(result, bytes, 0); }
EXPORT Result cuMemFreeHost(void* p) {
    IN_CONTEXT(context);
    auto at = context->pinned.find(static_cast<char*>(p));
    if (at == context->pinned.end()) return INVALID_VALUE;
    run_all(hold, *context, false);
    context->pinned.erase(static_cast<char*>(p));
    free(p);
    return context->error;
}
EXPORT Result cuMemHostGetDevicePointer_v2(CUdeviceptr* result, void* p, unsigned) {
    IN_CONTEXT(context);
    if (!is_pinned(*context, p, 1)) return INVALID_VALUE;
    *result = reinterpret_cast<size_t>(p);
    return SUCCESS;
}
EXPORT Result cuMemHostGetFlags(unsigned* flags, void* p) {
    IN_CONTEXT(context);
    if (!is_pinned(*context, p, 1)) return INVALID_VALUE;
    *flags = 0;
    return SUCCESS;
}

EXPORT Result cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return copy(TO_DEVICE, pointer(to), from, bytes, nullptr, true);
}
EXPORT Result cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return copy(TO_HOST, to, pointer(from), bytes, nullptr, true);
}
EXPORT Result cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return copy(ON_DEVICE, pointer(to), pointer(from), bytes, nullptr, true);
}
EXPORT Result cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return copy(TO_DEVICE, pointer(to), from, bytes, stream, false);
}
EXPORT Result cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(TO_HOST, to, pointer(from), bytes, stream, false);
}
EXPORT Result cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return copy(ON_DEVICE, pointer(to), pointer(from), bytes, stream, false);
}
EXPORT Result cuMemsetD8_v2(CUdeviceptr p, unsigned char x, size_t n) { return fill(p, x, n, nullptr, true); }
EXPORT Result cuMemsetD16_v2(CUdeviceptr p, unsigned short x, size_t n) { return fill(p, x, n, nullptr, true); }
EXPORT Result cuMemsetD32_v2(CUdeviceptr p, unsigned x, size_t n) { return fill(p, x, n, nullptr, true); }
EXPORT Result cuMemsetD8Async(CUdeviceptr p, unsigned char x, size_t n, CUstream s) { return fill(p, x, n, s, false); }
EXPORT Result cuMemsetD16Async(CUdeviceptr p, unsigned short x, size_t n, CUstream s) { return fill(p, x, n, s, false); }
EXPORT Result cuMemsetD32Async(CUdeviceptr p, unsigned x, size_t n, CUstream s) { return fill(p, x, n, s, false); }

// For tests inside a process: bytes that all devices have given out.
EXPORT size_t trine_emulator_allocated_bytes() {
    Hold hold(state);
    size_t used = 0;
    for (int i = 0; initialized() && i < settings().devices; i++) used += device(i).used;
    return used;
}
