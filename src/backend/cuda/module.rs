//! The compiled kernels: `kernels/<file>.cu`, compiled ahead by `tools/build_kernels.py`, loaded
//! into a context; or compiled now, where that is asked for.

use std::collections::HashMap;
use std::sync::Arc;
#[cfg(feature = "nvrtc")]
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, sys};
use cudarc::nvrtc::Ptx;

use super::device::{GpuInfo, sentence};
use super::launch::Kernel;

/// One file of kernels, compiled.
struct Artefact {
    file: &'static str,
    /// For any GPU from compute capability 8.0 on, compiled by the driver.
    ptx: &'static str,
    /// Machine code for compute capability 8.x.
    sm_80: &'static [u8],
    /// Machine code for compute capability 9.0.
    sm_90a: &'static [u8],
    /// What all of these were compiled from.
    #[cfg(feature = "nvrtc")]
    source: &'static str,
}

macro_rules! artefacts {
    ($($file:literal),* $(,)?) => {
        &[$(Artefact {
            file: $file,
            ptx: include_str!(concat!("../../../kernels/prebuilt/", $file, ".ptx")),
            sm_80: include_bytes!(concat!("../../../kernels/prebuilt/", $file, ".sm_80.cubin")),
            sm_90a: include_bytes!(concat!("../../../kernels/prebuilt/", $file, ".sm_90a.cubin")),
            #[cfg(feature = "nvrtc")]
            source: include_str!(concat!("../../../kernels/", $file, ".cu")),
        }),*]
    };
}

static ARTEFACTS: &[Artefact] = artefacts![
    "embed",
    "gate_norm_quantize",
    "lm_head",
    "lm_head_f32",
    "lm_head_quantize",
    "lm_head_rows",
    "low_rank",
    "paged_attention",
    "paged_attention_combine",
    "paged_attention_mma",
    "rms_norm",
    "rms_norm_quantize",
    "rope_append_kv",
    "sample",
    "sample_greedy",
    "scatter",
    "score",
    "ternary_matmul",
    "ternary_matmul_fused",
    "ternary_matmul_mma",
    "ternary_matmul_tiled",
];

impl Artefact {
    /// Machine code where there is some for this GPU, else, or where the driver refuses it, PTX
    /// that the driver compiles.
    fn load(&self, context: &Arc<CudaContext>, info: &GpuInfo) -> Result<Arc<CudaModule>, String> {
        let capability = info.capability;
        let binary = match capability {
            (8, _) => Some(self.sm_80),
            (9, 0) => Some(self.sm_90a),
            _ => None,
        };
        let refused = match binary.map(|code| context.load_module(Ptx::from_binary(code.to_vec())))
        {
            Some(Ok(module)) => return Ok(module),
            Some(Err(error)) => {
                tracing::warn!(
                    "{}: the driver refuses the machine code of the kernel {} ({}) and is given its \
                     PTX to compile",
                    info.name(),
                    self.file,
                    sentence(error)
                );
                format!("its machine code ({}) and ", sentence(error))
            }
            None => String::new(),
        };
        context.load_module(Ptx::from_src(self.ptx)).map_err(|error| {
            let (major, minor) = capability;
            format!(
                "the driver refuses {refused}the PTX of the kernel {} for compute capability \
                 {major}.{minor}: {}",
                self.file,
                sentence(error)
            )
        })
    }
}

/// The machine code of every artefact for one GPU, compiled now.
struct Compiled(Vec<Vec<u8>>);

impl Compiled {
    #[cfg(feature = "nvrtc")]
    fn new(info: &GpuInfo) -> Result<Self, String> {
        let nvrtc = super::compile::Nvrtc::find()?;
        let started = std::time::Instant::now();
        let next = AtomicUsize::new(0);
        // A thread compiles what no other has begun: the files differ much in length.
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(artefact) = ARTEFACTS.get(index) else { return Ok(done) };
                let code = nvrtc.machine_code(artefact.file, artefact.source, info.capability)?;
                done.push((index, code));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let parts: Result<Vec<Vec<_>>, String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let ended = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err("a thread that compiles has ended".into()))
            });
            ended.collect()
        });
        let mut all: Vec<(usize, Vec<u8>)> = parts?.into_iter().flatten().collect();
        all.sort_by_key(|(index, _)| *index);
        tracing::info!("{}: kernels compiled in {:.1?}", info.name(), started.elapsed());
        Ok(Self(all.into_iter().map(|(_, code)| code).collect()))
    }

    #[cfg(not(feature = "nvrtc"))]
    fn new(_info: &GpuInfo) -> Result<Self, String> {
        Err("this program was built without the feature nvrtc, which compiles kernels when a GPU is \
             opened"
            .into())
    }

    fn load(&self, index: usize, context: &Arc<CudaContext>) -> Result<Arc<CudaModule>, String> {
        context.load_module(Ptx::from_binary(self.0[index].clone())).map_err(|error| {
            let (file, error) = (ARTEFACTS[index].file, sentence(error));
            format!("the driver refuses the kernel {file}, which NVRTC compiled for it: {error}")
        })
    }
}

/// The source of a file of kernels, for tests that compile it.
#[cfg(feature = "nvrtc")]
pub fn source(file: &str) -> Option<&'static str> {
    ARTEFACTS.iter().find(|artefact| artefact.file == file).map(|artefact| artefact.source)
}

/// The PTX of a file of kernels, for tests that compare it with what the host says of them.
pub fn ptx(file: &str) -> Option<&'static str> {
    ARTEFACTS.iter().find(|artefact| artefact.file == file).map(|artefact| artefact.ptx)
}

/// Kernels that are loaded, by name.
pub(super) struct Modules {
    functions: HashMap<&'static str, CudaFunction>,
}

impl Modules {
    /// Loads all kernels into a context: those of this crate, or with `compile` what NVRTC makes of
    /// their sources for this GPU.
    pub(super) fn load(
        context: &Arc<CudaContext>,
        info: &GpuInfo,
        compile: bool,
    ) -> Result<Self, String> {
        let compiled = compile.then(|| Compiled::new(info)).transpose()?;
        let mut functions = HashMap::new();
        let kernels = super::all_kernels();
        for (index, artefact) in ARTEFACTS.iter().enumerate() {
            let module = match &compiled {
                Some(compiled) => compiled.load(index, context)?,
                None => artefact.load(context, info)?,
            };
            for kernel in kernels.iter().filter(|kernel| kernel.file == artefact.file) {
                let function = module.load_function(kernel.name).map_err(|error| {
                    format!("the kernel {} is not in its module: {}", kernel.name, sentence(error))
                })?;
                if kernel.shared > 0 {
                    allow_shared(&function, kernel.shared, info.shared_bytes).map_err(|error| {
                        let (name, error) = (kernel.name, sentence(error));
                        format!("the kernel {name} cannot have its shared memory: {error}")
                    })?;
                }
                functions.insert(kernel.name, function);
            }
        }
        Ok(Self { functions })
    }

    pub(super) fn function(&self, kernel: &Kernel) -> Option<&CudaFunction> {
        self.functions.get(kernel.name)
    }
}

/// Lets a kernel have `bytes` of dynamic shared memory, or what a block may have of it at most.
fn allow_shared(function: &CudaFunction, bytes: usize, most: usize) -> Result<(), DriverError> {
    use sys::CUfunction_attribute_enum as Attribute;
    let fixed = function.get_attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)? as usize;
    let bytes = bytes.min(most.saturating_sub(fixed)) as i32;
    function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes)
}
