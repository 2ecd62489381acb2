// `ops::PagedAttention` in f32 on the plain cores, for any cache and even width: a block for each
// tile of rows, over all blocks of 256 keys in a loop or over one of them.
//
// In a block of keys
//
// 1. a thread has a key: its scores with all rows of the tile, a chain over the elements;
// 2. a warp has a row: highest score, weights, and their sum, a chain over every 32nd key and then
//    a tree over the lanes, neighbours first; a weight that is less than zero says that the row
//    does not see the key;
// 3. a thread has four elements of the values and every `groups`th key, a chain for each row;
// 4. a thread has four elements of a row's output: the sum over the groups, ascending.
//
// Of an int8 cache the scales are the last factor of a score and of the weight that a value gets.
// None of this depends on the tile or on the other blocks.
#include "prelude.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr u32 KEYS = THREADS; // of a block, a thread each
// Groups of threads at most that go through the values. Few make the sum over them short.
constexpr u32 GROUPS = 32;

// Eight elements of the cache.
DEVICE void load_eight(const float* row, float (&x)[8]) {
    const float4* at = reinterpret_cast<const float4*>(row);
    for (int i = 0; i < 2; i++) {
        const float4 four = at[i];
        x[4 * i] = four.x;
        x[4 * i + 1] = four.y;
        x[4 * i + 2] = four.z;
        x[4 * i + 3] = four.w;
    }
}
DEVICE void load_eight(const u16* row, float (&x)[8]) {
    const uint4 words = *reinterpret_cast<const uint4*>(row);
    const u32 pairs[4] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < 4; i++) {
        x[2 * i] = half_to_float(pairs[i] & 0xffffu);
        x[2 * i + 1] = half_to_float(pairs[i] >> 16);
    }
}
DEVICE float int8_of(u32 word, int i) { return static_cast<float>(static_cast<i8>(word >> (8 * i))); }
DEVICE void load_eight(const i8* row, float (&x)[8]) {
    const uint2 words = *reinterpret_cast<const uint2*>(row);
    for (int i = 0; i < 4; i++) {
        x[i] = int8_of(words.x, i);
        x[4 + i] = int8_of(words.y, i);
    }
}
DEVICE float4 load_four(const i8* row) {
    const u32 word = *reinterpret_cast<const u32*>(row);
    return make_float4(int8_of(word, 0), int8_of(word, 1), int8_of(word, 2), int8_of(word, 3));
}
DEVICE float4 load_four(const float* row) { return *reinterpret_cast<const float4*>(row); }
DEVICE float4 load_four(const u16* row) {
    const uint2 words = *reinterpret_cast<const uint2*>(row);
    return make_float4(half_to_float(words.x & 0xffffu), half_to_float(words.x >> 16),
        half_to_float(words.y & 0xffffu), half_to_float(words.y >> 16));
}

DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE float4 scaled(float weight, float4 v, float4 sum) {
    return make_float4(__fmaf_rn(weight, v.x, sum.x), __fmaf_rn(weight, v.y, sum.y),
        __fmaf_rn(weight, v.z, sum.z), __fmaf_rn(weight, v.w, sum.w));
}
DEVICE float4 joined(const Join& join, float4 all, float4 one) {
    return make_float4(join(all.x, one.x), join(all.y, one.y), join(all.z, one.z), join(all.w, one.w));
}

