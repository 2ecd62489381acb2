//! The tensors of a Hugging Face folder as the weights of a model.
//!
//! Names, types, shapes, scales and norms are checked when the folder is opened; the large tensors
//! are checked for code 3, NaN and infinity when they are first asked for, so that opening costs
//! no pass over gigabytes.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};

use safetensors::tensor::Dtype;

use super::config::HfConfig;
use super::form::Quantization;
use super::layouts::{PackedRows, ValueRows};
use crate::checkpoint::safetensors::{Tensor, Tensors, shape_text};
use crate::checkpoint::scan::{first_invalid_code, first_non_finite};
use crate::error::LoadError;
use crate::model::config::{ModelConfig, NormRole, Projection};
use crate::model::weights::WeightSource;
use crate::tensor::{FloatType, HostTable};
use crate::ternary::{AbsmeanRows, TernaryRows};

/// The projections of a layer and their names in it, in the order of the enum.
pub(crate) const PROJECTIONS: [(Projection, &str); 7] = [
    (Projection::Query, "self_attn.q_proj"),
    (Projection::Key, "self_attn.k_proj"),
    (Projection::Value, "self_attn.v_proj"),
    (Projection::Output, "self_attn.o_proj"),
    (Projection::Gate, "mlp.gate_proj"),
    (Projection::Up, "mlp.up_proj"),
    (Projection::Down, "mlp.down_proj"),
];

const EMBEDDING: &str = "embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const FINAL_NORM: &str = "norm.weight";

/// A ternary matrix as it is stored.
pub(crate) struct Matrix {
    pub(crate) tensor: Tensor,
    pub(crate) stored: Stored,
    /// What multiplies; of master weights it is computed when they are read.
    pub(crate) scale: Option<f32>,
    checked: AtomicBool,
}

/// What the elements of a ternary matrix's tensor are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Bytes of four codes.
    Packed,
    /// Floats of −1, 0 and +1.
    Values(FloatType),
    /// Floats that become ternary by absmean.
    Master(FloatType),
}

/// A norm, and what is added to its stored gains.
struct Norm {
    tensor: Tensor,
    float: FloatType,
    offset: f32,
}

struct Table {
    tensor: Tensor,
    float: FloatType,
    checked: AtomicBool,
}

/// The weights of a Hugging Face folder.
pub(crate) struct HfWeights {
    config: ModelConfig,
    layers: Vec<[Matrix; 7]>,
    norms: HashMap<NormRole, Norm>,
    embedding: Table,
    head: Option<Table>,
    /// Names of tensors that have no part in the model.
    pub(crate) unused: Vec<String>,
    /// What the config does not say and was found out from the tensors.
    pub(crate) assumed: Vec<String>,
}

impl HfWeights {
    /// Finds every tensor that the config asks for, and refuses tensors that would have to take
    /// part in the model and cannot.
    pub(crate) fn new(config: &HfConfig, tensors: &Tensors) -> Result<Self, LoadError> {
        let mut finder = Finder::new(config, tensors);
        let mut model = config.model.clone();
        let mut assumed = Vec::new();

        let (vocabulary, hidden) = (model.vocabulary, model.hidden);
        let embedding = finder.name(EMBEDDING);
        let embedding = finder.table(&embedding, vocabulary, hidden)?;
        let has_head = tensors.map.contains_key(HEAD);
        model.tied_head = config.tied.unwrap_or_else(|| {
            let (there, tied) = if has_head { ("is", false) } else { ("is not", true) };
            assumed.push(format!("tie_word_embeddings: {tied}, since {HEAD} {there} there"));
            !has_head
        });
        let head = if model.tied_head {
            if has_head {
                same_as_embedding(finder.tensor(HEAD)?, &embedding)?;
            }
            None
        } else {
            Some(finder.table(HEAD, vocabulary, hidden)?)
        };
        let mut norms = HashMap::from([(NormRole::Final, finder.norm(config, NormRole::Final)?)]);
        let mut layers = Vec::new();
        for index in 0..model.layers {
            layers.push(finder.matrices(config, index)?);
            for role in model.layer_norms(index) {
                norms.insert(role, finder.norm(config, role)?);
            }
        }
        let unused = finder.left_over(model.layers)?;
        Ok(Self { config: model, layers, norms, embedding, head, unused, assumed })
    }

