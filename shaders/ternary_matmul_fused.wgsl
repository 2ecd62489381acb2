// uses: reduce, norm, dot, ternary, activation
// `ops::RmsNormQuantize` and the `ops::TernaryMatmul` that reads it, in one; and where `GATE` is
// set also the activation and the product with up that follow, of a matrix whose first `features`
// rows are the gate's and the others up's.
//
// Every workgroup norms and quantises the rows for itself, in workgroup memory: they are short, and
// a dispatch of its own would cost more.

struct Params {
    // Of the rows that are normed.
    width: u32,
    has_norm: u32,
    eps: f32,
    // Features of this part of the matrix, and the first of them.
    features: u32,
    first: u32,
    // Blocks of 64 columns.
    blocks: u32,
    // Where the product goes: row length and first column.
    stride: u32,
    column: u32,
    add: u32,
    activation: u32,
}
var<immediate> p: Params;

// Whether the product is `act(gate) · up`; `LANES` is two tiles then, one of the gate's and one
// of up's.
override GATE: u32 = 0u;
// Words of 4 int8 that the quantised rows take.
override STAGED: u32 = 768u;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> weight_scales: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;

var<workgroup> staged: array<u32, STAGED>;
var<workgroup> gate_up: array<f32, 2u * TERNARY_TILE>;

fn row_value(row: u32, i: u32) -> f32 {
    return input[row * p.width + i];
}

fn row_gain(i: u32) -> f32 {
    return gain[i];
}

fn activations(row: u32, i: u32) -> vec4<u32> {
    let first = 4u * (row * p.blocks * 4u + i);
    return vec4<u32>(staged[first], staged[first + 1u], staged[first + 2u], staged[first + 3u]);
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    var scales = array<u32, MOST_ROWS>();
    var sums = array<i32, MOST_ROWS>();
    for (var row = 0u; row < ROWS; row++) {
        let inverse = row_inverse(row, thread);
        let scale_bits = row_scale_bits(row, inverse, thread);
        var sum = 0;
        // Word by word, so that neighbouring threads read neighbouring values.
        let words = 16u * p.blocks;
        for (var word = thread.index; word < words; word += WORKGROUP) {
            let four = quantized_word(row, word, inverse, scale_bits);
            staged[row * words + word] = four.word;
            sum += four.sum;
        }
        scales[row] = scale_bits;
        sums[row] = reduce_sum_i32(sum, thread);
    }
    workgroupBarrier();

    let lane = thread.index % LANES;
    var feature = thread.group.x * LANES + lane;
    if (GATE != 0u) {
        // Up's rows follow the gate's.
        feature = thread.group.x * TERNARY_TILE + lane % TERNARY_TILE;
        feature = min(feature, p.features - 1u) + select(0u, p.features, lane >= TERNARY_TILE);
    }
    let products = ternary_sums(feature, 0u, thread);
    for (var row = 0u; row < ROWS; row++) {
        let sum = f32(products[row] - sums[row]);
        var scale = 0.0;
        if (thread.index < LANES) {
            scale = weight_scales[feature] / bitcast<f32>(scales[row]);
        }
        if (GATE != 0u) {
            if (thread.index < LANES) {
                gate_up[thread.index] = sum * scale;
            }
            workgroupBarrier();
            let out = thread.group.x * TERNARY_TILE + thread.index;
            if (thread.index < TERNARY_TILE && out < p.features) {
                let gate = gate_up[thread.index];
                let up = gate_up[thread.index + TERNARY_TILE];
                output[row * p.stride + p.column + p.first + out] = gated(p.activation, gate, up);
            }
            workgroupBarrier();
        } else if (thread.index < LANES && feature < p.features) {
            let at = row * p.stride + p.column + p.first + feature;
            if (p.add != 0u) {
                // Rounded once, in every kernel: a compiler could do so in some.
                output[at] = fma(sum, scale, output[at]);
            } else {
                output[at] = sum * scale;
            }
        }
    }
}
