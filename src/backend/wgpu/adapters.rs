//! The GPUs that wgpu finds, in the order in which they are numbered, and which of them is meant.

use std::sync::OnceLock;

use crate::error::LoadError;

/// Storage buffers that a kernel may bind; WebGPU promises 8, and wgpu gives 10 on small adapters.
pub const STORAGE_BUFFERS: u32 = 10;

/// Bytes of workgroup memory that kernels use at most, which is what WebGPU promises.
pub const WORKGROUP_BYTES: u32 = 16 << 10;

/// Bytes of immediates that a kernel takes at most.
pub const IMMEDIATE_BYTES: u32 = 96;

/// A GPU as wgpu sees it: what a user may choose from.
#[derive(Clone)]
pub struct Adapter {
    pub(super) raw: wgpu::Adapter,
    pub(super) info: wgpu::AdapterInfo,
    number: usize,
}

fn instance() -> &'static wgpu::Instance {
    // One for the process: loading and unloading Vulkan drivers again and again is slow, and some
    // drivers do not survive it.
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::PRIMARY;
        wgpu::Instance::new(descriptor)
    })
}

/// All adapters: discrete GPUs first, then integrated ones, virtual ones, and what runs on the CPU.
/// A GPU that several APIs offer is there once for each.
pub fn adapters() -> Vec<Adapter> {
    let mut found = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::PRIMARY));
    found.sort_by_key(|adapter| rank(adapter.get_info().device_type));
    (found.into_iter().enumerate())
        .map(|(number, raw)| Adapter { info: raw.get_info(), raw, number })
        .collect()
}

