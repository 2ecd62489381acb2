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
