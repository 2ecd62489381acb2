// `ops::Embed`: a block for each row of tokens.
#include "prelude.cuh"

struct EmbedArgs {
    const u32* tokens;
    const u32* positions;
    const u32* sequences;
    const u32* sequence_lanes;
    const u32* sampled;
    const u8* table;
    u32* history;
    float* output;
    // Bytes from one row of the table to the next.
    u64 stride;
    u32 width;
    u32 vocabulary;
    // Lanes, and tokens of a lane's history.
    u32 lanes;
    u32 context;
    // Sequences that `sequence_lanes` has.
    u32 sequence_count;
    float scale;
};

struct Bf16 {
    typedef u16 Stored;
    static DEVICE_METHOD float value(u16 x) { return bf16_to_float(x); }
};
struct F16 {
    typedef u16 Stored;
    static DEVICE_METHOD float value(u16 x) { return half_to_float(x); }
};
struct F32 {
    typedef float Stored;
    static DEVICE_METHOD float value(float x) { return x; }
};

template <typename Float>
DEVICE void embed(const EmbedArgs& a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x;
    u32 token = a.tokens[row];
    if (token != NONE && (token & FROM_LANE) != 0) {
        const u32 lane = token & ~FROM_LANE;
        token = lane < a.lanes ? a.sampled[lane] : NONE;
    }
    float* output = a.output + u64(row) * a.width;
    if (token >= a.vocabulary) {
        for (u32 i = threadIdx.x; i < a.width; i += THREADS) output[i] = 0.0f;
        return;
    }
    const typename Float::Stored* weights =
        reinterpret_cast<const typename Float::Stored*>(a.table + token * a.stride);
    for (u32 i = threadIdx.x; i < a.width; i += THREADS) output[i] = Float::value(weights[i]) * a.scale;
    const u32 sequence = a.sequences[row];
    if (threadIdx.x == 0 && sequence < a.sequence_count) {
        const u32 lane = a.sequence_lanes[sequence];
        const u32 position = a.positions[row];
        if (lane < a.lanes && position < a.context) a.history[u64(lane) * a.context + position] = token;
    }
}

KERNEL(embed_bf16, EmbedArgs, THREADS) { embed<Bf16>(a); }
KERNEL(embed_f16, EmbedArgs, THREADS) { embed<F16>(a); }
KERNEL(embed_f32, EmbedArgs, THREADS) { embed<F32>(a); }
