//! `trine bench`: llama-bench's tests, with the share of the memory bandwidth that was reached.

use std::time::Instant;

use clap::{ArgAction, Args, ValueEnum};
use trine::backend::KvType;
use trine::backend::select::DeviceName;
use trine::engine::{SamplingParams, Session};
use trine::model::config::ModelConfig;

use super::args::{AnyModelArgs, RunArgs, load};
use super::bench_power::Meter;
use super::bench_report::{About, Host, Loaded, Report, Row, Sample, Test};
use super::failure::bad_input;
use super::output;
use super::parse;

/// Measure prompt and decode speed with llama-bench's tests
///
/// ppN runs a prompt of N random tokens from an empty cache, tgN decodes N tokens one by one; both
/// at a depth of tokens that are in the cache already (-d). The time is that of the forward passes
/// with the output head for the last token of each, taking the likeliest token included;
/// tokenising, detokenising and sampling options are not part of it. Tests run once to warm up and
/// then -r times.
///
/// The share of the limit is, for tg, the bytes of weights, output head and KV cache that a token
/// reads, times tokens per second, divided by the bandwidth at which the same threads read memory;
/// for pp, the multiplications by weights, divided by the rate at which the same threads multiply
/// int8. Both limits are measured by this command once the model is loaded. On a GPU the limit is
/// the bandwidth at which it copies its own memory, bytes read and written counted, and there is
/// none for pp. What a GPU's host does is counted too, per token of the test: kernels launched,
/// submissions, and the time that enqueueing took.
///
/// An NVIDIA GPU through CUDA also has energy per token (J/t), the clock of its multiprocessors at
/// the end of a run, the lowest of all runs, and what held clocks down, as NVML tells them.
#[derive(Args)]
#[command(after_help = "\
Examples:
  trine bench --synthetic 2b4t
  trine bench -m models/bitnet-b1.58-2B-4T -p 128,512 -n 0 -t 1,2,4 -o csv
  trine bench --device wgpu,cpu -p 64 -n 32
  trine bench --synthetic 8b -r 3 -o json > 8b.json")]
pub(crate) struct Bench {
    #[command(flatten)]
    model: AnyModelArgs,
    /// Device: auto, cpu, cuda[:N] or wgpu[:N|NAME]; several with commas
    #[arg(long, value_name = "DEVICE,…", value_delimiter = ',', default_value = "auto")]
    #[arg(value_parser = parse::device)]
    device: Vec<DeviceName>,
    /// Threads of the CPU; several with commas [default: one for each physical core]
    #[arg(short, long, value_name = "N,…", value_delimiter = ',', value_parser = parse::threads)]
    threads: Vec<usize>,
    /// Tokens of the prompts, several with commas; 0 for no such test [default: 512]
    #[arg(short = 'p', long, value_name = "N,…", value_delimiter = ',')]
    #[arg(value_parser = parse::whole::<usize>)]
    n_prompt: Vec<usize>,
    /// Tokens to decode, several with commas; 0 for no such test [default: 128]
    #[arg(short = 'n', long, value_name = "N,…", value_delimiter = ',')]
    #[arg(value_parser = parse::whole::<usize>)]
    n_gen: Vec<usize>,
    /// Tokens in the cache before a test begins, several with commas
    #[arg(short = 'd', long, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    #[arg(value_parser = parse::whole::<usize>)]
    n_depth: Vec<usize>,
    /// How often each test is measured
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = parse::positive)]
    repetitions: usize,
    /// Leave out the run that warms up
    #[arg(long)]
    no_warmup: bool,
    /// Format of the results
    #[arg(short, long, value_name = "FORMAT", value_enum, default_value = "md")]
    output: Format,
    /// The same as -o json
    #[arg(long, action = ArgAction::SetTrue, conflicts_with = "output")]
    json: bool,
    #[command(flatten)]
    run: RunArgs,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

/// Prompt and decode lengths of llama-bench.
const PROMPT: usize = 512;
const DECODE: usize = 128;