    /// The matrices of one projection, first layer to last.
    pub(crate) fn matrices(&self, projection: Projection) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().map(move |layer| &layer[projection as usize])
    }

    /// Bytes of the embedding table, and of the table that the output head reads.
    pub(crate) fn table_bytes(&self) -> (u64, u64) {
        let bytes = |table: &Table| table.tensor.bytes.len() as u64;
        (bytes(&self.embedding), bytes(self.head.as_ref().unwrap_or(&self.embedding)))
    }

    /// Types of the same two tables.
    pub(crate) fn table_types(&self) -> [FloatType; 2] {
        [self.embedding.float, self.head.as_ref().unwrap_or(&self.embedding).float]
    }
}

/// transformers unties the two where they differ (`tie_weights` in `modeling_utils.py`), against
/// what the config says; here that is for the user to decide.
fn same_as_embedding(head: &Tensor, embedding: &Table) -> Result<(), LoadError> {
    let table = &embedding.tensor;
    if head.dtype == table.dtype && head.shape == table.shape && *head.bytes == *table.bytes {
        return Ok(());
    }
    Err(head.wrong(
        format!("the values of {}, since tie_word_embeddings is true", table.name),
        "others; set tie_word_embeddings to false to use them",
    ))
}

/// Takes tensors by name and remembers which.
struct Finder<'a> {
    tensors: &'a Tensors,
    /// What names begin with: `model.`, or nothing where a model was saved without its head.
    prefix: &'static str,
    quantization: Quantization,
    used: BTreeSet<&'a str>,
}

impl<'a> Finder<'a> {
    fn new(config: &HfConfig, tensors: &'a Tensors) -> Self {
        let headless = config.form.embeds && tensors.map.contains_key(EMBEDDING);
        let prefix = if headless { "" } else { "model." };
        Self { tensors, prefix, quantization: config.quantization, used: BTreeSet::new() }
    }

