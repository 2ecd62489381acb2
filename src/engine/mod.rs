//! What turns steps into answers: pages of the KV cache, sampling options, and [`Session`], which
//! serves one caller. [`LoadedModel`] is the way in for a program that wants text.

pub mod embed;
pub mod files;
pub mod open;
pub mod pages;
pub mod sampling;
pub mod score;
pub mod session;
pub mod text_stream;

pub use embed::Pooling;
pub use files::{ModelFiles, ModelSource};
pub use open::{LoadedModel, ModelOptions};
pub use sampling::SamplingParams;
pub use session::Session;
pub use text_stream::{TextEvent, TextStream};
