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

// Differences of two pairs of f16.
DEVICE u32 sub_halves(u32 a, u32 b) {
    u32 c;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
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

// Loads and stores of memory do not move across this, where a compiler would spend registers on it.
DEVICE void stay_here() { asm volatile("" ::: "memory"); }

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

// Ternary matrices, as the host packs them (`packed.rs`): rows in pairs of tiles of 8, columns in
// blocks of 256. A block of a pair is a unit of 1024 bytes, 512 for each tile; lane `4 g + t` has 16
// of each for row `g`, whose word `j` holds columns `64 j + 16 t .. + 16` of the block: column
// `4 s + b` of those in bits `8 b + 2 s`, as the code `c = weight + 1`. A product of codes is too
// large by the sum of the activations, `Σ t·q = Σ c·q − Σ q`, which comes with the activations.

// Columns of a block, and their bytes in a quantised row.
constexpr u32 TERNARY_BLOCK = 256;
// Rows of a pair.
constexpr u32 TERNARY_PAIR = 16;
// 16-byte vectors of a unit, and of one tile of it.
constexpr u32 TERNARY_UNIT = 64;
constexpr u32 TERNARY_TILE = 32;
// Codes of four neighbours, a byte each; and four times the codes of the next four.
constexpr u32 CODES = 0x03030303u;
constexpr u32 CODES_TIMES_4 = 0x0c0c0c0cu;

DEVICE u32 lane_of_warp() { return threadIdx.x % WARP; }
// The number of this warp in its block, of which the shuffle tells the compiler that all lanes have it.
DEVICE u32 warp_of_block() { return __shfl_sync(0xffffffffu, threadIdx.x / WARP, 0); }

DEVICE u32 word_of(const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }

// Products of a pair of tiles with 1 to 4 quantised rows, by dp4a. Of each word the codes of eight
// columns come out multiplied by 4, which saves two of seven instructions; they have sums of their own.
template <int ROWS>
struct TernaryDots {
    i32 low[2][ROWS];
    i32 high[2][ROWS];

    DEVICE_METHOD TernaryDots() { clear(); }
    DEVICE_METHOD void clear() {
        for (int tile = 0; tile < 2; tile++) {
            for (int r = 0; r < ROWS; r++) low[tile][r] = high[tile][r] = 0;
        }
    }
    // Where this lane's activations begin in a block of rows that are `stride` bytes apart.
    DEVICE_METHOD static u32 offset(u32) { return 16 * (lane_of_warp() % 4); }

    // Adds a unit's products; `x` is `offset` into the block's activations.
    DEVICE_METHOD void add(const uint4 (&weights)[2], const i8* x, u32 stride) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint4 q = *reinterpret_cast<const uint4*>(x + r * stride + 64 * j);
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const u32 w = word_of(weights[tile], j);
                    low[tile][r] = __dp4a(i32(w & CODES), i32(q.x), low[tile][r]);
                    high[tile][r] = __dp4a(i32(w & CODES_TIMES_4), i32(q.y), high[tile][r]);
                    low[tile][r] = __dp4a(i32(w >> 4 & CODES), i32(q.z), low[tile][r]);
                    high[tile][r] = __dp4a(i32(w >> 4 & CODES_TIMES_4), i32(q.w), high[tile][r]);
                }
            }
        }
    }

    // Adds the sums to `sums[row of the pair][ROWS]` in shared memory, and starts anew.
    DEVICE_METHOD void flush(i32* sums) {
        const u32 lane = lane_of_warp();
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                i32 sum = low[tile][r] + (high[tile][r] >> 2);
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (lane % 4 == 0) atomicAdd(&sums[(8 * tile + lane / 4) * ROWS + r], sum);
            }
        }
        clear();
    }
};

// The same by mma, whose eight columns are the rows.
template <int ROWS>
struct TernaryTiles {
    i32 low[4];
    i32 high[4];

    DEVICE_METHOD TernaryTiles() { clear(); }
    DEVICE_METHOD void clear() {
        for (int i = 0; i < 4; i++) low[i] = high[i] = 0;
    }
    DEVICE_METHOD static u32 offset(u32 stride) {
        const u32 lane = lane_of_warp();
        return (lane / 4 < ROWS ? lane / 4 * stride : 0) + 16 * (lane % 4);
    }

