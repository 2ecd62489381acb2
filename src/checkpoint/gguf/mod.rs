//! A GGUF file, as llama.cpp's and bitnet.cpp's tools write it.
//!
//! | module | what it reads |
//! |---|---|
//! | `container`, `metadata`, `types` | header, typed values, tensors |
//! | `config` | hyper-parameters by `general.architecture` |
//! | `weights`, `layouts` | tensors by role; I2_S, TQ1_0, TQ2_0, ternary floats |
//! | `table`, `dequantize` | embedding tables and heads; quantised ones to f16 |
//! | `tokenizer` | the tokenizer, the special tokens and the chat template |

pub(super) mod config;
mod container;
mod dequantize;
pub(super) mod layouts;
pub(super) mod metadata;
mod table;
pub(super) mod tokenizer;
mod types;
pub(super) mod weights;

pub(super) use container::Gguf;

/// The tensor of the embedding table, whose rows are counted where no key says how many there are.
const EMBEDDING: &str = "token_embd.weight";
