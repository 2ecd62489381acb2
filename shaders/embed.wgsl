// uses: half
// `ops::Embed` for the rows of one piece of the table: a workgroup for each row of tokens.
//
// The pieces run one after the other. Each writes the rows of its tokens; the first also writes
// zeros where there is no token.

struct Params {
    rows: u32,
    width: u32,
    // Rows of the table, and of this piece: `first .. first + count`.
    vocabulary: u32,
    first: u32,
    count: u32,
    // Words from one row of the table to the next.
    stride: u32,
    // Lanes, and tokens of a lane's history.
    lanes: u32,
    context: u32,
    // Sequences that `sequence_lanes` has.
    sequences: u32,
    scale: f32,
}
var<immediate> p: Params;

// The table's type: `FLOAT_F16`, `FLOAT_F32`, else bf16.
override FLOAT: u32 = 0u;

@group(0) @binding(0) var<storage, read> tokens: array<u32>;
@group(0) @binding(1) var<storage, read> positions: array<u32>;
@group(0) @binding(2) var<storage, read> sequences: array<u32>;
@group(0) @binding(3) var<storage, read> sequence_lanes: array<u32>;
@group(0) @binding(4) var<storage, read> sampled: array<u32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read_write> history: array<u32>;
@group(0) @binding(7) var<storage, read_write> output: array<f32>;

fn element(row: u32, i: u32) -> f32 {
    let start = (row - p.first) * p.stride;
    if (FLOAT == FLOAT_F32) {
        return bitcast<f32>(table[start + i]);
    }
    let word = table[start + i / 2u];
    if (FLOAT == FLOAT_F16) {
        return unpack_half(word)[i % 2u];
    }
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    var token = tokens[row];
    if (token != NONE && (token & FROM_LANE) != 0u) {
        let lane = token & ~FROM_LANE;
        token = NONE;
        if (lane < p.lanes) {
            token = sampled[lane];
        }
    }
    let known = token < p.vocabulary;
    if (!known && p.first == 0u) {
        for (var i = thread.index; i < p.width; i += WORKGROUP) {
            output[row * p.width + i] = 0.0;
        }
    }
    if (!known || token < p.first || token >= p.first + p.count) {
        return;
    }
    for (var i = thread.index; i < p.width; i += WORKGROUP) {
        output[row * p.width + i] = element(token, i) * p.scale;
    }
    let sequence = sequences[row];
    if (thread.index == 0u && sequence < p.sequences) {
        let lane = sequence_lanes[sequence];
        let position = positions[row];
        if (lane < p.lanes && position < p.context) {
            history[lane * p.context + position] = token;
        }
    }
}