    DEVICE_METHOD void add(const uint4 (&weights)[2], const i8* x, u32) {
        const bool there = lane_of_warp() / 4 < ROWS;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint4 q = make_uint4(0, 0, 0, 0);
            if (there) q = *reinterpret_cast<const uint4*>(x + 64 * j);
            const u32 v = word_of(weights[0], j);
            const u32 w = word_of(weights[1], j);
            // Along k the order is free, as long as it is the same for both.
            const u32 codes[4] = {v & CODES, w & CODES, v >> 4 & CODES, w >> 4 & CODES};
            const u32 even[2] = {q.x, q.z};
            mma_s8(low, codes, even);
            const u32 times_4[4] = {v & CODES_TIMES_4, w & CODES_TIMES_4, v >> 4 & CODES_TIMES_4,
                w >> 4 & CODES_TIMES_4};
            const u32 odd[2] = {q.y, q.w};
            mma_s8(high, times_4, odd);
        }
    }

    DEVICE_METHOD void flush(i32* sums) {
        const u32 g = lane_of_warp() / 4;
        const u32 t = lane_of_warp() % 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 r = 2 * t + i % 2;
            if (r < ROWS) atomicAdd(&sums[(8 * (i / 2) + g) * ROWS + r], low[i] + (high[i] >> 2));
        }
        clear();
    }
};

// The units of weights that a warp multiplies, and the first of them, loaded before they are wanted.
// A block's units lie one after the other; only those from `cut` on lie `jump` units further.
template <int DEPTH>
struct TernaryUnits {
    const uint4* weights;
    u32 first;
    u32 last;
    u32 cut;
    u64 jump;
    uint4 ring[DEPTH][2];

    // `units` are those of the block, which its `warps` share evenly.
    DEVICE_METHOD TernaryUnits(const uint4* block, u32 units, u32 cut, u64 jump, u32 warps)
        : weights(block + lane_of_warp()), cut(cut), jump(jump) {
        const u32 warp = warp_of_block();
        first = warp * units / warps;
        last = (warp + 1) * units / warps;
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            if (first + i < last) load(first + i, ring[i]);
        }
    }
    DEVICE_METHOD void load(u32 unit, uint4 (&pair)[2]) const {
        const uint4* at = weights + (u64(unit) + (unit < cut ? 0 : jump)) * TERNARY_UNIT;
        pair[0] = load_once(at);
        pair[1] = load_once(at + TERNARY_TILE);
    }

    // Adds the units' products to `sums[row][rows of x]` in shared memory. A pair has `blocks`
    // units; the quantised rows are `stride` bytes apart.
    template <typename Product>
    DEVICE_METHOD void multiply(Product product, u32 blocks, const i8* rows, u32 stride, u32 rows_count,
        i32* sums) {
        if (first == last) return;
        const i8* x = rows + Product::offset(stride);
        u32 block = first % blocks;
        sums += first / blocks * TERNARY_PAIR * rows_count;
        for (u32 base = first; base < last; base += DEPTH) {
#pragma unroll
            for (int i = 0; i < DEPTH; i++) {
                const u32 unit = base + i;
                if (unit < last) {
                    product.add(ring[i], x + block * TERNARY_BLOCK, stride);
                    if (unit + DEPTH < last) load(unit + DEPTH, ring[i]);
                    block++;
                    if (block == blocks || unit + 1 == last) {
                        product.flush(sums);
                        sums += TERNARY_PAIR * rows_count;
                        block = 0;
                    }
                }
            }
        }
    }
};

// A product as `ops::TernaryMatmul` has it, of the exact sum of weights times activations.
DEVICE float ternary_product(i32 sum, float quotient) { return static_cast<float>(sum) * quotient; }

// `act(gate) · up` in the order of the CPU's backend; `activation` is one of the host's numbers.
constexpr u32 RELU2 = 0;
constexpr u32 SILU = 1;
DEVICE float times_sigmoid(float x, float y) { return __fdiv_rn(x, 1.0f + exp_exact(0.0f - y)); }
DEVICE float gated(u32 activation, float gate, float up) {
    if (activation == RELU2) {
        const float positive = 0.0f > gate ? 0.0f : gate; // NaN passes
        return positive * positive * up;
    }
    if (activation == SILU) return times_sigmoid(gate, gate) * up;
    // GELU as x / (1 + e^−2u), which does not cancel; 1.595769 is 2·√(2/π).
    const float inner = __fmaf_rn(gate * gate * gate, 0.044715f, gate);
    return times_sigmoid(gate, inner * 1.595769f) * up;
}

// Sampling: what is done with a row of logits, by one block of `ROW_THREADS` threads.

constexpr int ROW_THREADS = 512;
// Loads of a thread that are on their way at once.
constexpr u32 ROW_LOADS = 8;

// As `reduce_block`, over the threads of such a block.
template <typename T, typename Op>
DEVICE T reduce_row(T x, Op op) {
    __shared__ T partial[ROW_THREADS / WARP];
    x = reduce_warp(x, op);
    __syncthreads(); // the last reduction's partials have been read
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = partial[threadIdx.x % (ROW_THREADS / WARP)];
    for (int distance = 1; distance < ROW_THREADS / WARP; distance *= 2) {
        x = op(x, __shfl_xor_sync(0xffffffffu, x, distance));
    }
    return x;
}

