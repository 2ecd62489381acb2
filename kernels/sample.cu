// `ops::Sample` with its options, and the log-probabilities of what was sampled: a block for each row.
//
// Everything is decided in the order of the logits before they are divided by the temperature:
// dividing keeps their order, and may only make some of them equal.
#include "prelude.cuh"

struct SampleArgs {
    const float* logits;
    const SampleRow* options;
    const u32* bias_tokens;
    const float* bias_values;
    const u32* history;
    // Where a row goes whose logits are changed.
    float* changed;
    // Of each token of a row, the number of its occurrences in the answer.
    u32* counts;
    u32* tokens;
    u32* sampled;
    float* logprobs;
    u32 first;
    u32 vocabulary;
    // Elements of `bias_tokens` and `bias_values`.
    u32 biases;
    // Row length and rows of `history`.
    u32 context;
    u32 histories;
    // Entries of `sampled`.
    u32 lanes;
};

struct SampleLogprobsArgs {
    const float* logits;
    const SampleRow* options;
    const u32* tokens;
    float* logprobs;
    u32* top_tokens;
    float* top_logprobs;
    u32 first;
    u32 vocabulary;
};

// `backend::MAX_LOGPROBS`.
constexpr u32 MAX_LOGPROBS = 20;

// What is kept of a row: what is above a place in its descending order, and the place itself.
struct Cut {
    u32 order;
    u32 token;

    DEVICE_METHOD bool keeps(u32 other, u32 other_token) const {
        return other > order || (other == order && other_token <= token);
    }
};

// The place in a row's descending order at which a number of tokens, or a share of all weights, is
// reached. Tokens are counted in bins by their distance from the highest logit, and those of the bin
// in which the limit is reached are compared with each other; where they are too many, they are
// counted again in bins of 8 bits of the logit and then of the token, from the top. Sums are
// integers, so that the order in which threads add does not matter.
struct Search {
    static constexpr u32 BINS_OF_THREAD = 4;
    static constexpr u32 BINS = BINS_OF_THREAD * ROW_THREADS;
    static constexpr u32 LIST = ROW_THREADS;
    // Weights have this many bits behind the point, so that those of 2²³ tokens can be added up.
    static constexpr float ONE = 1099511627776.0f;
    // From this distance on nothing is left of a weight: ln 2⁴⁰, and a little more.
    static constexpr float WIDEST = 28.0f;

    // In shared memory.
    struct Memory {
        u32 low[BINS];
        u32 high[BINS];
        u32 count[BINS];
        u64 list[LIST];
        u64 weights[LIST];
        u64 totals[ROW_THREADS / WARP];
        // The bin in which the limit is reached, its tokens, and the sum before it.
        u32 bin;
        u32 bin_count;
        u64 before;
        u32 listed;
        Cut cut;
    };

    Memory& memory;
    const float* row;
    u32 vocabulary;
    float temperature;
    // The highest logit, divided by the temperature.
    float top;

    DEVICE_METHOD float divided(float x) const { return clamped(__fdiv_rn(x, temperature)); }
    DEVICE_METHOD float distance(float x) const { return fmaxf(top - divided(x), 0.0f); }
    DEVICE_METHOD u64 weight(float x) const { return static_cast<u64>(exp_exact(-distance(x)) * ONE); }

    DEVICE_METHOD void clear() const {
        __syncthreads();
        for (u32 i = threadIdx.x; i < BINS; i += ROW_THREADS) {
            memory.low[i] = memory.high[i] = memory.count[i] = 0;
        }
        if (threadIdx.x == 0) {
            memory.bin = NONE;
            memory.listed = 0;
        }
        __syncthreads();
    }

    DEVICE_METHOD void add(u32 bin, u64 weight) const {
        const u32 low = static_cast<u32>(weight);
        const u32 before = atomicAdd(&memory.low[bin], low);
        // The one whose sum wraps around carries.
        const u32 high = static_cast<u32>(weight >> 32) + (before + low < before ? 1u : 0u);
        if (high != 0) atomicAdd(&memory.high[bin], high);
        atomicAdd(&memory.count[bin], 1u);
    }

