//! The arguments of each op, with its formula.
//!
//! `rows`, where an op has it, is the number of rows it works on; buffers may be longer. `T`, `S`
//! and `R` are the tokens, sequences and logit rows of the step's [`StepKey`](super::StepKey).

use std::num::NonZeroUsize;

use super::{Backend, Element};
use crate::error::RunError;

/// Quantised rows: what every ternary product reads.
///
/// For a row `x` of f32: `s = 127 / max(max |x_i|, 1e-5)`, `q_i = clamp(round_half_even(x_i · s),
/// −128, 127)`; the value meant is `q_i / s`. (BitNet b1.58, arXiv 2402.17764, section 2, with the
/// constants of transformers' `ActQuant`.) Where a value of the row is NaN or infinite, `s` is NaN
/// and `q` zeros: every product of the row is then NaN, so that the fault reaches the logits and is
/// reported.
///
/// Rows that an op of the same step reads belong to that step: a backend that computes them where
/// they are read need not write them here.
#[repr(C)] // so that `check` may view a checked backend's struct as the inner backend's
pub struct Quantized<B: Backend> {
    /// `q`, row `t` at `t · quantized_stride(width)`, zero beyond the width.
    pub values: B::Buffer<i8>,
    /// `s` of each row.
    pub scales: B::Buffer<f32>,
    /// `Σ q_i` of each row: with unsigned codes `c = t + 1`, `Σ t·q = Σ c·q − Σ q`.
    pub sums: B::Buffer<i32>,
}

/// The inputs of a ragged step, written by the host before it. There is no prefill and no decode:
/// a sequence brings as many tokens as it likes.
#[repr(C)] // so that `check` may view a checked backend's struct as the inner backend's
pub struct Batch<B: Backend> {
    /// `[T]` token, [`FROM_LANE`](super::FROM_LANE)` | lane`, or [`NONE`](super::NONE) for padding.
    pub tokens: B::Buffer<u32>,
    /// `[T]` position of each token in its sequence, from 0.
    pub positions: B::Buffer<u32>,
    /// `[T]` sequence of each token, an index into this batch's sequences.
    pub sequences: B::Buffer<u32>,
    /// `[T]` KV slot that the token's key and value go to, `NONE` for padding.
    pub slots: B::Buffer<u32>,
    /// `[S + 1]` first token of each sequence, then the number of tokens; padding repeats it.
    pub query_starts: B::Buffer<u32>,
    /// `[S]` length of each sequence with this step's tokens; 0 for padding.
    pub kv_lens: B::Buffer<u32>,
    /// `[S × max_pages]` pages of each sequence in order; beyond its length anything.
    pub page_table: B::Buffer<u32>,
    /// Row length of `page_table`; the same in every step.
    pub max_pages: usize,
    /// `[S]` lane of each sequence: its row in `history` and `sampled` for as long as it lives.
    pub lanes: B::Buffer<u32>,
    /// `[R]` row of each logit row among the step's tokens, `NONE` for padding.
    pub logit_rows: B::Buffer<u32>,
    /// `[R]` token to score at each logit row, `NONE` for none.
    pub targets: B::Buffer<u32>,
    /// `[R]` options of each logit row.
    pub sample_rows: B::Buffer<SampleRow>,
    /// Tokens of the logit biases of all rows.
    pub bias_tokens: B::Buffer<u32>,
    /// Values of the logit biases of all rows.
    pub bias_values: B::Buffer<f32>,
}

/// What outlives a step on the device, one row per lane.
#[repr(C)] // so that `check` may view a checked backend's struct as the inner backend's
pub struct Lanes<B: Backend> {
    /// `[lanes × context]` tokens of each sequence by position, for the penalties.
    pub history: B::Buffer<u32>,
    /// Row length of `history`.
    pub context: usize,
    /// `[lanes]` token last sampled for each lane.
    pub sampled: B::Buffer<u32>,
}

/// Sampling options of one logit row. [`engine::sampling`](crate::engine::sampling) documents
/// what they mean and in which order they apply; [`Sample`] has the formulas.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct SampleRow {
    /// Lane of the row's sequence, [`NONE`](super::NONE) for padding.
    pub lane: u32,
    /// Tokens of the sequence so far: the position of the token that is sampled.
    pub length: u32,
    /// Tokens that came from the prompt.
    pub prompt: u32,
    /// First logit bias of this row in `bias_tokens`.
    pub bias_start: u32,
    /// Number of logit biases.
    pub bias_count: u32,
    /// 0 picks the highest logit.
    pub temperature: f32,
    /// Keep the k highest logits; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the highest probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or answer.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the answer.
    pub presence_penalty: f32,
    /// Low half of the seed.
    pub seed_low: u32,
    /// High half of the seed.
    pub seed_high: u32,
    /// Which of several answers to one prompt this is.
    pub choice: u32,
    /// How many alternatives are reported.
    pub logprobs: u32,
}

