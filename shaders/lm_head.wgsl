// uses: half
// The product of `ops::LmHead`: logits of a piece of the table's rows, for `ROWS` rows of the pass
// at a time. The norm is `rms_norm`.
//
// 32 threads take a row of the table: thread `t` its elements `2t`, `2t + 1`, `2t + 64` and so on,
// in this order, and a tree adds up the 32 sums. So a logit's bits depend neither on how many rows
// there are nor on the piece that it is in. A group of 32 has `FEATURES` rows at once, which share
// what is read of the input.

struct Params {
    rows: u32,
    width: u32,
    // Rows of the table, and of this piece: `first .. first + count`.
    vocabulary: u32,
    first: u32,
    count: u32,
    // Words from one row of the table to the next.
    stride: u32,
}
var<immediate> p: Params;

// The table's type: `FLOAT_F16`, `FLOAT_F32`, else bf16.
override FLOAT: u32 = 0u;
// Rows of the input per workgroup: up to `MOST_ROWS`.
override ROWS: u32 = 1u;

// Groups of 32 threads, and rows of the table that each takes: components of a `vec4`.
const GROUPS = WORKGROUP / 32u;
const FEATURES = HEAD_FEATURES / GROUPS;
const_assert FEATURES <= 4u;

@group(0) @binding(0) var<storage, read> input: array<f32>;
@group(0) @binding(1) var<storage, read> table: array<u32>;
@group(0) @binding(2) var<storage, read_write> logits: array<f32>;

// Of the features of a group, side by side.
var<workgroup> partial_sums: array<vec4<f32>, WORKGROUP>;

// Elements `2 i` and `2 i + 1` of a row; 0 beyond the width.
fn pair(row: u32, i: u32) -> vec2<f32> {
    let start = row * p.stride;
    if (FLOAT == FLOAT_F32) {
        let second = select(0u, table[start + min(2u * i + 1u, p.stride - 1u)], 2u * i + 1u < p.width);
        return vec2<f32>(bitcast<f32>(table[start + 2u * i]), bitcast<f32>(second));
    }
    let word = table[start + i];
    if (FLOAT == FLOAT_F16) {
        return unpack_half(word);
    }
    return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let lane = thread.index % 32u;
    // Workgroups with the same rows of the table follow each other, so that a cache serves all of
    // them but the first.
    let row_groups = (p.rows + ROWS - 1u) / ROWS;
    let index = flat_group(thread);
    let group = (index / row_groups) * GROUPS + thread.index / 32u;
    let first_row = (index % row_groups) * ROWS;
    let pairs = (p.width + 1u) / 2u;
    var sums: array<vec4<f32>, MOST_ROWS>;
    for (var r = 0u; r < ROWS; r++) {
        sums[r] = vec4<f32>();
    }
    for (var i = lane; i < pairs; i += 32u) {
        var w: array<vec2<f32>, FEATURES>;
        for (var f = 0u; f < FEATURES; f++) {
            w[f] = pair(min(group * FEATURES + f, p.count - 1u), i);
        }
        for (var r = 0u; r < ROWS; r++) {
            let start = min(first_row + r, p.rows - 1u) * p.width;
            let x0 = input[start + 2u * i];
            // The width may be odd; the table's padding is zero.
            let x1 = input[start + min(2u * i + 1u, p.width - 1u)];
            for (var f = 0u; f < FEATURES; f++) {
                sums[r][f] = fma(w[f].y, x1, fma(w[f].x, x0, sums[r][f]));
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        partial_sums[thread.index] = sums[r];
        workgroupBarrier();
        for (var distance = 1u; distance < 32u; distance <<= 1u) {
            if (lane % (2u * distance) == 0u) {
                partial_sums[thread.index] += partial_sums[thread.index + distance];
            }
            workgroupBarrier();
        }
        let feature = group * FEATURES + lane;
        let row = first_row + r;
        if (lane < FEATURES && feature < p.count && row < p.rows) {
            let sum = partial_sums[thread.index - lane];
            logits[row * p.vocabulary + p.first + feature] = sum[lane];
        }
        workgroupBarrier();
    }
}
