// `ops::PagedAttention` on tensor cores, over a cache of f16 or int8 with heads of a multiple of 16
// elements up to 256. One arithmetic for every row, alone in its tile or among 15 others:
//
// 1. A query times the scale, times a power of two that puts its largest element at 2^10, in two
//    f16: `high + low` is it to 22 bits, and nothing overflows.
// 2. The scores of a part of 64 keys, 32 elements at a time, ascending: low, then high halves.
// 3. The part's highest score; weights `2^15 · exp(score − highest)`, which keeps small ones in the
//    range of f16; their sum, by lane and then over the four lanes that share a row; and the weights
//    in two f16.
// 4. The sum of weighted values of the part, 16 keys at a time, ascending: low, then high halves.
// 5. Parts are joined in ascending order, in f32 (`Join`).
//
// The integers of an int8 cache become f16 on their way from the cache, exactly. Their scales are
// factors of the scores in step 3 and of the weights in step 4, there divided by a power of two that
// is above all of the row, so that they keep the range of f16; the sums are multiplied by it.
//
// A tile's row that sees less of a part than others has weights of zero there, which change nothing;
// of parts before the first that a row sees it has sums of zero, and joins to them what follows.
// Two forms share this: a warp for each part of the keys (few rows), and a warp for each 16 rows.
//
// Operands are permuted so that a lane reads 16 bytes at a time from the cache as it is. In step 2
// element `8 t + i` of 32 stands where the instruction has its column `2 t + i % 2 + 8 (i / 2 % 2)`
// of multiplication `i / 4`, for queries and keys alike; in step 4 column `g` of multiplication `j`
// is element `8 g + j` of 64.
#include "prelude.cuh"

// Keys of a part, and rows of a tensor core's tile.
constexpr u32 PART = 64;
constexpr u32 TILE = 16;

// Of heads of `chunks` (1, 2 or 4) times 64 elements: warps of a block by keys, and 16 rows each that
// a block by rows has. What has room in 99 KiB.
DEVICE constexpr u32 key_warps(int chunks) { return chunks <= 2 ? 4 : 2; }
DEVICE constexpr u32 row_warps(int chunks) { return chunks <= 2 ? 4 : 2; }
constexpr int MMA_THREADS = 128;
// Bytes of a row in shared memory.
DEVICE constexpr u32 row_bytes(int chunks) { return 128 * chunks; }

// Rows in shared memory are pieces of 16 bytes in an order that lets eight lanes read eight banks of
// 16 bytes: two rows by four pieces of queries and keys, four pairs of rows by two pieces of values.
DEVICE u32 piece_of_key(u32 piece, u32 row) { return (piece ^ ((row & 1) << 2)) * 16; }
DEVICE u32 piece_of_value(u32 piece, u32 row) { return (piece ^ ((row >> 1 & 3) << 1)) * 16; }

// Where the lane's piece `c` of 32 elements of row `g` is, and so, 8 rows further each, of its others;
// and that of 64 elements of values, in row `2 t`: the order above depends on the lane alone.
template <int CHUNKS>
DEVICE u32 lane_of_key(int c) {
    const u32 g = threadIdx.x % WARP / 4;
    const u32 even = g * row_bytes(CHUNKS) + piece_of_key(threadIdx.x % 4, g);
    return (c % 2 ? even ^ 64 : even) + c / 2 * 128;
}
template <int CHUNKS>
DEVICE u32 lane_of_value(int chunk) {
    const u32 row = threadIdx.x % 4 * 2;
    return row * row_bytes(CHUNKS) + piece_of_value(threadIdx.x % WARP / 4, row) + chunk * 128;
}

DEVICE u32 pair(u16 low, u16 high) { return u32(low) | u32(high) << 16; }

// Step 1, by a warp, for row `row` of a tile: its two halves, and what scores are multiplied by. A
// row that is not there is zeros.
template <int CHUNKS>
DEVICE float stage_query(u8* high, u8* low, u32 row, bool there, const AttentionArgs& a,
    const AttentionTile& tile, u32 token, u32 head) {
    const u32 lane = threadIdx.x % WARP;
    float x[2 * CHUNKS];
    u32 most = 0;
    for (int k = 0; k < 2 * CHUNKS; k++) {
        const u32 e = lane + k * WARP;
        x[k] = there && e < a.dim ? tile.query(a, token, head, e) * a.scale : 0.0f;
        most = max(most, magnitude_bits(x[k]));
    }
    most = reduce_warp(most, Most());
    // Both powers are normal numbers.
    const i32 exponent = max(static_cast<i32>(most >> 23) - 127, -100);
    const i32 up = most >= INFINITE_BITS ? 0 : 10 - exponent;
    const float factor = power_of_two(static_cast<float>(up));
    for (int k = 0; k < 2 * CHUNKS; k++) {
        const u32 e = lane + k * WARP;
        const u32 at = row * row_bytes(CHUNKS) + piece_of_key(e / 8, row) + e % 8 * 2;
        const float scaled = x[k] * factor;
        const u16 upper = float_to_half(scaled);
        *reinterpret_cast<u16*>(high + at) = upper;
        *reinterpret_cast<u16*>(low + at) = float_to_half(scaled - half_to_float(upper));
    }
    return power_of_two(static_cast<float>(-up));
}

