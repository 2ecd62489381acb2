// What every kernel starts from: types, the few instructions that C++ has no name for, reductions.
//
// The one header, and it includes nothing on a GPU: NVRTC compiles it without any toolkit. On a CPU
// `emulator.h` stands in for the compiler's built-ins and for the instructions; all else is the
// same text. Compiled with --fmad=false: a fused multiply-add happens where `__fmaf_rn` says so, so
// that the bits are the same wherever a kernel runs.
#pragma once

#ifdef TRINE_EMULATOR
#include "emulator.h"
#endif

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef unsigned long long u64;

// Marks an index that stands for nothing, as in `backend::NONE`.
constexpr u32 NONE = 0xffffffffu;
// Set in a token that is a lane instead, as in `backend::FROM_LANE`.
constexpr u32 FROM_LANE = 0x80000000u;
// Threads of a warp.
constexpr int WARP = 32;
// Threads of most blocks, and the number of partial sums that a row's norm is made of.
constexpr int THREADS = 256;
constexpr u32 NAN_BITS = 0x7fc00000u;
// Bits of infinity; the magnitude bits of what is not finite are not below it.
constexpr u32 INFINITE_BITS = 0x7f800000u;

#ifndef TRINE_EMULATOR

#define DEVICE static __device__ __forceinline__
#define DEVICE_METHOD __device__ __forceinline__

// A kernel of blocks of `threads` threads, with one argument, a struct that is called `a`.
#define KERNEL(name, Args, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a)

// The same, with at least `blocks` blocks on a multiprocessor, which bounds the registers.
#define KERNEL_AT_LEAST(name, Args, threads, blocks) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args a)

// Shared memory whose size the launch decides.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

// Programmatic dependent launch (sm_90): a kernel may start before the one in front of it is done.
// Whatever that one wrote is there after `wait_for_previous_kernel`; every thread of every kernel
// calls it before it touches anything but weights. Without the launch attribute both do nothing.
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

DEVICE float half_to_float(u16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// To nearest, ties to even; what is too large becomes infinite.
DEVICE u16 float_to_half(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// 16 bytes that are read once: past the L1 cache, and first to leave the L2 cache.
DEVICE uint4 load_once(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// c += a · b, row-major 16×32 s8 by column-major 32×8 s8 into 16×8 s32. Lane `4 g + t` holds of A
// row `g` in a[0], a[2] and row `g + 8` in a[1], a[3], columns `4 t ..` and `16 + 4 t ..`; of B
// column `g`, rows `4 t ..` and `16 + 4 t ..`; of C rows `g` and `g + 8`, columns `2 t`, `2 t + 1`.
// (PTX ISA, "Matrix Fragments for mma.m16n8k32".)
DEVICE void mma_s8(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same for 16×16 by 16×8 in bf16 into f32: a register holds two neighbours along k. Of A row
// `g` in a[0], a[2] and `g + 8` in a[1], a[3], columns `2 t ..` and `8 + 2 t ..`.
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// And in f16 into f32.
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 16 bytes from device to shared memory, in the background. Where `there` is false, zeros.
DEVICE void copy_async(void* shared, const void* global, bool there) {
    u32 to = static_cast<u32>(__cvta_generic_to_shared(shared));
    int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(global), "r"(bytes) : "memory");
}
// Ends a group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `groups` of this thread's groups are under way; a barrier must follow.
template <int groups>
DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(groups) : "memory"); }

#endif // TRINE_EMULATOR

DEVICE float bf16_to_float(u16 x) { return __uint_as_float(static_cast<u32>(x) << 16); }

// Bits of the magnitude, whose order is that of magnitudes; infinities and NaN are above the rest.
DEVICE u32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }
DEVICE bool is_finite(float x) { return magnitude_bits(x) < INFINITE_BITS; }

// The number of this block in a grid whose y is folded from x. See `grid` of the host.
DEVICE u32 flat_block() { return blockIdx.y * gridDim.x + blockIdx.x; }

// `2^n` for a whole n that is not below −126.
DEVICE float power_of_two(float n) { return __uint_as_float(static_cast<u32>(static_cast<i32>(n) + 127) << 23); }

