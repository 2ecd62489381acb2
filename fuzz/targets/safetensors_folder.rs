//! A folder as Hugging Face's tools write it: config, weights in one file or shards, sampling.
//!
//! An input is a list of files. A line `%%FILE name` begins one that is taken as it stands. After
//! a line `%%TENSORS name` come a header's JSON on one line and the data; the eight bytes of the
//! header's length are put before it here, so that a mutation which changes the length of a header
//! still is one that the reader gets to parse.
#![no_main]

use libfuzzer_sys::fuzz_target;
use trine::checkpoint::{Files, open_files};
use trine::tensor::SharedBytes;
use trine_fuzz::{check_message, let_caught_panics_pass};

fuzz_target!(init: let_caught_panics_pass(), |data: &[u8]| {
    let files = files(data);
    let result = open_files(Files::Memory { label: "folder".into(), files })
        .and_then(|checkpoint| checkpoint.verify().map(|()| checkpoint));
    match result {
        Ok(checkpoint) => {
            // What is accepted can be described and read in full.
            serde_json::to_string(checkpoint.summary()).expect("a summary is plain data");
        }
        Err(error) => check_message(&error),
    }
});

fn files(data: &[u8]) -> Vec<(String, SharedBytes)> {
    let mut files = Vec::new();
    let mut rest = data;
    while let Some(start) = find(rest, b"%%") {
        let head = &rest[start + 2..];
        let Some(line) = head.iter().position(|&byte| byte == b'\n') else { break };
        let (head, body) = (String::from_utf8_lossy(&head[..line]), &head[line + 1..]);
        let end = find(body, b"\n%%").unwrap_or(body.len());
        let (body, after) = body.split_at(end);
        rest = after;
        match head.split_once(' ') {
            Some(("FILE", name)) => files.push((name.into(), SharedBytes::new(body.to_vec()))),
            Some(("TENSORS", name)) => {
                let line = body.iter().position(|&byte| byte == b'\n').unwrap_or(body.len());
                let (header, data) = body.split_at(line);
                let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
                bytes.extend_from_slice(header);
                bytes.extend_from_slice(data.get(1..).unwrap_or(&[]));
                files.push((name.into(), SharedBytes::new(bytes)));
            }
            _ => {}
        }
    }
    files
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}