DEVICE uint4 load_piece(const u8* from) { return *reinterpret_cast<const uint4*>(from); }

// Four and eight integers as f16: a byte is the end of the fraction of 1024 + 128 + it.
DEVICE uint2 halves_of(u32 bytes) {
    const u32 shifted = bytes ^ 0x80808080u;
    return make_uint2(sub_halves(__byte_perm(shifted, 0x64646464u, 0x4140), 0x64806480u),
        sub_halves(__byte_perm(shifted, 0x64646464u, 0x4342), 0x64806480u));
}
DEVICE uint4 halves_of(u32 low, u32 high) {
    const uint2 first = halves_of(low);
    const uint2 last = halves_of(high);
    return make_uint4(first.x, first.y, last.x, last.y);
}
// Eight elements of the cache as f16.
DEVICE uint4 load_halves(const u16* from) { return *reinterpret_cast<const uint4*>(from); }
DEVICE uint4 load_halves(const i8* from) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(from);
    return halves_of(bytes.x, bytes.y);
}
// An integer as f16.
DEVICE u16 half_of(i8 q) { return float_to_half(static_cast<float>(q)); }

// The scales of the lane's keys, or values, of a part: of numbers `8 n + 2 t` and the next.
struct Scales {
    float2 of[8];

    DEVICE_METHOD Scales(const AttentionArgs& a, const AttentionTile& tile, void* cache, const u32 (&page)[2]) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const u32 found = n < 4 ? page[0] : page[1];
            const u32 slot = found * PAGE + 8 * n % PAGE + threadIdx.x % 4 * 2;
            of[n] = found == NONE ? make_float2(1.0f, 1.0f) : *reinterpret_cast<const float2*>(tile.scale(a, cache, slot));
        }
    }
    // What a key or value has that is not in the cache yet.
    DEVICE_METHOD void set(u32 key, float scale) {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const u32 first = 8 * n + threadIdx.x % 4 * 2;
            if (key == first) of[n].x = scale;
            if (key == first + 1) of[n].y = scale;
        }
    }
    DEVICE_METHOD float operator()(int n, int i) const { return i == 0 ? of[n].x : of[n].y; }
};

// Step 2. `key(n, c)` is the lane's piece of key `8 n + g`: elements `32 c + 8 t ..`. Pieces of
// `AHEAD` times 8 keys are asked for before the first of them is needed; of none, one by one.
template <int CHUNKS, int AHEAD, typename Key>
DEVICE void score(float (&scores)[8][4], const u8* high, const u8* low, Key key) {
    constexpr int KEYS = AHEAD > 0 ? AHEAD : 8;
#pragma unroll
    for (int n = 0; n < 8; n++) {
        for (int i = 0; i < 4; i++) scores[n][i] = 0.0f;
    }
#pragma unroll
    for (int first = 0; first < 8; first += KEYS) {
        if (AHEAD > 0 && CHUNKS > 2) __syncwarp(); // keeps loads from being moved up here
        uint4 ahead[AHEAD > 0 ? AHEAD : 1][2 * CHUNKS];
        if (AHEAD > 0) {
#pragma unroll
            for (int n = 0; n < AHEAD; n++) {
#pragma unroll
                for (int c = 0; c < 2 * CHUNKS; c++) ahead[n][c] = key(first + n, c);
            }
        }
#pragma unroll
        for (int c = 0; c < 2 * CHUNKS; c++) {
            const u32 at = lane_of_key<CHUNKS>(c);
            const u32 below = 8 * row_bytes(CHUNKS);
            const uint4 l0 = load_piece(low + at);
            const uint4 l8 = load_piece(low + at + below);
            const uint4 h0 = load_piece(high + at);
            const uint4 h8 = load_piece(high + at + below);
            const u32 lows[2][4] = {{l0.x, l8.x, l0.y, l8.y}, {l0.z, l8.z, l0.w, l8.w}};
            const u32 highs[2][4] = {{h0.x, h8.x, h0.y, h8.y}, {h0.z, h8.z, h0.w, h8.w}};
#pragma unroll
            for (int n = 0; n < KEYS; n++) {
                const uint4 piece = AHEAD > 0 ? ahead[AHEAD > 0 ? n : 0][c] : key(first + n, c);
                const u32 even[2] = {piece.x, piece.y};
                const u32 odd[2] = {piece.z, piece.w};
                mma_f16(scores[first + n], lows[0], even);
                mma_f16(scores[first + n], lows[1], odd);
                mma_f16(scores[first + n], highs[0], even);
                mma_f16(scores[first + n], highs[1], odd);
            }
        }
    }
}

