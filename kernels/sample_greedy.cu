// `ops::Sample` where every row is greedy: a block for each piece of a row finds its best token, and
// the last block of a row to be done finds the best of the pieces.
#include "prelude.cuh"

struct SampleGreedyArgs {
    const float* logits;
    const SampleRow* options;
    // Of each piece the best token, `ranked`.
    u64* bests;
    // Of each row the pieces that are done; zeros before and after.
    u32* done;
    u32* tokens;
    u32* sampled;
    float* logprobs;
    u32 first;
    u32 vocabulary;
    // Pieces of a row.
    u32 pieces;
    // Entries of `sampled`.
    u32 lanes;
};

// Tokens of a piece that a thread looks at.
constexpr u32 LOADS = 8;

KERNEL(sample_greedy, SampleGreedyArgs, THREADS) {
    __shared__ bool last;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x / a.pieces, piece = blockIdx.x % a.pieces;
    const float* logits = a.logits + u64(row) * a.vocabulary;
    const u32 start = piece * LOADS * THREADS + threadIdx.x;
    float x[LOADS];
#pragma unroll
    for (u32 n = 0; n < LOADS; n++) {
        x[n] = start + n * THREADS < a.vocabulary ? logits[start + n * THREADS] : 0.0f;
    }
    u64 best = 0;
#pragma unroll
    for (u32 n = 0; n < LOADS; n++) {
        const u64 own = ranked(order_of(x[n]), start + n * THREADS);
        if (start + n * THREADS < a.vocabulary && own > best) best = own;
    }
    best = reduce_block(best, Most());
    u64* bests = a.bests + u64(row) * a.pieces;
    if (threadIdx.x == 0) {
        bests[piece] = best;
        // What is written before the count is seen by whoever sees the count.
        __threadfence();
        last = atomicAdd(&a.done[row], 1u) + 1 == a.pieces;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    best = 0;
    for (u32 i = threadIdx.x; i < a.pieces; i += THREADS) best = bests[i] > best ? bests[i] : best;
    best = reduce_block(best, Most());
    if (threadIdx.x != 0) return;
    a.done[row] = 0;
    const u32 out = a.first + row;
    const u32 lane = a.options[out].lane;
    const u32 order = order_of_ranked(best);
    const bool finite = order != NOT_FINITE;
    // Padding, or an empty vocabulary, has no token and no fault.
    const bool there = lane != NONE && order != 0;
    const u32 token = there && finite ? token_of_ranked(best) : NONE;
    a.tokens[out] = token;
    a.logprobs[out] = there && !finite ? __uint_as_float(NAN_BITS) : 0.0f;
    if (lane < a.lanes) a.sampled[lane] = token;
}
