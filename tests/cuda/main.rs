//! The CUDA backend: what is its own, besides what every backend is asked (`ops`, `seam`, `ragged`,
//! `checked`). One program, because each test program costs seconds of compiling; `cuda_faults` is one
//! of its own, because a fault is its process's.
#![cfg(feature = "cuda")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../fixture/mod.rs"]
mod fixture;
#[path = "../fixture/lora.rs"]
mod lora;

mod attention;
mod head;
mod kernels;
mod matmul;
mod model;
mod sample;
mod screen;
