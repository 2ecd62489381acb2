// uses: reduce, order, exact, random, select, sample_row
// `ops::Sample` with its options: a workgroup for each row, which works on a copy of the row.
//
// Everything is decided in the order of the logits before they are divided by the temperature:
// dividing keeps their order, and may only make some of them equal.

struct Params {
    rows: u32,
    first: u32,
    vocabulary: u32,
    // Elements of `bias_tokens` and `bias_values`.
    biases: u32,
    // Row length and rows of `history`.
    context: u32,
    histories: u32,
    // Entries of `sampled`.
    lanes: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> logits: array<u32>;
@group(0) @binding(1) var<storage, read> options: array<SampleRow>;
@group(0) @binding(2) var<storage, read> bias_tokens: array<u32>;
@group(0) @binding(3) var<storage, read> bias_values: array<f32>;
@group(0) @binding(4) var<storage, read> history: array<u32>;
// The row, as `order_of` each logit.
@group(0) @binding(5) var<storage, read_write> orders: array<u32>;
// Of each token: `SEEN`, and the number of its occurrences in the answer.
@group(0) @binding(6) var<storage, read_write> counts: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(8) var<storage, read_write> sampled: array<u32>;
@group(0) @binding(9) var<storage, read_write> logprobs: array<u32>;

const SEEN = 0x80000000u;

var<private> row_start: u32;
var<private> o: SampleRow;
// The highest logit, divided by the temperature.
var<private> top: f32;

fn row_order(i: u32) -> u32 {
    return orders[row_start + i];
}

fn divided(order: u32) -> f32 {
    return clamp(value_of_order(order) / o.temperature, -MOST_FINITE, MOST_FINITE);
}

fn row_weight(order: u32) -> vec2<u32> {
    let scaled = exp_exact(min(divided(order) - top, 0.0)) * 256.0;
    let high = floor(scaled);
    return vec2<u32>(u32((scaled - high) * 4294967296.0), u32(high));
}

// Copies the row; the best token.
fn copy_row(thread: Thread) -> Best {
    var best = NO_BEST;
    for (var start = thread.index; start < p.vocabulary; start += LOADS * WORKGROUP) {
        var words: array<u32, LOADS>;
        for (var n = 0u; n < LOADS; n++) {
            words[n] = logits[row_start + min(start + n * WORKGROUP, p.vocabulary - 1u)];
        }
        for (var n = 0u; n < LOADS; n++) {
            let i = start + n * WORKGROUP;
            if (i < p.vocabulary) {
                let order = checked_order_of_bits(words[n]);
                orders[row_start + i] = order;
                if (order > best.order) {
                    best = Best(order, i);
                }
            }
        }
    }
    return best;
}

// The best token of the copy.
fn best_of_row(thread: Thread) -> Best {
    var best = NO_BEST;
    for (var start = thread.index; start < p.vocabulary; start += LOADS * WORKGROUP) {
        var words: array<u32, LOADS>;
        for (var n = 0u; n < LOADS; n++) {
            words[n] = row_order(min(start + n * WORKGROUP, p.vocabulary - 1u));
        }
        for (var n = 0u; n < LOADS; n++) {
            let i = start + n * WORKGROUP;
            if (i < p.vocabulary && words[n] > best.order) {
                best = Best(words[n], i);
            }
        }
    }
    return best;
}

// Each thread has tokens of its own, so that several biases of one token add up in their order.
fn add_biases(thread: Thread) {
    for (var n = 0u; n < o.bias_count; n++) {
        let token = bias_tokens[o.bias_start + n];
        if (token < p.vocabulary && token % WORKGROUP == thread.index) {
            let x = value_of_order(row_order(token)) + bias_values[o.bias_start + n];
            orders[row_start + token] = order_of(x);
        }
    }
}

// Counts the tokens of the history, and changes the logit of each once.
fn penalize(length: u32, thread: Thread) {
    let start = o.lane * p.context;
    for (var n = thread.index; n < length; n += WORKGROUP) {
        let token = history[start + n];
        if (token < p.vocabulary) {
            atomicStore(&counts[row_start + token], 0u);
        }
    }
    storageBarrier();
    for (var n = thread.index; n < length; n += WORKGROUP) {
        let token = history[start + n];
        if (token < p.vocabulary) {
            atomicOr(&counts[row_start + token], SEEN);
            if (n >= o.prompt) {
                atomicAdd(&counts[row_start + token], 1u);
            }
        }
    }
    storageBarrier();
    for (var n = thread.index; n < length; n += WORKGROUP) {
        let token = history[start + n];
        if (token >= p.vocabulary) {
            continue;
        }
        // Taken with the first occurrence, so that the others find nothing.
        let count = atomicExchange(&counts[row_start + token], 0u);
        if (count == 0u) {
            continue;
        }
        var x = value_of_order(row_order(token));
        if (o.repetition_penalty != 1.0) {
            x = select(x * o.repetition_penalty, x / o.repetition_penalty, x > 0.0);
        }
        let answered = count & ~SEEN;
        if (answered > 0u) {
            x -= o.frequency_penalty * f32(answered) + o.presence_penalty;
        }
        orders[row_start + token] = order_of(x);
    }
}

// Drops what is less likely than `min_p` of the likeliest.
fn cut_by_share_of_best(thread: Thread) -> Cut {
    let least = top + ln_exact(o.min_p);
    var lowest = NONE;
    for (var start = thread.index; start < p.vocabulary; start += LOADS * WORKGROUP) {
        var words: array<u32, LOADS>;
        for (var n = 0u; n < LOADS; n++) {
            words[n] = row_order(min(start + n * WORKGROUP, p.vocabulary - 1u));
        }
        for (var n = 0u; n < LOADS; n++) {
            if (divided(words[n]) >= least) {
                lowest = min(lowest, words[n]);
            }
        }
    }
    return Cut(~reduce_max_u32(~lowest, thread), NONE);
}

// The token whose logit and noise are highest among those that are kept.
fn draw(cut: Cut, thread: Thread) -> Best {
    let seed = vec2<u32>(o.seed[0], o.seed[1]);
    // No token below this beats the likeliest one, whatever their noise.
    let hopeless = top + GUMBEL_LEAST;
    var best = NO_BEST;
    for (var block = thread.index; 4u * block < p.vocabulary; block += WORKGROUP) {
        var words: array<u32, 4>;
        for (var n = 0u; n < 4u; n++) {
            words[n] = row_order(min(4u * block + n, p.vocabulary - 1u));
        }
        var possible = false;
        for (var n = 0u; n < 4u; n++) {
            possible |= keeps(cut, words[n], 4u * block + n)
                && !(divided(words[n]) + GUMBEL_MOST < hopeless);
        }
        if (!possible) {
            continue;
        }
        let bits = philox(seed, vec4<u32>(block, o.length, o.choice, 0u));
        for (var n = 0u; n < 4u; n++) {
            let token = 4u * block + n;
            if (token < p.vocabulary && keeps(cut, words[n], token)) {
                let order = order_of(divided(words[n]) + gumbel(bits[n]));
                if (order > best.order) {
                    best = Best(order, token);
                }
            }
        }
    }
    return reduce_best(best, thread);
}

fn finish(token: u32, logprob: u32, row: u32, thread: Thread) {
    if (thread.index == 0u) {
        tokens[row] = token;
        logprobs[row] = logprob;
        if (o.lane < p.lanes) {
            sampled[o.lane] = token;
        }
    }
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let row = flat_group(thread);
    if (row >= p.rows) {
        return;
    }
    let out = p.first + row;
    o = options[out];
    if (options[out].lane == NONE || p.vocabulary == 0u) {
        finish(NONE, 0u, out, thread);
        return;
    }
    row_start = row * p.vocabulary;
    var own = copy_row(thread);
    var best = reduce_best(own, thread);
    if (uniform_u32(best.order, thread) == NOT_FINITE) {
        finish(NONE, NAN_BITS, out, thread);
        return;
    }
    storageBarrier();

    // Options that point beyond their buffers count as none.
    let has_biases = options[out].bias_count > 0u && options[out].bias_start <= p.biases
        && options[out].bias_count <= p.biases - options[out].bias_start;
    if (has_biases) {
        add_biases(thread);
        storageBarrier();
    }
    var length = 0u;
    if (options[out].lane < p.histories && (options[out].repetition_penalty != 1.0
        || options[out].frequency_penalty != 0.0 || options[out].presence_penalty != 0.0)) {
        length = min(options[out].length, p.context);
    }
    if (length > 0u) {
        penalize(length, thread);
        storageBarrier();
    }
    if (has_biases || length > 0u) {
        own = best_of_row(thread);
        best = reduce_best(own, thread);
    }
    if (options[out].temperature == 0.0) {
        finish(best.token, 0u, out, thread);
        return;
    }

    top = divided(best.order);
    var cut = NO_CUT;
    if (options[out].min_p > 0.0) {
        cut = cut_by_share_of_best(thread);
    }
    if (options[out].top_k > 0u && options[out].top_k < p.vocabulary) {
        // There is a token for each thread at the lowest of the threads' best or above it.
        let lowest = ~reduce_max_u32(~own.order, thread);
        let floor = select(0u, lowest, options[out].top_k <= WORKGROUP);
        cut = cut_at(cut, floor, options[out].top_k, false, thread);
    }
    if (options[out].top_p < 1.0) {
        let share = u32(clamp(options[out].top_p, 0.0, 0.99999994) * 4294967296.0);
        cut = cut_at(cut, 0u, share, true, thread);
    }
    finish(draw(cut, thread).token, 0u, out, thread);
}