/// `out[t] = scale · table[token of t]`, and `history[lane of t][position of t] = token of t`.
///
/// The token of an entry with [`FROM_LANE`](super::FROM_LANE) is `sampled[lane]`. A token beyond
/// the table, or [`NONE`](super::NONE), gives a row of zeros and no history.
pub struct Embed<'a, B: Backend> {
    /// Rows of tokens, `T`.
    pub rows: usize,
    /// The step's inputs.
    pub batch: &'a Batch<B>,
    /// Where tokens come from and go to.
    pub lanes: &'a mut Lanes<B>,
    /// `[vocabulary, width]`.
    pub table: &'a B::Table,
    /// 1 for most families; the square root of the width for some.
    pub scale: f32,
    /// `[T, width]`.
    pub output: &'a mut B::Buffer<f32>,
    /// Hidden size.
    pub width: usize,
}

/// An RMS norm: `x_i · (1 / sqrt(mean(x²) + eps)) · gain_i`, in f32. (arXiv 1910.07467; order of
/// the products and eps inside the root as in transformers.)
pub struct Norm<'a, B: Backend> {
    /// `[width]`.
    pub gain: &'a B::Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

impl<B: Backend> Clone for Norm<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Norm<'_, B> {}

/// `output[r] = norm(input[gather[r]])`, rows in f32, or `output[r] += …`, where product and sum may
/// be rounded once instead of twice. A row gathered from [`NONE`](super::NONE) is of zeros.
pub struct RmsNorm<'a, B: Backend> {
    /// Rows written.
    pub rows: usize,
    /// Row length.
    pub width: usize,
    /// Rows read.
    pub input: &'a B::Buffer<f32>,
    /// Which row of `input` each output row comes from, starting at `first`; the same row if absent.
    pub gather: Option<&'a B::Buffer<u32>>,
    /// First entry of `gather` that is used.
    pub first: usize,
    /// The norm.
    pub norm: Norm<'a, B>,
    /// `[rows, width]`.
    pub output: &'a mut B::Buffer<f32>,
    /// Store or add.
    pub epilogue: Epilogue,
}

/// `quantized[t] = quantize(norm(input[t]))`, see [`Norm`] and [`Quantized`].
pub struct RmsNormQuantize<'a, B: Backend> {
    /// Rows, `T`.
    pub rows: usize,
    /// Row length.
    pub width: usize,
    /// `[rows, width]`.
    pub input: &'a B::Buffer<f32>,
    /// The norm; without one the rows are quantised as they are.
    pub norm: Option<Norm<'a, B>>,
    /// The quantised rows.
    pub quantized: &'a mut Quantized<B>,
    /// Where the rows go in f32, before quantisation, for what is not ternary (LoRA).
    pub normed: Option<&'a mut B::Buffer<f32>>,
}

/// What an op does with the memory it writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// Overwrites it.
    Store,
    /// Adds to it: the residual connection.
    Add,
}

/// `y[t][n] = (Σ_k t_nk · q_tk) · (scale_n / s_t)`; the sum is exact in i32, then one conversion
/// to f32, one division and one product, in f32, in this order; where it is added, product and sum
/// may be rounded once instead of twice. `scale_n` is the scale of the
/// [part](super::Backend::pack_ternary) that row `n` belongs to.
pub struct TernaryMatmul<'a, B: Backend> {
    /// Rows, `T`.
    pub rows: usize,
    /// Width of the input, `K`: columns of the matrix.
    pub width: usize,
    /// Rows of the matrix, `N`: features of the output.
    pub features: usize,
    /// `[rows, K]`.
    pub input: &'a Quantized<B>,
    /// `[N, K]`.
    pub weight: &'a B::TernaryMatrix,
    /// Row `t` of the product goes to `output[t · stride + column ..][.. N]`.
    pub output: &'a mut B::Buffer<f32>,
    /// Row length of `output`.
    pub stride: usize,
    /// First column that is written.
    pub column: usize,
    /// Store or add.
    pub epilogue: Epilogue,
}

