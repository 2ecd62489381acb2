//! Trine runs BitNet b1.58 language models.

pub mod backend;
pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod model;
pub mod tensor;
pub mod ternary;
pub mod text;
