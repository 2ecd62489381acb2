//! A GGUF file: metadata, tensors, every weight read, and the tokenizer built.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trine::checkpoint::{Files, open_files};
use trine::tensor::SharedBytes;
use trine::text::Special;
use trine_fuzz::{check_message, let_caught_panics_pass};

fuzz_target!(init: let_caught_panics_pass(), |data: &[u8]| {
    let files = vec![("m.gguf".to_owned(), SharedBytes::new(data.to_vec()))];
    let result = open_files(Files::Memory { label: "folder".into(), files })
        .and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint));
    match result {
        Ok(checkpoint) => {
            serde_json::to_string(checkpoint.summary()).expect("a summary is plain data");
            match checkpoint.tokenizer().tokenizer() {
                Ok(Some(tokenizer)) => match tokenizer.encode(" a<s>\u{e9}", Special::MARKUP) {
                    Ok(ids) => drop(tokenizer.decode(&ids, false)),
                    Err(error) => check_message(&error),
                },
                Ok(None) => {}
                Err(error) => check_message(&error),
            }
        }
        Err(error) => check_message(&error),
    }
});
