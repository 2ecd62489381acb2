// `ops::GateNormQuantize`: a block for each row.
#include "prelude.cuh"

struct GateNormQuantizeArgs {
    const float* gate_up;
    const float* gain; // null without a norm
    i8* values;
    float* scales;
    i32* sums;
    float* normed; // null unless the rows are wanted in f32 too
    float* products; // memory for the products of all rows; null where shared memory holds a row
    u32 width;
    // Bytes from one quantised row to the next.
    u32 stride;
    float eps;
    u32 activation;
};

KERNEL(gate_norm_quantize, GateNormQuantizeArgs, THREADS) {
    DYNAMIC_SHARED(memory);
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x;
    const float* gate = a.gate_up + 2 * u64(row) * a.width;
    const float* up = gate + a.width;
    // The products, which the norm goes over three times, each thread over its own until a reduction
    // has shown them to all.
    float* products =
        a.products ? a.products + u64(row) * a.width : reinterpret_cast<float*>(memory);
    for (u32 i = threadIdx.x; i < a.width; i += THREADS) products[i] = gated(a.activation, gate[i], up[i]);
    const NormedRow x(products, a.gain, a.width, a.eps);
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
        for (u32 i = threadIdx.x; i < a.width; i += THREADS) a.normed[u64(row) * a.width + i] = x[i];
    }
}
