//! Ways to run a model: steps of an executor, answers of a session.

use trine::backend::{Backend, LogitUse, RecordStep, StepKey};
use trine::engine::session::{Event, Token};
use trine::engine::{SamplingParams, Session};
use trine::error::RunError;
use trine::model::activations::Reserve;
use trine::model::batch::{
    Batch, BatchSequence, LogitRow, Purpose, RowOptions, StepOutput, TokenSource,
};
use trine::model::executor::{Executor, StepExecutor};
use trine::model::weights::WeightSource;

pub(crate) fn load<B: Backend>(
    backend: B,
    source: &dyn WeightSource,
    reserve: Reserve,
) -> Executor<B> {
    source.config().validate().expect("a valid config");
    Executor::load(backend, source, reserve, &mut |_, _| ()).expect("the model loads")
}

pub(crate) fn session<B: Backend>(
    backend: B,
    source: &dyn WeightSource,
    reserve: Reserve,
) -> Session {
    Session::new(Box::new(load(backend, source, reserve)))
}

/// A sequence's part in a step, without logit rows.
pub(crate) fn part(lane: usize, start: usize, tokens: &[u32], pages: &[u32]) -> BatchSequence {
    BatchSequence {
        lane,
        start,
        tokens: tokens.iter().map(|&token| TokenSource::Token(token)).collect(),
        pages: pages.to_vec(),
        logits: Vec::new(),
    }
}

/// One more token, the one that the lane sampled last.
pub(crate) fn sampled_part(lane: usize, start: usize, pages: &[u32]) -> BatchSequence {
    BatchSequence { tokens: vec![TokenSource::Sampled], ..part(lane, start, &[], pages) }
}

/// The last token goes through the head, without a target or sampling options.
pub(crate) fn keep_last(mut part: BatchSequence) -> BatchSequence {
    part.logits = vec![LogitRow { index: part.tokens.len() - 1, target: None, sample: None }];
    part
}

/// The last token's successor is sampled.
pub(crate) fn sample_last(mut part: BatchSequence, options: &RowOptions) -> BatchSequence {
    part = keep_last(part);
    part.logits[0].sample = Some(options.clone());
    part
}

/// Every token is scored with the token that follows it in `tokens`, which start with the part's.
pub(crate) fn score_all(mut part: BatchSequence, tokens: &[u32]) -> BatchSequence {
    part.logits = (0..part.tokens.len())
        .map(|index| LogitRow { index, target: tokens.get(index + 1).copied(), sample: None })
        .collect();
    part
}

pub(crate) fn batch(sequences: Vec<BatchSequence>, purpose: Purpose) -> Batch {
    Batch { sequences, purpose, hidden: false }
}

/// Runs one step.
pub(crate) fn step(
    executor: &mut dyn StepExecutor,
    sequences: Vec<BatchSequence>,
    purpose: Purpose,
) -> Result<StepOutput, RunError> {
    executor.submit(&batch(sequences, purpose))?;
    executor.collect()
}

/// Runs one step and answers the logits of its rows.
pub(crate) fn step_logits(
    executor: &mut dyn StepExecutor,
    sequences: Vec<BatchSequence>,
) -> Vec<f32> {
    let rows = sequences.iter().map(|sequence| sequence.logits.len()).sum();
    step(executor, sequences, Purpose::Score).unwrap();
    executor.read_logits(rows).unwrap()
}

/// The tokens of an answer, or what went wrong.
pub(crate) fn generate(
    session: &mut Session,
    prompt: &[u32],
    params: &SamplingParams,
) -> Result<Vec<Token>, RunError> {
    let mut tokens = Vec::new();
    for event in session.generate(prompt, params)? {
        match event? {
            Event::Token(token) => tokens.push(token),
            Event::Prompt { .. } => {}
            Event::Done { .. } => return Ok(tokens),
            other => panic!("no such event is known: {other:?}"),
        }
    }
    panic!("an answer ends with Done or an error");
}

pub(crate) fn ids(tokens: &[Token]) -> Vec<u32> {
    tokens.iter().map(|token| token.id).collect()
}

/// Runs ops by themselves, outside any model.
///
/// A backend may replay what it recorded for a key, so every call has a key of its own.
pub(crate) fn run_ops<B: Backend>(
    backend: &mut B,
    record: &mut RecordStep<'_, B>,
) -> Result<(), RunError> {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let key = StepKey {
        tokens: CALLS.fetch_add(1, Ordering::Relaxed),
        sequences: 0,
        queries: 0,
        pages: 0,
        logit_rows: 0,
        logits: LogitUse::Keep,
        hidden: false,
    };
    backend.run(&key, record)
}

/// A buffer that holds `values`, and is never empty: not every device has such a thing.
pub(crate) fn upload<B: Backend, T: trine::backend::Element>(
    backend: &mut B,
    values: &[T],
) -> B::Buffer<T> {
    let mut buffer = backend.allocate("test values", values.len().max(1)).unwrap();
    backend.write(&mut buffer, values).unwrap();
    buffer
}

/// The whole of a buffer.
pub(crate) fn download<B: Backend, T: trine::backend::Element>(
    backend: &mut B,
    buffer: &B::Buffer<T>,
) -> Vec<T> {
    let len = backend.len(buffer);
    backend.read(buffer, len).unwrap()
}

/// Equality that tells NaNs and zeros apart.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
