//! The backend for GPUs through wgpu: Vulkan, Metal and DX12.
//!
//! A step is one compute pass over a list of dispatches that depends on the step's key alone. Ops
//! that follow each other are fused, bind groups are kept, and the lists of decode steps
//! are resolved when the model loads. What changes from step to step is copied into device memory
//! in front of the pass, and what a step answers is copied out behind it, all in one command
//! buffer; several steps may share a submission.
//!
//! Every kernel gives the same bits whichever variant of it runs, however many rows it is given,
//! and whether or not it is fused with its neighbours: integers are exact, and floats are added in
//! an order that is fixed per row.

mod adapters;
mod bandwidth;
mod bind;
mod dispatch;
mod embed;
mod fault;
mod fuse;
mod gate_norm_quantize;
mod gpu;
mod kernel;
mod kv;
mod lm_head;
mod low_rank;
mod memory;
mod packed;
mod paged_attention;
mod probe;
mod record;
mod rms_norm;
mod rms_norm_quantize;
mod rope_append_kv;
mod sample;
mod score;
mod table;
mod ternary_matmul;

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Instant;

pub use adapters::{Adapter, IMMEDIATE_BYTES, STORAGE_BUFFERS, WORKGROUP_BYTES, adapters, choose};
pub use gpu::{Gpu, GpuOptions, Variant};
pub use kernel::{Kernel, kernels, shader_source, shaders};
pub use kv::KvCache;
pub use memory::Buffer;
pub use packed::TernaryMatrix;
pub use record::Recorder;
pub use table::Table;

use super::ops::check_len;
use super::{Backend, DeviceInfo, Element, KvLayout, KvType, RecordStep, Stats, StepKey};
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;
use bind::Binder;
use dispatch::Dispatch;
use memory::{Owned, Raw, Readback, Readbacks};

/// Bytes of host memory that step inputs are staged in at a time; larger ones get their own.
const STAGING: u64 = 1 << 18;

/// Steps that share a submission while a session decodes ahead: few enough that a caller who gives
/// up waits for little.
const BURST: usize = 4;

/// How to run on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WgpuOptions {
    /// Fuse ops that follow each other.
    pub fused: bool,
    /// Keep the dispatches of prepared keys and replay them.
    pub replay: bool,
    /// Steps that may share a submission; 4 on hardware and 1 on a software adapter if absent.
    pub burst: Option<usize>,
}

impl Default for WgpuOptions {
    fn default() -> Self {
        Self { fused: true, replay: true, burst: None }
    }
}

impl WgpuOptions {
    /// With or without fusion.
    pub fn fused(mut self, fused: bool) -> Self {
        self.fused = fused;
        self
    }
    /// With or without replay.
    pub fn replay(mut self, replay: bool) -> Self {
        self.replay = replay;
        self
    }
    /// This number of steps per submission.
    pub fn burst(mut self, burst: usize) -> Self {
        self.burst = Some(burst);
        self
    }
}

/// A GPU as a backend.
pub struct Wgpu {
    gpu: Gpu,
    info: DeviceInfo,
    options: WgpuOptions,
    burst: usize,
    binder: Binder,
    recordings: HashMap<StepKey, Rc<[dispatch::Resolved]>>,
    /// Memory that ops need between their dispatches, by what it is for; the last is the largest.
    scratch: HashMap<&'static str, Vec<Owned>>,
    belt: wgpu::util::StagingBelt,
    readbacks: Readbacks,
    /// What is recorded and not submitted.
    encoder: Option<wgpu::CommandEncoder>,
    open_steps: usize,
    open_copies: Vec<Rc<Readback>>,
    submissions: u64,
    /// The latest submission that is known to be done.
    waited: u64,
    stats: Stats,
}

