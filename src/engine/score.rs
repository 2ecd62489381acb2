//! Scoring: what a model says about given tokens, for comparison with other implementations and
//! for perplexity. Several prompts run as one ragged batch.

use super::sampling::SamplingParams;
use super::session::Session;
use crate::backend::PAGE_TOKENS;
use crate::error::{RunError, SubmitError};
use crate::model::batch::{
    Batch, BatchSequence, LogitRow, Purpose, RowOptions, StepOutput, TokenSource,
};

/// One prompt to score.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScoreRequest {
    /// The prompt.
    pub ids: Vec<u32>,
    /// Tokens to continue with greedily; end tokens are like any other.
    pub greedy: usize,
    /// Whether the logits of the prompt's last position are wanted.
    pub logits: bool,
    /// Score each prompt token from this index on under the tokens before it. Token 0 has none
    /// before it and is never scored.
    pub score_from: Option<usize>,
}

/// What the model says about a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Scored {
    /// The greedy continuation.
    pub tokens: Vec<u32>,
    /// Logits of the last position, if asked for; else empty.
    pub logits: Vec<f32>,
    /// `ln p` of each scored token, in order.
    pub logprobs: Vec<f32>,
}

impl Scored {
    /// The mean of `−ln p` over the scored tokens; `None` if there are none.
    pub fn mean_nll(&self) -> Option<f64> {
        let sum: f64 = self.logprobs.iter().map(|&logprob| -f64::from(logprob)).sum();
        (!self.logprobs.is_empty()).then(|| sum / self.logprobs.len() as f64)
    }
}

/// A prompt on its way.
struct Live<'r> {
    request: &'r ScoreRequest,
    lane: usize,
    pages: Vec<u32>,
    /// Tokens in the cache.
    done: usize,
    scored: Scored,
}

impl Live<'_> {
    /// The part `done .. done + count` of prompt and continuation.
    fn part(&self, count: usize, logits: Vec<LogitRow>) -> BatchSequence {
        let known = self.request.ids.iter().chain(&self.scored.tokens);
        let tokens = known.skip(self.done).take(count).map(|&t| TokenSource::Token(t)).collect();
        BatchSequence {
            lane: self.lane,
            start: self.done,
            tokens,
            pages: self.pages.clone(),
            logits,
        }
    }
}

impl Session {
    /// Scores prompts, as many at a time as lanes and pages allow. The answers are in the order of
    /// the requests, and bit for bit what each prompt would get alone.
    pub fn score(&mut self, requests: &[ScoreRequest]) -> Result<Vec<Scored>, RunError> {
        for request in requests {
            self.check_score(request)?;
        }
        self.reset();
        let mut scored = Vec::with_capacity(requests.len());
        while scored.len() < requests.len() {
            let mut live = self.admit(&requests[scored.len()..])?;
            let result = self.score_live(&mut live);
            for sequence in &mut live {
                self.pages.shrink(&mut sequence.pages, 0);
            }
            if result.is_err() {
                self.drain();
            }
            result?;
            scored.extend(live.into_iter().map(|sequence| sequence.scored));
        }
        Ok(scored)
    }

    fn check_score(&self, request: &ScoreRequest) -> Result<(), SubmitError> {
        let vocabulary = self.config().vocabulary;
        if request.ids.is_empty() {
            return Err(SubmitError::invalid("ids", "at least one token", "none"));
        }
        if let Some(token) = request.ids.iter().find(|&&token| token as usize >= vocabulary) {
            let expected = format!("tokens below the vocabulary, {vocabulary}");
            return Err(SubmitError::invalid("ids", expected, token));
        }
        let (prompt, context) = (request.ids.len(), self.context());
        if prompt.saturating_add(request.greedy) > context {
            return Err(SubmitError::TooLong { prompt: prompt + request.greedy, context });
        }
        Ok(())
    }

