//! What turns steps into answers: pages of the KV cache, sampling options, and [`Session`], which
//! serves one caller.

pub mod pages;
pub mod sampling;
pub mod score;
pub mod session;

pub use sampling::SamplingParams;
pub use session::Session;