    DEVICE_METHOD u64 of_bin(u32 bin) const { return u64(memory.high[bin]) << 32 | memory.low[bin]; }

    // Looks for the bin in which `goal` is reached; what is left to go within it, or 0 if there is
    // none. A share of the sum becomes the goal first where there is one.
    DEVICE_METHOD u64 find(u64 goal, u32 share) const {
        __syncthreads();
        const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        u64 all = 0;
        for (u32 i = 0; i < BINS_OF_THREAD; i++) all += of_bin(BINS_OF_THREAD * threadIdx.x + i);
        u64 through = all;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            const u64 left = __shfl_sync(0xffffffffu, through, lane < distance ? lane : lane - distance);
            if (lane >= distance) through += left;
        }
        if (lane == WARP - 1) memory.totals[warp] = through;
        __syncthreads();
        u64 total = 0;
        for (u32 w = 0; w < ROW_THREADS / WARP; w++) {
            if (w == warp) through += total;
            total += memory.totals[w];
        }
        if (share != 0) {
            goal = (total >> 32) * share + ((total & 0xffffffffu) * share >> 32);
            // At least 1, so that a bin with something in it is found.
            goal = goal > 0 ? goal : 1;
        }
        u64 before = through - all;
        for (u32 bin = BINS_OF_THREAD * threadIdx.x; bin < BINS_OF_THREAD * (threadIdx.x + 1); bin++) {
            const u64 after = before + of_bin(bin);
            if (before < goal && goal <= after) {
                memory.bin = bin;
                memory.bin_count = memory.count[bin];
                memory.before = before;
            }
            before = after;
        }
        __syncthreads();
        return memory.bin == NONE ? 0 : goal - memory.before;
    }

    // Cuts a row further: to `limit` tokens, or where `by_weight`, to the first tokens that have
    // `limit / 2³²` of the weights. The place that is sought is known not to be below `floor`.
    DEVICE_METHOD Cut cut_at(Cut cut, u32 floor, u32 limit, bool by_weight) const {
        const float range = by_weight ? WIDEST : fmaxf(distance(value_of_order(floor)), 1e-30f);
        const float per_distance = __fdiv_rn(static_cast<float>(BINS - 1), range);
        const auto bin_of = [&](float x) {
            return static_cast<u32>(fminf(distance(x) * per_distance, static_cast<float>(BINS - 1)));
        };
        // What a token counts, 0 where it is not kept.
        const auto counts = [&](u32 order, u32 token, float x) {
            if (order < floor || !cut.keeps(order, token)) return u64(0);
            return by_weight ? weight(x) : u64(1);
        };
        clear();
        for_each_token(row, vocabulary, [&](u32 token, float x) {
            const u64 own = counts(order_of(x), token, x);
            if (own != 0) add(bin_of(x), own);
        });
        u64 goal = find(limit, by_weight ? (limit > 0 ? limit : 1) : 0);
        // Fewer than the limit are left.
        if (goal == 0) return cut;
        const u32 bin = memory.bin;
        if (memory.bin_count <= LIST) {
            for_each_token(row, vocabulary, [&](u32 token, float x) {
                const u32 order = order_of(x);
                const u64 own = counts(order, token, x);
                if (own == 0 || bin_of(x) != bin) return;
                const u32 at = atomicAdd(&memory.listed, 1u);
                memory.list[at] = ranked(order, token);
                memory.weights[at] = own;
            });
            __syncthreads();
            const u32 listed = memory.listed;
            if (threadIdx.x < listed) {
                const u64 own = memory.list[threadIdx.x];
                u64 before = 0;
                for (u32 n = 0; n < listed; n++) {
                    if (memory.list[n] > own) before += memory.weights[n];
                }
                if (before < goal && goal <= before + memory.weights[threadIdx.x]) {
                    memory.cut = Cut{order_of_ranked(own), token_of_ranked(own)};
                }
            }
            __syncthreads();
            return memory.cut;
        }
        // What the digits before this one decided.
        u32 order_prefix = 0, token_prefix = 0;
        for (u32 digit = 0; digit < 8; digit++) {
            const bool of_token = digit >= 4;
            const u32 shift = 24 - 8 * (digit % 4);
            const u32 mask = shift == 24 ? 0 : 0xffffff00u << shift;
            if (of_token && (vocabulary - 1) >> shift == 0) continue;
            clear();
            for (u32 token = threadIdx.x; token < vocabulary; token += ROW_THREADS) {
                const float x = row[token];
                const u32 order = order_of(x);
                const u64 own = counts(order, token, x);
                if (own == 0 || bin_of(x) != bin) continue;
                if (of_token) {
                    if (order == order_prefix && (token & mask) == token_prefix) {
                        add(token >> shift & 255, own);
                    }
                } else if ((order & mask) == order_prefix) {
                    add(255 - (order >> shift & 255), own);
                }
            }
            goal = find(goal, 0);
            if (of_token) {
                token_prefix |= memory.bin << shift;
            } else {
                order_prefix |= (255 - memory.bin) << shift;
            }
        }
        return Cut{order_prefix, token_prefix};
    }
};