/// A product of two thin f32 matrices, added: `output[t][column + n] += Σ_j up_jn · inner_tj` with
/// `inner_tj = Σ_k down_jk · x_tk`. (LoRA, arXiv 2106.09685, section 4.1: `down` is `A`, `up` is `B`
/// transposed and times the adapter's scale; adapters of one matrix stand below each other.)
///
/// Everything is in f32. The second sum runs over `j` in order, by fused multiply-adds from 0, and
/// is added to the output in one rounding; the first has an order of the backend's own, which
/// depends on the width alone.
pub struct LowRank<'a, B: Backend> {
    /// Rows, `T`.
    pub rows: usize,
    /// Width of the input, `K`.
    pub width: usize,
    /// Rows of both matrices, `R`.
    pub rank: usize,
    /// Features of the output, `N`.
    pub features: usize,
    /// `[rows, K]`: what the ternary product beside it reads, before quantisation.
    pub input: &'a B::Buffer<f32>,
    /// `[R, K]`.
    pub down: &'a B::Buffer<f32>,
    /// `[R, N]`.
    pub up: &'a B::Buffer<f32>,
    /// `[rows, R]`, what is between the two.
    pub inner: &'a mut B::Buffer<f32>,
    /// Row `t` of the product is added to `output[t · stride + column ..][.. N]`.
    pub output: &'a mut B::Buffer<f32>,
    /// Row length of `output`.
    pub stride: usize,
    /// First column that is added to.
    pub column: usize,
}

impl<B: Backend> LowRank<'_, B> {
    /// Checks the shapes of all arguments; `len` answers the elements of a buffer.
    pub fn check(&self, len: impl Fn(&B::Buffer<f32>) -> usize) -> Result<(), RunError> {
        const OP: &str = "low_rank";
        let Self { rows, width, rank, features, stride, column, .. } = *self;
        check_len(OP, "input", rows * width, len(self.input))?;
        check_len(OP, "down", rank * width, len(self.down))?;
        check_len(OP, "up", rank * features, len(self.up))?;
        check_len(OP, "inner", rows * rank, len(self.inner))?;
        check_len(OP, "stride", column + features, stride)?;
        let end = rows.checked_sub(1).map_or(0, |last| last * stride + column + features);
        check_len(OP, "output", end, len(self.output))
    }
}

/// How heads are laid out in a row of `qkv`: query heads, then key heads, then value heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads; head `h` reads key/value head `h / (query / kv)`.
    pub query: usize,
    /// Key/value heads.
    pub kv: usize,
    /// Width of a head, even.
    pub dim: usize,
}

impl Heads {
    /// Row length of `qkv`.
    pub fn qkv_width(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }
    /// Row length of the attention's output.
    pub fn output_width(&self) -> usize {
        self.query * self.dim
    }
}

/// Rotates the query and key heads of `qkv` in place and appends keys and values to the cache.
///
/// Half-split rotation (arXiv 2104.09864, in the layout of transformers): with `d = dim / 2`,
/// `x'_i = x_i · cos_i − x_{i+d} · sin_i` and `x'_{i+d} = x_{i+d} · cos_i + x_i · sin_i` for
/// `i < d`, where `cos` and `sin` are row `position` of the tables. With head norms, each query and
/// key head is normed before it is rotated. Tokens whose slot is [`NONE`](super::NONE) append
/// nothing.
///
/// A cache of [`KvType::Int8`](super::KvType::Int8) holds each key head, after its rotation, and
/// each value head as integers with a scale of their own, symmetric around zero: with
/// `m = max(max |x_i|, 1e-30)` it holds `q_i = round_half_even(x_i · (127 / m))`, which lies in
/// −127 ..= 127, and the f32 scale `d = m / 127`; attention reads `q_i · d`. Division and product
/// are those of f32. The floor, [`KV_FLOOR`](super::KV_FLOOR), only keeps `127 / m` finite and `d`
/// a normal number, which some devices would take for zero if it were not (that takes `m` above
/// about 1.5e-36): unlike the 1e-5 of [`Quantized`], no model was trained with it, so it takes
/// nothing away that is not far below what f16 holds. Where a value of a head is NaN or infinite,
/// `d` is NaN, and so is all that is read of it.
pub struct RopeAppendKv<'a, B: Backend> {
    /// Rows of tokens, `T`.
    pub rows: usize,
    /// The step's inputs: positions and slots.
    pub batch: &'a Batch<B>,
    /// Shape of a row of `qkv`.
    pub heads: Heads,
    /// `[T, qkv_width]`; queries are rotated in place, keys need not be.
    pub qkv: &'a mut B::Buffer<f32>,
    /// `[context, dim / 2]`.
    pub cos: &'a B::Buffer<f32>,
    /// `[context, dim / 2]`.
    pub sin: &'a B::Buffer<f32>,
    /// Norm of each query head, `[dim]`.
    pub query_norm: Option<Norm<'a, B>>,
    /// Norm of each key head, `[dim]`.
    pub key_norm: Option<Norm<'a, B>>,
    /// The cache.
    pub kv: &'a mut B::KvCache,
    /// Which layer of it.
    pub layer: usize,
}

