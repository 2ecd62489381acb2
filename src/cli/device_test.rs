//! `trine devices --test`: whether a device gives the CPU's tokens, and how fast.

use std::fmt;
use std::time::Instant;

use serde_json::{Value, json};
use trine::backend::select::{DeviceName, DeviceStatus};
use trine::backend::{KvType, MAX_LOGPROBS};
use trine::engine::session::{Event, Token, Usage};
use trine::engine::{ModelFiles, ModelOptions, SamplingParams, Session};
use trine::error::RunError;
use trine::text::Special;

use super::args::{AnyModelArgs, load_silently};
use super::output::rate;

/// Tokens that are compared.
const TOKENS: usize = 20;

/// Where the two highest logits are closer than this, devices may pick either (docs/numerics.md).
const NEAR_TIE: f32 = 0.8;

const PROMPT: &str = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n\
                      Rough winds do shake the darling buds of May,\nAnd";

/// What the CPU answers.
pub(crate) struct Reference {
    prompt: Vec<u32>,
    /// Its tokens, each with those whose logits are near, and how far below they are.
    tokens: Vec<(u32, Vec<(u32, f32)>)>,
}

/// A device that passed.
pub(crate) struct Tested {
    tokens: usize,
    /// Which tokens differ, and the CPU's margin there.
    near_ties: Vec<(usize, f32)>,
    usage: Usage,
    load_seconds: f64,
}

impl Reference {
    /// Asks the CPU.
    pub(crate) fn new(model: &AnyModelArgs) -> anyhow::Result<Self> {
        let files = model.open()?;
        let prompt = prompt(&files)?;
        let mut model = load_silently(files, &options(DeviceName::Cpu, prompt.len()))?;
        let answer = generate(&mut model.session, &prompt, TOKENS, Some(MAX_LOGPROBS as u32))?;
        // Log-probabilities differ as the logits do.
        let near = |token: &Token| -> Vec<(u32, f32)> {
            let best = token.top.first().map_or(0.0, |(_, logprob)| *logprob);
            let below = token.top.iter().map(|&(id, logprob)| (id, best - logprob));
            below.filter(|&(_, below)| below <= NEAR_TIE).collect()
        };
        let tokens = answer.0.iter().map(|token| (token.id, near(token))).collect();
        Ok(Self { prompt, tokens })
    }

    /// Loads the model on a device and compares its tokens. An `Err` says what is wrong.
    pub(crate) fn test(
        &self,
        model: &AnyModelArgs,
        device: &DeviceStatus,
    ) -> Result<Tested, String> {
        let name = device.name.parse::<DeviceName>().map_err(|error| error.to_string())?;
        let started = Instant::now();
        let files = model.open().map_err(|error| error.to_string())?;
        let loaded = load_silently(files, &options(name, self.prompt.len()));
        let mut model = loaded.map_err(|error| error.to_string())?;
        let load_seconds = started.elapsed().as_secs_f64();
        self.compare(&mut model.session, load_seconds)
    }

