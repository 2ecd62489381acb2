// uses: half, rope, softmax
// `ops::PagedAttention`: a workgroup for each token, key/value head and tile of the query heads
// that share it, over all blocks of keys in a loop or (`SPLIT`) over one of them.
//
// In a block of 256 keys
//
// 1. a thread has a key: its scores with all queries of the tile, a chain over the elements;
// 2. the highest score and the sum of weights are trees over the threads, neighbours first;
// 3. a thread has four elements of the values and every `groups`th key;
// 4. a thread has four elements of one head's output: the sum over the groups, ascending.
//
// None of this depends on the tile, on other tokens or on the other blocks. With `FUSED`, the
// workgroup also rotates its queries, and its token's key, which it reads from workgroup memory:
// one of the tiles writes it to the cache, for later steps.

struct Params {
    rows: u32,
    sequences: u32,
    // Row length of the page table.
    max_pages: u32,
    // Pages and slots that the cache has.
    pages: u32,
    query: u32,
    kv: u32,
    dim: u32,
    // Groups of four elements that a head has in the cache.
    quads: u32,
    // Groups of threads that go through the keys' values.
    groups: u32,
    // Query heads of a tile, and tiles of a key/value head.
    tile: u32,
    tiles: u32,
    // Blocks of the grid where they are split.
    blocks: u32,
    // Rows of the tables of the rotation.
    context: u32,
    // What scores are multiplied by, 1 / ln 2 included.
    scale: f32,
    // Keys that a token sees at most, the latest; NONE where it sees all.
    window: u32,
}
var<immediate> p: Params;

// Queries of a tile, as compiled: 1, 2 or 4.
override QUERIES: u32 = 1u;
override SPLIT: u32 = 0u;
override FUSED: u32 = 0u;

@group(0) @binding(0) var<storage, read> positions: array<u32>;
// The sequence of each token; with `FUSED`, where token `t` is that of sequence `t`, its slot.
@group(0) @binding(1) var<storage, read> sequences_or_slots: array<u32>;
@group(0) @binding(2) var<storage, read> query_starts: array<u32>;
@group(0) @binding(3) var<storage, read> page_table: array<u32>;
@group(0) @binding(4) var<storage, read> cos_table: array<f32>;
@group(0) @binding(5) var<storage, read> sin_table: array<f32>;
@group(0) @binding(6) var<storage, read> qkv: array<f32>;
@group(0) @binding(7) var<storage, read_write> keys: array<vec2<u32>>;
@group(0) @binding(8) var<storage, read_write> values: array<vec2<u32>>;
// The output. Where blocks are split, the state of each head in each of them: four numbers of which
// two are its highest score and sum, then its quads.
@group(0) @binding(9) var<storage, read_write> output: array<f32>;

// Keys of a block: as many as there are threads.
const BLOCK = KEY_BLOCK;
const BLOCK_PAGES = KEY_BLOCK / PAGE_TOKENS;
const_assert BLOCK == WORKGROUP;
// Groups of four elements of the widest head that is fused.
const FUSED_QUADS = FUSED_DIM / 4u;

// Of the tile's queries, times the scale: `head · quads + quad`.
var<workgroup> queries: array<vec4<f32>, WORKGROUP>;
// The new key and value, as the cache gives them back.
var<workgroup> new_key: array<vec4<f32>, FUSED_QUADS>;
var<workgroup> new_value: array<vec4<f32>, FUSED_QUADS>;
// Pages of a block; `NONE` where the table has no page of the cache.
var<workgroup> block_pages: array<u32, BLOCK_PAGES>;
// First the weights of each key, for the heads of the tile, and what reductions need; then the sums
// of the groups, for two heads at a time.
var<workgroup> shared_bits: array<vec4<u32>, 512>;
const REDUCE = 256u;

