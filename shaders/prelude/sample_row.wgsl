
// `ops::SampleRow`.
struct SampleRow {
    lane: u32,
    length: u32,
    prompt: u32,
    bias_start: u32,
    bias_count: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    seed: array<u32, 2>,
    choice: u32,
    logprobs: u32,
}