    fn compare(&self, session: &mut Session, load_seconds: f64) -> Result<Tested, String> {
        let mut tested: Option<Tested> = None;
        let mut done = 0;
        // After a near tie, the device goes on from the CPU's token.
        while done < self.tokens.len() {
            let mut prompt = self.prompt.clone();
            prompt.extend(self.tokens[..done].iter().map(|(id, _)| id));
            let left = &self.tokens[done..];
            let (answer, usage) =
                generate(session, &prompt, left.len(), None).map_err(|error| error.to_string())?;
            let tested = tested.get_or_insert_with(|| Tested {
                tokens: self.tokens.len(),
                near_ties: Vec::new(),
                usage,
                load_seconds,
            });
            let mut pairs = answer.iter().zip(left);
            let Some(at) = pairs.position(|(token, (id, _))| token.id != *id) else {
                if answer.len() < left.len() {
                    return Err(format!("{} of {} tokens came", answer.len(), left.len()));
                }
                break;
            };
            let (found, (expected, near)) = (answer[at].id, &left[at]);
            let Some((_, margin)) = near.iter().find(|(id, _)| *id == found) else {
                return Err(format!(
                    "token {} of {TOKENS} is {found} and the CPU's is {expected}, whose logit is \
                     more than {NEAR_TIE} above that; --check finds the first op that goes wrong",
                    done + at + 1
                ));
            };
            tested.near_ties.push((done + at, *margin));
            done += at + 1;
        }
        if let Some(tested) = tested.as_ref().filter(|t| 2 * t.near_ties.len() > t.tokens) {
            return Err(format!(
                "{} of {} tokens differ from the CPU's, all of them near ties: the model's logits \
                 are too flat for this test",
                tested.near_ties.len(),
                tested.tokens
            ));
        }
        tested.ok_or_else(|| "there are no tokens to compare: the context is too short".into())
    }
}

impl fmt::Display for Tested {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equal = self.tokens - self.near_ties.len();
        write!(f, "{equal} of {} tokens equal the CPU's", self.tokens)?;
        for (index, margin) in &self.near_ties {
            write!(f, ", token {} is a near tie (margin {margin:.2})", index + 1)?;
        }
        let (prompt, decode) = self.rates();
        for (what, rate) in [("prompt", prompt), ("decode", decode)] {
            if let Some(rate) = rate {
                write!(f, "; {what} {rate:.1} t/s")?;
            }
        }
        write!(f, "; loaded in {:.1} s", self.load_seconds)
    }
}

impl Tested {
    /// Prompt and decoded tokens per second.
    fn rates(&self) -> (Option<f64>, Option<f64>) {
        let usage = &self.usage;
        let decoded = usage.generated.saturating_sub(1);
        (rate(usage.prompt, usage.prompt_time), rate(decoded, usage.decode_time))
    }

    pub(crate) fn json(&self) -> Value {
        let (prompt, decode) = self.rates();
        let near_tie =
            |&(index, margin): &(usize, f32)| json!({ "token": index, "margin": margin });
        json!({
            "ok": true,
            "tokens": self.tokens,
            "tokens_equal": self.tokens - self.near_ties.len(),
            "near_ties": self.near_ties.iter().map(near_tie).collect::<Vec<_>>(),
            "prompt_tokens": self.usage.prompt,
            "prompt_per_second": prompt,
            "decode_per_second": decode,
            "load_ms": self.load_seconds * 1e3,
        })
    }
}

/// What every device is asked to continue: a text, or tokens where there is no tokenizer.
fn prompt(files: &ModelFiles) -> anyhow::Result<Vec<u32>> {
    let config = files.config();
    let mut ids = match &files.tokenizer {
        Some(tokenizer) => tokenizer.encode(PROMPT, Special::PROMPT)?,
        None => (0..40).map(|i| (i * 7919 % config.vocabulary) as u32).collect(),
    };
    ids.truncate(config.context.saturating_sub(TOKENS).max(1));
    Ok(ids)
}

fn options(device: DeviceName, prompt: usize) -> ModelOptions {
    let options = ModelOptions::default().device(device).kv_type(KvType::F16);
    options.context(Some(prompt + TOKENS))
}

/// The likeliest tokens after a prompt.
fn generate(
    session: &mut Session,
    prompt: &[u32],
    count: usize,
    logprobs: Option<u32>,
) -> Result<(Vec<Token>, Usage), RunError> {
    let max_tokens = Some(count);
    let params = SamplingParams { max_tokens, logprobs, ..SamplingParams::default() };
    let (mut tokens, mut cost) = (Vec::new(), Usage::default());
    for event in session.generate(prompt, &params)? {
        match event? {
            Event::Token(token) => tokens.push(token),
            Event::Done { usage, .. } => cost = usage,
            _ => {}
        }
    }
    Ok((tokens, cost))
}
