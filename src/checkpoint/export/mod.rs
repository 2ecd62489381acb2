//! A model to files that other engines read: GGUF with I2_S, TQ2_0 or TQ1_0 matrices, or a Hugging
//! Face folder with packed ones.
//!
//! Ternary codes and their scales come out as they went in, in every format: a format that cannot
//! hold a matrix is refused by name before anything is written. Tables (the embedding and the output
//! head) keep their type unless another is asked for.
//!
//! An export streams: no more than a megabyte of output and the rows that it comes from is held. It
//! is written under another name in the same folder and renamed when it is whole, so that nobody
//! ever sees half of one.
//!
//! | format | read by | what it cannot hold |
//! |---|---|---|
//! | [`Format::I2S`] | bitnet.cpp, ik_llama.cpp (through its quantizer) | columns not a multiple of 128 |
//! | [`Format::Tq2`], [`Format::Tq1`] | llama.cpp, bitnet.cpp | columns not a multiple of 256 |
//! | [`Format::Hf`] | transformers, and whatever reads its checkpoints | rows not a multiple of 4 |
//!
//! | module | what it does |
//! |---|---|
//! | `gguf`, `vocabulary` | a GGUF file: header, keys, tokenizer |
//! | `hf` | a folder: config, shards, files that are copied |
//! | `encode` | rows to bytes, layout by layout |
//! | `stream`, `destination` | bytes to a file that appears when it is whole |

mod destination;
mod encode;
mod gguf;
mod gguf_arch;
mod gguf_header;
mod hf;
mod hf_texts;
mod stream;
mod vocabulary;

use std::path::Path;

pub use encode::TableType;

use self::encode::TernaryLayout;
use super::{Checkpoint, DeclaredPooling, Files, GenerationDefaults, Pooling, TokenizerFiles};
use crate::error::{ExportError, LoadError};
use crate::model::weights::WeightSource;
use crate::tensor::{FloatType, HostTable, SharedBytes};
use crate::text::Tokenizer;

/// What an export writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// GGUF with matrices in I2_S, the type of bitnet.cpp: 2 bits a weight, one f32 scale each.
    I2S,
    /// GGUF with matrices in TQ2_0, a type of ggml: 2.06 bits a weight.
    Tq2,
    /// GGUF with matrices in TQ1_0, a type of ggml: 1.69 bits a weight.
    Tq1,
    /// A folder as transformers writes it: `config.json`, safetensors with four rows to a byte, and
    /// the tokenizer's files.
    Hf,
}

/// `general.architecture` of a GGUF file of the BitNet family, whose members differ in nothing but
/// their activation.
///
/// | | `bitnet` | `bitnet-b1.58` |
/// |---|---|---|
/// | llama.cpp | SiLU, or what `bitnet.hidden_activation` says where that is read | not known |
/// | bitnet.cpp up to 2026, ik_llama.cpp | SiLU | ReLU² |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GgufArch {
    /// The first members of the family, with SiLU.
    BitNet,
    /// 2B4T, with ReLU².
    BitNetB158,
}

impl GgufArch {
    /// As the file has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BitNet => "bitnet",
            Self::BitNetB158 => "bitnet-b1.58",
        }
    }
}

/// How to export.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// What to write.
    pub format: Format,
    /// The type of the embedding table and the output head; `None` keeps what they have.
    pub tables: Option<TableType>,
    /// The architecture of a GGUF file of the BitNet family; `None` takes the one whose engines
    /// agree with the model's activation.
    pub arch: Option<GgufArch>,
    /// Whether a file, or a folder with a checkpoint and nothing else, may be replaced.
    pub overwrite: bool,
    /// Threads that encode; `None` for as many as the machine has.
    pub threads: Option<usize>,
}

impl ExportOptions {
    /// An export that keeps the tables' type and replaces nothing.
    pub fn new(format: Format) -> Self {
        Self { format, tables: None, arch: None, overwrite: false, threads: None }
    }
}

/// What is exported: weights and what belongs to them, wherever they come from.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// Hyper-parameters and weights.
    pub weights: &'a dyn WeightSource,
    /// The tokenizer, special tokens and chat templates.
    pub tokenizer: &'a TokenizerFiles,
    /// Sampling options and token ids.
    pub generation: &'a GenerationDefaults,
    /// Whether it is made to embed texts, and not to write any.
    pub embeds: bool,
    /// Which rows of a text become its embedding.
    pub pooling: &'a DeclaredPooling,
    /// What the model is called.
    pub name: &'a str,
    /// Files of which a folder takes those about text and sampling as they are; without them such
    /// files are made from the fields above.
    pub files: Option<&'a Files>,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exported {
    /// Bytes of the weight files.
    pub bytes: u64,
    /// Their tensors.
    pub tensors: usize,
    /// What the reader of the files ought to know, in sentences.
    pub notes: Vec<String>,
}

