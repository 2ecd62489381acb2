//! Every shader in every variant, without a driver: naga parses and validates it and writes it for
//! Vulkan, Metal and DX12; it stays within what the backend asks of a device; and what stands in
//! both Rust and WGSL is the same.
#![cfg(feature = "wgpu")]

mod shader;

use naga::back::hlsl::ShaderModel;
use shader::{Fields, check, host_structs, instructions, parse, write_hlsl};
use trine::backend::wgpu::{Kernel, Variant, kernels, shader_source, shaders};

const OP_CAPABILITY: u32 = 17;
const OP_S_DOT: u32 = 4450;
const DOT_PRODUCT_INPUT_4X8_BIT_PACKED: u32 = 6018;

fn variants() -> impl Iterator<Item = Variant> {
    (0..8).map(|bits| Variant {
        subgroups: bits & 1 != 0,
        packed_dot: bits & 2 != 0,
        f16: bits & 4 != 0,
    })
}

const PLAIN: Variant = Variant { subgroups: false, packed_dot: false, f16: false };

/// The kernels of a shader.
fn kernels_of(file: &str) -> Vec<Kernel> {
    kernels().into_iter().filter(|kernel| kernel.file == file).collect()
}

/// The structs of immediates in the host's file for a shader: of the same name, or of the first
/// words of it.
fn host_of(file: &str) -> Vec<Fields> {
    let mut name = file;
    loop {
        let path = format!("src/backend/wgpu/{name}.rs");
        if let Ok(source) = std::fs::read_to_string(path) {
            return host_structs(&source);
        }
        name = name.rsplit_once('_').unwrap_or_else(|| panic!("{file} has no file in Rust")).0;
    }
}

#[test]
fn every_driver_gets_every_kernel() {
    let mut compiled = 0;
    for file in shaders() {
        let kernels = kernels_of(file);
        let host = host_of(file);
        for variant in variants() {
            let source = shader_source(file, variant).expect("it has a source");
            let parsed = parse(&source, variant)
                .unwrap_or_else(|error| panic!("{file}, {variant:?}: {error}"));
            for entry in &parsed.0.entry_points {
                let used = kernels.iter().any(|kernel| kernel.entry == entry.name);
                assert!(used, "{file}: nothing runs {}", entry.name);
            }
            for kernel in &kernels {
                let written = check(&parsed, variant, kernel, &host)
                    .unwrap_or_else(|error| panic!("{kernel:?}, {variant:?}: {error}"));
                assert!(written.msl.contains("kernel void"), "{kernel:?}, {variant:?}");
                compiled += 1;
            }
        }
    }
    assert_eq!(compiled, 8 * kernels().len(), "every kernel is of a shader that is listed");
}

/// Packed dot products are instructions where a driver has them, and only in their variants.
#[test]
fn packed_dot_products_are_native() {
    let mut multiplying = 0;
    for file in shaders() {
        for variant in variants() {
            let source = shader_source(file, variant).expect("it has a source");
            let multiplies = source.contains("fn dot4(");
            let parsed = parse(&source, variant).expect("it is valid");
            for kernel in kernels_of(file) {
                let written = check(&parsed, variant, &kernel, &host_of(file)).expect("valid");
                let expected = multiplies && variant.packed_dot;
                let dots = !instructions(&written.spirv, OP_S_DOT).is_empty();
                let capable = instructions(&written.spirv, OP_CAPABILITY)
                    .contains(&&[DOT_PRODUCT_INPUT_4X8_BIT_PACKED][..]);
                let added = written.hlsl.contains("dot4add_i8packed(");
                assert_eq!([dots, capable, added], [expected; 3], "{kernel:?}, {variant:?}");
                let polyfilled = instructions(&written.spirv_plain, OP_S_DOT).is_empty();
                assert!(polyfilled, "{kernel:?}: a driver without dot products gets one");
                multiplying += usize::from(multiplies);
            }
        }
    }
    assert!(multiplying > 0);
}

/// FXC, which wgpu takes on DX12 unless told otherwise, knows shader model 5.1.
#[test]
fn an_old_compiler_of_dx12_gets_every_shader() {
    for file in shaders() {
        for variant in [PLAIN, Variant { packed_dot: true, ..PLAIN }] {
            let source = shader_source(file, variant).expect("it has a source");
            let (module, info) = parse(&source, variant).expect("it is valid");
            for kernel in kernels_of(file) {
                let constants = (kernel.constants.iter())
                    .filter(|(name, _)| !name.is_empty())
                    .map(|&(name, value)| (name.to_owned(), f64::from(value)))
                    .collect();
                let (module, info) = naga::back::pipeline_constants::process_overrides(
                    &module, &info, None, &constants,
                )
                .expect("the constants fit");
                let hlsl = write_hlsl(&module, &info, ShaderModel::V5_1)
                    .unwrap_or_else(|error| panic!("{kernel:?}, {variant:?}: {error}"));
                assert!(!hlsl.contains("dot4add"), "{file}: shader model 5.1 has no dot4add");
            }
        }
    }
}

