//! One caller, one model: sequences of tokens in, tokens out, step by step on the caller's thread.

use std::time::{Duration, Instant};

use super::pages::PagePool;
use super::sampling::{SamplingParams, random_seed};
use crate::backend::PAGE_TOKENS;
use crate::error::{RunError, SubmitError};
use crate::model::batch::{
    Batch, BatchSequence, LogitRow, Purpose, RowOptions, StepOutput, TokenSource,
};
use crate::model::config::ModelConfig;
use crate::model::executor::StepExecutor;

/// A loaded model that serves one caller.
///
/// The tokens of the last request stay in the KV cache: a prompt that begins like it (the next
/// turn of a chat) is computed from where the two part.
pub struct Session {
    pub(super) executor: Box<dyn StepExecutor>,
    pub(super) pages: PagePool,
    resident: Resident,
}

/// The sequence on lane 0: tokens whose keys and values are in the cache, and its pages.
#[derive(Default)]
struct Resident {
    tokens: Vec<u32>,
    pages: Vec<u32>,
}

impl Session {
    /// Serves `executor`.
    pub fn new(executor: Box<dyn StepExecutor>) -> Self {
        let pages = PagePool::new(executor.reserve().kv_pages);
        Self { executor, pages, resident: Resident::default() }
    }

    /// The model's hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        self.executor.config()
    }

    /// The device and what was reserved on it.
    pub fn executor(&self) -> &dyn StepExecutor {
        &*self.executor
    }

    /// Tokens that a prompt and its answer may have together.
    pub fn context(&self) -> usize {
        let reserve = self.executor.reserve();
        reserve.context.min(reserve.kv_pages * PAGE_TOKENS)
    }

    /// Forgets the last request: its pages are free again.
    pub fn reset(&mut self) {
        self.resident.tokens.clear();
        self.pages.shrink(&mut self.resident.pages, 0);
    }

    /// Checks a prompt: tokens of the vocabulary, at least one, room for at least one more.
    pub fn check_prompt(&self, prompt: &[u32]) -> Result<(), SubmitError> {
        let vocabulary = self.config().vocabulary;
        if prompt.is_empty() {
            return Err(SubmitError::invalid("prompt", "at least one token", "none"));
        }
        if let Some(token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
            let expected = format!("tokens below the vocabulary, {vocabulary}");
            return Err(SubmitError::invalid("prompt", expected, token));
        }
        let context = self.context();
        if prompt.len() >= context {
            return Err(SubmitError::TooLong { prompt: prompt.len(), context });
        }
        Ok(())
    }

    /// Starts to answer `prompt`. The answer comes from the iterator, a token at a time; dropping
    /// it ends the work.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        params: &SamplingParams,
    ) -> Result<Generation<'_>, SubmitError> {
        self.check_prompt(prompt)?;
        params.validate(self.config().vocabulary)?;
        let shared = prompt.iter().zip(&self.resident.tokens).take_while(|(a, b)| a == b).count();
        // The last token runs in any case: its logits are what the answer starts from.
        let cached = shared.min(prompt.len() - 1);
        self.resident.tokens.truncate(cached);
        self.pages.shrink(&mut self.resident.pages, cached);
        let room = self.context() - prompt.len();
        let seed = params.seed.unwrap_or_else(random_seed);
        Ok(Generation {
            prompt: prompt.to_vec(),
            options: params.row_options(seed, prompt.len()),
            logprobs: params.logprobs.is_some(),
            stop_tokens: params.stop_tokens.clone(),
            limit: params.max_tokens.map_or(room, |max| max.min(room)),
            limited_by_context: params.max_tokens.is_none_or(|max| max > room),
            done: cached,
            last: None,
            enqueued: 0,
            state: State::Prompt,
            started: Instant::now(),
            usage: Usage { prompt: prompt.len(), cached, seed, ..Usage::default() },
            session: self,
        })
    }

    /// Runs part of the resident sequence: `tokens` at its end, of which the last is sampled.
    fn enqueue(
        &mut self,
        start: usize,
        tokens: Vec<TokenSource>,
        sample: Option<(&RowOptions, bool)>,
    ) -> Result<(), RunError> {
        self.pages.grow(&mut self.resident.pages, start + tokens.len())?;
        let logits = sample
            .map(|(options, _)| LogitRow {
                index: tokens.len() - 1,
                target: None,
                sample: Some(options.clone()),
            })
            .into_iter()
            .collect();
        let pages = self.resident.pages.clone();
        self.executor.submit(&Batch {
            sequences: vec![BatchSequence { lane: 0, start, tokens, pages, logits }],
            purpose: Purpose::Sample { logprobs: sample.is_some_and(|(_, logprobs)| logprobs) },
            hidden: false,
        })
    }

    /// Collects what is in flight and throws it away.
    pub(super) fn drain(&mut self) {
        while self.executor.in_flight() > 0 {
            // A step that failed has failed for a request that nobody waits for any more.
            let _ = self.executor.collect();
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// One of the request's stop tokens was sampled.
    StopToken(u32),
    /// A stop text was completed.
    StopText,
    /// `max_tokens` was reached.
    Length,
    /// The context is full.
    Context,
}

/// What an answer cost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Of these, tokens that were in the cache already.
    pub cached: usize,
    /// Tokens sampled, a stop token included.
    pub generated: usize,
    /// From the request to the first token.
    pub prompt_time: Duration,
    /// From the first token to the last.
    pub decode_time: Duration,
    /// The seed that was used.
    pub seed: u64,
}

