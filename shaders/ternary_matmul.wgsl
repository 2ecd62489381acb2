// uses: dot, ternary
// `ops::TernaryMatmul` for few rows: a workgroup for each `LANES` features and `ROWS` rows.

struct Params {
    rows: u32,
    // Features of this part of the matrix, and the first of them.
    features: u32,
    first: u32,
    // Blocks of 64 columns.
    blocks: u32,
    // Where the product goes: row length and first column.
    stride: u32,
    column: u32,
    add: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> values: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> scales: array<f32>;
@group(0) @binding(2) var<storage, read> sums: array<i32>;
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> weight_scales: array<f32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;

fn activations(row: u32, i: u32) -> vec4<u32> {
    // A row that is not there reads another one's values, which nobody looks at.
    return values[min(row, p.rows - 1u) * p.blocks * 4u + i];
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let feature = thread.group.x * LANES + thread.index % LANES;
    let first = thread.group.y * ROWS;
    let products = ternary_sums(feature, first, thread);
    if (thread.index < LANES && feature < p.features) {
        for (var r = 0u; r < ROWS; r++) {
            let row = first + r;
            if (row < p.rows) {
                let sum = f32(products[r] - sums[row]);
                let scale = weight_scales[feature] / scales[row];
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
}