fn rank(kind: wgpu::DeviceType) -> u8 {
    match kind {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// The adapter that a user means by a number or a part of a name; the first one if nothing is said.
pub fn choose(which: Option<&str>) -> Result<Adapter, LoadError> {
    let found = adapters();
    let refuse = |reason: String| {
        let device = which.map_or("wgpu".into(), |which| format!("wgpu:{which}"));
        LoadError::Device { device, reason }
    };
    if found.is_empty() {
        return Err(refuse(
            "no Vulkan, Metal or DX12 driver answered; install one for this GPU, or use --device cpu"
                .into(),
        ));
    }
    let names = || {
        let of = |adapter: &Adapter| format!("{} ({})", adapter.name(), adapter.info.name);
        found.iter().map(of).collect::<Vec<_>>().join(", ")
    };
    let Some(which) = which else { return Ok(found[0].clone()) };
    let named = || {
        let which = which.to_lowercase();
        found.iter().find(|adapter| adapter.info.name.to_lowercase().contains(&which))
    };
    // A number that is no adapter's may be a part of a name: 4090.
    let by_number = which.parse::<usize>().ok().and_then(|number| found.get(number));
    let chosen = by_number.or_else(named);
    chosen.cloned().ok_or_else(|| refuse(format!("there is no such adapter, only {}", names())))
}

impl Adapter {
    /// How a user names it: `wgpu:0`.
    pub fn name(&self) -> String {
        format!("wgpu:{}", self.number)
    }

    /// What it is: `NVIDIA H100, discrete GPU, Vulkan, driver 570.1`.
    pub fn description(&self) -> String {
        let driver = self.driver().unwrap_or_else(|| "unknown".into());
        format!("{}, {}, {}, driver {driver}", self.info.name, self.kind(), self.api())
    }

    /// `discrete GPU`, `integrated GPU`, `virtual GPU`, `software` or `unknown kind`.
    pub fn kind(&self) -> &'static str {
        match self.info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete GPU",
            wgpu::DeviceType::IntegratedGpu => "integrated GPU",
            wgpu::DeviceType::VirtualGpu => "virtual GPU",
            wgpu::DeviceType::Cpu => "software",
            wgpu::DeviceType::Other => "unknown kind",
        }
    }

    /// Whether it runs on the CPU; such an adapter is used only when it is named.
    pub fn is_software(&self) -> bool {
        self.info.device_type == wgpu::DeviceType::Cpu
    }

    /// Whether `auto` may choose it: a GPU that is known to be one.
    pub fn is_hardware(&self) -> bool {
        matches!(
            self.info.device_type,
            wgpu::DeviceType::DiscreteGpu
                | wgpu::DeviceType::IntegratedGpu
                | wgpu::DeviceType::VirtualGpu
        )
    }

    /// The API through which it is reached: `Vulkan`, `Metal`, `DX12`.
    pub fn api(&self) -> &'static str {
        backend_name(self.info.backend)
    }

    /// The driver, its version included, where it says so.
    pub fn driver(&self) -> Option<String> {
        let wgpu::AdapterInfo { driver, driver_info, .. } = &self.info;
        let parts = [driver.as_str(), driver_info.as_str()].into_iter();
        let driver = parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
        Some(driver).filter(|driver| !driver.is_empty())
    }

    /// What wgpu knows of it.
    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    /// Its limits.
    pub fn limits(&self) -> wgpu::Limits {
        self.raw.limits()
    }

    /// Its features.
    pub fn features(&self) -> wgpu::Features {
        self.raw.features()
    }

    /// What the kernels need and this adapter lacks, if anything.
    pub fn lacks(&self) -> Option<String> {
        let limits = self.limits();
        let immediates = self.features().contains(wgpu::Features::IMMEDIATES);
        let have = [
            (limits.max_storage_buffers_per_shader_stage, STORAGE_BUFFERS, "storage buffers"),
            (limits.max_compute_workgroup_storage_size, WORKGROUP_BYTES, "bytes of shared memory"),
            (limits.max_compute_invocations_per_workgroup, 256, "invocations per workgroup"),
            (if immediates { limits.max_immediate_size } else { 0 }, IMMEDIATE_BYTES, "immediates"),
        ];
        let lack = have.into_iter().find(|(have, need, _)| have < need)?;
        Some(format!("it has {} {}, and the kernels need {}", lack.0, lack.2, lack.1))
    }

    /// Whether `dot4I8Packed` is, or may become, an instruction of this device.
    ///
    /// Vulkan says so. Metal has no such instruction, and gets products of packed bytes that its
    /// compiler knows how to treat. DX12 would need shader model 6.4 and with it the compiler DXC;
    /// wgpu takes FXC, and writes plain products.
    pub fn packed_dot(&self) -> bool {
        #[cfg(not(target_vendor = "apple"))]
        {
            const VULKAN_1_3: u32 = 1 << 22 | 3 << 12;
            // SAFETY: only asked for its properties, while the guard lives.
            let Some(vulkan) = (unsafe { self.raw.as_hal::<wgpu::hal::api::Vulkan>() }) else {
                return false;
            };
            let capabilities = vulkan.physical_device_capabilities();
            capabilities.properties().api_version >= VULKAN_1_3
                || capabilities.supports_extension(c"VK_KHR_shader_integer_dot_product")
        }
        #[cfg(target_vendor = "apple")]
        true
    }

    /// Bytes of the memory that is the device's own, where the driver says so.
    pub fn memory(&self) -> Option<u64> {
        #[cfg(not(target_vendor = "apple"))]
        {
            // SAFETY: the handles are only asked for their properties, while the guard lives.
            let vulkan = unsafe { self.raw.as_hal::<wgpu::hal::api::Vulkan>() }?;
            // SAFETY: the physical device belongs to this instance.
            let properties = unsafe {
                let instance = vulkan.shared_instance().raw_instance();
                instance.get_physical_device_memory_properties(vulkan.raw_physical_device())
            };
            // VK_MEMORY_HEAP_DEVICE_LOCAL_BIT is bit 0.
            let heaps = &properties.memory_heaps[..properties.memory_heap_count as usize];
            heaps.iter().filter(|heap| heap.flags.as_raw() & 1 != 0).map(|heap| heap.size).max()
        }
        #[cfg(target_vendor = "apple")]
        None
    }
}

fn backend_name(backend: wgpu::Backend) -> &'static str {
    match backend {
        wgpu::Backend::Vulkan => "Vulkan",
        wgpu::Backend::Metal => "Metal",
        wgpu::Backend::Dx12 => "DX12",
        wgpu::Backend::Gl => "OpenGL",
        wgpu::Backend::BrowserWebGpu => "WebGPU",
        wgpu::Backend::Noop => "none",
    }
}
