//! From a model's name to text: the shortest way through the library.
//!
//! ```no_run
//! use trine::engine::{LoadedModel, ModelOptions, SamplingParams};
//!
//! let mut model = LoadedModel::open("models/demo", &ModelOptions::default())?;
//! let params =
//!     SamplingParams { max_tokens: Some(64), stop: vec!["\n\n".into()], ..model.defaults() };
//! for event in model.generate_text("Shall I compare thee", &params)? {
//!     print!("{}", event?.text());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::path::PathBuf;

use super::embed::Pooling;
use super::files::{ModelFiles, ModelSource, check_writes, tokenizer_of};
use super::sampling::SamplingParams;
use super::session::Session;
use super::text_stream::TextStream;
use crate::backend::select::DeviceName;
use crate::backend::{Head, KvType};
use crate::checkpoint::DeclaredPooling;
use crate::error::{LoadError, RunError, SubmitError};
use crate::model::activations::Reserve;
use crate::model::config::ModelConfig;
use crate::model::open::{DeviceOptions, open};
use crate::text::{ChatOptions, ChatTemplate, Message, Special, Tokenizer};

/// Tokens of context that are reserved unless more are asked for: memory for the KV cache grows
/// with them, and most models were trained on as many.
pub const DEFAULT_CONTEXT: usize = 4096;

/// Tokens that a step may bring: enough rows to keep the kernels busy, few enough that activations
/// stay small and a long prompt can be given up between steps.
pub const STEP_TOKENS: usize = 256;

/// The most sequences that may be reserved.
const MAX_SEQUENCES: usize = 1024;

/// Where to load a model, and how much memory to reserve for its work.
#[derive(Debug, Clone)]
#[must_use]
pub struct ModelOptions {
    device: DeviceOptions,
    context: Option<usize>,
    sequences: usize,
    step_tokens: usize,
    kv_type: KvType,
    adapters: Vec<(PathBuf, f32)>,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            device: DeviceOptions::default(),
            context: None,
            sequences: 1,
            step_tokens: STEP_TOKENS,
            kv_type: KvType::F16,
            adapters: Vec::new(),
        }
    }
}

impl ModelOptions {
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

    /// Run every op as a kernel of its own, where a device fuses them otherwise.
    pub fn unfused(mut self, unfused: bool) -> Self {
        self.device.unfused = unfused;
        self
    }

    /// The output head, [`Head::Full`] if not set; the others are CUDA's.
    pub fn head(mut self, head: Head) -> Self {
        self.device.head = head;
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

    /// Applies a LoRA adapter, a folder as PEFT saves it, `scale` times when the model runs; several
    /// add up. See [`ModelFiles::add_adapter`].
    pub fn adapter(mut self, path: impl Into<PathBuf>, scale: f32) -> Self {
        self.adapters.push((path.into(), scale));
        self
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

/// A model on its device with everything that turns text into tokens and back.
#[non_exhaustive]
pub struct LoadedModel {
    /// Runs prompts.
    pub session: Session,
    /// The tokenizer, if the checkpoint has one.
    pub tokenizer: Option<Tokenizer>,
    /// The chat template, if the checkpoint has one.
    pub chat: Option<ChatTemplate>,
    defaults: SamplingParams,
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
}

impl LoadedModel {
    /// Opens a checkpoint on disk, as [`checkpoint::open`](crate::checkpoint::open) does, and loads
    /// it.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the files, the options or the device, in a sentence.
    pub fn open(path: impl Into<PathBuf>, options: &ModelOptions) -> Result<Self, LoadError> {
        Self::load(ModelFiles::open(&ModelSource::Path(path.into()))?, options, &mut |_, _| {})
    }

    /// Loads files that were opened before. `progress` hears how many of how many kernels and
    /// matrices are ready.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the weights, the options or the device, in a sentence.
    pub fn load(
        mut files: ModelFiles,
        options: &ModelOptions,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        for (path, scale) in &options.adapters {
            files.add_adapter(path, *scale)?;
        }
        let reserve = options.reserve(files.config())?;
        let executor = open(&options.device, files.weights(), reserve, progress)?;
        Ok(Self {
            session: Session::new(executor),
            tokenizer: files.tokenizer,
            chat: files.chat,
            defaults: files.defaults,
            bos: files.bos,
            name: files.name,
            embeds: files.embeds,
            embedding_end: files.embedding_end,
            pooling: files.pooling,
        })
    }

    /// The checkpoint's sampling options and end tokens: what a request should start from. See
    /// [`sampling_defaults`](super::files::sampling_defaults).
    pub fn defaults(&self) -> SamplingParams {
        self.defaults.clone()
    }

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

    /// The ids of a text that is to be embedded: its tokens, then those that end it.
    ///
    /// # Errors
    ///
    /// A text that is refused; a checkpoint without a tokenizer.
    pub fn embedding_ids(&self, text: &str) -> Result<Vec<u32>, SubmitError> {
        let mut ids = self.tokenizer()?.encode(text, Special::PROMPT)?;
        ids.extend(&self.embedding_end);
        Ok(ids)
    }

    /// The embeddings of texts, of length 1 each ([`Session::embed`]). Any model has them; those of
    /// one that was not made for it say little. `None` pools as the checkpoint says.
    ///
    /// ```no_run
    /// use trine::engine::{LoadedModel, ModelOptions};
    ///
    /// let mut model = LoadedModel::open("models/bitnet-embedding-0.6b", &ModelOptions::default())?;
    /// let found = model.embed_texts(&["a boat on a river", "a ship at sea"], None)?;
    /// let alike: f32 = found[0].iter().zip(&found[1]).map(|(a, b)| a * b).sum();
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// A text that is refused, or a pooling of the checkpoint that is not implemented, before any work
    /// is done; a failure of the device.
    pub fn embed_texts(
        &mut self,
        texts: &[impl AsRef<str>],
        pooling: impl Into<Option<Pooling>>,
    ) -> Result<Vec<Vec<f32>>, RunError> {
        let pooling = match pooling.into() {
            Some(pooling) => pooling,
            None => self.pooling.in_force().map_err(|_| {
                let expected = "last, mean or cls, named by the caller";
                SubmitError::invalid("pooling", expected, &self.pooling)
            })?,
        };
        let ids = texts
            .iter()
            .map(|text| self.embedding_ids(text.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        self.session.embed(&ids, pooling)
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
        check_writes(self.embeds, &self.name)?;
        let tokenizer = tokenizer_of(&self.tokenizer, &self.name)?;
        let generation = self.session.generate(ids, params)?;
        Ok(TextStream::new(generation, tokenizer, &params.stop))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::synthetic;

    #[test]
    fn a_reserve_holds_one_full_context() {
        let config = synthetic::published("2b4t").unwrap();
        let options = ModelOptions::default();
        let reserve = options.clone().sequences(16).reserve(&config).unwrap();
        assert_eq!((reserve.context, reserve.kv_pages), (4096, 128 + 15));
        let error = options.clone().context(Some(4097)).reserve(&config).unwrap_err();
        assert_eq!(
            error.to_string(),
            "option context: expected 1 to 4096, the model's own context, found 4097"
        );
        assert!(options.context(Some(0)).reserve(&config).is_err());
    }
}
