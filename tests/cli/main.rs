//! The program from outside: its streams, its exit codes, its sentences.

mod bench;
mod chat;
mod convert;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "wgpu")]
mod devices;
mod embed;
mod gguf;
mod lora;
mod refusals;
mod run;
mod scoring;
mod text;