// Philox4x32-10, `random::philox`.
DEVICE uint4 philox(u32 k0, u32 k1, uint4 c) {
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(c.x, 0xd2511f53u), high1 = __umulhi(c.z, 0xcd9e8d57u);
        c = make_uint4(high1 ^ c.y ^ k0, c.z * 0xcd9e8d57u, high0 ^ c.w ^ k1, c.x * 0xd2511f53u);
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

// `−ln(−ln u)` with `u = (bits + 1/2) / 2³²`, in f64 and rounded once, `random::gumbel_of_bits`.
DEVICE float gumbel(u32 bits) {
    const double u = (static_cast<double>(bits) + 0.5) * (1.0 / 4294967296.0);
    return static_cast<float>(-log(-log(u)));
}

// No `gumbel` of these bits is higher: −ln u ≥ 1 − u, so it is at most −ln(1 − u), and
// 1 − u > 2^−(zeros + 1).
DEVICE float gumbel_bound(u32 bits) {
    return static_cast<float>(__clz(static_cast<i32>(~bits)) + 1) * 0.6931472f + 1e-3f;
}

// Adds the biases. Each thread has tokens of its own, those of `for_each_token`, so that several of
// one token add up in their order, and nobody waits.
DEVICE void add_biases(const SampleArgs& a, const SampleRow& o, float* row) {
    for (u32 n = 0; n < o.bias_count; n++) {
        const u32 token = a.bias_tokens[o.bias_start + n];
        if (token < a.vocabulary && token % ROW_THREADS == threadIdx.x) {
            row[token] = clamped(row[token] + a.bias_values[o.bias_start + n]);
        }
    }
}

// Counts the first `length` tokens of the history, and changes the logit of each once.
DEVICE void penalize(const SampleArgs& a, const SampleRow& o, u32 length, float* row, u32* counts) {
    constexpr u32 TAKEN = 0x80000000u;
    const u32* history = a.history + u64(o.lane) * a.context;
    for (u32 n = threadIdx.x; n < length; n += ROW_THREADS) {
        if (history[n] < a.vocabulary) counts[history[n]] = 0;
    }
    __syncthreads();
    for (u32 n = threadIdx.x; n < length; n += ROW_THREADS) {
        if (n >= o.prompt && history[n] < a.vocabulary) atomicAdd(&counts[history[n]], 1u);
    }
    __syncthreads();
    for (u32 n = threadIdx.x; n < length; n += ROW_THREADS) {
        const u32 token = history[n];
        if (token >= a.vocabulary) continue;
        // Of several occurrences one finds the number.
        const u32 count = atomicMax(&counts[token], TAKEN);
        if (count == TAKEN) continue;
        float x = row[token];
        if (o.repetition_penalty != 1.0f) {
            x = x > 0.0f ? __fdiv_rn(x, o.repetition_penalty) : x * o.repetition_penalty;
        }
        if (count > 0) x -= o.frequency_penalty * static_cast<float>(count) + o.presence_penalty;
        row[token] = clamped(x);
    }
    __syncthreads();
}

// Drops what is less likely than `min_p` of the likeliest. What is kept depends on the order alone, so
// the lowest order that is kept, of all there could be, is found without a look at the row.
DEVICE Cut cut_by_share_of_best(const Search& search, float min_p, u32 best) {
    const float least = search.top + static_cast<float>(log(static_cast<double>(min_p)));
    const auto kept = [&](u32 order) { return search.divided(value_of_order(order)) >= least; };
    if (!kept(best)) return Cut{NOT_FINITE, NONE};
    u32 low = order_of(-MOST_FINITE), high = best;
    while (low < high) {
        const u32 middle = low + (high - low) / 2;
        if (kept(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return Cut{high, NONE};
}

// The token whose logit and noise are highest among those that are kept; `best` is the likeliest.
DEVICE u64 draw(const Search& search, const SampleRow& o, Cut cut, u64 best) {
    const auto bits_of = [&](u32 block) {
        return philox(o.seed[0], o.seed[1], make_uint4(block, o.length, o.choice, 0));
    };
    const auto word = [](const uint4& words, u32 n) {
        return n == 0 ? words.x : n == 1 ? words.y : n == 2 ? words.z : words.w;
    };
    u64 won = 0;
    // What it scores is the least that another must reach, which spares most of the logarithms.
    const u32 likeliest = token_of_ranked(best);
    if (cut.keeps(order_of_ranked(best), likeliest)) {
        const float noise = gumbel(word(bits_of(likeliest / 4), likeliest % 4));
        won = ranked(order_of(clamped(search.top + noise)), likeliest);
    }
    for (u32 block = threadIdx.x; block < (search.vocabulary + 3) / 4; block += ROW_THREADS) {
        float x[4];
        bool possible = false;
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            x[n] = search.row[min(4 * block + n, search.vocabulary - 1)];
            // No bound is higher than that of all ones.
            possible |= order_of(clamped(search.divided(x[n]) + gumbel_bound(NONE))) >= order_of_ranked(won)
                && cut.keeps(order_of(x[n]), 4 * block + n);
        }
        if (!possible) continue;
        const uint4 bits = bits_of(block);
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
            const u32 token = 4 * block + n;
            if (token >= search.vocabulary || !cut.keeps(order_of(x[n]), token)) continue;
            const float value = search.divided(x[n]);
            const u32 own = word(bits, n);
            if (order_of(clamped(value + gumbel_bound(own))) < order_of_ranked(won)) continue;
            const u64 score = ranked(order_of(clamped(value + gumbel(own))), token);
            won = score > won ? score : won;
        }
    }
    return reduce_row(won, Most());
}

DEVICE void finish(const SampleArgs& a, u32 out, u32 token, u32 logprob_bits) {
    if (threadIdx.x != 0) return;
    a.tokens[out] = token;
    a.logprobs[out] = __uint_as_float(logprob_bits);
    const u32 lane = a.options[out].lane;
    if (lane < a.lanes) a.sampled[lane] = token;
}

KERNEL_AT_LEAST(sample, SampleArgs, ROW_THREADS, 1) {
    __shared__ Search::Memory memory;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 out = a.first + blockIdx.x;
    const SampleRow& o = a.options[out];
    if (o.lane == NONE || a.vocabulary == 0) {
        finish(a, out, NONE, 0);
        return;
    }
    const float* row = a.logits + u64(blockIdx.x) * a.vocabulary;
    RowBest best(row, a.vocabulary);
    if (!best.finite()) {
        finish(a, out, NONE, NAN_BITS);
        return;
    }

    // Options that point beyond their buffers count as none.
    const bool biased = o.bias_count > 0 && o.bias_start <= a.biases && o.bias_count <= a.biases - o.bias_start;
    const bool penalized = o.lane < a.histories && o.length > 0 && a.context > 0
        && (o.repetition_penalty != 1.0f || o.frequency_penalty != 0.0f || o.presence_penalty != 0.0f);
    if (biased || penalized) {
        float* changed = a.changed + u64(blockIdx.x) * a.vocabulary;
        for_each_token(row, a.vocabulary, [&](u32 token, float x) { changed[token] = x; });
        if (biased) add_biases(a, o, changed);
        if (penalized) {
            penalize(a, o, min(o.length, a.context), changed, a.counts + u64(blockIdx.x) * a.vocabulary);
        }
        row = changed;
        best = RowBest(row, a.vocabulary);
    }
    if (o.temperature == 0.0f) {
        finish(a, out, token_of_ranked(best.best), 0);
        return;
    }

    Search search = {memory, row, a.vocabulary, o.temperature, 0.0f};
    const u32 highest = order_of_ranked(best.best);
    search.top = search.divided(value_of_order(highest));
    // Keeps everything.
    Cut cut = {0, NONE};
    if (o.min_p > 0.0f) cut = cut_by_share_of_best(search, o.min_p, highest);
    if (o.top_k > 0 && o.top_k < a.vocabulary) {
        // There is a token for each thread at the lowest of the threads' best or above it.
        cut = search.cut_at(cut, o.top_k <= ROW_THREADS ? best.floor : best.lowest, o.top_k, false);
    }
    if (o.top_p < 1.0f) {
        const float share = fminf(fmaxf(o.top_p, 0.0f), 0.99999994f);
        cut = search.cut_at(cut, 0, static_cast<u32>(share * 4294967296.0f), true);
    }
    const u64 won = draw(search, o, cut, best.best);
    finish(a, out, won == 0 ? NONE : token_of_ranked(won), 0);
}

KERNEL_AT_LEAST(sample_logprobs, SampleLogprobsArgs, ROW_THREADS, 1) {
    __shared__ Search::Memory memory;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 out = a.first + blockIdx.x;
    const u32 token = a.tokens[out];
    u32* top_tokens = a.top_tokens + u64(out) * MAX_LOGPROBS;
    float* top_logprobs = a.top_logprobs + u64(out) * MAX_LOGPROBS;
    if (threadIdx.x < MAX_LOGPROBS) {
        top_tokens[threadIdx.x] = NONE;
        top_logprobs[threadIdx.x] = 0.0f;
    }
    // Nothing was sampled: the row is padding, or not finite.
    if (token >= a.vocabulary) return;
    const float* row = a.logits + u64(blockIdx.x) * a.vocabulary;
    const RowBest best(row, a.vocabulary);
    const float highest = value_of_order(order_of_ranked(best.best));
    const LogSum log_sum(row, a.vocabulary, highest);
    if (threadIdx.x == 0) a.logprobs[out] = log_sum.log_probability(row[token]);
    const u32 wanted = min(a.options[out].logprobs, MAX_LOGPROBS);
    if (wanted == 0) return;
    const Search search = {memory, row, a.vocabulary, 1.0f, highest};
    const Cut cut = search.cut_at(Cut{0, NONE}, best.floor, wanted, false);
    search.clear();
    for_each_token(row, a.vocabulary, [&](u32 other, float x) {
        if (order_of(x) < best.floor || !cut.keeps(order_of(x), other)) return;
        const u32 at = atomicAdd(&memory.listed, 1u);
        if (at < Search::LIST) memory.list[at] = ranked(order_of(x), other);
    });
    __syncthreads();
    // Fewer than are wanted in a small vocabulary.
    const u32 listed = min(memory.listed, wanted);
    if (threadIdx.x >= listed) return;
    const u64 own = memory.list[threadIdx.x];
    u32 better = 0;
    for (u32 n = 0; n < listed; n++) better += memory.list[n] > own ? 1 : 0;
    top_tokens[better] = token_of_ranked(own);
    top_logprobs[better] = log_sum.log_probability(value_of_order(order_of_ranked(own)));
}
