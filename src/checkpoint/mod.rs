//! From a path to a model's config, weights, tokenizer and sampling defaults.
//!
//! [`open`] reads a folder as Hugging Face's tools write it: `config.json`, `model.safetensors` or
//! shards with an index, and, where they are there, `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja` and `generation_config.json`; or a GGUF file, as llama.cpp's and
//! bitnet.cpp's tools write it. Weights stay in the memory map; [`Checkpoint`] hands them out as a
//! [`WeightSource`].
//!
//! Every error names the file, the field or tensor, what was expected and what was found. No file,
//! however broken, makes a reader panic or reserve memory for what the file only claims to hold.
//!
//! | module | what it reads |
//! |---|---|
//! | `files` | a folder, or named bytes in memory |
//! | `foreign` | files of other formats, to name them |
//! | `safetensors` | that container: headers, shards, named tensors |
//! | `hf` | a Hugging Face folder: `config.json`, tensors by role |
//! | `gguf` | a GGUF file: container, config, tensors by role, tokenizer |
//! | `tokenizer_files`, `generation_config` | text and sampling |
//! | `pooling` | which rows of a text become its embedding |
//! | [`lora`], [`adapted`] | LoRA adapters as PEFT saves them; a model with some of them |
//! | `demo` (feature `cli`) | the model that is part of the binary |
//! | [`synthetic`] | nothing: random models of published shapes |
//! | [`export`] | nothing: it writes |

pub mod adapted;
#[cfg(feature = "cli")]
pub mod demo;
pub mod export;
mod files;
mod foreign;
mod generation_config;
mod gguf;
mod hf;
mod json;
pub mod lora;
mod pooling;
mod safetensors;
mod scan;
mod summary;
pub mod synthetic;
mod tokenizer_files;

use std::path::Path;
use std::sync::Arc;

pub use files::Files;
pub use generation_config::GenerationDefaults;
pub use pooling::{DeclaredPooling, Pooling};
pub use summary::{ProjectionSummary, Summary, TensorSummary};
pub use tokenizer_files::TokenizerFiles;

use crate::error::LoadError;
use crate::model::config::{ModelConfig, NormRole, Projection};
use crate::model::weights::WeightSource;
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;
use crate::text::Tokenizer;

/// A model's files, opened and checked. Weights are read through [`WeightSource`].
pub struct Checkpoint {
    weights: Box<dyn WeightSource + Send + Sync>,
    tokenizer: TokenizerFiles,
    generation: GenerationDefaults,
    /// Whether it is made to embed texts, and not to write any.
    embeds: bool,
    pooling: DeclaredPooling,
    summary: Summary,
    /// Where files about text can be had as they are.
    files: Option<Files>,
}

/// Opens a checkpoint: a folder with `config.json` and `model.safetensors`, a `.safetensors` file in
/// one, a `.gguf` file, or a folder with one `.gguf` file and no `config.json`.
///
/// The files are memory-mapped and must not be shortened or overwritten while the checkpoint is in
/// use: the operating system then ends the process. Replacing a file by renaming another onto it is
/// safe.
///
/// Opening checks the config, the names, types and shapes of all tensors, all scales and norms.
/// The large tensors are checked when they are first read; [`Checkpoint::verify`] reads them all.
pub fn open(path: &Path) -> Result<Checkpoint, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|e| files::unreachable_file(path, e))?;
    if lora::is_adapter(path) {
        let supported = "a model; --lora applies an adapter to one";
        return Err(LoadError::unsupported(path, "format", "a LoRA adapter", supported));
    }
    if metadata.is_dir() {
        return open_files(Files::Folder(path.to_owned()));
    }
    if !metadata.is_file() {
        let found = "a pipe, socket or device";
        return Err(LoadError::invalid(path, "kind", "a file or a folder", found));
    }
    let extension = path.extension().and_then(|extension| extension.to_str());
    let name = path.file_name().and_then(|name| name.to_str());
    let (Some(name), Some(extension @ ("safetensors" | "gguf"))) = (name, extension) else {
        let supported = "a folder with config.json and model.safetensors, a .safetensors file in \
                         one, or a .gguf file";
        let found = foreign::name(&files::head(path)?).unwrap_or("this kind of file");
        return Err(LoadError::unsupported(path, "format", found, supported));
    };
    let (files, _) = file_in_folder(path)?;
    if extension == "gguf" {
        return open_gguf(&files, name);
    }
    let whole = name == safetensors::SINGLE || safetensors::Tensors::is_shard(&files, name)?;
    open_hf(files, (!whole).then_some(name))
}

/// Opens the tokenizer and the chat template of a checkpoint, without its weights: of a folder, or of
/// a GGUF file, which need not have any weights.
///
/// # Errors
///
/// A [`LoadError`] that names the file and what is wrong in it.
pub fn open_tokenizer(path: &Path) -> Result<TokenizerFiles, LoadError> {
    let metadata = std::fs::metadata(path).map_err(|e| LoadError::read(path, e))?;
    if metadata.is_dir() {
        return tokenizer_files::read(&Files::Folder(path.to_owned()));
    }
    let (files, name) = file_in_folder(path)?;
    let gguf = gguf::Gguf::open(&files, name)?;
    gguf::tokenizer::read(&Arc::new(gguf.metadata))
}

