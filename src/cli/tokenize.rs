//! `trine tokenize`: text to ids and back.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};
use trine::engine::ModelFiles;
use trine::text::{ChatOptions, ChatTemplate, Message, Special, Tokenizer};

use super::args::ModelArgs;
use super::failure::bad_input;
use super::output;
use super::parse::{self, Ids};

/// Turn text into token ids, ids into text, or a conversation into a prompt
///
/// Ids are those of the checkpoint's Hugging Face tokenizer: the text is taken byte for byte, the
/// tokens that begin a text are added, and the text of control tokens becomes those tokens.
#[derive(Args)]
#[command(after_help = "\
Examples:
  trine tokenize \"Shall I compare thee\"
  trine tokenize --json --file sonnet.txt
  trine tokenize --decode 54,268,303
  trine tokenize --chat messages.json     [{\"role\":\"user\",\"content\":\"Hello\"}]")]
pub(crate) struct Tokenize {
    /// The text; - or nothing reads standard input
    #[arg(conflicts_with_all = ["file", "decode", "chat"])]
    text: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Read the text from a file; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print the text of these ids
    #[arg(long, value_name = "IDS", value_parser = parse::ids, conflicts_with = "file")]
    #[arg(allow_negative_numbers = true)]
    decode: Option<Ids>,
    /// Render this conversation with the checkpoint's chat template: a list of messages, or an
    /// object with messages and tools; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with_all = ["file", "decode"])]
    chat: Option<PathBuf>,
    /// Add no token that begins a text; with --decode, leave special tokens out
    #[arg(long)]
    no_special: bool,
    /// Take the text of control tokens as plain text
    #[arg(long, conflicts_with_all = ["decode", "chat"])]
    plain: bool,
    /// Print a line for each token: its id, a tab, and its text as the vocabulary writes it
    #[arg(long, conflicts_with_all = ["decode", "json", "chat"])]
    pieces: bool,
    /// End a rendered conversation with its last message, not with the assistant's turn
    #[arg(long, requires = "chat")]
    no_generation_prompt: bool,
    /// Print a JSON object: ids; text with --decode; text and ids with --chat
    #[arg(long)]
    json: bool,
}

/// A conversation as a file holds it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Conversation {
    Messages(Vec<Message>),
    Object { messages: Vec<Message>, tools: Option<Value>, documents: Option<Value> },
}

impl Tokenize {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let files = self.model.open()?;
        let tokenizer = files.tokenizer()?;
        if let Some(ids) = &self.decode {
            self.decode(tokenizer, &ids.0)
        } else if let Some(path) = &self.chat {
            self.render(&files, tokenizer, path)
        } else {
            self.encode(tokenizer)
        }
    }

    fn encode(&self, tokenizer: &Tokenizer) -> anyhow::Result<()> {
        let text = match (&self.text, &self.file) {
            (Some(text), _) if text != "-" => text.clone(),
            (_, file) => parse::read_text(file.as_deref().unwrap_or(Path::new("-")))?,
        };
        let special = Special { add: !self.no_special, parse: !self.plain };
        let ids = tokenizer.encode(&text, special)?;
        if self.json {
            return output::json(&json!({ "ids": ids }));
        }
        if !self.pieces {
            return output::line(listed(&ids));
        }
        for id in ids {
            output::line(format_args!("{id}\t{}", tokenizer.token_text(id).unwrap_or_default()))?;
        }
        Ok(())
    }

    fn decode(&self, tokenizer: &Tokenizer, ids: &[u32]) -> anyhow::Result<()> {
        if let Some(id) = ids.iter().find(|&&id| tokenizer.token_text(id).is_none()) {
            let below = tokenizer.vocabulary_size();
            return Err(bad_input(format!(
                "--decode: expected ids of the vocabulary, below {below}, found {id}"
            )));
        }
        let text = tokenizer.decode(ids, self.no_special);
        if self.json { output::json(&json!({ "text": text })) } else { output::line(text) }
    }

    fn render(&self, files: &ModelFiles, tokenizer: &Tokenizer, path: &Path) -> anyhow::Result<()> {
        let template = files.chat.as_ref().ok_or_else(ChatTemplate::missing)?;
        let (messages, options) = read_conversation(path, !self.no_generation_prompt)?;
        let text = template.render(&messages, &options)?;
        if !self.json {
            return output::text(&text);
        }
        let ids = tokenizer.encode_chat(template, &messages, &options)?;
        output::json(&json!({ "text": text, "ids": ids }))
    }
}

/// Ids with commas between them, as `--ids` and `--decode` take them.
pub(crate) fn listed(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn read_conversation(
    path: &Path,
    generation_prompt: bool,
) -> anyhow::Result<(Vec<Message>, ChatOptions)> {
    let text = parse::read_text(path)?;
    let conversation: Conversation = serde_json::from_str(&text).map_err(|error| {
        let found = match error.classify() {
            serde_json::error::Category::Data => "other JSON".to_owned(),
            _ => format!("no JSON ({error})"),
        };
        bad_input(format!(
            "{}: expected a list of messages, or an object with messages, found {found}",
            path.display()
        ))
    })?;
    let mut options =
        ChatOptions { add_generation_prompt: generation_prompt, ..ChatOptions::default() };
    let messages = match conversation {
        Conversation::Messages(messages) => messages,
        Conversation::Object { messages, tools, documents } => {
            (options.tools, options.documents) = (tools, documents);
            messages
        }
    };
    Ok((messages, options))
}
