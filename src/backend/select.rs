//! Names of devices: what a user may ask for, and what is there.

use std::fmt;
use std::str::FromStr;

use super::cpu::Cpu;
use crate::error::LoadError;

/// A device as a user names it: `auto`, `cpu`, `cuda[:N]`, `wgpu[:N|NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DeviceName {
    /// The first that can run the model: CUDA, a discrete, an integrated, a virtual GPU through
    /// wgpu, the CPU. A software adapter is never chosen.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by number.
    Cuda(usize),
    /// A GPU through wgpu, by number or by part of its name; the first one if absent.
    Wgpu(Option<String>),
}

impl FromStr for DeviceName {
    type Err = LoadError;

    fn from_str(name: &str) -> Result<Self, LoadError> {
        let (kind, which) = match name.split_once(':') {
            Some((kind, which)) => (kind, Some(which)),
            None => (name, None),
        };
        let device = match (kind, which) {
            ("auto", None) => Some(Self::Auto),
            ("cpu", None) => Some(Self::Cpu),
            ("cuda", None) => Some(Self::Cuda(0)),
            ("cuda", Some(number)) => number.parse().ok().map(Self::Cuda),
            ("wgpu", None) => Some(Self::Wgpu(None)),
            ("wgpu", Some(which)) if !which.is_empty() => Some(Self::Wgpu(Some(which.into()))),
            _ => None,
        };
        device.ok_or_else(|| LoadError::Option {
            option: "device".into(),
            expected: "auto, cpu, cuda, cuda:N, wgpu, wgpu:N or wgpu:NAME".into(),
            found: format!("{name:?}"),
        })
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(which)) => write!(f, "wgpu:{which}"),
        }
    }
}

/// Why this build has no CUDA devices.
#[cfg(not(feature = "cuda"))]
pub const NO_CUDA: &str = "this program was built without the CUDA backend; rebuild it with \
                           --features cuda, or use --device cpu or --device auto";

/// Why this build has no wgpu devices.
#[cfg(not(feature = "wgpu"))]
pub const NO_WGPU: &str = "this program was built without the wgpu backend; rebuild it with \
                           --features wgpu, or use --device cpu or --device auto";

/// One line of `trine devices`.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DeviceStatus {
    /// How to name it.
    pub name: String,
    /// What it is, or why it cannot be used.
    pub state: Result<String, String>,
    /// Bytes of memory that a model may use, where that is known.
    pub memory: Option<u64>,
    /// What is known of it as a GPU, if it is one.
    pub gpu: Option<GpuDetails>,
}

/// What decides how kernels run on a GPU, and whether a model fits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuDetails {
    /// What it calls itself.
    pub model: String,
    /// `NVIDIA GPU`; through wgpu `discrete GPU`, `integrated GPU`, `virtual GPU`, `software` or
    /// `unknown kind`.
    pub kind: &'static str,
    /// `CUDA`, `Vulkan`, `Metal` or `DX12`.
    pub api: &'static str,
    /// The driver and its version.
    pub driver: Option<String>,
    /// Whether a CPU imitates it; such a device is used only when it is named.
    pub software: bool,
    /// The least and the most threads of a subgroup; `None` without subgroups.
    pub subgroup_sizes: Option<[u32; 2]>,
    /// Whether kernels may use the type f16.
    pub f16: bool,
    /// Whether the device itself multiplies packed int8, where that is known.
    pub packed_dot: bool,
    /// Bytes that a kernel may see in one piece.
    pub binding_bytes: u64,
    /// Bytes of the largest piece of memory.
    pub buffer_bytes: u64,
    /// Bytes of memory that a workgroup shares.
    pub workgroup_bytes: u32,
    /// Pieces of memory that a kernel may see, where that is bounded.
    pub storage_buffers: Option<u32>,
}

