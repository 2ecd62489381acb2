//! NVIDIA GPUs: what is there, and opening one.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::module::Modules;
use crate::error::LoadError;

/// The oldest driver that loads the compiled kernels: they were compiled by CUDA 12.4, and drivers
/// take binaries of every release with their own major number.
const OLDEST_DRIVER: i32 = 12_000;

/// The oldest GPU: kernels use asynchronous copies and int8 matrix products of Ampere.
const OLDEST: (i32, i32) = (8, 0);

/// What the device of the emulated driver calls itself.
const EMULATOR: &str = "CUDA emulator";

/// What an error of the driver means.
pub(super) fn sentence(error: DriverError) -> String {
    // Only called where the driver's library is loaded: these ask it for the names.
    let text = |text: Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "?".into(), |text| text.to_string_lossy().into_owned())
    };
    format!("{} ({})", text(error.error_string()), text(error.error_name()))
}

/// An NVIDIA GPU that the driver sees.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuInfo {
    /// Its number, as in `cuda:N`.
    pub ordinal: usize,
    /// What it calls itself.
    pub model: String,
    /// Compute capability: 9.0 is `(9, 0)`.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may ask for.
    pub shared_bytes: usize,
    /// The driver's CUDA version, as 12080 for 12.8.
    pub driver: i32,
}

impl GpuInfo {
    /// How a user names it.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// What it is, in a line.
    pub fn description(&self) -> String {
        let Self { model, capability: (major, minor), .. } = self;
        let driver = self.driver_version();
        format!("{model}, compute capability {major}.{minor}, driver for {driver}")
    }

    /// The newest CUDA that the driver knows, such as `CUDA 12.8`.
    pub fn driver_version(&self) -> String {
        format!("CUDA {}.{}", self.driver / 1000, self.driver % 1000 / 10)
    }

    /// Whether a CPU imitates it, which is how kernels are tested on a machine without a GPU: right,
    /// very slow, and never chosen unless it is named.
    pub fn is_emulated(&self) -> bool {
        self.model.starts_with(EMULATOR)
    }

    /// Why the kernels cannot run on it, if they cannot.
    pub fn lacks(&self) -> Option<String> {
        (self.capability < OLDEST).then(|| {
            let ((major, minor), oldest) = (self.capability, OLDEST);
            format!(
                "it has compute capability {major}.{minor}, and the kernels need {}.{} or newer",
                oldest.0, oldest.1
            )
        })
    }
}

/// The GPUs that the driver sees, or why there are none. Neither panics nor prints on a machine
/// without CUDA.
pub fn gpus() -> Result<Vec<GpuInfo>, String> {
    // SAFETY: it opens the driver's library, whose initialisers are trusted as the driver is.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver on this machine (no libcuda)".into());
    }
    // A stub of the library, or a driver from before CUDA 11, lacks functions; cudarc meets that
    // with a panic.
    crate::caught::caught(|| {
        result::init().map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_NO_DEVICE => "the NVIDIA driver sees no GPU".into(),
            _ => format!("the NVIDIA driver does not start: {}", sentence(error)),
        })?;
        let mut driver = 0;
        // SAFETY: the pointer is to a live integer.
        let version = unsafe { sys::cuDriverGetVersion(&mut driver) };
        version.result().map_err(sentence)?;
        if driver < OLDEST_DRIVER {
            return Err(format!(
                "the NVIDIA driver is for CUDA {}.{}, and the kernels need one for 12.0 or newer; \
                 update the driver",
                driver / 1000,
                driver % 1000 / 10
            ));
        }
        let count = result::device::get_count().map_err(sentence)?;
        let all: Result<Vec<_>, DriverError> =
            (0..count).map(|ordinal| info(ordinal, driver)).collect();
        all.map_err(sentence)
    })
    .unwrap_or_else(|_| Err("the NVIDIA driver lacks functions of CUDA 12; update it".into()))
}

fn info(ordinal: i32, driver: i32) -> Result<GpuInfo, DriverError> {
    use sys::CUdevice_attribute_enum as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device is one that the driver counts.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    Ok(GpuInfo {
        ordinal: ordinal as usize,
        model: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }? as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
        driver,
    })
}

/// The GPU of this number, or why it cannot be used.
pub fn choose(ordinal: usize) -> Result<GpuInfo, LoadError> {
    let refuse = |reason| LoadError::Device { device: format!("cuda:{ordinal}"), reason };
    let gpus = gpus().map_err(refuse)?;
    let count = gpus.len();
    let Some(gpu) = gpus.into_iter().nth(ordinal) else {
        let there = match count {
            1 => "there is one GPU, cuda:0".into(),
            _ => format!("there are {count} GPUs, cuda:0 to cuda:{}", count.saturating_sub(1)),
        };
        return Err(refuse(there));
    };
    match gpu.lacks() {
        Some(lack) => Err(refuse(format!("{}: {lack}", gpu.model))),
        None => Ok(gpu),
    }
}

/// An opened GPU: its context, a stream of our own, and the kernels. Shared by all memory on it.
pub(super) struct Device {
    pub(super) info: GpuInfo,
    pub(super) stream: Arc<CudaStream>,
    pub(super) modules: Modules,
    /// The first fault. Whatever the driver reports while work runs is final for a context.
    fault: RefCell<Option<String>>,
}

impl Device {
    pub(super) fn open(info: GpuInfo, compile: bool) -> Result<Rc<Self>, LoadError> {
        let refuse = |reason| LoadError::Device { device: info.name(), reason };
        let opened = crate::caught::caught(|| {
            let context = CudaContext::new(info.ordinal).map_err(sentence)?;
            // SAFETY: all work goes through one stream, so there is nothing that events of
            // buffers would have to order; and they would break the capture of graphs.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream().map_err(sentence)?;
            let modules = Modules::load(&context, &info, compile)?;
            Ok((stream, modules))
        });
        let (stream, modules) = opened
            .unwrap_or_else(|_| Err("the driver lacks functions of CUDA 12; update it".into()))
            .map_err(refuse)?;
        Ok(Rc::new(Self { info, stream, modules, fault: RefCell::default() }))
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        self.stream.context()
    }

    /// The first fault, if there was one.
    pub(super) fn fault(&self) -> Option<String> {
        self.fault.borrow().clone()
    }

    /// Takes note that the device is of no use any more, and answers the reason.
    pub(super) fn lost(&self, reason: &str) -> String {
        self.fault.borrow_mut().get_or_insert_with(|| reason.into()).clone()
    }

    /// Runs calls of the driver on this device. A device that had a fault is not asked again.
    pub(super) fn call<R>(
        &self,
        calls: impl FnOnce() -> Result<R, DriverError>,
    ) -> Result<R, String> {
        if let Some(fault) = self.fault() {
            return Err(fault);
        }
        self.context().bind_to_thread().and_then(|()| calls()).map_err(|error| {
            let fault = sentence(error);
            self.fault.replace(Some(fault.clone()));
            fault
        })
    }

    /// Runs calls that may fail without harm, such as asking for memory.
    pub(super) fn try_call<R>(
        &self,
        calls: impl FnOnce() -> Result<R, DriverError>,
    ) -> Result<R, DriverError> {
        self.context().bind_to_thread()?;
        calls()
    }
}
