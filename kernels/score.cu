// `ops::Score`: a block for each row.
#include "prelude.cuh"

struct ScoreArgs {
    const float* logits;
    const u32* targets;
    float* logprobs;
    u32 first;
    u32 vocabulary;
};

KERNEL(score, ScoreArgs, ROW_THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 out = a.first + blockIdx.x;
    const u32 token = a.targets[out];
    if (token >= a.vocabulary) {
        if (threadIdx.x == 0) a.logprobs[out] = token == NONE ? 0.0f : __uint_as_float(NAN_BITS);
        return;
    }
    const float* row = a.logits + u64(blockIdx.x) * a.vocabulary;
    const RowBest best(row, a.vocabulary);
    if (!best.finite()) {
        if (threadIdx.x == 0) a.logprobs[out] = __uint_as_float(NAN_BITS);
        return;
    }
    const LogSum log_sum(row, a.vocabulary, value_of_order(order_of_ranked(best.best)));
    if (threadIdx.x == 0) a.logprobs[out] = log_sum.log_probability(row[token]);
}