/// Opens a checkpoint from a set of named files, as [`open`] does.
pub fn open_files(files: Files) -> Result<Checkpoint, LoadError> {
    if !files.has("config.json") {
        match &files.names_ending(".gguf")?[..] {
            [] => {}
            [name] => return open_gguf(&files, name),
            [first, second, ..] => {
                return Err(LoadError::invalid(
                    files.location(),
                    "weights",
                    "config.json, or one .gguf file (name the one that is meant)",
                    json::quote(&format!("{first} and {second}"), 200),
                ));
            }
        }
    }
    open_hf(files, None)
}

/// A file as one of its folder.
fn file_in_folder(path: &Path) -> Result<(Files, &str), LoadError> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        let expected = "a file whose name is UTF-8";
        return Err(LoadError::invalid(path, "name", expected, "another"));
    };
    // The parent of a bare file name is empty, which is no folder to any system call.
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    Ok((Files::Folder(folder.unwrap_or(Path::new(".")).to_owned()), name))
}

fn open_gguf(files: &Files, name: &str) -> Result<Checkpoint, LoadError> {
    let gguf = gguf::Gguf::open(files, name)?;
    let config = gguf::config::parse(&gguf)?;
    let weights = gguf::weights::GgufWeights::new(&config, &gguf)?;
    let mut summary = summary::of_gguf(&config, &weights, &gguf);
    let metadata = Arc::new(gguf.metadata);
    let mut generation = gguf::tokenizer::generation(&metadata)?;
    let mut tokenizer = gguf::tokenizer::read(&metadata)?;
    if tokenizer.gguf.is_none() {
        // Files without a vocabulary may still say which ids are special.
        generation = generation_config::of_gguf(&metadata)?;
        tokenizer = tokenizer_files::read(files)?;
    }
    summary.assumed.extend(tokenizer.notes.iter().cloned());
    // Converters of embedding models write no head; those that write text have one, or are tied by
    // an architecture that is for nothing else.
    let embeds = config.architecture.embeds && weights.config().tied_head;
    let pooling = pooling::of_gguf(&metadata, config.architecture.name)?;
    summary.assumed.extend(pooling.doubt().filter(|_| embeds).map(str::to_owned));
    let files = tokenizer.gguf.is_none().then(|| files.clone());
    let weights = Box::new(weights);
    Ok(Checkpoint { weights, tokenizer, generation, embeds, pooling, summary, files })
}

fn open_hf(files: Files, single: Option<&str>) -> Result<Checkpoint, LoadError> {
    let file = files.path("config.json");
    let Some(text) = files.text("config.json")? else {
        return Err(files::missing(&file));
    };
    let map = json::parse_object(&file, &text)?;
    let config = hf::config::parse(&file, &map)?;
    let generation = generation_config::read(&files, &file, &map)?;
    let tokenizer = tokenizer_files::read(&files)?;
    let tensors = safetensors::Tensors::open(&files, single)?;
    let weights = hf::weights::HfWeights::new(&config, &tensors)?;
    let path = single.map_or_else(|| files.location().to_owned(), |name| files.path(name));
    let summary = summary::of_hf(path, &config, &weights, &tensors);
    let embeds = config.form.embeds || files.has(pooling::MODULES);
    let pooling = pooling::of_folder(&files)?;
    let (files, weights) = (Some(files), Box::new(weights));
    Ok(Checkpoint { weights, tokenizer, generation, embeds, pooling, summary, files })
}

impl Checkpoint {
    /// The hyper-parameters.
    pub fn config(&self) -> &ModelConfig {
        self.weights.config()
    }

    /// The tokenizer's file, special tokens and chat templates.
    pub fn tokenizer(&self) -> &TokenizerFiles {
        &self.tokenizer
    }

    /// Sampling options and token ids that the checkpoint comes with.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Whether the model is made to embed texts and has no head to write any: its class has none, or
    /// there is the `modules.json` of sentence-transformers.
    pub fn embeds(&self) -> bool {
        self.embeds
    }

    /// What the files say of pooling: `modules.json` and what it names, or `{arch}.pooling_type`.
    pub fn pooling(&self) -> &DeclaredPooling {
        &self.pooling
    }

    /// Tokens that end a text to be embedded. `tokenizer` is the checkpoint's.
    pub fn embedding_end(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        pooling::embedding_end(self.config().family, self.embeds, &self.tokenizer, tokenizer)
    }

    /// What there is to know about the files.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Reads every weight and returns the first fault: code 3 in packed weights, NaN or infinity.
    pub fn verify(&self) -> Result<(), LoadError> {
        for layer in 0..self.config().layers {
            for (projection, _) in hf::weights::PROJECTIONS {
                self.ternary(layer, projection)?;
            }
        }
        self.embedding()?;
        self.head()?;
        Ok(())
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checkpoint").field("summary", &self.summary).finish_non_exhaustive()
    }
}

impl WeightSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        self.weights.config()
    }
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        self.weights.ternary(layer, projection)
    }
    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        self.weights.master(layer, projection)
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        self.weights.norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.weights.embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        self.weights.head()
    }
}
