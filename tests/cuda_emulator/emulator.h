// CUDA's built-ins, and the instructions that `kernels/prelude.cuh` wraps, for a CPU.
//
// What the prelude includes where `TRINE_EMULATOR` is defined, so that g++ compiles the very files
// that NVRTC compiles. A thread of a block is a fiber (`fibers.cpp`): it runs until it waits for
// others, at a barrier or at an operation of its warp. Only what kernels may use is here; anything
// else is an error of the compiler.
#pragma once

#include <math.h>
#include <stddef.h>
#include <string.h>

#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
// Workers run different blocks at a time, and a block stays with its worker.
#define __shared__ static thread_local

#define DEVICE static inline __attribute__((unused))
#define DEVICE_METHOD inline

struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct uint3 { unsigned x, y, z; };
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct int2 { int x, y; } __attribute__((aligned(8)));
struct int4 { int x, y, z, w; } __attribute__((aligned(16)));
struct float2 { float x, y; } __attribute__((aligned(8)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct dim3 { unsigned x, y, z; };

DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
DEVICE int2 make_int2(int x, int y) { return {x, y}; }
DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// --- where a thread is

struct TrineBlock {
    uint3 index;
    dim3 size, grid;
    unsigned char* shared;
};
// What of a fiber the kernel's code looks at.
struct TrineThread {
    uint3 index;
    const TrineBlock* block;
};
// A fiber's memory begins at a multiple of its size, so the stack pointer says which one runs.
constexpr size_t TRINE_FIBER_BYTES = 128 * 1024;
// Its head is near the end, at another distance from it for each of 64 neighbours: at the same one
// all heads and stacks would share the few places of the CPU's cache that such addresses can take.
DEVICE TrineThread* trine_head(size_t foot) {
    return reinterpret_cast<TrineThread*>(foot + TRINE_FIBER_BYTES - 1024 - (foot / TRINE_FIBER_BYTES % 64) * 256);
}
DEVICE const TrineThread* trine_self() {
    const size_t here = reinterpret_cast<size_t>(__builtin_frame_address(0));
    return trine_head(here & ~(TRINE_FIBER_BYTES - 1));
}
#define threadIdx (trine_self()->index)
#define blockIdx (trine_self()->block->index)
#define blockDim (trine_self()->block->size)
#define gridDim (trine_self()->block->grid)

// --- kernels

struct TrineKernel {
    const char* name;
    unsigned threads;
    size_t argument_bytes;
    void (*call)(const void* argument);
    TrineKernel* next;
};
extern "C" void trine_register(TrineKernel* kernel);
struct TrineRegistration {
    explicit TrineRegistration(TrineKernel* kernel) { trine_register(kernel); }
};

#define KERNEL(name, Args, threads) \
    static void trine_body_##name(const Args& a); \
    static void trine_call_##name(const void* a) { trine_body_##name(*static_cast<const Args*>(a)); } \
    static TrineKernel trine_kernel_##name = {#name, threads, sizeof(Args), trine_call_##name, nullptr}; \
    static const TrineRegistration trine_registration_##name(&trine_kernel_##name); \
    static void trine_body_##name([[maybe_unused]] const Args& a)
#define KERNEL_AT_LEAST(name, Args, threads, blocks) KERNEL(name, Args, threads)
#define DYNAMIC_SHARED(name) unsigned char* const name = trine_self()->block->shared

extern "C" {
void trine_barrier(const char* file, int line);
// Whether a test does without what stands there (`barriers.h`).
bool trine_left_out(const char* name, const char* file, int line);
// What a lane brings to an operation of its warp is `lane`. The last of the lanes in `mask` to come
// calls `finish` with what all brought.
typedef void (*TrineFinish)(void* const* lanes, unsigned mask);
void trine_warp(const char* name, unsigned mask, void* lane, TrineFinish finish);
void trine_wait_for_previous_kernel();
void trine_copy_async(void* shared, const void* global, bool there);
void trine_copy_async_commit();
void trine_copy_async_wait(int groups);
}

DEVICE void wait_for_previous_kernel() { trine_wait_for_previous_kernel(); }
DEVICE void let_next_kernel_start() {}

// --- barriers and operations of a warp

#define __syncthreads() trine_barrier(__FILE__, __LINE__)
// The place of a default argument is that of the call.
DEVICE void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (trine_left_out("__syncwarp", file, line)) return;
    trine_warp("__syncwarp", mask, nullptr, [](void* const*, unsigned) {});
}

// Value and source lane in, value out.
struct TrineShuffle {
    unsigned long long value, result;
    int source;
};
static inline void trine_finish_shuffle(void* const* lanes, unsigned mask) {
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        TrineShuffle* at = static_cast<TrineShuffle*>(lanes[lane]);
        // What a lane outside the mask has is undefined.
        at->result = mask >> at->source & 1
            ? static_cast<const TrineShuffle*>(lanes[at->source])->value
            : 0xdeadbeefdeadbeefull;
    }
}
template <typename T>
DEVICE T trine_shuffle(const char* name, unsigned mask, T value, int source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
    TrineShuffle lane = {0, 0, source};
    memcpy(&lane.value, &value, sizeof(T));
    trine_warp(name, mask, &lane, trine_finish_shuffle);
    memcpy(&value, &lane.result, sizeof(T));
    return value;
}
DEVICE int trine_lane() {
    const uint3 i = threadIdx;
    const dim3 n = blockDim;
    return static_cast<int>((i.z * n.y + i.y) * n.x + i.x) & 31;
}
template <typename T> DEVICE T __shfl_sync(unsigned mask, T value, int source) {
    return trine_shuffle("__shfl_sync", mask, value, source & 31);
}
template <typename T> DEVICE T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return trine_shuffle("__shfl_xor_sync", mask, value, (trine_lane() ^ bits) & 31);
}
template <typename T> DEVICE T __shfl_down_sync(unsigned mask, T value, unsigned by) {
    const int lane = trine_lane();
    const unsigned source = static_cast<unsigned>(lane) + by;
    return trine_shuffle("__shfl_down_sync", mask, value, source < 32 ? static_cast<int>(source) : lane);
}
template <typename T> DEVICE T __shfl_up_sync(unsigned mask, T value, unsigned by) {
    const unsigned lane = static_cast<unsigned>(trine_lane());
    return trine_shuffle("__shfl_up_sync", mask, value, static_cast<int>(lane >= by ? lane - by : lane));
}