// `ops::SampleRow`.
struct SampleRow {
    u32 lane;
    u32 length;
    u32 prompt;
    u32 bias_start;
    u32 bias_count;
    float temperature;
    u32 top_k;
    float top_p;
    float min_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    u32 seed[2];
    u32 choice;
    u32 logprobs;
};

// The largest finite f32. What overflows counts as this, so that no infinity is ever computed with.
constexpr float MOST_FINITE = 3.4028234e38f;
// Stands for every logit that is NaN or infinite, above all others.
constexpr u32 NOT_FINITE = 0xffffffffu;

// A logit as an integer that is higher where the logit is, the same for 0 and −0; those of finite
// logits lie between 0 and `NOT_FINITE`.
DEVICE u32 order_of(float x) {
    const u32 word = __float_as_uint(x);
    if (magnitude_bits(x) >= INFINITE_BITS) return NOT_FINITE;
    if (word == 0x80000000u) return 0x80000000u;
    return word >> 31 ? ~word : word | 0x80000000u;
}
DEVICE float value_of_order(u32 order) {
    return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}
// NaN becomes the lowest.
DEVICE float clamped(float x) { return fminf(fmaxf(x, -MOST_FINITE), MOST_FINITE); }

// A logit and its token as one integer: higher where the logit is, or the token lower.
DEVICE u64 ranked(u32 order, u32 token) { return u64(order) << 32 | static_cast<u32>(~token); }
DEVICE u32 order_of_ranked(u64 ranked) { return static_cast<u32>(ranked >> 32); }
DEVICE u32 token_of_ranked(u64 ranked) { return ~static_cast<u32>(ranked); }

// Calls `f(token, logit)` for the tokens of this thread: `t`, `t + 512`, ... in this order.
template <typename F>
DEVICE void for_each_token(const float* row, u32 vocabulary, F f) {
    for (u32 start = threadIdx.x; start < vocabulary; start += ROW_LOADS * ROW_THREADS) {
        float x[ROW_LOADS];
#pragma unroll
        for (u32 n = 0; n < ROW_LOADS; n++) x[n] = row[min(start + n * ROW_THREADS, vocabulary - 1)];
#pragma unroll
        for (u32 n = 0; n < ROW_LOADS; n++) {
            if (start + n * ROW_THREADS < vocabulary) f(start + n * ROW_THREADS, x[n]);
        }
    }
}

// The extremes of a row.
struct RowBest {
    // The best token, `ranked`. Its order is `NOT_FINITE` where a logit is not finite.
    u64 best;
    // The lowest of the threads' own highest: a floor under the 512 highest logits of a row. The
    // lowest logit where there are no more than threads.
    u32 floor;
    // The lowest logit.
    u32 lowest;

    DEVICE_METHOD RowBest(const float* row, u32 vocabulary) : best(0) {
        u32 most = 0;
        for_each_token(row, vocabulary, [&](u32 token, float x) {
            const u32 order = order_of(x);
            const u64 own = ranked(order, token);
            best = own > best ? own : best;
            most = ~order > most ? ~order : most;
        });
        lowest = ~reduce_row(most, Most());
        floor = max(lowest, ~reduce_row(~order_of_ranked(best), Most()));
        best = reduce_row(best, Most());
    }
    DEVICE_METHOD bool finite() const { return order_of_ranked(best) != NOT_FINITE; }
};

// `ln Σ exp(x)` of a row of finite logits. Sums go up in three steps, so that none of them has many
// terms: pairs and pairs of pairs of 8, these of a thread, and the tree of the threads. The order is
// that of the row alone.
struct LogSum {
    float highest;
    // `ln Σ exp(x − highest)`.
    double above;

