//! Steps of a model on any device:
//!
//! ```text
//! cargo bench --bench steps -- --device cuda:0 [--model 2b4t] [--context 128] [--batches 1,2,4]
//!     [--prompts 512,2048] [--chunk N] [--kv int8|f16|f32] [--rounds N] [--steps N] [--threads N]
//!     [--head full|screened|int8] [--eager] [--unfused]
//! cargo bench --bench steps -- --device cuda:0 --soak 10000 [--batches 8]
//! cargo bench --bench steps -- --device cuda:0 --invariance [--others 1,7,63]
//! ```
//!
//! The first decodes greedily with as many sequences as `--batches` says, each at the same context
//! in every step, as many steps enqueued ahead as the device takes; then runs prompts. Times are
//! medians of rounds. The share is that of the copy bandwidth which the same run measures: all
//! weights are read once per step, and the keys and values of every sequence.
//!
//! The second watches the memory of the device and of this process over many steps; the third
//! compares a sequence's logits bit for bit, alone and among others. Both fail with exit code 1.
//!
//! Prints a JSON object per line. `--model tiny` is for devices that a CPU imitates.

mod common;

#[path = "common/invariance.rs"]
mod invariance;
#[path = "common/soak.rs"]
mod soak;

use std::time::Instant;

use common::{Arguments, Failure, Meter, bandwidth, line, median, print};
use serde_json::json;
use trine::backend::ops::{Heads, SampleRow};
use trine::backend::select::DeviceName;
use trine::backend::{Head, KvType, PAGE_TOKENS};
use trine::checkpoint::synthetic::{SyntheticModel, published};
use trine::engine::open::STEP_TOKENS;
use trine::error::RunError;
use trine::model::activations::Reserve;
use trine::model::batch::{Batch, BatchSequence, LogitRow, Purpose, RowOptions, TokenSource};
use trine::model::config::ModelConfig;
use trine::model::executor::StepExecutor;
use trine::model::open::{DeviceOptions, open};

/// Sequences of the steps that are measured where nothing else is said.
const BATCHES: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// What all measurements share.
struct Bench {
    options: DeviceOptions,
    model: String,
    source: SyntheticModel,
    kv_type: KvType,
    arguments: Arguments,
}

type Executor = Box<dyn StepExecutor>;

impl Bench {
    fn load(
        &self,
        context: usize,
        sequences: usize,
        step_tokens: usize,
    ) -> Result<Executor, Failure> {
        let reserve = Reserve {
            context,
            sequences,
            step_tokens,
            kv_pages: sequences * context.div_ceil(PAGE_TOKENS),
            kv_type: self.kv_type,
        };
        let started = Instant::now();
        let executor = open(&self.options, &self.source, reserve, &mut |_, _| ())?;
        let device = executor.device();
        let seconds = started.elapsed().as_secs_f64();
        eprintln!("{}: {}, loaded in {seconds:.1} s", device.name, device.description);
        Ok(executor)
    }

    fn config(&self) -> &ModelConfig {
        use trine::model::weights::WeightSource;
        self.source.config()
    }

    /// Bytes that a step reads at least.
    fn bytes(&self, sequences: usize, context: usize) -> u64 {
        let config = self.config();
        // The synthetic head is bf16. In int8, a scale and three bounds come with each row.
        let head = match self.options.head {
            Head::Int8 => config.embedding_parameters() + 16 * config.vocabulary as u64,
            Head::Screened if sequences <= 8 => {
                config.embedding_parameters() + 16 * config.vocabulary as u64
            }
            _ => 2 * config.embedding_parameters(),
        };
        let weights = config.ternary_parameters() / 4 + head + 4 * config.norm_parameters();
        let kv_head = config.heads.dim * self.kv_type.size() + self.kv_type.scale_size();
        let kv = 2 * config.layers * config.heads.kv * kv_head;
        weights + (kv * sequences * context) as u64
    }