impl Bench {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let files = self.model.open()?;
        let tests = self.tests(files.config())?;
        let context = tests.iter().map(Test::context).max().unwrap_or(1);
        let format = if self.json { Format::Json } else { self.output };
        let gpus =
            self.device.iter().any(|d| matches!(d, DeviceName::Cuda(_) | DeviceName::Wgpu(_)));
        let cuda = self.device.iter().any(|device| matches!(device, DeviceName::Cuda(_)));
        let mut report = Report::new(format, gpus, cuda);
        let threads: Vec<Option<usize>> = match self.threads.as_slice() {
            [] => vec![None],
            given => given.iter().copied().map(Some).collect(),
        };
        let mut files = Some(files);
        for device in &self.device {
            for &threads in &threads {
                let options = (self.run.options(KvType::F16).device(device.clone()))
                    .threads(threads)
                    .context(Some(context));
                let started = Instant::now();
                let files = files.take().map_or_else(|| self.model.open(), Ok)?;
                let kv_type = self.run.kv_type(KvType::F16);
                let about = About::new(&files, self.path(), kv_type, self.run.head.kind());
                let mut model = load(files, &options)?;
                let loaded = Loaded::new(&model, threads, started.elapsed())?;
                for &test in &tests {
                    let samples = self.measure(&mut model.session, &loaded.meter, test)?;
                    report.add(Row::new(&about, &loaded, test, &samples))?;
                }
                if !loaded.is_cpu() {
                    break; // Threads are the CPU's.
                }
            }
        }
        report.finish()
    }

    fn path(&self) -> String {
        match (&self.model.synthetic, &self.model.model.model) {
            (Some(name), _) => format!("synthetic:{name}"),
            (None, Some(path)) => path.display().to_string(),
            (None, None) => "demo".into(),
        }
    }

    /// The tests asked for, or llama-bench's as far as the model's context goes.
    fn tests(&self, config: &ModelConfig) -> anyhow::Result<Vec<Test>> {
        let fitting = |length: usize, fits: &dyn Fn(usize) -> bool| {
            let mut length = length;
            while length > 1 && !fits(length) {
                length /= 2;
            }
            vec![length]
        };
        let deepest = self.n_depth.iter().copied().max().unwrap_or(0);
        let fits =
            |prompt, decode| Test { prompt, decode, depth: deepest }.context() <= config.context;
        let prompts = match self.n_prompt.as_slice() {
            [] => fitting(PROMPT, &|length| fits(length, 0)),
            given => given.to_vec(),
        };
        let decodes = match self.n_gen.as_slice() {
            [] => fitting(DECODE, &|length| fits(0, length)),
            given => given.to_vec(),
        };
        let mut tests = Vec::new();
        for &depth in &self.n_depth {
            let of_prompt = prompts.iter().map(|&prompt| Test { prompt, decode: 0, depth });
            let of_decode = decodes.iter().map(|&decode| Test { prompt: 0, decode, depth });
            tests.extend(of_prompt.chain(of_decode).filter(|test| test.tokens() > 0));
        }
        if tests.is_empty() {
            return Err(bad_input("no tests: expected -p or -n above 0, found 0 for both"));
        }
        if let Some(test) = tests.iter().find(|test| test.context() > config.context) {
            return Err(bad_input(format!(
                "{}: needs a context of {} tokens, expected at most the model's own, {}",
                test.name(),
                test.context(),
                config.context
            )));
        }
        Ok(tests)
    }

    fn measure(
        &self,
        session: &mut Session,
        meter: &Meter,
        test: Test,
    ) -> anyhow::Result<Vec<Sample>> {
        let name = test.name();
        if !self.no_warmup {
            output::note(format_args!("{name}: warming up"));
            run_test(session, meter, test)?;
        }
        (1..=self.repetitions)
            .map(|repetition| {
                let sample = run_test(session, meter, test)?;
                let rate = output::rate(test.tokens(), sample.time).unwrap_or(0.0);
                let of = self.repetitions;
                output::note(format_args!("{name}: {repetition} of {of}: {rate:.2} t/s"));
                Ok(sample)
            })
            .collect()
    }
}

/// Runs a test once, from an empty cache.
fn run_test(session: &mut Session, meter: &Meter, test: Test) -> anyhow::Result<Sample> {
    session.reset();
    // A decode step has one token of its own: the first one's is the prompt.
    let prompt = random_tokens(test.depth + test.prompt.max(1), session.config().vocabulary);
    if test.depth > 0 {
        generate(session, meter, &prompt[..test.depth], 1)?;
    }
    generate(session, meter, &prompt, test.decode.max(1))
}

/// Runs a prompt and takes `count` tokens; what that took.
fn generate(
    session: &mut Session,
    meter: &Meter,
    prompt: &[u32],
    count: usize,
) -> anyhow::Result<Sample> {
    let params = SamplingParams { max_tokens: Some(count), ..SamplingParams::default() };
    let before = session.executor().stats();
    let joules = meter.joules();
    let started = Instant::now();
    for event in session.generate(prompt, &params)? {
        event?;
    }
    let time = started.elapsed();
    let power = meter.since(joules);
    let host = before.zip(session.executor().stats()).map(|(before, after)| Host {
        dispatches: after.dispatches - before.dispatches,
        submits: after.submits - before.submits,
        seconds: after.host_seconds - before.host_seconds,
    });
    Ok(Sample { time, host, power })
}

/// The same tokens at every run (a linear congruential generator's high bits).
fn random_tokens(count: usize, vocabulary: usize) -> Vec<u32> {
    let mut state = 1u64;
    std::iter::repeat_with(|| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary as u64) as u32
    })
    .take(count)
    .collect()
}

impl Test {
    /// Tokens that the cache must hold, and one more that a session keeps free for an answer.
    fn context(&self) -> usize {
        self.depth + self.prompt.max(1) + self.decode.max(1)
    }
}