/// Causal attention of each query over the keys and values of its sequence, positions
/// [`first_key`]` ..=` its own, found through the page table: `softmax(q·k · scale) · v` per head, in
/// f32.
///
/// Keys are taken in blocks of [`KEY_BLOCK`](super::KEY_BLOCK) aligned to absolute positions, and
/// blocks are combined in ascending order, so that a query's result depends on its sequence alone.
pub struct PagedAttention<'a, B: Backend> {
    /// Rows of tokens, `T`.
    pub rows: usize,
    /// Sequences, `S`.
    pub sequences: usize,
    /// The step's inputs: positions, sequences, query starts, KV lengths, page table.
    pub batch: &'a Batch<B>,
    /// Shape of a row of `qkv`.
    pub heads: Heads,
    /// `1 / sqrt(dim)` for most families.
    pub scale: f32,
    /// How many keys a query sees, the latest, its own among them; all if absent.
    pub window: Option<NonZeroUsize>,
    /// `[T, qkv_width]`, of which the rotated queries are read.
    pub qkv: &'a B::Buffer<f32>,
    /// The cache, this step's keys and values included.
    pub kv: &'a B::KvCache,
    /// Which layer of it.
    pub layer: usize,
    /// `[T, output_width]`; rows of padding are zeros.
    pub output: &'a mut B::Buffer<f32>,
}

/// The first position whose key a query at `position` sees: with a window of `w` keys it sees those
/// with `position − w < key ≤ position`. (transformers' `sliding_window_causal_mask_function`;
/// arXiv 2004.05150, section 3.1.)
pub fn first_key(window: Option<NonZeroUsize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window.get()))
}

