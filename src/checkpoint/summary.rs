//! What `trine inspect` prints about a checkpoint.

use std::path::PathBuf;

use serde::Serialize;

use super::gguf::Gguf;
use super::gguf::config::GgufConfig;
use super::gguf::layouts::Layout;
use super::gguf::weights::{self, GgufWeights};
use super::hf::config::HfConfig;
use super::hf::weights::{HfWeights, PROJECTIONS, Stored};
use super::safetensors::Tensors;
use crate::model::weights::WeightSource;

/// A checkpoint in numbers and words.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Summary {
    /// The folder or file.
    pub path: PathBuf,
    /// The format of the files.
    pub format: String,
    /// The model's family, by the name people know it by.
    pub family: String,
    /// `architectures` of the config, or what stands for it.
    pub architecture: String,
    /// How ternary weights are stored and what their scales mean, in words.
    pub quantization: String,
    /// How each projection is stored.
    pub projections: Vec<ProjectionSummary>,
    /// Whether the output head is the embedding table.
    pub tied_head: bool,
    /// What the files do not say, and what was taken for it.
    pub assumed: Vec<String>,
    /// Type of the embedding table's elements, and what they become if it is another.
    pub embedding: String,
    /// The same of the output head.
    pub head: String,
    /// Keys of a GGUF file's metadata and their values, long ones shortened; empty for other
    /// formats.
    pub metadata: Vec<(String, String)>,
    /// All tensors by name.
    pub tensors: Vec<TensorSummary>,
    /// Names of tensors that have no part in the model.
    pub unused: Vec<String>,
    /// Weights of the model.
    pub parameters: u64,
    /// Bytes of all weight files.
    pub file_bytes: u64,
    /// Bytes of the ternary matrices as stored.
    pub ternary_bytes: u64,
    /// Bytes of the embedding table when it is loaded.
    pub embedding_bytes: u64,
    /// Bytes that the output head reads per token: the embedding table's if it is tied.
    pub head_bytes: u64,
}

/// How a projection is stored, over all layers.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct ProjectionSummary {
    /// Its name within a layer.
    pub name: String,
    /// Rows (output features) and columns (input features).
    pub shape: [usize; 2],
    /// What its elements are, or the several things that they are.
    pub stored: String,
    /// Least and greatest factor that multiplies its weights, over the layers; `None` for master
    /// weights, whose factors are computed when they are loaded. Trained models have 0.01 to 0.1
    /// (Llama) or 1 to 3 (2B4T); reciprocals of these hint at a config with the wrong meaning.
    pub scales: Option<[f32; 2]>,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct TensorSummary {
    /// Its name.
    pub name: String,
    /// Its element type, as the format writes it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes.
    pub bytes: u64,
    /// The file that holds it.
    pub file: PathBuf,
}

