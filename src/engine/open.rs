//! From a model's name to text: the shortest way through the library.
//!
//! ```no_run
//! use trine::engine::{ModelOptions, SamplingParams};
//!
//! let mut model = ModelOptions::path("models/bitnet-b1.58-2B-4T").load(&mut |_, _| {})?;
//! let params = SamplingParams {
//!     max_tokens: Some(64),
//!     stop: vec!["\n\n".into()],
//!     ..model.defaults.clone()
//! };
//! for event in model.generate_text("Shall I compare thee", &params)? {
//!     print!("{}", event?.text());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::path::{Path, PathBuf};

use super::sampling::SamplingParams;
use super::session::Session;
use super::text_stream::TextStream;
use crate::backend::KvType;
use crate::backend::select::DeviceName;
use crate::checkpoint::synthetic::{self, SyntheticModel};
use crate::checkpoint::{self, Checkpoint, GenerationDefaults, TokenizerFiles};
use crate::error::{LoadError, SubmitError};
use crate::model::activations::Reserve;
use crate::model::config::ModelConfig;
use crate::model::open::{DeviceOptions, open};
use crate::model::weights::WeightSource;
use crate::text::{ChatOptions, ChatTemplate, Message, Special, Tokenizer, TokenizerOptions};

/// Tokens of context that are reserved unless more are asked for: memory for the KV cache grows
/// with them, and most models were trained on as many.
pub const DEFAULT_CONTEXT: usize = 4096;

/// Tokens that a step may bring: enough rows to keep the kernels busy, few enough that activations
/// stay small and a long prompt can be given up between steps.
pub const STEP_TOKENS: usize = 256;

/// The most sequences that may be reserved.
const MAX_SEQUENCES: usize = 1024;

/// Seed of the synthetic models: the same model at every run.
const SYNTHETIC_SEED: u64 = 0x7e1e;

/// Tokens that end a speaker's turn, where the chat template writes them. Some checkpoints forget
/// to list them among their end tokens.
const END_OF_TURN: &[&str] =
    &["<|eot_id|>", "<|im_end|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>"];

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModelSource {
    /// The demo model that is part of the program.
    #[cfg(feature = "cli")]
    Demo,
    /// A checkpoint; see [`checkpoint::open`].
    Path(PathBuf),
    /// A random model of a published shape, by a name of [`synthetic::PUBLISHED`]. It has no
    /// tokenizer and is the same at every run.
    Synthetic(String),
}

/// Which model to load, where, and how much memory to reserve for its work.
#[derive(Debug, Clone)]
#[must_use]
pub struct ModelOptions {
    source: ModelSource,
    device: DeviceOptions,
    context: Option<usize>,
    sequences: usize,
    step_tokens: usize,
    kv_type: KvType,
}

impl ModelOptions {
    /// Any source, with the defaults that the methods below name.
    pub fn new(source: ModelSource) -> Self {
        Self {
            source,
            device: DeviceOptions::default(),
            context: None,
            sequences: 1,
            step_tokens: STEP_TOKENS,
            kv_type: KvType::F16,
        }
    }

