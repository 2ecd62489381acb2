// The copy of a table in int8 that `lm_head_screen` and `lm_head_int8` read, with what bounds its error:
// a block for each row, when the table is loaded.
#include "prelude.cuh"

struct LmHeadQuantizeArgs {
    const u8* table;
    i8* values;
    // See `LmHeadScreenArgs`.
    float4* bounds;
    // Bytes from one row of the table, or of the copy, to the next.
    u64 stride;
    u64 copy_stride;
};

struct Bf16 {
    typedef u16 Bits;
    static DEVICE_METHOD float value(u16 x) { return bf16_to_float(x); }
};
struct F16 {
    typedef u16 Bits;
    static DEVICE_METHOD float value(u16 x) { return half_to_float(x); }
};
struct F32 {
    typedef float Bits;
    static DEVICE_METHOD float value(float x) { return x; }
};

// Rows whose largest magnitude lies outside of this are not bounded, and always computed.
constexpr float LEAST = 1e-30f;
constexpr float MOST = 1e30f;

template <typename Float>
DEVICE void lm_head_quantize(const LmHeadQuantizeArgs& a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    typedef typename Float::Bits Bits;
    const Bits* row = reinterpret_cast<const Bits*>(a.table + blockIdx.x * a.stride);
    i8* values = a.values + blockIdx.x * a.copy_stride;
    const u32 width = static_cast<u32>(a.stride / sizeof(Bits));
    u32 bits = 0;
    for (u32 i = threadIdx.x; i < width; i += THREADS) {
        const u32 magnitude = magnitude_bits(Float::value(row[i]));
        bits = magnitude > bits ? magnitude : bits;
    }
    bits = reduce_block(bits, Most());
    const float most = __uint_as_float(bits);
    const bool sound = most >= LEAST && most <= MOST;
    const float inverse = sound ? __fdiv_rn(127.0f, most) : 0.0f;
    // In units of the row's scale, in which nothing is too small to be squared.
    float errors = 0.0f, squares = 0.0f;
    for (u32 i = threadIdx.x; i < a.copy_stride; i += THREADS) {
        const float x = sound && i < width ? Float::value(row[i]) * inverse : 0.0f;
        const float q = rintf(x);
        values[i] = static_cast<i8>(q);
        errors = __fmaf_rn(x - q, x - q, errors);
        squares = __fmaf_rn(x, x, squares);
    }
    errors = reduce_block(errors, Add());
    squares = reduce_block(squares, Add());
    if (threadIdx.x != 0) return;
    if (!sound) {
        // Of zeros everything is known. What is tiny is zero in int8; what is huge, or no number, is
        // nothing.
        const float unknown = bits == 0 ? 0.0f : __uint_as_float(INFINITE_BITS);
        const float nothing = most < LEAST ? 0.0f : __uint_as_float(NAN_BITS);
        a.bounds[blockIdx.x] = make_float4(0.0f, unknown, unknown, nothing);
        return;
    }
    // The scale and `x` are rounded, by 2⁻²³ of at most 127 each; the sums' own rounding is well below
    // a thousandth.
    const float scale = __fdiv_rn(most, 127.0f);
    const float rounding = 4e-5f * __fsqrt_rn(static_cast<float>(width));
    const float error = (__fsqrt_rn(errors) * 1.001f + rounding) * scale;
    const float norm = __fsqrt_rn(squares) * 1.001f * scale + error;
    a.bounds[blockIdx.x] = make_float4(scale, error, norm, 0.0f);
}

KERNEL(lm_head_quantize_bf16, LmHeadQuantizeArgs, THREADS) { lm_head_quantize<Bf16>(a); }
KERNEL(lm_head_quantize_f16, LmHeadQuantizeArgs, THREADS) { lm_head_quantize<F16>(a); }
KERNEL(lm_head_quantize_f32, LmHeadQuantizeArgs, THREADS) { lm_head_quantize<F32>(a); }
