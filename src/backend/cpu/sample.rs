//! [`Sample`]: a token for each row of logits.
//!
//! Nothing here sorts the vocabulary. What is kept is always a head of the descending order, so it
//! is a [`Cut`]: a logit and a token. To find one, the logits are counted (or their probabilities
//! summed) in buckets by value, and only the bucket in which the limit is reached is sorted. Of the
//! noise, only what can win is computed.

use super::exp::exp;
use super::isa::Kernel;
use super::pool::Disjoint;
use super::simd::{LANES, Simd};
use super::softmax::{all_finite, argmax, log_probability, log_sum_exp};
use super::{Cpu, SMALL};
use crate::backend::ops::{Batch, Sample, SampleRow, check_len};
use crate::backend::random::{GUMBEL_MAX, gumbel_of_bits, token_bits};
use crate::backend::{MAX_LOGPROBS, NONE};
use crate::error::RunError;
use std::cell::RefCell;
use std::cmp::Ordering;
use std::ops::Range;

/// Buckets of a [`Cut`]'s search.
const BUCKETS: usize = 4096;

/// The widest range of logits that gets buckets of its own: e^−64 of the highest probability.
const WIDEST: f32 = 64.0;

/// Tokens above a place in the descending order (equal logits: ascending by token) are kept, and
/// the token at the place itself.
#[derive(Clone, Copy)]
struct Cut {
    logit: f32,
    token: u32,
}

impl Cut {
    const NOTHING: Self = Self { logit: f32::NEG_INFINITY, token: u32::MAX };

    #[inline(always)]
    fn keeps(self, token: usize, x: f32) -> bool {
        x > self.logit || (x == self.logit && token <= self.token as usize)
    }
}

/// How far down a cut is made.
enum Limit {
    /// At this many tokens.
    Count(u32),
    /// Where this share of the weights is reached.
    Share(f32),
}

/// Memory of a thread; grows to the vocabulary and stays.
#[derive(Default)]
struct Scratch {
    x: Vec<f32>,
    weights: Vec<f32>,
    /// Of each token: [`SEEN`] and the number of its occurrences in the answer. All zero between
    /// rows.
    counts: Vec<u32>,
    buckets: Vec<f64>,
    bucket: Vec<u32>,
}

const SEEN: u32 = 1 << 31;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

struct SampleRows<'a> {
    rows: Range<usize>,
    vocabulary: usize,
    greedy: bool,
    logprobs: bool,
    logits: &'a [f32],
    options: &'a [SampleRow],
    batch: &'a Batch<Cpu>,
    history: &'a [u32],
    context: usize,
    out: &'a Out<'a>,
    scratch: &'a mut Scratch,
}

/// The results of the pass, from its first row on.
struct Out<'a> {
    tokens: Disjoint<'a, u32>,
    /// Log-probabilities of the tokens, and the best tokens with theirs.
    logprobs: Option<(Disjoint<'a, f32>, Disjoint<'a, u32>, Disjoint<'a, f32>)>,
}

impl Kernel for SampleRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for row in self.rows.clone() {
            let logits = &self.logits[row * self.vocabulary..][..self.vocabulary];
            let options = self.options[row];
            let sound = options.lane != NONE && all_finite(s, logits) && !logits.is_empty();
            let token = match sound {
                false => NONE,
                true if self.greedy => argmax(s, logits).0 as u32,
                true => self.pick(s, logits, &options),
            };
            // SAFETY: the parts of a job have rows of their own, here and below.
            unsafe { self.out.tokens.range(row..row + 1)[0] = token };
            let Some((logprobs, top_tokens, top_logprobs)) = &self.out.logprobs else { continue };
            let top = row * MAX_LOGPROBS..(row + 1) * MAX_LOGPROBS;
            // SAFETY: as above.
            let (logprob, top_tokens, top_logprobs) = unsafe {
                (
                    logprobs.range(row..row + 1),
                    top_tokens.range(top.clone()),
                    top_logprobs.range(top),
                )
            };
            logprob[0] = if options.lane == NONE { 0.0 } else { f32::NAN };
            top_tokens.fill(NONE);
            top_logprobs.fill(0.0);
            if sound && self.logprobs {
                let normal = log_sum_exp(s, logits);
                logprob[0] = log_probability(logits[token as usize], normal);
                let wanted = (options.logprobs as usize).min(MAX_LOGPROBS);
                let found = best(logits, &mut top_tokens[..wanted]);
                for (token, logprob) in top_tokens[..found].iter().zip(top_logprobs) {
                    *logprob = log_probability(logits[*token as usize], normal);
                }
            }
        }
    }
}

/// The tokens of the highest logits, best first; how many there are.
fn best(logits: &[f32], out: &mut [u32]) -> usize {
    let mut found = 0;
    if out.is_empty() {
        return 0;
    }
    let mut least = f32::NEG_INFINITY;
    for (token, &x) in logits.iter().enumerate() {
        // An equal logit of a later token is worth less.
        if found == out.len() && x <= least {
            continue;
        }
        let at = out[..found].partition_point(|&other| logits[other as usize] >= x);
        found = (found + 1).min(out.len());
        out[at..found].rotate_right(1);
        out[at] = token as u32;
        least = logits[out[found - 1] as usize];
    }
    found
}

