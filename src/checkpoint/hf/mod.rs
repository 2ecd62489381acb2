//! A folder as Hugging Face's tools write it.
//!
//! | module | what it reads |
//! |---|---|
//! | `form` | how checkpoints of each family are written: names in the config and of tensors |
//! | `config` | `config.json` |
//! | `weights`, `layouts` | tensors by role; packed and float ternary matrices |

pub(super) mod config;
pub(super) mod form;
mod layouts;
pub(super) mod weights;
