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
template <int T>
struct Loads {
    const LmHeadArgs& a;
    const uint4* rows[T];
    // Tiles are counted `T` at a time.
    u32 tile;
    u32 tiles;
    u32 block;

    DEVICE_METHOD Loads(const LmHeadArgs& a, u32 tile, u32 tiles) : a(a), tile(tile), tiles(tiles), block(0) {
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

template <typename Float, bool few, int M, int T>
DEVICE void lm_head(const LmHeadArgs& a, u8* shared) {
    const u32 part_rows = few ? a.rows : 16 * M;
    const u32 tiles = (a.vocabulary + 8 * T - 1) / (8 * T);
    const u32 warps = gridDim.x * WARPS;
    // As many for all warps of the grid: they meet at barriers.
    const u32 rounds = (tiles + warps - 1) / warps;
    const u32 chunks = (a.blocks + a.chunk - 1) / a.chunk;
    const u32 step_bytes = 128 * part_rows;
    const u32 chunk_bytes = a.chunk * STEPS * step_bytes;

    u32 tile = blockIdx.x * WARPS + threadIdx.x / WARP;
    Loads<T> loads(a, tile, tiles);
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
        float sums[M][T][4] = {};
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
                    multiply_step<Float, few, M, T>(sums, table[step], parts, part_rows);
                    parts += step_bytes;
                    if (loads.more()) loads.load(table[step], step);
                }
                if (loads.more()) loads.advance();
            }
        }
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
        tile += warps;
    }
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
