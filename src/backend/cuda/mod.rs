//! The backend for NVIDIA GPUs, through the CUDA driver alone: kernels are compiled ahead.
//!
//! A step is a list of launches that depends on the step's key alone. Ops that follow each other
//! are fused, and the lists of decode steps are captured as graphs when the model loads. What
//! changes from step to step is put into device memory by one launch in front of the list.
//!
//! Every kernel gives the same bits however many rows it is given and whether or not it is fused
//! with its neighbours: integers are exact, and floats are added in an order that is fixed per row.
//! A device's memory and its work belong to one thread at a time.

mod bandwidth;
#[cfg(feature = "nvrtc")]
pub mod compile;
mod device;
mod embed;
mod fuse;
mod gate_norm_quantize;
mod inputs;
mod kv;
mod launch;
mod lm_head;
mod lm_head_screen;
mod low_rank;
mod memory;
mod module;
mod packed;
mod paged_attention;
mod power;
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

use cudarc::driver::{CudaGraph, result, sys};

pub use bandwidth::{copy_bandwidth, free_memory};
pub use device::{GpuInfo, choose, gpus};
pub use launch::Kernel;
pub use memory::Buffer;
pub use module::ptx;
#[cfg(feature = "nvrtc")]
pub use module::source;
pub use packed::TernaryMatrix;
pub use power::{PowerMeter, PowerReading};
pub use record::Recorder;
pub use ternary_matmul::MatmulForm;

pub use super::Head;
use super::ops::check_len;
use super::{Backend, DeviceInfo, Element, KvLayout, RecordStep, Stats, StepKey};
use crate::error::{LoadError, RunError};
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;
use device::Device;
use inputs::Inputs;
use kv::KvCache;
use launch::Launch;
use memory::{Owned, Pinned};
use table::Table;

/// How to run on an NVIDIA GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaOptions {
    /// Fuse ops that follow each other.
    pub fused: bool,
    /// Capture the launches of prepared keys as graphs and replay them.
    pub replay: bool,
    /// Let kernels start before those in front of them end (programmatic dependent launch), on GPUs
    /// that can, from compute capability 9.0 on.
    pub overlapped: bool,
    /// The kernels of ternary products, where the number of rows is not to choose them.
    pub matmul: Option<MatmulForm>,
    /// How the output head is computed.
    pub head: Head,
    /// Compile the kernels with NVRTC for the GPU that is opened, in place of taking those that are
    /// part of the crate: seconds to a minute. Refused without the feature `nvrtc`.
    pub compile: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            fused: true,
            replay: true,
            overlapped: true,
            matmul: None,
            head: Head::Full,
            compile: false,
        }
    }
}

impl CudaOptions {
    /// With or without fusion.
    pub fn fused(mut self, fused: bool) -> Self {
        self.fused = fused;
        self
    }
    /// With or without graphs.
    pub fn replay(mut self, replay: bool) -> Self {
        self.replay = replay;
        self
    }
    /// With or without overlapped launches.
    pub fn overlapped(mut self, overlapped: bool) -> Self {
        self.overlapped = overlapped;
        self
    }
    /// With these kernels for ternary products; fused ones take [`MatmulForm::Few`].
    pub fn matmul(mut self, form: MatmulForm) -> Self {
        self.matmul = Some(form);
        self
    }
    /// With kernels that NVRTC compiles now, or those of the crate.
    pub fn compile(mut self, compile: bool) -> Self {
        self.compile = compile;
        self
    }
    /// With this output head.
    pub fn head(mut self, head: Head) -> Self {
        self.head = head;
        self
    }
}

/// An NVIDIA GPU as a backend.
pub struct Cuda {
    // Dropped first: graphs and pinned memory before the device.
    recordings: HashMap<StepKey, Rc<Recording>>,
    inputs: Inputs,
    /// Memory that ops need between their launches, by what it is for.
    scratch: HashMap<&'static str, Rc<Owned>>,
    /// Copies to the host that nobody waits for any more.
    spare: Vec<Pinned>,
    info: DeviceInfo,
    options: CudaOptions,
    stats: Stats,
    device: Rc<Device>,
}

/// The launches of a step.
struct Recording {
    /// The captured launches; absent for a step that is not kept.
    graph: Option<CudaGraph>,
    /// Also keeps the memory that the graph points to.
    launches: Vec<Launch>,
}

/// A copy to the host that is on its way.
pub struct Pending<T> {
    copy: Option<Pinned>,
    len: usize,
    element: std::marker::PhantomData<T>,
}

