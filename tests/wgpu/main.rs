//! The ops of the wgpu backend: what is its own, besides what every backend is asked (`ops`, `seam`,
//! `ragged`, `checked`), on every adapter. `wgpu_model` and `wgpu_pieces` are programs of their own: a
//! software adapter that runs a long prompt for one test and 143 MB for another has been lost.
//! So are `wgpu_faults` and `wgpu_cache`, which spoil a device or a folder.
#![cfg(feature = "wgpu")]

#[path = "../common/mod.rs"]
mod common;

mod attention;
mod fuse;
mod sample;
