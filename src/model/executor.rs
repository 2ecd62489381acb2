//! What owns a model on a device and runs its steps; `forward.rs` is what a step records.

use std::collections::VecDeque;

use super::activations::{Activations, Reserve};
use super::batch::{Batch, Purpose, StepOutput};
use super::config::ModelConfig;
use super::forward::Step;
use super::memory::check_memory;
use super::staging::Staging;
use super::weights::{AdapterSizes, WeightSource, Weights};
use crate::backend::{Backend, DeviceInfo, LogitUse, MAX_LOGPROBS, NONE, Stats, StepKey};
use crate::error::{LoadError, RunError};

/// A model on a device, whatever the device: what the engine steps.
pub trait StepExecutor {
    /// The model's hyper-parameters.
    fn config(&self) -> &ModelConfig;
    /// What was reserved at load.
    fn reserve(&self) -> &Reserve;
    /// The device.
    fn device(&self) -> &DeviceInfo;
    /// What the device has done since it was opened, where that is counted.
    fn stats(&self) -> Option<Stats> {
        None
    }
    /// Enqueues a step. At most [`DeviceInfo::steps_ahead`] may be enqueued and not collected.
    fn submit(&mut self, batch: &Batch) -> Result<(), RunError>;
    /// Waits for the oldest step that was not collected.
    fn collect(&mut self) -> Result<StepOutput, RunError>;
    /// Steps enqueued and not collected.
    fn in_flight(&self) -> usize;
    /// Logits of the last step's last pass of the head, `rows × vocabulary`.
    fn read_logits(&mut self, rows: usize) -> Result<Vec<f32>, RunError>;
}

/// Owns a backend, a model's weights on it, and the memory of its steps.
pub struct Executor<B: Backend> {
    config: ModelConfig,
    reserve: Reserve,
    weights: Weights<B>,
    activations: Activations<B>,
    kv: B::KvCache,
    staging: Staging,
    in_flight: VecDeque<InFlight<B>>,
    // Last, so that it outlives what it allocated.
    backend: B,
}

/// A step that was enqueued: the copies to wait for.
struct InFlight<B: Backend> {
    rows: usize,
    purpose: Purpose,
    lanes: Vec<usize>,
    top: Vec<usize>,
    tokens: Option<B::Pending<u32>>,
    logprobs: Option<B::Pending<f32>>,
    top_tokens: Option<B::Pending<u32>>,
    top_logprobs: Option<B::Pending<f32>>,
    hidden: Option<B::Pending<f32>>,
    /// Where the step answers nothing: something to wait for.
    end: Option<B::Pending<u32>>,
}

impl<B: Backend> Executor<B> {
    /// Loads a model: reserves all memory that steps will need, packs the weights, and prepares
    /// the keys of decoding. `progress` hears how many of how many matrices are packed.
    pub fn load(
        mut backend: B,
        source: &dyn WeightSource,
        reserve: Reserve,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = source.config().clone();
        let adapters = AdapterSizes::of(source);
        check_memory(backend.info(), &config, &reserve, &adapters)?;
        let weights = Weights::load(&mut backend, source, progress)?;
        let kv = backend.allocate_kv(reserve.kv_layout(&config))?;
        let activations = Activations::allocate(&mut backend, &config, &reserve, &adapters)?;
        let staging = Staging::new(&config, &reserve);
        let in_flight = VecDeque::with_capacity(backend.info().steps_ahead);
        let mut executor =
            Self { config, reserve, weights, activations, kv, staging, in_flight, backend };
        executor.prepare_decoding()?;
        Ok(executor)
    }

    /// Lets the backend prepare every decode key: one token per sequence, greedy and sampled.
    fn prepare_decoding(&mut self) -> Result<(), RunError> {
        let decode = |sequences, pages, logits| StepKey {
            tokens: sequences,
            sequences,
            queries: 1,
            pages,
            logit_rows: sequences,
            logits,
            hidden: false,
        };
        let mut keys = Vec::new();
        for logits in [LogitUse::Greedy, LogitUse::Sample] {
            for pages in self.distinct(self.reserve.max_pages(), |n| decode(1, n, logits)) {
                let of = |n| decode(n, pages.pages, logits);
                keys.extend(self.distinct(self.staging.most_sequences(), of));
            }
        }
        for key in keys {
            self.with_recording(&key, |backend, record| backend.prepare(&key, record))?;
        }
        Ok(())
    }

    /// The keys that steps of sizes 1 to `max` have.
    fn distinct(&self, max: usize, sizes: impl Fn(usize) -> StepKey) -> Vec<StepKey> {
        let round_up = |n| self.staging.round_up(sizes(n), &|size| self.backend.bucket(size));
        let mut keys: Vec<StepKey> = (1..=max).map(round_up).collect();
        keys.dedup();
        keys
    }