impl Cuda {
    /// Opens a GPU: its context, a stream, the kernels.
    ///
    /// # Errors
    /// [`LoadError::Device`] with the reason, where the driver or the GPU cannot run the
    /// kernels, or NVRTC cannot compile them.
    pub fn new(gpu: GpuInfo, options: CudaOptions) -> Result<Self, LoadError> {
        let device = Device::open(gpu, options.compile)?;
        let mut info = DeviceInfo::new(device.info.name(), device.info.description());
        info.memory = Some(device.info.memory);
        info.asynchronous = true;
        info.software = device.info.is_emulated();
        Ok(Self {
            recordings: HashMap::new(),
            inputs: Inputs::new(),
            scratch: HashMap::new(),
            spare: Vec::new(),
            info,
            options,
            stats: Stats::default(),
            device,
        })
    }

    /// The GPU.
    pub fn gpu(&self) -> &GpuInfo {
        &self.device.info
    }

    fn fault(&self, doing: &str, reason: String) -> RunError {
        RunError::Device { device: self.info.name.clone(), doing: doing.into(), reason }
    }

    /// Runs a part of the host's work on a step.
    fn enqueueing<R>(
        &mut self,
        doing: &str,
        work: impl FnOnce(&mut Self) -> Result<R, String>,
    ) -> Result<R, RunError> {
        let started = Instant::now();
        let result = match self.device.fault() {
            Some(fault) => Err(fault),
            None => work(self),
        };
        self.stats.host_seconds += started.elapsed().as_secs_f64();
        result.map_err(|reason| self.fault(doing, reason))
    }

