
// RMS norm and quantisation of a row, by all threads of a workgroup. The file that uses this has
// `row_value(row, i)`, `row_gain(i)`, and in `p`: `width`, `has_norm`, `eps`.
//
// Thread `t` takes elements `t`, `t + 256` and so on, in this order, in every kernel: so a row's
// bits do not depend on the kernel that norms it.

// `1 / sqrt(mean(x²) + eps)`; 1 without a norm.
fn row_inverse(row: u32, thread: Thread) -> f32 {
    if (p.has_norm == 0u) {
        return 1.0;
    }
    var squares = 0.0;
    for (var i = thread.index; i < p.width; i += WORKGROUP) {
        let x = row_value(row, i);
        squares = fma(x, x, squares);
    }
    let mean = reduce_sum_f32(squares, thread) / f32(p.width);
    return 1.0 / sqrt(mean + p.eps);
}

fn row_normed(row: u32, i: u32, inverse: f32) -> f32 {
    let x = row_value(row, i);
    if (p.has_norm == 0u) {
        return x;
    }
    return x * inverse * row_gain(i);
}

// The bits of the quantisation's scale, `127 / max(max |x|, 1e-5)`; of NaN where a value is not
// finite.
fn row_scale_bits(row: u32, inverse: f32, thread: Thread) -> u32 {
    var most = 0u;
    for (var i = thread.index; i < p.width; i += WORKGROUP) {
        most = max(most, magnitude_bits(row_normed(row, i, inverse)));
    }
    most = reduce_max_u32(most, thread);
    if (most >= INFINITE_BITS) {
        return NAN_BITS;
    }
    return bitcast<u32>(127.0 / max(bitcast<f32>(most), 1e-5));
}

// Four quantised neighbours and their sum; zeros beyond the width, and where the scale is NaN.
struct QuantizedWord {
    word: u32,
    sum: i32,
}

fn quantized_word(row: u32, word: u32, inverse: f32, scale_bits: u32) -> QuantizedWord {
    var result = QuantizedWord(0u, 0);
    if (scale_bits == NAN_BITS) {
        return result;
    }
    for (var b = 0u; b < 4u; b++) {
        let i = 4u * word + b;
        if (i < p.width) {
            let x = row_normed(row, i, inverse);
            // `round` rounds half to even.
            let q = i32(clamp(round(x * bitcast<f32>(scale_bits)), -128.0, 127.0));
            result.word |= (bitcast<u32>(q) & 0xffu) << (8u * b);
            result.sum += q;
        }
    }
    return result;
}