/// One item of an answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A part of the prompt has run, and more of it is left: the moment to show progress or to give
    /// up. A prompt that fits in one step has none of these.
    Prompt {
        /// Tokens of the prompt that are in the cache.
        done: usize,
        /// Tokens of the prompt.
        total: usize,
    },
    /// A token of the answer.
    Token(Token),
    /// The end, exactly once and last.
    Done {
        /// Why.
        reason: FinishReason,
        /// At what cost.
        usage: Usage,
    },
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// The token.
    pub id: u32,
    /// Its log-probability, when asked for.
    pub logprob: Option<f32>,
    /// The likeliest tokens in its place with theirs, when asked for.
    pub top: Vec<(u32, f32)>,
}

#[derive(Debug, PartialEq)]
enum State {
    Prompt,
    Decode,
    Ended,
}

/// An answer in the making: a blocking iterator of [`Event`]s, which ends after the first
/// [`Event::Done`] or error.
pub struct Generation<'s> {
    session: &'s mut Session,
    prompt: Vec<u32>,
    options: RowOptions,
    logprobs: bool,
    stop_tokens: Vec<u32>,
    limit: usize,
    limited_by_context: bool,
    /// Tokens of the prompt that have run or were in the cache.
    done: usize,
    /// The token sampled last, whose key and value are not in the cache yet.
    last: Option<u32>,
    /// Sampling steps enqueued.
    enqueued: usize,
    state: State,
    started: Instant,
    usage: Usage,
}

impl Generation<'_> {
    /// The cost so far.
    pub fn usage(&self) -> Usage {
        self.usage
    }

    /// Ends the answer for a reason that only the caller can see, such as a completed stop text.
    pub fn finish(&mut self, reason: FinishReason) -> Event {
        self.session.drain();
        self.state = State::Ended;
        Event::Done { reason, usage: self.usage }
    }

    /// Runs the next part of the prompt, of a step's size; the last one samples the first token.
    /// Whether it was the last.
    fn run_prompt(&mut self) -> Result<bool, RunError> {
        let start = self.done;
        let end = (start + self.session.executor.reserve().step_tokens).min(self.prompt.len());
        let tokens = self.prompt[start..end].iter().map(|&t| TokenSource::Token(t)).collect();
        let last = end == self.prompt.len();
        let sample = last.then_some((&self.options, self.logprobs));
        self.session.enqueue(start, tokens, sample)?;
        if last {
            self.enqueued = 1;
        } else {
            self.session.executor.collect()?;
            self.session.resident.tokens.extend_from_slice(&self.prompt[start..end]);
        }
        self.done = end;
        Ok(last)
    }

    /// Enqueues the step after the last one, whose token may still be on the device.
    fn enqueue_next(&mut self) -> Result<(), RunError> {
        let start = self.prompt.len() + self.enqueued - 1;
        let sample = Some((&self.options, self.logprobs));
        self.session.enqueue(start, vec![TokenSource::Sampled], sample)?;
        self.enqueued += 1;
        Ok(())
    }

    /// Steps to have in flight while the oldest of them is waited for.
    fn steps_ahead(&self) -> usize {
        let device = self.session.executor.device();
        match self.usage.generated {
            // Enqueueing ahead hides the host's time on a device of its own; on the CPU it would
            // only delay the token that is ready.
            _ if !device.asynchronous => 1,
            // Steps may go to the device together, and are then done together: the first token is
            // not to wait for those after it.
            0 => 1,
            _ => device.steps_ahead.max(1),
        }
    }

    fn step(&mut self) -> Result<Event, RunError> {
        if self.state == State::Prompt {
            if !self.run_prompt()? {
                return Ok(Event::Prompt { done: self.done, total: self.prompt.len() });
            }
            self.state = State::Decode;
        } else if self.usage.generated == self.limit {
            let reason =
                if self.limited_by_context { FinishReason::Context } else { FinishReason::Length };
            return Ok(self.finish(reason));
        }
        while self.session.executor.in_flight() < self.steps_ahead() && self.enqueued < self.limit {
            self.enqueue_next()?;
        }
        let output = self.session.executor.collect()?;
        let token = self.record(output)?;
        if self.stop_tokens.contains(&token.id) {
            return Ok(self.finish(FinishReason::StopToken(token.id)));
        }
        Ok(Event::Token(token))
    }

    /// Takes note of a sampled token.
    fn record(&mut self, mut output: StepOutput) -> Result<Token, RunError> {
        let now = self.started.elapsed();
        if self.usage.generated == 0 {
            self.usage.prompt_time = now;
            let resident = &mut self.session.resident.tokens;
            resident.extend_from_slice(&self.prompt[resident.len()..]);
        } else {
            self.usage.decode_time = now - self.usage.prompt_time;
        }
        self.usage.generated += 1;
        let id = output.tokens.first().copied().unwrap_or_default();
        // The step that sampled this token also put the one before it into the cache.
        self.session.resident.tokens.extend(self.last.replace(id));
        Ok(Token {
            id,
            logprob: output.logprobs.first().copied(),
            top: output.top.pop().unwrap_or_default(),
        })
    }
}

impl Iterator for Generation<'_> {
    type Item = Result<Event, RunError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Ended {
            return None;
        }
        let event = self.step();
        if event.is_err() {
            self.session.drain();
            self.session.reset();
            self.state = State::Ended;
        }
        Some(event)
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        self.session.drain();
    }
}
