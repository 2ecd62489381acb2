//! Kernels: what a compiled shader is made of, and the cache of those that are compiled.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use super::adapters::{Adapter, IMMEDIATE_BYTES};
use super::fault::sentence;
use super::gate_norm_quantize::activation_code;
use super::gpu::Variant;
use super::table::float_code;
use super::{lm_head, low_rank, packed, rope_append_kv, sample, ternary_matmul};
use crate::backend::ops::Activation;
use crate::backend::{FROM_LANE, KEY_BLOCK, MAX_LOGPROBS, NONE, PAGE_TOKENS};
use crate::tensor::FloatType;

/// Threads of every workgroup: what WebGPU promises, and a multiple of every subgroup size.
pub(super) const WORKGROUP: u32 = 256;

/// Rows of activations that a workgroup takes in the products for few rows, as compiled.
pub(super) const ROWS: [usize; 4] = [1, 2, 4, 8];

/// What the host and the shaders must agree on. Every shader starts with these numbers, so that
/// they are written down once.
const NUMBERS: [(&str, u32); 19] = [
    ("NONE", NONE),
    ("FROM_LANE", FROM_LANE),
    ("PAGE_TOKENS", PAGE_TOKENS as u32),
    ("KEY_BLOCK", KEY_BLOCK as u32),
    ("MAX_LOGPROBS", MAX_LOGPROBS as u32),
    ("WORKGROUP", WORKGROUP),
    ("MOST_ROWS", ROWS[ROWS.len() - 1] as u32),
    ("TERNARY_TILE", packed::TILE as u32),
    ("TILED", ternary_matmul::TILED as u32),
    ("HEAD_FEATURES", lm_head::FEATURES as u32),
    ("LOW_RANK_ROWS", low_rank::ROWS as u32),
    ("ROPE_HEADS", rope_append_kv::HEADS as u32),
    ("FUSED_DIM", rope_append_kv::FUSED_DIM as u32),
    ("SAMPLE_PIECE", sample::PIECE as u32),
    ("RELU2", activation_code(Activation::Relu2)),
    ("SILU", activation_code(Activation::Silu)),
    ("GELU_TANH", activation_code(Activation::GeluTanh)),
    ("FLOAT_F16", float_code(FloatType::F16)),
    ("FLOAT_F32", float_code(FloatType::F32)),
];