// `e^x` within 2 ulp, with the bits of the CPU's backend (`cpu/exp.rs`, Cephes' `expf`): 0 from about
// −103.98 down, infinity from about 88.73 up, NaN of NaN.
DEVICE float exp_exact(float x) {
    x = x < 89.0f || x != x ? x : 89.0f;
    x = x > -104.0f || x != x ? x : -104.0f;
    const float n = rintf(x * 1.44269504f);
    float r = __fmaf_rn(n, -0.6933594f, x);
    r = __fmaf_rn(n, 2.1219444e-4f, r);
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 0.16666665f);
    p = __fmaf_rn(p, r, 0.5f);
    const float y = __fmaf_rn(p, r * r, r) + 1.0f;
    // In two factors, so that results below the least normal number are rounded and not lost.
    const float half = rintf(n * 0.5f);
    return y * power_of_two(half) * power_of_two(n - half);
}

// Reductions over the 256 threads of a block; all of them get the result, and all must call. A tree
// over the threads' numbers, neighbours first: within warps, then over the eight warps' results.
// (addition commutes, so a butterfly has the tree's bits.)

template <typename T, typename Op>
DEVICE T reduce_warp(T x, Op op) {
    for (int distance = 1; distance < WARP; distance *= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

template <typename T, typename Op>
DEVICE T reduce_block(T x, Op op) {
    __shared__ T partial[THREADS / WARP];
    x = reduce_warp(x, op);
    __syncthreads(); // the last reduction's partials have been read
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = partial[threadIdx.x % (THREADS / WARP)];
    for (int distance = 1; distance < THREADS / WARP; distance *= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

struct Add {
    template <typename T> DEVICE_METHOD T operator()(T a, T b) const { return a + b; }
};
struct Most {
    template <typename T> DEVICE_METHOD T operator()(T a, T b) const { return a > b ? a : b; }
};

// A row of f32, normed where there is a gain: `x · (1 / sqrt(mean(x²) + eps)) · gain`. Thread `t`
// of 256 adds up the squares of elements `t`, `t + 256`, ... in this order, in every kernel, so a
// row's bits do not depend on the kernel that norms it.
struct NormedRow {
    const float* row;
    const float* gain;
    u32 width;
    float inverse;

    // By all threads of a block.
    DEVICE_METHOD NormedRow(const float* row, const float* gain, u32 width, float eps)
        : row(row), gain(gain), width(width), inverse(1.0f) {
        if (!gain) return;
        float squares = 0.0f;
        for (u32 i = threadIdx.x; i < width; i += THREADS) squares = __fmaf_rn(row[i], row[i], squares);
        const float mean = __fdiv_rn(reduce_block(squares, Add()), static_cast<float>(width));
        inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + eps));
    }

    DEVICE_METHOD float operator[](u32 i) const {
        return gain ? row[i] * inverse * gain[i] : row[i];
    }

    // `127 / max(max |x|, 1e-5)`, NaN where a value is not finite. By all threads of a block.
    DEVICE_METHOD float scale() const {
        u32 most = 0;
        for (u32 i = threadIdx.x; i < width; i += THREADS) {
            const u32 magnitude = magnitude_bits((*this)[i]);
            most = magnitude > most ? magnitude : most;
        }
        most = reduce_block(most, Most());
        if (most >= INFINITE_BITS) return __uint_as_float(NAN_BITS);
        return __fdiv_rn(127.0f, fmaxf(__uint_as_float(most), 1e-5f));
    }

    // Elements `4 word ..` quantised, a byte each; zeros beyond the width and where the scale is
    // NaN. Adds them to `sum`.
    DEVICE_METHOD u32 quantized(u32 word, float scale, i32& sum) const {
        u32 result = 0;
        if (!is_finite(scale)) return result;
        for (u32 b = 0; b < 4; b++) {
            const u32 i = 4 * word + b;
            if (i < width) {
                // `rintf` rounds half to even.
                const i32 q = static_cast<i32>(fminf(fmaxf(rintf((*this)[i] * scale), -128.0f), 127.0f));
                result |= (static_cast<u32>(q) & 0xffu) << (8 * b);
                sum += q;
            }
        }
        return result;
    }
};

// Rotation. Written with fused multiply-adds, so that it has the same bits in every kernel.

// The tables `[context, dim / 2]` of `ops::RopeAppendKv`.
struct Rotation {
    const float* cos;
    const float* sin;
    u32 context;
    u32 half;

    // Elements `i` and `i + half` of a head. Only padding has positions beyond the tables.
    DEVICE_METHOD void pair(float& low, float& high, u32 position, u32 i) const {
        if (position >= context) return;
        const u64 at = u64(position) * half + i;
        const float c = cos[at];
        const float s = sin[at];
        const float rotated = __fmaf_rn(low, c, -(high * s));
        high = __fmaf_rn(high, c, low * s);
        low = rotated;
    }
    // Element `i` of a head, rotated.
    DEVICE_METHOD float element(const float* head, u32 position, u32 i) const {
        const u32 at = i < half ? i : i - half;
        float low = head[at];
        float high = head[at + half];
        pair(low, high, position, at);
        return i < half ? low : high;
    }
};

// The paged cache, in the order that `kv.rs` draws: a head's keys (or values) of a page are 32 rows
// of `stride` elements.
constexpr u32 PAGE = 32;

// What the cache makes of an element. What f16 cannot hold becomes NaN and not infinity: zero times
// it is the same NaN as any weight times it, so a fault has one form wherever it is met.
DEVICE void to_cache(float x, float& cached) { cached = x; }
DEVICE void to_cache(float x, u16& cached) {
    const u16 bits = float_to_half(x);
    cached = (bits & 0x7c00u) == 0x7c00u ? u16(0x7fff) : bits;
}

// The row of a slot, or of the first slot of a page.
template <typename T>
DEVICE T* cache_row(T* cache, u32 slot, u32 kv_head, u32 kv, u32 stride) {
    return cache + ((u64(slot / PAGE) * kv + kv_head) * PAGE + slot % PAGE) * stride;
}

// Softmax over parts of the keys: each part has its highest score, the sum of `exp(score −
// highest)` and with these weights the sum of the values; parts are joined in ascending order, by
// what stands here, so parts that are taken in a loop or by blocks of their own give the same bits.

// The highest score of no keys.
DEVICE float nothing_yet() { return -__uint_as_float(INFINITE_BITS); }

struct Join {
    float highest;
    float of_all;
    float of_one;

    DEVICE_METHOD Join() {}
    // Of a part `one` with those before it.
    DEVICE_METHOD Join(float all, float one)
        : highest(fmaxf(all, one)), of_all(exp_exact(all - highest)), of_one(exp_exact(one - highest)) {}
    DEVICE_METHOD float operator()(float all, float one) const { return __fmaf_rn(one, of_one, all * of_all); }
};

// A part of which a row sees nothing may be joined or left out: that changes at most the sign of a
// zero, and the sum with zero takes it off.
DEVICE float attended(float out, float sum) { return __fdiv_rn(out, sum) + 0.0f; }

// The argument of every kernel of attention.
struct AttentionArgs {
    const u32* positions;
    const u32* sequences;
    const u32* query_starts;
    const u32* page_table;
    const float* qkv;
    void* keys;
    void* values;
    float* output;
    // Where parts are split over blocks: `[token][query head][part]` rows of `stride` sums of
    // values, and as many pairs of highest score and sum of weights.
    float* outs;
    float2* statistics;
    // Slots where the rotation and the append are fused, else null; and the tables of the rotation.
    const u32* slots;
    const float* cos;
    const float* sin;
    u32 rows;
    u32 sequence_count;
    // Row length of the page table.
    u32 max_pages;
    // Pages that the cache has.
    u32 pages;
    // Heads, and elements of one: in a row of qkv, and in the cache.
    u32 query;
    u32 kv;
    u32 dim;
    u32 stride;
    // Of a tile: tokens, and query heads of each. No tokens: token `t` is that of sequence `t`.
    u32 tokens;
    u32 heads;
    // Parts that there is memory for; 0 where one block goes through all of them.
    u32 parts;
    // Rows of `cos` and `sin`.
    u32 context;
    float scale;
    u32 padding;
};

// Keys that a token sees, if it is one of the sequence's; 0 of padding.
DEVICE u32 seen_keys(const AttentionArgs& a, u32 sequence, u32 token) {
    if (sequence >= a.sequence_count) return 0;
    const bool belongs = a.tokens == 0
        ? a.query_starts[sequence] <= token && token < a.query_starts[sequence + 1]
        : a.sequences[token] == sequence;
    return belongs ? min(a.positions[token], max(a.max_pages * PAGE, 1u) - 1) + 1 : 0;
}

// What a block of threads works on: tokens `first ..` of a sequence, times query heads `head ..`
// that share a key/value head. Row `r` is token `r / heads`, head `r % heads`.
struct AttentionTile {
    u32 sequence;
    u32 first;
    u32 tokens;
    u32 kv_head;
    u32 head;
    u32 heads;
    // Query heads of all tiles of the key/value head.
    u32 group;

    DEVICE_METHOD u32 rows() const { return tokens * heads; }

    // Finds the tile of this block; no tokens where there is none. By all threads.
    //
    // With tiles of `n` tokens, those of sequence `s` are number `start / n + s` and the next ones
    // in a grid of `rows / n + sequences + 1`: no two sequences meet, and nothing has to be
    // counted. What lies behind the last sequence is padding, and counts as one more.
    DEVICE_METHOD AttentionTile(const AttentionArgs& a, u32 threads) {
        group = a.query / a.kv;
        const u32 head_tiles = (group + a.heads - 1) / a.heads;
        const u32 head_tile = blockIdx.x % head_tiles;
        kv_head = blockIdx.x / head_tiles % a.kv;
        head = kv_head * group + head_tile * a.heads;
        heads = min(a.heads, group - head_tile * a.heads);
        const u32 place = blockIdx.x / head_tiles / a.kv;
        tokens = 0;
        if (a.tokens == 0) {
            sequence = place;
            first = place;
            tokens = place < a.rows ? 1 : 0;
            return;
        }
        // The latest tokens see most keys: they go first.
        const u32 number = a.rows / a.tokens + a.sequence_count - place;
        __shared__ u32 found;
        if (threadIdx.x == 0) found = 0;
        __syncthreads();
        for (u32 s = threadIdx.x; s <= a.sequence_count; s += threads) {
            if (min(a.query_starts[s], a.rows) / a.tokens + s <= number) atomicAdd(&found, 1u);
        }
        __syncthreads();
        if (found == 0) return;
        sequence = found - 1;
        const u32 start = min(a.query_starts[sequence], a.rows);
        const u32 end = sequence < a.sequence_count ? min(a.query_starts[sequence + 1], a.rows) : a.rows;
        first = start + (number - start / a.tokens - sequence) * a.tokens;
        tokens = first < end ? min(a.tokens, end - first) : 0;
    }

    // Keys that a token of the tile sees.
    DEVICE_METHOD u32 seen(const AttentionArgs& a, u32 token) const { return seen_keys(a, sequence, token); }

    // The number of a page of the sequence; `NONE` where the table has no page of the cache.
    DEVICE_METHOD u32 page(const AttentionArgs& a, u32 index) const {
        if (index >= a.max_pages) return NONE;
        const u32 page = a.page_table[u64(sequence) * a.max_pages + index];
        return page < a.pages ? page : NONE;
    }

    // A head of a token in qkv: query heads come first, then key heads, then value heads.
    DEVICE_METHOD const float* head_of(const AttentionArgs& a, u32 token, u32 head) const {
        return a.qkv + (u64(token) * (a.query + 2 * a.kv) + head) * a.dim;
    }
    // An element of a query head, rotated where that is fused.
    DEVICE_METHOD float query(const AttentionArgs& a, u32 token, u32 head, u32 i) const {
        const float* row = head_of(a, token, head);
        if (!a.slots) return row[i];
        const Rotation rotation{a.cos, a.sin, a.context, a.dim / 2};
        return rotation.element(row, a.positions[token], i);
    }
    // Elements of the token's own key and value, as the cache holds them.
    template <typename T>
    DEVICE_METHOD void new_element(const AttentionArgs& a, u32 token, u32 i, T& key, T& value) const {
        float k = 0.0f;
        float v = 0.0f;
        if (i < a.dim) {
            const Rotation rotation{a.cos, a.sin, a.context, a.dim / 2};
            k = rotation.element(head_of(a, token, a.query + kv_head), a.positions[token], i);
            v = head_of(a, token, a.query + a.kv + kv_head)[i];
        }
        to_cache(k, key);
        to_cache(v, value);
    }
};