impl SampleRows<'_> {
    /// Steps 1 to 7 of [`Sample`].
    #[inline(always)]
    fn pick<S: Simd>(&mut self, s: S, logits: &[f32], options: &SampleRow) -> u32 {
        let mut x = std::mem::take(&mut self.scratch.x);
        x.clear();
        x.extend_from_slice(logits);
        self.add_biases(&mut x, options);
        self.penalize(&mut x, options);
        let token = if options.temperature == 0.0 {
            argmax(s, &x).0 as u32
        } else {
            divide(s, &mut x, options.temperature);
            let (best, top) = argmax(s, &x);
            let cut = self.cut(s, &x, top, options);
            draw(&x, cut, best, options)
        };
        self.scratch.x = x;
        token
    }

    fn add_biases(&self, x: &mut [f32], options: &SampleRow) {
        let start = options.bias_start as usize;
        let range = start..start + options.bias_count as usize;
        let tokens = self.batch.bias_tokens.get(range.clone()).unwrap_or(&[]);
        let values = self.batch.bias_values.get(range).unwrap_or(&[]);
        for (&token, &value) in tokens.iter().zip(values) {
            if let Some(x) = x.get_mut(token as usize) {
                *x += value;
            }
        }
    }

    fn penalize(&mut self, x: &mut [f32], options: &SampleRow) {
        let SampleRow { repetition_penalty, frequency_penalty, presence_penalty, .. } = *options;
        if repetition_penalty == 1.0 && frequency_penalty == 0.0 && presence_penalty == 0.0 {
            return;
        }
        let start = options.lane as usize * self.context;
        let length = (options.length as usize).min(self.context);
        let history = self.history.get(start..start + length).unwrap_or(&[]);
        let counts = &mut self.scratch.counts;
        counts.resize(x.len().max(counts.len()), 0);
        for (position, &token) in history.iter().enumerate() {
            if (token as usize) < x.len() {
                let answered = position >= options.prompt as usize;
                counts[token as usize] = (counts[token as usize] | SEEN) + u32::from(answered);
            }
        }
        for &token in history {
            let Some(x) = x.get_mut(token as usize) else { continue };
            // Taken with the first occurrence, so that the others find nothing.
            let count = std::mem::take(&mut counts[token as usize]);
            if count == 0 {
                continue;
            }
            *x = if *x > 0.0 { *x / repetition_penalty } else { *x * repetition_penalty };
            let answered = count & !SEEN;
            if answered > 0 {
                *x -= frequency_penalty * answered as f32 + presence_penalty;
            }
        }
    }

    /// Steps 4 to 6; `top` is the highest logit.
    #[inline(always)]
    fn cut<S: Simd>(&mut self, s: S, x: &[f32], top: f32, options: &SampleRow) -> Cut {
        let mut cut = Cut::NOTHING;
        if options.min_p > 0.0 {
            cut = Cut { logit: top + libm::logf(options.min_p), ..cut };
        }
        if options.top_k > 0 && (options.top_k as usize) < x.len() {
            cut = self.scratch.find(x, cut, top, Limit::Count(options.top_k));
        }
        if options.top_p < 1.0 {
            let weights = &mut self.scratch.weights;
            weights.clear();
            weights.extend_from_slice(x);
            exponentiate(s, weights, top);
            cut = self.scratch.find(x, cut, top, Limit::Share(options.top_p));
        }
        cut
    }
}

impl Scratch {
    /// The first token, in descending order of what `cut` keeps, at which the limit is reached.
    fn find(&mut self, x: &[f32], cut: Cut, top: f32, limit: Limit) -> Cut {
        let kept = |&(token, &x): &(usize, &f32)| cut.keeps(token, x);
        let low = if cut.logit > top - WIDEST {
            cut.logit
        } else {
            x.iter().fold(top, |a, &b| if b < a { b } else { a }).max(top - WIDEST)
        };
        let per_logit = (BUCKETS - 1) as f32 / (top - low).max(1e-6);
        let bucket_of = |x: f32| (((top - x) * per_logit) as usize).min(BUCKETS - 1);
        let weights = &self.weights;
        let weight = |token: usize| match limit {
            Limit::Count(_) => 1.0,
            Limit::Share(_) => f64::from(weights[token]),
        };

        self.buckets.clear();
        self.buckets.resize(BUCKETS, 0.0);
        for (token, &x) in x.iter().enumerate().filter(kept) {
            self.buckets[bucket_of(x)] += weight(token);
        }
        let target = match limit {
            Limit::Count(count) => f64::from(count),
            Limit::Share(share) => f64::from(share) * self.buckets.iter().sum::<f64>(),
        };
        let mut sum = 0.0;
        let Some(bucket) = self.buckets.iter().position(|weight| {
            let reached = *weight > 0.0 && sum + weight >= target;
            if !reached {
                sum += weight;
            }
            reached
        }) else {
            // Fewer than the limit are left, or none has any weight.
            return cut;
        };
        self.bucket.clear();
        let of_bucket = x.iter().enumerate().filter(kept).filter(|&(_, &x)| bucket_of(x) == bucket);
        self.bucket.extend(of_bucket.map(|(token, _)| token as u32));
        // Stable, so that equal logits stay in ascending order of their tokens.
        self.bucket
            .sort_by(|&a, &b| x[b as usize].partial_cmp(&x[a as usize]).unwrap_or(Ordering::Equal));
        let at = self.bucket.iter().position(|&token| {
            sum += weight(token as usize);
            sum >= target
        });
        // Rounding may leave the sum just below the target at the last of the bucket.
        match at.map_or(self.bucket.last(), |at| self.bucket.get(at)) {
            Some(&token) => Cut { logit: x[token as usize], token },
            None => cut,
        }
    }
}