    /// A checkpoint on disk.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self::new(ModelSource::Path(path.into()))
    }

    /// The demo model that is part of the program.
    #[cfg(feature = "cli")]
    pub fn demo() -> Self {
        Self::new(ModelSource::Demo)
    }

    /// A random model of a published shape.
    pub fn synthetic(name: impl Into<String>) -> Self {
        Self::new(ModelSource::Synthetic(name.into()))
    }

    /// The device; [`DeviceName::Auto`] if not set.
    pub fn device(mut self, device: DeviceName) -> Self {
        self.device.device = device;
        self
    }

    /// Threads of the CPU backend; all cores if `None`.
    pub fn threads(mut self, threads: Option<usize>) -> Self {
        self.device.threads = threads;
        self
    }

    /// Check every op against the reference; the first that disagrees is named. Slow.
    pub fn check(mut self, check: bool) -> Self {
        self.device.check = check;
        self
    }

    /// Never replay a recording of a step.
    pub fn eager(mut self, eager: bool) -> Self {
        self.device.eager = eager;
        self
    }

    /// Tokens that prompt and answer may have together; the model's own context, at most
    /// [`DEFAULT_CONTEXT`], if `None`.
    pub fn context(mut self, context: Option<usize>) -> Self {
        self.context = context;
        self
    }

    /// Sequences that may run at a time, 1 if not set. They share the memory of one full context.
    pub fn sequences(mut self, sequences: usize) -> Self {
        self.sequences = sequences;
        self
    }

    /// Tokens that a step may bring, [`STEP_TOKENS`] if not set.
    pub fn step_tokens(mut self, step_tokens: usize) -> Self {
        self.step_tokens = step_tokens;
        self
    }

    /// Element type of the KV cache, f16 if not set.
    pub fn kv_type(mut self, kv_type: KvType) -> Self {
        self.kv_type = kv_type;
        self
    }

    /// Where the model comes from.
    pub fn source(&self) -> &ModelSource {
        &self.source
    }

    /// Opens the files and loads the model on its device. `progress` hears how many of how many
    /// matrices are packed.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, the options or the device, in a sentence.
    pub fn load(&self, progress: &mut dyn FnMut(usize, usize)) -> Result<LoadedModel, LoadError> {
        self.load_files(ModelFiles::open(&self.source)?, progress)
    }

    /// Loads files that were opened before; the source of the options does not matter.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, the options or the device, in a sentence.
    pub fn load_files(
        &self,
        files: ModelFiles,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<LoadedModel, LoadError> {
        let reserve = self.reserve(files.config())?;
        let executor = open(&self.device, files.weights(), reserve, progress)?;
        Ok(LoadedModel {
            session: Session::new(executor),
            tokenizer: files.tokenizer,
            chat: files.chat,
            defaults: files.defaults,
            bos: files.bos,
            name: files.name,
        })
    }

    /// What these options reserve for a model.
    ///
    /// # Errors
    ///
    /// An option that is out of its range.
    pub fn reserve(&self, config: &ModelConfig) -> Result<Reserve, LoadError> {
        let range = |option: &str, value: usize, most: usize, of: &str| {
            let bad = || LoadError::Option {
                option: option.into(),
                expected: format!("1 to {most}{of}"),
                found: value.to_string(),
            };
            if (1..=most).contains(&value) { Ok(value) } else { Err(bad()) }
        };
        let context = self.context.unwrap_or(config.context.min(DEFAULT_CONTEXT));
        let context = range("context", context, config.context, ", the model's own context")?;
        let sequences = range("sequences", self.sequences, MAX_SEQUENCES, "")?;
        let step_tokens = range("step_tokens", self.step_tokens, 1 << 16, "")?.max(sequences);
        let mut reserve =
            Reserve { context, sequences, step_tokens, kv_pages: 0, kv_type: self.kv_type };
        // One full context to share, and for each further sequence the page that it cannot fill.
        reserve.kv_pages = reserve.max_pages() + sequences - 1;
        Ok(reserve)
    }
}

/// A model's files, opened and checked: everything that needs no device.
#[derive(Debug)]
#[non_exhaustive]
pub struct ModelFiles {
    /// The tokenizer, if the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, if the checkpoint has one.
    pub chat: Option<ChatTemplate>,
    /// The checkpoint's sampling options and end tokens; see [`sampling_defaults`].
    pub defaults: SamplingParams,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// What to call the model.
    pub name: String,
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Checkpoint(Box<Checkpoint>),
    Synthetic(SyntheticModel),
}

impl ModelFiles {
    /// Opens the files of a model.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with them, in a sentence that names the file.
    pub fn open(source: &ModelSource) -> Result<Self, LoadError> {
        match source {
            #[cfg(feature = "cli")]
            ModelSource::Demo => Self::from_checkpoint(checkpoint::demo::open()?),
            ModelSource::Path(path) if path.as_os_str().is_empty() => Err(LoadError::Option {
                option: "model".into(),
                expected: "the path of a checkpoint".into(),
                found: "an empty one".into(),
            }),
            ModelSource::Path(path) => Self::from_checkpoint(checkpoint::open(path)?),
            ModelSource::Synthetic(name) => Self::synthetic(name),
        }
    }

