// uses: softmax
// Joins the blocks of `ops::PagedAttention` that workgroups of their own have computed: a workgroup
// for each token, key/value head and tile, a thread for each four elements of a head.

struct Params {
    rows: u32,
    sequences: u32,
    query: u32,
    kv: u32,
    dim: u32,
    quads: u32,
    // Query heads of a tile, tiles of a key/value head, and heads that a tile has memory for.
    tile: u32,
    tiles: u32,
    pitch: u32,
    // Blocks that each has memory for.
    blocks: u32,
    // Row length of the page table.
    max_pages: u32,
    // Keys that a token sees at most, the latest; NONE where it sees all.
    window: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> positions: array<u32>;
@group(0) @binding(1) var<storage, read> sequences: array<u32>;
@group(0) @binding(2) var<storage, read> query_starts: array<u32>;
@group(0) @binding(3) var<storage, read> states: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> output: array<f32>;

const BLOCK = KEY_BLOCK;

fn state_of(at: u32, quad: u32) -> State {
    let first = at * (p.quads + 1u);
    let statistics = states[first];
    return State(statistics.x, statistics.y, states[first + 1u + quad]);
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let place = flat_group(thread);
    let tile = place % p.tiles;
    let kv_head = place / p.tiles % p.kv;
    let token = place / p.tiles / p.kv;
    let quad = thread.index % p.quads;
    let head = thread.index / p.quads;
    if (token >= p.rows || head >= min(p.tile, p.query / p.kv - tile * p.tile)) {
        return;
    }

    let sequence = sequences[token];
    var belongs = sequence < p.sequences;
    if (belongs) {
        belongs = token >= query_starts[sequence] && token < query_starts[sequence + 1u];
    }
    var x = vec4<f32>();
    if (belongs) {
        let seen = min(positions[token], most_keys(p.max_pages) - 1u) + 1u;
        let first_block = (max(seen, p.window) - p.window) / BLOCK;
        let blocks = min((seen - 1u) / BLOCK + 1u - first_block, p.blocks);
        let first = place * p.blocks * p.pitch + head;
        var state = state_of(first, quad);
        for (var block = 1u; block < blocks; block++) {
            state = join(state, state_of(first + block * p.pitch, quad));
        }
        x = state.out / state.sum;
    }
    let query_head = kv_head * (p.query / p.kv) + tile * p.tile + head;
    let start = (token * p.query + query_head) * p.dim;
    for (var e = 0u; e < 4u; e++) {
        if (4u * quad + e < p.dim) {
            output[start + 4u * quad + e] = x[e];
        }
    }
}