/// Step 7: the token whose logit and noise are highest, the lowest among equals.
fn draw(x: &[f32], cut: Cut, likeliest: usize, options: &SampleRow) -> u32 {
    let seed = u64::from(options.seed_low) | u64::from(options.seed_high) << 32;
    let bits = |block: usize| token_bits(seed, options.length, options.choice, block as u32);
    let mut best = likeliest;
    let mut best_score = x[likeliest] + gumbel_of_bits(bits(likeliest / 4)[likeliest % 4]);
    for (block, logits) in x.chunks(4).enumerate() {
        let first = 4 * block;
        let possible =
            |(i, &x): (usize, &f32)| x + GUMBEL_MAX >= best_score && cut.keeps(first + i, x);
        if !logits.iter().enumerate().any(possible) {
            continue;
        }
        for ((i, &x), bits) in logits.iter().enumerate().zip(bits(block)) {
            // −ln u ≥ 1 − u, so g ≤ −ln(1 − u), and 1 − u > 2^−(zeros + 1).
            let zeros = (!bits).leading_zeros();
            let bound = (zeros + 1) as f32 * std::f32::consts::LN_2 + 1e-3;
            if x + bound < best_score || !cut.keeps(first + i, x) {
                continue;
            }
            let score = x + gumbel_of_bits(bits);
            if score > best_score || (score == best_score && first + i < best) {
                (best, best_score) = (first + i, score);
            }
        }
    }
    best as u32
}

#[inline(always)]
fn divide<S: Simd>(s: S, x: &mut [f32], by: f32) {
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    let divisor = s.splat(by);
    for chunk in chunks {
        s.store(s.div(s.load(chunk), divisor), chunk);
    }
    tail.iter_mut().for_each(|x| *x /= by);
}

/// `x = e^(x − shift)`.
#[inline(always)]
fn exponentiate<S: Simd>(s: S, x: &mut [f32], shift: f32) {
    let (chunks, tail) = x.as_chunks_mut::<LANES>();
    let shift = s.splat(shift);
    for chunk in chunks {
        s.store(exp(s, s.sub(s.load(chunk), shift)), chunk);
    }
    let v = exp(s, s.sub(s.load_tail(tail), shift));
    s.store_tail(v, tail);
}

impl Cpu {
    pub(super) fn sample(&mut self, op: Sample<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "sample";
        let Sample { rows, first, vocabulary, greedy, logprobs, batch, lanes, logits, samples } =
            op;
        let end = first + rows;
        check_len(OP, "logits", rows * vocabulary, logits.len())?;
        check_len(OP, "sample_rows", end, batch.sample_rows.len())?;
        check_len(OP, "tokens", end, samples.tokens.len())?;
        let options = &batch.sample_rows[first..end];
        {
            let out = Out {
                tokens: Disjoint::new(&mut samples.tokens[first..end]),
                logprobs: if logprobs {
                    check_len(OP, "logprobs", end, samples.logprobs.len())?;
                    check_len(OP, "top_tokens", end * MAX_LOGPROBS, samples.top_tokens.len())?;
                    check_len(OP, "top_logprobs", end * MAX_LOGPROBS, samples.top_logprobs.len())?;
                    let top = first * MAX_LOGPROBS..end * MAX_LOGPROBS;
                    Some((
                        Disjoint::new(&mut samples.logprobs[first..end]),
                        Disjoint::new(&mut samples.top_tokens[top.clone()]),
                        Disjoint::new(&mut samples.top_logprobs[top]),
                    ))
                } else {
                    None
                },
            };
            self.pool.split(rows, 1, (rows * vocabulary, SMALL), |rows| {
                SCRATCH.with_borrow_mut(|scratch| {
                    self.token.run(SampleRows {
                        rows,
                        vocabulary,
                        greedy,
                        logprobs,
                        logits,
                        options,
                        batch,
                        history: &lanes.history,
                        context: lanes.context,
                        out: &out,
                        scratch,
                    });
                });
            });
        }
        for (options, &token) in options.iter().zip(&samples.tokens[first..end]) {
            if let Some(sampled) = lanes.sampled.get_mut(options.lane as usize) {
                *sampled = token;
            }
        }
        Ok(())
    }
}