    fn decode(&self) -> Result<(), Failure> {
        let context = self.arguments.number("--context", 128)?.max(2);
        let batches = self.arguments.numbers("--batches", &BATCHES)?;
        let rounds: usize = self.arguments.number("--rounds", 9)?;
        let steps: usize = self.arguments.number("--steps", 32)?;
        let Some(&most) = batches.iter().max() else { return Ok(()) };
        let mut executor = self.load(context, most, STEP_TOKENS.max(most))?;
        let device = executor.device().clone();
        let copy = bandwidth(&device.name)?;
        let meter = Meter::new(&device.name);
        // Keys and values that are not zeros, where that does not take minutes.
        let slow = device.software || device.name == "cpu";
        if !slow {
            fill(&mut *executor, most, context - 1)?;
        }
        for &sequences in &batches {
            let step = |token: &dyn Fn(u32) -> TokenSource| {
                decode_step(sequences, context - 1, context.div_ceil(PAGE_TOKENS), token)
            };
            let (first, next) =
                (step(&|lane| TokenSource::Token(lane + 1)), step(&|_| TokenSource::Sampled));
            let mut run = Pipeline::start(&mut *executor, &first, &next)?;
            // Clocks rise, and graphs come to where they will be.
            run.steps(if slow { 1 } else { steps.max(64) })?;
            let (before, joules) = (run.executor.stats(), meter.joules());
            let mut seconds = Vec::with_capacity(rounds);
            for _ in 0..rounds {
                let started = Instant::now();
                run.steps(steps)?;
                seconds.push(started.elapsed().as_secs_f64() / steps as f64);
            }
            let after = run.executor.stats();
            let (step, bytes) = (median(&seconds), self.bytes(sequences, context));
            let host = before.zip(after).map(|(before, after)| {
                let steps = (after.steps - before.steps).max(1) as f64;
                let seconds = after.host_seconds - before.host_seconds;
                ((after.dispatches - before.dispatches) as f64 / steps, seconds / steps)
            });
            let of = |time: &dyn Fn(f64, f64) -> f64| seconds.iter().copied().reduce(time);
            let mut result = line(
                "decode",
                &device.name,
                json!({
                    "description": device.description,
                    "head": format!("{:?}", self.options.head).to_lowercase(),
                    "model": self.model,
                    "kv": self.kv_type.name(),
                    "sequences": sequences,
                    "context": context,
                    "step_microseconds": step * 1e6,
                    "step_microseconds_least": of(&f64::min).map(|time| time * 1e6),
                    "step_microseconds_most": of(&f64::max).map(|time| time * 1e6),
                    "tokens_per_second": sequences as f64 / step,
                    "bytes_per_step": bytes,
                    "copy_bytes_per_second": copy,
                    "copy_share": bytes as f64 / step / copy,
                    "launches_per_step": host.map(|(launches, _)| launches),
                    "host_microseconds_per_step": host.map(|(_, seconds)| seconds * 1e6),
                    "rounds": rounds,
                    "steps_per_round": steps,
                }),
            );
            meter.add_to(&mut result, joules, (rounds * steps * sequences) as f64);
            drain(run.executor)?;
            print(result);
        }
        Ok(())
    }

    fn prompts(&self) -> Result<(), Failure> {
        let prompts = self.arguments.numbers("--prompts", &[512, 2048])?;
        let rounds: usize = self.arguments.number("--rounds", 9)?;
        let Some(&longest) = prompts.iter().max() else { return Ok(()) };
        let chunk: usize = self.arguments.number("--chunk", longest)?;
        // What the longest prompt leaves behind, and room for an answer.
        let mut executor = self.load(longest + 1, 1, chunk.clamp(1, longest))?;
        let device = executor.device().clone();
        let meter = Meter::new(&device.name);
        for &tokens in &prompts {
            let mut seconds = Vec::with_capacity(rounds);
            let mut joules = None;
            for round in 0..=rounds {
                let started = Instant::now();
                run_prompt(&mut *executor, 0, tokens)?;
                match round {
                    // The first one warms up.
                    0 => joules = meter.joules(),
                    _ => seconds.push(started.elapsed().as_secs_f64()),
                }
            }
            let time = median(&seconds);
            let products = self.config().ternary_parameters() * tokens as u64;
            let mut result = line(
                "prompt",
                &device.name,
                json!({
                    "description": device.description,
                    "head": format!("{:?}", self.options.head).to_lowercase(),
                    "model": self.model,
                    "kv": self.kv_type.name(),
                    "tokens": tokens,
                    "tokens_per_step": chunk.clamp(1, longest).min(tokens),
                    "milliseconds": time * 1e3,
                    "tokens_per_second": tokens as f64 / time,
                    "ternary_products_per_second": products as f64 / time,
                    "rounds": rounds,
                }),
            );
            meter.add_to(&mut result, joules, (rounds * tokens) as f64);
            print(result);
        }
        Ok(())
    }
}

/// A row that takes the likeliest token.
fn greedy(index: usize) -> LogitRow {
    let row = SampleRow { top_p: 1.0, repetition_penalty: 1.0, ..SampleRow::default() };
    LogitRow { index, target: None, sample: Some(RowOptions { row, biases: Vec::new() }) }
}

fn sampling(sequences: Vec<BatchSequence>) -> Batch {
    Batch { sequences, purpose: Purpose::Sample { logprobs: false }, hidden: false }
}

/// The pages of a lane of which each sequence has `pages`.
fn pages(lane: usize, pages: usize) -> Vec<u32> {
    (lane * pages..(lane + 1) * pages).map(|page| page as u32).collect()
}

/// A step in which each of `sequences` sequences, of `each` pages, brings a token at `position`.
fn decode_step(
    sequences: usize,
    position: usize,
    each: usize,
    token: &dyn Fn(u32) -> TokenSource,
) -> Batch {
    let sequence = |lane| BatchSequence {
        lane,
        start: position,
        tokens: vec![token(lane as u32)],
        pages: pages(lane, each),
        logits: vec![greedy(0)],
    };
    sampling((0..sequences).map(sequence).collect())
}

