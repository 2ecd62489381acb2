// The product of `ops::LmHead` with a table of bf16 or f16, on tensor cores: `lm_head_rows.cu` has
// made the rows ready.
//
// Rows of the table are columns of the instruction's second operand, tiles of 8, of which a warp has
// `T` at a time; rows of the input are rows of the first, tiles of 16. A lane loads 16 bytes of a row of
// the table at once: of row `g` of a tile the elements `32 j + 8 t ..` of step `j`, with
// `lane = 4 g + t`. These 8 elements are its places `2 t, 2 t + 1, 8 + 2 t, 9 + 2 t` along k of one
// instruction, and the same places of a second one:
//
//     loaded (x, y, z, w)  elements 8t, 8t+1 | 8t+2, 8t+3 | 8t+4, 8t+5 | 8t+6, 8t+7
//     first instruction    places    2t, 2t+1 | 8+2t, 9+2t
//     second instruction   places                         |  2t, 2t+1 | 8+2t, 9+2t
//
// Which element takes which place does not matter as long as both operands agree. So the table stays as
// it is, what a lane loads is an operand without a move, and the input's parts are stored in this order.
//
// A logit is added up in f32 over steps in ascending order, in each step the first instruction with
// the high part of the row and with its low part, then the second with both. That order, and the
// instruction, are the same in all variants, so a row's logits have the same bits in each of them.
#include "prelude.cuh"

struct LmHeadArgs {
    const u8* table;
    const u8* parts;
    const float* factors;
    float* logits;
    // Bytes from one row of the table to the next, a multiple of `BLOCK_BYTES`.
    u64 stride;
    u32 rows;
    u32 vocabulary;
    // Blocks of a row.
    u32 blocks;
    // Blocks that are in shared memory at once: all, or a half of what it holds.
    u32 chunk;
};

// A block of a row of the table is what a lane's registers hold of it: 4 steps of 32 elements. The
// table's rows are padded to whole blocks.
constexpr u32 STEPS = 4;
constexpr u32 BLOCK_BYTES = STEPS * 64;
constexpr u32 WARPS = THREADS / WARP;

struct Bf16 {
    static DEVICE_METHOD void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_bf16(c, a, b); }
};
struct F16 {
    static DEVICE_METHOD void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) { mma_f16(c, a, b); }
};

// What a lane loads of the table: blocks of its tiles, one after the other.
template <int T, typename Args>
struct Loads {
    const Args& a;
    const uint4* rows[T];
    // Tiles are counted `T` at a time.
    u32 tile;
    u32 tiles;
    u32 block;

    DEVICE_METHOD Loads(const Args& a, u32 tile, u32 tiles) : a(a), tile(tile), tiles(tiles), block(0) {
        aim();
    }

    DEVICE_METHOD bool more() const { return tile < tiles; }

    DEVICE_METHOD void aim() {
        const u32 lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < T; i++) {
            // Beyond the end the last row again, whose results nobody keeps.
            const u32 row = min(8 * (T * tile + i) + lane / 4, a.vocabulary - 1);
            rows[i] = reinterpret_cast<const uint4*>(a.table + row * a.stride) + lane % 4;
        }
    }

    DEVICE_METHOD void load(uint4 (&to)[T], u32 step) const {
#pragma unroll
        for (int i = 0; i < T; i++) to[i] = load_once(rows[i] + 4 * step);
    }

    // To the next block, or to the first one of the next tile.
    DEVICE_METHOD void advance() {
        if (++block == a.blocks) {
            block = 0;
            tile += gridDim.x * WARPS;
            if (more()) aim();
            return;
        }
#pragma unroll
        for (int i = 0; i < T; i++) rows[i] += BLOCK_BYTES / 16;
    }
};

// A lane's part of a tile of the input. Of up to 8 rows there are no more than those in shared memory.
template <bool few>
DEVICE void load_rows(u32 (&rows)[4], const u8* shared, u32 part_rows) {
    const u32 lane = threadIdx.x % WARP;
    if (few) {
        const bool there = lane / 4 < part_rows;
        const uint2 own = there ? reinterpret_cast<const uint2*>(shared)[lane] : make_uint2(0, 0);
        rows[0] = own.x;
        rows[1] = 0;
        rows[2] = own.y;
        rows[3] = 0;
    } else {
        const uint4 own = reinterpret_cast<const uint4*>(shared)[lane];
        rows[0] = own.x;
        rows[1] = own.y;
        rows[2] = own.z;
        rows[3] = own.w;
    }
}

