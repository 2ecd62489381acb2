// uses: reduce, order, exact, random, log_sum, select, sample_row
// The log-probabilities of `ops::Sample`, once the tokens are there: a workgroup for each row.

struct Params {
    rows: u32,
    first: u32,
    vocabulary: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> options: array<SampleRow>;
@group(0) @binding(2) var<storage, read> tokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> logprobs: array<u32>;
@group(0) @binding(4) var<storage, read_write> top_tokens: array<u32>;
@group(0) @binding(5) var<storage, read_write> top_logprobs: array<u32>;

var<private> row_start: u32;

fn row_order(i: u32) -> u32 {
    return checked_order_of_bits(logits[row_start + i]);
}

// Tokens are only counted here.
fn row_weight(order: u32) -> vec2<u32> {
    return vec2<u32>(0u, 0u);
}

var<workgroup> listed: atomic<u32>;
var<workgroup> list: array<Best, MAX_LOGPROBS>;

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    let out = p.first + row;
    let token = tokens[out];
    if (token == NONE || token >= p.vocabulary) {
        if (thread.index < MAX_LOGPROBS) {
            top_tokens[out * MAX_LOGPROBS + thread.index] = NONE;
            top_logprobs[out * MAX_LOGPROBS + thread.index] = 0u;
        }
        return;
    }
    row_start = row * p.vocabulary;
    let log_sum = log_sum_exp(thread);
    if (thread.index == 0u) {
        logprobs[out] = log_probability_bits(row_order(token), log_sum);
    }
    if (thread.index == 0u) {
        atomicStore(&listed, 0u);
    }
    workgroupBarrier();
    let wanted = min(options[out].logprobs, MAX_LOGPROBS);
    if (wanted > 0u) {
        let cut = cut_at(NO_CUT, log_sum.floor, wanted, false, thread);
        for (var i = thread.index; i < p.vocabulary; i += WORKGROUP) {
            let order = row_order(i);
            if (order >= log_sum.floor && keeps(cut, order, i)) {
                let at = atomicAdd(&listed, 1u);
                if (at < MAX_LOGPROBS) {
                    list[at] = Best(order, i);
                }
            }
        }
    }
    workgroupBarrier();
    let found = min(atomicLoad(&listed), wanted);
    if (thread.index >= MAX_LOGPROBS) {
        return;
    }
    if (thread.index >= found) {
        top_tokens[out * MAX_LOGPROBS + thread.index] = NONE;
        top_logprobs[out * MAX_LOGPROBS + thread.index] = 0u;
        return;
    }
    let own = list[thread.index];
    var better = 0u;
    for (var n = 0u; n < found; n++) {
        let other = list[n];
        if (other.order > own.order || (other.order == own.order && other.token < own.token)) {
            better++;
        }
    }
    top_tokens[out * MAX_LOGPROBS + better] = own.token;
    top_logprobs[out * MAX_LOGPROBS + better] = log_probability_bits(own.order, log_sum);
}