/// A token that depends on where it stands.
fn any_token(lane: usize, position: usize, vocabulary: usize) -> TokenSource {
    TokenSource::Token(((lane * 7919 + position * 104_729 + 17) % vocabulary) as u32)
}

/// Runs a prompt of `tokens` tokens in as few steps as were reserved for, and takes one token.
fn run_prompt(executor: &mut dyn StepExecutor, lane: usize, tokens: usize) -> Result<(), RunError> {
    let (chunk, vocabulary) = (executor.reserve().step_tokens, executor.config().vocabulary);
    let each = executor.reserve().max_pages();
    for start in (0..tokens).step_by(chunk) {
        let count = chunk.min(tokens - start);
        let last = start + count == tokens;
        let sequence = BatchSequence {
            lane,
            start,
            tokens: (start..start + count).map(|at| any_token(lane, at, vocabulary)).collect(),
            pages: pages(lane, each),
            logits: if last { vec![greedy(count - 1)] } else { Vec::new() },
        };
        if executor.in_flight() >= executor.device().steps_ahead {
            executor.collect()?;
        }
        executor.submit(&sampling(vec![sequence]))?;
    }
    drain(executor)
}

/// Waits for all steps.
fn drain(executor: &mut dyn StepExecutor) -> Result<(), RunError> {
    while executor.in_flight() > 0 {
        executor.collect()?;
    }
    Ok(())
}

/// Fills the cache of every lane.
fn fill(executor: &mut dyn StepExecutor, lanes: usize, tokens: usize) -> Result<(), RunError> {
    (0..lanes).try_for_each(|lane| run_prompt(executor, lane, tokens.max(1)))
}

/// Steps of one kind, one behind the other, some of them in flight.
struct Pipeline<'a> {
    executor: &'a mut dyn StepExecutor,
    next: &'a Batch,
}

impl<'a> Pipeline<'a> {
    /// Enqueues as many steps as the device takes.
    fn start(
        executor: &'a mut dyn StepExecutor,
        first: &Batch,
        next: &'a Batch,
    ) -> Result<Self, RunError> {
        executor.submit(first)?;
        while executor.in_flight() < executor.device().steps_ahead {
            executor.submit(next)?;
        }
        Ok(Self { executor, next })
    }

    /// Waits for a step and enqueues another, `count` times.
    fn steps(&mut self, count: usize) -> Result<(), RunError> {
        for _ in 0..count {
            self.executor.collect()?;
            self.executor.submit(self.next)?;
        }
        Ok(())
    }
}

/// A published shape, or one that an imitated device runs in seconds.
fn shape(name: &str) -> Result<ModelConfig, Failure> {
    if name != "tiny" {
        return published(name).ok_or_else(|| format!("there is no model {name:?}").into());
    }
    let whole = published("2b4t").ok_or("2b4t is published")?;
    let heads = Heads { query: 4, kv: 2, dim: 64 };
    Ok(ModelConfig { hidden: 256, ffn: 512, layers: 2, heads, vocabulary: 500, ..whole })
}

fn main() -> Result<(), Failure> {
    let flags = ["--eager", "--unfused", "--invariance"];
    let values = [
        "--device",
        "--model",
        "--context",
        "--head",
        "--batches",
        "--prompts",
        "--chunk",
        "--kv",
        "--rounds",
        "--steps",
        "--threads",
        "--soak",
        "--others",
    ];
    let arguments = Arguments::new(&flags, &values)?;
    let device = match arguments.value("--device") {
        Some(device) => device.to_owned(),
        // `cargo test` and `cargo bench` run every bench, on machines without a GPU too.
        None => match common::hardware(None) {
            Some(device) => device,
            None => {
                eprintln!("nothing to measure: there is no GPU; --device names a device");
                return Ok(());
            }
        },
    };
    let kv_type = match arguments.value("--kv").unwrap_or("f16") {
        "f16" => KvType::F16,
        "f32" => KvType::F32,
        "int8" => KvType::Int8,
        other => return Err(format!("--kv: {other:?} is none of int8, f16 and f32").into()),
    };
    let model = arguments.value("--model").unwrap_or("2b4t").to_owned();
    let head = match arguments.value("--head").unwrap_or("full") {
        "full" => Head::Full,
        "screened" => Head::Screened,
        "int8" => Head::Int8,
        other => return Err(format!("--head {other}: expected full, screened or int8").into()),
    };
    let options = DeviceOptions {
        device: device.parse::<DeviceName>()?,
        threads: arguments.value("--threads").map(str::parse).transpose()?,
        eager: arguments.has("--eager"),
        unfused: arguments.has("--unfused"),
        head,
        ..DeviceOptions::default()
    };
    let source = SyntheticModel::new(shape(&model)?, 1)?;
    let bench = Bench { options, model, source, kv_type, arguments };
    let soak: usize = bench.arguments.number("--soak", 0)?;
    if bench.arguments.has("--invariance") {
        return invariance::run(&bench);
    }
    if soak > 0 {
        return soak::run(&bench, soak);
    }
    bench.decode()?;
    bench.prompts()
}