/// A copy to the host that is on its way.
pub struct Pending<T> {
    readback: Option<Rc<Readback>>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl Wgpu {
    /// A backend on an opened GPU.
    pub fn new(gpu: &Gpu, options: WgpuOptions) -> Self {
        let software = gpu.adapter().is_software();
        let burst = options.burst.unwrap_or(if software { 1 } else { BURST }).max(1);
        let mut info = DeviceInfo::new(gpu.adapter().name(), gpu.description());
        info.memory = gpu.adapter().memory();
        info.asynchronous = true;
        info.steps_ahead = 2 * burst;
        info.software = software;
        if software {
            info.description.push_str("; a software adapter: right, and slower than --device cpu");
        }
        Self {
            gpu: gpu.with_own_list(),
            info,
            options,
            burst,
            binder: Binder::default(),
            recordings: HashMap::new(),
            scratch: HashMap::new(),
            belt: wgpu::util::StagingBelt::new(gpu.0.device.clone(), STAGING),
            readbacks: Readbacks::default(),
            encoder: None,
            open_steps: 0,
            open_copies: Vec::new(),
            submissions: 0,
            waited: 0,
            stats: Stats::default(),
        }
    }

    /// The GPU.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    fn fault(&self, doing: &str, reason: String) -> RunError {
        RunError::Device { device: self.info.name.clone(), doing: doing.into(), reason }
    }

    /// Runs a part of the host's work on a step. Faults of the device come out here, and so do
    /// panics of wgpu, which meets a device that was lost in the middle of a call with one.
    fn enqueueing<R>(
        &mut self,
        doing: &str,
        work: impl FnOnce(&mut Self) -> Result<R, String>,
    ) -> Result<R, RunError> {
        if let Some(fault) = self.gpu.0.faults.get() {
            return Err(self.fault(doing, fault));
        }
        let started = Instant::now();
        let result = crate::caught::caught(|| work(self));
        self.stats.host_seconds += started.elapsed().as_secs_f64();
        let result = result.unwrap_or_else(|_| {
            let lost = "the driver's interface failed in the middle of a call";
            self.gpu.0.faults.set(lost.into());
            Err(lost.into())
        });
        // What the device reported explains more than what failed after it.
        let fault = match (&result, self.gpu.0.faults.get()) {
            (Ok(_), None) => None,
            (_, fault) => self.gpu.fault().or(fault),
        };
        match (result, fault) {
            (Ok(result), None) => Ok(result),
            (Err(reason), None) | (_, Some(reason)) => Err(self.fault(doing, reason)),
        }
    }

    fn encoder(&mut self) -> &mut wgpu::CommandEncoder {
        let device = &self.gpu.0.device;
        self.encoder.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
    }

    /// Sends what is recorded on its way.
    fn flush(&mut self) {
        let Some(encoder) = self.encoder.take() else { return };
        self.belt.finish();
        let index = self.gpu.0.queue.submit([encoder.finish()]);
        self.submissions += 1;
        self.stats.submits += 1;
        self.open_steps = 0;
        self.belt.recall();
        for copy in self.open_copies.drain(..) {
            copy.submission.replace(Some((self.submissions, index.clone())));
            copy.map();
        }
    }

    /// Scratch memory of at least `bytes` bytes, the same at each call while it is large enough.
    fn scratch(&mut self, name: &'static str, bytes: u64) -> Result<Raw, RunError> {
        let kept = self.scratch.entry(name).or_default();
        if let Some(last) = kept.last().filter(|last| last.raw.bytes >= bytes) {
            return Ok(last.raw.clone());
        }
        // Smaller pieces stay, since recordings hold on to them.
        let most = self.gpu.0.limits.max_storage_buffer_binding_size;
        let bytes = bytes.next_power_of_two().min(most.max(bytes));
        match self.gpu.reserve(name, bytes) {
            Ok(owned) => {
                let raw = owned.raw.clone();
                kept.push(owned);
                Ok(raw)
            }
            Err(error) => Err(self.fault("reserving memory for a step", error.to_string())),
        }
    }

