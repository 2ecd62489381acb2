//! The one match on devices: a model's weights and a device's name to an executor.

use super::activations::Reserve;
use super::executor::{Executor, StepExecutor};
use super::weights::WeightSource;
use crate::backend::check::Checked;
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::backend::select::DeviceName;
use crate::backend::{Backend, Head};
use crate::error::LoadError;

/// A model on a device, or why not.
type Loaded = Result<Box<dyn StepExecutor>, LoadError>;

/// How to open a device.
#[derive(Debug, Clone, Default)]
pub struct DeviceOptions {
    /// Which device.
    pub device: DeviceName,
    /// Threads of the CPU backend; all cores if absent.
    pub threads: Option<usize>,
    /// Check every op against the reference; the first that disagrees is named. Slow.
    pub check: bool,
    /// Never replay a recording. The CPU never does; a switch for finding faults elsewhere.
    pub eager: bool,
    /// Run every op as a kernel of its own. The CPU always does; a switch for finding faults
    /// elsewhere.
    pub unfused: bool,
    /// The output head; a device that does not have it is refused.
    pub head: Head,
}

impl DeviceOptions {
    /// Refuses heads that `device` does not have.
    fn full_head(&self, device: &str) -> Result<(), LoadError> {
        let found = match self.head {
            Head::Full => return Ok(()),
            Head::Screened => "screened",
            Head::Int8 => "int8",
        };
        Err(LoadError::Option {
            option: "head".into(),
            expected: format!("full on {device}, since the others are made for CUDA alone"),
            found: found.into(),
        })
    }
}

/// Loads a model on a device. `progress` hears how many of how many kernels and matrices are ready:
/// kernels are compiled first, where a device has any to compile.
///
/// A device that is named is used, or refused with the reason. [`DeviceName::Auto`] takes the first
/// that the model loads on: a GPU of this machine, never a software adapter, else the CPU. Each
/// device that it passes by is told as a warning, with the reason; `progress` then starts again.
pub fn open(
    options: &DeviceOptions,
    source: &dyn WeightSource,
    reserve: Reserve,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn StepExecutor>, LoadError> {
    let mut job = Job { options, source, reserve, progress };
    match &options.device {
        DeviceName::Auto => first_that_loads(&mut job, candidates()),
        DeviceName::Cpu => on_cpu(&mut job),
        #[cfg(feature = "cuda")]
        DeviceName::Cuda(ordinal) => on_cuda(crate::backend::cuda::choose(*ordinal)?, &mut job),
        #[cfg(not(feature = "cuda"))]
        DeviceName::Cuda(_) => Err(LoadError::Device {
            device: options.device.to_string(),
            reason: crate::backend::select::NO_CUDA.into(),
        }),
        #[cfg(feature = "wgpu")]
        DeviceName::Wgpu(which) => {
            on_wgpu(crate::backend::wgpu::choose(which.as_deref())?, &mut job)
        }
        #[cfg(not(feature = "wgpu"))]
        DeviceName::Wgpu(_) => Err(LoadError::Device {
            device: options.device.to_string(),
            reason: crate::backend::select::NO_WGPU.into(),
        }),
    }
}

/// What is to be loaded, and how.
struct Job<'a> {
    options: &'a DeviceOptions,
    source: &'a dyn WeightSource,
    reserve: Reserve,
    progress: &'a mut dyn FnMut(usize, usize),
}

/// A device that `auto` may choose.
struct Candidate<'c, J> {
    name: String,
    load: Box<dyn FnOnce(&mut J) -> Loaded + 'c>,
}

/// The devices that `auto` tries before the CPU. Not a GPU that a CPU imitates.
fn candidates<'c, 'a>() -> Vec<Candidate<'c, Job<'a>>> {
    #[allow(unused_mut)] // in a build without GPUs
    let mut candidates = Vec::new();
    #[cfg(feature = "cuda")]
    {
        let gpus = crate::backend::cuda::gpus().unwrap_or_default().into_iter();
        candidates.extend(gpus.filter(|gpu| !gpu.is_emulated()).map(|gpu| Candidate {
            name: format!("{} ({})", gpu.name(), gpu.model),
            load: Box::new(move |job: &mut Job<'a>| {
                on_cuda(crate::backend::cuda::choose(gpu.ordinal)?, job)
            }),
        }));
    }
    #[cfg(feature = "wgpu")]
    {
        let gpus = crate::backend::wgpu::adapters().into_iter().filter(|gpu| gpu.is_hardware());
        candidates.extend(gpus.map(|gpu| Candidate {
            name: format!("{} ({})", gpu.name(), gpu.info().name),
            load: Box::new(move |job: &mut Job<'a>| on_wgpu(gpu, job)),
        }));
    }
    candidates
}

