//! One ragged step as the engine describes it, before it becomes device buffers.

use crate::backend::ops::SampleRow;

/// Where an input token comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    /// The host knows it.
    Token(u32),
    /// The token last sampled for the sequence's lane, which may still be on the device.
    Sampled,
}

/// A sequence's part in a step: some tokens that follow `start` tokens already in the cache.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchSequence {
    /// Row of the sequence in what the device keeps between steps; unique among live sequences.
    pub lane: usize,
    /// Position of the first of `tokens`.
    pub start: usize,
    /// The step's tokens, one or more.
    pub tokens: Vec<TokenSource>,
    /// Pages of the sequence in order, enough for `start + tokens.len()` positions.
    pub pages: Vec<u32>,
    /// Which of `tokens` go through the output head, ascending.
    pub logits: Vec<LogitRow>,
}

/// A token whose logits are wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitRow {
    /// Index into the sequence's `tokens`.
    pub index: usize,
    /// Token to score under these logits.
    pub target: Option<u32>,
    /// How to sample the token that follows.
    pub sample: Option<RowOptions>,
}

/// Sampling options of a row with its logit biases.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowOptions {
    /// Options; `lane`, `length` and the bias range are filled in from the batch.
    pub row: SampleRow,
    /// Token and what is added to its logit.
    pub biases: Vec<(u32, f32)>,
}

impl RowOptions {
    /// Whether the highest logit simply wins.
    pub fn is_plain_greedy(&self) -> bool {
        let row = &self.row;
        row.temperature == 0.0
            && row.repetition_penalty == 1.0
            && row.frequency_penalty == 0.0
            && row.presence_penalty == 0.0
            && self.biases.is_empty()
    }
}

/// What a step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Each logit row has sampling options.
    Sample {
        /// Whether log-probabilities are wanted.
        logprobs: bool,
    },
    /// Logit rows may have targets; the last pass of logits can be read afterwards.
    Score,
    /// Logit rows are normed and go through no head: [`Batch::hidden`] brings them back.
    Embed,
}

/// One step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The sequences, in any order.
    pub sequences: Vec<BatchSequence>,
    /// What for.
    pub purpose: Purpose,
    /// Whether the normed rows that go into the head are wanted.
    pub hidden: bool,
}

/// What a step answers. Rows are the batch's logit rows in order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// The sampled token of each row, when sampling.
    pub tokens: Vec<u32>,
    /// Log-probability of the sampled token or of the target; 0 without one.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens of each row with their log-probabilities, as many as were asked for.
    pub top: Vec<Vec<(u32, f32)>>,
    /// The normed rows, `hidden` values each, when asked for.
    pub hidden: Vec<f32>,
}
