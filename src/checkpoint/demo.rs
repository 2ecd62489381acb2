//! The demo model, which is part of the binary: a folder whose files are embedded.

use std::path::PathBuf;

use super::{Checkpoint, Files, open_files};
use crate::error::LoadError;
use crate::tensor::SharedBytes;

const FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../../models/demo/config.json")),
    ("generation_config.json", include_bytes!("../../models/demo/generation_config.json")),
    ("model.safetensors", include_bytes!("../../models/demo/model.safetensors")),
    ("tokenizer.json", include_bytes!("../../models/demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../models/demo/tokenizer_config.json")),
];

/// The files of the demo model.
pub fn files() -> Files {
    let files = FILES.iter().map(|&(name, bytes)| (name.to_owned(), SharedBytes::new(bytes)));
    Files::Memory { label: PathBuf::from("demo model"), files: files.collect() }
}

/// Opens the demo model.
pub fn open() -> Result<Checkpoint, LoadError> {
    open_files(files())
}