    /// Takes a checkpoint that was opened before.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with its tokenizer, chat template or sampling options.
    pub fn from_checkpoint(checkpoint: Checkpoint) -> Result<Self, LoadError> {
        let files = checkpoint.tokenizer();
        let tokenizer = read_tokenizer(files, checkpoint.config().vocabulary)?;
        let bos_token = files.bos_token.as_deref();
        let chat = (files.chat_template.as_deref())
            .map(|template| {
                let file = files.tokenizer_path.with_file_name("chat_template");
                ChatTemplate::new(&file, template, bos_token, files.eos_token.as_deref())
            })
            .transpose()?;
        let mut defaults = sampling_defaults(checkpoint.generation());
        if let Some(tokenizer) = &tokenizer {
            let template = files.chat_template.as_deref().unwrap_or_default();
            let turns = END_OF_TURN.iter().filter(|text| template.contains(**text));
            let ends = turns.filter_map(|text| tokenizer.token_id(text)).chain(tokenizer.eos_id());
            for id in ends {
                if !defaults.stop_tokens.contains(&id) {
                    defaults.stop_tokens.push(id);
                }
            }
        }
        check_defaults(&defaults, &checkpoint)?;
        let vocabulary = checkpoint.config().vocabulary;
        let bos = tokenizer.as_ref().and_then(Tokenizer::bos_id);
        let bos = bos.or(checkpoint.generation().bos_token_id);
        Ok(Self {
            tokenizer,
            chat,
            defaults,
            bos: bos.filter(|&id| (id as usize) < vocabulary),
            name: checkpoint.summary().path.display().to_string(),
            weights: Weights::Checkpoint(Box::new(checkpoint)),
        })
    }

    fn synthetic(name: &str) -> Result<Self, LoadError> {
        let config = synthetic::published(name).ok_or_else(|| LoadError::Option {
            option: "synthetic".into(),
            expected: synthetic::PUBLISHED.join(", "),
            found: format!("{name:?}"),
        })?;
        Ok(Self {
            tokenizer: None,
            chat: None,
            defaults: SamplingParams::default(),
            bos: None,
            name: format!("synthetic {name}"),
            weights: Weights::Synthetic(SyntheticModel::new(config, SYNTHETIC_SEED)?),
        })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        self.weights().config()
    }

    /// The weights.
    pub fn weights(&self) -> &dyn WeightSource {
        match &self.weights {
            Weights::Checkpoint(checkpoint) => &**checkpoint,
            Weights::Synthetic(model) => model,
        }
    }

    /// The checkpoint; `None` for a synthetic model.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match &self.weights {
            Weights::Checkpoint(checkpoint) => Some(checkpoint),
            Weights::Synthetic(_) => None,
        }
    }

    /// The tokenizer, or a refusal.
    ///
    /// # Errors
    ///
    /// A checkpoint without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, SubmitError> {
        tokenizer_of(&self.tokenizer, &self.name)
    }
}

/// A model on its device with everything that turns text into tokens and back.
#[non_exhaustive]
pub struct LoadedModel {
    /// Runs prompts.
    pub session: Session,
    /// The tokenizer, if the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, if the checkpoint has one.
    pub chat: Option<ChatTemplate>,
    /// The checkpoint's sampling options and end tokens: what a request should start from.
    pub defaults: SamplingParams,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// What to call the model.
    pub name: String,
}

impl LoadedModel {
    /// The tokenizer, or a refusal.
    ///
    /// # Errors
    ///
    /// A checkpoint without one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, SubmitError> {
        tokenizer_of(&self.tokenizer, &self.name)
    }

    /// Continues a text. The text of control tokens in it is plain text ([`Special::PROMPT`]).
    ///
    /// # Errors
    ///
    /// A prompt or an option that is refused, before any work is done.
    pub fn generate_text(
        &mut self,
        prompt: &str,
        params: &SamplingParams,
    ) -> Result<TextStream<'_>, SubmitError> {
        let ids = self.tokenizer()?.encode(prompt, Special::PROMPT)?;
        self.generate_ids(&ids, params)
    }

    /// Answers a conversation. Only what follows the tokens that this one shares with the last
    /// request is computed.
    ///
    /// # Errors
    ///
    /// A conversation or an option that is refused, before any work is done.
    pub fn generate_chat(
        &mut self,
        messages: &[Message],
        params: &SamplingParams,
    ) -> Result<TextStream<'_>, SubmitError> {
        let template = self.chat.as_ref().ok_or_else(ChatTemplate::missing)?;
        let ids = self.tokenizer()?.encode_chat(template, messages, &ChatOptions::generate())?;
        self.generate_ids(&ids, params)
    }

    /// Continues tokens.
    ///
    /// # Errors
    ///
    /// A token or an option that is refused, before any work is done.
    pub fn generate_ids(
        &mut self,
        ids: &[u32],
        params: &SamplingParams,
    ) -> Result<TextStream<'_>, SubmitError> {
        let tokenizer = tokenizer_of(&self.tokenizer, &self.name)?;
        let generation = self.session.generate(ids, params)?;
        Ok(TextStream::new(generation, tokenizer, &params.stop))
    }
}