static inline void trine_finish_ballot(void* const* lanes, unsigned mask) {
    unsigned long long set = 0;
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1 && static_cast<TrineShuffle*>(lanes[lane])->value) set |= 1ull << lane;
    }
    for (int lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) static_cast<TrineShuffle*>(lanes[lane])->result = set;
    }
}
DEVICE unsigned trine_ballot(const char* name, unsigned mask, bool set) {
    TrineShuffle lane = {set, 0, 0};
    trine_warp(name, mask, &lane, trine_finish_ballot);
    return static_cast<unsigned>(lane.result);
}
DEVICE unsigned __ballot_sync(unsigned mask, int set) { return trine_ballot("__ballot_sync", mask, set != 0); }
DEVICE int __any_sync(unsigned mask, int set) { return trine_ballot("__any_sync", mask, set != 0) != 0; }
DEVICE int __all_sync(unsigned mask, int set) { return trine_ballot("__all_sync", mask, set != 0) == mask; }

// --- integers

DEVICE int __dp4a(int a, int b, int c) {
    unsigned sum = static_cast<unsigned>(c);
    for (int i = 0; i < 4; i++) {
        sum += static_cast<unsigned>(static_cast<signed char>(a >> (8 * i)) * static_cast<signed char>(b >> (8 * i)));
    }
    return static_cast<int>(sum);
}
DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
DEVICE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
DEVICE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
DEVICE int __ffs(int x) { return __builtin_ffs(x); }
DEVICE unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int i = 0; i < 32; i++) y |= (x >> i & 1u) << (31 - i);
    return y;
}
DEVICE unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
DEVICE unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
DEVICE unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = static_cast<unsigned long long>(y) << 32 | x;
    unsigned z = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned nibble = selector >> (4 * i);
        unsigned byte = static_cast<unsigned>(both >> (8 * (nibble & 7))) & 0xffu;
        if (nibble & 8) byte = byte & 0x80u ? 0xffu : 0u;
        z |= byte << (8 * i);
    }
    return z;
}