/// What is there on this machine, and what is not and why.
pub fn devices() -> Vec<DeviceStatus> {
    let absent = |name: &str, reason: &str| DeviceStatus {
        name: name.into(),
        state: Err(reason.into()),
        memory: None,
        gpu: None,
    };
    let cpu = match Cpu::new(Default::default()) {
        Ok(cpu) => {
            let info = super::Backend::info(&cpu).clone();
            let (name, state) = (info.name, Ok(info.description));
            DeviceStatus { name, state, memory: info.memory, gpu: None }
        }
        Err(error) => absent("cpu", &error.to_string()),
    };
    #[cfg(feature = "cuda")]
    let cuda = cuda_devices();
    #[cfg(not(feature = "cuda"))]
    let cuda = vec![absent("cuda", NO_CUDA)];
    #[cfg(feature = "wgpu")]
    let wgpu = wgpu_devices();
    #[cfg(not(feature = "wgpu"))]
    let wgpu = vec![absent("wgpu", NO_WGPU)];
    [cuda, wgpu, vec![cpu]].concat()
}

#[cfg(feature = "cuda")]
fn cuda_devices() -> Vec<DeviceStatus> {
    let status = |gpu: &super::cuda::GpuInfo| DeviceStatus {
        name: gpu.name(),
        state: match gpu.lacks() {
            Some(lack) => Err(format!("{}: {lack}", gpu.description())),
            None => Ok(gpu.description()),
        },
        memory: Some(gpu.memory),
        gpu: Some(GpuDetails {
            model: gpu.model.clone(),
            kind: if gpu.is_emulated() { "software" } else { "NVIDIA GPU" },
            api: "CUDA",
            driver: Some(gpu.driver_version()),
            software: gpu.is_emulated(),
            subgroup_sizes: Some([32, 32]),
            f16: true,
            packed_dot: true,
            binding_bytes: gpu.memory,
            buffer_bytes: gpu.memory,
            workgroup_bytes: gpu.shared_bytes as u32,
            storage_buffers: None,
        }),
    };
    match super::cuda::gpus() {
        Ok(gpus) => gpus.iter().map(status).collect(),
        Err(reason) => {
            vec![DeviceStatus { name: "cuda".into(), state: Err(reason), memory: None, gpu: None }]
        }
    }
}

#[cfg(feature = "wgpu")]
fn wgpu_devices() -> Vec<DeviceStatus> {
    use super::wgpu::{Adapter, adapters, choose};

    let status = |adapter: &Adapter| {
        let (features, limits) = (adapter.features(), adapter.limits());
        let has = |feature| features.contains(feature);
        let info = adapter.info();
        let description = adapter.description();
        DeviceStatus {
            name: adapter.name(),
            state: match adapter.lacks() {
                Some(lack) => Err(format!("{description}: {lack}")),
                None => Ok(description),
            },
            memory: adapter.memory(),
            gpu: Some(GpuDetails {
                model: info.name.clone(),
                kind: adapter.kind(),
                api: adapter.api(),
                driver: adapter.driver(),
                software: adapter.is_software(),
                subgroup_sizes: has(::wgpu::Features::SUBGROUP)
                    .then_some([info.subgroup_min_size, info.subgroup_max_size]),
                f16: has(::wgpu::Features::SHADER_F16),
                packed_dot: adapter.packed_dot(),
                binding_bytes: limits.max_storage_buffer_binding_size,
                buffer_bytes: limits.max_buffer_size,
                workgroup_bytes: limits.max_compute_workgroup_storage_size,
                storage_buffers: Some(limits.max_storage_buffers_per_shader_stage),
            }),
        }
    };
    let mut devices: Vec<DeviceStatus> = adapters().iter().map(status).collect();
    if devices.is_empty() {
        let reason = choose(None).err().map(|error| match error {
            LoadError::Device { reason, .. } => reason,
            other => other.to_string(),
        });
        let state = Err(reason.unwrap_or_default());
        devices.push(DeviceStatus { name: "wgpu".into(), state, memory: None, gpu: None });
    }
    devices
}
