
// The place in a row's descending order at which a number of tokens, or a share of all weights, is
// reached: a search by digits, of the logit first and of the token among equals. Sums are integers,
// so that the order in which threads add does not matter.
//
// The file that uses this has `row_order(i)`, the `order_of` token i; `row_weight(order)`, its
// weight as 40 bits behind the point in two words, low first; and in `p`: `vocabulary`, at most
// 2^23, so that no sum overflows.

// Loads of a thread that are on their way at once.
const LOADS = 8u;

// What is kept of a row: what is above a place in the order, and the place itself.
struct Cut {
    order: u32,
    token: u32,
}

const NO_CUT = Cut(0u, NONE);

fn keeps(cut: Cut, order: u32, token: u32) -> bool {
    return order > cut.order || (order == cut.order && token <= cut.token);
}

var<workgroup> bin_low: array<atomic<u32>, WORKGROUP>;
var<workgroup> bin_high: array<atomic<u32>, WORKGROUP>;
var<workgroup> bin_count: array<atomic<u32>, WORKGROUP>;
var<workgroup> scanned: array<vec2<u32>, WORKGROUP>;
// The bin in which the limit is reached, its tokens, and the sum before it.
var<workgroup> reached: vec4<u32>;
var<workgroup> scan_total: vec2<u32>;

fn add_wide(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2<u32>(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn subtract_wide(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2<u32>(a.x - b.x, a.y - b.y - select(0u, 1u, a.x < b.x));
}

fn less_wide(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// A bin's number for each thread, to the sum of it and all before it.
fn scan(own: vec2<u32>, thread: Thread) -> vec2<u32> {
    var sum = own;
    for (var distance = 1u; distance < WORKGROUP; distance <<= 1u) {
        scanned[thread.index] = sum;
        workgroupBarrier();
        if (thread.index >= distance) {
            sum = add_wide(sum, scanned[thread.index - distance]);
        }
        workgroupBarrier();
    }
    if (thread.index == WORKGROUP - 1u) {
        scan_total = sum;
    }
    return sum;
}

// `share / 2³²` of a sum.
fn share_of(share: u32, sum: vec2<u32>) -> vec2<u32> {
    let low = multiply_wide(share, sum.x);
    let high = multiply_wide(share, sum.y);
    return add_wide(vec2<u32>(low.y, 0u), high);
}

// Cuts a row further: to `limit` tokens, or where `by_weight`, to the first tokens that have
// `limit / 2³²` of the weights. The place that is sought is known not to be below `floor`.
fn cut_at(cut: Cut, floor: u32, limit: u32, by_weight: bool, thread: Thread) -> Cut {
    var prefix = 0u;
    var token_prefix = 0u;
    var goal = vec2<u32>(limit, 0u);
    for (var digit = 0u; digit < 8u; digit++) {
        let of_token = digit >= 4u;
        let shift = 24u - 8u * (digit & 3u);
        // What the digits before this one decided.
        let mask = select(0xffffff00u << shift, 0u, shift == 24u);
        if (of_token && ((p.vocabulary - 1u) >> shift) == 0u) {
            continue;
        }
        atomicStore(&bin_low[thread.index], 0u);
        atomicStore(&bin_high[thread.index], 0u);
        atomicStore(&bin_count[thread.index], 0u);
        if (thread.index == 0u) {
            reached = vec4<u32>(NONE, 0u, 0u, 0u);
        }
        workgroupBarrier();
        for (var start = thread.index; start < p.vocabulary; start += LOADS * WORKGROUP) {
            var orders: array<u32, LOADS>;
            for (var n = 0u; n < LOADS; n++) {
                orders[n] = row_order(min(start + n * WORKGROUP, p.vocabulary - 1u));
            }
            for (var n = 0u; n < LOADS; n++) {
                let i = start + n * WORKGROUP;
                let order = orders[n];
                if (i >= p.vocabulary || order < floor || !keeps(cut, order, i)) {
                    continue;
                }
                // Descending digits of the logit, ascending ones of the token.
                var bin = 255u - ((order >> shift) & 255u);
                if (of_token) {
                    bin = (i >> shift) & 255u;
                    if (order != prefix || (i & mask) != token_prefix) {
                        continue;
                    }
                } else if ((order & mask) != prefix) {
                    continue;
                }
                var weight = vec2<u32>(1u, 0u);
                if (by_weight) {
                    weight = row_weight(order);
                    if (weight.x == 0u && weight.y == 0u) {
                        continue;
                    }
                }
                // The one whose sum wraps around carries.
                let before = atomicAdd(&bin_low[bin], weight.x);
                let high = weight.y + select(0u, 1u, before + weight.x < before);
                if (high != 0u) {
                    atomicAdd(&bin_high[bin], high);
                }
                atomicAdd(&bin_count[bin], 1u);
            }
        }
        workgroupBarrier();
        let own = vec2<u32>(atomicLoad(&bin_low[thread.index]), atomicLoad(&bin_high[thread.index]));
        let count = atomicLoad(&bin_count[thread.index]);
        let through = scan(own, thread);
        let total = workgroupUniformLoad(&scan_total);
        if (digit == 0u && by_weight) {
            // At least 1, so that a bin with something in it is found.
            goal = share_of(limit, total);
            goal.x = max(goal.x, select(0u, 1u, goal.y == 0u));
        }
        let before = subtract_wide(through, own);
        if (less_wide(before, goal) && !less_wide(through, goal)) {
            reached = vec4<u32>(thread.index, count, before.x, before.y);
        }
        let found = workgroupUniformLoad(&reached);
        if (found.x == NONE) {
            // Fewer than the limit are left.
            return cut;
        }
        goal = subtract_wide(goal, found.zw);
        if (of_token) {
            token_prefix |= found.x << shift;
        } else {
            prefix |= (255u - found.x) << shift;
        }
        if (digit == 3u) {
            let all = !by_weight && goal.x == found.y;
            if (all || found.y == 1u) {
                // Nothing is left to decide among equals.
                return Cut(prefix, select(NONE, cut.token, prefix == cut.order));
            }
        }
    }
    return Cut(prefix, token_prefix);
}
