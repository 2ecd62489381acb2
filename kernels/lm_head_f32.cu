// The product of `ops::LmHead` with a table of f32, which few checkpoints have: a warp for each row of
// the table.
//
// Lane `l` adds up elements `l`, `l + 32` and so on, in this order, and a tree adds up the 32 sums: the
// same for a row of the input whatever rows are beside it.
#include "prelude.cuh"

struct LmHeadF32Args {
    const u8* table;
    const float* normed;
    float* logits;
    // Bytes from one row of the table to the next.
    u64 stride;
    u32 rows;
    u32 width;
    u32 vocabulary;
    u32 padding;
};

// Rows of the input at a time.
constexpr u32 ROWS = 8;
constexpr u32 WARPS = THREADS / WARP;

KERNEL(lm_head_f32, LmHeadF32Args, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 token = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (token >= a.vocabulary) return;
    const u32 lane = threadIdx.x % WARP;
    const float* weights = reinterpret_cast<const float*>(a.table + token * a.stride);
    for (u32 first = 0; first < a.rows; first += ROWS) {
        const float* input = a.normed + u64(first) * a.width;
        const u32 rows = min(ROWS, a.rows - first);
        float sums[ROWS] = {};
        for (u32 i = lane; i < a.width; i += WARP) {
            const float weight = weights[i];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                if (r < rows) sums[r] = __fmaf_rn(weight, input[u64(r) * a.width + i], sums[r]);
            }
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            const float sum = reduce_warp(sums[r], Add());
            if (r < rows && lane == 0) a.logits[u64(first + r) * a.vocabulary + token] = sum;
        }
    }
}
