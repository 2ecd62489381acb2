//! `trine perplexity`: how well a model predicts a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use trine::backend::KvType;
use trine::engine::LoadedModel;
use trine::engine::score::ScoreRequest;
use trine::text::Special;

use super::args::{DeviceArgs, ModelArgs, load};
use super::failure::bad_input;
use super::output;
use super::parse;

/// Tokens per window unless the user says otherwise.
const CONTEXT: usize = 2048;

/// Measure how well a model predicts a text
///
/// The text is tokenised as a whole, without special tokens. A window is the token that begins a
/// text, if the checkpoint has one, and up to context - 1 tokens of the text; windows advance by
/// the stride. Each token is scored once, in the first window that holds it. Without a token that
/// begins a text, the first token of the text is not scored.
#[derive(Args)]
#[command(after_help = "\
Examples:
  trine perplexity sonnets.txt
  trine perplexity --json --context 512 --stride 256 wiki.test.raw")]
pub(crate) struct Perplexity {
    /// The text; - is standard input
    #[arg(value_name = "FILE", required_unless_present = "flag_file")]
    file: Option<PathBuf>,
    /// The text
    #[arg(id = "flag_file", short, long = "file", value_name = "FILE", conflicts_with = "file")]
    #[arg(hide = true)]
    flag_file: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Tokens of a window [default: the model's context, at most 2048]
    #[arg(short, long, alias = "ctx-size", value_name = "N", value_parser = parse::positive)]
    context: Option<usize>,
    /// Tokens by which windows advance [default: half the context]
    #[arg(long, value_name = "N", value_parser = parse::positive)]
    stride: Option<usize>,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// How a text is cut into windows.
#[derive(Debug, Clone, Copy)]
struct Windows {
    /// Tokens of the text per window.
    size: usize,
    stride: usize,
    tokens: usize,
}

impl Windows {
    /// Start and end of each window, and the first token that no window before it held.
    fn each(self) -> impl Iterator<Item = (usize, usize, usize)> {
        let mut scored = 0;
        let starts = (0..self.tokens).step_by(self.stride);
        starts.map_while(move |start| {
            let end = (start + self.size).min(self.tokens);
            let first = std::mem::replace(&mut scored, end);
            (first < end).then_some((start, end, first))
        })
    }
}

/// Sums over a text.
#[derive(Default)]
struct Total {
    nll: f64,
    tokens: usize,
}

impl Perplexity {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let Some(path) = self.file.as_ref().or(self.flag_file.as_ref()) else {
            return Err(bad_input("missing: <FILE>"));
        };
        let text = parse::read_text(path)?;
        let files = self.model.open()?;
        let ids = files.tokenizer()?.encode(&text, Special::NONE)?;
        let context = self.context.unwrap_or(files.config().context.min(CONTEXT));
        let size = context - usize::from(files.bos.is_some());
        let stride = self.stride.unwrap_or((context / 2).max(1));
        if stride > size {
            let message =
                format!("--stride: expected at most {size}, so that no token is left out");
            return Err(bad_input(format!("{message}, found {stride}")));
        }
        let windows = Windows { size, stride, tokens: ids.len() };
        let options = self.device.options(Some(context), KvType::F32);
        let mut model = load(files, &options)?;
        let total = score(&mut model, &ids, windows)?;
        if total.tokens == 0 {
            return Err(bad_input(format!(
                "{}: expected a text with a token to score, found {} tokens",
                path.display(),
                ids.len()
            )));
        }
        self.print(&total, text.len(), context, stride)
    }

    fn print(
        &self,
        total: &Total,
        bytes: usize,
        context: usize,
        stride: usize,
    ) -> anyhow::Result<()> {
        let mean = total.nll / total.tokens as f64;
        let bits = total.nll / std::f64::consts::LN_2 / bytes as f64;
        if self.json {
            return output::json(&json!({
                "tokens": total.tokens,
                "bytes": bytes,
                "context": context,
                "stride": stride,
                "mean_nll": mean,
                "perplexity": mean.exp(),
                "bits_per_byte": bits,
            }));
        }
        output::text(&format!(
            "tokens scored   {}\nmean NLL        {mean:.5}\nperplexity      {:.4}\n\
             bits per byte   {bits:.5}\nwindows         {context} tokens, {stride} apart\n",
            total.tokens,
            mean.exp(),
        ))
    }
}

fn score(model: &mut LoadedModel, ids: &[u32], windows: Windows) -> anyhow::Result<Total> {
    let mut total = Total::default();
    let bar = output::bar("scoring");
    for (start, end, first) in windows.each() {
        let mut request = ScoreRequest::default();
        request.ids.extend(model.bos);
        request.score_from = Some((request.ids.len() + first - start).max(1));
        request.ids.extend_from_slice(&ids[start..end]);
        for scored in model.session.score(&[request])? {
            total.tokens += scored.logprobs.len();
            total.nll -= scored.logprobs.iter().map(|&logprob| f64::from(logprob)).sum::<f64>();
        }
        output::advance(&bar, end, ids.len());
    }
    bar.finish_and_clear();
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_token_is_scored_in_one_window() {
        for (size, stride, tokens) in
            [(7, 4, 100), (7, 4, 3), (7, 7, 21), (1, 1, 5), (8, 3, 20), (8, 3, 0), (5, 5, 5)]
        {
            let mut next = 0;
            for (start, end, first) in (Windows { size, stride, tokens }).each() {
                assert!(first == next && start <= first && end - start <= size);
                next = end;
            }
            assert_eq!(next, tokens, "size {size}, stride {stride}");
        }
    }
}
