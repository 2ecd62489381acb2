//! A toy device: what a new backend has to bring, and nothing else.
//!
//! It has the manners of a GPU. Work is queued and done on a thread of its own; sizes are rounded
//! up to powers of two; the recording of a key is kept and replayed without asking again; what a
//! step leaves in the intermediates is overwritten with garbage before the next one. The arithmetic
//! is the reference's, so its results must equal the reference's bit for bit.

mod control;
mod kept;
mod record;
mod worker;

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use trine::backend::ops::check_len;
use trine::backend::reference::{ReferenceKv, ReferenceMatrix};
use trine::backend::{Backend, DeviceInfo, Element, KvLayout, PAGE_TOKENS, RecordStep, StepKey};
use trine::error::{LoadError, RunError};
use trine::tensor::HostTable;
use trine::ternary::TernaryRows;

pub(crate) use control::{Control, Spoil, Stats};
use record::Recording;
pub(crate) use record::ToyRecorder;
use worker::Job;

/// Something in the device's memory.
pub(crate) struct Shared<T> {
    id: usize,
    len: usize,
    data: Arc<RwLock<T>>,
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self { id: self.id, len: self.len, data: Arc::clone(&self.data) }
    }
}

/// How the toy runs steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Keeps the recording of a key and replays it.
    Replay,
    /// Records every step and fails one that differs from the recording kept for its key.
    Compare,
    /// Records every step and keeps nothing.
    Eager,
}

pub(crate) struct Toy {
    info: DeviceInfo,
    mode: Mode,
    control: Arc<Control>,
    recordings: HashMap<StepKey, Arc<Recording>>,
    /// Fetches that were not waited for.
    pending: usize,
    queue: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
}

impl Toy {
    pub(crate) fn new() -> Self {
        Self::with(Mode::Replay)
    }

    pub(crate) fn with(mode: Mode) -> Self {
        let mut info = DeviceInfo::new("toy", "a thread with a queue");
        info.asynchronous = true;
        let (queue, jobs) = channel();
        let control = Arc::new(Control::default());
        let worker = worker::start(jobs, Arc::clone(&control));
        Self {
            info,
            mode,
            control,
            recordings: HashMap::new(),
            pending: 0,
            queue: Some(queue),
            worker: Some(worker),
        }
    }

    /// The toy without permission to enqueue ahead.
    pub(crate) fn synchronous(mut self) -> Self {
        self.info.asynchronous = false;
        self
    }

    /// The toy with room for this number of steps in flight.
    pub(crate) fn steps_ahead(mut self, steps: usize) -> Self {
        self.info.steps_ahead = steps;
        self
    }

    /// What tests hold on to when the toy has gone into an executor.
    pub(crate) fn control(&self) -> Arc<Control> {
        Arc::clone(&self.control)
    }

    fn share<T>(&self, len: usize, data: T) -> Shared<T> {
        Shared { id: self.control.next_id(), len, data: Arc::new(RwLock::new(data)) }
    }

    fn enqueue(&self, job: Job) -> Result<(), RunError> {
        let queue = self.queue.as_ref().expect("open until dropped");
        queue.send(job).map_err(|_| device_error("enqueueing", "its thread is gone"))
    }

    fn record(&self, record: &mut RecordStep<'_, Self>) -> Result<Recording, RunError> {
        self.control.stats().recorded += 1;
        let mut recorder = ToyRecorder::default();
        record(&mut recorder)?;
        Ok(recorder.finish())
    }

    /// The recording to run for `key`.
    fn recording(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<Arc<Recording>, RunError> {
        let kept = self.recordings.get(key).cloned();
        match (self.mode, kept) {
            (Mode::Replay, Some(kept)) => {
                self.control.stats().replayed += 1;
                Ok(kept)
            }
            (Mode::Compare, Some(kept)) => {
                let again = self.record(record)?;
                self.control.stats().compared += 1;
                match kept.difference(&again) {
                    None => Ok(kept),
                    Some(difference) => Err(device_error("comparing recordings", &difference)),
                }
            }
            (mode, _) => {
                let recording = Arc::new(self.record(record)?);
                if mode != Mode::Eager {
                    self.recordings.insert(*key, Arc::clone(&recording));
                }
                Ok(recording)
            }
        }
    }
}

fn device_error(doing: &str, reason: &str) -> RunError {
    RunError::Device { device: "toy".into(), doing: doing.into(), reason: reason.into() }
}

impl Drop for Toy {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(worker) = self.worker.take() {
            // It ends when the queue does; a panic of its own has been reported as a fault.
            let _ = worker.join();
        }
    }
}