/// The activation of a gated feed-forward network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)²`.
    Relu2,
    /// `x / (1 + exp(−x))`.
    Silu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`, transformers' `gelu_pytorch_tanh`.
    GeluTanh,
}

/// `quantized[t] = quantize(norm(act(gate[t]) · up[t]))`; `gate_up[t]` holds the gate's `width`
/// values, then up's. All of it in f32: ReLU² overflows f16. After a product of the same step that
/// reads the quantised rows, `gate_up` is the step's own too and may hold anything.
pub struct GateNormQuantize<'a, B: Backend> {
    /// Rows, `T`.
    pub rows: usize,
    /// Width of the network.
    pub width: usize,
    /// `[rows, 2 · width]`.
    pub gate_up: &'a B::Buffer<f32>,
    /// The activation.
    pub activation: Activation,
    /// The sub-norm, in families that have one.
    pub norm: Option<Norm<'a, B>>,
    /// The quantised rows.
    pub quantized: &'a mut Quantized<B>,
    /// Where the rows go in f32, before quantisation, for what is not ternary (LoRA).
    pub normed: Option<&'a mut B::Buffer<f32>>,
}

/// One pass of the output head: `logits[r] = table · norm(input[logit_rows[first + r]])` for
/// `r < rows`. Padding rows become zeros.
pub struct LmHead<'a, B: Backend> {
    /// Rows of this pass, at most the reserved rows of `logits`.
    pub rows: usize,
    /// First logit row of this pass.
    pub first: usize,
    /// Hidden size.
    pub width: usize,
    /// Rows of the table.
    pub vocabulary: usize,
    /// The step's inputs: logit rows.
    pub batch: &'a Batch<B>,
    /// `[T, width]`.
    pub input: &'a B::Buffer<f32>,
    /// The final norm.
    pub norm: Norm<'a, B>,
    /// `[vocabulary, width]`.
    pub table: &'a B::Table,
    /// `[rows, width]`, the normed rows; also what embedders read.
    pub normed: &'a mut B::Buffer<f32>,
    /// `[rows, vocabulary]`.
    pub logits: &'a mut B::Buffer<f32>,
}

/// Results of [`Sample`], by logit row of the whole step.
#[repr(C)] // so that `check` may view a checked backend's struct as the inner backend's
pub struct Samples<B: Backend> {
    /// `[R]` the token; [`NONE`](super::NONE) where a logit of the row is NaN or infinite, and for
    /// padding.
    pub tokens: B::Buffer<u32>,
    /// `[R]` its log-probability under the unmodified logits, where that is asked for; NaN where a
    /// logit is not finite, 0 for padding.
    pub logprobs: B::Buffer<f32>,
    /// `[R × MAX_LOGPROBS]` the likeliest tokens under the unmodified logits, best first, as many as
    /// the row asks for; then [`NONE`](super::NONE).
    pub top_tokens: B::Buffer<u32>,
    /// `[R × MAX_LOGPROBS]` their log-probabilities; then 0.
    pub top_logprobs: B::Buffer<f32>,
}

/// Picks a token for each logit row of a pass, into `samples[first + r]` and `sampled[lane]`;
/// [`NONE`](super::NONE) into both where a logit of the row is NaN or infinite.
///
/// Greedy takes the highest logit, the lowest token among equals. Otherwise, for row `r` with
/// options `o`, in this order (vLLM's):
///
/// 1. `x_v += bias_v` for the row's logit biases;
/// 2. penalties over `history[lane][.. length]`: for tokens in it, `x_v = x_v > 0 ? x_v / rep :
///    x_v · rep`; then for tokens at or after `prompt`, `x_v −= frequency · count + presence`;
/// 3. temperature 0: the highest `x_v` wins, as in greedy; else `x_v /= temperature`;
/// 4. min-p: drop `x_v < max x + ln(min_p)`;
/// 5. top-k: keep the k highest of what is left (equal ones by lowest token);
/// 6. top-p: of what is left, in descending order, keep the first whose cumulative share of
///    `Σ exp(x)` reaches `top_p` and all before it;
/// 7. the highest `x_v + g_v` among what is left wins, where `g_v = −ln(−ln(u_v))` and `u_v` in
///    (0, 1) is a hash of seed, position, choice and v ([`gumbel`](super::random::gumbel)).
///
/// Step 7 draws from softmax(x) (the Gumbel-max trick, arXiv 1611.00712) without a sum, so the
/// draw does not depend on the order of any reduction.
pub struct Sample<'a, B: Backend> {
    /// Rows of this pass.
    pub rows: usize,
    /// First logit row of this pass.
    pub first: usize,
    /// Row length of `logits`.
    pub vocabulary: usize,
    /// Whether every row is greedy with no option set.
    pub greedy: bool,
    /// Whether log-probabilities are wanted.
    pub logprobs: bool,
    /// The step's inputs: options and biases.
    pub batch: &'a Batch<B>,
    /// History, and where the sampled tokens go.
    pub lanes: &'a mut Lanes<B>,
    /// `[rows, vocabulary]`; left as it is.
    pub logits: &'a B::Buffer<f32>,
    /// The results.
    pub samples: &'a mut Samples<B>,
}

/// Log-probability of a given token at each logit row of a pass:
/// `logprobs[first + r] = x_v − ln Σ exp(x)` with `v = targets[first + r]`; NaN where a logit is
/// not finite, 0 where there is no target.
pub struct Score<'a, B: Backend> {
    /// Rows of this pass.
    pub rows: usize,
    /// First logit row of this pass.
    pub first: usize,
    /// Row length of `logits`.
    pub vocabulary: usize,
    /// The step's inputs: targets.
    pub batch: &'a Batch<B>,
    /// `[rows, vocabulary]`.
    pub logits: &'a B::Buffer<f32>,
    /// The results, `logprobs` of [`Samples`].
    pub samples: &'a mut Samples<B>,
}

/// Checks that a buffer is as long as an op needs it to be.
pub fn check_len(
    op: &'static str,
    argument: &'static str,
    needed: usize,
    len: usize,
) -> Result<(), RunError> {
    if len >= needed {
        return Ok(());
    }
    Err(RunError::Shape {
        op,
        argument,
        expected: format!("at least {needed} elements"),
        found: len.to_string(),
    })
}

/// Reserves quantised rows.
pub fn allocate_quantized<B: Backend>(
    backend: &B,
    name: &'static str,
    rows: usize,
    width: usize,
) -> Result<Quantized<B>, crate::error::LoadError> {
    fn of<B: Backend, T: Element>(
        backend: &B,
        name: &'static str,
        len: usize,
    ) -> Result<B::Buffer<T>, crate::error::LoadError> {
        backend.allocate(name, len)
    }
    Ok(Quantized {
        values: of(backend, name, rows * super::quantized_stride(width))?,
        scales: of(backend, name, rows)?,
        sums: of(backend, name, rows)?,
    })
}