/// Hears how many of how many bytes are written, and says whether to go on.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> bool;

/// Writes a model to a path: a file, or for [`Format::Hf`] a folder.
///
/// # Errors
///
/// An [`ExportError`] in a sentence: something is there already, a tensor does not fit the format,
/// a weight is not valid, the disk is full, or `progress` said to stop. Nothing is left then.
pub fn export(
    source: &Source<'_>,
    path: &Path,
    options: &ExportOptions,
    progress: Progress<'_>,
) -> Result<Exported, ExportError> {
    let ternary = match options.format {
        Format::I2S => TernaryLayout::I2S,
        Format::Tq2 => TernaryLayout::Tq2,
        Format::Tq1 => TernaryLayout::Tq1,
        Format::Hf => return hf::write(source, path, options, progress),
    };
    gguf::write(source, path, ternary, options, progress)
}

impl Checkpoint {
    /// This checkpoint as what is to be exported.
    pub fn export_source(&self) -> Source<'_> {
        let path = &self.summary().path;
        Source {
            weights: self,
            tokenizer: self.tokenizer(),
            generation: self.generation(),
            embeds: self.embeds,
            pooling: &self.pooling,
            name: path.file_stem().and_then(|name| name.to_str()).unwrap_or("model"),
            files: self.files.as_ref(),
        }
    }
}

/// The embedding table or the output head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Embedding,
    Head,
}

impl Source<'_> {
    /// The tokenizer and its `tokenizer.json`: the one that there is, or one made of the tokenizer.
    fn tokenizer(&self) -> Result<Option<(Tokenizer, SharedBytes)>, ExportError> {
        let Some(tokenizer) = self.tokenizer.tokenizer()? else { return Ok(None) };
        if let Some(bytes) = &self.tokenizer.tokenizer_json {
            return Ok(Some((tokenizer, bytes.clone())));
        }
        let bytes = tokenizer.to_json().map_err(|found| {
            let file = &self.tokenizer.tokenizer_path;
            LoadError::invalid(file, "tokenizer", "one that can be written as JSON", found)
        })?;
        Ok(Some((tokenizer, SharedBytes::new(bytes))))
    }

    /// The pooling that is in force, where files say it; of models that only embed, whether they do or
    /// not.
    fn pooled(&self) -> Option<Pooling> {
        let said = self.embeds || *self.pooling != DeclaredPooling::Nothing;
        self.pooling.in_force().ok().filter(|_| said)
    }

    fn table(&self, table: Table) -> Result<HostTable, ExportError> {
        Ok(match table {
            Table::Embedding => self.weights.embedding()?,
            Table::Head => self.weights.head()?,
        })
    }
}

/// The type that a table keeps.
fn own_type(float: FloatType) -> TableType {
    match float {
        FloatType::Bf16 => TableType::Bf16,
        FloatType::F16 => TableType::F16,
        FloatType::F32 => TableType::F32,
    }
}

/// Writes a table row by row.
fn write_table(
    stream: &mut stream::Stream<'_>,
    table: &HostTable,
    kind: TableType,
    name: &str,
) -> Result<(), ExportError> {
    let row_bytes = kind.row_bytes(table.cols);
    stream.rows(table.rows, row_bytes, |first, bytes| {
        let mut values = vec![0.0; table.cols];
        for (row, out) in bytes.chunks_exact_mut(row_bytes).enumerate() {
            table.read_row(first + row, &mut values);
            kind.encode(&values, out).map_err(|column| ExportError::Unfit {
                what: name.to_owned(),
                reason: format!(
                    "{} at row {}, column {column} is beyond what {} holds",
                    values[column],
                    first + row,
                    kind.name()
                ),
                instead: "--head bf16 and f32 hold it".into(),
            })?;
        }
        Ok(())
    })
}

/// The threads that encode.
fn threads(options: &ExportOptions) -> usize {
    let all = || std::thread::available_parallelism().map_or(1, usize::from);
    options.threads.unwrap_or_else(all)
}
