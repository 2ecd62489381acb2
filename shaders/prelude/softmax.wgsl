
// What attention over blocks of keys does to scores, in one text for every kernel: blocks that are
// taken in a loop, or by workgroups of their own, give the same bits.
//
// Scores are in units of ln 2, so that `exp2` makes weights of them.

// Keys of as many blocks as a row of the page table has pages for.
fn most_keys(max_pages: u32) -> u32 {
    return max((max_pages * PAGE_TOKENS + KEY_BLOCK - 1u) / KEY_BLOCK, 1u) * KEY_BLOCK;
}

// Of one head after some blocks: the highest score, the sum of `exp2(score − highest)`, and with
// these weights the sum of four elements of the values.
struct State {
    highest: f32,
    sum: f32,
    out: vec4<f32>,
}

// Joins a later block to those before it.
fn join(all: State, one: State) -> State {
    let highest = select(all.highest, one.highest, one.highest > all.highest);
    let of_all = exp2(all.highest - highest);
    let of_one = exp2(one.highest - highest);
    return State(
        highest,
        fma(one.sum, of_one, all.sum * of_all),
        fma(one.out, vec4<f32>(of_one), all.out * of_all),
    );
}

// A score that is NaN or +∞ gives NaN, whatever the device's `exp2` makes of it: a fault must reach
// the output.
fn softmax_weight(score: f32, highest: f32) -> f32 {
    let bits = bitcast<u32>(score);
    if (bits == INFINITE_BITS || magnitude_bits(score) > INFINITE_BITS) {
        return bitcast<f32>(bits | NAN_BITS);
    }
    return exp2(score - highest);
}

// Floats as integers of the same order, so that the highest is exact and NaN the highest of all.
fn ordered(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

fn from_ordered(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, (key >> 31u) == 1u));
}
