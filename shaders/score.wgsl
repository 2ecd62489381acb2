// uses: reduce, order, exact, log_sum
// `ops::Score`: a workgroup for each row.

struct Params {
    rows: u32,
    first: u32,
    vocabulary: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(2) var<storage, read_write> logprobs: array<u32>;

var<private> row_start: u32;

fn row_order(i: u32) -> u32 {
    return checked_order_of_bits(logits[row_start + i]);
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    let token = targets[p.first + row];
    if (token == NONE) {
        if (thread.index == 0u) {
            logprobs[p.first + row] = 0u;
        }
        return;
    }
    row_start = row * p.vocabulary;
    let log_sum = log_sum_exp(thread);
    if (thread.index == 0u) {
        var found = NAN_BITS;
        if (log_sum.highest != NOT_FINITE && token < p.vocabulary) {
            found = log_probability_bits(row_order(token), log_sum);
        }
        logprobs[p.first + row] = found;
    }
}
