//! The compiled kernels: `kernels/<file>.cu`, compiled ahead by `tools/build_kernels.py`, loaded
//! into a context.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaFunction, DriverError, sys};
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
}

macro_rules! artefacts {
    ($($file:literal),* $(,)?) => {
        &[$(Artefact {
            file: $file,
            ptx: include_str!(concat!("../../../kernels/prebuilt/", $file, ".ptx")),
            sm_80: include_bytes!(concat!("../../../kernels/prebuilt/", $file, ".sm_80.cubin")),
            sm_90a: include_bytes!(concat!("../../../kernels/prebuilt/", $file, ".sm_90a.cubin")),
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

/// The PTX of a file of kernels, for tests that compare it with what the host says of them.
pub fn ptx(file: &str) -> Option<&'static str> {
    ARTEFACTS.iter().find(|artefact| artefact.file == file).map(|artefact| artefact.ptx)
}

/// Kernels that are loaded, by name.
pub(super) struct Modules {
    functions: HashMap<&'static str, CudaFunction>,
}

impl Modules {
    /// Loads all kernels into a context: machine code where there is some for this GPU, else, or
    /// where the driver refuses it, PTX that the driver compiles.
    pub(super) fn load(context: &Arc<CudaContext>, info: &GpuInfo) -> Result<Self, String> {
        let capability = info.capability;
        let mut functions = HashMap::new();
        let kernels = super::all_kernels();
        for artefact in ARTEFACTS {
            let binary = match capability {
                (8, _) => Some(artefact.sm_80),
                (9, 0) => Some(artefact.sm_90a),
                _ => None,
            };
            let of_binary =
                binary.map(|binary| context.load_module(Ptx::from_binary(binary.to_vec())));
            if let Some(Err(error)) = &of_binary {
                tracing::warn!(
                    "{}: the driver refuses the machine code of the kernel {} ({}) and is given its \
                     PTX to compile",
                    info.name(),
                    artefact.file,
                    sentence(*error)
                );
            }
            let module = match of_binary {
                Some(Ok(module)) => module,
                _ => context.load_module(Ptx::from_src(artefact.ptx)).map_err(|error| {
                    let (major, minor) = capability;
                    let binary = match of_binary {
                        Some(Err(error)) => format!("its machine code ({}) and ", sentence(error)),
                        _ => String::new(),
                    };
                    format!(
                        "the driver refuses {binary}the PTX of the kernel {} for compute \
                         capability {major}.{minor}: {}",
                        artefact.file,
                        sentence(error)
                    )
                })?,
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
