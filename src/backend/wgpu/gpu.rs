//! An opened GPU: device, queue, and the kernels compiled for it. Shared by all that run on it.

use std::sync::{Arc, Mutex};

use super::adapters::{Adapter, IMMEDIATE_BYTES, choose};
use super::fault::Faults;
use super::kernel::Kernels;
use super::probe;
use crate::error::LoadError;

/// Which of the kernels' variants to use; what is absent is chosen by what the device can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GpuOptions {
    /// Reduce within subgroups before going through workgroup memory.
    pub subgroups: Option<bool>,
    /// Multiply with `dot4I8Packed`. Without a word, where [`Adapter::packed_dot`] says so; it
    /// works everywhere, since WGSL promises it, and is plain products where the device lacks it.
    pub packed_dot: Option<bool>,
    /// Convert half precision by the type `f16`.
    pub f16: Option<bool>,
    /// Bytes that a piece of a table or of a ternary matrix has at most, though the device may bind
    /// more: for tests, and for drivers whose limit cannot be trusted.
    pub binding_limit: Option<u64>,
}

impl GpuOptions {
    /// With or without subgroups.
    pub fn subgroups(mut self, subgroups: bool) -> Self {
        self.subgroups = Some(subgroups);
        self
    }
    /// With or without the packed dot product.
    pub fn packed_dot(mut self, packed_dot: bool) -> Self {
        self.packed_dot = Some(packed_dot);
        self
    }
    /// With or without the type `f16`.
    pub fn f16(mut self, f16: bool) -> Self {
        self.f16 = Some(f16);
        self
    }
    /// With pieces of at most this many bytes.
    pub fn binding_limit(mut self, bytes: u64) -> Self {
        self.binding_limit = Some(bytes);
        self
    }
}

/// The variants that a device's kernels are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    /// See [`GpuOptions::subgroups`].
    pub subgroups: bool,
    /// See [`GpuOptions::packed_dot`].
    pub packed_dot: bool,
    /// See [`GpuOptions::f16`].
    pub f16: bool,
}

/// An opened GPU. Clones share it.
#[derive(Clone)]
pub struct Gpu(pub(super) Arc<Inner>, pub(super) Dropped);

/// Numbers of buffers that are gone, for whoever keeps bind groups of them.
pub(super) type Dropped = Arc<Mutex<Vec<u64>>>;

pub(super) struct Inner {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) adapter: Adapter,
    pub(super) limits: wgpu::Limits,
    pub(super) variant: Variant,
    binding_limit: Option<u64>,
    /// Why subgroups are not used though the device has them.
    no_subgroups: Option<String>,
    pub(super) faults: Faults,
    pub(super) kernels: Kernels,
}

impl Gpu {
    /// Opens the adapter that `which` names (a number, a part of a name, or the first).
    pub fn open(which: Option<&str>, options: GpuOptions) -> Result<Self, LoadError> {
        Self::of(choose(which)?, options)
    }

    /// Opens an adapter.
    pub fn of(adapter: Adapter, options: GpuOptions) -> Result<Self, LoadError> {
        let refuse = |reason: String| LoadError::Device { device: adapter.name(), reason };
        if let Some(lack) = adapter.lacks() {
            return Err(refuse(format!("{}: {lack}", adapter.description())));
        }
        let has = |feature| adapter.features().contains(feature);
        let wanted = |option: Option<bool>, there: bool, what: &str| match option {
            Some(true) if !there => Err(refuse(format!("it has no {what}"))),
            Some(option) => Ok(option),
            None => Ok(there),
        };
        let mut variant = Variant {
            subgroups: wanted(options.subgroups, has(wgpu::Features::SUBGROUP), "subgroups")?,
            packed_dot: options.packed_dot.unwrap_or_else(|| adapter.packed_dot()),
            // Not by default: the plain form compiles to the same instruction, and Mesa 22.3 reads
            // a bitcast to two f16 as something else.
            f16: options.f16.unwrap_or(false)
                && wanted(options.f16, has(wgpu::Features::SHADER_F16), "type f16")?,
        };
        let mut features = wgpu::Features::IMMEDIATES;
        features.set(wgpu::Features::SUBGROUP, variant.subgroups);
        features.set(wgpu::Features::SHADER_F16, variant.f16);
        features.set(wgpu::Features::PIPELINE_CACHE, has(wgpu::Features::PIPELINE_CACHE));
        let limits = adapter.limits();
        let opened = pollster::block_on(adapter.raw.request_device(&wgpu::DeviceDescriptor {
            label: Some("trine"),
            required_features: features,
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        }));
        let (device, queue) = opened.map_err(|error| refuse(format!("cannot open it: {error}")))?;
        let faults = Faults::of(&device);
        let mut no_subgroups = None;
        if variant.subgroups
            && let Err(reason) = probe::subgroups_in_order(&device, &queue)
        {
            if let Some(fault) = faults.get() {
                return Err(refuse(fault));
            }
            if options.subgroups == Some(true) {
                return Err(refuse(format!("its subgroups cannot be used: {reason}")));
            }
            variant.subgroups = false;
            no_subgroups = Some(reason);
        }
        let kernels = Kernels::new(&device, &adapter, variant);
        // Whole vectors: some drivers say 2³¹ − 1, and sizes are rounded up to 16 bytes.
        let mut limits = limits;
        limits.max_storage_buffer_binding_size &= !15;
        limits.max_buffer_size &= !15;
        let binding_limit = options.binding_limit;
        let inner = Inner {
            device,
            queue,
            adapter,
            limits,
            variant,
            binding_limit,
            no_subgroups,
            faults,
            kernels,
        };
        Ok(Self(Arc::new(inner), Dropped::default()))
    }

    /// The same GPU with a list of dropped buffers of its own.
    pub(super) fn with_own_list(&self) -> Self {
        Self(Arc::clone(&self.0), Dropped::default())
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.0.adapter
    }

    /// The variants in use.
    pub fn variant(&self) -> Variant {
        self.0.variant
    }

    /// The limits in force.
    pub fn limits(&self) -> &wgpu::Limits {
        &self.0.limits
    }

    /// Bytes that a piece of a table or of a ternary matrix may have.
    pub(super) fn most_per_piece(&self) -> u64 {
        let most = self.0.limits.max_storage_buffer_binding_size.min(self.0.limits.max_buffer_size);
        self.0.binding_limit.map_or(most, |limit| most.min(limit))
    }

    /// wgpu's device, for whoever shares it. Destroying it fails all that runs on it.
    pub fn device(&self) -> &wgpu::Device {
        &self.0.device
    }

    /// Compiles every kernel that a model may need; `progress` hears how many of how many are done.
    /// What is compiled is kept on disk where the driver supports it.
    pub fn warm(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<(), LoadError> {
        self.0
            .kernels
            .warm(progress)
            .map_err(|error| LoadError::Device { device: self.adapter().name(), reason: error })
    }

    /// What it is, with the variants of the kernels.
    pub fn description(&self) -> String {
        let Variant { subgroups, packed_dot, f16 } = self.0.variant;
        let mut description = self.adapter().description();
        for (used, name) in [(subgroups, "subgroups"), (packed_dot, "packed dot"), (f16, "f16")] {
            if used {
                description.push_str(", ");
                description.push_str(name);
            }
        }
        if let Some(reason) = &self.0.no_subgroups {
            description.push_str(", no subgroups since ");
            description.push_str(reason);
        }
        description
    }
}

const _: () = assert!(IMMEDIATE_BYTES.is_multiple_of(4));
