//! The compiled kernels are those that the host launches: names, blocks, arguments, files.

use std::collections::BTreeSet;
use std::path::Path;

use trine::backend::cuda::{Kernel, all_kernels, ptx};

/// What a PTX file says of a kernel: its name, threads of a block, bytes of its one argument.
fn entries(ptx: &str) -> Vec<(String, u32, usize)> {
    let parse = |entry: &str| {
        let name = entry.split('(').next()?.trim().to_owned();
        let of_argument = entry.split(&format!("{name}_param_0[")).nth(1)?;
        let bytes = of_argument.split(']').next()?.parse().ok()?;
        let threads = entry.split(".maxntid").nth(1)?.split(',').next()?.trim().parse().ok()?;
        Some((name, threads, bytes))
    };
    let parsed = ptx.split(".entry ").skip(1).map(|entry| {
        parse(entry).unwrap_or_else(|| panic!("a kernel that is not understood: {entry:.300}"))
    });
    parsed.collect()
}

#[test]
fn the_host_says_of_each_kernel_what_was_compiled() {
    for kernel in all_kernels() {
        let Kernel { file, name, threads, args, .. } = kernel;
        let ptx = ptx(file).unwrap_or_else(|| panic!("{file} is not among the artefacts"));
        let found = entries(ptx).into_iter().find(|entry| entry.0 == name);
        assert_eq!(found, Some((name.to_owned(), threads, args)), "{file}");
    }
}

#[test]
fn every_kernel_that_was_compiled_is_launched_by_someone() {
    let launched: BTreeSet<String> =
        all_kernels().iter().map(|kernel| kernel.name.to_owned()).collect();
    let files: BTreeSet<&str> = all_kernels().iter().map(|kernel| kernel.file).collect();
    let compiled: BTreeSet<String> =
        files.iter().flat_map(|file| entries(ptx(file).unwrap())).map(|entry| entry.0).collect();
    assert_eq!(launched, compiled);
}

#[test]
fn every_source_is_an_artefact() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    for entry in std::fs::read_dir(folder).expect("the kernels") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let file = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
            assert!(ptx(file).is_some(), "{file} is not in the list of artefacts");
        }
    }
}

/// NVRTC, or the reason why these tests have nothing to do. `.ci/cuda` sets what requires it.
#[cfg(feature = "nvrtc")]
fn nvrtc() -> Option<trine::backend::cuda::compile::Nvrtc> {
    match trine::backend::cuda::compile::Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(reason) => {
            assert!(std::env::var_os("TRINE_REQUIRE_NVRTC").is_none(), "{reason}");
            eprintln!("passed by: {reason}");
            None
        }
    }
}

#[cfg(feature = "nvrtc")]
#[test]
fn compiling_now_gives_what_was_compiled_ahead() {
    let Some(nvrtc) = nvrtc() else { return };
    // Not all: each takes a second or more, and `tools/build_kernels.py --check` has them all.
    for file in ["embed", "rms_norm_quantize", "score"] {
        let source = trine::backend::cuda::source(file).expect("a source");
        let ahead = ptx(file).expect("an artefact");
        let now = nvrtc.ptx(file, source, "compute_80").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(now.lines().collect::<Vec<_>>(), ahead.lines().collect::<Vec<_>>(), "{file}");
    }
}

#[cfg(feature = "nvrtc")]
#[test]
fn what_cannot_be_compiled_is_a_sentence() {
    let Some(nvrtc) = nvrtc() else { return };
    let error =
        nvrtc.ptx("wrong", "#include \"prelude.cuh\"\nint x = y;", "sm_80").expect_err("wrong");
    assert!(
        error.contains("cannot compile wrong.cu for sm_80: NVRTC_ERROR_COMPILATION"),
        "{error}"
    );
    assert!(error.contains("wrong.cu(2): error: identifier \"y\" is undefined"), "{error}");
    let error = nvrtc.ptx("embed", "", "sm_1").expect_err("no such architecture");
    assert!(error.contains("for sm_1: "), "{error}");
}

/// An answer of a model whose kernels were all compiled when the GPU was opened.
#[cfg(feature = "nvrtc")]
#[test]
fn kernels_compiled_now_give_the_same_answer() {
    use crate::common::cuda::open;
    use crate::common::model::{roomy, small_model};
    use crate::common::run::{generate, session};
    use crate::common::workload::greedy;
    use trine::backend::cuda::CudaOptions;

    if nvrtc().is_none() || crate::common::cuda::gpu().is_none() {
        return;
    }
    let model = small_model();
    let answer = |compile| {
        let cuda = open(CudaOptions::default().compile(compile)).expect("opens");
        generate(&mut session(cuda, &model, roomy()), &[1, 2, 3], &greedy(4)).expect("an answer")
    };
    assert_eq!(answer(true), answer(false));
}

#[cfg(not(feature = "nvrtc"))]
#[test]
fn compiling_now_is_refused_where_it_is_not_built_in() {
    use trine::backend::cuda::{Cuda, CudaOptions};

    let Some(gpu) = crate::common::cuda::gpu() else { return };
    let Err(error) = Cuda::new(gpu, CudaOptions::default().compile(true)) else {
        panic!("it compiled")
    };
    assert!(error.to_string().contains("built without the feature nvrtc"), "{error}");
}