    /// The name of a tensor of the model but for its head.
    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn tensor(&mut self, name: &str) -> Result<&'a Tensor, LoadError> {
        let tensor = self.tensors.get(name)?;
        self.used.insert(&tensor.name);
        Ok(tensor)
    }

    /// A float tensor of a given shape.
    fn float(&mut self, name: &str, shape: &[usize]) -> Result<(&'a Tensor, FloatType), LoadError> {
        let tensor = self.tensor(name)?;
        match tensor.float().filter(|_| tensor.shape == shape) {
            Some(float) => Ok((tensor, float)),
            None => Err(tensor.wrong(floats(shape), found(tensor))),
        }
    }

    fn table(&mut self, name: &str, rows: usize, cols: usize) -> Result<Table, LoadError> {
        let (tensor, float) = self.float(name, &[rows, cols])?;
        Ok(Table { tensor: tensor.clone(), float, checked: AtomicBool::new(false) })
    }

    fn norm(&mut self, config: &HfConfig, role: NormRole) -> Result<Norm, LoadError> {
        let name = self.norm_name(config, role);
        let (tensor, float) = self.float(&name, &[config.model.norm_width(role)])?;
        check_finite(tensor, float)?;
        let offset = config.form.offset(role);
        Ok(Norm { tensor: tensor.clone(), float, offset })
    }

    fn norm_name(&self, config: &HfConfig, role: NormRole) -> String {
        let form = config.form;
        let (layer, part) = match role {
            NormRole::Final => return self.name(FINAL_NORM),
            NormRole::Attention(layer) => (layer, "input_layernorm"),
            NormRole::AttentionSub(layer) => (layer, form.attention_sub_norm),
            NormRole::Ffn(layer) => (layer, form.ffn_norm),
            NormRole::FfnSub(layer) => (layer, form.ffn_sub_norm),
            NormRole::QueryHead(layer) => (layer, "self_attn.q_norm"),
            NormRole::KeyHead(layer) => (layer, "self_attn.k_norm"),
            NormRole::PostAttention(layer) => (layer, "post_attention_layernorm"),
            NormRole::PostFfn(layer) => (layer, "post_feedforward_layernorm"),
            NormRole::Projection(layer, projection) => {
                let (_, part) = PROJECTIONS[projection as usize];
                // transformers' own class of linear layers calls it rms_norm, published ones norm.
                let name = |norm| self.name(&format!("layers.{layer}.{part}.{norm}.weight"));
                let other = Some(name("rms_norm")).filter(|n| self.tensors.map.contains_key(n));
                return other.unwrap_or_else(|| name("norm"));
            }
        };
        self.name(&format!("layers.{layer}.{part}.weight"))
    }

    fn matrices(&mut self, config: &HfConfig, index: usize) -> Result<[Matrix; 7], LoadError> {
        let mut matrices = Vec::with_capacity(PROJECTIONS.len());
        for (projection, part) in PROJECTIONS {
            let (rows, cols) = config.model.shape(projection);
            let name = self.name(&format!("layers.{index}.{part}.weight"));
            matrices.push(self.matrix(&name, rows, cols)?);
        }
        let Ok(matrices) = matrices.try_into() else { unreachable!("one per projection") };
        Ok(matrices)
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, LoadError> {
        let tensor = self.tensor(name)?;
        let packed = || format!("U8 {}, four rows to a byte", shape_text(&[rows / 4, cols]));
        let stored = match (self.quantization, tensor.dtype, tensor.float()) {
            (Quantization::BitLinear | Quantization::AutoOffline, Dtype::U8, _) => {
                if !rows.is_multiple_of(4) {
                    return Err(tensor.wrong(
                        format!("floats, since {rows} rows are not a multiple of 4"),
                        found(tensor),
                    ));
                }
                if tensor.shape != [rows / 4, cols] {
                    return Err(tensor.wrong(packed(), found(tensor)));
                }
                Stored::Packed
            }
            (Quantization::AutoOffline, _, Some(float)) if tensor.shape == [rows, cols] => {
                Stored::Values(float)
            }
            (Quantization::Master, _, Some(float)) if tensor.shape == [rows, cols] => {
                Stored::Master(float)
            }
            (Quantization::Master, ..) => {
                let expected = format!(
                    "{}, master weights, since the config says that weights are quantised when \
                     they are loaded",
                    floats(&[rows, cols])
                );
                return Err(tensor.wrong(expected, found(tensor)));
            }
            _ => return Err(tensor.wrong(packed(), found(tensor))),
        };
        let scale = self.scale(&format!("{name}_scale"), stored)?;
        Ok(Matrix { tensor: tensor.clone(), stored, scale, checked: AtomicBool::new(false) })
    }

    /// What a matrix is multiplied by, from its `weight_scale`.
    fn scale(&mut self, name: &str, stored: Stored) -> Result<Option<f32>, LoadError> {
        if matches!(stored, Stored::Master(_)) {
            return match self.tensors.map.get(name) {
                None => Ok(None),
                Some(tensor) => Err(tensor.wrong(
                    "no scale beside weights that are quantised when they are loaded",
                    found(tensor),
                )),
            };
        }
        let tensor = self.tensor(name)?;
        let Some(float) = tensor.float().filter(|_| matches!(tensor.shape[..], [] | [1])) else {
            return Err(tensor.wrong(floats(&[1]), found(tensor)));
        };
        let mut stored = [0.0];
        float.decode(&tensor.bytes, &mut stored);
        let [stored] = stored;
        let scale = match self.quantization {
            Quantization::BitLinear => 1.0 / stored,
            _ => stored,
        };
        if stored.is_finite() && scale.is_finite() && scale > 0.0 {
            return Ok(Some(scale));
        }
        Err(tensor.wrong("a positive number, its reciprocal finite", stored.to_string()))
    }

    /// The names of tensors that nothing asked for. Where such a tensor would change the result,
    /// leaving it out would be a wrong result, so it is an error.
    fn left_over(&self, layers: usize) -> Result<Vec<String>, LoadError> {
        let mut unused = Vec::new();
        for (name, tensor) in &self.tensors.map {
            if self.used.contains(&**name) {
                continue;
            }
            let refuse = |found: &str, supported: &str| {
                Err(LoadError::unsupported(&tensor.file, name, found, supported))
            };
            if name.ends_with(".bias") {
                return refuse("a bias", "projections and norms without bias");
            }
            let layer =
                name.strip_prefix(self.prefix).and_then(|name| name.strip_prefix("layers."));
            let layer = layer.and_then(|rest| rest.split_once('.'));
            if let Some((index, part)) = layer {
                if index.parse().is_ok_and(|index: usize| index >= layers) {
                    return refuse(
                        &format!("a tensor of layer {index}"),
                        &format!("layers 0 to {}, as num_hidden_layers says", layers - 1),
                    );
                }
                let of_projection = PROJECTIONS.iter().any(|(_, known)| {
                    part.strip_prefix(known).is_some_and(|rest| rest.starts_with('.'))
                });
                if of_projection || part.contains("norm") || part.contains("_ln") {
                    return refuse("a tensor with no place in the model's family", "none here");
                }
            }
            unused.push(name.clone());
        }
        Ok(unused)
    }
}

