// uses: half, rope
// `ops::RopeAppendKv`: a workgroup for each 8 heads of a row. Queries are rotated in place, a thread
// for each pair of elements; keys and values go to the cache, a thread for each four.

struct Params {
    rows: u32,
    // Heads: of queries, and of keys and as many values.
    query: u32,
    kv: u32,
    dim: u32,
    // Groups of four elements that a head has in the cache.
    quads: u32,
    // Rows of the tables.
    context: u32,
    // Slots that the cache has.
    slots: u32,
    query_norm: u32,
    key_norm: u32,
    query_eps: f32,
    key_eps: f32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> positions: array<u32>;
@group(0) @binding(1) var<storage, read> slots: array<u32>;
@group(0) @binding(2) var<storage, read> cos_table: array<f32>;
@group(0) @binding(3) var<storage, read> sin_table: array<f32>;
@group(0) @binding(4) var<storage, read> query_gain: array<f32>;
@group(0) @binding(5) var<storage, read> key_gain: array<f32>;
@group(0) @binding(6) var<storage, read_write> qkv: array<f32>;
@group(0) @binding(7) var<storage, read_write> keys: array<vec2<u32>>;
@group(0) @binding(8) var<storage, read_write> values: array<vec2<u32>>;

// Threads that have a head of a workgroup each for its norm.
const LANES = WORKGROUP / ROPE_HEADS;

var<workgroup> squares: array<f32, WORKGROUP>;

// Whether a head is normed: 0 for values.
fn is_normed(head: u32) -> bool {
    if (head < p.query) {
        return p.query_norm != 0u;
    }
    return head < p.query + p.kv && p.key_norm != 0u;
}

// An element of a head, normed where it is to be. `start` is where the head starts.
fn element(start: u32, head: u32, i: u32) -> f32 {
    let x = qkv[start + i];
    if (!is_normed(head)) {
        return x;
    }
    let sum = squares[head % ROPE_HEADS * LANES];
    if (head < p.query) {
        return x * (1.0 / sqrt(sum / f32(p.dim) + p.query_eps)) * query_gain[i];
    }
    return x * (1.0 / sqrt(sum / f32(p.dim) + p.key_eps)) * key_gain[i];
}

// An element of a rotated key, zero beyond the head.
fn rotated(start: u32, head: u32, i: u32, position: u32) -> f32 {
    let half = p.dim / 2u;
    if (i >= p.dim) {
        return 0.0;
    }
    let low = i % half;
    let pair = rope_pair(
        element(start, head, low), element(start, head, low + half), position, low,
    );
    return select(pair.y, pair.x, i < half);
}

fn value(start: u32, i: u32) -> f32 {
    if (i >= p.dim) {
        return 0.0;
    }
    return qkv[start + i];
}

@compute @workgroup_size(256)
fn main(thread: Thread) {
    let heads = p.query + 2u * p.kv;
    let pieces = (heads + ROPE_HEADS - 1u) / ROPE_HEADS;
    let group = flat_group(thread);
    let row = group / pieces;
    let first = group % pieces * ROPE_HEADS;
    if (row >= p.rows) {
        return;
    }
    let start = row * heads * p.dim;

    if (p.query_norm + p.key_norm != 0u) {
        let head = first + thread.index / LANES;
        var sum = 0.0;
        if (head < heads) {
            for (var i = thread.index % LANES; i < p.dim; i += LANES) {
                let x = qkv[start + head * p.dim + i];
                sum = fma(x, x, sum);
            }
        }
        squares[thread.index] = sum;
        workgroupBarrier();
        for (var distance = 1u; distance < LANES; distance <<= 1u) {
            if (thread.index % (2u * distance) == 0u) {
                squares[thread.index] += squares[thread.index + distance];
            }
            workgroupBarrier();
        }
    }

    let half = p.dim / 2u;
    let position = positions[row];
    let slot = slots[row];
    for (var item = thread.index; item < ROPE_HEADS * half; item += WORKGROUP) {
        let head = first + item / half;
        let i = item % half;
        let at = start + head * p.dim;
        if (head < p.query) {
            let pair = rope_pair(element(at, head, i), element(at, head, i + half), position, i);
            qkv[at + i] = pair.x;
            qkv[at + half + i] = pair.y;
        } else if (head < heads && i < p.quads && slot < p.slots) {
            let e = 4u * i;
            if (head < p.query + p.kv) {
                let to = key_at(slot / PAGE_TOKENS, head - p.query, i, slot % PAGE_TOKENS);
                store_key(to, vec4<f32>(
                    rotated(at, head, e, position),
                    rotated(at, head, e + 1u, position),
                    rotated(at, head, e + 2u, position),
                    rotated(at, head, e + 3u, position),
                ));
            } else {
                let to = value_at(slot / PAGE_TOKENS, head - p.query - p.kv, i, slot % PAGE_TOKENS);
                store_value(to, vec4<f32>(
                    value(at, e), value(at, e + 1u), value(at, e + 2u), value(at, e + 3u),
                ));
            }
        }
    }
}
