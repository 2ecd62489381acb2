// `ops::RmsNormQuantize` and the `ops::TernaryMatmul` that reads it, in one, for 1 to 4 rows; and in
// the gated form also the activation and the product with up that follow, of a matrix whose first
// half are the gate's rows and the other up's.
//
// Each block norms and quantises the rows for itself, in shared memory: they are short, and a launch
// of its own would cost more. The first weights are loaded before the wait for the kernel in front.
#include "prelude.cuh"

struct TernaryMatmulFusedArgs {
    const float* input;
    const float* gain; // null without a norm
    const uint4* weights;
    const float* weight_scales; // of each feature
    float* output;
    // Of the rows that are normed; blocks of columns.
    u32 width;
    u32 blocks;
    // Of the matrix, or of its half where there is a gate: pairs of tiles, features.
    u32 pairs;
    u32 features;
    // Pairs that a block of threads takes; with a gate also as many of up's.
    u32 share;
    // Row length and first column of the output, and whether it is added to.
    u32 stride;
    u32 column;
    u32 add;
    u32 activation;
    float eps;
};

// With a gate: as many of the gate's as of up's.
constexpr u32 MOST_PAIRS = THREADS / TERNARY_PAIR;
// As in `ternary_matmul.cu`.
constexpr int DEPTH = 4;
// Bytes between quantised rows beyond their length, so that rows begin in different banks.
constexpr u32 PADDING = 64;
// Elements of a row that a thread loads at once.
constexpr u32 AT_ONCE = 14;
constexpr u32 WORDS_AT_ONCE = 4;

// Four neighbours, a byte each. `x + 1.5 · 2^23` rounds x half to even and has it in its low bits;
// nothing is beyond ±127.5, which scales and rounding see to, so nothing is clamped.
DEVICE u32 quantized(const float4& x, float scale) {
    constexpr float ROUND = 12582912.0f;
    auto rounded = [=](float y) { return __float_as_uint(y * scale + ROUND); };
    return __byte_perm(__byte_perm(rounded(x.x), rounded(x.y), 0x0040),
        __byte_perm(rounded(x.z), rounded(x.w), 0x0040), 0x5410);
}

// Norms a row into `normed` and quantises it into `values`, with the bits of the prelude's
// `NormedRow`: the same threads add the same squares in the same order. Answers the scale; adds the
// sum of the quantised to `sum`. All in shared memory but the row; `gain` is null without a norm.
DEVICE float quantize(const float* row, const float* gain, const TernaryMatmulFusedArgs& a, float* normed,
    u32* values, i32* sum) {
    const u32 padded = a.blocks * TERNARY_BLOCK;
    float squares = 0.0f;
    for (u32 base = threadIdx.x; base < padded; base += AT_ONCE * THREADS) {
        float x[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            x[i] = row[min(base + i * THREADS, a.width - 1)];
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 at = base + i * THREADS;
            if (at < a.width) squares = __fmaf_rn(x[i], x[i], squares);
            if (at < padded) normed[at] = at < a.width ? x[i] : 0.0f;
        }
    }
    float inverse = 1.0f;
    if (gain) {
        copy_async_wait<0>(); // the gain's; the reduction's barrier follows
        const float mean = __fdiv_rn(reduce_block(squares, Add()), static_cast<float>(a.width));
        inverse = __fdiv_rn(1.0f, __fsqrt_rn(mean + a.eps));
    }
    // Several elements are read before the first is written, which hides what each read takes.
    u32 most = 0;
    for (u32 base = threadIdx.x; base < a.width; base += AT_ONCE * THREADS) {
        float x[AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            // This thread's own, also where there is no more of the row.
            const u32 at = base + i * THREADS < a.width ? base + i * THREADS : base;
            x[i] = gain ? normed[at] * inverse * gain[at] : normed[at];
        }
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) {
            const u32 at = base + i * THREADS;
            if (at < a.width) {
                most = max(most, magnitude_bits(x[i]));
                normed[at] = x[i];
            }
        }
    }
    most = reduce_block(most, Most()); // its barriers also show all of the row to all
    const bool finite = most < INFINITE_BITS;
    const float scale = finite ? __fdiv_rn(127.0f, fmaxf(__uint_as_float(most), 1e-5f))
                               : __uint_as_float(NAN_BITS);
    i32 part = 0;
    for (u32 base = threadIdx.x; base < padded / 4; base += WORDS_AT_ONCE * THREADS) {
        float4 x[WORDS_AT_ONCE];
#pragma unroll
        for (u32 i = 0; i < WORDS_AT_ONCE; i++) {
            const u32 word = base + i * THREADS;
            if (word < padded / 4) x[i] = reinterpret_cast<const float4*>(normed)[word];
        }
#pragma unroll
        for (u32 i = 0; i < WORDS_AT_ONCE; i++) {
            const u32 word = base + i * THREADS;
            if (word < padded / 4) {
                const u32 four = finite ? quantized(x[i], scale) : 0;
                values[word] = four;
                part = __dp4a(i32(four), 0x01010101, part);
            }
        }
    }
    part = reduce_warp(part, Add());
    if (lane_of_warp() == 0) atomicAdd(sum, part);
    return scale;
}