/// Loads on the first candidate that can, else on the CPU.
fn first_that_loads<'a>(job: &mut Job<'a>, candidates: Vec<Candidate<'_, Job<'a>>>) -> Loaded {
    for Candidate { name, load } in candidates {
        match load(job) {
            Err(
                error @ (LoadError::Device { .. }
                | LoadError::OutOfMemory { .. }
                | LoadError::Prepare(_)),
            ) => tracing::warn!("{name} is passed by: {error}; --device names a device to use"),
            // Loaded, or the model's files are at fault, which no other device changes.
            other => return other,
        }
    }
    on_cpu(job)
}

fn on_cpu(job: &mut Job<'_>) -> Loaded {
    job.options.full_head("cpu")?;
    let options = CpuOptions { threads: job.options.threads, ..CpuOptions::default() };
    load(Cpu::new(options)?, job, 0)
}

#[cfg(feature = "cuda")]
fn on_cuda(gpu: crate::backend::cuda::GpuInfo, job: &mut Job<'_>) -> Loaded {
    use crate::backend::cuda::{Cuda, CudaOptions};

    let DeviceOptions { check, eager, unfused, head, .. } = *job.options;
    if check && head == Head::Int8 {
        return Err(LoadError::Option {
            option: "head".into(),
            expected: "full or screened, since a check compares logits with the full head's".into(),
            found: "int8".into(),
        });
    }
    // A check runs each op by itself, as it is recorded.
    let options = CudaOptions::default()
        .head(head)
        .fused(!unfused && !check)
        .replay(!eager && !check)
        .overlapped(!eager && !check);
    let cuda = Cuda::new(gpu, options)?;
    let adapters = super::weights::AdapterSizes::of(job.source);
    super::memory::check_memory(cuda.info(), job.source.config(), &job.reserve, &adapters)?;
    let mut executor = load(cuda, job, 0)?;
    if !check {
        warm_up(&mut *executor)?;
    }
    Ok(executor)
}

#[cfg(feature = "wgpu")]
fn on_wgpu(adapter: crate::backend::wgpu::Adapter, job: &mut Job<'_>) -> Loaded {
    use super::weights::PROJECTIONS;
    use crate::backend::wgpu::{Gpu, GpuOptions, Wgpu, WgpuOptions};

    let DeviceOptions { check, eager, unfused, .. } = *job.options;
    job.options.full_head(&adapter.name())?;
    let gpu = Gpu::of(adapter, GpuOptions::default())?;
    // A check runs each op by itself, as it is recorded.
    let options = WgpuOptions::default().fused(!unfused && !check).replay(!eager && !check);
    let wgpu = Wgpu::new(&gpu, options);
    // Compiling may take long, and is for nothing where the model does not fit.
    wgpu.holds(job.reserve.kv_type)?;
    let config = job.source.config();
    let adapters = super::weights::AdapterSizes::of(job.source);
    super::memory::check_memory(wgpu.info(), config, &job.reserve, &adapters)?;
    let most = gpu.limits().max_storage_buffer_binding_size.min(gpu.limits().max_buffer_size);
    if let Some((name, bytes)) = job.reserve.largest_piece(config).filter(|p| p.1 as u64 > most) {
        return Err(LoadError::OutOfMemory {
            device: wgpu.info().name.clone(),
            arithmetic: format!(
                "{name} need {bytes} bytes in one piece, and this device binds {most} at most; a \
                 shorter --context makes the KV cache smaller"
            ),
        });
    }
    let matrices = job.source.config().layers * PROJECTIONS;
    let mut kernels = 0;
    gpu.warm(&mut |done, of| {
        kernels = of;
        (job.progress)(done, of + matrices);
    })?;
    let mut executor = load(wgpu, job, kernels)?;
    if !check {
        warm_up(&mut *executor)?;
    }
    Ok(executor)
}

