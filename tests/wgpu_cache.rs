//! The cache of compiled kernels: written by `Gpu::warm`, and never the cause of an error. Each case
//! is a process of its own, since the folder is told by the environment.
#![cfg(feature = "wgpu")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::wgpu::adapters;
use trine::backend::wgpu::{Gpu, GpuOptions};

/// Set in the process that is started for a case.
const CHILD: &str = "TRINE_TEST_CHILD";

#[test]
fn in_a_process_of_its_own() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    for adapter in adapters() {
        let gpu = Gpu::of(adapter, GpuOptions::default()).expect("it opens");
        let mut heard = Vec::new();
        gpu.warm(&mut |done, all| heard.push((done, all))).expect("every kernel compiles");
        let all = heard.len() - 1;
        assert_eq!(heard, (0..=all).map(|done| (done, all)).collect::<Vec<_>>());
    }
}

/// Compiles every kernel on every adapter with this folder for caches.
fn warm(folder: &Path) {
    let output = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "in_a_process_of_its_own", "--nocapture"])
        .env("TRINE_CACHE_DIR", folder)
        .env(CHILD, "1")
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
    let caching = adapters()
        .iter()
        .filter(|adapter| adapter.features().contains(wgpu::Features::PIPELINE_CACHE))
        .count();
    let folder = tempfile::tempdir().expect("a folder");
    // The folder is made where it is missing.
    let caches = folder.path().join("caches");
    warm(&caches);
    if caching == 0 {
        return; // No driver here keeps anything.
    }
    let written = files(&caches);
    assert_eq!(written.len(), caching, "{written:?}");
    let read = |file: &PathBuf| std::fs::read(file).expect("it is read");
    let good: Vec<Vec<u8>> = written.iter().map(read).collect();
    assert!(good.iter().all(|data| data.len() > 100));

    // Cut short, and something else altogether.
    for (i, file) in written.iter().enumerate() {
        let data = if i.is_multiple_of(2) { &good[i][..good[i].len() / 2] } else { b"garbage" };
        std::fs::write(file, data).expect("it is written");
    }
    warm(&caches);
    assert_eq!(files(&caches), written, "nothing is left beside the caches");
    for (file, good) in written.iter().zip(&good) {
        assert!(read(file).len() > good.len() / 2 + 7, "{} is not mended", file.display());
    }
    for (i, file) in written.iter().enumerate() {
        let data: &[u8] = if i.is_multiple_of(2) { &[] } else { &[0xff; 5000] };
        std::fs::write(file, data).expect("it is written");
    }
    warm(&caches);
    assert_eq!(files(&caches), written, "nothing is left beside the caches");

    // A folder that nobody can make, not even root: its parent is a file.
    let file = folder.path().join("file");
    std::fs::write(&file, "in the way").expect("it is written");
    warm(&file.join("caches"));
    assert_eq!(std::fs::read(&file).expect("it is read"), b"in the way");
}
