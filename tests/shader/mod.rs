//! What a shader must be so that every driver takes it, and how naga writes it for them.

use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants, spv};
use naga::common::wgsl::TryToWgsl;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{
    Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator,
};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess, Type, TypeInner};
use trine::backend::wgpu::{IMMEDIATE_BYTES, Kernel, STORAGE_BUFFERS, Variant, WORKGROUP_BYTES};

/// A kernel in the languages of the drivers.
pub(crate) struct Written {
    pub(crate) spirv: Vec<u32>,
    /// For Vulkan drivers without integer dot products.
    pub(crate) spirv_plain: Vec<u32>,
    pub(crate) msl: String,
    /// For shader model 6.4.
    pub(crate) hlsl: String,
}

/// A struct of immediates on the host: the type and name of each field, all of 4 bytes.
pub(crate) type Fields = Vec<(String, String)>;

fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// Parses and validates with nothing allowed but what the variant may use.
pub(crate) fn parse(source: &str, variant: Variant) -> Result<(Module, ModuleInfo), String> {
    let module =
        naga::front::wgsl::parse_str(source).map_err(|error| error.emit_to_string(source))?;
    let mut allowed = Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    allowed.set(Capabilities::SUBGROUP, variant.subgroups);
    allowed.set(Capabilities::SHADER_FLOAT16, variant.f16);
    let mut validator = Validator::new(ValidationFlags::all(), allowed);
    if variant.subgroups {
        // What DX12 has too: no barriers of subgroups.
        validator.subgroup_stages(ShaderStages::COMPUTE);
        validator.subgroup_operations(SubgroupOperationSet::all() - SubgroupOperationSet::BASIC);
    }
    let info = validator.validate(&module).map_err(|error| error.emit_to_string(source))?;
    Ok((module, info))
}

/// Checks a kernel and writes it in every language. An `Err` says what is wrong.
pub(crate) fn check(
    (module, info): &(Module, ModuleInfo),
    variant: Variant,
    kernel: &Kernel,
    host: &[Fields],
) -> Result<Written, String> {
    let constants: PipelineConstants = (kernel.constants.iter())
        .filter(|(name, _)| !name.is_empty())
        .map(|&(name, value)| (name.to_owned(), f64::from(value)))
        .collect();
    let entry = Some((ShaderStage::Compute, kernel.entry));
    let (module, info) = pipeline_constants::process_overrides(module, info, entry, &constants)
        .map_err(|error| text(&error))?;
    limits(&module, kernel, host)?;
    let dot = [
        spv::Capability::DotProductInputAllKHR,
        spv::Capability::DotProductInput4x8BitKHR,
        spv::Capability::DotProductInput4x8BitPackedKHR,
        spv::Capability::DotProductKHR,
    ];
    Ok(Written {
        spirv: write_spirv(&module, &info, variant, (1, 6), &dot)?,
        spirv_plain: write_spirv(&module, &info, variant, (1, 4), &[])?,
        msl: write_msl(&module, &info)?,
        hlsl: write_hlsl(&module, &info, hlsl::ShaderModel::V6_4)?,
    })
}

/// Workgroup size, bindings, immediates and workgroup memory of a module with one entry point.
fn limits(module: &Module, kernel: &Kernel, host: &[Fields]) -> Result<(), String> {
    let [entry] = &module.entry_points[..] else {
        return Err(format!("there is no entry point {}", kernel.entry));
    };
    if entry.workgroup_size != [256, 1, 1] {
        return Err(format!("the workgroup size is {:?}", entry.workgroup_size));
    }
    if kernel.access.len() > STORAGE_BUFFERS as usize {
        return Err(format!("{} storage buffers are bound", kernel.access.len()));
    }
    let size = |ty| module.types[ty].inner.size(module.to_ctx());
    let mut workgroup_bytes = 0;
    for (_, global) in module.global_variables.iter() {
        let name = global.name.as_deref().unwrap_or("");
        match global.space {
            AddressSpace::WorkGroup => workgroup_bytes += size(global.ty).next_multiple_of(16),
            AddressSpace::Immediate => immediates(module, &module.types[global.ty], host)?,
            AddressSpace::Storage { access } => {
                let binding = global.binding.as_ref().ok_or("a buffer without a binding")?;
                let bound = kernel.access.as_bytes().get(binding.binding as usize);
                let read_only = !access.contains(StorageAccess::STORE);
                let as_bound = bound == Some(if read_only { &b'r' } else { &b'w' });
                if binding.group != 0 || !as_bound {
                    return Err(format!("{name} is not bound as the host binds it"));
                }
            }
            AddressSpace::Handle | AddressSpace::Uniform => {
                return Err(format!("{name} is neither a buffer nor memory"));
            }
            _ => {}
        }
    }
    if workgroup_bytes > WORKGROUP_BYTES {
        return Err(format!("it takes {workgroup_bytes} bytes of workgroup memory"));
    }
    Ok(())
}