// Of the lane's two rows, `g` and `g + 8` of a tile, in a part.
struct Weights {
    float highest[2];
    float sum[2];
    // Of an int8 cache: what sums of values are multiplied by.
    float up[2];
    // The weights as operands, by 16 keys.
    u32 high[4][4];
    u32 low[4][4];
};

// The scales of a cache that has none.
struct NoScales {};

// The factors of a row's weights, from those of the values that it sees, and what takes them back.
struct Factors {
    const Scales& scales;
    float down;
    float up;

    template <typename Shows>
    DEVICE_METHOD Factors(const Scales& scales, Shows shows) : scales(scales) {
        u32 most = 0;
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (shows(n, i)) most = max(most, magnitude_bits(scales(n, i)));
            }
        }
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
        // Scales are normal numbers far from the largest, so both powers are too.
        const float exponent = static_cast<float>(min(max(static_cast<i32>(most >> 23) - 126, -125), 125));
        down = power_of_two(-exponent);
        up = most >= INFINITE_BITS ? __uint_as_float(NAN_BITS) : power_of_two(exponent);
    }
    DEVICE_METHOD float operator()(int n, int i) const { return scales(n, i) * down; }
};
struct NoFactors {
    float up;

    template <typename Shows>
    DEVICE_METHOD NoFactors(const NoScales&, Shows) : up(1.0f) {}
    DEVICE_METHOD float operator()(int, int) const { return 1.0f; }
};
template <typename T> struct CacheOf {
    typedef NoScales Scaling;
    typedef NoFactors Factoring;
};
template <> struct CacheOf<i8> {
    typedef Scales Scaling;
    typedef Factors Factoring;
};

// Step 3. `sees` says which keys of the part each row sees; a bad page makes NaN of its keys. With
// `MARK` the scores of those that it does not see say so from then on: which way costs less registers
// depends on what else is in them.
template <typename T, bool MARK>
DEVICE void soften(Weights& w, float (&scores)[8][4], const float (&factor)[2], const Seen (&sees)[2],
    const bool (&bad)[2], const typename CacheOf<T>::Scaling& scales) {
    const u32 t = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const auto shows = [&](int n, int i) {
            return MARK ? scores[n][2 * r + i] != unseen_score() : sees[r](8 * n + 2 * t + i);
        };
        float highest = nothing_yet();
#pragma unroll
        for (int n = 0; n < 8; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& score = scores[n][2 * r + i];
                score = (n < 4 ? bad[0] : bad[1]) ? __uint_as_float(NAN_BITS) : score * factor[r];
                if (MARK && !sees[r](8 * n + 2 * t + i)) score = unseen_score();
                // Of a number and NaN, the number.
                if (MARK || shows(n, i)) highest = fmaxf(highest, score);
            }
        }
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        const typename CacheOf<T>::Factoring weighs(scales, shows);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 8; n++) {
            u16 high[2];
            u16 low[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float weight = exp_exact(scores[n][2 * r + i] - highest) * 32768.0f;
                const float seen = shows(n, i) ? weight : 0.0f;
                sum += seen;
                float weighed = seen;
                // A scale that the row does not see may be anything.
                if constexpr (SCALED<T>) weighed = seen * (shows(n, i) ? weighs(n, i) : 0.0f);
                high[i] = float_to_half(weighed);
                low[i] = float_to_half(weighed - half_to_float(high[i]));
            }
            w.high[n / 2][r + 2 * (n % 2)] = pair(high[0], high[1]);
            w.low[n / 2][r + 2 * (n % 2)] = pair(low[0], low[1]);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        w.sum[r] = sum + __shfl_xor_sync(0xffffffffu, sum, 2);
        w.highest[r] = highest;
        w.up[r] = weighs.up;
    }
}

// The last factor of the scores of keys that have scales.
DEVICE void scale_scores(float (&scores)[8][4], const Scales& scales) {
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) scores[n][i] *= scales(n, i % 2);
    }
}
// And of the sums of values that do.
DEVICE void scale_sums(float (&one)[8][4], const Weights& w) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) one[j][i] *= w.up[i / 2];
    }
}

// Takes NaN out of staged values of which some rows of the block see less than others, and notes for
// each column, a bit each, the keys that had one: zero times NaN would reach rows that do not see it.
// Looks at keys `from ..` of a part.
template <int CHUNKS>
DEVICE void take_nan_out(u8* values, u64* nan_of, u32& found, u32 from) {
#pragma unroll 1
    for (u32 i = from * 8 * CHUNKS + threadIdx.x; i < PART * 8 * CHUNKS; i += MMA_THREADS) {
        const u32 row = i / (8 * CHUNKS);
        const u32 piece = i % (8 * CHUNKS);
        u16* at = reinterpret_cast<u16*>(values + row * row_bytes(CHUNKS) + piece_of_value(piece, row));
        const uint4 words = *reinterpret_cast<const uint4*>(at);
        // No element is infinite (`to_cache`), so all exponents with all bits are of NaN.
        const auto full = [](u32 x) { return ((x & 0x7c007c00u) + 0x04000400u) & 0x80008000u; };
        if ((full(words.x) | full(words.y) | full(words.z) | full(words.w)) == 0) continue;
        for (u32 e = 0; e < 8; e++) {
            if ((at[e] & 0x7c00u) != 0x7c00u) continue;
            at[e] = 0;
            atomicOr(&nan_of[8 * piece + e], u64(1) << row);
            found = 1;
        }
    }
}