/// A copy on its way to the host.
pub(crate) struct Pending<T>(pub(crate) Receiver<Result<Vec<T>, RunError>>);

impl Backend for Toy {
    type Buffer<T: Element> = Shared<Vec<T>>;
    type TernaryMatrix = Shared<ReferenceMatrix>;
    type Table = Shared<HostTable>;
    type KvCache = Shared<ReferenceKv>;
    type Pending<T: Element> = Pending<T>;
    type Recorder<'r> = ToyRecorder;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn bucket(&self, size: usize) -> usize {
        size.next_power_of_two()
    }

    fn allocate<T: Element>(
        &self,
        name: &'static str,
        len: usize,
    ) -> Result<Self::Buffer<T>, LoadError> {
        let buffer = self.share(len, vec![T::default(); len]);
        self.control.allocated(name, &buffer);
        Ok(buffer)
    }

    fn len<T: Element>(&self, buffer: &Self::Buffer<T>) -> usize {
        buffer.len
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<Self::TernaryMatrix, LoadError> {
        let matrix = ReferenceMatrix::new(parts)?;
        Ok(self.share(1, matrix))
    }

    fn load_table(&self, table: HostTable) -> Result<Self::Table, LoadError> {
        Ok(self.share(1, table))
    }

    /// Slots hold NaN until they are written: attention must not read them.
    fn allocate_kv(&self, layout: KvLayout) -> Result<Self::KvCache, LoadError> {
        let mut kv = trine::backend::reference::Reference::new().allocate_kv(layout)?;
        let garbage = vec![f32::NAN; layout.head_dim];
        for layer in 0..layout.layers {
            for slot in 0..layout.pages * PAGE_TOKENS {
                for head in 0..layout.kv_heads {
                    kv.store(layer, slot, head, &garbage, &garbage);
                }
            }
        }
        Ok(self.share(1, kv))
    }

    fn write<T: Element>(
        &mut self,
        buffer: &mut Self::Buffer<T>,
        values: &[T],
    ) -> Result<(), RunError> {
        check_len("write", "buffer", values.len(), buffer.len)?;
        let (buffer, values) = (buffer.clone(), values.to_vec());
        self.enqueue(Job::Write(Box::new(move || {
            buffer.data.write().unwrap()[..values.len()].copy_from_slice(&values);
        })))
    }

    fn prepare(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<(), RunError> {
        self.control.stats().prepared += 1;
        self.recording(key, record).map(|_| ())
    }

    fn run(&mut self, key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        let recording = self.recording(key, record)?;
        self.control.stats().runs += 1;
        self.enqueue(Job::Run(recording))
    }

    fn fetch<T: Element>(
        &mut self,
        buffer: &Self::Buffer<T>,
        len: usize,
    ) -> Result<Pending<T>, RunError> {
        check_len("fetch", "buffer", len, buffer.len)?;
        let (answer, pending) = channel();
        let buffer = buffer.clone();
        self.enqueue(Job::Fetch(Box::new(move |fault| {
            let copy = fault.map_or_else(|| Ok(buffer.data.read().unwrap()[..len].to_vec()), Err);
            // Nobody waits for a copy whose step was given up.
            let _ = answer.send(copy);
        })))?;
        self.pending += 1;
        let mut stats = self.control.stats();
        stats.most_pending = stats.most_pending.max(self.pending);
        Ok(Pending(pending))
    }

    fn wait<T: Element>(&mut self, pending: Pending<T>) -> Result<Vec<T>, RunError> {
        self.pending -= 1;
        pending.0.recv().map_err(|_| device_error("fetching", "its thread is gone"))?
    }
}
