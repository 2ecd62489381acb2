//! Host tensors to a model on a device.

use super::config::{ModelConfig, NormRole, Projection};
use crate::backend::Backend;
use crate::error::LoadError;
use crate::tensor::HostTable;
use crate::ternary::TernaryRows;

/// Ternary matrices of a layer.
pub const PROJECTIONS: usize = 7;

/// Where a model's weights come from: a checkpoint of any format, or a generator. Implementations
/// have checked that shapes agree with the config and that floats are finite by the time they
/// answer.
pub trait WeightSource {
    /// The hyper-parameters.
    fn config(&self) -> &ModelConfig;
    /// A ternary matrix of a layer, in the shape that [`ModelConfig::shape`] gives, its scale
    /// already one that multiplies.
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError>;
    /// The gain of a norm.
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError>;
    /// The embedding table, `[vocabulary, hidden]`.
    fn embedding(&self) -> Result<HostTable, LoadError>;
    /// The output head, `[vocabulary, hidden]`; asked for only if it is not tied.
    fn head(&self) -> Result<HostTable, LoadError>;
}

/// A layer's weights on a device.
pub struct Layer<B: Backend> {
    /// Gain before attention.
    pub attention_norm: B::Buffer<f32>,
    /// Query, key and value projections below each other.
    pub qkv: B::TernaryMatrix,
    /// Gain before the output projection.
    pub attention_sub_norm: Option<B::Buffer<f32>>,
    /// The output projection.
    pub output: B::TernaryMatrix,
    /// Gain before the feed-forward network.
    pub ffn_norm: B::Buffer<f32>,
    /// Gate and up projections below each other.
    pub gate_up: B::TernaryMatrix,
    /// Gain before the down projection.
    pub ffn_sub_norm: Option<B::Buffer<f32>>,
    /// The down projection.
    pub down: B::TernaryMatrix,
}

/// A model's weights on a device.
pub struct Weights<B: Backend> {
    /// The embedding table.
    pub embedding: B::Table,
    /// The layers, first to last.
    pub layers: Vec<Layer<B>>,
    /// Gain before the output head.
    pub final_norm: B::Buffer<f32>,
    /// The output head; the embedding table if absent.
    pub head: Option<B::Table>,
}

impl<B: Backend> Weights<B> {
    /// Packs a model layer by layer; no more than one matrix is held besides its source and the
    /// packed form. `progress` hears how many of how many matrices are done.
    pub fn load(
        backend: &mut B,
        source: &dyn WeightSource,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let config = source.config().clone();
        let family = config.family.row();
        let total = config.layers * PROJECTIONS;
        let mut done = 0;
        let mut layers = Vec::with_capacity(config.layers);
        for index in 0..config.layers {
            let mut pack = |backend: &B, projections: &[Projection]| {
                let parts = projections
                    .iter()
                    .map(|&projection| source.ternary(index, projection))
                    .collect::<Result<Vec<_>, _>>()?;
                let parts: Vec<&dyn TernaryRows> = parts.iter().map(|part| &**part).collect();
                let packed = backend.pack_ternary(&parts)?;
                done += projections.len();
                progress(done, total);
                Ok::<_, LoadError>(packed)
            };
            let qkv = pack(backend, &[Projection::Query, Projection::Key, Projection::Value])?;
            let output = pack(backend, &[Projection::Output])?;
            let gate_up = pack(backend, &[Projection::Gate, Projection::Up])?;
            let down = pack(backend, &[Projection::Down])?;
            layers.push(Layer {
                attention_norm: upload(backend, source, NormRole::Attention(index))?,
                qkv,
                attention_sub_norm: family
                    .attention_sub_norm
                    .then(|| upload(backend, source, NormRole::AttentionSub(index)))
                    .transpose()?,
                output,
                ffn_norm: upload(backend, source, NormRole::Ffn(index))?,
                gate_up,
                ffn_sub_norm: family
                    .ffn_sub_norm
                    .then(|| upload(backend, source, NormRole::FfnSub(index)))
                    .transpose()?,
                down,
            });
        }
        Ok(Self {
            embedding: backend.load_table(source.embedding()?)?,
            layers,
            final_norm: upload(backend, source, NormRole::Final)?,
            head: (!config.tied_head).then(|| backend.load_table(source.head()?)).transpose()?,
        })
    }
}

fn upload<B: Backend>(
    backend: &mut B,
    source: &dyn WeightSource,
    role: NormRole,
) -> Result<B::Buffer<f32>, LoadError> {
    let gain = source.norm(role)?;
    let mut buffer = backend.allocate("norm", gain.len())?;
    backend.write(&mut buffer, &gain)?;
    Ok(buffer)
}
