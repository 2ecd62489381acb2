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

// Whether the product is `act(gate) · up`; `LANES` is `2 TILE` then, `TILE` of the gate's
// and as many of up's.
override GATE: u32 = 0u;
// Vectors of 16 int8 that the quantised rows take.
override STAGED: u32 = 1024u;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> gain: array<f32>;
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> weight_scales: array<f32>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;

var<workgroup> staged: array<vec4<u32>, STAGED>;
var<workgroup> gate_up: array<f32, 2u * TILE>;

fn row_value(row: u32, i: u32) -> f32 {
    return input[row * p.width + i];
}

fn row_gain(i: u32) -> f32 {
    return gain[i];
}

fn activations(row: u32, i: u32) -> vec4<u32> {
    return staged[row * p.blocks * 4u + i];
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    var scales = array<u32, MOST_ROWS>();
    var sums = array<i32, MOST_ROWS>();
    for (var row = 0u; row < ROWS; row++) {
        let inverse = row_inverse(row, thread);
        let scale_bits = row_scale_bits(row, inverse, thread);
        var sum = 0;
        // Vectors of 16 values: 4 words each.
        for (var i = thread.index; i < p.blocks * 4u; i += WORKGROUP) {
            var vector = vec4<u32>();
            for (var w = 0u; w < 4u; w++) {
                let four = quantized_word(row, 4u * i + w, inverse, scale_bits);
                vector[w] = four.word;
                sum += four.sum;
            }
            staged[row * p.blocks * 4u + i] = vector;
        }
        scales[row] = scale_bits;
        sums[row] = reduce_sum_i32(sum, thread);
    }
    workgroupBarrier();

    let lane = thread.index % LANES;
    var feature = thread.group.x * LANES + lane;
    if (GATE != 0u) {
        // Up's rows follow the gate's.
        feature = thread.group.x * TILE + lane % TILE;
        feature = min(feature, p.features - 1u) + select(0u, p.features, lane >= TILE);
    }
    let products = ternary_sums(feature, 0u, thread);
    for (var row = 0u; row < ROWS; row++) {
        var y = 0.0;
        if (thread.index < LANES) {
            let scale = bitcast<f32>(scales[row]);
            y = ternary_value(products[row], sums[row], weight_scales[feature], scale);
        }
        if (GATE != 0u) {
            if (thread.index < LANES) {
                gate_up[thread.index] = y;
            }
            workgroupBarrier();
            let out = thread.group.x * TILE + thread.index;
            if (thread.index < TILE && out < p.features) {
                let up = gate_up[thread.index + TILE];
                output[row * p.stride + p.column + p.first + out] = gated(p.activation, y, up);
            }
            workgroupBarrier();
        } else if (thread.index < LANES && feature < p.features) {
            let at = row * p.stride + p.column + p.first + feature;
            if (p.add != 0u) {
                output[at] += y;
            } else {
                output[at] = y;
            }
        }
    }
}