    /// The dispatches of a step, resolved.
    fn record(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<Rc<[dispatch::Resolved]>, RunError> {
        let mut recorder = Recorder::new(self, *key);
        record(&mut recorder)?;
        let dispatches = recorder.finish()?;
        self.resolve(&dispatches)
    }

    fn resolve(&mut self, list: &[Dispatch]) -> Result<Rc<[dispatch::Resolved]>, RunError> {
        self.forget_dropped();
        self.enqueueing("preparing a step", |this| {
            list.iter().map(|dispatch| this.binder.resolve(&this.gpu, dispatch)).collect()
        })
    }

    /// Lets go of bind groups whose buffers are gone, so that the memory is.
    fn forget_dropped(&mut self) {
        let Ok(mut dropped) = self.gpu.1.lock() else { return };
        if !dropped.is_empty() && self.binder.forget(&std::mem::take(&mut *dropped)) {
            self.recordings.clear();
        }
    }

    /// Refuses a type of KV cache that no kernel here reads.
    pub(crate) fn holds(&self, kv_type: KvType) -> Result<(), LoadError> {
        match kv_type {
            KvType::F32 | KvType::F16 => Ok(()),
            KvType::Int8 => Err(LoadError::Device {
                device: self.info.name.clone(),
                reason: format!(
                    "a KV cache of {} is not there through wgpu; f16 and f32 are",
                    kv_type.name()
                ),
            }),
        }
    }
}

impl Backend for Wgpu {
    type Buffer<T: Element> = Buffer<T>;
    type TernaryMatrix = TernaryMatrix;
    type Table = Table;
    type KvCache = KvCache;
    type Pending<T: Element> = Pending<T>;
    type Recorder<'r> = Recorder<'r>;

    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn stats(&self) -> Option<Stats> {
        Some(self.stats)
    }

    /// Powers of two up to 64, multiples of 64 above.
    fn bucket(&self, size: usize) -> usize {
        if size <= 64 { size.next_power_of_two() } else { size.next_multiple_of(64) }
    }

    fn allocate<T: Element>(&self, name: &'static str, len: usize) -> Result<Buffer<T>, LoadError> {
        Buffer::new(&self.gpu, name, len)
    }

