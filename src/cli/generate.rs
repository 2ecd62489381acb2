//! `trine generate`: a text and what follows.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};
use trine::backend::KvType;
use trine::engine::session::{FinishReason, Token, Usage};
use trine::engine::{LoadedModel, SamplingParams, TextEvent};
use trine::text::{Special, Tokenizer};

use super::args::{ContextArgs, DeviceArgs, ModelArgs, SamplingArgs, load};
use super::failure::bad_input;
use super::output::{self, rate};
use super::parse::{self, Limit};

/// Tokens of an answer unless the user or the checkpoint says otherwise.
const MAX_TOKENS: usize = 256;

/// Continue a text
///
/// The continuation goes to stdout as it comes, what it cost to stderr. The text of control tokens
/// in the prompt becomes those tokens; no chat template is applied.
#[derive(Args)]
#[command(after_help = "\
A sampling option that is not given comes from the checkpoint's generation_config.json, else it is
off and the temperature is 0; trine inspect shows those in force. Options apply in this order: logit bias; repetition, frequency and presence penalty; temperature;
min-p; top-k; top-p. Temperature 0 takes the highest logit after biases and penalties.

Examples:
  trine generate \"Shall I compare thee\"
  trine generate -m models/bitnet-b1.58-2B-4T -p \"Once upon\" -n 64 --temperature 0.7 --seed 1
  trine generate --json --stop \"END\" < prompt.txt")]
pub(crate) struct Generate {
    /// The prompt; - or nothing reads standard input
    #[arg(value_name = "PROMPT", conflicts_with_all = ["flag_prompt", "file"])]
    prompt: Option<String>,
    /// The prompt
    #[arg(id = "flag_prompt", short = 'p', long = "prompt", value_name = "TEXT")]
    #[arg(allow_hyphen_values = true, conflicts_with = "file")]
    flag_prompt: Option<String>,
    /// Read the prompt from a file; - is standard input. A line break at its end is dropped
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    context: ContextArgs,
    /// The most tokens of the answer; -1 for as many as fit [default: the checkpoint's
    /// max_new_tokens, else 256]
    #[arg(short = 'n', long, alias = "n-predict", alias = "predict", value_name = "N")]
    #[arg(value_parser = parse::limit, allow_negative_numbers = true)]
    max_tokens: Option<Limit>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// With --json: log-probabilities of each token and of the N likeliest in its place, 0 to 20
    #[arg(long, value_name = "N", requires = "json", value_parser = parse::whole::<u32>)]
    logprobs: Option<u32>,
    /// Print nothing but the text
    #[arg(short, long)]
    quiet: bool,
    /// Print a JSON object at the end: text, tokens, finish_reason, usage, timings, seed
    #[arg(long)]
    json: bool,
}

/// A whole answer.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<Token>,
    pub(crate) usage: Usage,
    pub(crate) reason: Option<FinishReason>,
    pub(crate) stop: Option<String>,
}

impl Answer {
    /// Takes an event and returns the text that it adds.
    pub(crate) fn add(&mut self, event: TextEvent) -> String {
        let added = event.text().to_owned();
        self.text += &added;
        match event {
            TextEvent::Text { token, .. } => self.tokens.extend(token),
            TextEvent::Done { reason, stop, usage } => {
                (self.reason, self.stop, self.usage) = (Some(reason), stop, usage);
            }
        }
        added
    }