#define TRINE_MIN_MAX(T) \
    DEVICE T min(T a, T b) { return b < a ? b : a; } \
    DEVICE T max(T a, T b) { return a < b ? b : a; }
TRINE_MIN_MAX(int)
TRINE_MIN_MAX(unsigned)
TRINE_MIN_MAX(long long)
TRINE_MIN_MAX(unsigned long long)
#undef TRINE_MIN_MAX
DEVICE float min(float a, float b) { return fminf(a, b); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }

// --- floats

template <typename To, typename From> DEVICE To trine_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To y;
    memcpy(&y, &x, sizeof(y));
    return y;
}
DEVICE unsigned __float_as_uint(float x) { return trine_bits<unsigned>(x); }
DEVICE int __float_as_int(float x) { return trine_bits<int>(x); }
DEVICE float __uint_as_float(unsigned x) { return trine_bits<float>(x); }
DEVICE float __int_as_float(int x) { return trine_bits<float>(x); }
// Saturates, and makes 0 of NaN, as the instruction does.
DEVICE int __float2int_rn(float x) {
    if (x != x) return 0;
    const float y = rintf(x);
    if (y >= 2147483648.0f) return 2147483647;
    if (y < -2147483648.0f) return -2147483647 - 1;
    return static_cast<int>(y);
}
DEVICE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float __fadd_rn(float a, float b) { return a + b; }
DEVICE float __fsub_rn(float a, float b) { return a - b; }
DEVICE float __fmul_rn(float a, float b) { return a * b; }
DEVICE float __fdiv_rn(float a, float b) { return a / b; }
DEVICE float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }

DEVICE float half_to_float(unsigned short x) {
    const unsigned sign = (x & 0x8000u) << 16, exponent = x >> 10 & 31u, fraction = x & 0x3ffu;
    if (exponent == 31) {
        // A NaN becomes a quiet one.
        return __uint_as_float(sign | 0x7f800000u | fraction << 13 | (fraction ? 0x400000u : 0u));
    }
    if (exponent) return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
    const float y = static_cast<float>(fraction) * 5.9604644775390625e-8f; // 2^-24
    return sign ? -y : y;
}
DEVICE unsigned short float_to_half(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    // The instruction has one NaN.
    if (magnitude > 0x7f800000u) return 0x7fffu;
    // From 65520 on, the middle between the largest and what would come next.
    if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {
        // Below 2^-14: whole multiples of 2^-24. The product is exact.
        const float units = rintf(__uint_as_float(magnitude) * 16777216.0f);
        return static_cast<unsigned short>(sign | static_cast<unsigned>(units));
    }
    const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
    return static_cast<unsigned short>(sign | (rounded - 0x38000000u) >> 13);
}

DEVICE unsigned sub_halves(unsigned a, unsigned b) {
    // Exact where kernels use it: of whole numbers of at most 2048.
    const auto sub = [](unsigned x, unsigned y) {
        return float_to_half(half_to_float(static_cast<unsigned short>(x)) - half_to_float(static_cast<unsigned short>(y)));
    };
    return unsigned(sub(a, b)) | unsigned(sub(a >> 16, b >> 16)) << 16;
}

// --- memory

DEVICE void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
DEVICE void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
template <typename T> DEVICE T __ldg(const T* p) { return *p; }
DEVICE uint4 load_once(const uint4* p) { return *p; }

