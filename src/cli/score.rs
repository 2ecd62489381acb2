//! `trine score`: logits, greedy tokens and log-likelihoods of given tokens, for checking against
//! another implementation.

use std::io::BufRead;

use clap::Args;
use serde::{Deserialize, Serialize};
use trine::backend::KvType;
use trine::engine::Session;
use trine::engine::score::{ScoreRequest, Scored};

use super::args::{AnyModelArgs, ContextArgs, DeviceArgs, load};
use super::failure::{self, Partly, bad_input};
use super::output;
use super::parse::{self, Ids};
use super::tokenize::listed;

/// Prompts of one request that may run at a time.
const SEQUENCES: usize = 16;

/// Score token ids: logits, greedy continuation, mean negative log-likelihood
///
/// Logits are those of the last position of the prompt. End tokens are like any other. mean_nll is
/// the mean of -ln p(ids[i] | ids[0..i]) for i from 1.
#[derive(Args)]
#[command(after_help = "\
With --jsonl each line of standard input is a request, and each gets a line of output:
  {\"ids\":[1,2,3],\"greedy\":4,\"logits\":true,\"nll\":true}
      {\"tokens\":[…],\"logits\":[…],\"mean_nll\":…}
  {\"prompts\":[[1,2,3],[4,5]],\"nll\":true}         runs as one ragged batch
      {\"results\":[{…},{…}]}
A line that is refused or fails gets {\"error\":\"…\"}, the others go on, and the exit code is not 0.

Examples:
  trine score --ids 1,2,3 --greedy 8 --logits --nll --json
  trine score --jsonl < requests.jsonl")]
pub(crate) struct Score {
    #[command(flatten)]
    model: AnyModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// The prompt
    #[arg(long, value_name = "IDS", value_parser = parse::ids, required_unless_present = "jsonl")]
    #[arg(allow_negative_numbers = true)]
    ids: Option<Ids>,
    /// Continue with N tokens, each the likeliest
    #[arg(long, value_name = "N", value_parser = parse::whole::<usize>, default_value = "0")]
    greedy: usize,
    /// Print the logits of the prompt's last position
    #[arg(long)]
    logits: bool,
    /// Print the mean negative log-likelihood of the prompt
    #[arg(long)]
    nll: bool,
    /// Read requests from standard input, one a line
    #[arg(long, conflicts_with_all = ["ids", "greedy", "logits", "nll"])]
    jsonl: bool,
    /// Print a JSON object
    #[arg(long)]
    json: bool,
}

/// One line of `--jsonl`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    ids: Option<Vec<u32>>,
    prompts: Option<Vec<Vec<u32>>>,
    #[serde(default)]
    greedy: usize,
    #[serde(default)]
    logits: bool,
    #[serde(default)]
    nll: bool,
}

/// One answer. What was not asked for is empty or null.
#[derive(Serialize)]
struct Answer {
    tokens: Vec<u32>,
    logits: Vec<f32>,
    mean_nll: Option<f64>,
}

/// What a line is answered with.
#[derive(Serialize)]
#[serde(untagged)]
enum Answers {
    One(Answer),
    Several { results: Vec<Answer> },
    Failed { error: String },
}

impl From<Scored> for Answer {
    fn from(scored: Scored) -> Self {
        let mean_nll = scored.mean_nll();
        Self { tokens: scored.tokens, logits: scored.logits, mean_nll }
    }
}

impl Score {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        if !(self.jsonl || self.greedy > 0 || self.logits || self.nll) {
            return Err(bad_input("nothing is asked for: expected --greedy N, --logits or --nll"));
        }
        // f32 unless another type is named: what is compared should be the model's arithmetic.
        let options = self.device.options(self.context.context, KvType::F32).sequences(SEQUENCES);
        let mut model = load(self.model.open()?, &options)?;
        match &self.ids {
            Some(ids) => self.one(&mut model.session, &ids.0),
            None => self.lines(&mut model.session),
        }
    }

    fn one(&self, session: &mut Session, ids: &[u32]) -> anyhow::Result<()> {
        let request = request(ids.to_vec(), self.greedy, self.logits, self.nll);
        let scored = session.score(&[request])?;
        for scored in scored {
            let answer = Answer::from(scored);
            if self.json {
                output::json(&answer)?;
                continue;
            }
            if self.greedy > 0 {
                output::line(format_args!("tokens: {}", listed(&answer.tokens)))?;
            }
            if self.logits {
                output::line(format_args!("logits: {:?}", answer.logits))?;
            }
            if self.nll {
                let nll = answer.mean_nll.map_or("none".into(), |nll| format!("{nll:.6}"));
                output::line(format_args!("mean_nll: {nll}"))?;
            }
        }
        Ok(())
    }

    fn lines(&self, session: &mut Session) -> anyhow::Result<()> {
        let (mut all, mut failed, mut bad) = (0, 0, true);
        for (index, line) in std::io::stdin().lock().split(b'\n').enumerate() {
            let line = line?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            all += 1;
            let answers = answer(session, &line).unwrap_or_else(|error| {
                failed += 1;
                bad &= failure::is_bad_input(&error);
                let error = failure::one_line(&format!("line {}: {error}", index + 1));
                Answers::Failed { error }
            });
            output::json(&answers)?;
        }
        if failed == 0 {
            return Ok(());
        }
        let message = format!("{failed} of {all} requests failed; their lines say why");
        Err(Partly { message, bad_input: bad }.into())
    }
}

fn answer(session: &mut Session, line: &[u8]) -> anyhow::Result<Answers> {
    let line: Line = serde_json::from_slice(line).map_err(|error| {
        bad_input(format!("expected {{\"ids\":[…]}} or {{\"prompts\":[[…],…]}}, found {error}"))
    })?;
    let (prompts, several) = match (line.ids, line.prompts) {
        (Some(ids), None) => (vec![ids], false),
        (None, Some(prompts)) if !prompts.is_empty() => (prompts, true),
        (None, Some(_)) => return Err(bad_input("prompts: expected at least one, found none")),
        _ => return Err(bad_input("expected either ids or prompts")),
    };
    let requests: Vec<ScoreRequest> =
        prompts.into_iter().map(|ids| request(ids, line.greedy, line.logits, line.nll)).collect();
    let mut results: Vec<Answer> = session.score(&requests)?.into_iter().map(Into::into).collect();
    if !several && let Some(answer) = results.pop() {
        return Ok(Answers::One(answer));
    }
    Ok(Answers::Several { results })
}

fn request(ids: Vec<u32>, greedy: usize, logits: bool, nll: bool) -> ScoreRequest {
    ScoreRequest { ids, greedy, logits, score_from: nll.then_some(1) }
}