// Step 4, for 64 elements of the values. Of row `g + 8 r`, `one[j][2 r + i]` is element
// `16 t + 8 i + j`.
template <int CHUNKS>
DEVICE void weigh(float (&one)[8][4], const Weights& w, const u8* values, int chunk) {
    values += lane_of_value<CHUNKS>(chunk);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        for (int i = 0; i < 4; i++) one[j][i] = 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        // Pairs of elements, of four keys.
        u32 words[4][4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 piece = load_piece(values + (16 * k + i % 2 + 8 * (i / 2)) * row_bytes(CHUNKS));
            words[0][i] = piece.x;
            words[1][i] = piece.y;
            words[2][i] = piece.z;
            words[3][i] = piece.w;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const u32 (&word)[4] = words[j / 2];
            const u32 halves = j % 2 ? 0x7632 : 0x5410;
            const u32 b[2] = {__byte_perm(word[0], word[1], halves), __byte_perm(word[2], word[3], halves)};
            mma_f16(one[j], w.low[k], b);
            mma_f16(one[j], w.high[k], b);
        }
    }
}

// Eight elements of a row, from those of `one`.
DEVICE void store_eight(float* to, const float (&one)[8][4], int which) {
    float4* at = reinterpret_cast<float4*>(to);
    at[0] = make_float4(one[0][which], one[1][which], one[2][which], one[3][which]);
    at[1] = make_float4(one[4][which], one[5][which], one[6][which], one[7][which]);
}