// One step: `shared` is the step's parts of all rows.
template <typename Float, bool few, int M, int T>
DEVICE void multiply_step(float (&sums)[M][T][4], const uint4 (&table)[T], const u8* shared, u32 part_rows) {
    // Of a part, for one of the two instructions.
    const u32 tile_bytes = few ? 32 * part_rows : 512;
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int part = 0; part < 2; part++) {
#pragma unroll
            for (int m = 0; m < M; m++) {
                u32 rows[4];
                load_rows<few>(rows, shared, part_rows);
                shared += tile_bytes;
#pragma unroll
                for (int i = 0; i < T; i++) {
                    const u32 columns[2] = {half ? table[i].z : table[i].x, half ? table[i].w : table[i].y};
                    Float::multiply(sums[m][i], rows, columns);
                }
            }
        }
    }
}

// All of a table times all of the input: `multiply(sums, table, parts)` does a step, and
// `store(tile, sums)` takes the sums of `T` tiles.
template <typename Sum, int M, int T, typename Args, typename Multiply, typename Store>
DEVICE void project(const Args& a, u8* shared, u32 part_rows, Multiply multiply, Store store) {
    const u32 tiles = (a.vocabulary + 8 * T - 1) / (8 * T);
    const u32 warps = gridDim.x * WARPS;
    // As many for all warps of the grid: they meet at barriers.
    const u32 rounds = (tiles + warps - 1) / warps;
    const u32 chunks = (a.blocks + a.chunk - 1) / a.chunk;
    const u32 step_bytes = 128 * part_rows;
    const u32 chunk_bytes = a.chunk * STEPS * step_bytes;

    u32 tile = blockIdx.x * WARPS + threadIdx.x / WARP;
    Loads<T, Args> loads(a, tile, tiles);
    uint4 table[STEPS][T];
    if (loads.more()) {
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) loads.load(table[step], step);
        loads.advance();
    }
    let_next_kernel_start();
    wait_for_previous_kernel();

    const auto copy_chunk = [&](u32 chunk, u32 to) {
        const u32 count = min(a.chunk, a.blocks - chunk * a.chunk) * STEPS * step_bytes / 16;
        const u8* from = a.parts + u64(chunk) * chunk_bytes;
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            copy_async(shared + to * chunk_bytes + 16 * i, from + 16 * i, true);
        }
        copy_async_commit();
    };
    copy_chunk(0, 0);
    u32 here = 0;
    for (u32 round = 0; round < rounds; round++) {
        Sum sums[M][T][4] = {};
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            if (chunks > 1 || round == 0) {
                copy_async_wait<0>();
                // This chunk is there for all, and all are done with the one before it.
                __syncthreads();
            }
            const u8* parts = shared + here * chunk_bytes;
            const bool last = chunk + 1 == chunks;
            if (chunks > 1 && !(last && round + 1 == rounds)) {
                here ^= 1;
                copy_chunk(last ? 0 : chunk + 1, here);
            }
            if (tile >= tiles) continue;
            const u32 end = min(a.chunk, a.blocks - chunk * a.chunk);
            for (u32 block = 0; block < end; block++) {
#pragma unroll
                for (u32 step = 0; step < STEPS; step++) {
                    multiply(sums, table[step], parts);
                    parts += step_bytes;
                    if (loads.more()) loads.load(table[step], step);
                }
                if (loads.more()) loads.advance();
            }
        }
        if (tile < tiles) store(tile, sums);
        tile += warps;
    }
}

template <typename Float, bool few, int M, int T>
DEVICE void lm_head(const LmHeadArgs& a, u8* shared) {
    const u32 part_rows = few ? a.rows : 16 * M;
    const auto multiply = [&](float (&sums)[M][T][4], const uint4 (&table)[T], const u8* parts) {
        multiply_step<Float, few, M, T>(sums, table, parts, part_rows);
    };
    const auto store = [&](u32 tile, const float (&sums)[M][T][4]) {
        const u32 lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int half = 0; half < (few ? 1 : 2); half++) {
                const u32 row = 16 * m + 8 * half + lane / 4;
                if (row >= a.rows) continue;
                const float factor = a.factors[row];
                float* logits = a.logits + u64(row) * a.vocabulary;
#pragma unroll
                for (int i = 0; i < T; i++) {
                    const u32 token = 8 * (T * tile + i) + 2 * (lane % 4);
                    if (token < a.vocabulary) logits[token] = sums[m][i][2 * half] * factor;
                    if (token + 1 < a.vocabulary) logits[token + 1] = sums[m][i][2 * half + 1] * factor;
                }
            }
        }
    };
    project<float, M, T>(a, shared, part_rows, multiply, store);
}

