
// The descending order of a row: by logit, equal ones (0 and −0 too) by ascending token.

// The largest finite f32. What overflows counts as this, so that no infinity is ever computed with.
const MOST_FINITE = 3.4028234e38;

// A logit as an integer that is higher where the logit is; those of finite logits lie between 0 and
// `NOT_FINITE`.
fn order_of_bits(word: u32) -> u32 {
    if (word == 0x80000000u) {
        return 0x80000000u;
    }
    return select(word | 0x80000000u, ~word, (word >> 31u) == 1u);
}

// Stands for every logit that is NaN or infinite, above all others.
const NOT_FINITE = 0xffffffffu;

// As `order_of_bits`, or `NOT_FINITE`.
fn checked_order_of_bits(word: u32) -> u32 {
    return select(order_of_bits(word), NOT_FINITE, (word & 0x7fffffffu) >= INFINITE_BITS);
}

fn order_of(x: f32) -> u32 {
    return order_of_bits(bitcast<u32>(clamp(x, -MOST_FINITE, MOST_FINITE)));
}

fn value_of_order(order: u32) -> f32 {
    return bitcast<f32>(select(~order, order & 0x7fffffffu, (order >> 31u) == 1u));
}

// The best of some tokens.
struct Best {
    order: u32,
    token: u32,
}

const NO_BEST = Best(0u, NONE);

// The best of all threads' bests.
fn reduce_best(best: Best, thread: Thread) -> Best {
    let order = reduce_max_u32(best.order, thread);
    let token = ~reduce_max_u32(select(0u, ~best.token, best.order == order), thread);
    return Best(order, token);
}

var<workgroup> uniform_word: u32;

// A number that is the same in all threads, in a way that a compiler can see: what branches around
// a barrier must be uniform.
fn uniform_u32(x: u32, thread: Thread) -> u32 {
    if (thread.index == 0u) {
        uniform_word = x;
    }
    return workgroupUniformLoad(&uniform_word);
}
