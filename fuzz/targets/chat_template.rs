//! A chat template, then what the user says after a byte 0xFF.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use trine::text::{ChatOptions, ChatTemplate, Message};
use trine_fuzz::{check_message, halves, let_caught_panics_pass};

fuzz_target!(init: let_caught_panics_pass(), |data: &[u8]| {
    let (source, user) = halves(data);
    let source = String::from_utf8_lossy(source);
    let file = Path::new("chat_template.jinja");
    let template = match ChatTemplate::new(file, &source, Some("<s>"), Some("</s>")) {
        Ok(template) => template,
        Err(error) => return check_message(&error),
    };
    let user = String::from_utf8_lossy(user);
    let messages = [
        Message::new("system", "Answer."),
        Message::new("user", &*user),
        Message::new("assistant", "Yes."),
        Message::new("user", "Why?"),
    ];
    let tools = serde_json::json!([{
        "type": "function",
        "function": { "name": "f", "parameters": { "type": "object", "properties": {} } },
    }]);
    for options in [
        ChatOptions::generate(),
        ChatOptions { tools: Some(tools), ..ChatOptions::default() },
    ] {
        match template.render(&messages, &options) {
            Ok(text) => assert!(text.len() <= 16 << 20),
            // What a template says when it raises an exception is the template's own.
            Err(error) if error.to_string().contains("it refuses") => {}
            Err(error) => check_message(&error),
        }
    }
});
