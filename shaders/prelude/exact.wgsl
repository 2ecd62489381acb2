
// exp and ln to a few units in the last place: WGSL promises less of its own.

// `e^x` for x ≤ 0; 0 below −87, where f32 has no more normal numbers.
fn exp_exact(x: f32) -> f32 {
    if (!(x >= -87.0)) {
        return 0.0;
    }
    // x = n ln 2 + r. The first part of ln 2 has few bits, so that its product with n is exact.
    let n = round(x * 1.44269504);
    let r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x));
    var y = fma(r, 1.3888889e-3, 8.3333333e-3);
    y = fma(r, y, 4.1666667e-2);
    y = fma(r, y, 0.16666667);
    y = fma(r, y, 0.5);
    y = 1.0 + fma(r * r, y, r);
    return y * bitcast<f32>(u32(i32(n) + 127) << 23u);
}

// `ln(1 + x)` for x in −0.32 .. 0.42: 2 artanh(x / (2 + x)), by its series.
fn ln_one_plus(x: f32) -> f32 {
    let s = x / (2.0 + x);
    let z = s * s;
    var y = fma(z, 0.07692308, 0.09090909);
    y = fma(z, y, 0.11111111);
    y = fma(z, y, 0.14285714);
    y = fma(z, y, 0.2);
    y = fma(z, y, 0.33333333);
    return 2.0 * fma(s * z, y, s);
}

// `ln x` for normal x > 0.
fn ln_exact(x: f32) -> f32 {
    // x = 2^n · f, with f in √½ .. √2.
    let word = bitcast<u32>(x) - 0x3f3504f3u;
    let n = bitcast<i32>(word) >> 23u;
    let f = bitcast<f32>((word & 0x7fffffu) + 0x3f3504f3u);
    return fma(f32(n), 0.69314718, ln_one_plus(f - 1.0));
}