    fn len<T: Element>(&self, buffer: &Buffer<T>) -> usize {
        buffer.len()
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<TernaryMatrix, LoadError> {
        TernaryMatrix::new(&self.gpu, parts)
    }

    fn load_table(&self, table: HostTable) -> Result<Table, LoadError> {
        Table::new(&self.gpu, &table)
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<KvCache, LoadError> {
        self.holds(layout.kv_type)?;
        KvCache::new(&self.gpu, layout)
    }

    fn write<T: Element>(&mut self, buffer: &mut Buffer<T>, values: &[T]) -> Result<(), RunError> {
        check_len("write", "buffer", values.len(), buffer.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let whole = bytes.len() / 4 * 4;
        if whole < bytes.len() && values.len() < buffer.len() {
            return Err(RunError::Shape {
                op: "write",
                argument: "values",
                expected: "whole words of 4 bytes, or the whole buffer".into(),
                found: format!("{} bytes", bytes.len()),
            });
        }
        let padded = (bytes.len() as u64).next_multiple_of(4);
        let Some(size) = wgpu::BufferSize::new(padded) else { return Ok(()) };
        let target = buffer.raw().buffer.clone();
        self.enqueueing("writing a step's inputs", |this| {
            this.encoder();
            let Some(encoder) = &mut this.encoder else { return Ok(()) };
            let mut view = this.belt.write_buffer(encoder, &target, 0, size);
            view.slice(..whole).copy_from_slice(&bytes[..whole]);
            if whole < bytes.len() {
                let mut last = [0; 4];
                last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
                view.slice(whole..).copy_from_slice(&last);
            }
            Ok(())
        })
    }

    fn prepare(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<(), RunError> {
        if self.options.replay {
            let recording = self.record(key, record)?;
            self.recordings.insert(*key, recording);
        }
        Ok(())
    }

    fn run(&mut self, key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        self.forget_dropped();
        let recording = match self.recordings.get(key) {
            Some(kept) => Rc::clone(kept),
            None => self.record(key, record)?,
        };
        self.enqueueing("enqueueing a step", |this| {
            // A full submission goes out while the host records the next step.
            if this.open_steps >= this.burst {
                this.flush();
            }
            let mut pass = this.encoder().begin_compute_pass(&Default::default());
            for dispatch in recording.iter() {
                dispatch.encode(&mut pass);
            }
            drop(pass);
            this.stats.steps += 1;
            this.stats.dispatches += recording.len() as u64;
            this.open_steps += 1;
            Ok(())
        })
    }

    fn fetch<T: Element>(
        &mut self,
        buffer: &Buffer<T>,
        len: usize,
    ) -> Result<Pending<T>, RunError> {
        check_len("fetch", "buffer", len, buffer.len())?;
        let element = std::marker::PhantomData;
        if len == 0 {
            return Ok(Pending { readback: None, len, element });
        }
        let bytes = ((len * size_of::<T>()) as u64).next_multiple_of(4);
        let source = buffer.raw().buffer.clone();
        self.enqueueing("enqueueing a copy to the host", |this| {
            let readback = this.readbacks.take(&this.gpu.0.device, bytes);
            this.encoder().copy_buffer_to_buffer(&source, 0, &readback.buffer, 0, Some(bytes));
            this.open_copies.push(Rc::clone(&readback));
            // A device with nothing to do does not wait for the submission to be full.
            if this.waited == this.submissions && this.open_steps > 0 {
                this.flush();
            }
            Ok(Pending { readback: Some(readback), len, element })
        })
    }

    fn wait<T: Element>(&mut self, pending: Pending<T>) -> Result<Vec<T>, RunError> {
        const DOING: &str = "waiting for a step";
        let Some(readback) = pending.readback else { return Ok(Vec::new()) };
        // Now, where the step was not sent, or nothing else is there for the device to do.
        let number = readback.submission.borrow().as_ref().map(|(number, _)| *number);
        let idle = number.is_none_or(|number| number == self.submissions);
        if idle || self.open_steps >= self.burst {
            self.enqueueing("submitting steps", |this| {
                this.flush();
                Ok(())
            })?;
        }
        let index = readback.submission.borrow().as_ref().map(|(_, index)| index.clone());
        if let Some(index) = index {
            let mapped = || readback.state() != 0;
            self.gpu.wait_for(&index, mapped).map_err(|reason| self.fault(DOING, reason))?;
        }
        if readback.state() == 2 {
            let fault = self.gpu.fault().unwrap_or_else(|| {
                let failed = "the copy to the host failed";
                self.gpu.0.faults.set(failed.into());
                failed.into()
            });
            return Err(self.fault(DOING, fault));
        }
        let bytes = (pending.len * size_of::<T>()) as u64;
        let values = {
            let view = (readback.buffer.slice(..bytes.next_multiple_of(4)).get_mapped_range())
                .map_err(|error| self.fault(DOING, error.to_string()))?;
            bytemuck::pod_collect_to_vec(&view[..bytes as usize])
        };
        readback.buffer.unmap();
        let number = readback.submission.borrow().as_ref().map_or(0, |(number, _)| *number);
        self.waited = self.waited.max(number);
        self.readbacks.give(readback);
        if let Some(fault) = self.gpu.0.faults.get() {
            return Err(self.fault(DOING, fault));
        }
        Ok(values)
    }
}

/// Every kernel that a model may need, in every variant of its constants.
fn all_kernels() -> Vec<Kernel> {
    [
        embed::kernels(),
        rms_norm::kernels(),
        rms_norm_quantize::kernels(),
        ternary_matmul::kernels(),
        low_rank::kernels(),
        rope_append_kv::kernels(),
        paged_attention::kernels(),
        gate_norm_quantize::kernels(),
        lm_head::kernels(),
        sample::kernels(),
        score::kernels(),
    ]
    .concat()
}

/// Workgroups of a one-dimensional job, folded into two dimensions: each dimension may have 65,535.
fn grid(groups: usize) -> [u32; 3] {
    const MOST: usize = 65_535;
    let rows = groups.div_ceil(MOST).max(1);
    [groups.div_ceil(rows) as u32, rows as u32, 1]
}
