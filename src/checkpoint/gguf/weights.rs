//! The tensors of a GGUF file as the weights of a model.
//!
//! Names, types, shapes, scales and norms are checked when the file is opened; the large tensors are
//! checked when they are first asked for, as those of a Hugging Face folder are (`hf::weights`).

use std::collections::{BTreeSet, HashMap};

use super::EMBEDDING;
use super::config::GgufConfig;
use super::container::{Gguf, GgufTensor};
use super::dequantize::{block, dequantize, float, row_bytes};
use super::layouts::{Fault, I2S_BLOCK, Layout, StoredRows, first_block_scale, has_blocks_of_64};
use super::table::Table;
use super::types::TensorType;
use crate::checkpoint::safetensors::shape_text;
use crate::error::LoadError;
use crate::model::config::{ModelConfig, NormRole, Projection};
use crate::model::weights::WeightSource;
use crate::tensor::{FloatType, HostTable, SharedBytes};
use crate::ternary::TernaryRows;

/// The projections of a layer and their names in it, in the order of the enum.
pub(crate) const PROJECTIONS: [(Projection, &str); 7] = [
    (Projection::Query, "attn_q"),
    (Projection::Key, "attn_k"),
    (Projection::Value, "attn_v"),
    (Projection::Output, "attn_output"),
    (Projection::Gate, "ffn_gate"),
    (Projection::Up, "ffn_up"),
    (Projection::Down, "ffn_down"),
];

pub(crate) const HEAD: &str = "output.weight";

/// How many weights are looked at to tell ternary floats from master weights.
const PROBE: usize = 1 << 20;

/// Types that a table may have.
pub(crate) const TABLE_TYPES: &str = "F32, F16, BF16, Q8_0, Q6_K, Q5_0, Q5_1, Q4_0 or Q4_K";
/// Types that a ternary matrix may have.
const MATRIX_TYPES: &str = "I2_S, TQ1_0, TQ2_0, F32, F16, BF16 or Q8_0";

/// A ternary matrix as it is stored.
pub(crate) struct Matrix {
    pub(crate) tensor: GgufTensor,
    pub(crate) layout: Layout,
    /// What multiplies, the separate scale included.
    pub(crate) scale: f32,
    /// The width of the heads whose rows are interleaved.
    interleaved: Option<usize>,
    rows: usize,
    cols: usize,
}

/// The weights of a GGUF file.
pub(crate) struct GgufWeights {
    config: ModelConfig,
    layers: Vec<[Matrix; 7]>,
    norms: HashMap<NormRole, Vec<f32>>,
    embedding: Table,
    head: Option<Table>,
    /// Names of tensors that have no part in the model.
    pub(crate) unused: Vec<String>,
    /// What the metadata do not say and was found out from the tensors.
    pub(crate) assumed: Vec<String>,
}

impl GgufWeights {
    /// Finds every tensor that the config asks for, and refuses tensors that would have to take
    /// part in the model and cannot.
    pub(crate) fn new(config: &GgufConfig, gguf: &Gguf) -> Result<Self, LoadError> {
        let mut finder = Finder { gguf, config, used: BTreeSet::new() };
        let mut model = config.model.clone();
        let mut assumed = Vec::new();

        let embedding = finder.table(EMBEDDING)?;
        let head = match gguf.tensors.get(HEAD) {
            None => None,
            // The first published file of 2B4T has its table twice.
            Some(head) if embedding.is_copied_by(head) => {
                finder.used.insert(HEAD);
                assumed.push(format!("tied head: {HEAD} holds the bytes of {EMBEDDING}"));
                None
            }
            Some(_) => Some(finder.table(HEAD)?),
        };
        model.tied_head = head.is_none();

        let mut layers = Vec::new();
        let mut norms = HashMap::new();
        norms.insert(NormRole::Final, finder.norm(NormRole::Final)?);
        for layer in 0..model.layers {
            layers.push(finder.layer(layer)?);
            for role in model.layer_norms(layer) {
                norms.insert(role, finder.norm(role)?);
            }
        }
        for (layer, matrices) in layers.iter().enumerate() {
            matrices[Projection::Down as usize].refuse_blocks_of_64(&norms, layer)?;
        }
        finder.check_rope_factors()?;
        let unused = finder.left_over()?;
        Ok(Self { config: model, layers, norms, embedding, head, unused, assumed })
    }

