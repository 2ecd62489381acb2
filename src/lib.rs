//! Trine runs BitNet b1.58 language models: weights of −1, 0 and +1, int8 activations.
//!
//! ```
//! # #[cfg(feature = "cli")]
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use trine::engine::{LoadedModel, ModelFiles, ModelOptions, ModelSource, SamplingParams};
//!
//! // The demo model that is part of the crate; `LoadedModel::open(path, ..)` for one on disk.
//! let files = ModelFiles::open(&ModelSource::Demo)?;
//! let mut model = LoadedModel::load(files, &ModelOptions::default(), &mut |_, _| {})?;
//!
//! let params = SamplingParams { max_tokens: Some(16), seed: Some(1), ..model.defaults() };
//! let mut answer = String::new();
//! for event in model.generate_text("Shall I compare thee", &params)? {
//!     answer += event?.text(); // a piece at a time, as it is generated
//! }
//! assert!(!answer.is_empty());
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "cli"))]
//! # fn main() {}
//! ```
//!
//! # Modules
//!
//! | module | what it knows |
//! |---|---|
//! | [`engine`] | requests and answers: sessions, sampling, scoring, text streams |
//! | [`checkpoint`] | files: Hugging Face folders, the embedded demo, synthetic models |
//! | [`text`] | tokenizers and chat templates |
//! | [`model`] | a layer, and everything a model needs on a device |
//! | [`backend`] | devices: the seam, its ops, the reference, the CPU, GPUs through CUDA and wgpu |
//! | [`ternary`], [`tensor`] | weights on the host |
//! | [`error`] | the three errors, each a sentence |
//!
//! The op level is public too: open a [`backend::cpu::Cpu`], pack a [`ternary::TernaryTensor`],
//! quantise, multiply, without any model; `examples/ternary_matmul.rs` does it.
//!
//! # Features
//!
//! | feature | default | what it adds |
//! |---|---|---|
//! | `cli` | yes | the `trine` program and the embedded demo model |
//! | `cuda` | yes | NVIDIA GPUs through CUDA; needs nothing but the driver |
//! | `wgpu` | yes | GPUs through Vulkan, Metal and DX12 |
//! | `nvrtc` | no | CUDA kernels compiled when a GPU is opened, where that is asked for; needs libnvrtc there |
//!
//! Library users turn the default off (`default-features = false`) and take what they want.

pub mod backend;
mod caught;
pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod model;
pub mod tensor;
pub mod ternary;
pub mod text;

/// Compiles the examples of README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
