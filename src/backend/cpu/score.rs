//! [`Score`]: log-probabilities of given tokens.

use super::isa::Kernel;
use super::pool::Disjoint;
use super::simd::Simd;
use super::softmax::{all_finite, log_probability, log_sum_exp};
use super::{Cpu, SMALL};
use crate::backend::NONE;
use crate::backend::ops::{Score, check_len};
use crate::error::RunError;
use std::ops::Range;

struct ScoreRows<'a> {
    rows: Range<usize>,
    vocabulary: usize,
    logits: &'a [f32],
    targets: &'a [u32],
    logprobs: &'a Disjoint<'a, f32>,
}

impl Kernel for ScoreRows<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.rows {
            let x = &self.logits[row * self.vocabulary..][..self.vocabulary];
            // SAFETY: the parts of a job have rows of their own.
            let out = unsafe { self.logprobs.range(row..row + 1) };
            out[0] = match self.targets[row] {
                NONE => 0.0,
                target => match x.get(target as usize) {
                    Some(&logit) if all_finite(s, x) => log_probability(logit, log_sum_exp(s, x)),
                    _ => f32::NAN,
                },
            };
        }
    }
}

impl Cpu {
    pub(super) fn score(&mut self, op: Score<'_, Self>) -> Result<(), RunError> {
        const OP: &str = "score";
        let Score { rows, first, vocabulary, batch, logits, samples } = op;
        check_len(OP, "logits", rows * vocabulary, logits.len())?;
        check_len(OP, "targets", first + rows, batch.targets.len())?;
        check_len(OP, "logprobs", first + rows, samples.logprobs.len())?;
        let logprobs = Disjoint::new(&mut samples.logprobs[first..first + rows]);
        self.pool.split(rows, 1, (rows * vocabulary, SMALL), |rows| {
            self.token.run(ScoreRows {
                rows,
                vocabulary,
                logits,
                targets: &batch.targets[first..],
                logprobs: &logprobs,
            });
        });
        Ok(())
    }
}
