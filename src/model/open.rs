//! The one match on devices: a model's weights and a device's name to an executor.

use super::activations::Reserve;
use super::executor::{Executor, StepExecutor};
use super::weights::WeightSource;
use crate::backend::Backend;
use crate::backend::check::Checked;
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::backend::select::{DeviceName, NO_CUDA, NO_WGPU};
use crate::error::LoadError;

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
}

/// Loads a model on a device. `progress` hears how many of how many matrices are packed.
///
/// A device that is named is used, or refused with the reason; `auto` takes the first that there
/// is, which in this version is the CPU.
pub fn open(
    options: &DeviceOptions,
    source: &dyn WeightSource,
    reserve: Reserve,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn StepExecutor>, LoadError> {
    let refuse = |reason: &str| {
        Err(LoadError::Device { device: options.device.to_string(), reason: reason.into() })
    };
    match options.device {
        DeviceName::Auto | DeviceName::Cpu => {
            let cpu = Cpu::new(CpuOptions { threads: options.threads, ..CpuOptions::default() })?;
            load(cpu, options, source, reserve, progress)
        }
        DeviceName::Cuda(_) => refuse(NO_CUDA),
        DeviceName::Wgpu(_) => refuse(NO_WGPU),
    }
}

fn load<B: Backend>(
    backend: B,
    options: &DeviceOptions,
    source: &dyn WeightSource,
    reserve: Reserve,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Box<dyn StepExecutor>, LoadError> {
    Ok(if options.check {
        Box::new(Executor::load(Checked::new(backend), source, reserve, progress)?)
    } else {
        Box::new(Executor::load(backend, source, reserve, progress)?)
    })
}
