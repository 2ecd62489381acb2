//! What a checkpoint says about text: the tokenizer's file, special tokens, chat templates.

use std::path::PathBuf;

use serde_json::Value;

use super::files::Files;
use super::gguf::tokenizer::GgufTokenizer;
use super::json::{Fields, parse_object};
use crate::error::LoadError;
use crate::tensor::SharedBytes;
use crate::text::{Tokenizer, TokenizerOptions};

/// The parts of a checkpoint that are about text, as they are written there.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct TokenizerFiles {
    /// Contents of `tokenizer.json`.
    pub tokenizer_json: Option<SharedBytes>,
    /// Where `tokenizer.json` is or would be, or the GGUF file, for messages.
    pub tokenizer_path: PathBuf,
    /// The chat template: `chat_template.jinja` if there is one, else `chat_template` of
    /// `tokenizer_config.json`, of which, if it is a list, the entry named `default`.
    pub chat_template: Option<String>,
    /// Name and text of each template, if `tokenizer_config.json` has a list of them.
    pub named_chat_templates: Vec<(String, String)>,
    /// Text of the token that begins a text.
    pub bos_token: Option<String>,
    /// Text of the token that ends an answer.
    pub eos_token: Option<String>,
    /// Text of the token that fills up a batch.
    pub pad_token: Option<String>,
    /// Whether encoding puts `bos_token` first, if `tokenizer_config.json` says so.
    pub add_bos_token: Option<bool>,
    /// Whether encoding puts `eos_token` last, if `tokenizer_config.json` says so.
    pub add_eos_token: Option<bool>,
    /// What is not used as the file has it, and why: a sentence each, for people.
    pub notes: Vec<String>,
    /// The tokenizer of a GGUF file.
    pub(crate) gguf: Option<GgufTokenizer>,
}

impl TokenizerFiles {
    /// The tokenizer, if there is one. It is built anew at each call.
    ///
    /// # Errors
    ///
    /// A [`LoadError`] that names the file and the key: for what is no tokenizer, or not one that can
    /// be run.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, LoadError> {
        if let Some(gguf) = &self.gguf {
            return gguf.build().map(Some);
        }
        let Some(json) = &self.tokenizer_json else { return Ok(None) };
        let options = TokenizerOptions {
            bos_token: self.bos_token.clone(),
            eos_token: self.eos_token.clone(),
            add_bos_token: self.add_bos_token,
        };
        Tokenizer::from_json_with(&self.tokenizer_path, json, &options).map(Some)
    }

    /// The file that messages name for what a folder has in another file than the tokenizer.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        match self.gguf {
            Some(_) => self.tokenizer_path.clone(),
            None => self.tokenizer_path.with_file_name(name),
        }
    }
}

const CONFIG: &str = "tokenizer_config.json";

/// Reads what is there; a checkpoint need not have any of it.
pub(crate) fn read(files: &Files) -> Result<TokenizerFiles, LoadError> {
    let mut out = TokenizerFiles {
        tokenizer_json: files.map("tokenizer.json")?,
        tokenizer_path: files.path("tokenizer.json"),
        ..TokenizerFiles::default()
    };
    if let Some(text) = files.text(CONFIG)? {
        let file = files.path(CONFIG);
        let map = parse_object(&file, &text)?;
        let fields = Fields { file: &file, prefix: "", map: &map };
        out.bos_token = token(&fields, "bos_token")?;
        out.eos_token = token(&fields, "eos_token")?;
        out.pad_token = token(&fields, "pad_token")?;
        out.add_bos_token = fields.boolean("add_bos_token")?;
        out.add_eos_token = fields.boolean("add_eos_token")?;
        match fields.get("chat_template") {
            None => {}
            Some(Value::String(template)) => out.chat_template = Some(template.clone()),
            Some(list) => {
                out.named_chat_templates = named(list).ok_or_else(|| {
                    let expected = "a string or a list of {name, template}, names differing";
                    fields.wrong("chat_template", expected, list)
                })?;
                out.chat_template = out
                    .named_chat_templates
                    .iter()
                    .find(|(name, _)| name == "default")
                    .map(|(_, template)| template.clone());
            }
        }
    }
    if let Some(template) = files.text("chat_template.jinja")? {
        out.chat_template = Some(template);
    }
    Ok(out)
}

/// A special token: its text, or an object that has it as `content`.
fn token(fields: &Fields<'_>, key: &str) -> Result<Option<String>, LoadError> {
    let Some(value) = fields.get(key) else { return Ok(None) };
    value
        .as_str()
        .or_else(|| value.get("content")?.as_str())
        .map(|text| Some(text.to_owned()))
        .ok_or_else(|| fields.wrong(key, "a string or an object with content", value))
}

fn named(list: &Value) -> Option<Vec<(String, String)>> {
    let mut templates: Vec<(String, String)> = Vec::new();
    for entry in list.as_array()? {
        let name = entry.get("name")?.as_str()?;
        let template = entry.get("template")?.as_str()?;
        if templates.iter().any(|(other, _)| other == name) {
            return None;
        }
        templates.push((name.to_owned(), template.to_owned()));
    }
    Some(templates)
}
