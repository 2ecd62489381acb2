
// Rotary positions, and the paged cache in the order that `kv.rs` draws. The file that uses this
// has `cos_table`, `sin_table`, `keys`, `values` (arrays of `vec2<u32>`), and in `p`: `dim`,
// `quads`, `kv`, `context`.
//
// The rotation is written with `fma`, so that it has the same bits in every kernel.

// Whether the cache holds f16; else f32.
override KV_F16: u32 = 0u;

// Elements `i` and `i + dim / 2` of a head, rotated. Only padding has positions beyond the tables.
fn rope_pair(low: f32, high: f32, position: u32, i: u32) -> vec2<f32> {
    if (position >= p.context) {
        return vec2<f32>(low, high);
    }
    let at = position * (p.dim / 2u) + i;
    let c = cos_table[at];
    let s = sin_table[at];
    return vec2<f32>(fma(low, c, -(high * s)), fma(high, c, low * s));
}

// The bits of the f16 nearest to `x`, of two equally near the even one. In integers, since WGSL
// leaves the rounding of its own conversions open.
fn half_bits(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if (magnitude > INFINITE_BITS) {
        return sign | 0x7e00u;
    }
    // From 65536 on; a carry takes what rounds up to it from below there too.
    if (magnitude >= 0x47800000u) {
        return sign | 0x7c00u;
    }
    if (magnitude >= 0x38800000u) {
        let rebased = magnitude - 0x38000000u;
        return sign | ((rebased + 0xfffu + ((rebased >> 13u) & 1u)) >> 13u);
    }
    // Denormal: multiples of 2⁻²⁴. Below 2⁻²⁵ all is nearer to zero.
    let exponent = magnitude >> 23u;
    if (exponent < 102u) {
        return sign;
    }
    let mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    let shift = 126u - exponent;
    let even = (mantissa >> shift) & 1u;
    return sign | ((mantissa + (1u << (shift - 1u)) - 1u + even) >> shift);
}

fn half_words(x: vec4<f32>) -> vec2<u32> {
    return vec2<u32>(
        half_bits(x.x) | (half_bits(x.y) << 16u),
        half_bits(x.z) | (half_bits(x.w) << 16u),
    );
}

fn half_values(words: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack_half(words.x), unpack_half(words.y));
}

// Four elements as the cache gives them back.
fn as_cached(x: vec4<f32>) -> vec4<f32> {
    if (KV_F16 == 1u) {
        return half_values(half_words(x));
    }
    return x;
}

// Where four elements of a slot of a page lie.
fn key_at(page: u32, kv_head: u32, quad: u32, slot: u32) -> u32 {
    return ((page * p.kv + kv_head) * p.quads + quad) * PAGE_TOKENS + slot;
}

fn value_at(page: u32, kv_head: u32, quad: u32, slot: u32) -> u32 {
    return ((page * p.kv + kv_head) * PAGE_TOKENS + slot) * p.quads + quad;
}

fn load_key(at: u32) -> vec4<f32> {
    if (KV_F16 == 1u) {
        return half_values(keys[at]);
    }
    return bitcast<vec4<f32>>(vec4<u32>(keys[2u * at], keys[2u * at + 1u]));
}

fn load_value(at: u32) -> vec4<f32> {
    if (KV_F16 == 1u) {
        return half_values(values[at]);
    }
    return bitcast<vec4<f32>>(vec4<u32>(values[2u * at], values[2u * at + 1u]));
}

fn store_key(at: u32, x: vec4<f32>) {
    if (KV_F16 == 1u) {
        keys[at] = half_words(x);
    } else {
        keys[2u * at] = bitcast<vec2<u32>>(x.xy);
        keys[2u * at + 1u] = bitcast<vec2<u32>>(x.zw);
    }
}

fn store_value(at: u32, x: vec4<f32>) {
    if (KV_F16 == 1u) {
        values[at] = half_words(x);
    } else {
        values[2u * at] = bitcast<vec2<u32>>(x.xy);
        values[2u * at + 1u] = bitcast<vec2<u32>>(x.zw);
    }
}
