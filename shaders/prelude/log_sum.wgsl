
// `ln Σ exp(x)` of a row. The file that uses this has `row_order(i)`, the `checked_order_of_bits`
// of logit i, and in `p`: `vocabulary`.

struct LogSum {
    // The highest logit's order; `NOT_FINITE` where a logit is not finite.
    highest: u32,
    // `ln Σ exp(x − highest)`.
    above: f32,
    // The lowest of the threads' own highest: a floor under the 256 highest logits of a row.
    floor: u32,
}

// Sums go up in three steps, so that none of them has many terms: pairs and pairs of pairs within
// `TERMS`, blocks of `TERMS`, and then the threads' tree. The order is that of the row alone.
const TERMS = 8u;
const BLOCKS = 16u;

fn log_sum_exp(thread: Thread) -> LogSum {
    var most = 0u;
    for (var start = thread.index; start < p.vocabulary; start += TERMS * WORKGROUP) {
        var orders: array<u32, TERMS>;
        for (var n = 0u; n < TERMS; n++) {
            orders[n] = row_order(min(start + n * WORKGROUP, p.vocabulary - 1u));
        }
        for (var n = 0u; n < TERMS; n++) {
            // A load beyond the end is the last logit again, which another thread may have.
            if (start + n * WORKGROUP < p.vocabulary) {
                most = max(most, orders[n]);
            }
        }
    }
    var result = LogSum(reduce_max_u32(most, thread), 0.0, ~reduce_max_u32(~most, thread));
    let highest = value_of_order(result.highest);
    var sum = 0.0;
    var block = 0.0;
    var blocks = 0u;
    for (var start = thread.index; start < p.vocabulary; start += TERMS * WORKGROUP) {
        var terms: array<f32, TERMS>;
        for (var n = 0u; n < TERMS; n++) {
            let i = start + n * WORKGROUP;
            let x = value_of_order(row_order(min(i, p.vocabulary - 1u)));
            terms[n] = select(0.0, exp_exact(x - highest), i < p.vocabulary);
        }
        block += ((terms[0] + terms[1]) + (terms[2] + terms[3]))
            + ((terms[4] + terms[5]) + (terms[6] + terms[7]));
        blocks++;
        if (blocks == BLOCKS) {
            sum += block;
            block = 0.0;
            blocks = 0u;
        }
    }
    result.above = ln_exact(reduce_sum_f32(sum + block, thread));
    return result;
}

// The bits of the log-probability of a token of a row of finite logits.
fn log_probability_bits(order: u32, log_sum: LogSum) -> u32 {
    return bitcast<u32>(value_of_order(order) - value_of_order(log_sum.highest) - log_sum.above);
}