    /// The matrices of one projection, first layer to last.
    pub(crate) fn matrices(&self, projection: Projection) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().map(move |layer| &layer[projection as usize])
    }

    /// The embedding table and the head, if it is another.
    pub(crate) fn tables(&self) -> (&Table, Option<&Table>) {
        (&self.embedding, self.head.as_ref())
    }
}

/// The name of a norm's tensor.
pub(crate) fn norm_name(role: NormRole) -> String {
    let of_layer = |layer: usize, name: &str| format!("blk.{layer}.{name}.weight");
    match role {
        NormRole::Attention(layer) => of_layer(layer, "attn_norm"),
        NormRole::AttentionSub(layer) => of_layer(layer, "attn_sub_norm"),
        NormRole::Ffn(layer) => of_layer(layer, "ffn_norm"),
        NormRole::FfnSub(layer) => of_layer(layer, "ffn_sub_norm"),
        NormRole::PostAttention(layer) => of_layer(layer, "post_attention_norm"),
        NormRole::PostFfn(layer) => of_layer(layer, "post_ffw_norm"),
        NormRole::QueryHead(layer) => of_layer(layer, "attn_q_norm"),
        NormRole::KeyHead(layer) => of_layer(layer, "attn_k_norm"),
        // bitnet.cpp's, of its embedding models.
        NormRole::Projection(layer, projection) => {
            of_layer(layer, &format!("{}_norm_in", PROJECTIONS[projection as usize].1))
        }
        NormRole::Final => "output_norm.weight".into(),
    }
}

struct Finder<'a> {
    gguf: &'a Gguf,
    config: &'a GgufConfig,
    used: BTreeSet<&'a str>,
}