// A warp for each part of the keys: a token of a sequence, and up to 16 query heads.
template <typename T, int CHUNKS>
DEVICE void by_keys(const AttentionArgs& a) {
    constexpr u32 WARPS = key_warps(CHUNKS);
    constexpr u32 ROW = row_bytes(CHUNKS);
    constexpr u32 QUADS = 16 * CHUNKS;
    // As many as there are registers for; int8 needs some for its scales.
    constexpr int AHEAD = CHUNKS <= 2 && !(SCALED<T> && CHUNKS == 1) ? 4 : 2;
    DYNAMIC_SHARED(memory);
    __shared__ float factors[TILE];
    __shared__ float highest_of[WARPS][TILE];
    __shared__ float sum_of[WARPS][TILE];
    __shared__ float all_highest[TILE];
    __shared__ float all_sum[TILE];
    const u32 warp = threadIdx.x / WARP;
    const u32 lane = threadIdx.x % WARP;
    const u32 g = lane / 4;
    const u32 t = lane % 4;
    // Of this warp's part, values and then the sums of them; of all warps, the rest.
    u8* values = memory + warp * PART * ROW;
    u8* high = memory + WARPS * PART * ROW;
    u8* low = high + TILE * ROW;
    float4* all = reinterpret_cast<float4*>(low + TILE * ROW);
    u16* new_key = reinterpret_cast<u16*>(all + TILE * QUADS);
    // Four sums of a row, in the memory of the values that they are sums of.
    const auto sums = [&](u32 of_warp, u32 row, u32 quad) {
        u8* at = memory + (of_warp * PART + 2 * row + quad / 8 % 2) * ROW;
        return reinterpret_cast<float4*>(at + quad / 16 * 128) + quad % 8;
    };

    wait_for_previous_kernel();
    let_next_kernel_start();
    const AttentionTile tile(a, WARPS * WARP);
    if (tile.tokens == 0) return;
    const u32 token = tile.first;
    const u32 rows = tile.heads;
    const u32 seen = tile.seen(a, token);
    const u32 unseen = unseen_keys(a, seen);
    float* output = a.output + (u64(token) * a.query + tile.head) * a.dim;
    if (seen == 0 && a.parts == 0) {
        for (u32 i = threadIdx.x; i < rows * a.dim; i += WARPS * WARP) output[i] = 0.0f;
    }
    const u32 blocks = (seen + WARPS * PART - 1) / (WARPS * PART);
    const u32 base = unseen / (WARPS * PART);
    const u32 first_block = base + (a.parts ? blockIdx.y : 0);
    const u32 end_block = a.parts ? min(blocks, first_block + 1) : blocks;

    for (u32 block = first_block; block < end_block; block++) {
        const u32 part = block * WARPS + warp;
        const u32 start = part * PART;
        const Seen of_part(unseen, seen, start, PART);
        const u32 visible = of_part.count > 0 ? of_part.from + of_part.count : 0;
        // Where the append is fused, the last key and value come from qkv, and go to the cache.
        const u32 slot = a.slots ? a.slots[token] : NONE;
        const bool has_new = visible > 0 && start + visible == seen && slot < a.pages * PAGE;
        const u32 cached = has_new ? visible - 1 : visible;
        const u32 page[2] = {visible > 0 ? tile.page(a, start / PAGE) : 0,
            visible > PAGE ? tile.page(a, start / PAGE + 1) : 0};
        const bool bad[2] = {page[0] == NONE, page[1] == NONE};

        if (visible > 0) {
            // A piece of the cache is one in shared memory, of f16, or two.
            constexpr u32 PIECES = SCALED<T> ? 4 * CHUNKS : 8 * CHUNKS;
            constexpr u32 ELEMENTS = 16 / sizeof(T);
#pragma unroll 4
            for (u32 i = lane; i < PART * PIECES; i += WARP) {
                const u32 row = i / PIECES;
                const u32 piece = i % PIECES;
                if (has_new && row == cached) continue;
                const u32 of = row < PAGE ? page[0] : page[1];
                const bool there = of_part(row) && of != NONE && ELEMENTS * piece < a.stride;
                const u32 from = there ? of * PAGE + row % PAGE : 0;
                const T* source = cache_row(static_cast<T*>(a.values), from, tile.kv_head, a.kv, a.stride);
                u8* to = values + row * ROW;
                if constexpr (SCALED<T>) {
                    const u8* bytes = reinterpret_cast<const u8*>(source) + ELEMENTS * piece;
                    const uint4 q = there ? load_piece(bytes) : make_uint4(0, 0, 0, 0);
                    *reinterpret_cast<uint4*>(to + piece_of_value(2 * piece, row)) = halves_of(q.x, q.y);
                    *reinterpret_cast<uint4*>(to + piece_of_value(2 * piece + 1, row)) = halves_of(q.z, q.w);
                } else {
                    copy_async(to + piece_of_value(piece, row), source + (there ? ELEMENTS * piece : 0), there);
                }
            }
            copy_async_commit();
        }
        // Of the new key and value, where rows have scales.
        float new_scales[2] = {0.0f, 0.0f};
        if (has_new) {
            const bool writes = tile.head == tile.kv_head * tile.group;
            T* key = cache_row(static_cast<T*>(a.keys), slot, tile.kv_head, a.kv, a.stride);
            T* value = cache_row(static_cast<T*>(a.values), slot, tile.kv_head, a.kv, a.stride);
            if constexpr (SCALED<T>) {
                const Int8Row keys_row = tile.new_key_row(a, token);
                const Int8Row values_row = tile.new_value_row(a, token);
                new_scales[0] = keys_row.scale;
                new_scales[1] = values_row.scale;
                for (u32 i = lane; i < 64 * CHUNKS; i += WARP) {
                    const i8 k = keys_row(tile.new_key(a, token, i));
                    const i8 v = values_row(tile.new_value(a, token, i));
                    new_key[i] = half_of(k);
                    u8* at = values + cached * ROW + piece_of_value(i / 8, cached);
                    reinterpret_cast<u16*>(at)[i % 8] = half_of(v);
                    if (writes && i < a.stride) {
                        key[i] = k;
                        value[i] = v;
                    }
                }
                if (writes && lane == 0) {
                    *tile.scale(a, a.keys, slot) = new_scales[0];
                    *tile.scale(a, a.values, slot) = new_scales[1];
                }
            } else {
                for (u32 i = lane; i < 64 * CHUNKS; i += WARP) {
                    T k;
                    T v;
                    tile.new_element(a, token, i, k, v);
                    new_key[i] = k;
                    u8* at = values + cached * ROW + piece_of_value(i / 8, cached);
                    reinterpret_cast<u16*>(at)[i % 8] = v;
                    if (writes && i < a.stride) {
                        key[i] = k;
                        value[i] = v;
                    }
                }
            }
        }
        if (block == first_block) {
            for (u32 row = warp; row < TILE; row += WARPS) {
                const float factor = stage_query<CHUNKS>(high, low, row, row < rows, a, tile, token, tile.head + row);
                if (lane == 0) factors[row] = factor;
            }
            if (threadIdx.x < TILE) {
                all_highest[threadIdx.x] = nothing_yet();
                all_sum[threadIdx.x] = 0.0f;
            }
            for (u32 i = threadIdx.x; i < rows * QUADS; i += WARPS * WARP) all[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            __syncthreads();
        }
        __syncwarp(); // the new key

        if (visible > 0) {
            T* keys = static_cast<T*>(a.keys);
            const T* first_page = cache_row(keys, bad[0] ? 0 : page[0] * PAGE, tile.kv_head, a.kv, a.stride);
            const T* second_page = cache_row(keys, bad[1] ? 0 : page[1] * PAGE, tile.kv_head, a.kv, a.stride);
            // Keys that the row does not see may be read, and are where that saves a register.
            const auto reads = [&](u32 row) { return CHUNKS == 2 ? row < visible : of_part(row); };
            float scores[8][4];
            score<CHUNKS, AHEAD>(scores, high, low, [&](int n, int c) {
                const u32 row = 8 * n + g;
                const u32 element = 32 * c + 8 * t;
                const T* of_cache = (n < 4 ? first_page : second_page) + row % PAGE * a.stride;
                if constexpr (SCALED<T>) {
                    const bool there = reads(row) && !(n < 4 ? bad[0] : bad[1]) && element < a.stride;
                    if (there && row < cached) return load_halves(of_cache + element);
                    return there ? load_halves(new_key + element) : make_uint4(0, 0, 0, 0);
                } else {
                    // Generic addresses: of the cache, or of shared memory.
                    const u16* from = row < cached ? of_cache : new_key;
                    const bool there = reads(row) && !(n < 4 ? bad[0] : bad[1]) && element < a.stride;
                    return there ? *reinterpret_cast<const uint4*>(from + element) : make_uint4(0, 0, 0, 0);
                }
            });
            const float factor[2] = {factors[g], factors[g + 8]};
            const Seen sees[2] = {of_part, of_part};
            Weights w;
            if constexpr (SCALED<T>) {
                Scales scales(a, tile, a.keys, page);
                if (has_new) scales.set(cached, new_scales[0]);
                scale_scores(scores, scales);
                scales = Scales(a, tile, a.values, page);
                if (has_new) scales.set(cached, new_scales[1]);
                soften<T, false>(w, scores, factor, sees, bad, scales);
            } else {
                soften<T, false>(w, scores, factor, sees, bad, NoScales());
            }
            copy_async_wait<0>();
            __syncwarp();
            const u64 place = (u64(token) * a.query + tile.head) * a.parts + part - base * WARPS;
#pragma unroll 1
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                float one[8][4];
                weigh<CHUNKS>(one, w, values, chunk);
                if constexpr (SCALED<T>) scale_sums(one, w);
                __syncwarp(); // all lanes have read these values
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 row = g + 8 * (i / 2);
                    const u32 element = 64 * chunk + 16 * t + 8 * (i % 2);
                    if (row >= rows) continue;
                    if (a.parts == 0) {
                        store_eight(reinterpret_cast<float*>(sums(warp, row, element / 4)), one, i);
                    } else if (element < a.dim) {
                        store_eight(a.outs + (place + u64(row) * a.parts) * a.stride + element, one, i);
                    }
                }
            }
            for (int r = 0; r < 2; r++) {
                const u32 row = g + 8 * r;
                if (t != 0 || row >= rows) continue;
                highest_of[warp][row] = w.highest[r];
                sum_of[warp][row] = w.sum[r];
                if (a.parts) a.statistics[place + u64(row) * a.parts] = make_float2(w.highest[r], w.sum[r]);
            }
        }
        if (a.parts) return;

        __syncthreads();
        const u32 parts = min(WARPS, (seen - block * WARPS * PART + PART - 1) / PART);
        const u32 first = block == base ? unseen / PART % WARPS : 0;
        for (u32 i = threadIdx.x; i < rows * QUADS; i += WARPS * WARP) {
            const u32 row = i / QUADS;
            const u32 quad = i % QUADS;
            float4 out = all[i];
            float highest = all_highest[row];
            float sum = all_sum[row];
            for (u32 p = first; p < parts; p++) {
                const Join join(highest, highest_of[p][row]);
                const float4 one = *sums(p, row, quad);
                out = make_float4(join(out.x, one.x), join(out.y, one.y), join(out.z, one.z), join(out.w, one.w));
                sum = join(sum, sum_of[p][row]);
                highest = join.highest;
            }
            if (block + 1 < end_block) {
                all[i] = out;
            } else if (4 * quad < a.dim) {
                *reinterpret_cast<float4*>(output + row * a.dim + 4 * quad) = make_float4(
                    attended(out.x, sum), attended(out.y, sum), attended(out.z, sum), attended(out.w, sum));
            }
        }
        __syncthreads();
        if (threadIdx.x < rows) {
            for (u32 p = first; p < parts; p++) {
                const Join join(all_highest[threadIdx.x], highest_of[p][threadIdx.x]);
                all_sum[threadIdx.x] = join(all_sum[threadIdx.x], sum_of[p][threadIdx.x]);
                all_highest[threadIdx.x] = join.highest;
            }
        }
        __syncthreads();
    }
}