/// One way to compile a shader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Basename of the file in `shaders/`.
    pub file: &'static str,
    /// Entry point.
    pub entry: &'static str,
    /// What each binding is used for, in order: `r`ead, or read and `w`rite.
    pub access: &'static str,
    /// Values of its `override` constants, the rest of the array empty.
    pub constants: [(&'static str, u32); 4],
}

impl Kernel {
    /// The entry point `main` of a file.
    pub(super) const fn new(file: &'static str, access: &'static str) -> Self {
        Self { file, entry: "main", access, constants: [("", 0); 4] }
    }

    /// Another entry point.
    pub(super) const fn entry(mut self, entry: &'static str) -> Self {
        self.entry = entry;
        self
    }

    /// With an `override` constant set.
    pub(super) const fn with(mut self, name: &'static str, value: u32) -> Self {
        let mut i = 0;
        while !self.constants[i].0.is_empty() {
            i += 1;
        }
        self.constants[i] = (name, value);
        self
    }
}

/// The shaders, by basename.
const FILES: &[(&str, &str)] = &[
    ("embed", include_str!("../../../shaders/embed.wgsl")),
    ("gate_norm_quantize", include_str!("../../../shaders/gate_norm_quantize.wgsl")),
    ("lm_head", include_str!("../../../shaders/lm_head.wgsl")),
    ("low_rank", include_str!("../../../shaders/low_rank.wgsl")),
    ("paged_attention", include_str!("../../../shaders/paged_attention.wgsl")),
    ("paged_attention_combine", include_str!("../../../shaders/paged_attention_combine.wgsl")),
    ("rms_norm", include_str!("../../../shaders/rms_norm.wgsl")),
    ("rms_norm_quantize", include_str!("../../../shaders/rms_norm_quantize.wgsl")),
    ("rope_append_kv", include_str!("../../../shaders/rope_append_kv.wgsl")),
    ("sample", include_str!("../../../shaders/sample.wgsl")),
    ("sample_greedy", include_str!("../../../shaders/sample_greedy.wgsl")),
    ("sample_logprobs", include_str!("../../../shaders/sample_logprobs.wgsl")),
    ("score", include_str!("../../../shaders/score.wgsl")),
    ("ternary_matmul", include_str!("../../../shaders/ternary_matmul.wgsl")),
    ("ternary_matmul_fused", include_str!("../../../shaders/ternary_matmul_fused.wgsl")),
    ("ternary_matmul_tiled", include_str!("../../../shaders/ternary_matmul_tiled.wgsl")),
];

/// What shaders share, by the name in their `// uses:` line; two texts where there are variants:
/// without, and with.
const SHARED: &[(&str, [&str; 2])] = &[
    (
        "dot",
        [
            include_str!("../../../shaders/prelude/dot_plain.wgsl"),
            include_str!("../../../shaders/prelude/dot_packed.wgsl"),
        ],
    ),
    (
        "half",
        [
            include_str!("../../../shaders/prelude/half_plain.wgsl"),
            include_str!("../../../shaders/prelude/half_native.wgsl"),
        ],
    ),
    ("activation", [include_str!("../../../shaders/prelude/activation.wgsl"); 2]),
    ("exact", [include_str!("../../../shaders/prelude/exact.wgsl"); 2]),
    ("log_sum", [include_str!("../../../shaders/prelude/log_sum.wgsl"); 2]),
    ("norm", [include_str!("../../../shaders/prelude/norm.wgsl"); 2]),
    ("order", [include_str!("../../../shaders/prelude/order.wgsl"); 2]),
    ("random", [include_str!("../../../shaders/prelude/random.wgsl"); 2]),
    ("reduce", [include_str!("../../../shaders/prelude/reduce.wgsl"); 2]),
    ("rope", [include_str!("../../../shaders/prelude/rope.wgsl"); 2]),
    ("sample_row", [include_str!("../../../shaders/prelude/sample_row.wgsl"); 2]),
    ("select", [include_str!("../../../shaders/prelude/select.wgsl"); 2]),
    ("softmax", [include_str!("../../../shaders/prelude/softmax.wgsl"); 2]),
    ("ternary", [include_str!("../../../shaders/prelude/ternary.wgsl"); 2]),
];

const COMMON: &str = include_str!("../../../shaders/prelude/common.wgsl");
const THREAD: [&str; 2] = [
    include_str!("../../../shaders/prelude/thread_plain.wgsl"),
    include_str!("../../../shaders/prelude/thread_subgroup.wgsl"),
];

/// Basenames of all shaders.
pub fn shaders() -> impl Iterator<Item = &'static str> {
    FILES.iter().map(|(file, _)| *file)
}

/// Every kernel that is compiled from the shaders.
pub fn kernels() -> Vec<Kernel> {
    super::all_kernels()
}

/// The WGSL of a shader: the numbers of the host, what every shader has, what its `// uses:` line
/// names, in that order, and then itself. `None` if
/// there is no such shader.
pub fn shader_source(file: &str, variant: Variant) -> Option<String> {
    let own = FILES.iter().find(|(name, _)| *name == file)?.1;
    let uses = own.lines().find_map(|line| line.strip_prefix("// uses:")).unwrap_or("");
    let mut source = String::new();
    if variant.f16 && uses.contains("half") {
        source.push_str("enable f16;\n");
    }
    for (name, value) in NUMBERS {
        let _ = writeln!(source, "const {name} = {value}u;");
    }
    source.push_str(COMMON);
    source.push_str(THREAD[usize::from(variant.subgroups)]);
    for used in uses.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let with = match used {
            "dot" => variant.packed_dot,
            "half" => variant.f16,
            _ => false,
        };
        let (_, texts) = SHARED.iter().find(|(name, _)| *name == used)?;
        source.push_str(texts[usize::from(with)]);
    }
    source.push_str(own);
    Some(source)
}

/// A compiled kernel.
#[derive(Clone)]
pub(super) struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
}

/// All that is compiled for a device.
pub(super) struct Kernels {
    device: wgpu::Device,
    variant: Variant,
    cache: Option<(wgpu::PipelineCache, Option<PathBuf>)>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    modules: HashMap<&'static str, wgpu::ShaderModule>,
    layouts: HashMap<&'static str, (wgpu::BindGroupLayout, wgpu::PipelineLayout)>,
    pipelines: HashMap<Kernel, Pipeline>,
}

impl Kernels {
    pub(super) fn new(device: &wgpu::Device, adapter: &Adapter, variant: Variant) -> Self {
        let cache = device.features().contains(wgpu::Features::PIPELINE_CACHE).then(|| {
            let file = cache_file(adapter);
            let data = file.as_ref().and_then(|file| std::fs::read(file).ok());
            let descriptor = wgpu::PipelineCacheDescriptor {
                label: Some("trine"),
                data: data.as_deref(),
                fallback: true,
            };
            // SAFETY: the file has a name of this crate's and this adapter's own and holds what
            // `get_data` gave; wgpu and the driver check its header and ignore what is not theirs.
            (unsafe { device.create_pipeline_cache(&descriptor) }, file)
        });
        Self { device: device.clone(), variant, cache, state: Mutex::default() }
    }