fn highest_of_tile(x: vec4<u32>, thread: Thread) -> vec4<u32> {
    let width = subgroup_width(thread);
    var most = x;
    for (var h = 0u; h < QUERIES; h++) {
        most[h] = subgroup_max_u32(most[h], thread);
    }
    if (thread.index % width == 0u) {
        shared_bits[REDUCE + thread.index / width] = most;
    }
    workgroupBarrier();
    for (var distance = 1u; distance < WORKGROUP / width; distance <<= 1u) {
        let first = thread.index * 2u * distance;
        if (first < WORKGROUP / width) {
            let at = REDUCE + first;
            shared_bits[at] = max(shared_bits[at], shared_bits[at + distance]);
        }
        workgroupBarrier();
    }
    let result = shared_bits[REDUCE];
    workgroupBarrier();
    return result;
}

fn sum_of_tile(x: vec4<f32>, thread: Thread) -> vec4<f32> {
    let width = subgroup_width(thread);
    var sum = x;
    for (var h = 0u; h < QUERIES; h++) {
        sum[h] = subgroup_sum_f32(sum[h], thread);
    }
    if (thread.index % width == 0u) {
        shared_bits[REDUCE + thread.index / width] = bitcast<vec4<u32>>(sum);
    }
    workgroupBarrier();
    for (var distance = 1u; distance < WORKGROUP / width; distance <<= 1u) {
        let first = thread.index * 2u * distance;
        if (first < WORKGROUP / width) {
            let at = REDUCE + first;
            let left = bitcast<vec4<f32>>(shared_bits[at]);
            let right = bitcast<vec4<f32>>(shared_bits[at + distance]);
            shared_bits[at] = bitcast<vec4<u32>>(left + right);
        }
        workgroupBarrier();
    }
    let result = bitcast<vec4<f32>>(shared_bits[REDUCE]);
    workgroupBarrier();
    return result;
}

// A rotated element of the head that starts at `start`, zero beyond it.
fn rotated(start: u32, i: u32, position: u32) -> f32 {
    let half = p.dim / 2u;
    if (i >= p.dim) {
        return 0.0;
    }
    let low = i % half;
    let pair = rope_pair(qkv[start + low], qkv[start + low + half], position, low);
    return select(pair.y, pair.x, i < half);
}

fn rotated_quad(start: u32, quad: u32, position: u32) -> vec4<f32> {
    let i = 4u * quad;
    return vec4<f32>(
        rotated(start, i, position),
        rotated(start, i + 1u, position),
        rotated(start, i + 2u, position),
        rotated(start, i + 3u, position),
    );
}

// An element as it is, zero beyond the head.
fn plain(start: u32, i: u32) -> f32 {
    if (i >= p.dim) {
        return 0.0;
    }
    return qkv[start + i];
}

fn plain_quad(start: u32, quad: u32) -> vec4<f32> {
    let i = 4u * quad;
    return vec4<f32>(
        plain(start, i), plain(start, i + 1u), plain(start, i + 2u), plain(start, i + 3u),
    );
}

// Scores of a key, four elements further.
fn scored(scores: vec4<f32>, quad: u32, key: vec4<f32>) -> vec4<f32> {
    var result = scores;
    for (var h = 0u; h < QUERIES; h++) {
        let q = queries[h * p.quads + quad];
        result[h] = fma(q.w, key.w, fma(q.z, key.z, fma(q.y, key.y, fma(q.x, key.x, result[h]))));
    }
    return result;
}

// What a workgroup works on.
struct Work {
    sequence: u32,
    kv_head: u32,
    // Keys up to the token's own, and how many of them are too far back for it to see.
    seen: u32,
    unseen: u32,
    // Whether the last of them is that in workgroup memory.
    is_new: bool,
}

