//! The wgpu backend: what is its own, besides what every backend is asked (`ops`, `seam`, `ragged`,
//! `checked`), on every adapter. `wgpu_faults` and `wgpu_cache` are programs of their own, because
//! they spoil a device or a folder.
#![cfg(feature = "wgpu")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../fixture/mod.rs"]
mod fixture;
#[path = "../fixture/lora.rs"]
mod lora;

mod attention;
mod fuse;
mod model;
mod pieces;
mod sample;