    /// Why the answer ended, as a word.
    pub(crate) fn reason(&self) -> &'static str {
        match self.reason {
            Some(FinishReason::StopToken(_)) => "stop_token",
            Some(FinishReason::StopText) => "stop_text",
            Some(FinishReason::Length) => "length",
            Some(FinishReason::Context) => "context",
            _ => "interrupted",
        }
    }

    /// What the answer cost, for people.
    pub(crate) fn cost(&self) -> String {
        let part = |what: &str, count: usize, rated: usize, time: Duration| {
            let rate = rate(rated, time).map_or(String::new(), |rate| format!(" ({rate:.1} t/s)"));
            format!("{what} {count} tokens in {:.2} s{rate}", time.as_secs_f64())
        };
        let usage = &self.usage;
        let computed = usage.prompt - usage.cached;
        let cached = match usage.cached {
            0 => String::new(),
            cached => format!(", {cached} of them cached"),
        };
        format!(
            "{}{cached}; {}; seed {}; ended by {}",
            part("prompt", usage.prompt, computed, usage.prompt_time),
            // The first token is the prompt's: decoding takes the steps after it.
            part("answer", usage.generated, usage.generated.saturating_sub(1), usage.decode_time),
            usage.seed,
            self.reason(),
        )
    }

    /// The answer as a JSON object.
    pub(crate) fn json(&self) -> Value {
        let usage = &self.usage;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        json!({
            "text": self.text,
            "tokens": self.tokens.iter().map(|token| token.id).collect::<Vec<_>>(),
            "finish_reason": self.reason(),
            "stop": self.stop,
            "usage": {
                "prompt_tokens": usage.prompt,
                "cached_tokens": usage.cached,
                "completion_tokens": usage.generated,
            },
            "timings": {
                "prompt_ms": ms(usage.prompt_time),
                "prompt_per_second": rate(usage.prompt - usage.cached, usage.prompt_time),
                "decode_ms": ms(usage.decode_time),
                "decode_per_second": rate(usage.generated.saturating_sub(1), usage.decode_time),
            },
            "seed": usage.seed,
        })
    }
}

/// A token with its log-probabilities, as JSON has it.
#[derive(Serialize)]
struct Logprob {
    id: u32,
    text: Option<String>,
    logprob: Option<f32>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    top: Vec<Logprob>,
}

impl Logprob {
    fn new(tokenizer: &Tokenizer, token: &Token) -> Self {
        let one = |id, logprob, top| Self { id, text: tokenizer.token_text(id), logprob, top };
        let top = token.top.iter().map(|&(id, logprob)| one(id, Some(logprob), Vec::new()));
        one(token.id, token.logprob, top.collect())
    }
}

impl Generate {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let prompt = self.prompt()?;
        let started = Instant::now();
        let options = self.device.options(self.context.context, KvType::F16);
        let files = self.model.open()?;
        files.check_writes()?;
        let mut model = load(files, &options)?;
        let load_time = started.elapsed();
        let params = self.params(&model)?;
        let ids = model.tokenizer()?.encode(&prompt, Special::MARKUP)?;
        let mut answer = Answer::default();
        for event in model.generate_ids(&ids, &params)? {
            let text = answer.add(event?);
            if !self.json {
                output::text(&text)?;
            }
        }
        if self.json {
            return self.print_json(&model, &answer, load_time);
        }
        if !answer.text.ends_with('\n') {
            output::text("\n")?;
        }
        if !self.quiet {
            output::note(answer.cost());
        }
        Ok(())
    }

    fn params(&self, model: &LoadedModel) -> anyhow::Result<SamplingParams> {
        let mut defaults = model.defaults();
        defaults.max_tokens.get_or_insert(MAX_TOKENS);
        defaults.logprobs = self.logprobs;
        self.sampling.params(&defaults, self.max_tokens, model.session.config().vocabulary)
    }

    /// The prompt from wherever it is.
    fn prompt(&self) -> anyhow::Result<String> {
        let given =
            self.prompt.as_ref().filter(|prompt| *prompt != "-").or(self.flag_prompt.as_ref());
        if let Some(prompt) = given {
            return Ok(prompt.clone());
        }
        let stdin = self.prompt.is_none() && self.file.is_none();
        let how = "give it as trine generate \"Shall I compare thee\", with --file FILE, \
                   or on standard input";
        if stdin && std::io::stdin().is_terminal() {
            return Err(bad_input(format!("there is no prompt; {how}")));
        }
        let text = parse::read_text(self.file.as_deref().unwrap_or(Path::new("-")))?;
        if stdin && text.is_empty() {
            return Err(bad_input(format!(
                "there is no prompt and standard input is empty; {how}"
            )));
        }
        Ok(parse::without_line_break(text))
    }

    fn print_json(
        &self,
        model: &LoadedModel,
        answer: &Answer,
        load_time: Duration,
    ) -> anyhow::Result<()> {
        let mut object = answer.json();
        object["model"] = json!(model.name);
        object["device"] = json!(model.session.executor().device().name);
        object["timings"]["load_ms"] = json!(load_time.as_secs_f64() * 1e3);
        if self.logprobs.is_some() {
            let tokenizer = model.tokenizer()?;
            let logprobs = answer.tokens.iter().map(|token| Logprob::new(tokenizer, token));
            object["logprobs"] = serde_json::to_value(logprobs.collect::<Vec<_>>())?;
        }
        output::json(&object)
    }
}
