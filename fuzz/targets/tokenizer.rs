//! A `tokenizer.json`, then a text after a byte 0xFF.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use trine::text::{Special, Tokenizer, TokenizerOptions};
use trine_fuzz::{check_message, halves, let_caught_panics_pass};

fuzz_target!(init: let_caught_panics_pass(), |data: &[u8]| {
    let (json, text) = halves(data);
    let options = TokenizerOptions {
        bos_token: text.starts_with(b"<s>").then(|| "<s>".to_owned()),
        ..TokenizerOptions::default()
    };
    let tokenizer = match Tokenizer::from_json_with(Path::new("tokenizer.json"), json, &options) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return check_message(&error),
    };
    let text = String::from_utf8_lossy(text);
    for special in [Special::PROMPT, Special::MARKUP, Special::NONE] {
        match tokenizer.encode(&text, special) {
            Ok(ids) => {
                assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocabulary_size()));
                check_decoding(&tokenizer, &ids);
            }
            Err(error) => check_message(&error),
        }
    }
    // Ids in an order that no text gives, and one that no token has.
    let size = tokenizer.vocabulary_size() as u32;
    let ids: Vec<u32> = text.bytes().map(|byte| u32::from(byte) * 7 % (size + 1)).collect();
    check_decoding(&tokenizer, &ids);
    for id in (0..size).take(300) {
        tokenizer.token_bytes(id);
    }
});

fn check_decoding(tokenizer: &Tokenizer, ids: &[u32]) {
    for skip_special in [false, true] {
        let whole = tokenizer.decode(ids, skip_special);
        let mut stream = tokenizer.detokenizer(skip_special);
        let mut pieces: String = ids.iter().filter_map(|&id| stream.push(id)).collect();
        pieces.extend(stream.finish());
        assert_eq!(pieces, whole);
    }
}
