// uses: dot
// `ops::TernaryMatmul` for many rows: a workgroup for each `TILED` rows and features, which goes
// through the columns in blocks of 64. Each thread has 4 rows and 4 features, 16 apart.

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
@group(0) @binding(3) var<storage, read> weights: array<u32>;
@group(0) @binding(4) var<storage, read> weight_scales: array<f32>;
@group(0) @binding(5) var<storage, read_write> output: array<f32>;

const_assert TILED == 64u && WORKGROUP == 4u * TILED;

// Rows and features of 64 int8 each, four vectors and one of padding, so that threads that
// read neighbouring rows use different banks.
const PITCH = 5u;
var<workgroup> row_tile: array<vec4<u32>, TILED * PITCH>;
var<workgroup> feature_tile: array<vec4<u32>, TILED * PITCH>;

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let first_feature = thread.group.x * TILED;
    let first_row = thread.group.y * TILED;
    let x = thread.index % 16u;
    let y = thread.index / 16u;

    // What this thread brings in: a vector of activations, and a word of codes, which becomes one.
    let line = thread.index / 4u;
    let part = thread.index % 4u;
    // Rows and features that are not there read others' values, which nobody looks at.
    let value_at = min(first_row + line, p.rows - 1u) * p.blocks * 4u + part;
    let feature = min(first_feature + line, p.features - 1u);
    let tile = (feature / TERNARY_TILE) * p.blocks * TERNARY_TILE + feature % TERNARY_TILE;
    let weight_at = tile * 4u + part;

    var products = array<vec4<i32>, 4>();
    var word = weights[weight_at];
    var brought = values[value_at];
    for (var block = 0u; block < p.blocks; block++) {
        let codes = vec4<u32>(word, word >> 2u, word >> 4u, word >> 6u) & vec4<u32>(0x03030303u);
        workgroupBarrier();
        row_tile[line * PITCH + part] = brought;
        feature_tile[line * PITCH + part] = codes;
        workgroupBarrier();
        // The next block is on its way while this one is multiplied.
        if (block + 1u < p.blocks) {
            word = weights[weight_at + (block + 1u) * TERNARY_TILE * 4u];
            brought = values[value_at + (block + 1u) * 4u];
        }
        for (var k = 0u; k < 4u; k++) {
            let f0 = feature_tile[x * PITCH + k];
            let f1 = feature_tile[(x + 16u) * PITCH + k];
            let f2 = feature_tile[(x + 32u) * PITCH + k];
            let f3 = feature_tile[(x + 48u) * PITCH + k];
            for (var r = 0u; r < 4u; r++) {
                let a = row_tile[(y + 16u * r) * PITCH + k];
                products[r] += vec4<i32>(dot16(f0, a), dot16(f1, a), dot16(f2, a), dot16(f3, a));
            }
        }
    }

    for (var r = 0u; r < 4u; r++) {
        let row = first_row + y + 16u * r;
        for (var f = 0u; f < 4u; f++) {
            let out = first_feature + x + 16u * f;
            if (row < p.rows && out < p.features) {
                // With codes c = t + 1, Σ t·q = Σ c·q − Σ q.
                let sum = f32(products[r][f] - sums[row]);
                let scale = weight_scales[out] / scales[row];
                let at = row * p.stride + p.column + p.first + out;
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

fn dot16(a: vec4<u32>, b: vec4<u32>) -> i32 {
    return dot4(a.x, b.x) + dot4(a.y, b.y) + dot4(a.z, b.z) + dot4(a.w, b.w);
}
