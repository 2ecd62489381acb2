// uses: reduce, norm
// `ops::RmsNormQuantize`: a workgroup for each row.

struct Params {
    rows: u32,
    width: u32,
    // Words from one quantised row to the next.
    stride: u32,
    has_norm: u32,
    // Whether the rows are wanted in f32 too.
    keep: u32,
    eps: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read_write> values: array<u32>;
@group(0) @binding(3) var<storage, read_write> scales: array<u32>;
@group(0) @binding(4) var<storage, read_write> sums: array<i32>;
@group(0) @binding(5) var<storage, read_write> normed: array<f32>;

fn row_value(row: u32, i: u32) -> f32 {
    return input[row * p.width + i];
}

fn row_gain(i: u32) -> f32 {
    return gain[i];
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    let inverse = row_inverse(row, thread);
    let scale_bits = row_scale_bits(row, inverse, thread);
    var sum = 0;
    for (var word = thread.index; word < p.stride; word += WORKGROUP) {
        let four = quantized_word(row, word, inverse, scale_bits);
        values[row * p.stride + word] = four.word;
        sum += four.sum;
    }
    sum = reduce_sum_i32(sum, thread);
    if (thread.index == 0u) {
        scales[row] = scale_bits;
        sums[row] = sum;
    }
    if (p.keep != 0u) {
        for (var i = thread.index; i < p.width; i += WORKGROUP) {
            normed[row * p.width + i] = row_normed(row, i, inverse);
        }
    }
}