/// Sampling options from a checkpoint's `generation_config.json`, and its end tokens.
///
/// What the file does not say is off: no top-k, top-p or min-p, no penalties, no limit but the
/// context. The temperature is the file's; 0 (greedy) if the file says `do_sample: false` or
/// nothing at all, 1 if it says `do_sample: true` and no temperature. `max_new_tokens` limits the
/// answer; `max_length` does not.
pub fn sampling_defaults(file: &GenerationDefaults) -> SamplingParams {
    let off = SamplingParams::default();
    let temperature = match (file.do_sample, file.temperature) {
        (Some(false), _) | (None, None) => 0.0,
        (_, Some(temperature)) => temperature,
        (Some(true), None) => 1.0,
    };
    SamplingParams {
        temperature,
        top_k: file.top_k.unwrap_or(off.top_k),
        top_p: file.top_p.unwrap_or(off.top_p),
        min_p: file.min_p.unwrap_or(off.min_p),
        repetition_penalty: file.repetition_penalty.unwrap_or(off.repetition_penalty),
        max_tokens: file.max_new_tokens,
        stop_tokens: file.eos_token_ids.clone(),
        ..off
    }
}

/// A file may ask for what the sampler does not do, such as a temperature of 1e-30.
fn check_defaults(defaults: &SamplingParams, checkpoint: &Checkpoint) -> Result<(), LoadError> {
    let file = checkpoint.tokenizer().tokenizer_path.with_file_name("generation_config.json");
    defaults.validate(checkpoint.config().vocabulary).map_err(|error| match error {
        SubmitError::Invalid { field, expected, found } => {
            LoadError::invalid(&file, field, expected, found)
        }
        other => LoadError::invalid(&file, "sampling", "options in range", other.to_string()),
    })
}

fn read_tokenizer(
    files: &TokenizerFiles,
    vocabulary: usize,
) -> Result<Option<Tokenizer>, LoadError> {
    let Some(json) = &files.tokenizer_json else { return Ok(None) };
    let options = TokenizerOptions {
        bos_token: files.bos_token.clone(),
        eos_token: files.eos_token.clone(),
        add_bos_token: files.add_bos_token,
    };
    let file: &Path = &files.tokenizer_path;
    let tokenizer = Tokenizer::from_json_with(file, json, &options)?;
    if tokenizer.vocabulary_size() > vocabulary {
        return Err(LoadError::invalid(
            file,
            "model.vocab",
            format!("token ids below the {vocabulary} rows of the embedding table"),
            format!("id {}", tokenizer.vocabulary_size() - 1),
        ));
    }
    Ok(Some(tokenizer))
}

fn tokenizer_of<'t>(
    tokenizer: &'t Option<Tokenizer>,
    name: &str,
) -> Result<&'t Tokenizer, SubmitError> {
    tokenizer.as_ref().ok_or_else(|| {
        let found = format!("{name}, which has none");
        SubmitError::invalid("text", "a model with a tokenizer.json", found)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temperatures_follow_do_sample() {
        let temperature = |do_sample, temperature| {
            let mut file = GenerationDefaults::default();
            (file.do_sample, file.temperature) = (do_sample, temperature);
            sampling_defaults(&file).temperature
        };
        assert_eq!(temperature(None, None), 0.0);
        assert_eq!(temperature(Some(false), Some(0.6)), 0.0);
        assert_eq!(temperature(Some(true), Some(0.6)), 0.6);
        assert_eq!(temperature(Some(true), None), 1.0);
        assert_eq!(temperature(None, Some(0.6)), 0.6);
    }

    #[test]
    fn a_reserve_holds_one_full_context() {
        let config = synthetic::published("2b4t").unwrap();
        let options = ModelOptions::synthetic("2b4t");
        let reserve = options.clone().sequences(16).reserve(&config).unwrap();
        assert_eq!((reserve.context, reserve.kv_pages), (4096, 128 + 15));
        let error = options.clone().context(Some(4097)).reserve(&config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "option context: expected 1 to 4096, the model's own context, found 4097"
        );
        assert!(options.context(Some(0)).reserve(&config).is_err());
    }

    #[test]
    fn an_unknown_shape_is_refused() {
        let source = ModelSource::Synthetic("70b".into());
        let error = ModelFiles::open(&source).unwrap_err().to_string();
        assert_eq!(error, "option synthetic: expected 2b4t, 3b, 8b, found \"70b\"");
    }
}
