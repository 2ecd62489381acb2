//! A host copy of the step's inputs: checks a batch, flattens it into the arrays that devices
//! read, pads them to the step's key, and uploads them.

use super::activations::{MAX_BIASES, Reserve};
use super::batch::{Batch, BatchSequence, Purpose, TokenSource};
use super::config::ModelConfig;
use crate::backend::ops::{self, SampleRow};
use crate::backend::{Backend, FROM_LANE, LogitUse, MAX_LOGPROBS, NONE, PAGE_TOKENS, StepKey};
use crate::error::{RunError, SubmitError};

/// The arrays of [`ops::Batch`] on the host, reused from step to step.
pub(super) struct Staging {
    reserve: Reserve,
    vocabulary: usize,
    head_rows: usize,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<u32>,
    slots: Vec<u32>,
    query_starts: Vec<u32>,
    kv_lens: Vec<u32>,
    page_table: Vec<u32>,
    lanes: Vec<u32>,
    logit_rows: Vec<u32>,
    targets: Vec<u32>,
    sample_rows: Vec<SampleRow>,
    bias_tokens: Vec<u32>,
    bias_values: Vec<f32>,
    row_lanes: Vec<usize>,
    row_logprobs: Vec<usize>,
    greedy: bool,
    live: Vec<bool>,
}

impl Staging {
    pub(super) fn new(config: &ModelConfig, reserve: &Reserve) -> Self {
        let (tokens, sequences) = (reserve.step_tokens, reserve.sequences);
        Self {
            reserve: *reserve,
            vocabulary: config.vocabulary,
            head_rows: reserve.logit_rows(config),
            tokens: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            sequences: Vec::with_capacity(tokens),
            slots: Vec::with_capacity(tokens),
            query_starts: Vec::with_capacity(sequences + 1),
            kv_lens: Vec::with_capacity(sequences),
            page_table: Vec::with_capacity(sequences * reserve.max_pages()),
            lanes: Vec::with_capacity(sequences),
            logit_rows: Vec::with_capacity(tokens),
            targets: Vec::with_capacity(tokens),
            sample_rows: Vec::with_capacity(sequences),
            bias_tokens: Vec::with_capacity(sequences * MAX_BIASES),
            bias_values: Vec::with_capacity(sequences * MAX_BIASES),
            row_lanes: Vec::with_capacity(tokens),
            row_logprobs: Vec::with_capacity(tokens),
            greedy: true,
            live: vec![false; sequences],
        }
    }

    /// Logit rows of the batch, without padding.
    pub(super) fn rows(&self) -> usize {
        self.row_lanes.len()
    }

    /// Lane of each logit row.
    pub(super) fn row_lanes(&self) -> &[usize] {
        &self.row_lanes
    }

    /// How many alternatives each logit row asked for.
    pub(super) fn row_logprobs(&self) -> &[usize] {
        &self.row_logprobs
    }