/// The probe is no kernel of a model, and runs before the variant is known.
#[test]
fn the_probe_of_subgroups_is_valid() {
    let source = include_str!("../shaders/probe_subgroups.wgsl");
    let variant = Variant { subgroups: true, ..PLAIN };
    let parsed = parse(source, variant).expect("it is valid");
    let kernel = Kernel {
        file: "probe_subgroups",
        entry: "main",
        access: "w",
        constants: [("WORKGROUP", 256), ("", 0), ("", 0), ("", 0)],
    };
    check(&parsed, variant, &kernel, &[]).expect("it is within the limits");
    assert!(parse(source, PLAIN).is_err());
}

/// The numbers that shaders share with the host are written down on the host alone.
#[test]
fn shaders_write_down_no_number_of_the_host() {
    let source = shader_source("embed", PLAIN).expect("there is one");
    let shared: Vec<&str> = (source.lines())
        .take_while(|line| line.starts_with("const "))
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    assert!(shared.contains(&"NONE") && shared.contains(&"TILE"), "{shared:?}");
    for folder in ["shaders", "shaders/prelude"] {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("a file").path();
            let Ok(text) = std::fs::read_to_string(&path) else { continue };
            for name in &shared {
                let again = [format!("const {name} "), format!("const {name}:")];
                let own = again.iter().any(|again| text.contains(again.as_str()));
                assert!(!own, "{} defines {name}", path.display());
            }
        }
    }
}

/// A shader that is right, and what makes it wrong: each check can fail.
#[test]
fn planted_faults_are_found() {
    const RIGHT: &str = "
        struct Params { rows: u32, eps: f32 }
        var<immediate> p: Params;
        override SIZE: u32 = 16u;
        @group(0) @binding(0) var<storage, read> input: array<u32>;
        @group(0) @binding(1) var<storage, read_write> output: array<u32>;
        var<workgroup> shared_words: array<u32, SIZE>;
        @compute @workgroup_size(256)
        fn main(@builtin(local_invocation_index) index: u32) {
            shared_words[index % SIZE] = input[index] + p.rows;
            workgroupBarrier();
            output[index] = shared_words[0];
        }";
    let host = [vec![("rows".to_owned(), "u32".to_owned()), ("eps".to_owned(), "f32".to_owned())]];
    let kernel = Kernel {
        file: "planted",
        entry: "main",
        access: "rw",
        constants: [("SIZE", 4096), ("", 0), ("", 0), ("", 0)],
    };
    let run = |source: &str, kernel: Kernel, host: &[Fields]| {
        parse(source, PLAIN).and_then(|parsed| check(&parsed, PLAIN, &kernel, host).map(|_| ()))
    };
    run(RIGHT, kernel, &host).expect("nothing is wrong with it");

    let swap = |old: &str, new: &str| {
        assert!(RIGHT.contains(old), "{old}");
        run(&RIGHT.replace(old, new), kernel, &host).expect_err(new)
    };
    swap("output[index] =", "output[index] +");
    swap("input[index] + p.rows", "subgroupAdd(input[index])");
    swap("input[index] + p.rows", "u32(f16(input[index]))");
    assert!(swap("workgroup_size(256)", "workgroup_size(128)").contains("128"));
    assert!(swap("read_write> output", "read> output").contains("output"));
    assert!(swap("fn main", "fn other").contains("main"));
    assert!(swap("@binding(1)", "@binding(2)").contains("output"));
    assert!(swap("rows: u32,", "rows: i32,").contains("p.rows"));
    assert!(swap("eps: f32", "epsilon: f32").contains("epsilon"));
    assert!(swap("eps: f32", "eps: f32, more: array<u32, 40>").contains("168 bytes"));
    assert!(swap("eps: f32", "eps: vec4<u32>").contains("eps"));

    let with = |access, constants| run(RIGHT, Kernel { access, constants, ..kernel }, &host);
    let none = ("", 0);
    let large = with("rw", [("SIZE", 4100), none, none, none]).expect_err("too much memory");
    assert!(large.contains("16400 bytes"), "{large}");
    let unknown = with("rw", [("SIZES", 1), none, none, none]).expect_err("no such constant");
    assert!(unknown.contains("SIZES"), "{unknown}");
    let many = with("rwrrrrrrrrr", [none; 4]).expect_err("too many buffers");
    assert!(many.contains("11 storage buffers"), "{many}");
    with("ww", [none; 4]).expect_err("the host would bind it for writing");
}

#[test]
fn structs_of_the_host_are_read() {
    let source = "
        /// Numbers.
        #[repr(C)]
        #[derive(Clone, Copy, bytemuck::NoUninit)]
        struct Params {
            /// How many.
            rows: u32,
            pub(super) eps: f32,
        }
        struct Other { rows: u32 }";
    let field = |name: &str, ty: &str| (name.to_owned(), ty.to_owned());
    assert_eq!(host_structs(source), [vec![field("rows", "u32"), field("eps", "f32")]]);
    assert_eq!(host_of("ternary_matmul_tiled").len(), 2);
}