// The state of a block. Each thread gets that of head `index / quads`, elements `index % quads`.
fn block_state(work: Work, block: u32, thread: Thread) -> State {
    let seen = min(work.seen - block * BLOCK, BLOCK);
    let holds_new = FUSED == 1u && work.is_new && seen + block * BLOCK == work.seen;
    let cached = select(seen, seen - 1u, holds_new);
    let unseen = max(work.unseen, block * BLOCK) - block * BLOCK;
    let sees = thread.index >= unseen && thread.index < seen;

    if (thread.index < BLOCK_PAGES) {
        let index = block * BLOCK_PAGES + thread.index;
        var page = NONE;
        if (index < p.max_pages) {
            page = page_table[work.sequence * p.max_pages + index];
        }
        block_pages[thread.index] = select(NONE, page, page < p.pages);
    }
    workgroupBarrier();

    var scores = vec4<f32>();
    if (sees && thread.index < cached) {
        let page = block_pages[thread.index / PAGE];
        if (page == NONE) {
            scores = vec4<f32>(bitcast<f32>(NAN_BITS | (page & 1u)));
        } else {
            let at = key_at(page, work.kv_head, 0u, thread.index % PAGE);
            for (var quad = 0u; quad < p.quads; quad++) {
                scores = scored(scores, quad, load_key(at + quad * PAGE));
            }
        }
    } else if (sees) {
        for (var quad = 0u; quad < p.quads; quad++) {
            scores = scored(scores, quad, new_key[quad]);
        }
    }

    var order = vec4<u32>();
    if (sees) {
        for (var h = 0u; h < QUERIES; h++) {
            order[h] = ordered(scores[h]);
        }
    }
    let order_most = highest_of_tile(order, thread);
    var highest = vec4<f32>();
    var weights = vec4<f32>();
    for (var h = 0u; h < QUERIES; h++) {
        highest[h] = from_ordered(order_most[h]);
        if (sees) {
            weights[h] = softmax_weight(scores[h], highest[h]);
        }
    }
    shared_bits[thread.index] = bitcast<vec4<u32>>(weights);
    // Its barriers also let all threads see all weights.
    let sum = sum_of_tile(weights, thread);

    let quad = thread.index % p.quads;
    let group = thread.index / p.quads;
    var sums = array<vec4<f32>, 4>();
    if (group < p.groups) {
        // The first of the group's keys that the token sees.
        let skipped = (max(unseen, group) - group + p.groups - 1u) / p.groups;
        for (var key = group + skipped * p.groups; key < cached; key += p.groups) {
            let page = min(block_pages[key / PAGE], p.pages - 1u);
            let value = load_value(value_at(page, work.kv_head, quad, key % PAGE));
            let weight = bitcast<vec4<f32>>(shared_bits[key]);
            for (var h = 0u; h < QUERIES; h++) {
                sums[h] = fma(vec4<f32>(weight[h]), value, sums[h]);
            }
        }
        if (holds_new && cached % p.groups == group) {
            let value = new_value[quad];
            let weight = bitcast<vec4<f32>>(shared_bits[cached]);
            for (var h = 0u; h < QUERIES; h++) {
                sums[h] = fma(vec4<f32>(weight[h]), value, sums[h]);
            }
        }
    }

    var out = vec4<f32>();
    workgroupBarrier();
    shared_bits[thread.index] = bitcast<vec4<u32>>(sums[0]);
    shared_bits[256u + thread.index] = bitcast<vec4<u32>>(sums[1]);
    workgroupBarrier();
    if (group < min(QUERIES, 2u)) {
        out = sum_of_groups(group * 256u + quad);
    }
    if (QUERIES > 2u) {
        workgroupBarrier();
        shared_bits[thread.index] = bitcast<vec4<u32>>(sums[2]);
        shared_bits[256u + thread.index] = bitcast<vec4<u32>>(sums[3]);
        workgroupBarrier();
        if (group >= 2u && group < 4u) {
            out = sum_of_groups((group - 2u) * 256u + quad);
        }
    }
    // The next block's pages are behind a barrier of their own.
    let head = min(group, QUERIES - 1u);
    return State(highest[head], sum[head], out);
}