// A type that deduction skips, so that what is added is converted to what is there.
template <typename T> struct TrineSame { typedef T type; };
template <typename T> DEVICE T atomicAdd(T* p, typename TrineSame<T>::type x) {
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
}
template <typename T> DEVICE T atomicExch(T* p, typename TrineSame<T>::type x) {
    return __atomic_exchange_n(p, x, __ATOMIC_RELAXED);
}
template <typename T> DEVICE T atomicOr(T* p, typename TrineSame<T>::type x) {
    return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <typename T> DEVICE T atomicMax(T* p, typename TrineSame<T>::type x) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(p, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
template <typename T> DEVICE T atomicMin(T* p, typename TrineSame<T>::type x) {
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);
    while (x < old && !__atomic_compare_exchange_n(p, &old, x, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    return old;
}
// Float atomics have no order, so no kernel may use them.
float atomicAdd(float*, float) = delete;

DEVICE void copy_async(void* shared, const void* global, bool there) { trine_copy_async(shared, global, there); }
DEVICE void copy_async_commit() { trine_copy_async_commit(); }
template <int groups>
DEVICE void copy_async_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (!trine_left_out("copy_async_wait", file, line)) trine_copy_async_wait(groups);
}

// --- tensor cores

// What lanes bring: registers of A, B, and C, which is the result too. Fragments as in the
// prelude, from the PTX ISA.
struct TrineMma {
    const unsigned* a;
    const unsigned* b;
    void* c;
};
static inline void trine_finish_mma_s8(void* const* lanes, unsigned) {
    signed char a[16][32], b[8][32];
    for (int lane = 0; lane < 32; lane++) {
        const TrineMma* at = static_cast<const TrineMma*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        memcpy(&a[g][4 * t], &at->a[0], 4);
        memcpy(&a[g + 8][4 * t], &at->a[1], 4);
        memcpy(&a[g][16 + 4 * t], &at->a[2], 4);
        memcpy(&a[g + 8][16 + 4 * t], &at->a[3], 4);
        memcpy(&b[g][4 * t], &at->b[0], 4);
        memcpy(&b[g][16 + 4 * t], &at->b[1], 4);
    }
    for (int lane = 0; lane < 32; lane++) {
        int* c = static_cast<int*>(static_cast<const TrineMma*>(lanes[lane])->c);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += a[row][k] * b[column][k];
            // Without `.satfinite` the sum wraps.
            c[i] = static_cast<int>(static_cast<unsigned>(c[i]) + static_cast<unsigned>(sum));
        }
    }
}
DEVICE float trine_bf16(unsigned short x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
template <float (*value)(unsigned short)>
static inline void trine_finish_mma_16(void* const* lanes, unsigned) {
    unsigned short a[16][16], b[8][16];
    for (int lane = 0; lane < 32; lane++) {
        const TrineMma* at = static_cast<const TrineMma*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        memcpy(&a[g][2 * t], &at->a[0], 4);
        memcpy(&a[g + 8][2 * t], &at->a[1], 4);
        memcpy(&a[g][8 + 2 * t], &at->a[2], 4);
        memcpy(&a[g + 8][8 + 2 * t], &at->a[3], 4);
        memcpy(&b[g][2 * t], &at->b[0], 4);
        memcpy(&b[g][8 + 2 * t], &at->b[1], 4);
    }
    float x[16][16], y[8][16];
    for (int i = 0; i < 16; i++) for (int k = 0; k < 16; k++) x[i][k] = value(a[i][k]);
    for (int i = 0; i < 8; i++) for (int k = 0; k < 16; k++) y[i][k] = value(b[i][k]);
    for (int lane = 0; lane < 32; lane++) {
        float* c = static_cast<float*>(static_cast<const TrineMma*>(lanes[lane])->c);
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            // Products of such numbers are exact in f32. The order of the sum is not documented.
            float sum = c[i];
            for (int k = 0; k < 16; k++) sum += x[row][k] * y[column][k];
            c[i] = sum;
        }
    }
}
DEVICE void mma_s8(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    TrineMma lane = {a, b, c};
    trine_warp("mma_s8", 0xffffffffu, &lane, trine_finish_mma_s8);
}
DEVICE void mma_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    TrineMma lane = {a, b, c};
    trine_warp("mma_bf16", 0xffffffffu, &lane, trine_finish_mma_16<trine_bf16>);
}
DEVICE void mma_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    TrineMma lane = {a, b, c};
    trine_warp("mma_f16", 0xffffffffu, &lane, trine_finish_mma_16<half_to_float>);
}
