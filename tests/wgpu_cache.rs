//! The cache of compiled kernels: written by `Gpu::warm`, and never the cause of an error. Each case
//! is a process of its own, since the folder is told by the environment.
#![cfg(feature = "wgpu")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::ops::rms_norm;
use common::wgpu::adapters;
use trine::backend::ops::Epilogue;
use trine::backend::wgpu::{Adapter, Gpu, GpuOptions, Wgpu, WgpuOptions};

/// Set in the process that is started for a case.
const CHILD: &str = "TRINE_TEST_CHILD";
/// What it is to do: compile every kernel on every adapter, on one of them, or use some on all.
const WARM: &str = "warm";
const WARM_ONE: &str = "warm one";
const USE: &str = "use";

#[test]
fn in_a_process_of_its_own() {
    let Ok(what) = std::env::var(CHILD) else { return };
    // Compiling everything takes long: where one adapter tells enough, it is the first that caches.
    let mut adapters = adapters();
    if what == WARM_ONE {
        adapters.retain(caches);
        adapters.truncate(1);
    }
    for adapter in adapters {
        let gpu = Gpu::of(adapter, GpuOptions::default()).expect("it opens");
        if what == USE {
            let mut wgpu = Wgpu::new(&gpu, WgpuOptions::default());
            rms_norm(&mut wgpu, &[0.5; 5 * 64], 64, None, 0, Epilogue::Store);
            continue;
        }
        let mut heard = Vec::new();
        gpu.warm(&mut |done, all| heard.push((done, all))).expect("every kernel compiles");
        let all = heard.len() - 1;
        assert_eq!(heard, (0..=all).map(|done| (done, all)).collect::<Vec<_>>());
    }
}

/// Whether the driver keeps what it compiled.
fn caches(adapter: &Adapter) -> bool {
    adapter.features().contains(wgpu::Features::PIPELINE_CACHE)
}

/// Runs what is asked for with this folder for caches.
fn run(what: &str, folder: &Path) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "in_a_process_of_its_own", "--nocapture"])
        .env("TRINE_CACHE_DIR", folder)
        .env(CHILD, what)
        .output()
        .expect("it starts");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {log}", folder.display());
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    let mut files: Vec<_> = entries.map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    files
}

#[test]
fn caches_are_kept_and_bad_ones_are_ignored() {
    let caching = adapters().iter().filter(|adapter| caches(adapter)).count();
    let folder = tempfile::tempdir().expect("a folder");
    // The folder is made where it is missing.
    let caches = folder.path().join("caches");
    run(WARM, &caches);
    if caching == 0 {
        return; // No driver here keeps anything.
    }
    let written = files(&caches);
    assert_eq!(written.len(), caching, "{written:?}");
    let read = |file: &PathBuf| std::fs::read(file).expect("it is read");
    let good: Vec<Vec<u8>> = written.iter().map(read).collect();
    // wgpu's header, and something of the driver's behind it, if only a header.
    assert!(good.iter().all(|data| data.len() > 64));

    // Cut short, empty, and something else altogether.
    type Spoil = fn(&[u8]) -> Vec<u8>;
    let spoils: [Spoil; 3] =
        [|good| good[..good.len() / 2].to_vec(), |_| vec![], |_| vec![0xa5; 5000]];
    for spoil in spoils {
        for (file, good) in written.iter().zip(&good) {
            std::fs::write(file, spoil(good)).expect("it is written");
        }
        run(USE, &caches);
    }
    run(WARM_ONE, &caches);
    assert_eq!(files(&caches), written, "nothing is left beside the caches");
    let mended = written.iter().filter(|file| read(file) != [0xa5; 5000]).count();
    assert_eq!(mended, 1, "the cache that was compiled anew is written anew");

    // A folder that nobody can make, not even root: its parent is a file.
    let file = folder.path().join("file");
    std::fs::write(&file, "in the way").expect("it is written");
    run(WARM_ONE, &file.join("caches"));
    assert_eq!(std::fs::read(&file).expect("it is read"), b"in the way");
}