pub(crate) fn of_hf(
    path: PathBuf,
    config: &HfConfig,
    weights: &HfWeights,
    tensors: &Tensors,
) -> Summary {
    let model = weights.config();
    let projections = PROJECTIONS.map(|(projection, name)| {
        let mut stored: Vec<String> = Vec::new();
        let mut scales: Option<[f32; 2]> = None;
        for matrix in weights.matrices(projection) {
            let one = match matrix.stored {
                Stored::Packed => "uint8, four codes to a byte".to_owned(),
                Stored::Values(float) => format!("{} of -1, 0 and 1", float.name()),
                Stored::Master(float) => format!("{} master weights", float.name()),
            };
            if !stored.contains(&one) {
                stored.push(one);
            }
            if let Some(scale) = matrix.scale {
                let [low, high] = scales.unwrap_or([scale; 2]);
                scales = Some([low.min(scale), high.max(scale)]);
            }
        }
        let (rows, cols) = model.shape(projection);
        ProjectionSummary {
            name: name.to_owned(),
            shape: [rows, cols],
            stored: stored.join(" or "),
            scales,
        }
    });
    let (embedding_bytes, head_bytes) = weights.table_bytes();
    let [embedding, head] = weights.table_types().map(|float| float.name().to_owned());
    Summary {
        embedding,
        head,
        metadata: Vec::new(),
        path,
        format: "Hugging Face folder, safetensors".into(),
        family: model.family.row().name.into(),
        architecture: config.form.architecture.into(),
        quantization: config.quantization.describe().into(),
        tied_head: model.tied_head,
        assumed: config.assumed.iter().chain(&weights.assumed).cloned().collect(),
        tensors: tensors
            .map
            .values()
            .map(|tensor| TensorSummary {
                name: tensor.name.clone(),
                dtype: tensor.dtype.to_string(),
                shape: tensor.shape.clone(),
                bytes: tensor.bytes.len() as u64,
                file: tensor.file.to_path_buf(),
            })
            .collect(),
        unused: weights.unused.clone(),
        parameters: model.parameters(),
        file_bytes: tensors.file_bytes,
        ternary_bytes: PROJECTIONS
            .iter()
            .flat_map(|(projection, _)| weights.matrices(*projection))
            .map(|matrix| matrix.tensor.bytes.len() as u64)
            .sum(),
        embedding_bytes,
        head_bytes,
        projections: projections.into(),
    }
}

pub(crate) fn of_gguf(config: &GgufConfig, weights: &GgufWeights, gguf: &Gguf) -> Summary {
    let model = weights.config();
    let mut kinds: Vec<String> = Vec::new();
    let projections = weights::PROJECTIONS.map(|(projection, name)| {
        let mut stored: Vec<String> = Vec::new();
        let mut scales: Option<[f32; 2]> = None;
        for matrix in weights.matrices(projection) {
            let name = matrix.tensor.type_name();
            let one = match matrix.layout {
                Layout::I2S | Layout::Tq1_0 | Layout::Tq2_0 => name,
                Layout::Values { .. } => format!("{name} of three values"),
                Layout::Master { .. } => format!("{name} master weights"),
            };
            if !matches!(matrix.layout, Layout::Master { .. }) {
                let [low, high] = scales.unwrap_or([matrix.scale; 2]);
                scales = Some([low.min(matrix.scale), high.max(matrix.scale)]);
            }
            for list in [&mut stored, &mut kinds] {
                if !list.contains(&one) {
                    list.push(one.clone());
                }
            }
        }
        let (rows, cols) = model.shape(projection);
        let stored = stored.join(" or ");
        ProjectionSummary { name: name.to_owned(), shape: [rows, cols], stored, scales }
    });
    let (embedding, head) = weights.tables();
    let head = head.unwrap_or(embedding);
    Summary {
        path: gguf.file.to_path_buf(),
        format: format!("GGUF version {}", gguf.version),
        family: model.family.row().name.into(),
        architecture: config.architecture.name.into(),
        quantization: kinds.join(", "),
        tied_head: model.tied_head,
        assumed: config.assumed.iter().chain(&weights.assumed).cloned().collect(),
        embedding: embedding.describe(),
        head: head.describe(),
        metadata: gguf.metadata.described().collect(),
        tensors: gguf
            .tensors
            .values()
            .map(|tensor| TensorSummary {
                name: tensor.name.clone(),
                dtype: tensor.type_name(),
                shape: tensor.shape(),
                bytes: tensor.bytes.len() as u64,
                file: tensor.file.to_path_buf(),
            })
            .collect(),
        unused: weights.unused.clone(),
        parameters: model.parameters(),
        file_bytes: gguf.file_bytes,
        ternary_bytes: weights::PROJECTIONS
            .iter()
            .flat_map(|(projection, _)| weights.matrices(*projection))
            .map(|matrix| matrix.tensor.bytes.len() as u64)
            .sum(),
        embedding_bytes: embedding.loaded_bytes(),
        head_bytes: head.loaded_bytes(),
        projections: projections.into(),
    }
}
