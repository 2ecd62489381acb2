
// Products of a few rows of int8 activations with a tile of a ternary matrix, whose order in memory
// is drawn in `packed.rs`. The file that uses this has `weights: array<vec4<u32>>`,
// `activations(row, i)` (16 neighbouring int8 of a row), and in `p`: `blocks`, the blocks of 64
// columns that a row has. With codes c = t + 1, Σ t·q = Σ c·q − Σ q; the value of a product is that
// sum, converted, times the quotient of the two scales.
//
// `LANES` threads have a row of the matrix each; the workgroup's other threads have the same rows
// and other blocks. The sums are integers, so their order does not matter.

// Rows of activations: up to `MOST_ROWS`.
override ROWS: u32 = 1u;
// Rows of the matrix per workgroup: 16 or 32.
override LANES: u32 = 16u;

var<workgroup> partial_sums: array<i32, WORKGROUP>;

// The sums of matrix row `feature` for each row of activations from `first` on, complete in the
// first `LANES` threads. All threads of the workgroup call.
fn ternary_sums(feature: u32, first: u32, thread: Thread) -> array<i32, MOST_ROWS> {
    let splits = WORKGROUP / LANES;
    let tile = (feature / TERNARY_TILE) * p.blocks * TERNARY_TILE + feature % TERNARY_TILE;
    var sums = array<i32, MOST_ROWS>();
    for (var block = thread.index / LANES; block < p.blocks; block += splits) {
        let codes = weights[tile + block * TERNARY_TILE];
        for (var w = 0u; w < 4u; w++) {
            let word = codes[w];
            let c0 = word & 0x03030303u;
            let c1 = (word >> 2u) & 0x03030303u;
            let c2 = (word >> 4u) & 0x03030303u;
            let c3 = (word >> 6u) & 0x03030303u;
            for (var r = 0u; r < ROWS; r++) {
                let a = activations(first + r, 4u * block + w);
                sums[r] += dot4(c0, a.x) + dot4(c1, a.y) + dot4(c2, a.z) + dot4(c3, a.w);
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        partial_sums[thread.index] = sums[r];
        workgroupBarrier();
        if (thread.index < LANES) {
            var sum = 0;
            for (var split = 0u; split < splits; split++) {
                sum += partial_sums[split * LANES + thread.index];
            }
            sums[r] = sum;
        }
        workgroupBarrier();
    }
    return sums;
}
