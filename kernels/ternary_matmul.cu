// `ops::TernaryMatmul` for 1 to 4 rows: matrix-vector products.
//
// A block takes a few pairs of tiles and shares their units among its eight warps, each of which
// loads the first of them before it waits for the kernel that quantises the rows.
#include "prelude.cuh"

struct TernaryMatmulArgs {
    const i8* values;
    const float* scales;
    const i32* sums;
    const uint4* weights;
    const float* weight_scales; // of each feature
    float* output;
    // Of the matrix: blocks of columns, pairs of tiles, features.
    u32 blocks;
    u32 pairs;
    u32 features;
    // Pairs that a block of threads takes, at most `MOST_PAIRS`.
    u32 share;
    // Row length and first column of the output, and whether it is added to.
    u32 stride;
    u32 column;
    u32 add;
    u32 padding;
};

// A thread has one feature in the end.
constexpr u32 MOST_PAIRS = THREADS / TERNARY_PAIR;
// Units that a warp loads before the first is used: with 8 KiB for each of 16 warps on a
// multiprocessor, more than twice the bytes that keep an H100's memory busy.
constexpr int DEPTH = 4;

template <int ROWS, typename Product>
DEVICE void few_rows(const TernaryMatmulArgs& a) {
    __shared__ i32 products[MOST_PAIRS * TERNARY_PAIR * ROWS];
    const u32 first = blockIdx.x * a.share;
    const u32 pairs = min(a.share, a.pairs - first);
    const uint4* weights = a.weights + u64(first) * a.blocks * TERNARY_UNIT;
    TernaryUnits<DEPTH> units(weights, pairs * a.blocks, pairs * a.blocks, 0, THREADS / WARP);
    let_next_kernel_start();
    for (u32 i = threadIdx.x; i < pairs * TERNARY_PAIR * ROWS; i += THREADS) products[i] = 0;
    // What the end needs is loaded early.
    const u32 feature = first * TERNARY_PAIR + threadIdx.x;
    const bool mine = threadIdx.x < pairs * TERNARY_PAIR && feature < a.features;
    const float weight_scale = mine ? a.weight_scales[feature] : 0.0f;
    __syncthreads();
    wait_for_previous_kernel();
    float* out = a.output + a.column + feature;
    float scales[ROWS];
    float before[ROWS];
    i32 sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        scales[r] = a.scales[r];
        sums[r] = a.sums[r];
        before[r] = a.add && mine ? out[u64(r) * a.stride] : 0.0f;
    }
    units.multiply(Product(), a.blocks, a.values, a.blocks * TERNARY_BLOCK, ROWS, products);
    __syncthreads();
    if (!mine) return;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float quotient = __fdiv_rn(weight_scale, scales[r]);
        const float y = ternary_product(products[threadIdx.x * ROWS + r] - sums[r], quotient);
        out[u64(r) * a.stride] = a.add ? before[r] + y : y;
    }
}

// Two blocks on a multiprocessor, as the host shares out the pairs.
#define TERNARY_MATMUL(rows) \
    KERNEL_AT_LEAST(ternary_matmul_##rows, TernaryMatmulArgs, THREADS, 2) { \
        few_rows<rows, TernaryDots<rows>>(a); \
    }

TERNARY_MATMUL(1)
TERNARY_MATMUL(2)
TERNARY_MATMUL(3)
TERNARY_MATMUL(4)