    /// Compiles a kernel, or finds it compiled. An `Err` says what is wrong with it.
    pub(super) fn get(&self, kernel: &Kernel) -> Result<Pipeline, String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = state.pipelines.get(kernel) {
            return Ok(pipeline.clone());
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let pipeline = self.compile(&mut state, kernel);
        if let Some(error) = pollster::block_on(scope.pop()) {
            return Err(format!("compiling {}: {}", kernel.file, sentence(&error)));
        }
        state.pipelines.insert(*kernel, pipeline.clone());
        Ok(pipeline)
    }

    /// The layout of bind groups with this access.
    fn compile(&self, state: &mut State, kernel: &Kernel) -> Pipeline {
        let device = &self.device;
        let (layout, pipeline_layout) = state
            .layouts
            .entry(kernel.access)
            .or_insert_with(|| layouts(device, kernel.access))
            .clone();
        let module = state.modules.entry(kernel.file).or_insert_with(|| {
            let source = shader_source(kernel.file, self.variant).unwrap_or_default();
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(kernel.file),
                source: wgpu::ShaderSource::Wgsl(source.into()),
            };
            // SAFETY: indices are made of sizes that `Record` checked on the host, or come from
            // buffers and are compared with those sizes in the shader; every loop counts to a
            // bound; divisors are sizes, which are not zero.
            unsafe {
                let checks = wgpu::ShaderRuntimeChecks::unchecked();
                device.create_shader_module_trusted(descriptor, checks)
            }
        });
        let constants: Vec<(&str, f64)> = (kernel.constants.iter())
            .filter(|(name, _)| !name.is_empty())
            .map(|&(name, value)| (name, f64::from(value)))
            .collect();
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(kernel.file),
            layout: Some(&pipeline_layout),
            module,
            entry_point: Some(kernel.entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                // Every kernel writes its workgroup memory before it reads it.
                zero_initialize_workgroup_memory: false,
            },
            cache: self.cache.as_ref().map(|(cache, _)| cache),
        });
        Pipeline { pipeline, layout }
    }

    /// Compiles every kernel, and keeps the result on disk.
    pub(super) fn warm(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<(), String> {
        let kernels = super::all_kernels();
        for (done, kernel) in kernels.iter().enumerate() {
            progress(done, kernels.len());
            self.get(kernel)?;
        }
        progress(kernels.len(), kernels.len());
        self.save();
        Ok(())
    }

    /// Writes what was compiled to disk. A cache that cannot be written is only slower next time.
    fn save(&self) {
        let Some((cache, Some(file))) = &self.cache else { return };
        let Some(data) = cache.get_data() else { return };
        if std::fs::read(file).is_ok_and(|found| found == data) {
            return; // what is there already
        }
        let temporary = file.with_extension(format!("{}.tmp", std::process::id()));
        let written = file
            .parent()
            .map_or(Ok(()), std::fs::create_dir_all)
            .and_then(|()| std::fs::write(&temporary, data))
            .and_then(|()| std::fs::rename(&temporary, file));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&temporary);
            tracing::debug!("the pipeline cache {} cannot be written: {error}", file.display());
        }
    }
}

fn layouts(device: &wgpu::Device, access: &str) -> (wgpu::BindGroupLayout, wgpu::PipelineLayout) {
    let entries: Vec<_> = (access.bytes().enumerate())
        .map(|(binding, access)| wgpu::BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only: access == b'r' },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some(access),
        entries: &entries,
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(access),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: IMMEDIATE_BYTES,
    });
    (layout, pipeline_layout)
}

/// Where compiled kernels of an adapter are kept: in `TRINE_CACHE_DIR`, else where the system keeps
/// caches.
fn cache_file(adapter: &Adapter) -> Option<PathBuf> {
    let mut name = wgpu::util::pipeline_cache_key(&adapter.info)?;
    let _ = write!(name, "_{}", env!("CARGO_PKG_VERSION"));
    let of = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty());
    let directory = of("TRINE_CACHE_DIR")
        .map(PathBuf::from)
        .or_else(|| of("XDG_CACHE_HOME").map(|home| PathBuf::from(home).join("trine")))
        .or_else(|| of("LOCALAPPDATA").map(|home| PathBuf::from(home).join("trine")))
        .or_else(|| of("HOME").map(|home| PathBuf::from(home).join(".cache").join("trine")))?;
    Some(directory.join(name))
}
