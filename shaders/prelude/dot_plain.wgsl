
// `a · b` of four int8 each, by plain products.
fn dot4(a: u32, b: u32) -> i32 {
    return extractBits(bitcast<i32>(a), 0u, 8u) * extractBits(bitcast<i32>(b), 0u, 8u)
        + extractBits(bitcast<i32>(a), 8u, 8u) * extractBits(bitcast<i32>(b), 8u, 8u)
        + extractBits(bitcast<i32>(a), 16u, 8u) * extractBits(bitcast<i32>(b), 16u, 8u)
        + extractBits(bitcast<i32>(a), 24u, 8u) * extractBits(bitcast<i32>(b), 24u, 8u);
}