// Begins to bring the keys or values of a part to shared memory; zeros beyond `visible` of them.
template <typename T, int CHUNKS, bool KEYS>
DEVICE void stage(u8* to, const AttentionArgs& a, const AttentionTile& tile, const u32 (&page)[2], u32 visible) {
    constexpr u32 PIECES = SCALED<T> ? 4 * CHUNKS : 8 * CHUNKS;
    constexpr u32 ELEMENTS = 16 / sizeof(T);
    T* cache = static_cast<T*>(KEYS ? a.keys : a.values);
#pragma unroll 4
    for (u32 i = threadIdx.x; i < PART * PIECES; i += MMA_THREADS) {
        const u32 row = i / PIECES;
        const u32 piece = i % PIECES;
        const u32 of = row < PAGE ? page[0] : page[1];
        const bool there = row < visible && of != NONE && ELEMENTS * piece < a.stride;
        const T* from = cache_row(cache, there ? of * PAGE + row % PAGE : 0, tile.kv_head, a.kv, a.stride);
        const auto at = [&](u32 piece) {
            return to + row * row_bytes(CHUNKS) + (KEYS ? piece_of_key(piece, row) : piece_of_value(piece, row));
        };
        if constexpr (SCALED<T>) {
            const u8* bytes = reinterpret_cast<const u8*>(from) + ELEMENTS * piece;
            const uint4 q = there ? load_piece(bytes) : make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(at(2 * piece)) = halves_of(q.x, q.y);
            *reinterpret_cast<uint4*>(at(2 * piece + 1)) = halves_of(q.z, q.w);
        } else {
            copy_async(at(piece), from + (there ? ELEMENTS * piece : 0), there);
        }
    }
    copy_async_commit();
}

