// `ops::TernaryMatmul` for many rows: a tensor-core product in tiles of 64 rows and 32 features for
// each warp, which unpacks its weights once for all 64 rows.
//
// Of each block of 256 columns the activations and the weights come to shared memory while the one
// before is multiplied. Rows of activations lie there with their 16-byte pieces swapped by halves
// of 128 bytes in odd rows, so that the eight lanes which are served at a time meet all 32 banks.
#include "prelude.cuh"

struct TernaryMatmulTiledArgs {
    const i8* values;
    const float* scales;
    const i32* sums;
    const uint4* weights;
    const float* weight_scales; // of each feature
    float* output;
    u32 rows;
    // Of the matrix: blocks of columns, pairs of tiles, features.
    u32 blocks;
    u32 pairs;
    u32 features;
    // Row length and first column of the output, and whether it is added to.
    u32 stride;
    u32 column;
    u32 add;
    u32 padding;
};

constexpr u32 ROWS = 64;
constexpr u32 ROW_TILES = ROWS / 8;
// Pairs of tiles that a warp takes.
constexpr u32 PAIRS = 2;
constexpr u32 ACTIVATION_BYTES = ROWS * TERNARY_BLOCK;
constexpr u32 WEIGHT_BYTES = PAIRS * TERNARY_UNIT * 16;

// Where piece `piece` of row `row` lies.
DEVICE u32 piece_at(u32 row, u32 piece) { return row * TERNARY_BLOCK + 16 * (piece ^ (4 * (row & 1))); }

