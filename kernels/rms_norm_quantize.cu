// `ops::RmsNormQuantize`: a block for each row.
#include "prelude.cuh"

struct RmsNormQuantizeArgs {
    const float* input;
    const float* gain; // null without a norm
    i8* values;
    float* scales;
    i32* sums;
    float* normed; // null unless the rows are wanted in f32 too
    u32 width;
    // Bytes from one quantised row to the next.
    u32 stride;
    float eps;
    u32 padding;
};

KERNEL(rms_norm_quantize, RmsNormQuantizeArgs, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x;
    const NormedRow x(a.input + u64(row) * a.width, a.gain, a.width, a.eps);
    const float scale = x.scale();
    i32 sum = 0;
    u32* values = reinterpret_cast<u32*>(a.values + u64(row) * a.stride);
    for (u32 word = threadIdx.x; word < a.stride / 4; word += THREADS) {
        values[word] = x.quantized(word, scale, sum);
    }
    sum = reduce_block(sum, Add());
    if (threadIdx.x == 0) {
        a.scales[row] = scale;
        a.sums[row] = sum;
    }
    if (a.normed) {
        for (u32 i = threadIdx.x; i < a.width; i += THREADS) {
            a.normed[u64(row) * a.width + i] = x[i];
        }
    }
}