// What follows a name is the rows of the input, at most; then whether they are few, tiles of 16 of them,
// tiles of the table at a time, which share what is read of the input, and the blocks of a
// multiprocessor that leave registers enough.
#define HEAD(type, Float, rows, few, M, T, blocks)                              \
    KERNEL_AT_LEAST(lm_head_##type##_##rows, LmHeadArgs, THREADS, blocks) {     \
        DYNAMIC_SHARED(shared);                                                 \
        lm_head<Float, few, M, T>(a, shared);                                   \
    }
#define HEADS(type, Float)                   \
    HEAD(type, Float, 8, true, 1, 2, 3)      \
    HEAD(type, Float, 16, false, 1, 2, 3)    \
    HEAD(type, Float, 32, false, 2, 2, 2)    \
    HEAD(type, Float, 64, false, 4, 4, 1)

HEADS(bf16, Bf16)
HEADS(f16, F16)

// Where only the best token is wanted: bounds on all logits from a copy of the table in int8, then the
// logits of those that may be the best. (The copy is `lm_head_quantize.cu`'s.)
//
// With a row of the table `w = s q + e`, `q` of 8 bits, and a row of the input `x = r p + f`, `p` of 15
// bits in two parts of 8, the sum of `q p` is exact. `w·x − s r q·p = e·x + s q·f`, which by
// Cauchy and Schwarz is at most `|e| |x| + |s q| |f|`. The logit that `lm_head` computes differs from
// `w·x` by what the parts of x leave out, at most 2⁻¹⁷ of each product, and by the rounding of its sums:
// an instruction adds 16 products and a sum with at least 23 bits each, below the largest of them
// (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021), so it
// errs by at most 18 · 2⁻²³ of `Σ |w x| ≤ |w| |x|`. `lm_head_rows.cu` adds that up. No token whose
// upper bound is below the best lower bound can be the best, or as good: the rest is computed by the
// instructions of `lm_head`, in their order, which gives its bits.
struct LmHeadScreenArgs {
    const i8* table;
    // Of each row of the table: `s`, a bound on `|e|`, one on `|w| + |e|`, and nothing.
    const float4* bounds;
    const u8* parts;
    // Of each row of the input: `r`, a bound on `|x|`, one on all that is in proportion to `|w|`.
    const float4* row_bounds;
    // Upper bounds, in the place of the logits.
    float* upper;
    // Of each row `order_of` the best lower bound, 0 before.
    u32* floors;
    u64 stride;
    u32 rows;
    u32 vocabulary;
    u32 blocks;
    u32 chunk;
};

// Beyond these no bound is relied on.
constexpr float LEAST_SCREENED = 1e-30f;
constexpr float MOST_SCREENED = 1e30f;

// One step of both parts of up to 8 rows: they are rows `g` and `g + 8` of the operand.
template <int T>
DEVICE void multiply_int8(i32 (&sums)[T][4], const uint4 (&table)[T], const u8* parts, u32 part_rows) {
    const u32 lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint4 own = make_uint4(0, 0, 0, 0);
        if (lane / 4 < part_rows) own = reinterpret_cast<const uint4*>(parts)[half * 4 * part_rows + lane];
        const u32 rows[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
        for (int i = 0; i < T; i++) {
            const u32 columns[2] = {half ? table[i].z : table[i].x, half ? table[i].w : table[i].y};
            mma_s8(sums[i], rows, columns);
        }
    }
}
// The sum of `q p` for one of a lane's two columns.
DEVICE float int8_sum(const i32 (&sums)[4], u32 column) {
    return static_cast<float>(sums[column]) * 128.0f + static_cast<float>(sums[column + 2]);
}