fn floats(shape: &[usize]) -> String {
    format!("BF16, F16 or F32 {}", shape_text(shape))
}

fn found(tensor: &Tensor) -> String {
    format!("{} {}", tensor.dtype, shape_text(&tensor.shape))
}

pub(crate) fn check_finite(tensor: &Tensor, float: FloatType) -> Result<(), LoadError> {
    match first_non_finite(float, &tensor.bytes) {
        None => Ok(()),
        Some(element) => Err(non_finite(tensor, float, element)),
    }
}

fn non_finite(tensor: &Tensor, float: FloatType, element: usize) -> LoadError {
    let mut value = [0.0];
    float.decode(&tensor.bytes[element * float.size()..][..float.size()], &mut value);
    tensor.wrong("finite numbers", format!("{} at {}", value[0], position(tensor, element)))
}

fn position(tensor: &Tensor, element: usize) -> String {
    match tensor.shape[..] {
        [_, cols] => format!("row {}, column {}", element / cols, element % cols),
        _ => format!("element {element}"),
    }
}

/// Runs a check that passed once no second time. Two threads may both run it; neither is told that
/// it passed before it did.
fn once(
    checked: &AtomicBool,
    check: impl FnOnce() -> Result<(), LoadError>,
) -> Result<(), LoadError> {
    if !checked.load(Ordering::Acquire) {
        check()?;
        checked.store(true, Ordering::Release);
    }
    Ok(())
}

impl Matrix {
    fn rows(&self, rows: usize, cols: usize) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (tensor, scale) = (&self.tensor, self.scale.unwrap_or(1.0));
        match self.stored {
            Stored::Packed => {
                once(&self.checked, || match first_invalid_code(&tensor.bytes) {
                    None => Ok(()),
                    Some(at) => Err(invalid_code(tensor, at, rows, cols)),
                })?;
                Ok(Box::new(PackedRows::new(rows, cols, scale, &tensor.bytes)))
            }
            Stored::Values(float) => {
                let rows = ValueRows::new(rows, cols, scale, float, &tensor.bytes);
                Ok(Box::new(rows.map_err(|(element, value)| {
                    tensor.wrong(
                        "-1, 0 and 1 alone, since the config says that weights were quantised \
                         before (quantization_mode)",
                        format!("{value} at {}", position(tensor, element)),
                    )
                })?))
            }
            Stored::Master(float) => {
                let rows = AbsmeanRows::new(rows, cols, float, &tensor.bytes);
                Ok(Box::new(rows.map_err(|element| non_finite(tensor, float, element))?))
            }
        }
    }
}

fn invalid_code(tensor: &Tensor, at: usize, rows: usize, cols: usize) -> LoadError {
    let byte = tensor.bytes[at];
    let quarter = (0..4).find(|k| byte >> (2 * k) & 3 == 3).unwrap_or(0);
    let (row, col) = (at / cols + quarter * (rows / 4), at % cols);
    tensor.wrong("codes 0, 1 and 2", format!("code 3 at row {row}, column {col}"))
}

impl Table {
    fn host(&self) -> Result<HostTable, LoadError> {
        once(&self.checked, || check_finite(&self.tensor, self.float))?;
        Ok(HostTable {
            rows: self.tensor.shape[0],
            cols: self.tensor.shape[1],
            float: self.float,
            bytes: self.tensor.bytes.clone(),
        })
    }
}

impl WeightSource for HfWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (rows, cols) = self.config.shape(projection);
        self.layers[layer][projection as usize].rows(rows, cols)
    }

    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        let matrix = &self.layers[layer][projection as usize];
        let Stored::Master(float) = matrix.stored else { return Ok(None) };
        check_finite(&matrix.tensor, float)?;
        let (rows, cols) = self.config.shape(projection);
        Ok(Some(HostTable { rows, cols, float, bytes: matrix.tensor.bytes.clone() }))
    }

    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        // A norm that the family does not have has no weights.
        let Some(norm) = self.norms.get(&role) else { return Ok(Vec::new()) };
        let mut gain = vec![0.0; norm.tensor.shape.iter().product()];
        norm.float.decode(&norm.tensor.bytes, &mut gain);
        if norm.offset != 0.0 {
            gain.iter_mut().for_each(|gain| *gain += norm.offset);
        }
        Ok(gain)
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.embedding.host()
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        self.head.as_ref().unwrap_or(&self.embedding).host()
    }
}