    /// Enqueues a launch.
    fn launch(&self, launch: &Launch) -> Result<(), String> {
        let Launch { kernel, grid, shared, args, .. } = launch;
        let Some(function) = self.device.modules.function(kernel) else {
            return Err(format!("there is no kernel {}", kernel.name));
        };
        let overlapped = self.options.overlapped && self.device.info.capability >= (9, 0);
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: *shared,
            hStream: self.device.stream.cu_stream(),
            attrs: &mut attribute,
            numAttrs: u32::from(overlapped),
        };
        let mut args = [args.0.as_ptr().cast_mut().cast()];
        self.device
            .call(|| {
                // SAFETY: the function lives as long as the device; its one argument is as long as
                // its source says, which a test compares; the driver copies it before it returns.
                // What it points to is kept by whoever keeps the launch, and memory is not freed
                // while work that uses it is under way.
                unsafe {
                    let (args, none) = (args.as_mut_ptr(), std::ptr::null_mut());
                    sys::cuLaunchKernelEx(&config, function.cu_function(), args, none).result()
                }
            })
            .map_err(|reason| format!("the launch of {}: {reason}", kernel.name))
    }

    /// Sends what was written on its way.
    fn send_inputs(&mut self) -> Result<(), String> {
        for launch in self.inputs.launches() {
            self.launch(&launch)?;
            self.stats.dispatches += 1;
        }
        self.inputs.sent()
    }

    /// The launches of a step.
    fn record(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<Vec<Launch>, RunError> {
        let mut recorder = Recorder::new(self, *key);
        record(&mut recorder)?;
        recorder.finish()
    }

    /// Makes a graph of launches, which are not run.
    fn capture(&self, launches: &[Launch]) -> Result<Option<CudaGraph>, String> {
        let stream = &self.device.stream;
        // Of this thread only: another device of the program may do as it likes meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.device.call(|| stream.begin_capture(mode))?;
        let launched = launches.iter().try_for_each(|launch| self.launch(launch));
        let flags = sys::CUgraphInstantiate_flags(0);
        let captured = self.device.call(|| stream.end_capture(flags));
        launched?;
        let graph = captured?;
        if let Some(graph) = &graph {
            self.device.call(|| graph.upload())?;
        }
        Ok(graph)
    }

    /// Scratch memory of at least `bytes` bytes, the same at each call while it is large enough.
    /// Recordings keep what they use.
    fn scratch(&mut self, name: &'static str, bytes: u64) -> Result<Rc<Owned>, RunError> {
        if let Some(kept) = self.scratch.get(name).filter(|kept| kept.bytes() >= bytes) {
            return Ok(Rc::clone(kept));
        }
        match Owned::new(&self.device, name, bytes.next_power_of_two()) {
            Ok(owned) => {
                self.scratch.insert(name, Rc::clone(&owned));
                Ok(owned)
            }
            Err(error) => Err(self.fault("reserving memory for a step", error.to_string())),
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // Graphs, launches and memory go after this; none of them may be in use then.
        let stream = self.device.stream.cu_stream();
        // SAFETY: the stream lives as long as the device.
        let _ = self.device.call(|| unsafe { result::stream::synchronize(stream) });
    }
}

impl Backend for Cuda {
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
        Buffer::new(&self.device, name, len)
    }

    fn len<T: Element>(&self, buffer: &Buffer<T>) -> usize {
        buffer.len()
    }

    fn pack_ternary(&self, parts: &[&dyn TernaryRows]) -> Result<TernaryMatrix, LoadError> {
        TernaryMatrix::new(&self.device, parts)
    }

    fn load_table(&self, table: HostTable) -> Result<Table, LoadError> {
        let mut table = Table::new(&self.device, &table)?;
        table.copy = lm_head_screen::Copy::new(self, &table, self.options.head)?;
        Ok(table)
    }

    fn allocate_kv(&self, layout: KvLayout) -> Result<KvCache, LoadError> {
        KvCache::new(&self.device, layout)
    }

    fn write<T: Element>(&mut self, buffer: &mut Buffer<T>, values: &[T]) -> Result<(), RunError> {
        check_len("write", "buffer", values.len(), buffer.len())?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = Rc::clone(buffer.memory());
        self.enqueueing("writing a step's inputs", |this| {
            let device = Rc::clone(&this.device);
            if bytes.is_empty() || this.inputs.push(&device, &to, bytes)? {
                return Ok(());
            }
            this.send_inputs()?;
            if this.inputs.push(&device, &to, bytes)? {
                return Ok(());
            }
            // More than a stage holds.
            to.upload(0, bytes).map_err(|error| error.to_string())
        })
    }

    fn prepare(
        &mut self,
        key: &StepKey,
        record: &mut RecordStep<'_, Self>,
    ) -> Result<(), RunError> {
        if self.options.replay {
            let launches = self.record(key, record)?;
            let graph = self.enqueueing("preparing a step", |this| this.capture(&launches))?;
            self.recordings.insert(*key, Rc::new(Recording { graph, launches }));
        }
        Ok(())
    }

    fn run(&mut self, key: &StepKey, record: &mut RecordStep<'_, Self>) -> Result<(), RunError> {
        let recording = match self.recordings.get(key) {
            Some(kept) => Rc::clone(kept),
            None => Rc::new(Recording { graph: None, launches: self.record(key, record)? }),
        };
        self.enqueueing("enqueueing a step", |this| {
            this.send_inputs()?;
            match &recording.graph {
                Some(graph) => this.device.call(|| graph.launch())?,
                None => recording.launches.iter().try_for_each(|launch| this.launch(launch))?,
            }
            this.stats.steps += 1;
            this.stats.submits += 1;
            this.stats.dispatches += recording.launches.len() as u64;
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
            return Ok(Pending { copy: None, len, element });
        }
        let bytes = len * size_of::<T>();
        self.enqueueing("enqueueing a copy to the host", |this| {
            this.send_inputs()?;
            let spare = this.spare.iter().position(|pinned| {
                // Not one that is much larger than what is asked for.
                (bytes..=4 * bytes.max(1024)).contains(&pinned.len())
            });
            let copy = match spare {
                Some(index) => this.spare.swap_remove(index),
                None => Pinned::new(&this.device, bytes.next_power_of_two())?,
            };
            copy.copy_from(buffer.memory(), bytes)?;
            Ok(Pending { copy: Some(copy), len, element })
        })
    }

    fn wait<T: Element>(&mut self, pending: Pending<T>) -> Result<Vec<T>, RunError> {
        const DOING: &str = "waiting for a step";
        let Some(copy) = pending.copy else { return Ok(Vec::new()) };
        let bytes = copy.bytes().map_err(|reason| self.fault(DOING, reason))?;
        let values = bytemuck::pod_collect_to_vec(&bytes[..pending.len * size_of::<T>()]);
        self.spare.push(copy);
        Ok(values)
    }
}

/// Every kernel that the host launches, for tests that compare them with what was compiled.
pub fn all_kernels() -> Vec<Kernel> {
    let mut kernels = ternary_matmul::kernels();
    for more in [
        embed::KERNELS,
        gate_norm_quantize::KERNELS,
        inputs::KERNELS,
        lm_head::KERNELS,
        lm_head_screen::KERNELS,
        low_rank::KERNELS,
        paged_attention::KERNELS,
        rms_norm::KERNELS,
        rms_norm_quantize::KERNELS,
        rope_append_kv::KERNELS,
        sample::KERNELS,
        score::KERNELS,
    ] {
        kernels.extend(more);
    }
    kernels
}
