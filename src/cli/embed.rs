//! `trine embed`: texts as vectors.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::json;
use trine::backend::KvType;
use trine::engine::{LoadedModel, Pooling};

use super::args::{ContextArgs, DeviceArgs, ModelArgs, load};
use super::failure::bad_input;
use super::output;
use super::parse;

/// Texts that may run at a time.
const SEQUENCES: usize = 16;

/// Texts that are taken together: their vectors are printed before the next are begun.
const BATCH: usize = 64;

/// Turn texts into vectors of length 1
///
/// A text's vector is the row of its last token after the final norm, or what else the model pools,
/// divided by its length, so that the cosine of two texts is the sum of the products of their numbers.
/// The model's own end token comes last. Any model answers; those made for it, such as BitNet-embedding, are the ones to use.
#[derive(Args)]
#[command(after_help = "\
Prints a line for each text: its numbers with spaces between them, or with --json
  {\"index\":0,\"tokens\":7,\"embedding\":[…]}

Examples:
  trine embed \"query: a boat on a river\"
  trine embed --json \"a boat\" \"a ship\"
  trine embed --file lines.txt --model models/bitnet-embedding-0.6b")]
pub(crate) struct Embed {
    /// The texts; - or nothing reads standard input, a text a line
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    texts: Vec<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// Read the texts from a file, one a line; - is standard input
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Which tokens count: the last, the mean of all, or the first (cls) [default: what the model says
    /// in modules.json or in GGUF, which inspect shows, else the last]
    #[arg(long, value_name = "TOKENS", value_enum, hide_default_value = true)]
    pooling: Option<Tokens>,
    /// Print a JSON object for each text
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Tokens {
    Last,
    Mean,
    Cls,
}

impl Embed {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let texts = self.texts()?;
        let options = self.device.options(self.context.context, KvType::F16).sequences(SEQUENCES);
        let files = self.model.open()?;
        let pooling = match self.pooling {
            None => files.pooling.in_force()?,
            Some(Tokens::Last) => Pooling::Last,
            Some(Tokens::Mean) => Pooling::Mean,
            Some(Tokens::Cls) => Pooling::Cls,
        };
        let mut model = load(files, &options)?;
        // All of them, before any work is done.
        let ids = (texts.iter().enumerate())
            .map(|(index, text)| ids(&model, text).map_err(|error| at(index, &error)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let mut index = 0;
        for batch in ids.chunks(BATCH) {
            for (ids, embedding) in batch.iter().zip(model.session.embed(batch, pooling)?) {
                if self.json {
                    let tokens = ids.len();
                    output::json(
                        &json!({ "index": index, "tokens": tokens, "embedding": embedding }),
                    )?;
                } else {
                    let numbers: Vec<String> = embedding.iter().map(f32::to_string).collect();
                    output::line(numbers.join(" "))?;
                }
                index += 1;
            }
        }
        Ok(())
    }

    fn texts(&self) -> anyhow::Result<Vec<String>> {
        let file = match (&self.file, self.texts.as_slice()) {
            (Some(file), _) => file.as_path(),
            (None, []) => Path::new("-"),
            (None, [one]) if one == "-" => Path::new("-"),
            (None, texts) => return Ok(texts.to_vec()),
        };
        let texts: Vec<String> = parse::read_text(file)?.lines().map(str::to_owned).collect();
        if texts.is_empty() {
            return Err(bad_input("expected at least one text, found none"));
        }
        Ok(texts)
    }
}

/// The ids of a text, checked.
fn ids(model: &LoadedModel, text: &str) -> anyhow::Result<Vec<u32>> {
    let ids = model.embedding_ids(text)?;
    let context = model.session.context();
    match ids.len() {
        0 => Err(bad_input("expected a text, found an empty one")),
        tokens if tokens > context => Err(bad_input(format!(
            "expected at most {context} tokens, the context, found {tokens}; --context may be raised \
             to {}",
            model.session.config().context
        ))),
        _ => Ok(ids),
    }
}

fn at(index: usize, error: &anyhow::Error) -> anyhow::Error {
    bad_input(format!("text {}: {error}", index + 1))
}
