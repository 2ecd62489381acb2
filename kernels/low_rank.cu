// `ops::LowRank`: the product with the narrow matrix, then, in a second launch, the one with the wide.
#include "prelude.cuh"

struct LowRankArgs {
    const float* input; // of the first launch; of the second what is between the two
    const float* weights;
    float* output;
    u32 rows;
    // Row length of the input, features of the output.
    u32 width;
    u32 features;
    // Row length and first column of the output.
    u32 stride;
    u32 column;
    u32 padding;
};

// Rows that share what is read of the weights. A row's arithmetic is the same without others.
constexpr u32 LOW_RANK_ROWS = 4;

// `output = weights · input`, weights by rows: a block for each of them and a few rows. A thread
// adds up every 256th product, and a tree the threads' sums.
KERNEL(low_rank_down, LowRankArgs, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 feature = blockIdx.x % a.features;
    const u32 first = blockIdx.x / a.features * LOW_RANK_ROWS;
    const u32 rows = min(LOW_RANK_ROWS, a.rows - first);
    const float* weights = a.weights + u64(feature) * a.width;
    const float* input = a.input + u64(first) * a.width;
    float sums[LOW_RANK_ROWS] = {};
    for (u32 k = threadIdx.x; k < a.width; k += THREADS) {
        const float weight = weights[k];
#pragma unroll
        for (u32 r = 0; r < LOW_RANK_ROWS; r++) {
            if (r < rows) sums[r] = __fmaf_rn(weight, input[u64(r) * a.width + k], sums[r]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < LOW_RANK_ROWS; r++) {
        if (r >= rows) break;
        const float sum = reduce_block(sums[r], Add());
        if (threadIdx.x == 0) a.output[u64(first + r) * a.stride + a.column + feature] = sum;
    }
}

// `output += weights · input`, weights by columns: a thread for each feature and a few rows.
KERNEL(low_rank_up, LowRankArgs, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 blocks = (a.features + THREADS - 1) / THREADS;
    const u32 feature = blockIdx.x % blocks * THREADS + threadIdx.x;
    const u32 first = blockIdx.x / blocks * LOW_RANK_ROWS;
    const u32 rows = min(LOW_RANK_ROWS, a.rows - first);
    if (feature >= a.features) return;
    const float* input = a.input + u64(first) * a.width;
    float sums[LOW_RANK_ROWS] = {};
#pragma unroll 4
    for (u32 j = 0; j < a.width; j++) {
        const float weight = a.weights[u64(j) * a.features + feature];
#pragma unroll
        for (u32 r = 0; r < LOW_RANK_ROWS; r++) {
            if (r < rows) sums[r] = __fmaf_rn(weight, input[u64(r) * a.width + j], sums[r]);
        }
    }
#pragma unroll
    for (u32 r = 0; r < LOW_RANK_ROWS; r++) {
        if (r < rows) a.output[u64(first + r) * a.stride + a.column + feature] += sums[r];
    }
}
