// `ops::RmsNorm`: a block for each row. Rows gathered from nothing are of zeros.
#include "prelude.cuh"

struct RmsNormArgs {
    const float* input;
    const float* gain;
    const u32* gather; // null: each row from the row of its own number
    float* output;
    u32 width;
    // First entry of `gather` that is used.
    u32 first;
    // Rows of the input.
    u32 inputs;
    float eps;
    // Whether the rows are added to the output, and do not overwrite it.
    u32 add;
    u32 padding;
};

KERNEL(rms_norm, RmsNormArgs, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x;
    const u32 source = a.gather ? a.gather[a.first + row] : row;
    float* output = a.output + u64(row) * a.width;
    if (source >= a.inputs) {
        for (u32 i = threadIdx.x; !a.add && i < a.width; i += THREADS) output[i] = 0.0f;
        return;
    }
    const NormedRow x(a.input + u64(source) * a.width, a.gain, a.width, a.eps);
    for (u32 i = threadIdx.x; i < a.width; i += THREADS) output[i] = a.add ? output[i] + x[i] : x[i];
}
