//! Flags that several commands share, and what they mean to the library.

use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, ValueEnum};
use trine::backend::select::DeviceName;
use trine::backend::{Head, KvType};
use trine::engine::{LoadedModel, ModelFiles, ModelOptions, ModelSource, SamplingParams};
use trine::error::{LoadError, SubmitError};

use super::failure::bad_input;
use super::output;
use super::parse::{self, AdapterArg, Limit, Seed};

/// Which model.
#[derive(Args, Debug)]
pub(crate) struct ModelArgs {
    /// Checkpoint: a folder as Hugging Face writes it, or a weight file; without it the demo model
    ///
    /// A LoRA adapter, too, if its adapter_config.json says where on this machine its base is.
    #[arg(short, long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,
    /// LoRA adapter: a folder as PEFT saves it, applied SCALE times; may be repeated
    #[arg(long, value_name = "PATH[:SCALE]", value_parser = parse::adapter)]
    #[arg(action = ArgAction::Append)]
    pub(crate) lora: Vec<AdapterArg>,
}

impl ModelArgs {
    /// Opens the model's files.
    pub(crate) fn open(&self) -> anyhow::Result<ModelFiles> {
        self.open_as(&self.source())
    }

    fn open_as(&self, source: &ModelSource) -> anyhow::Result<ModelFiles> {
        let mut files = ModelFiles::open(source)?;
        for AdapterArg { path, scale } in &self.lora {
            files.add_adapter(path, *scale)?;
        }
        Ok(files)
    }

    fn source(&self) -> ModelSource {
        self.model.clone().map_or(ModelSource::Demo, ModelSource::Path)
    }
}

/// Which model, where a random one will do.
#[derive(Args, Debug)]
pub(crate) struct AnyModelArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// A random model of a published shape, the same at every run: 2b4t, 3b, 8b, 100b, …
    ///
    /// Checkpoints: 2b4t; 0.7b, 1.3b, 3b (1bitLLM); 8b (Llama3-8B-1.58); falcon3-1b, -3b, -7b, -10b;
    /// falcon-e-1b, -3b; embedding-0.6b, -270m. Sizes that bitnet.cpp's papers measured: 125m, 350m, 1b,
    /// 1.5b, 2.7b, 3.8b, 7b, 13b, 30b, 70b, 100b.
    #[arg(long, value_name = "SHAPE", conflicts_with = "model")]
    pub(crate) synthetic: Option<String>,
}

impl AnyModelArgs {
    /// Whether a model is named, and not only meant.
    pub(crate) fn is_named(&self) -> bool {
        self.synthetic.is_some() || self.model.model.is_some()
    }

    /// Opens the model's files, if it has any.
    pub(crate) fn open(&self) -> anyhow::Result<ModelFiles> {
        self.open_at(None)
    }

    /// Opens the files of the model at a path, if one is given in place of the flags.
    pub(crate) fn open_at(&self, path: Option<&Path>) -> anyhow::Result<ModelFiles> {
        let synthetic = || self.synthetic.clone().map(ModelSource::Synthetic);
        let source = path.map(|path| ModelSource::Path(path.to_owned())).or_else(synthetic);
        self.model.open_as(&source.unwrap_or_else(|| self.model.source()))
    }
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kv {
    F32,
    F16,
    Int8,
}

impl Kv {
    fn kind(self) -> KvType {
        match self {
            Self::F32 => KvType::F32,
            Self::F16 => KvType::F16,
            Self::Int8 => KvType::Int8,
        }
    }
}

/// Output head.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum HeadArg {
    #[default]
    Full,
    Screened,
    Int8,
}

impl HeadArg {
    pub(crate) fn kind(self) -> Head {
        match self {
            Self::Full => Head::Full,
            Self::Screened => Head::Screened,
            Self::Int8 => Head::Int8,
        }
    }
}

/// How much room prompt and answer have.
#[derive(Args, Debug)]
pub(crate) struct ContextArgs {
    /// Tokens of prompt and answer together [default: the model's own, at most 4096]
    #[arg(short, long, alias = "ctx-size", value_name = "N", value_parser = parse::positive)]
    pub(crate) context: Option<usize>,
}

/// Where and how the model runs.
#[derive(Args, Debug)]
pub(crate) struct DeviceArgs {
    /// Device: auto, cpu, cuda[:N] or wgpu[:N|NAME]; trine devices lists them
    ///
    /// A device that is named is used, or refused with the reason. auto takes the first GPU of this
    /// machine that the model loads on, never one that a CPU imitates, else the CPU.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse::device)]
    pub(crate) device: DeviceName,
    /// Threads of the CPU [default: one for each physical core]
    #[arg(short, long, value_name = "N", value_parser = parse::threads)]
    pub(crate) threads: Option<usize>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// How the model runs, whatever the device and threads.
#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// Element type of the KV cache [default: f32 for score and perplexity, else f16]
    #[arg(long, value_name = "TYPE", value_enum)]
    pub(crate) kv: Option<Kv>,
    /// Output head: full; screened finds the best tokens of few rows with fewer reads and the same
    /// result (CUDA); int8 reads half, and its logits differ (CUDA)
    #[arg(long, value_name = "HEAD", value_enum, default_value = "full")]
    pub(crate) head: HeadArg,
    /// Check every op against the reference and stop at the first that disagrees; slow
    #[arg(long)]
    pub(crate) check: bool,
    /// Never replay a recorded step (for finding faults; the CPU never does)
    #[arg(long)]
    pub(crate) eager: bool,
    /// Run every op as a kernel of its own (for finding faults; the CPU always does)
    #[arg(long)]
    pub(crate) unfused: bool,
}

