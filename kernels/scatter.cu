// A step's inputs, from one piece of host memory to where they belong: a block for each piece.
#include "prelude.cuh"

// As in `inputs.rs`.
constexpr int PIECES = 14;

struct ScatterPiece {
    u8* to;
    u32 offset;
    u32 bytes;
};

struct ScatterArgs {
    const u8* from;
    ScatterPiece pieces[PIECES];
};

KERNEL(scatter, ScatterArgs, THREADS) {
    wait_for_previous_kernel();
    let_next_kernel_start();
    const ScatterPiece piece = a.pieces[blockIdx.x];
    // Both start on words: pieces of memory on 256 bytes, offsets on 16.
    const u32* from = reinterpret_cast<const u32*>(a.from + piece.offset);
    u32* to = reinterpret_cast<u32*>(piece.to);
    for (u32 i = threadIdx.x; i < piece.bytes / 4; i += THREADS) to[i] = from[i];
    const u32 whole = piece.bytes / 4 * 4;
    if (threadIdx.x < piece.bytes - whole) {
        piece.to[whole + threadIdx.x] = a.from[piece.offset + whole + threadIdx.x];
    }
}