    /// Checks `batch`, fills the arrays and answers the step's key.
    pub(super) fn fill(
        &mut self,
        batch: &Batch,
        bucket: &dyn Fn(usize) -> usize,
    ) -> Result<StepKey, RunError> {
        self.clear();
        let tokens: usize = batch.sequences.iter().map(|s| s.tokens.len()).sum();
        let sampling = matches!(batch.purpose, Purpose::Sample { .. });
        exhausted("tokens in a step", tokens, self.reserve.step_tokens)?;
        exhausted("sequences in a step", batch.sequences.len(), self.reserve.sequences)?;
        for (index, sequence) in batch.sequences.iter().enumerate() {
            self.push(index, sequence, sampling)?;
        }
        if sampling {
            exhausted("sampled rows in a step", self.rows(), self.reserve.sequences)?;
        }
        if batch.hidden {
            exhausted("rows of hidden states in a step", self.rows(), self.head_rows)?;
        }
        let scored = self.targets.iter().any(|&target| target != NONE);
        let sizes = StepKey {
            tokens,
            sequences: batch.sequences.len(),
            queries: batch.sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0),
            pages: self.longest().div_ceil(PAGE_TOKENS),
            logit_rows: self.rows(),
            logits: match batch.purpose {
                Purpose::Score if scored => LogitUse::Score,
                Purpose::Score => LogitUse::Keep,
                Purpose::Embed => LogitUse::Absent,
                Purpose::Sample { logprobs: true } => LogitUse::SampleLogprobs,
                Purpose::Sample { .. } if self.greedy => LogitUse::Greedy,
                Purpose::Sample { .. } => LogitUse::Sample,
            },
            hidden: batch.hidden,
        };
        let key = self.round_up(sizes, bucket);
        self.pad(&key);
        Ok(key)
    }

    /// Sequences that a step can hold: each brings a token at least.
    pub(super) fn most_sequences(&self) -> usize {
        self.reserve.sequences.min(self.reserve.step_tokens)
    }

    /// The key of a step of these sizes.
    pub(super) fn round_up(&self, sizes: StepKey, bucket: &dyn Fn(usize) -> usize) -> StepKey {
        let most_rows = match sizes.logits {
            LogitUse::Keep | LogitUse::Score | LogitUse::Absent => self.reserve.step_tokens,
            _ => self.most_sequences(),
        };
        // Never one more pass of the head: it would hold padding alone, and overwrite the logits
        // and hidden states of the last pass.
        let most_rows = most_rows.min(sizes.logit_rows.next_multiple_of(self.head_rows));
        StepKey {
            tokens: bucket(sizes.tokens).min(self.reserve.step_tokens),
            sequences: bucket(sizes.sequences).min(self.most_sequences()),
            queries: bucket(sizes.queries).min(self.reserve.step_tokens),
            pages: bucket(sizes.pages).min(self.reserve.max_pages()),
            logit_rows: bucket(sizes.logit_rows).min(most_rows),
            ..sizes
        }
    }

    fn longest(&self) -> usize {
        self.kv_lens.iter().copied().max().unwrap_or(0) as usize
    }

    fn clear(&mut self) {
        for array in [
            &mut self.tokens,
            &mut self.positions,
            &mut self.sequences,
            &mut self.slots,
            &mut self.query_starts,
            &mut self.kv_lens,
            &mut self.page_table,
            &mut self.lanes,
            &mut self.logit_rows,
            &mut self.targets,
            &mut self.bias_tokens,
        ] {
            array.clear();
        }
        self.sample_rows.clear();
        self.bias_values.clear();
        self.row_lanes.clear();
        self.row_logprobs.clear();
        self.live.fill(false);
        self.greedy = true;
        self.query_starts.push(0);
    }

    fn push(
        &mut self,
        index: usize,
        sequence: &BatchSequence,
        sampling: bool,
    ) -> Result<(), RunError> {
        let (first, end) = (self.tokens.len(), sequence.start + sequence.tokens.len());
        exhausted("tokens of a sequence", end, self.reserve.context)?;
        exhausted("lanes", sequence.lane + 1, self.reserve.sequences)?;
        if std::mem::replace(&mut self.live[sequence.lane], true) {
            return Err(invalid("lane", "one sequence of a batch each", sequence.lane));
        }
        if sequence.tokens.is_empty() {
            return Err(invalid("tokens of a sequence", "at least one", "none"));
        }
        if sequence.pages.len() * PAGE_TOKENS < end {
            return Err(invalid("pages", "enough for every position", sequence.pages.len()));
        }
        // Also those of earlier steps: attention reads them.
        for &page in &sequence.pages[..end.div_ceil(PAGE_TOKENS)] {
            exhausted("KV pages", page as usize + 1, self.reserve.kv_pages)?;
        }
        for (offset, source) in sequence.tokens.iter().enumerate() {
            let position = sequence.start + offset;
            let page = sequence.pages[position / PAGE_TOKENS] as usize;
            self.tokens.push(match *source {
                TokenSource::Token(token) if (token as usize) < self.vocabulary => token,
                TokenSource::Token(token) => {
                    let expected = format!("a token below the vocabulary, {}", self.vocabulary);
                    return Err(SubmitError::invalid("token", expected, token).into());
                }
                TokenSource::Sampled => FROM_LANE | sequence.lane as u32,
            });
            self.positions.push(position as u32);
            self.sequences.push(index as u32);
            self.slots.push((page * PAGE_TOKENS + position % PAGE_TOKENS) as u32);
        }
        self.query_starts.push(self.tokens.len() as u32);
        self.kv_lens.push(end as u32);
        self.lanes.push(sequence.lane as u32);
        let max_pages = self.reserve.max_pages();
        let pages = sequence.pages.iter().copied().chain(std::iter::repeat(0)).take(max_pages);
        self.page_table.extend(pages);

        for logits in &sequence.logits {
            if logits.index >= sequence.tokens.len() {
                return Err(invalid("logit row", "one of the step's tokens", logits.index));
            }
            self.logit_rows.push((first + logits.index) as u32);
            self.row_lanes.push(sequence.lane);
            let target = logits.target.unwrap_or(NONE);
            if target != NONE && target as usize >= self.vocabulary {
                let expected = format!("a token below the vocabulary, {}", self.vocabulary);
                return Err(SubmitError::invalid("target", expected, target).into());
            }
            self.targets.push(target);
            if sampling {
                self.push_sample(sequence, logits)?;
            }
        }
        Ok(())
    }

    fn push_sample(
        &mut self,
        sequence: &BatchSequence,
        logits: &super::batch::LogitRow,
    ) -> Result<(), RunError> {
        let Some(options) = &logits.sample else {
            return Err(invalid("logit row", "sampling options", "none"));
        };
        exhausted("logit biases", options.biases.len(), MAX_BIASES)?;
        exhausted("log-probabilities", options.row.logprobs as usize, MAX_LOGPROBS)?;
        self.greedy &= options.is_plain_greedy();
        self.sample_rows.push(SampleRow {
            lane: sequence.lane as u32,
            length: (sequence.start + logits.index + 1) as u32,
            bias_start: self.bias_tokens.len() as u32,
            bias_count: options.biases.len() as u32,
            ..options.row
        });
        self.row_logprobs.push((options.row.logprobs as usize).min(self.vocabulary));
        for &(token, value) in &options.biases {
            self.bias_tokens.push(token);
            self.bias_values.push(value);
        }
        Ok(())
    }

    /// Fills the arrays up to the key's sizes with what is a no-op.
    fn pad(&mut self, key: &StepKey) {
        self.tokens.resize(key.tokens, NONE);
        self.positions.resize(key.tokens, 0);
        self.sequences.resize(key.tokens, 0);
        self.slots.resize(key.tokens, NONE);
        let end = self.query_starts.last().copied().unwrap_or(0);
        self.query_starts.resize(key.sequences + 1, end);
        self.kv_lens.resize(key.sequences, 0);
        self.lanes.resize(key.sequences, 0);
        self.page_table.resize(key.sequences * self.reserve.max_pages(), 0);
        self.logit_rows.resize(key.logit_rows, NONE);
        self.targets.resize(key.logit_rows, NONE);
        if !self.sample_rows.is_empty() {
            let padding = SampleRow { lane: NONE, ..SampleRow::default() };
            self.sample_rows.resize(key.logit_rows, padding);
        }
    }

    /// Writes the arrays to the device.
    pub(super) fn upload<B: Backend>(
        &self,
        backend: &mut B,
        batch: &mut ops::Batch<B>,
    ) -> Result<(), RunError> {
        backend.write(&mut batch.tokens, &self.tokens)?;
        backend.write(&mut batch.positions, &self.positions)?;
        backend.write(&mut batch.sequences, &self.sequences)?;
        backend.write(&mut batch.slots, &self.slots)?;
        backend.write(&mut batch.query_starts, &self.query_starts)?;
        backend.write(&mut batch.kv_lens, &self.kv_lens)?;
        backend.write(&mut batch.page_table, &self.page_table)?;
        backend.write(&mut batch.lanes, &self.lanes)?;
        backend.write(&mut batch.logit_rows, &self.logit_rows)?;
        backend.write(&mut batch.targets, &self.targets)?;
        backend.write(&mut batch.sample_rows, &self.sample_rows)?;
        backend.write(&mut batch.bias_tokens, &self.bias_tokens)?;
        backend.write(&mut batch.bias_values, &self.bias_values)
    }
}

fn exhausted(what: &'static str, asked: usize, reserved: usize) -> Result<(), RunError> {
    if asked <= reserved { Ok(()) } else { Err(RunError::Exhausted { what, asked, reserved }) }
}

fn invalid(field: &str, expected: &str, found: impl std::fmt::Display) -> RunError {
    SubmitError::invalid(field, expected, found).into()
}