// A warp for each 16 rows, of wide heads two that have half of the elements each; all of them share
// keys and values.
template <typename T, int CHUNKS>
DEVICE void by_rows(const AttentionArgs& a) {
    constexpr u32 ROW = row_bytes(CHUNKS);
    constexpr u32 ROWS = row_warps(CHUNKS) * TILE;
    constexpr int OWN = CHUNKS <= 2 ? CHUNKS : CHUNKS / 2;
    DYNAMIC_SHARED(memory);
    __shared__ u32 seen_of[ROWS];
    __shared__ float factors[ROWS];
    // Of each warp's rows, after the parts so far.
    __shared__ float all_highest[MMA_THREADS / WARP][TILE];
    __shared__ float all_sum[MMA_THREADS / WARP][TILE];
    // Pages of a part, in turns with those of the next.
    __shared__ u32 pages[2][PART / PAGE];
    __shared__ u64 nan_of[64 * CHUNKS];
    __shared__ u32 nan_found;
    const u32 warp = threadIdx.x / WARP;
    const u32 lane = threadIdx.x % WARP;
    const u32 g = lane / 4;
    const u32 t = lane % 4;
    const u32 first_row = warp % row_warps(CHUNKS) * TILE;
    const u32 first_chunk = warp / row_warps(CHUNKS) * OWN;
    u8* keys = memory;
    u8* values = keys + PART * ROW;
    u8* high = values + PART * ROW + first_row * 2 * ROW;
    u8* low = high + TILE * ROW;

    wait_for_previous_kernel();
    let_next_kernel_start();
    const AttentionTile tile(a, MMA_THREADS);
    if (tile.tokens == 0) return;
    const u32 rows = tile.rows();
    for (u32 r = threadIdx.x; r < ROWS; r += MMA_THREADS) {
        seen_of[r] = r < rows ? tile.seen(a, tile.first + r / tile.heads) : 0;
    }
    if (a.window == NONE && threadIdx.x < PART / PAGE) pages[0][threadIdx.x] = tile.page(a, threadIdx.x);
    __syncthreads();
    // What each row of the block sees, any of them, and any of the warp's.
    u32 least = NONE;
    u32 most = 0;
    u32 warp_most = 0;
    for (u32 r = 0; r < rows; r++) {
        least = min(least, seen_of[r]);
        most = max(most, seen_of[r]);
        if (r / TILE == first_row / TILE) warp_most = max(warp_most, seen_of[r]);
    }
    const u32 first = unseen_keys(a, least) / PART * PART;
    if (a.window != NONE) {
        if (threadIdx.x < PART / PAGE) pages[first / PART % 2][threadIdx.x] = tile.page(a, first / PAGE + threadIdx.x);
        __syncthreads();
    }
    if (most > 0) stage<T, CHUNKS, true>(keys, a, tile, pages[first / PART % 2], min(most - first, PART));

    if (first_chunk == 0) {
        for (u32 r = 0; r < TILE; r++) {
            const u32 row = first_row + r;
            const bool there = row < rows && seen_of[row] > 0;
            const u32 token = tile.first + row / tile.heads;
            const u32 head = tile.head + row % tile.heads;
            const float factor = stage_query<CHUNKS>(high, low, r, there, a, tile, token, head);
            if (lane == 0) factors[row] = factor;
        }
    }
    if (lane < TILE) {
        all_highest[warp][lane] = nothing_yet();
        all_sum[warp][lane] = 0.0f;
    }
    float all[OWN][8][4];
#pragma unroll
    for (int c = 0; c < OWN; c++) {
        for (int j = 0; j < 8; j++) {
            for (int i = 0; i < 4; i++) all[c][j][i] = 0.0f;
        }
    }

    for (u32 start = first; start < most; start += PART) {
        const u32 visible = min(most - start, PART);
        const u32 next = start + PART;
        const u32 (&page)[2] = pages[start / PART % 2];
        u32 (&next_page)[2] = pages[next / PART % 2];
        const bool warp_sees = start < warp_most;
        // Integers are never NaN.
        const bool masked = !SCALED<T> && (least < start + visible || unseen_keys(a, most) > start);
        Seen sees[2];
        for (int r = 0; r < 2; r++) {
            const u32 seen = seen_of[first_row + g + 8 * r];
            sees[r] = Seen(unseen_keys(a, seen), seen, start, PART);
        }

        copy_async_wait<0>();
        __syncthreads(); // keys and queries are there, and values have been used
        stage<T, CHUNKS, false>(values, a, tile, page, visible);
        u32 found = 0;
        if (threadIdx.x < PART / PAGE) found = tile.page(a, next / PAGE + threadIdx.x);
        if (masked) {
            for (u32 i = threadIdx.x; i < 64 * CHUNKS; i += MMA_THREADS) nan_of[i] = 0;
            nan_found = 0;
        }
        Weights w;
        Join join[2];
        if (warp_sees) {
            float scores[8][4];
            score<CHUNKS, 0>(scores, high, low, [&](int n, int c) {
                return load_piece(keys + lane_of_key<CHUNKS>(c) + 8 * n * ROW);
            });
            const float factor[2] = {factors[first_row + g], factors[first_row + g + 8]};
            // Of pages that the part sees.
            const bool bad[2] = {page[0] == NONE, visible > PAGE && page[1] == NONE};
            if constexpr (SCALED<T>) {
                scale_scores(scores, Scales(a, tile, a.keys, page));
                soften<T, true>(w, scores, factor, sees, bad, Scales(a, tile, a.values, page));
            } else {
                soften<T, true>(w, scores, factor, sees, bad, NoScales());
            }
            float sum[2];
            for (int r = 0; r < 2; r++) {
                join[r] = Join(all_highest[warp][g + 8 * r], w.highest[r]);
                sum[r] = join[r](all_sum[warp][g + 8 * r], w.sum[r]);
            }
            __syncwarp(); // all four lanes of a row have read
            for (int r = 0; r < 2; r++) {
                if (t == 0) all_highest[warp][g + 8 * r] = join[r].highest;
                if (t == 0) all_sum[warp][g + 8 * r] = sum[r];
            }
        }
        if (threadIdx.x < PART / PAGE) next_page[threadIdx.x] = found;
        copy_async_wait<0>();
        __syncthreads(); // values are there, and keys have been used
        if (next < most) stage<T, CHUNKS, true>(keys, a, tile, next_page, min(most - next, PART));
        if (masked) {
            const u32 of_all = unseen_keys(a, most) > start || least < start ? 0 : least - start;
            take_nan_out<CHUNKS>(values, nan_of, nan_found, of_all);
            __syncthreads();
        }
        if (!warp_sees) continue;
#pragma unroll
        for (int c = 0; c < OWN; c++) {
            float one[8][4];
            weigh<CHUNKS>(one, w, values, first_chunk + c);
            if constexpr (SCALED<T>) scale_sums(one, w);
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) all[c][j][i] = join[i / 2](all[c][j][i], one[j][i]);
            }
        }
        if constexpr (!SCALED<T>) {
            if (!masked || nan_found == 0) continue;
            u64 seen[2];
            for (int r = 0; r < 2; r++) seen[r] = sees[r].count > 0 ? ~u64(0) >> (PART - sees[r].count) << sees[r].from : 0;
#pragma unroll
            for (int c = 0; c < OWN; c++) {
#pragma unroll
                for (int j = 0; j < 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const u64 nan = nan_of[64 * (first_chunk + c) + 16 * t + 8 * (i % 2) + j];
                        if (nan & seen[i / 2]) all[c][j][i] = __uint_as_float(NAN_BITS);
                    }
                }
            }
        }
    }

    __syncwarp(); // the sums
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 row = first_row + g + 8 * (i / 2);
        if (row >= rows) continue;
        const bool there = seen_of[row] > 0;
        const float sum = all_sum[warp][g + 8 * (i / 2)];
        float* to = a.output + (u64(tile.first + row / tile.heads) * a.query + tile.head + row % tile.heads) * a.dim;
#pragma unroll
        for (int c = 0; c < OWN; c++) {
            const u32 element = 64 * (first_chunk + c) + 16 * t + 8 * (i % 2);
            if (element >= a.dim) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) all[c][j][i] = there ? attended(all[c][j][i], sum) : 0.0f;
            store_eight(to + element, all[c], i);
        }
    }
}

#define FORMS(T, type, chunks) \
    KERNEL(paged_attention_mma_##type##_keys_##chunks, AttentionArgs, int(key_warps(chunks) * WARP)) { by_keys<T, chunks>(a); } \
    KERNEL(paged_attention_mma_##type##_rows_##chunks, AttentionArgs, MMA_THREADS) { by_rows<T, chunks>(a); }
FORMS(u16, f16, 1)
FORMS(u16, f16, 2)
FORMS(u16, f16, 4)
FORMS(i8, int8, 1)
FORMS(i8, int8, 2)
FORMS(i8, int8, 4)
