// The rows of `ops::LmHead`: gathered, normed, and split into the two parts that tensor cores
// multiply with a 16-bit table (`lm_head.cu`). A block for each row.
//
// A row is scaled by a power of two, so that its largest magnitude lies in 2¹⁰ .. 2¹¹: that is exact,
// and neither part of an f16 then overflows or has too few bits. `x = high + low + error`: a bf16 has
// 8 significant bits and an f16 has 11, and the low part has the bits next to those of the high part,
// so the error is at most 2⁻¹⁷ of x, or 2⁻²³ of it (in f16 not less than 2⁻³⁵ of the largest).
#include "prelude.cuh"

struct LmHeadRowsArgs {
    const float* input;
    const float* gain;
    const u32* gather;
    float* normed;
    // The parts in the order of `lm_head.cu`; see `place`.
    u32* parts;
    // What logits of the row are multiplied by.
    float* factors;
    // For `lm_head_screen`, and null without it: parts of int8, bounds, and floors to be reset.
    u8* screen;
    float4* bounds;
    u32* floors;
    u32 width;
    // First entry of `gather` that is used.
    u32 first;
    // Rows of the input.
    u32 inputs;
    u32 rows;
    // Rows of `parts`: `rows`, at most 8, or a multiple of 16, of which those from `rows` on are zeros.
    u32 part_rows;
    // Steps of 32 elements; beyond the width there are zeros.
    u32 steps;
    float eps;
    u32 padding;
};

struct Bf16 {
    static constexpr u32 NAN_PAIR = 0x7fc07fc0u;
    // To nearest, ties to even; of what is finite.
    static DEVICE_METHOD u32 rounded(float x) {
        const u32 bits = __float_as_uint(x);
        return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    }
    static DEVICE_METHOD float value(u32 x) { return bf16_to_float(static_cast<u16>(x)); }
};
struct F16 {
    static constexpr u32 NAN_PAIR = 0x7e007e00u;
    static DEVICE_METHOD u32 rounded(float x) { return float_to_half(x); }
    static DEVICE_METHOD float value(u32 x) { return half_to_float(static_cast<u16>(x)); }
};

// Where the high parts of elements `2 pair` and `2 pair + 1` of a row are. A step of 32 elements has two
// instructions' operands, each of them has its high parts and its low parts, and each of these has for
// each lane what it needs: of up to 8 rows two pairs of its row; of tiles of 16, the same of rows `g`
// and `g + 8` in turns.
DEVICE u32 place(u32 pair, u32 row, u32 part_rows) {
    const u32 step = pair / 16;
    const u32 t = pair % 16 / 4;
    const u32 half = pair % 4 / 2;
    const u32 second = pair % 2;
    const u32 operand = 2 * (2 * step + half) * part_rows * 8;
    if (part_rows <= 8) return operand + (row * 4 + t) * 2 + second;
    return operand + row / 16 * 128 + (row % 8 * 4 + t) * 4 + second * 2 + row % 16 / 8;
}

// Two neighbours of each part.
struct Parts {
    u32 high;
    u32 low;
};

template <typename Float>
DEVICE Parts split(float x, float y) {
    const u32 high_x = Float::rounded(x), high_y = Float::rounded(y);
    const u32 low_x = Float::rounded(x - Float::value(high_x));
    const u32 low_y = Float::rounded(y - Float::value(high_y));
    return Parts{high_x | high_y << 16, low_x | low_y << 16};
}