// What shared memory the launch brings: `queries[ROWS][stride]`, `weights[ROWS][KEYS]`, then
// `sums[ROWS][THREADS]` of four.
template <typename T, int ROWS>
DEVICE void paged_attention(const AttentionArgs& a) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 pages[KEYS / PAGE];
    __shared__ u32 seen_of[ROWS];
    __shared__ float highest_of[ROWS];
    __shared__ float sum_of[ROWS];
    __shared__ float all_highest[ROWS];
    __shared__ float all_sum[ROWS];
    float* queries = reinterpret_cast<float*>(memory);
    float* weights = queries + ROWS * a.stride;
    float4* sums = reinterpret_cast<float4*>(weights + ROWS * KEYS);

    wait_for_previous_kernel();
    let_next_kernel_start();
    const u32 thread = threadIdx.x;
    const AttentionTile tile(a, THREADS);
    if (tile.tokens == 0) return;
    const u32 rows = tile.rows();

    if (thread < ROWS) {
        seen_of[thread] = thread < rows ? tile.seen(a, tile.first + thread / tile.heads) : 0;
        all_highest[thread] = nothing_yet();
        all_sum[thread] = 0.0f;
    }
    __syncthreads();
    // The keys that any row sees.
    u32 least = NONE;
    u32 most = 0;
    for (u32 r = 0; r < rows; r++) {
        least = min(least, seen_of[r]);
        most = max(most, seen_of[r]);
    }
    least = unseen_keys(a, least);
    const u32 blocks = (most + KEYS - 1) / KEYS;
    const u32 first_block = least / KEYS + (a.parts ? blockIdx.y : 0);
    const u32 end_block = a.parts ? min(blocks, first_block + 1) : blocks;
    if (a.parts && first_block >= blocks) return;

    for (u32 i = thread; i < ROWS * a.stride; i += THREADS) {
        const u32 r = i / a.stride;
        const u32 e = i % a.stride;
        const bool there = r < rows && seen_of[r] > 0 && e < a.dim;
        queries[i] = there ? tile.query(a, tile.first + r / tile.heads, tile.head + r % tile.heads, e) * a.scale : 0.0f;
    }
    const T* keys = static_cast<const T*>(a.keys);
    const T* values = static_cast<const T*>(a.values);
    if (a.slots && end_block == blocks) {
        // The token's own key and value: every tile that reads them writes them, the same bits.
        const u32 slot = a.slots[tile.first];
        if (slot < a.pages * PAGE && most > 0) {
            T* key = cache_row(static_cast<T*>(a.keys), slot, tile.kv_head, a.kv, a.stride);
            T* value = cache_row(static_cast<T*>(a.values), slot, tile.kv_head, a.kv, a.stride);
            if constexpr (SCALED<T>) {
                const u32 lane = thread % WARP;
                if (thread / WARP == 0) {
                    const Int8Row row = tile.new_key_row(a, tile.first);
                    for (u32 i = lane; i < a.stride; i += WARP) key[i] = row(tile.new_key(a, tile.first, i));
                    if (lane == 0) *tile.scale(a, a.keys, slot) = row.scale;
                } else if (thread / WARP == 1) {
                    const Int8Row row = tile.new_value_row(a, tile.first);
                    for (u32 i = lane; i < a.stride; i += WARP) value[i] = row(tile.new_value(a, tile.first, i));
                    if (lane == 0) *tile.scale(a, a.values, slot) = row.scale;
                }
            } else {
                for (u32 i = thread; i < a.stride; i += THREADS) tile.new_element(a, tile.first, i, key[i], value[i]);
            }
        }
    }

    const u32 quads = a.stride / 4;
    const u32 quad = thread % quads;
    const u32 group = thread / quads;
    const u32 groups = min(GROUPS, THREADS / quads);
    float4 all[ROWS];
    for (int k = 0; k < ROWS; k++) all[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);

    for (u32 block = first_block; block < end_block; block++) {
        const u32 start = block * KEYS;
        if (thread < KEYS / PAGE) pages[thread] = tile.page(a, start / PAGE + thread);
        __syncthreads(); // and what was written to queries, to the cache, and read of sums

        if (start + thread < most && start + thread >= least) {
            float scores[ROWS] = {};
            const u32 page = pages[thread / PAGE];
            if (page == NONE) {
                for (int r = 0; r < ROWS; r++) scores[r] = __uint_as_float(NAN_BITS);
            } else {
                const T* key = cache_row(keys, page * PAGE + thread % PAGE, tile.kv_head, a.kv, a.stride);
#pragma unroll 1
                for (u32 e = 0; e < a.stride; e += 8) {
                    float k[8];
                    load_eight(key + e, k);
                    for (int r = 0; r < ROWS; r++) {
                        const float* q = queries + r * a.stride + e;
                        for (int i = 0; i < 8; i++) scores[r] = __fmaf_rn(q[i], k[i], scores[r]);
                    }
                }
                if constexpr (SCALED<T>) {
                    const float scale = *tile.scale(a, a.keys, page * PAGE + thread % PAGE);
                    for (int r = 0; r < ROWS; r++) scores[r] *= scale;
                }
            }
            for (int r = 0; r < ROWS; r++) weights[r * KEYS + thread] = scores[r];
        }
        __syncthreads();

        for (u32 r = thread / WARP; r < rows; r += WARPS) {
            const u32 lane = thread % WARP;
            const Seen sees(unseen_keys(a, seen_of[r]), seen_of[r], start, KEYS);
            float scores[KEYS / WARP];
            float highest = nothing_yet();
            for (int i = 0; i < int(KEYS / WARP); i++) {
                const u32 key = lane + i * WARP;
                scores[i] = sees(key) ? weights[r * KEYS + key] : unseen_score();
                highest = fmaxf(highest, scores[i]); // of a number and NaN, the number
            }
            highest = reduce_warp(highest, [](float x, float y) { return fmaxf(x, y); });
            float sum = 0.0f;
            for (int i = 0; i < int(KEYS / WARP); i++) {
                const u32 key = lane + i * WARP;
                float weight = exp_exact(scores[i] - highest);
                sum += weight;
                if constexpr (SCALED<T>) {
                    const u32 page = pages[key / PAGE];
                    if (scores[i] != unseen_score() && page != NONE) weight *= *tile.scale(a, a.values, page * PAGE + key % PAGE);
                }
                weights[r * KEYS + key] = scores[i] != unseen_score() ? weight : -1.0f;
            }
            sum = reduce_warp(sum, Add());
            if (lane == 0) {
                highest_of[r] = highest;
                sum_of[r] = sum;
            }
        }
        __syncthreads();

        if (group < groups) {
            float4 out[ROWS];
            for (int r = 0; r < ROWS; r++) out[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const u32 skipped = least > start ? (least - start) / groups * groups : 0;
            const u32 end = min(most - start, KEYS);
#pragma unroll 2
            for (u32 key = skipped + group; key < end; key += groups) {
                const u32 page = pages[key / PAGE];
                if (page == NONE) continue; // its weights are NaN, and so is their sum
                const u32 slot = page * PAGE + key % PAGE;
                const float4 v = load_four(cache_row(values, slot, tile.kv_head, a.kv, a.stride) + 4 * quad);
                for (int r = 0; r < ROWS; r++) {
                    const float weight = weights[r * KEYS + key];
                    if (!(weight < 0.0f)) out[r] = scaled(weight, v, out[r]);
                }
            }
            for (int r = 0; r < ROWS; r++) sums[r * THREADS + thread] = out[r];
        }
        __syncthreads();

        for (int k = 0; k < ROWS; k++) {
            const u32 item = thread + k * THREADS;
            const u32 r = item / quads;
            const u32 q = item % quads;
            if (r >= rows) continue;
            float4 one = sums[r * THREADS + q];
#pragma unroll 1
            for (u32 g = 1; g < groups; g++) one = add(one, sums[r * THREADS + g * quads + q]);
            if (a.parts) {
                const u32 head = tile.head + r % tile.heads;
                const u64 part = (u64(tile.first) * a.query + head) * a.parts + block - least / KEYS;
                reinterpret_cast<float4*>(a.outs + part * a.stride)[q] = one;
                if (q == 0) a.statistics[part] = make_float2(highest_of[r], sum_of[r]);
            } else {
                all[k] = joined(Join(all_highest[r], highest_of[r]), all[k], one);
            }
        }
        __syncthreads();
        if (thread < rows) {
            const Join join(all_highest[thread], highest_of[thread]);
            all_highest[thread] = join.highest;
            all_sum[thread] = join(all_sum[thread], sum_of[thread]);
        }
    }
    if (a.parts) return;

    __syncthreads();
    for (int k = 0; k < ROWS; k++) {
        const u32 item = thread + k * THREADS;
        const u32 r = item / quads;
        const u32 q = item % quads;
        if (r >= rows) continue;
        const float out[4] = {all[k].x, all[k].y, all[k].z, all[k].w};
        float* to = a.output + (u64(tile.first + r / tile.heads) * a.query + tile.head + r % tile.heads) * a.dim;
        for (u32 e = 0; e < 4; e++) {
            if (4 * q + e < a.dim) to[4 * q + e] = seen_of[r] > 0 ? attended(out[e], all_sum[r]) : 0.0f;
        }
    }
}

KERNEL(paged_attention_f32_1, AttentionArgs, THREADS) { paged_attention<float, 1>(a); }
KERNEL(paged_attention_f32_4, AttentionArgs, THREADS) { paged_attention<float, 4>(a); }
KERNEL(paged_attention_f32_8, AttentionArgs, THREADS) { paged_attention<float, 8>(a); }
KERNEL(paged_attention_f16_1, AttentionArgs, THREADS) { paged_attention<u16, 1>(a); }
KERNEL(paged_attention_f16_4, AttentionArgs, THREADS) { paged_attention<u16, 4>(a); }
KERNEL(paged_attention_f16_8, AttentionArgs, THREADS) { paged_attention<u16, 8>(a); }
KERNEL(paged_attention_int8_1, AttentionArgs, THREADS) { paged_attention<i8, 1>(a); }
KERNEL(paged_attention_int8_4, AttentionArgs, THREADS) { paged_attention<i8, 4>(a); }
KERNEL(paged_attention_int8_8, AttentionArgs, THREADS) { paged_attention<i8, 8>(a); }
