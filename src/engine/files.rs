//! A model's files, opened and checked: everything that needs no device.

use std::path::{Path, PathBuf};

use super::sampling::SamplingParams;
use crate::checkpoint::adapted::Adapted;
use crate::checkpoint::lora::{self, Adapter};
use crate::checkpoint::synthetic::{self, SyntheticModel};
use crate::checkpoint::{self, Checkpoint, DeclaredPooling, GenerationDefaults, TokenizerFiles};
use crate::error::{LoadError, SubmitError, shown};
use crate::model::config::{ModelConfig, NormRole, Projection};
use crate::model::weights::WeightSource;
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;
use crate::text::{ChatTemplate, Tokenizer};

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
    /// A checkpoint, see [`checkpoint::open`]; or an adapter, see [`lora`], whose base is where it
    /// says.
    Path(PathBuf),
    /// A random model of a published shape, by a name of [`synthetic::PUBLISHED`]. It has no
    /// tokenizer and is the same at every run.
    Synthetic(String),
}

/// A model's files: weights, tokenizer, chat template, sampling options.
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
    /// Whether the model is made to embed texts, and not to write any.
    pub embeds: bool,
    /// Tokens that end a text that is embedded.
    pub embedding_end: Vec<u32>,
    /// What the checkpoint says of pooling.
    pub pooling: DeclaredPooling,
    weights: Adapted<Weights>,
}

#[derive(Debug)]
enum Weights {
    Checkpoint(Box<Checkpoint>),
    Synthetic(SyntheticModel),
}

impl Weights {
    fn source(&self) -> &dyn WeightSource {
        match self {
            Self::Checkpoint(checkpoint) => &**checkpoint,
            Self::Synthetic(model) => model,
        }
    }
}

impl WeightSource for Weights {
    fn config(&self) -> &ModelConfig {
        self.source().config()
    }
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        self.source().ternary(layer, projection)
    }
    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        self.source().master(layer, projection)
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        self.source().norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.source().embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        self.source().head()
    }
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
            ModelSource::Path(path) if lora::is_adapter(path) => {
                let adapter = Adapter::open(path, 1.0)?;
                let base = checkpoint::open(&adapter.find_base()?)?;
                let mut files = Self::from_checkpoint(base)?;
                files.add(adapter)?;
                Ok(files)
            }
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
                let file = files.beside("chat_template");
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
        let embedding_end = tokenizer.as_ref().map_or(Vec::new(), |t| checkpoint.embedding_end(t));
        let bos = tokenizer.as_ref().and_then(Tokenizer::bos_id);
        let bos = bos.or(checkpoint.generation().bos_token_id);
        Ok(Self {
            tokenizer,
            chat,
            defaults,
            bos: bos.filter(|&id| (id as usize) < vocabulary),
            name: shown(&checkpoint.summary().path),
            embeds: checkpoint.embeds(),
            embedding_end,
            pooling: checkpoint.pooling().clone(),
            weights: Adapted::new(Weights::Checkpoint(Box::new(checkpoint))),
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
            embeds: false,
            embedding_end: Vec::new(),
            pooling: DeclaredPooling::Nothing,
            weights: Adapted::new(Weights::Synthetic(SyntheticModel::new(config, SYNTHETIC_SEED)?)),
        })
    }

    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        self.weights().config()
    }

    /// The weights, and what adapters add to them.
    pub fn weights(&self) -> &dyn WeightSource {
        &self.weights
    }

    /// Applies a LoRA adapter when the model runs, `scale` times; several add up. The model's own
    /// weights stay as they are. See [`lora`].
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the adapter or does not fit the model, in a sentence.
    pub fn add_adapter(&mut self, path: &Path, scale: f32) -> Result<(), LoadError> {
        let adapter = Adapter::open(path, scale)?;
        let warning = self.another_base(&adapter);
        // An adapter that does not fit is refused, and nothing else is said of it.
        self.add(adapter)?;
        if let Some(warning) = warning {
            tracing::warn!("{warning}");
        }
        Ok(())
    }

    /// What there is to say where an adapter was made for a model of another name.
    fn another_base(&self, adapter: &Adapter) -> Option<String> {
        let (base, checkpoint) = (adapter.base()?, self.checkpoint()?);
        let (folder, model) = (adapter.folder(), &checkpoint.summary().path);
        // A name of the hub, or a path of another machine: what both have is the last part.
        let named = |path: &Path| path.file_name().map(|name| name.to_ascii_lowercase());
        let path_of = |path: &Path| path.canonicalize().ok();
        let same = path_of(&folder.join(base)).is_some_and(|base| Some(base) == path_of(model))
            || named(Path::new(base)) == named(model);
        let (folder, model) = (shown(folder), shown(model));
        (!same).then(|| {
            format!("the adapter {folder} was made for {base:?} and is applied to {model}")
        })
    }

    fn add(&mut self, adapter: Adapter) -> Result<(), LoadError> {
        self.name += &format!(" + {}", shown(adapter.folder()));
        self.weights.add(adapter)
    }

    /// The adapters.
    pub fn adapters(&self) -> &[Adapter] {
        self.weights.adapters()
    }

    /// The checkpoint; `None` for a synthetic model.
    pub fn checkpoint(&self) -> Option<&Checkpoint> {
        match self.weights.base() {
            Weights::Checkpoint(checkpoint) => Some(checkpoint),
            Weights::Synthetic(_) => None,
        }
    }

    /// Refuses a model that has no head to write text with.
    ///
    /// # Errors
    ///
    /// A model that is made to embed texts.
    pub fn check_writes(&self) -> Result<(), SubmitError> {
        check_writes(self.embeds, &self.name)
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
    let file = checkpoint.tokenizer().beside("generation_config.json");
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
    let Some(tokenizer) = files.tokenizer()? else { return Ok(None) };
    let file: &Path = &files.tokenizer_path;
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

pub(super) fn check_writes(embeds: bool, name: &str) -> Result<(), SubmitError> {
    if !embeds {
        return Ok(());
    }
    let found = format!("{name}, which embeds texts and has no head; trine embed runs it");
    Err(SubmitError::invalid("model", "one that writes text", found))
}

pub(super) fn tokenizer_of<'t>(
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
    fn an_unknown_shape_is_refused() {
        let source = ModelSource::Synthetic("4b".into());
        let error = ModelFiles::open(&source).unwrap_err().to_string();
        assert!(
            error.starts_with("option synthetic: expected 2b4t, 0.7b, 1.3b, 3b, 8b, "),
            "{error}"
        );
        assert!(error.ends_with(", 70b, 100b, found \"4b\""), "{error}");
    }
}