/// Loads on a backend that has `kernels` kernels ready.
fn load<B: Backend>(backend: B, job: &mut Job<'_>, kernels: usize) -> Loaded {
    let (source, reserve) = (job.source, job.reserve);
    let progress = &mut |done, of| (job.progress)(kernels + done, kernels + of);
    Ok(if job.options.check {
        Box::new(Executor::load(Checked::new(backend), source, reserve, progress)?)
    } else {
        Box::new(Executor::load(backend, source, reserve, progress)?)
    })
}

/// Runs a short prompt and steps that decode, greedily and sampled, so that what a driver does when
/// a kernel runs for the first time is paid for here, and a device that fails or answers NaN is
/// found out before anyone waits for it.
///
/// No trace is left: keys, values and the history of a lane are written again by whatever takes
/// their positions, before anything reads them.
#[cfg(any(feature = "cuda", feature = "wgpu"))]
fn warm_up(executor: &mut dyn StepExecutor) -> Result<(), LoadError> {
    use super::batch::{Batch, BatchSequence, LogitRow, Purpose, RowOptions, TokenSource};
    use crate::backend::ops::SampleRow;

    /// Tokens of the prompt: more than any kernel for single rows takes.
    const PROMPT: usize = 16;

    let reserve = *executor.reserve();
    let prompt = PROMPT.min(reserve.step_tokens).min(reserve.context.saturating_sub(2)).max(1);
    let steps = [(0, prompt, 0.0), (prompt, 1, 0.0), (prompt + 1, 1, 1.0)];
    for (start, tokens, temperature) in steps {
        if start + tokens > reserve.context {
            break;
        }
        let row =
            SampleRow { temperature, top_p: 1.0, repetition_penalty: 1.0, ..Default::default() };
        let source = if start == 0 { TokenSource::Token(0) } else { TokenSource::Sampled };
        let sample = Some(RowOptions { row, biases: Vec::new() });
        let sequence = BatchSequence {
            lane: 0,
            start,
            tokens: vec![source; tokens],
            pages: vec![0],
            logits: vec![LogitRow { index: tokens - 1, target: None, sample }],
        };
        executor.submit(&Batch {
            sequences: vec![sequence],
            purpose: Purpose::Sample { logprobs: false },
            hidden: false,
        })?;
        executor.collect()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::KvType;
    use crate::checkpoint::synthetic::{SyntheticModel, published};

    fn device(name: &str) -> LoadError {
        LoadError::Device { device: name.into(), reason: "it is broken".into() }
    }

    /// Loads on `auto` where the GPUs answer with these errors, and says how many were asked.
    fn auto(errors: Vec<LoadError>) -> (Result<String, LoadError>, usize) {
        let mut config = published("2b4t").unwrap();
        (config.layers, config.vocabulary, config.hidden, config.ffn) = (1, 32, 64, 64);
        (config.heads.query, config.heads.kv, config.heads.dim) = (2, 1, 32);
        let source = SyntheticModel::new(config, 1).unwrap();
        let reserve = Reserve {
            context: 32,
            sequences: 1,
            step_tokens: 8,
            kv_pages: 1,
            kv_type: KvType::F16,
        };
        let asked = std::cell::Cell::new(0);
        let candidates = errors.into_iter().map(|error| Candidate {
            name: "a GPU".into(),
            load: Box::new(|_: &mut Job<'_>| {
                asked.set(asked.get() + 1);
                Err(error)
            }),
        });
        let options = DeviceOptions { threads: Some(1), ..DeviceOptions::default() };
        let progress = &mut |_, _| ();
        let mut job = Job { options: &options, source: &source, reserve, progress };
        let result = first_that_loads(&mut job, candidates.collect());
        (result.map(|executor| executor.device().name.clone()), asked.get())
    }

    #[test]
    fn auto_takes_the_next_where_a_device_fails() {
        assert_eq!(auto(vec![]).0.unwrap(), "cpu");
        let (loaded, asked) = auto(vec![device("wgpu:0"), device("wgpu:1")]);
        assert_eq!((loaded.unwrap().as_str(), asked), ("cpu", 2));
    }

    #[test]
    fn auto_stops_where_the_files_are_at_fault() {
        let files = LoadError::Option {
            option: "device".into(),
            expected: "a file".into(),
            found: "none".into(),
        };
        let (loaded, asked) = auto(vec![device("wgpu:0"), files, device("wgpu:1")]);
        assert!(matches!(loaded, Err(LoadError::Option { .. })));
        assert_eq!(asked, 2);
    }
}
