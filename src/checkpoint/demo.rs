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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_and_can_chat() {
        let demo = open().unwrap_or_else(|e| panic!("{e}"));
        demo.verify().unwrap_or_else(|e| panic!("{e}"));
        assert!(demo.tokenizer().tokenizer_json.is_some());
        assert!(demo.tokenizer().chat_template.is_some());
        assert!(!demo.generation().eos_token_ids.is_empty());
        assert!(demo.summary().unused.is_empty(), "{:?}", demo.summary().unused);
    }
}