    fn with_recording(
        &mut self,
        key: &StepKey,
        run: impl FnOnce(&mut B, &mut crate::backend::RecordStep<'_, B>) -> Result<(), RunError>,
    ) -> Result<(), RunError> {
        let step = Step { config: &self.config, weights: &self.weights, key };
        let head_rows = self.reserve.logit_rows(&self.config);
        let (activations, kv) = (&mut self.activations, &mut self.kv);
        run(&mut self.backend, &mut |recorder: &mut B::Recorder<'_>| {
            step.record(recorder, activations, kv, head_rows)
        })
    }
}

impl<B: Backend> StepExecutor for Executor<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn reserve(&self) -> &Reserve {
        &self.reserve
    }

    fn device(&self) -> &DeviceInfo {
        self.backend.info()
    }

    fn stats(&self) -> Option<Stats> {
        self.backend.stats()
    }

    fn submit(&mut self, batch: &Batch) -> Result<(), RunError> {
        let most = self.backend.info().steps_ahead;
        if self.in_flight.len() >= most {
            return Err(RunError::Exhausted {
                what: "steps in flight",
                asked: self.in_flight.len() + 1,
                reserved: most,
            });
        }
        let backend = &mut self.backend;
        let key = self.staging.fill(batch, &|size| backend.bucket(size))?;
        self.staging.upload(backend, &mut self.activations.batch)?;
        self.with_recording(&key, |backend, record| backend.run(&key, record))?;

        let rows = self.staging.rows();
        let sampling = matches!(batch.purpose, Purpose::Sample { .. });
        let logprobs = matches!(key.logits, LogitUse::SampleLogprobs | LogitUse::Score);
        let alternatives = key.logits == LogitUse::SampleLogprobs && rows > 0;
        let (backend, samples) = (&mut self.backend, &self.activations.samples);
        let mut in_flight = InFlight {
            rows,
            purpose: batch.purpose,
            lanes: self.staging.row_lanes().to_vec(),
            top: self.staging.row_logprobs().to_vec(),
            tokens: None,
            logprobs: None,
            top_tokens: None,
            top_logprobs: None,
            hidden: None,
            end: None,
        };
        if sampling && rows > 0 {
            in_flight.tokens = Some(backend.fetch(&samples.tokens, rows)?);
        }
        if logprobs && rows > 0 {
            in_flight.logprobs = Some(backend.fetch(&samples.logprobs, rows)?);
        }
        if alternatives {
            in_flight.top_tokens = Some(backend.fetch(&samples.top_tokens, rows * MAX_LOGPROBS)?);
            in_flight.top_logprobs =
                Some(backend.fetch(&samples.top_logprobs, rows * MAX_LOGPROBS)?);
        }
        if batch.hidden && rows > 0 {
            let len = rows * self.config.hidden;
            in_flight.hidden = Some(backend.fetch(&self.activations.normed, len)?);
        }
        if rows == 0 && backend.info().asynchronous {
            in_flight.end = Some(backend.fetch(&samples.tokens, 1)?);
        }
        self.in_flight.push_back(in_flight);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput, RunError> {
        let Some(step) = self.in_flight.pop_front() else {
            return Err(RunError::Exhausted { what: "steps to collect", asked: 1, reserved: 0 });
        };
        let mut output = StepOutput::default();
        if let Some(pending) = step.tokens {
            output.tokens = self.backend.wait(pending)?;
        }
        if let Some(pending) = step.logprobs {
            output.logprobs = self.backend.wait(pending)?;
        }
        if let (Some(tokens), Some(logprobs)) = (step.top_tokens, step.top_logprobs) {
            let tokens = self.backend.wait(tokens)?;
            let logprobs = self.backend.wait(logprobs)?;
            let pairs: Vec<(u32, f32)> = tokens.into_iter().zip(logprobs).collect();
            output.top = (pairs.chunks_exact(MAX_LOGPROBS).zip(&step.top))
                .map(|(row, &count)| row[..count].to_vec())
                .collect();
        }
        if let Some(pending) = step.end {
            self.backend.wait(pending)?;
        }
        if let Some(pending) = step.hidden {
            output.hidden = self.backend.wait(pending)?;
        }
        let sampling = matches!(step.purpose, Purpose::Sample { .. });
        let not_finite = |row: &usize| {
            (sampling && output.tokens[*row] == NONE)
                || output.logprobs.get(*row).is_some_and(|logprob| logprob.is_nan())
        };
        let width = self.config.hidden;
        let bad = output.hidden.iter().position(|x| !x.is_finite()).map(|at| at / width);
        if let Some(row) = (0..step.rows).find(not_finite).or(bad) {
            let request = format!("the sequence on lane {}", step.lanes[row]);
            return Err(RunError::NonFinite { request });
        }
        Ok(output)
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn read_logits(&mut self, rows: usize) -> Result<Vec<f32>, RunError> {
        let reserved = self.reserve.logit_rows(&self.config);
        if rows > reserved {
            return Err(RunError::Exhausted { what: "rows of logits", asked: rows, reserved });
        }
        let logits = self.backend.read(&self.activations.logits, rows * self.config.vocabulary)?;
        if logits.iter().any(|x| !x.is_finite()) {
            return Err(RunError::NonFinite { request: "the last step".into() });
        }
        Ok(logits)
    }
}