fn sum_of_groups(first: u32) -> vec4<f32> {
    var sum = bitcast<vec4<f32>>(shared_bits[first]);
    for (var group = 1u; group < p.groups; group++) {
        sum += bitcast<vec4<f32>>(shared_bits[first + group * p.quads]);
    }
    return sum;
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    var item = flat_group(thread);
    var block = 0u;
    if (SPLIT == 1u) {
        block = item % p.blocks;
        item /= p.blocks;
    }
    // The number of the workgroup among those of this block.
    let place = item;
    let tile = item % p.tiles;
    item /= p.tiles;
    let kv_head = item % p.kv;
    let token = item / p.kv;
    if (token >= p.rows) {
        return;
    }

    let first_head = kv_head * (p.query / p.kv) + tile * p.tile;
    let heads = min(p.tile, p.query / p.kv - tile * p.tile);
    let quad = thread.index % p.quads;
    let head = thread.index / p.quads;

    // Which token of which sequence, if of any.
    let sequence = select(sequences_or_slots[token], token, FUSED == 1u);
    var belongs = sequence < p.sequences;
    if (belongs) {
        belongs = token >= query_starts[sequence] && token < query_starts[sequence + 1u];
    }
    let position = positions[token];
    let seen = min(position, most_keys(p.max_pages) - 1u) + 1u;
    let unseen = max(seen, p.window) - p.window;
    let blocks = (seen - 1u) / BLOCK + 1u;
    let first_block = unseen / BLOCK;
    block += first_block;
    if (!belongs) {
        if (SPLIT == 0u && head < heads) {
            store_output(token, first_head + head, quad, vec4<f32>());
        }
        return;
    }
    if (block >= blocks) {
        return;
    }

    let row = token * (p.query + 2u * p.kv) * p.dim;
    if (head < QUERIES) {
        var query = vec4<f32>();
        if (head < heads) {
            let start = row + (first_head + head) * p.dim;
            if (FUSED == 1u) {
                query = rotated_quad(start, quad, position);
            } else {
                query = plain_quad(start, quad);
            }
        }
        queries[thread.index] = query * p.scale;
    }
    var work = Work(sequence, kv_head, seen, unseen, false);
    if (FUSED == 1u) {
        let slot = sequences_or_slots[token];
        // The block of the new key, if this workgroup has it.
        let last = SPLIT == 0u || block + 1u == blocks;
        work.is_new = slot < p.pages * PAGE && last;
        if (work.is_new && thread.index < p.quads) {
            let key = rotated_quad(row + (p.query + kv_head) * p.dim, quad, position);
            let value = plain_quad(row + (p.query + p.kv + kv_head) * p.dim, quad);
            new_key[quad] = as_cached(key);
            new_value[quad] = as_cached(value);
            if (tile == 0u) {
                store_key(key_at(slot / PAGE, kv_head, quad, slot % PAGE), key);
                store_value(value_at(slot / PAGE, kv_head, quad, slot % PAGE), value);
            }
        }
    }

    if (SPLIT == 1u) {
        let state = block_state(work, block, thread);
        if (head < QUERIES) {
            let at = (place * p.blocks + block - first_block) * QUERIES + head;
            let first = 4u * at * (p.quads + 1u);
            if (quad == 0u) {
                output[first] = state.highest;
                output[first + 1u] = state.sum;
            }
            let to = first + 4u * (quad + 1u);
            output[to] = state.out.x;
            output[to + 1u] = state.out.y;
            output[to + 2u] = state.out.z;
            output[to + 3u] = state.out.w;
        }
    } else {
        var state = block_state(work, first_block, thread);
        for (block = first_block + 1u; block < blocks; block++) {
            state = join(state, block_state(work, block, thread));
        }
        if (head < heads) {
            store_output(token, first_head + head, quad, state.out / state.sum);
        }
    }
}

fn store_output(token: u32, head: u32, quad: u32, x: vec4<f32>) {
    let start = (token * p.query + head) * p.dim;
    for (var e = 0u; e < 4u; e++) {
        if (4u * quad + e < p.dim) {
            output[start + 4u * quad + e] = x[e];
        }
    }
}
