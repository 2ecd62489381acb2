// Joins the parts of `ops::PagedAttention` that blocks of their own have computed: a block for each
// token and query head, in the argument of the kernel before it.
#include "prelude.cuh"

struct PagedAttentionCombineArgs {
    AttentionArgs attention;
    // Keys of a part, and parts that one block computed.
    u32 keys;
    u32 of_block;
};

KERNEL(paged_attention_combine, PagedAttentionCombineArgs, 128) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const AttentionArgs& all = a.attention;
    const u32 token = blockIdx.x / all.query;
    // Only steps in which token `t` is that of sequence `t` are split.
    const u32 seen = seen_keys(all, token, token);
    const u32 first = unseen_keys(all, seen) / a.keys;
    // There is memory from the first part of a block on.
    const u32 base = first / a.of_block * a.of_block;
    const u32 parts = min((seen + a.keys - 1) / a.keys, base + all.parts);
    const float* outs = all.outs + u64(blockIdx.x) * all.parts * all.stride;
    const float2* statistics = all.statistics + u64(blockIdx.x) * all.parts;
    for (u32 i = threadIdx.x; i < all.dim; i += 128) {
        float highest = nothing_yet();
        float sum = 0.0f;
        float out = 0.0f;
        for (u32 part = first; part < parts; part++) {
            const float2 one = statistics[part - base];
            const Join join(highest, one.x);
            highest = join.highest;
            sum = join(sum, one.y);
            out = join(out, outs[u64(part - base) * all.stride + i]);
        }
        all.output[u64(blockIdx.x) * all.dim + i] = seen == 0 ? 0.0f : attended(out, sum);
    }
}
