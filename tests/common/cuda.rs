//! The CUDA backend on the GPU of this machine, or on the emulated driver that lets kernels run on a
//! CPU. Where `TRINE_REQUIRE_CUDA` is set, a test without either fails instead of passing it by.

use std::sync::OnceLock;

use trine::backend::cuda::{Cuda, CudaOptions, GpuInfo, choose, gpus};

/// The first GPU, if there is one.
pub(crate) fn gpu() -> Option<GpuInfo> {
    static GPU: OnceLock<Option<GpuInfo>> = OnceLock::new();
    let gpu = GPU.get_or_init(|| match gpus() {
        Ok(_) => Some(choose(0).unwrap_or_else(|error| panic!("{error}"))),
        Err(reason) => {
            assert!(std::env::var_os("TRINE_REQUIRE_CUDA").is_none(), "{reason}");
            None
        }
    });
    gpu.clone()
}

/// A backend on the first GPU.
pub(crate) fn open(options: CudaOptions) -> Option<Cuda> {
    let gpu = gpu()?;
    Some(Cuda::new(gpu, options).unwrap_or_else(|error| panic!("{error}")))
}

/// The backends that generic tests run on: as a model does, and op by op; of a GPU that a CPU
/// imitates only the first where `slow` ones are to be passed by.
pub(crate) fn backends(slow: bool) -> Vec<(&'static str, GpuInfo, CudaOptions)> {
    let Some(gpu) = gpu() else { return Vec::new() };
    let plain = CudaOptions::default().fused(false).replay(false).overlapped(false);
    let mut backends = vec![("cuda", gpu.clone(), CudaOptions::default())];
    if slow || !gpu.is_emulated() {
        backends.push(("cuda, op by op", gpu, plain));
    }
    backends
}