impl<'a> Finder<'a> {
    fn tensor(&mut self, name: &str) -> Result<&'a GgufTensor, LoadError> {
        let tensor = self.gguf.tensor(name)?;
        self.used.insert(&tensor.name);
        Ok(tensor)
    }

    fn table(&mut self, name: &str) -> Result<Table, LoadError> {
        let tensor = self.tensor(name)?;
        let model = &self.config.model;
        let shape = [model.vocabulary, model.hidden];
        let kind = tensor.meaning.read.filter(|kind| block(*kind).is_some());
        match kind.filter(|_| tensor.shape() == shape) {
            Some(kind) => Ok(Table::new(tensor.clone(), kind)),
            None => {
                Err(tensor.wrong(format!("{TABLE_TYPES} {}", shape_text(&shape)), found(tensor)))
            }
        }
    }

    fn norm(&mut self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        let width = self.config.model.norm_width(role);
        let tensor = self.tensor(&norm_name(role))?;
        let kind = tensor.meaning.read.and_then(float);
        let Some(kind) = kind.filter(|_| tensor.shape() == [width]) else {
            return Err(tensor.wrong(format!("F32, F16 or BF16 [{width}]"), found(tensor)));
        };
        let mut gain = vec![0.0; width];
        kind.decode(&tensor.bytes, &mut gain);
        match gain.iter().position(|g| !g.is_finite()) {
            None => Ok(gain),
            Some(at) => {
                Err(tensor.wrong("finite numbers", format!("{} at element {at}", gain[at])))
            }
        }
    }

    fn layer(&mut self, layer: usize) -> Result<[Matrix; 7], LoadError> {
        let mut projections = Vec::with_capacity(PROJECTIONS.len());
        for (projection, name) in PROJECTIONS {
            projections.push(self.matrix(&format!("blk.{layer}.{name}"), projection)?);
        }
        let Ok(projections) = projections.try_into() else { unreachable!("one per projection") };
        Ok(projections)
    }

    fn matrix(&mut self, name: &str, projection: Projection) -> Result<Matrix, LoadError> {
        let tensor = self.tensor(&format!("{name}.weight"))?;
        let model = &self.config.model;
        let (rows, cols) = model.shape(projection);
        let wrong = || {
            let expected = format!("{MATRIX_TYPES} {}", shape_text(&[rows, cols]));
            Err(tensor.wrong(expected, found(tensor)))
        };
        if tensor.shape() != [rows, cols] {
            return wrong();
        }
        let Some(kind) = tensor.meaning.read else { return wrong() };
        let (layout, scale) = match kind {
            TensorType::I2S => (Layout::I2S, i2s_scale(tensor, rows, cols)?),
            TensorType::Tq1_0 => {
                (Layout::Tq1_0, first_block_scale(&tensor.bytes, 54).unwrap_or(1.0))
            }
            TensorType::Tq2_0 => {
                (Layout::Tq2_0, first_block_scale(&tensor.bytes, 66).unwrap_or(1.0))
            }
            TensorType::F32 | TensorType::F16 | TensorType::Bf16 | TensorType::Q8_0 => {
                self.floats(tensor, kind)?
            }
            _ => return wrong(),
        };
        if !(scale.is_finite() && scale > 0.0) {
            return Err(tensor.wrong("a scale that is a positive number", scale.to_string()));
        }
        let separate = self.separate_scale(&format!("{name}.scale"), layout)?;
        let scale = scale * separate.unwrap_or(1.0);
        if !(scale.is_finite() && scale > 0.0) {
            let expected = "a scale whose product with the separate one is positive and finite";
            return Err(tensor.wrong(expected, scale.to_string()));
        }
        let heads = matches!(projection, Projection::Query | Projection::Key);
        let interleaved =
            (heads && self.config.architecture.interleaved).then_some(model.heads.dim);
        Ok(Matrix { tensor: tensor.clone(), layout, scale, interleaved, rows, cols })
    }

    /// The layout of a matrix of floats: three values, or master weights where the architecture
    /// has them. The scale of masters is computed when they are read; here it is 1.
    fn floats(&self, tensor: &GgufTensor, kind: TensorType) -> Result<(Layout, f32), LoadError> {
        let cols = tensor.ne[0];
        let size = row_bytes(kind, cols).unwrap_or(1);
        let mut values = vec![0.0; cols];
        let mut magnitude = None;
        for row in tensor.bytes.chunks_exact(size).take(PROBE.div_ceil(cols)) {
            dequantize(kind, row, &mut values);
            for value in values.iter().map(|v| v.abs()).filter(|v| *v != 0.0) {
                if magnitude.is_some_and(|magnitude| magnitude != value) {
                    if self.config.architecture.ternary {
                        return Ok((Layout::Master { kind, mean: 0.0 }, 1.0));
                    }
                    return Err(LoadError::unsupported(
                        &tensor.file,
                        &*tensor.name,
                        format!(
                            "{} of more than three values in the architecture {}",
                            tensor.type_name(),
                            self.config.architecture.name
                        ),
                        "ternary weights: this is a model of another kind, or one that was not \
                         quantised before it was converted",
                    ));
                }
                magnitude = Some(value);
            }
        }
        let magnitude = magnitude.unwrap_or(1.0);
        Ok((Layout::Values { kind, magnitude }, magnitude))
    }

    /// What a matrix is multiplied by besides its own scale, which some converters write.
    fn separate_scale(&mut self, name: &str, layout: Layout) -> Result<Option<f32>, LoadError> {
        if !self.gguf.tensors.contains_key(name) {
            return Ok(None);
        }
        let tensor = self.tensor(name)?;
        if let Layout::Master { .. } = layout {
            return Err(tensor.wrong(
                "no scale beside weights that are quantised when they are loaded",
                found(tensor),
            ));
        }
        let kind = tensor.meaning.read.and_then(float).filter(|_| tensor.ne == [1]);
        let Some(kind) = kind else {
            return Err(tensor.wrong("F32, F16 or BF16 [1]", found(tensor)));
        };
        let mut scale = [0.0];
        kind.decode(&tensor.bytes, &mut scale);
        let [scale] = scale;
        if scale.is_finite() && scale > 0.0 {
            return Ok(Some(scale));
        }
        Err(tensor.wrong("a positive number", scale.to_string()))
    }

    /// Factors for frequencies, which Llama 3.1 has, change nothing only if they are 1.
    fn check_rope_factors(&mut self) -> Result<(), LoadError> {
        let name = "rope_freqs.weight";
        if !self.gguf.tensors.contains_key(name) {
            return Ok(());
        }
        let tensor = self.tensor(name)?;
        let ones = tensor.meaning.read == Some(TensorType::F32)
            && tensor.bytes.chunks_exact(4).all(|bytes| *bytes == 1f32.to_le_bytes());
        if ones {
            return Ok(());
        }
        Err(LoadError::unsupported(
            &tensor.file,
            name,
            "rotation with a factor per frequency",
            "one without, or all of them 1",
        ))
    }

    /// The names of tensors that nothing asked for. Where such a tensor would change the result,
    /// leaving it out would be a wrong result, so it is an error.
    fn left_over(&self) -> Result<Vec<String>, LoadError> {
        let layers = self.config.model.layers;
        let mut unused = Vec::new();
        for (name, tensor) in &self.gguf.tensors {
            if self.used.contains(&**name) {
                continue;
            }
            let refuse = |found: &str, supported: &str| {
                Err(LoadError::unsupported(&tensor.file, name, found, supported))
            };
            if name.ends_with(".bias") {
                return refuse("a bias", "projections and norms without bias");
            }
            if let Some((index, part)) =
                name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'))
            {
                if index.parse().is_ok_and(|index: usize| index >= layers) {
                    return refuse(
                        &format!("a tensor of layer {index}"),
                        &format!("layers 0 to {}, as block_count says", layers - 1),
                    );
                }
                if part.starts_with("attn_") || part.starts_with("ffn_") || part.contains("norm") {
                    return refuse("a tensor with no place in the model's family", "none here");
                }
            }
            // What EmbeddingGemma has behind its last layer.
            if name.starts_with("dense_") {
                return refuse(
                    "a projection of embeddings",
                    "embeddings as the last norm gives them",
                );
            }
            unused.push(name.clone());
        }
        Ok(unused)
    }
}

