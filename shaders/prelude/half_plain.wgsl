
// The two f16 of a word.
fn unpack_half(word: u32) -> vec2<f32> {
    return unpack2x16float(word);
}
