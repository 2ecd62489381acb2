// `ops::TernaryMatmul` for some rows, on tensor cores: the weights are the 16-row operand, so that
// as few as eight rows fill an instruction. Bound by memory up to about 48 rows on an H100.
//
// A block takes `PAIRS` pairs of tiles and `8 · ROW_TILES` rows; its eight warps share the columns.
// Each activation is read once by a block, from the L2 cache, straight into an operand.
#include "prelude.cuh"

struct TernaryMatmulMmaArgs {
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

template <int PAIRS, int ROW_TILES>
DEVICE void some_rows(const TernaryMatmulMmaArgs& a) {
    constexpr u32 FEATURES = PAIRS * TERNARY_PAIR;
    constexpr u32 ROWS = 8 * ROW_TILES;
    // Between the products of two rows: a lane's `t` then moves it by eight banks.
    constexpr u32 STRIDE = FEATURES + 4;
    // Blocks of columns that are loaded ahead; and words of activations at a time.
    constexpr int DEPTH = PAIRS == 4 ? 1 : (ROW_TILES == 4 ? 2 : 4) / PAIRS;
    constexpr int WORDS = ROW_TILES == 1 ? 4 : ROW_TILES == 2 ? 2 : 1;
    __shared__ i32 products[ROWS * STRIDE];

    const u32 lane = lane_of_warp();
    const u32 warp = threadIdx.x / WARP;
    const u32 g = lane / 4;
    const u32 t = lane % 4;
    const u32 first = warp * a.blocks / (THREADS / WARP);
    const u32 last = (warp + 1) * a.blocks / (THREADS / WARP);

    // What lies beyond the matrix reads its last pair, and is not stored.
    const uint4* weights[PAIRS];
    for (int p = 0; p < PAIRS; p++) {
        const u32 pair = min(blockIdx.x * PAIRS + p, a.pairs - 1);
        weights[p] = a.weights + u64(pair) * a.blocks * TERNARY_UNIT + lane;
    }
    uint4 ring[DEPTH][PAIRS][2];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            if (first + d < last) {
                ring[d][p][0] = load_once(weights[p] + (first + d) * TERNARY_UNIT);
                ring[d][p][1] = load_once(weights[p] + (first + d) * TERNARY_UNIT + TERNARY_TILE);
            }
        }
    }
    let_next_kernel_start();
    for (u32 i = threadIdx.x; i < ROWS * STRIDE; i += THREADS) products[i] = 0;
    // A thread has one feature in the end, of several rows; what it needs is loaded early.
    const u32 feature = blockIdx.x * FEATURES + threadIdx.x % FEATURES;
    const float weight_scale = feature < a.features ? a.weight_scales[feature] : 0.0f;
    __syncthreads();
    wait_for_previous_kernel();
    __shared__ float row_scales[ROWS];
    __shared__ i32 row_sums[ROWS];
    if (threadIdx.x < ROWS && blockIdx.y * ROWS + threadIdx.x < a.rows) {
        row_scales[threadIdx.x] = a.scales[blockIdx.y * ROWS + threadIdx.x];
        row_sums[threadIdx.x] = a.sums[blockIdx.y * ROWS + threadIdx.x];
    }

    // In 16-byte vectors.
    u32 x[ROW_TILES];
    for (int n = 0; n < ROW_TILES; n++) {
        const u32 row = min(blockIdx.y * ROWS + 8 * n + g, a.rows - 1);
        x[n] = row * a.blocks * (TERNARY_BLOCK / 16) + t;
    }
    const uint4* values = reinterpret_cast<const uint4*>(a.values);
    i32 sums[PAIRS][ROW_TILES][4] = {};
    for (u32 base = first; base < last; base += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const u32 block = base + d;
            if (block < last) {
#pragma unroll
                for (int start = 0; start < 4; start += WORDS) {
                    uint4 q[WORDS][ROW_TILES];
#pragma unroll
                    for (int j = 0; j < WORDS; j++) {
#pragma unroll
                        for (int n = 0; n < ROW_TILES; n++) {
                            q[j][n] = values[x[n] + (block * TERNARY_BLOCK + 64 * (start + j)) / 16];
                        }
                    }
#pragma unroll
                    for (int j = 0; j < WORDS; j++) {
#pragma unroll
                        for (int p = 0; p < PAIRS; p++) {
                            const u32 v = word_of(ring[d][p][0], start + j);
                            const u32 w = word_of(ring[d][p][1], start + j);
                            const u32 codes[2][4] = {
                                {v & CODES, w & CODES, v >> 2 & CODES, w >> 2 & CODES},
                                {v >> 4 & CODES, w >> 4 & CODES, v >> 6 & CODES, w >> 6 & CODES},
                            };
#pragma unroll
                            for (int n = 0; n < ROW_TILES; n++) {
                                const u32 low[2] = {q[j][n].x, q[j][n].y};
                                mma_s8(sums[p][n], codes[0], low);
                            }
#pragma unroll
                            for (int n = 0; n < ROW_TILES; n++) {
                                const u32 high[2] = {q[j][n].z, q[j][n].w};
                                mma_s8(sums[p][n], codes[1], high);
                            }
                        }
                    }
                }
                if (block + DEPTH < last) {
#pragma unroll
                    for (int p = 0; p < PAIRS; p++) {
                        const uint4* at = weights[p] + (block + DEPTH) * TERNARY_UNIT;
                        ring[d][p][0] = load_once(at);
                        ring[d][p][1] = load_once(at + TERNARY_TILE);
                    }
                }
            }
        }
    }
    if (first < last) {
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 row = 8 * n + 2 * t + i % 2;
                    const u32 column = TERNARY_PAIR * p + 8 * (i / 2) + g;
                    atomicAdd(&products[row * STRIDE + column], sums[p][n][i]);
                }
            }
        }
    }
    __syncthreads();
    if (feature >= a.features) return;
    const u32 rows = min(ROWS, a.rows - blockIdx.y * ROWS);
    for (u32 row = threadIdx.x / FEATURES; row < rows; row += THREADS / FEATURES) {
        const i32 sum = products[row * STRIDE + threadIdx.x % FEATURES] - row_sums[row];
        const float y = ternary_product(sum, __fdiv_rn(weight_scale, row_scales[row]));
        float* out = a.output + u64(blockIdx.y * ROWS + row) * a.stride + a.column + feature;
        *out = a.add ? *out + y : y;
    }
}

// Two blocks on a multiprocessor; of the largest, whose sums are 64 registers, one.
#define TERNARY_MATMUL_MMA(pairs, row_tiles) \
    KERNEL_AT_LEAST(ternary_matmul_mma_##pairs##_##row_tiles, TernaryMatmulMmaArgs, THREADS, \
        pairs * row_tiles < 16 ? 2 : 1) { \
        some_rows<pairs, row_tiles>(a); \
    }

TERNARY_MATMUL_MMA(1, 1)
TERNARY_MATMUL_MMA(1, 2)
TERNARY_MATMUL_MMA(1, 4)
TERNARY_MATMUL_MMA(2, 1)
TERNARY_MATMUL_MMA(2, 2)
TERNARY_MATMUL_MMA(2, 4)
TERNARY_MATMUL_MMA(4, 1)
TERNARY_MATMUL_MMA(4, 2)
TERNARY_MATMUL_MMA(4, 4)