KERNEL_AT_LEAST(lm_head_screen, LmHeadScreenArgs, THREADS, 3) {
    DYNAMIC_SHARED(shared);
    constexpr int T = 2;
    const u32 lane = threadIdx.x % WARP;
    const u32 row = lane / 4;
    u32 best = 0;
    const auto multiply = [&](i32 (&sums)[1][T][4], const uint4 (&table)[T], const u8* parts) {
        multiply_int8(sums[0], table, parts, a.rows);
    };
    const auto store = [&](u32 tile, const i32 (&sums)[1][T][4]) {
        if (row >= a.rows) return;
        const float4 of_row = a.row_bounds[row];
#pragma unroll
        for (int i = 0; i < T; i++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
                const u32 token = 8 * (T * tile + i) + 2 * (lane % 4) + column;
                if (token >= a.vocabulary) continue;
                const float4 of_token = a.bounds[token];
                const float middle = int8_sum(sums[0][i], column) * (of_token.x * of_row.x);
                const float bound = of_token.y * of_row.y + of_token.z * of_row.z;
                float upper = middle + bound;
                if (fabsf(middle) + bound < MOST_SCREENED) {
                    best = max(best, order_of(middle - bound));
                } else {
                    upper = __uint_as_float(INFINITE_BITS);
                }
                a.upper[u64(row) * a.vocabulary + token] = upper;
            }
        }
    };
    project<i32, 1, T>(a, shared, a.rows, multiply, store);
    best = max(best, __shfl_xor_sync(0xffffffffu, best, 1));
    best = max(best, __shfl_xor_sync(0xffffffffu, best, 2));
    if (row < a.rows && lane % 4 == 0 && best != 0) atomicMax(&a.floors[row], best);
}

// The head in int8 by itself: the middle between the bounds, whose sum is exact, so a row's logits are
// its own in every batch.
struct LmHeadInt8Args {
    const i8* table;
    // As for the screen, the last of each: NaN of a row of the table that has no int8 values, else 0.
    const float4* bounds;
    const u8* parts;
    const float4* row_bounds;
    // `NOT_FINITE` for a row of the input that has no int8 values.
    const u32* floors;
    const float* factors;
    float* logits;
    u64 stride;
    u32 rows;
    u32 vocabulary;
    u32 blocks;
    u32 chunk;
};

KERNEL_AT_LEAST(lm_head_int8, LmHeadInt8Args, THREADS, 3) {
    DYNAMIC_SHARED(shared);
    constexpr int T = 2;
    const u32 lane = threadIdx.x % WARP;
    const u32 row = lane / 4;
    const auto multiply = [&](i32 (&sums)[1][T][4], const uint4 (&table)[T], const u8* parts) {
        multiply_int8(sums[0], table, parts, a.rows);
    };
    const auto store = [&](u32 tile, const i32 (&sums)[1][T][4]) {
        if (row >= a.rows) return;
        const float unit = a.floors[row] == NOT_FINITE ? __uint_as_float(NAN_BITS) : a.row_bounds[row].x;
        const float factor = a.factors[row];
#pragma unroll
        for (int i = 0; i < T; i++) {
#pragma unroll
            for (int column = 0; column < 2; column++) {
                const u32 token = 8 * (T * tile + i) + 2 * (lane % 4) + column;
                if (token >= a.vocabulary) continue;
                const float4 of_token = a.bounds[token];
                const float logit = int8_sum(sums[0][i], column) * (of_token.x * unit) * factor;
                a.logits[u64(row) * a.vocabulary + token] = logit + of_token.w;
            }
        }
    };
    project<i32, 1, T>(a, shared, a.rows, multiply, store);
}

struct LmHeadRescoreArgs {
    const u8* table;
    const u8* parts;
    const float* factors;
    const float* upper;
    const u32* floors;
    const SampleRow* options;
    // As in `sample_greedy.cu`, whose place this takes.
    u64* bests;
    u32* done;
    u32* tokens;
    u32* sampled;
    float* logprobs;
    u64 stride;
    u32 rows;
    u32 vocabulary;
    u32 blocks;
    u32 first;
    u32 pieces;
    u32 lanes;
};

// Tokens that a thread looks at.
constexpr u32 LOADS = 8;
// Bytes of the table in shared memory: many steps of 8 rows, or few of 64.
constexpr u32 RESCORED_BYTES = 8192;
constexpr u32 MOST_STEPS = RESCORED_BYTES / (8 * 64);