    DEVICE_METHOD LogSum(const float* row, u32 vocabulary, float highest) : highest(highest) {
        float sum = 0.0f;
        for (u32 start = threadIdx.x; start < vocabulary; start += ROW_LOADS * ROW_THREADS) {
            float x[ROW_LOADS];
#pragma unroll
            for (u32 n = 0; n < ROW_LOADS; n++) x[n] = row[min(start + n * ROW_THREADS, vocabulary - 1)];
#pragma unroll
            for (u32 n = 0; n < ROW_LOADS; n++) {
                x[n] = start + n * ROW_THREADS < vocabulary ? exp_exact(x[n] - highest) : 0.0f;
            }
            sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        }
        above = log(static_cast<double>(reduce_row(sum, Add())));
    }
    DEVICE_METHOD float log_probability(float x) const {
        return static_cast<float>(static_cast<double>(x) - static_cast<double>(highest) - above);
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
// of `stride` elements. Rows of an int8 cache have scales.
constexpr u32 PAGE = 32;
template <typename T> constexpr bool SCALED = false;
template <> constexpr bool SCALED<i8> = true;

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

// The scale of the row of a slot; those of the slots of a page are neighbours.
DEVICE float* cache_scale(void* cache, u32 slots, u32 slot, u32 kv_head, u32 kv, u32 stride) {
    i8* behind = cache_row(static_cast<i8*>(cache), slots, 0, kv, stride);
    return cache_row(reinterpret_cast<float*>(behind), slot, kv_head, kv, 1);
}

// How a row becomes int8, from the bits of its largest magnitude: `ops::RopeAppendKv` has the formula.
struct Int8Row {
    float by;
    float scale;

    DEVICE_METHOD explicit Int8Row(u32 most) : by(0.0f), scale(__uint_as_float(NAN_BITS)) {
        if (most >= INFINITE_BITS) return;
        const float largest = fmaxf(__uint_as_float(most), 1e-30f);
        by = __fdiv_rn(127.0f, largest);
        scale = __fdiv_rn(largest, 127.0f);
    }
    // Zero where the row is not finite.
    DEVICE_METHOD i8 operator()(float x) const { return by > 0.0f ? static_cast<i8>(rintf(x * by)) : i8(0); }
};

// Softmax over parts of the keys: each part has its highest score, the sum of `exp(score −
// highest)` and with these weights the sum of the values; parts are joined in ascending order, by
// what stands here, so parts that are taken in a loop or by blocks of their own give the same bits.

// The highest score of no keys: the lowest number, so that no keys may be joined to no keys.
DEVICE float nothing_yet() { return -__uint_as_float(INFINITE_BITS - 1); }

// The score of a key that a row does not see: its weight is 0.
DEVICE float unseen_score() { return -__uint_as_float(INFINITE_BITS); }

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
    // Keys that a query sees at most, the latest; NONE where it sees all.
    u32 window;
};

// Keys up to that of a token, its own among them, if it is one of the sequence's; 0 of padding.
DEVICE u32 seen_keys(const AttentionArgs& a, u32 sequence, u32 token) {
    if (sequence >= a.sequence_count) return 0;
    const bool belongs = a.tokens == 0
        ? a.query_starts[sequence] <= token && token < a.query_starts[sequence + 1]
        : a.sequences[token] == sequence;
    return belongs ? min(a.positions[token], max(a.max_pages * PAGE, 1u) - 1) + 1 : 0;
}

// How many of them are too far back for it to see.
DEVICE u32 unseen_keys(const AttentionArgs& a, u32 seen) { return seen > a.window ? seen - a.window : 0; }

// Keys of a part or block that a row sees: `from` and the `count - 1` after it.
struct Seen {
    u32 from;
    u32 count;

    DEVICE_METHOD Seen() {}
    // Of those from `start` on, where a row sees those below `seen` that are not below `unseen`.
    DEVICE_METHOD Seen(u32 unseen, u32 seen, u32 start, u32 size)
        : from(unseen > start ? min(unseen - start, size) : 0),
          count((seen > start ? min(seen - start, size) : 0) - from) {}
    DEVICE_METHOD bool operator()(u32 key) const { return key - from < count; }
};

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

    // Keys up to that of a token of the tile.
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
    // The same in f32, where rows have scales.
    DEVICE_METHOD float new_key(const AttentionArgs& a, u32 token, u32 i) const {
        if (i >= a.dim) return 0.0f;
        const Rotation rotation{a.cos, a.sin, a.context, a.dim / 2};
        return rotation.element(head_of(a, token, a.query + kv_head), a.positions[token], i);
    }
    DEVICE_METHOD float new_value(const AttentionArgs& a, u32 token, u32 i) const {
        return i < a.dim ? head_of(a, token, a.query + a.kv + kv_head)[i] : 0.0f;
    }
    // How they become int8, by a warp.
    DEVICE_METHOD Int8Row new_key_row(const AttentionArgs& a, u32 token) const {
        u32 most = 0;
        for (u32 i = lane_of_warp(); i < a.dim; i += WARP) most = max(most, magnitude_bits(new_key(a, token, i)));
        return Int8Row(reduce_warp(most, Most()));
    }
    DEVICE_METHOD Int8Row new_value_row(const AttentionArgs& a, u32 token) const {
        u32 most = 0;
        for (u32 i = lane_of_warp(); i < a.dim; i += WARP) most = max(most, magnitude_bits(new_value(a, token, i)));
        return Int8Row(reduce_warp(most, Most()));
    }
    // The scale of a slot's key or value in an int8 cache.
    DEVICE_METHOD float* scale(const AttentionArgs& a, void* cache, u32 slot) const {
        return cache_scale(cache, a.pages * PAGE, slot, kv_head, a.kv, a.stride);
    }
};