/// The struct of immediates is one of the host's, field by field, and small enough.
fn immediates(module: &Module, ty: &Type, host: &[Fields]) -> Result<(), String> {
    let TypeInner::Struct { members, span } = &ty.inner else {
        return Err("the immediates are no struct".into());
    };
    if *span > IMMEDIATE_BYTES {
        return Err(format!("there are {span} bytes of immediates"));
    }
    let mut fields = Fields::new();
    for (i, member) in members.iter().enumerate() {
        let name = member.name.clone().unwrap_or_default();
        let TypeInner::Scalar(scalar) = module.types[member.ty].inner else {
            return Err(format!("the immediate {name} is no number"));
        };
        // No gaps, as in a struct of C.
        if (scalar.width, member.offset) != (4, 4 * i as u32) {
            return Err(format!("the immediate {name} does not lie where the host puts it"));
        }
        fields.push((name, scalar.to_wgsl_for_diagnostics()));
    }
    if !host.contains(&fields) {
        return Err(format!("the host has no struct of these immediates: {fields:?}"));
    }
    Ok(())
}

const UNCHECKED: BoundsCheckPolicies = BoundsCheckPolicies {
    index: BoundsCheckPolicy::Unchecked,
    buffer: BoundsCheckPolicy::Unchecked,
    image_load: BoundsCheckPolicy::Unchecked,
    binding_array: BoundsCheckPolicy::Unchecked,
};

fn write_spirv(
    module: &Module,
    info: &ModuleInfo,
    variant: Variant,
    lang_version: (u8, u8),
    more: &[spv::Capability],
) -> Result<Vec<u32>, String> {
    use spv::Capability;
    let mut capabilities: Vec<_> = vec![Capability::Shader, Capability::Matrix];
    capabilities.extend(more);
    if variant.subgroups {
        capabilities.extend([
            Capability::GroupNonUniform,
            Capability::GroupNonUniformVote,
            Capability::GroupNonUniformArithmetic,
            Capability::GroupNonUniformBallot,
            Capability::GroupNonUniformShuffle,
            Capability::GroupNonUniformShuffleRelative,
        ]);
    }
    if variant.f16 {
        capabilities.push(Capability::Float16);
    }
    let options = spv::Options {
        lang_version,
        flags: spv::WriterFlags::empty(),
        capabilities: Some(capabilities.into_iter().collect()),
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        ..Default::default()
    };
    spv::write_vec(module, info, &options, None)
        .map_err(|error| format!("SPIR-V {lang_version:?}: {}", text(&error)))
}

fn write_msl(module: &Module, info: &ModuleInfo) -> Result<String, String> {
    let options = msl::Options {
        lang_version: (2, 4),
        bounds_check_policies: UNCHECKED,
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let (source, written) = msl::write_string(module, info, &options, &Default::default())
        .map_err(|error| format!("MSL: {}", text(&error)))?;
    match written.entry_point_names.into_iter().find_map(Result::err) {
        Some(error) => Err(format!("MSL: {}", text(&error))),
        None => Ok(source),
    }
}

pub(crate) fn write_hlsl(
    module: &Module,
    info: &ModuleInfo,
    shader_model: hlsl::ShaderModel,
) -> Result<String, String> {
    let options = hlsl::Options {
        shader_model,
        immediates_target: Some(hlsl::BindTarget::default()),
        zero_initialize_workgroup_memory: false,
        restrict_indexing: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let mut source = String::new();
    let whole = Default::default();
    let written = hlsl::Writer::new(&mut source, &options, &whole)
        .write(module, info, None)
        .map_err(|error| format!("HLSL {shader_model:?}: {}", text(&error)))?;
    match written.entry_point_names.into_iter().find_map(Result::err) {
        Some(error) => Err(format!("HLSL {shader_model:?}: {}", text(&error))),
        None => Ok(source),
    }
}

/// The operands of every instruction of a kind.
pub(crate) fn instructions(spirv: &[u32], opcode: u32) -> Vec<&[u32]> {
    let mut found = Vec::new();
    let mut rest = &spirv[5..];
    while let Some(&first) = rest.first() {
        let (instruction, after) = rest.split_at((first >> 16) as usize);
        if first & 0xffff == opcode {
            found.push(&instruction[1..]);
        }
        rest = after;
    }
    found
}

/// The structs `#[repr(C)]` of a file of the host.
pub(crate) fn host_structs(source: &str) -> Vec<Fields> {
    let bodies = source.split("#[repr(C)]").skip(1).filter_map(|rest| {
        let (_, body) = rest.split_once('{')?;
        Some(body.split_once('}')?.0)
    });
    bodies
        .map(|body| {
            (body.lines().map(str::trim))
                .filter(|line| !line.starts_with("//"))
                .filter_map(|line| line.trim_end_matches(',').split_once(": "))
                .map(|(name, ty)| {
                    let name = name.rsplit(' ').next().unwrap_or(name);
                    (name.to_owned(), ty.to_owned())
                })
                .collect()
        })
        .collect()
}
