//! A GGUF file: metadata, tensors, and every weight read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trine::checkpoint::{Files, open_files};
use trine::tensor::SharedBytes;
use trine_fuzz::{check_message, let_caught_panics_pass};

fuzz_target!(init: let_caught_panics_pass(), |data: &[u8]| {
    let files = vec![("m.gguf".to_owned(), SharedBytes::new(data.to_vec()))];
    let result = open_files(Files::Memory { label: "folder".into(), files })
        .and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint));
    match result {
        Ok(checkpoint) => {
            serde_json::to_string(checkpoint.summary()).expect("a summary is plain data");
        }
        Err(error) => check_message(&error),
    }
});
