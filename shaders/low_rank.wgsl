// uses: reduce
// `ops::LowRank`: the product with the narrow matrix, then, in a second dispatch, the one with the
// wide.

struct Params {
    rows: u32,
    // Row length of the input, features of the output.
    width: u32,
    features: u32,
    // Row length and first column of the output.
    stride: u32,
    column: u32,
}
var<immediate> p: Params;

// Rows that share what is read of the weights. A row's arithmetic is the same without others.
const ROWS = LOW_RANK_ROWS;

// Of the second dispatch what is between the two products.
@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> weights: array<f32>;
@group(0) @binding(2) var<storage, read_write> output: array<f32>;

// `output = weights · input`, weights by rows: a workgroup for each of them and a few rows. A
// thread adds up every 256th product, and a tree the threads' sums.
@compute @workgroup_size(256)
fn down(thread: Thread) {
    let index = flat_group(thread);
    let feature = index % p.features;
    let first = index / p.features * ROWS;
    var sums: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        sums[r] = 0.0;
    }
    for (var k = thread.index; k < p.width; k += WORKGROUP) {
        let weight = weights[feature * p.width + k];
        for (var r = 0u; r < ROWS; r++) {
            let row = min(first + r, p.rows - 1u);
            sums[r] = fma(weight, input[row * p.width + k], sums[r]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        let sum = reduce_sum_f32(sums[r], thread);
        if (thread.index == 0u && first + r < p.rows) {
            output[(first + r) * p.stride + p.column + feature] = sum;
        }
    }
}

// `output += weights · input`, weights by columns: a thread for each feature and a few rows.
@compute @workgroup_size(256)
fn up(thread: Thread) {
    let index = flat_group(thread);
    let blocks = (p.features + WORKGROUP - 1u) / WORKGROUP;
    let feature = index % blocks * WORKGROUP + thread.index;
    let first = index / blocks * ROWS;
    if (feature >= p.features) {
        return;
    }
    var sums: array<f32, ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        sums[r] = 0.0;
    }
    for (var j = 0u; j < p.width; j++) {
        let weight = weights[j * p.features + feature];
        for (var r = 0u; r < ROWS; r++) {
            let row = min(first + r, p.rows - 1u);
            sums[r] = fma(weight, input[row * p.width + j], sums[r]);
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        if (first + r < p.rows) {
            output[(first + r) * p.stride + p.column + feature] += sums[r];
        }
    }
}