template <u32 WARPS>
DEVICE void many_rows(const TernaryMatmulTiledArgs& a) {
    DYNAMIC_SHARED(memory);
    constexpr u32 STAGE = ACTIVATION_BYTES + WARPS * WEIGHT_BYTES;
    const u32 lane = lane_of_warp();
    const u32 warp = threadIdx.x / WARP;
    const u32 g = lane / 4;
    const u32 t = lane % 4;
    const u32 first_pair = (blockIdx.x * WARPS + warp) * PAIRS;
    const u32 first_row = blockIdx.y * ROWS;

    // This lane's weights, which no other lane reads; each in turn copies what it multiplies.
    const u32 own = ACTIVATION_BYTES + warp * WEIGHT_BYTES + 16 * lane;
    // Offsets are in 16-byte vectors. Zeros stand for what lies beyond the matrix or the rows.
    auto copy_weights = [&](u32 block) {
#pragma unroll
        for (u32 i = 0; i < 2 * PAIRS; i++) {
            const u32 pair = first_pair + i / 2;
            const u32 from = (pair * a.blocks + block) * TERNARY_UNIT + i % 2 * TERNARY_TILE + lane;
            copy_async(memory + own + block % 2 * STAGE + i * 512, a.weights + from, pair < a.pairs);
        }
    };
    auto copy_activations = [&](u32 block) {
        const uint4* values = reinterpret_cast<const uint4*>(a.values);
#pragma unroll 2 // all four would take registers that the sums need
        for (u32 i = 0; i < ROWS; i += 2 * WARPS) {
            const u32 row = threadIdx.x / 16 + i;
            const u32 from = ((first_row + row) * a.blocks + block) * (TERNARY_BLOCK / 16);
            copy_async(memory + block % 2 * STAGE + piece_at(row, threadIdx.x % 16),
                values + (from + threadIdx.x % 16), first_row + row < a.rows);
        }
    };

    copy_weights(0);
    let_next_kernel_start();
    wait_for_previous_kernel();
    copy_activations(0);
    copy_async_commit();

    i32 sums[PAIRS][ROW_TILES][4] = {};
    for (u32 block = 0; block < a.blocks; block++) {
        copy_async_wait<0>();
        __syncthreads(); // this block is there, and the one before has been read
        if (block + 1 < a.blocks) {
            copy_weights(block + 1);
            copy_activations(block + 1);
            copy_async_commit();
        }
        const u8* stage = memory + block % 2 * STAGE;
        uint2 packed[2 * PAIRS];
#pragma unroll 1 // unrolled, the activations of several words would not fit the registers
        for (u32 j = 0; j < 4; j++) {
            // Two words at a time.
#pragma unroll
            for (u32 i = 0; i < 2 * PAIRS; i++) {
                if (j % 2 == 0) {
                    packed[i] = *reinterpret_cast<const uint2*>(stage + own + i * 512 + 4 * j);
                } else {
                    packed[i].x = packed[i].y;
                }
            }
            u32 codes[PAIRS][2][4];
#pragma unroll
            for (u32 p = 0; p < PAIRS; p++) {
                const u32 v = packed[2 * p].x;
                const u32 w = packed[2 * p + 1].x;
#pragma unroll
                for (int planes = 0; planes < 2; planes++) {
                    codes[p][planes][0] = v >> (4 * planes) & CODES;
                    codes[p][planes][1] = w >> (4 * planes) & CODES;
                    codes[p][planes][2] = v >> (4 * planes + 2) & CODES;
                    codes[p][planes][3] = w >> (4 * planes + 2) & CODES;
                }
            }
            const u8* x = stage + piece_at(g, 4 * j + t);
#pragma unroll
            for (u32 n = 0; n < ROW_TILES; n++) {
                const uint4 q = *reinterpret_cast<const uint4*>(x + 8 * n * TERNARY_BLOCK);
                const u32 low[2] = {q.x, q.y};
                const u32 high[2] = {q.z, q.w};
#pragma unroll
                for (u32 p = 0; p < PAIRS; p++) mma_s8(sums[p][n], codes[p][0], low);
#pragma unroll
                for (u32 p = 0; p < PAIRS; p++) mma_s8(sums[p][n], codes[p][1], high);
            }
        }
    }

    // The sums go through shared memory, so that neighbouring threads store neighbouring features.
    // Features lie exchanged by eights as the row says, against bank conflicts.
    constexpr u32 FEATURES = WARPS * PAIRS * TERNARY_PAIR;
    __shared__ float quotients[ROWS];
    i32* products = reinterpret_cast<i32*>(memory);
    const u32 first_feature = blockIdx.x * FEATURES;
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < ROW_TILES; n++) {
#pragma unroll
        for (u32 p = 0; p < PAIRS; p++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 row = 8 * n + 2 * t + i % 2;
                const u32 feature = (warp * PAIRS + p) * TERNARY_PAIR + 8 * (i / 2) + g;
                products[row * FEATURES + (feature ^ 8 * t)] = sums[p][n][i];
            }
        }
    }
    // Most often all features have one scale, and share the division.
    const float scale = a.weight_scales[first_feature];
    if (threadIdx.x < ROWS && first_row + threadIdx.x < a.rows) {
        quotients[threadIdx.x] = __fdiv_rn(scale, a.scales[first_row + threadIdx.x]);
    }
    __syncthreads();
    const u32 feature = first_feature + threadIdx.x;
    if (feature >= a.features) return;
    const float own_scale = a.weight_scales[feature];
    float* out = a.output + u64(first_row) * a.stride + a.column + feature;
    const u32 rows = min(ROWS, a.rows - first_row);
    for (u32 r = 0; r < rows; r++, out += a.stride) {
        const float quotient =
            own_scale == scale ? quotients[r] : __fdiv_rn(own_scale, a.scales[first_row + r]);
        const i32 sum = products[r * FEATURES + (threadIdx.x ^ 8 * (r / 2 % 4))];
        const float y = ternary_product(sum - a.sums[first_row + r], quotient);
        *out = a.add ? *out + y : y;
    }
}

// A thread for each feature in the end. Eight warps, two blocks of which fill a multiprocessor of an
// H100; and four, where the tiles would be too few.
KERNEL_AT_LEAST(ternary_matmul_tiled, TernaryMatmulTiledArgs, 256, 2) { many_rows<8>(a); }
KERNEL_AT_LEAST(ternary_matmul_tiled_narrow, TernaryMatmulTiledArgs, 128, 3) { many_rows<4>(a); }