impl RunArgs {
    /// The type that the user names, or `default`.
    pub(crate) fn kv_type(&self, default: KvType) -> KvType {
        self.kv.map_or(default, Kv::kind)
    }

    /// Options to load a model with; `kv` is the type unless the user names one.
    pub(crate) fn options(&self, kv: KvType) -> ModelOptions {
        let options = ModelOptions::default().check(self.check).eager(self.eager);
        options.unfused(self.unfused).head(self.head.kind()).kv_type(self.kv_type(kv))
    }
}

impl DeviceArgs {
    /// Options to load a model with; `kv` is the type unless the user names one.
    pub(crate) fn options(&self, context: Option<usize>, kv: KvType) -> ModelOptions {
        let options = self.run.options(kv).device(self.device.clone());
        options.threads(self.threads).context(context)
    }
}

/// Loads a model behind a progress bar, and says where it runs if that is no device of its own.
pub(crate) fn load(files: ModelFiles, options: &ModelOptions) -> anyhow::Result<LoadedModel> {
    let model = load_silently(files, options)?;
    let device = model.session.executor().device();
    if device.software {
        output::note(format_args!("{} is {}", device.name, device.description));
    }
    Ok(model)
}

/// Loads a model behind a progress bar.
pub(crate) fn load_silently(
    files: ModelFiles,
    options: &ModelOptions,
) -> Result<LoadedModel, LoadError> {
    let bar = output::bar("loading");
    let progress = &mut |done, total| output::advance(&bar, done, total);
    let loaded = LoadedModel::load(files, options, progress);
    bar.finish_and_clear();
    loaded
}

/// How the next token is picked. What is not given comes from the checkpoint's
/// `generation_config.json`, else it is off and the temperature 0.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// 0 always takes the likeliest token; higher is more varied
    #[arg(long, alias = "temp", value_name = "T", value_parser = parse::number)]
    #[arg(allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K", value_parser = parse::whole::<u32>)]
    top_k: Option<u32>,
    /// Keep the likeliest tokens whose probabilities reach P; 1 keeps all
    #[arg(long, value_name = "P", value_parser = parse::number, allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Keep tokens with at least P times the highest probability; 0 keeps all
    #[arg(long, value_name = "P", value_parser = parse::number, allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Makes tokens of prompt and answer less likely; 1 is off
    #[arg(long, alias = "repeat-penalty", value_name = "F", value_parser = parse::number)]
    #[arg(allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it is in the answer; 0 is off
    #[arg(long, value_name = "F", value_parser = parse::number, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Subtracted from a token's logit if it is in the answer; 0 is off
    #[arg(long, value_name = "F", value_parser = parse::number, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Adds BIAS to the logit of a token, as TOKEN=BIAS; may be repeated
    #[arg(long, value_name = "TOKEN=BIAS", value_parser = parse::bias, action = ArgAction::Append)]
    logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same answer [default: a random one, which is printed]
    #[arg(short, long, value_name = "N", value_parser = parse::seed)]
    #[arg(allow_negative_numbers = true)]
    seed: Option<Seed>,
    /// Text that ends the answer and is not part of it; may be repeated
    #[arg(long, value_name = "TEXT", action = ArgAction::Append, allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Token that ends the answer, besides the checkpoint's; may be repeated
    #[arg(long, value_name = "ID", value_parser = parse::whole::<u32>, action = ArgAction::Append)]
    stop_token: Vec<u32>,
    /// Go on after the checkpoint's end tokens
    #[arg(long)]
    ignore_eos: bool,
}

impl SamplingArgs {
    /// The options in force: those given here, else the checkpoint's.
    pub(crate) fn params(
        &self,
        defaults: &SamplingParams,
        max_tokens: Option<Limit>,
        vocabulary: usize,
    ) -> anyhow::Result<SamplingParams> {
        let mut params = defaults.clone();
        let set = |target: &mut f32, given: Option<f32>| *target = given.unwrap_or(*target);
        set(&mut params.temperature, self.temperature);
        set(&mut params.top_p, self.top_p);
        set(&mut params.min_p, self.min_p);
        set(&mut params.repetition_penalty, self.repetition_penalty);
        set(&mut params.frequency_penalty, self.frequency_penalty);
        set(&mut params.presence_penalty, self.presence_penalty);
        params.top_k = self.top_k.unwrap_or(params.top_k);
        params.logit_bias = self.logit_bias.clone();
        params.seed = self.seed.and_then(|seed| seed.0);
        params.stop = self.stop.clone();
        if self.ignore_eos {
            params.stop_tokens.clear();
        }
        params.stop_tokens.extend(&self.stop_token);
        if let Some(limit) = max_tokens {
            params.max_tokens = limit.0;
        }
        if let Some(&id) = self.stop_token.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(bad_input(format!(
                "--stop-token: expected a token below the vocabulary, {vocabulary}, found {id}"
            )));
        }
        params.validate(vocabulary).map_err(in_flags)?;
        Ok(params)
    }
}

/// The refusal of an option in the words of the command line.
fn in_flags(error: SubmitError) -> anyhow::Error {
    match error {
        SubmitError::Invalid { field, expected, found } => {
            let flag = field.replace('_', "-");
            bad_input(format!("--{flag}: expected {expected}, found {found}"))
        }
        other => other.into(),
    }
}