// A row in 15 bits, as two parts of int8, `128 high + low`: a step has 64 elements, of which lane `t`
// has 16 and each of two instructions takes 8, the high and the low parts of 4 in turns.
DEVICE void screen_row(const LmHeadRowsArgs& a, const NormedRow& x, u32 row, u32 most, float scale) {
    const bool sound = most < INFINITE_BITS && most != 0;
    const float largest = __uint_as_float(most) * scale;
    const float unit = sound ? __fdiv_rn(largest, 16256.0f) : 0.0f;
    const float inverse = sound ? __fdiv_rn(16256.0f, largest) : 0.0f;
    float squares = 0.0f;
    // All that the blocks of the table's copy have: 256 elements each.
    for (u32 word = threadIdx.x; word < (a.width + 255) / 256 * 64; word += THREADS) {
        u32 high = 0, low = 0;
        for (u32 b = 0; b < 4; b++) {
            const u32 i = 4 * word + b;
            const float value = sound && i < a.width ? x[i] * scale : 0.0f;
            squares = __fmaf_rn(value, value, squares);
            const float rounded = rintf(value * inverse);
            const float top = rintf(rounded * 0.0078125f);
            high |= (static_cast<u32>(static_cast<i32>(top)) & 0xffu) << (8 * b);
            low |= (static_cast<u32>(static_cast<i32>(rounded - 128.0f * top)) & 0xffu) << (8 * b);
        }
        const u32 step = word / 16, t = word % 16 / 4, half = word % 4 / 2, second = word % 2;
        u32* parts = reinterpret_cast<u32*>(a.screen) + (((step * 2 + half) * a.rows + row) * 4 + t) * 4 + second * 2;
        parts[0] = high;
        parts[1] = low;
    }
    squares = reduce_block(squares, Add());
    if (threadIdx.x != 0) return;
    const float norm = __fsqrt_rn(squares) * 1.001f;
    // Half a unit of each element, and what rounds the element itself.
    const float quantized = 0.504f * unit * __fsqrt_rn(static_cast<float>(a.width));
    // Of `lm_head`: its parts, and 4 instructions for 32 elements. Then the few roundings of the bound.
    const float rounded = 1.6e-5f + 18.0f * 1.2e-7f * static_cast<float>(4 * a.steps);
    a.bounds[row] = make_float4(unit, 1.0001f * norm, 1.0001f * (quantized + rounded * norm), 0.0f);
    a.floors[row] = most < INFINITE_BITS ? 0 : NOT_FINITE;
}

template <typename Float>
DEVICE void lm_head_rows(const LmHeadRowsArgs& a) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x;
    const u32 source = row < a.rows ? a.gather[a.first + row] : NONE;
    float* normed = a.normed + u64(row) * a.width;
    const u32 pairs = 16 * a.steps;
    // From high parts to the low ones.
    const u32 low = 8 * a.part_rows;
    if (source >= a.inputs) {
        for (u32 p = threadIdx.x; p < pairs; p += THREADS) {
            u32* parts = a.parts + place(p, row, a.part_rows);
            parts[0] = 0;
            parts[low] = 0;
        }
        if (row < a.rows) {
            for (u32 i = threadIdx.x; i < a.width; i += THREADS) normed[i] = 0.0f;
        }
        if (threadIdx.x == 0) a.factors[row] = 1.0f;
        if (a.screen) screen_row(a, NormedRow(nullptr, nullptr, 0, 0.0f), row, 0, 0.0f);
        return;
    }
    const NormedRow x(a.input + u64(source) * a.width, a.gain, a.width, a.eps);
    u32 most = 0;
    for (u32 i = threadIdx.x; i < a.width; i += THREADS) {
        const float value = x[i];
        normed[i] = value;
        const u32 magnitude = magnitude_bits(value);
        most = magnitude > most ? magnitude : most;
    }
    most = reduce_block(most, Most());
    const bool finite = most < INFINITE_BITS;
    // `power_of_two` of both signs must be a normal number.
    const i32 exponent = min(137 - static_cast<i32>(most >> 23), 126);
    const float scale = power_of_two(static_cast<float>(exponent));
    if (a.screen) screen_row(a, x, row, most, scale);
    for (u32 p = threadIdx.x; p < pairs; p += THREADS) {
        Parts pair = {Float::NAN_PAIR, Float::NAN_PAIR};
        if (finite) {
            const float first = 2 * p < a.width ? x[2 * p] * scale : 0.0f;
            const float second = 2 * p + 1 < a.width ? x[2 * p + 1] * scale : 0.0f;
            pair = split<Float>(first, second);
        }
        u32* parts = a.parts + place(p, row, a.part_rows);
        parts[0] = pair.high;
        parts[low] = pair.low;
    }
    if (threadIdx.x == 0) a.factors[row] = finite ? power_of_two(static_cast<float>(-exponent)) : 1.0f;
}

KERNEL(lm_head_rows_bf16, LmHeadRowsArgs, THREADS) { lm_head_rows<Bf16>(a); }
KERNEL(lm_head_rows_f16, LmHeadRowsArgs, THREADS) { lm_head_rows<F16>(a); }