/// The scale behind the codes of I2_S.
fn i2s_scale(tensor: &GgufTensor, rows: usize, cols: usize) -> Result<f32, LoadError> {
    if !(rows * cols).is_multiple_of(I2S_BLOCK) {
        let expected = format!("a multiple of {I2S_BLOCK} weights, since it is I2_S");
        return Err(tensor.wrong(expected, format!("{} of them", rows * cols)));
    }
    let at = rows * cols / 4;
    let mut scale = [0; 4];
    scale.copy_from_slice(&tensor.bytes[at..at + 4]);
    Ok(f32::from_le_bytes(scale))
}

/// A tensor's type and shape, as messages write what was found.
pub(crate) fn found(tensor: &GgufTensor) -> String {
    format!("{} {}", tensor.type_name(), shape_text(&tensor.shape()))
}

impl Matrix {
    /// The matrix, all of it checked.
    fn rows(&self) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let mut stored = StoredRows {
            rows: self.rows,
            cols: self.cols,
            scale: self.scale,
            layout: self.layout,
            bytes: &self.tensor.bytes,
        };
        if let Some(fault) = stored.check() {
            return Err(self.fault(fault));
        }
        if let Layout::Master { kind, .. } = stored.layout {
            let mean = stored.mean();
            stored.scale = mean;
            stored.layout = Layout::Master { kind, mean };
        }
        Ok(match self.interleaved {
            None => Box::new(stored),
            Some(dim) => Box::new(Deinterleaved { stored, dim }),
        })
    }

    /// The float weights, all of them checked, where they are masters. None of an architecture that has
    /// masters interleaves its rows; one that did would have none here.
    fn master(&self) -> Result<Option<HostTable>, LoadError> {
        let Layout::Master { kind, .. } = self.layout else { return Ok(None) };
        if self.interleaved.is_some() {
            return Ok(None);
        }
        let (rows, cols, bytes) = (self.rows, self.cols, &self.tensor.bytes);
        let (scale, layout) = (self.scale, self.layout);
        if let Some(fault) = (StoredRows { rows, cols, scale, layout, bytes }).check() {
            return Err(self.fault(fault));
        }
        let (float, bytes) = match float(kind) {
            Some(float) => (float, bytes.clone()),
            // Blocks become f32, which holds their values exactly.
            None => {
                let mut values = vec![0.0; cols];
                let mut wide = Vec::with_capacity(rows * cols * 4);
                for row in bytes.chunks_exact(row_bytes(kind, cols).unwrap_or(1)) {
                    dequantize(kind, row, &mut values);
                    wide.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                }
                (FloatType::F32, SharedBytes::new(wide))
            }
        };
        Ok(Some(HostTable { rows, cols, float, bytes }))
    }

    /// Refuses a down projection whose blocks seem to be those that bitnet.cpp writes on ARM.
    fn refuse_blocks_of_64(
        &self,
        norms: &HashMap<NormRole, Vec<f32>>,
        layer: usize,
    ) -> Result<(), LoadError> {
        let Some(gain) = norms.get(&NormRole::FfnSub(layer)) else { return Ok(()) };
        if self.layout != Layout::I2S {
            return Ok(());
        }
        // Training takes the gain of a channel that it turns off to 1e-30 and below.
        let dead = (0..gain.len()).filter(|at| gain[*at].abs() < 1e-20).collect::<Vec<_>>();
        if !has_blocks_of_64(&self.tensor.bytes, self.rows, self.cols, &dead) {
            return Ok(());
        }
        Err(LoadError::unsupported(
            &self.tensor.file,
            &*self.tensor.name,
            "I2_S in blocks of 64 weights, as bitnet.cpp writes it on ARM since November 2025,",
            "blocks of 128 weights: convert the model on x86",
        ))
    }

    fn fault(&self, fault: Fault) -> LoadError {
        match fault {
            Fault::Code { row, col } => {
                self.tensor.wrong("codes 0, 1 and 2", format!("code 3 at row {row}, column {col}"))
            }
            Fault::Scale { row, block, found } => self.tensor.wrong(
                format!(
                    "one scale for the whole matrix, {} as in its first block, or 0 for blocks of \
                     zeros",
                    self.scale
                ),
                format!("{found} in block {block} of row {row}"),
            ),
            Fault::Value { row, col, found } => {
                let expected = match self.layout {
                    Layout::Values { magnitude, .. } => {
                        format!("-{magnitude}, 0 and {magnitude} alone, as in its first rows")
                    }
                    _ => "finite numbers".into(),
                };
                self.tensor.wrong(expected, format!("{found} at row {row}, column {col}"))
            }
        }
    }
}

/// The rows of query or key heads in the order of half-split rotation: the file has rows `i` and
/// `dim / 2 + i` of each head next to each other (`permute` of llama.cpp's `convert_hf_to_gguf.py`).
struct Deinterleaved<'a> {
    stored: StoredRows<'a>,
    dim: usize,
}

impl TernaryRows for Deinterleaved<'_> {
    fn rows(&self) -> usize {
        self.stored.rows()
    }
    fn cols(&self) -> usize {
        self.stored.cols()
    }
    fn scale(&self) -> f32 {
        self.stored.scale()
    }
    fn read_codes(&self, row: usize, codes: &mut [u8]) {
        let (head, within) = (row / self.dim, row % self.dim);
        let (half, pair) = (within / (self.dim / 2), within % (self.dim / 2));
        self.stored.read_codes(head * self.dim + 2 * pair + half, codes);
    }
}

impl WeightSource for GgufWeights {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        self.layers[layer][projection as usize].rows()
    }

    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        self.layers[layer][projection as usize].master()
    }

    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        // A norm that the family does not have has no weights.
        Ok(self.norms.get(&role).cloned().unwrap_or_default())
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.embedding.host()
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        self.head.as_ref().unwrap_or(&self.embedding).host()
    }
}