// The best of the listed tokens of a row, their logits computed as `lm_head` does. By all threads.
template <typename Float>
DEVICE u64 rescore(const LmHeadRescoreArgs& a, u32 row, const u32* list, u32 listed) {
    __shared__ uint4 table[RESCORED_BYTES / 16];
    __shared__ uint4 parts[MOST_STEPS * 8 * 8];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 columns = listed <= 8 ? 8 : 64;
    const u32 chunk = RESCORED_BYTES / (columns * 64);
    const u32 steps = a.blocks * STEPS;
    u64 best = 0;
    for (u32 start = 0; start < listed; start += columns) {
        float sums[1][1][4] = {};
        for (u32 step = 0; step < steps; step += chunk) {
            const u32 count = min(chunk, steps - step);
            __syncthreads(); // all are done with the last chunk
            // Step by step, the 4 lanes of each of the columns.
            for (u32 i = threadIdx.x; i < count * columns * 4; i += THREADS) {
                const u32 column = min(start + i / 4 % columns, listed - 1);
                const u8* from = a.table + list[column] * a.stride + (step + i / 4 / columns) * 64 + i % 4 * 16;
                copy_async(table + i, from, true);
            }
            for (u32 i = threadIdx.x; i < count * 8 * a.rows; i += THREADS) {
                copy_async(parts + i, a.parts + step * 128 * a.rows + 16 * i, true);
            }
            copy_async_commit();
            copy_async_wait<0>();
            __syncthreads();
            if (8 * warp >= columns) continue;
            for (u32 s = 0; s < count; s++) {
                const uint4 own[1] = {table[(s * columns + 8 * warp) * 4 + lane]};
                const u8* rows = reinterpret_cast<const u8*>(parts + s * 8 * a.rows);
                multiply_step<Float, true, 1, 1>(sums, own, rows, a.rows);
            }
        }
        if (8 * warp >= columns || lane / 4 != row) continue;
        for (u32 column = 0; column < 2; column++) {
            const u32 at = start + 8 * warp + 2 * (lane % 4) + column;
            if (at >= listed) continue;
            const u64 own = ranked(order_of(sums[0][0][column] * a.factors[row]), list[at]);
            best = own > best ? own : best;
        }
    }
    return reduce_block(best, Most());
}

template <typename Float>
DEVICE void lm_head_rescore(const LmHeadRescoreArgs& a) {
    __shared__ u32 list[LOADS * THREADS];
    __shared__ u32 listed;
    __shared__ bool last;
    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 row = blockIdx.x / a.pieces, piece = blockIdx.x % a.pieces;
    const u32 out = a.first + row;
    const u32 lane = a.options[out].lane;
    u32 floor = a.floors[row];
    // Logits that are all but zero lose bits with their row's factor, and different ones become equal.
    if (floor != NOT_FINITE && fabsf(value_of_order(floor)) * a.factors[row] < LEAST_SCREENED) floor = 0;
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    // Of padding nothing is wanted, and of a row that is not finite there is nothing to be found.
    if (lane != NONE && floor != NOT_FINITE) {
        const u32 start = piece * LOADS * THREADS + threadIdx.x;
        float x[LOADS];
#pragma unroll
        for (u32 n = 0; n < LOADS; n++) {
            const u32 token = min(start + n * THREADS, a.vocabulary - 1);
            x[n] = a.upper[u64(row) * a.vocabulary + token];
        }
#pragma unroll
        for (u32 n = 0; n < LOADS; n++) {
            // Infinity counts as above all.
            if (start + n * THREADS < a.vocabulary && order_of(x[n]) >= floor) {
                list[atomicAdd(&listed, 1u)] = start + n * THREADS;
            }
        }
    }
    __syncthreads();
    u64 best = floor == NOT_FINITE ? ranked(NOT_FINITE, 0) : 0;
    if (listed > 0) best = rescore<Float>(a, row, list, listed);
    u64* bests = a.bests + u64(row) * a.pieces;
    if (threadIdx.x == 0) {
        bests[piece] = best;
        // What is written before the count is seen by whoever sees the count.
        __threadfence();
        last = atomicAdd(&a.done[row], 1u) + 1 == a.pieces;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    best = 0;
    for (u32 i = threadIdx.x; i < a.pieces; i += THREADS) best = bests[i] > best ? bests[i] : best;
    best = reduce_block(best, Most());
    if (threadIdx.x != 0) return;
    a.done[row] = 0;
    const bool finite = order_of_ranked(best) != NOT_FINITE;
    const u32 token = lane != NONE && finite ? token_of_ranked(best) : NONE;
    a.tokens[out] = token;
    a.logprobs[out] = lane != NONE && !finite ? __uint_as_float(NAN_BITS) : 0.0f;
    if (lane < a.lanes) a.sampled[lane] = token;
}

KERNEL(lm_head_rescore_bf16, LmHeadRescoreArgs, THREADS) { lm_head_rescore<Bf16>(a); }
KERNEL(lm_head_rescore_f16, LmHeadRescoreArgs, THREADS) { lm_head_rescore<F16>(a); }