    /// Takes as many of the first requests as there are lanes and pages for.
    fn admit<'r>(&mut self, requests: &'r [ScoreRequest]) -> Result<Vec<Live<'r>>, RunError> {
        let mut live = Vec::new();
        for (lane, request) in requests.iter().take(self.executor.reserve().sequences).enumerate() {
            let tokens = request.ids.len() + request.greedy;
            if !live.is_empty() && tokens.div_ceil(PAGE_TOKENS) > self.pages.free() {
                break;
            }
            let mut pages = Vec::new();
            self.pages.grow(&mut pages, tokens)?;
            live.push(Live { request, lane, pages, done: 0, scored: Scored::default() });
        }
        Ok(live)
    }

    fn score_live(&mut self, live: &mut [Live<'_>]) -> Result<(), RunError> {
        self.score_prompts(live)?;
        self.last_positions(live)?;
        self.continue_greedily(live)
    }

    /// Runs all prompts but for their last tokens, whose logits are wanted together.
    fn score_prompts(&mut self, live: &mut [Live<'_>]) -> Result<(), RunError> {
        loop {
            let mut budget = self.executor.reserve().step_tokens;
            let mut parts = Vec::new();
            let mut counts = vec![(0, 0); live.len()];
            for (sequence, counts) in live.iter().zip(&mut counts) {
                let ids = &sequence.request.ids;
                let count = (ids.len() - 1 - sequence.done).min(budget);
                if count == 0 {
                    continue;
                }
                budget -= count;
                let from = sequence.request.score_from.unwrap_or(usize::MAX);
                let logits: Vec<LogitRow> = (0..count)
                    .filter(|index| sequence.done + index + 1 >= from)
                    .map(|index| LogitRow {
                        index,
                        target: Some(ids[sequence.done + index + 1]),
                        sample: None,
                    })
                    .collect();
                *counts = (count, logits.len());
                parts.push(sequence.part(count, logits));
            }
            if parts.is_empty() {
                return Ok(());
            }
            let output = self.step(parts, Purpose::Score)?;
            let mut logprobs = output.logprobs.into_iter();
            for (sequence, (tokens, rows)) in live.iter_mut().zip(counts) {
                sequence.done += tokens;
                sequence.scored.logprobs.extend(logprobs.by_ref().take(rows));
            }
        }
    }

    /// Runs the last tokens of the prompts, a pass of the head at a time.
    fn last_positions(&mut self, live: &mut [Live<'_>]) -> Result<(), RunError> {
        let vocabulary = self.config().vocabulary;
        let rows = self.executor.reserve().logit_rows(self.config());
        for group in live.chunks_mut(rows) {
            let tokens = self.greedy_step(group)?;
            let wanted = group.iter().any(|sequence| sequence.request.logits);
            let logits = if wanted { self.executor.read_logits(group.len())? } else { Vec::new() };
            for (row, (sequence, token)) in group.iter_mut().zip(tokens).enumerate() {
                if sequence.request.logits {
                    sequence.scored.logits = logits[row * vocabulary..][..vocabulary].to_vec();
                }
                sequence.done += 1;
                if sequence.request.greedy > 0 {
                    sequence.scored.tokens.push(token);
                }
            }
        }
        Ok(())
    }

    fn continue_greedily(&mut self, live: &mut [Live<'_>]) -> Result<(), RunError> {
        let limit = self.executor.reserve().step_tokens;
        loop {
            let mut unfinished: Vec<&mut Live<'_>> = (live.iter_mut())
                .filter(|sequence| sequence.scored.tokens.len() < sequence.request.greedy)
                .collect();
            if unfinished.is_empty() {
                return Ok(());
            }
            for group in unfinished.chunks_mut(limit) {
                let tokens = self.greedy_step(group)?;
                for (sequence, token) in group.iter_mut().zip(tokens) {
                    sequence.done += 1;
                    sequence.scored.tokens.push(token);
                }
            }
        }
    }

    /// One token of each sequence, and the highest logit after it.
    fn greedy_step<'a, 'r: 'a>(
        &mut self,
        group: &[impl std::borrow::Borrow<Live<'r>>],
    ) -> Result<Vec<u32>, RunError> {
        let options: RowOptions = SamplingParams::default().row_options(0, 0);
        let parts = group
            .iter()
            .map(|sequence| {
                let logits =
                    vec![LogitRow { index: 0, target: None, sample: Some(options.clone()) }];
                sequence.borrow().part(1, logits)
            })
            .collect();
        Ok(self.step(parts, Purpose::Sample { logprobs: false })?.tokens)
    }

    fn step(
        &mut self,
        sequences: Vec<BatchSequence>,
        purpose: Purpose,
    ) -> Result<StepOutput, RunError> {
        self.executor.submit(&Batch { sequences, purpose, hidden: false })?;
        self.executor.collect()
    }
}
