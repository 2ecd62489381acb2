
// The random numbers of sampling; `backend::random`.

// Bounds on `gumbel`, with some room.
const GUMBEL_LEAST = -3.5;
const GUMBEL_MOST = 23.0;

// Low and high word of a product; WGSL has no integers of 64 bits.
fn multiply_wide(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let cross = (a & 0xffffu) * (b >> 16u);
    let other = (a >> 16u) * (b & 0xffffu);
    let middle = (low >> 16u) + (cross & 0xffffu) + (other & 0xffffu);
    let high = (a >> 16u) * (b >> 16u) + (cross >> 16u) + (other >> 16u) + (middle >> 16u);
    return vec2<u32>(a * b, high);
}

// Philox4x32-10.
fn philox(seed: vec2<u32>, counter: vec4<u32>) -> vec4<u32> {
    var key = seed;
    var c = counter;
    for (var round = 0u; round < 10u; round++) {
        let p0 = multiply_wide(c.x, 0xd2511f53u);
        let p1 = multiply_wide(c.z, 0xcd9e8d57u);
        c = vec4<u32>(p1.y ^ c.y ^ key.x, p1.x, p0.y ^ c.w ^ key.y, p0.x);
        key += vec2<u32>(0x9e3779b9u, 0xbb67ae85u);
    }
    return c;
}

// `−ln(−ln u)` with `u = (bits + 1/2) / 2³²`.
fn gumbel(bits: u32) -> f32 {
    const UNIT = 2.3283064365386963e-10;
    var inner: f32;
    if (bits < 0xb0000000u) {
        inner = ln_exact((f32(bits) + 0.5) * UNIT);
    } else {
        // Near 1 an f32 has too few bits for u, and enough for its distance to 1.
        inner = ln_one_plus(-(f32(~bits) + 0.5) * UNIT);
    }
    return -ln_exact(-inner);
}
