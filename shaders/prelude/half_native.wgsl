
// The two f16 of a word.
fn unpack_half(word: u32) -> vec2<f32> {
    return vec2<f32>(bitcast<vec2<f16>>(word));
}
