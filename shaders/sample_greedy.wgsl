// uses: reduce, order, sample_row
// `ops::Sample` where every row is greedy: the best token of each piece of a row, then the best of
// the pieces.

struct Params {
    rows: u32,
    first: u32,
    vocabulary: u32,
    // Pieces of a row.
    pieces: u32,
    // Entries of `sampled`.
    lanes: u32,
}
var<immediate> p: Params;

// Tokens of a piece that a thread looks at.
const LOADS = PIECE / WORKGROUP;

@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> options: array<SampleRow>;
@group(0) @binding(2) var<storage, read_write> bests: array<Best>;

@compute @workgroup_size(256)
fn pieces(thread: Thread) {
    let group = flat_group(thread);
    let row = group / p.pieces;
    if (row >= p.rows || options[p.first + row].lane == NONE) {
        return;
    }
    let start = (group % p.pieces) * LOADS * WORKGROUP + thread.index;
    var words: array<u32, LOADS>;
    for (var n = 0u; n < LOADS; n++) {
        words[n] = logits[row * p.vocabulary + min(start + n * WORKGROUP, max(p.vocabulary, 1u) - 1u)];
    }
    var best = NO_BEST;
    for (var n = 0u; n < LOADS; n++) {
        let token = start + n * WORKGROUP;
        let order = checked_order_of_bits(words[n]);
        if (token < p.vocabulary && order > best.order) {
            best = Best(order, token);
        }
    }
    best = reduce_best(best, thread);
    if (thread.index == 0u) {
        bests[group] = best;
    }
}

@group(0) @binding(3) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(4) var<storage, read_write> sampled: array<u32>;
@group(0) @binding(5) var<storage, read_write> logprobs: array<u32>;

@compute @workgroup_size(256)
fn rows(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    let lane = options[p.first + row].lane;
    var best = NO_BEST;
    if (lane != NONE) {
        for (var piece = thread.index; piece < p.pieces; piece += WORKGROUP) {
            let other = bests[row * p.pieces + piece];
            if (other.order > best.order) {
                best = other;
            }
        }
    }
    best = reduce_best(best, thread);
    if (thread.index == 0u) {
        let finite = best.order != NOT_FINITE;
        let token = select(NONE, best.token, finite);
        tokens[p.first + row] = token;
        logprobs[p.first + row] = select(NAN_BITS, 0u, finite);
        if (lane < p.lanes) {
            sampled[lane] = token;
        }
    }
}
