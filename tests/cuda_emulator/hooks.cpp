// What the compiler calls in kernels: accesses of memory, in the checked build (-fsanitize=thread),
// and what CUDA does not define, such as an address that its type's alignment forbids.
#include "fibers.h"

// --- accesses

void trine_access(const void* p, size_t bytes, bool write, bool atomic, const void* code);

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define HERE __builtin_return_address(0)
#define ACCESS(n) \
    void __tsan_read##n(void* p) { trine_access(p, n, false, false, HERE); } \
    void __tsan_write##n(void* p) { trine_access(p, n, true, false, HERE); } \
    void __tsan_unaligned_read##n(void* p) { trine_access(p, n, false, false, HERE); } \
    void __tsan_unaligned_write##n(void* p) { trine_access(p, n, true, false, HERE); } \
    void __tsan_volatile_read##n(void* p) { trine_access(p, n, false, true, HERE); } \
    void __tsan_volatile_write##n(void* p) { trine_access(p, n, true, true, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
void __tsan_read_range(void* p, size_t n) { trine_access(p, n, false, false, HERE); }
void __tsan_write_range(void* p, size_t n) { trine_access(p, n, true, false, HERE); }

#define ATOMIC(bits, T) \
    T __tsan_atomic##bits##_load(const T* p, int) { \
        trine_access(p, sizeof(T), false, true, HERE); \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST); \
    } \
    void __tsan_atomic##bits##_store(T* p, T x, int) { \
        trine_access(p, sizeof(T), true, true, HERE); \
        __atomic_store_n(p, x, __ATOMIC_SEQ_CST); \
    } \
    T __tsan_atomic##bits##_exchange(T* p, T x, int) { \
        trine_access(p, sizeof(T), true, true, HERE); \
        return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); \
    } \
    T __tsan_atomic##bits##_fetch_add(T* p, T x, int) { \
        trine_access(p, sizeof(T), true, true, HERE); \
        return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); \
    } \
    T __tsan_atomic##bits##_fetch_or(T* p, T x, int) { \
        trine_access(p, sizeof(T), true, true, HERE); \
        return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST); \
    } \
    bool __tsan_atomic##bits##_compare_exchange_strong(T* p, T* old, T x, int, int) { \
        trine_access(p, sizeof(T), true, true, HERE); \
        return __atomic_compare_exchange_n(p, old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    } \
    bool __tsan_atomic##bits##_compare_exchange_weak(T* p, T* old, T x, int a, int b) { \
        return __tsan_atomic##bits##_compare_exchange_strong(p, old, x, a, b); \
    }
ATOMIC(32, int)
ATOMIC(64, long)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// --- undefined behaviour: each is told where in the source it is

struct Place {
    const char* file;
    unsigned line, column;
};
}

void trine_undefined(Result result, const char* what, const char* file, unsigned line);

#define UNDEFINED(name, result, what) \
    extern "C" void __ubsan_handle_##name##_abort(const Place* at) { \
        trine_undefined(result, what, at->file, at->line); \
    }
UNDEFINED(type_mismatch_v1, MISALIGNED_ADDRESS, "an address that its type's alignment forbids")
UNDEFINED(shift_out_of_bounds, LAUNCH_FAILED, "a shift by too many bits")
UNDEFINED(out_of_bounds, LAUNCH_FAILED, "an index beyond its array")
UNDEFINED(divrem_overflow, LAUNCH_FAILED, "a division by zero")

struct Type {
    unsigned short kind, bits;
};
struct Conversion {
    Place place;
    const Type* from;
    const Type* to;
};
// NaN may be converted where nothing depends on the result, as in `exp_exact`.
extern "C" void __ubsan_handle_float_cast_overflow(const Conversion* at, size_t value) {
    const bool nan = at->from->bits == 32
        ? (value & 0x7fffffffu) > 0x7f800000u
        : (value & 0x7fffffffffffffffull) > 0x7ff0000000000000ull;
    if (nan) return;
    trine_undefined(LAUNCH_FAILED, "a float that the integer's type does not hold", at->place.file, at->place.line);
}