template <int ROWS, bool GATE, typename Product>
DEVICE void fused(const TernaryMatmulFusedArgs& a) {
    DYNAMIC_SHARED(memory);
    __shared__ i32 products[MOST_PAIRS * TERNARY_PAIR * ROWS];
    __shared__ i32 row_sums[ROWS];
    // The row in f32, the gain, then the quantised rows.
    const u32 padded = a.blocks * TERNARY_BLOCK;
    const u32 row_bytes = padded + PADDING;
    float* normed = reinterpret_cast<float*>(memory);
    float* gain = normed + padded;
    i8* values = reinterpret_cast<i8*>(a.gain ? gain + padded : gain);

    const u32 first = blockIdx.x * a.share;
    const u32 pairs = min(a.share, a.pairs - first);
    const u32 all_pairs = GATE ? 2 * pairs : pairs;
    TernaryUnits<DEPTH> units(a.weights + u64(first) * a.blocks * TERNARY_UNIT, all_pairs * a.blocks,
        pairs * a.blocks, u64(a.pairs - pairs) * a.blocks, THREADS / WARP);
    if (a.gain) {
        for (u32 i = threadIdx.x; i < a.width / 4; i += THREADS) {
            copy_async(gain + 4 * i, a.gain + 4 * i, true);
        }
        copy_async_commit();
        const u32 rest = a.width / 4 * 4 + threadIdx.x;
        if (rest < a.width) gain[rest] = a.gain[rest];
    }
    let_next_kernel_start();
    for (u32 i = threadIdx.x; i < all_pairs * TERNARY_PAIR * ROWS; i += THREADS) products[i] = 0;
    if (threadIdx.x < ROWS) row_sums[threadIdx.x] = 0;
    // A thread has one feature in the end; what it needs for that is loaded early.
    const u32 feature = first * TERNARY_PAIR + threadIdx.x;
    const bool mine = threadIdx.x < pairs * TERNARY_PAIR && feature < a.features;
    const float weight_scale = mine ? a.weight_scales[feature] : 0.0f;
    const float up_scale = GATE && mine ? a.weight_scales[a.features + feature] : 0.0f;
    wait_for_previous_kernel();

    float scales[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if (r > 0) __syncthreads(); // the row before has been read
        u32* to = reinterpret_cast<u32*>(values + r * row_bytes);
        scales[r] = quantize(a.input + u64(r) * a.width, a.gain ? gain : nullptr, a, normed, to, &row_sums[r]);
    }
    float* out = a.output + a.column + feature;
    float before[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) before[r] = !GATE && a.add && mine ? out[u64(r) * a.stride] : 0.0f;
    __syncthreads();
    units.multiply(Product(), a.blocks, values, row_bytes, ROWS, products);
    __syncthreads();

    if (!mine) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i32 sum = products[threadIdx.x * ROWS + r] - row_sums[r];
        float y = ternary_product(sum, __fdiv_rn(weight_scale, scales[r]));
        if (GATE) {
            const u32 up_row = pairs * TERNARY_PAIR + threadIdx.x;
            const i32 up = products[up_row * ROWS + r] - row_sums[r];
            y = gated(a.activation, y, ternary_product(up, __fdiv_rn(up_scale, scales[r])));
        } else if (a.add) {
            y = before[r] + y;
        }
        out[u64(r) * a.stride] = y;
    }
}

// Two blocks on a multiprocessor, as the host shares out the pairs.
#define TERNARY_MATMUL_FUSED(rows, Product) \
    KERNEL_AT_LEAST(ternary_matmul_fused_##rows, TernaryMatmulFusedArgs, THREADS, 2) { \
        fused<rows, false, Product<rows>>(a); \
    } \
    KERNEL_AT_LEAST(ternary_matmul_fused_gate_##rows, TernaryMatmulFusedArgs, THREADS, 2) { \
        fused<rows, true, Product<rows>>(a); \
    }

// For three rows an instruction of a tensor core costs less than the dp4a that it stands for; see
// `FEW_ROWS` of the host.
TERNARY_MATMUL_FUSED(1, TernaryDots)
TERNARY_MATMUL_FUSED(2, TernaryDots)
TERNARY_MATMUL_FUSED(3, TernaryTiles)
TERNARY_MATMUL_FUSED(4, TernaryTiles)
