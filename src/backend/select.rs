//! Names of devices: what a user may ask for, and what is there.

use std::fmt;
use std::str::FromStr;

use super::cpu::Cpu;
use crate::error::LoadError;

/// A device as a user names it: `auto`, `cpu`, `cuda[:N]`, `wgpu[:N|NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DeviceName {
    /// CUDA, else a discrete, then an integrated GPU through wgpu, else the CPU.
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
pub const NO_CUDA: &str =
    "the CUDA backend is not part of this version yet; use --device cpu or --device auto";

/// Why this build has no wgpu devices.
pub const NO_WGPU: &str =
    "the wgpu backend is not part of this version yet; use --device cpu or --device auto";

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
}

/// What is there on this machine, and what is not and why.
pub fn devices() -> Vec<DeviceStatus> {
    let absent = |name: &str, reason: &str| DeviceStatus {
        name: name.into(),
        state: Err(reason.into()),
        memory: None,
    };
    let cpu = match Cpu::new(Default::default()) {
        Ok(cpu) => {
            let info = super::Backend::info(&cpu).clone();
            DeviceStatus { name: info.name, state: Ok(info.description), memory: info.memory }
        }
        Err(error) => absent("cpu", &error.to_string()),
    };
    vec![absent("cuda", NO_CUDA), absent("wgpu", NO_WGPU), cpu]
}
