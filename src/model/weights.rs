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
    /// The float matrix that a ternary one is quantised from when it is loaded; `None` where the
    /// source holds none.
    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        let _ = (layer, projection);
        Ok(None)
    }
    /// Rank of what is added to a projection's product; 0, the default, where nothing is.
    fn adapter_rank(&self, layer: usize, projection: Projection) -> usize {
        let _ = (layer, projection);
        0
    }
    /// What is added to a projection's product, of the rank that
    /// [`adapter_rank`](Self::adapter_rank) answers.
    fn adapter(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Option<AdapterMatrices>, LoadError> {
        let _ = (layer, projection);
        Ok(None)
    }
    /// The gain of a norm.
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError>;
    /// The embedding table, `[vocabulary, hidden]`.
    fn embedding(&self) -> Result<HostTable, LoadError>;
    /// The output head, `[vocabulary, hidden]`; asked for only if it is not tied.
    fn head(&self) -> Result<HostTable, LoadError>;
}

impl<S: WeightSource + ?Sized> WeightSource for &S {
    fn config(&self) -> &ModelConfig {
        (**self).config()
    }
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        (**self).ternary(layer, projection)
    }
    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        (**self).master(layer, projection)
    }
    fn adapter_rank(&self, layer: usize, projection: Projection) -> usize {
        (**self).adapter_rank(layer, projection)
    }
    fn adapter(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Option<AdapterMatrices>, LoadError> {
        (**self).adapter(layer, projection)
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        (**self).norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        (**self).embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        (**self).head()
    }
}

/// What adapters add to a projection, as [`LowRank`](crate::backend::ops::LowRank) takes it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterMatrices {
    /// Rows of both.
    pub rank: usize,
    /// `[rank, width]`.
    pub down: Vec<f32>,
    /// `[rank, features]`.
    pub up: Vec<f32>,
}

/// What the adapters of a model need when it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AdapterSizes {
    /// Weights of all of them.
    pub parameters: u64,
    /// The highest rank of a projection.
    pub rank: usize,
    /// The widest input of a projection that has one.
    pub width: usize,
}

impl AdapterSizes {
    /// What the adapters of a source need; nothing where it has none.
    pub fn of(source: &dyn WeightSource) -> Self {
        let config = source.config();
        let mut sizes = Self::default();
        for layer in 0..config.layers {
            for projection in Projection::ALL {
                let (features, width) = config.shape(projection);
                let rank = source.adapter_rank(layer, projection);
                if rank > 0 {
                    sizes.parameters += (rank * (features + width)) as u64;
                    sizes.rank = sizes.rank.max(rank);
                    sizes.width = sizes.width.max(width);
                }
            }
        }
        sizes
    }

    /// Bytes of the weights and of the rows of `tokens` tokens, all f32; `None` if beyond `u64`.
    pub fn bytes(&self, tokens: usize) -> Option<u64> {
        let rows = (tokens as u64).checked_mul((self.rank + self.width) as u64)?;
        self.parameters.checked_add(rows)?.checked_mul(4)
    }
}

/// What is added to the product of a part of a linear.
pub struct Adapter<B: Backend> {
    /// Rows of both matrices.
    pub rank: usize,
    /// `[rank, width]`.
    pub down: B::Buffer<f32>,
    /// `[rank, features]`.
    pub up: B::Buffer<f32>,
    /// Rows of the part.
    pub features: usize,
    /// Where its features lie in a row of the layer's output.
    pub column: usize,
}

/// One product: a projection, or several that read the same rows, below each other.
pub struct Linear<B: Backend> {
    /// What it is made of, the first rows first.
    pub parts: Vec<Projection>,
    /// Gain of the norm that its input goes through before it is quantised, where it has one of its
    /// own.
    pub norm: Option<B::Buffer<f32>>,
    /// `[features, width]`.
    pub matrix: B::TernaryMatrix,
    /// Columns of the matrix.
    pub width: usize,
    /// Rows of the matrix.
    pub features: usize,
    /// Where its features lie in a row of the layer's output: those of a linear before it come
    /// first.
    pub column: usize,
    /// What is added to the product, part by part.
    pub adapters: Vec<Adapter<B>>,
}

/// A layer's weights on a device.
pub struct Layer<B: Backend> {
    /// Gain before attention.
    pub attention_norm: B::Buffer<f32>,
    /// Query, key and value projections: one linear, or one for each where each norms its input.
    pub qkv: Vec<Linear<B>>,
    /// Gain of each query head before it is rotated.
    pub query_norm: Option<B::Buffer<f32>>,
    /// Gain of each key head before it is rotated.
    pub key_norm: Option<B::Buffer<f32>>,
    /// The output projection.
    pub output: Linear<B>,
    /// Gain of what attention answers, before it is added to the residual stream.
    pub post_attention_norm: Option<B::Buffer<f32>>,
    /// Gain before the feed-forward network.
    pub ffn_norm: B::Buffer<f32>,
    /// Gate and up projections: one linear, or two where each norms its input.
    pub gate_up: Vec<Linear<B>>,
    /// The down projection.
    pub down: Linear<B>,
    /// Gain of what the feed-forward network answers, before it is added to the residual stream.
    pub post_ffn_norm: Option<B::Buffer<f32>>,
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
        let mut loader = Loader { backend, source, config: &config, progress, done: 0 };
        let layers =
            (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            final_norm: loader.norm(NormRole::Final)?,
            embedding: backend.load_table(source.embedding()?)?,
            head: (!config.tied_head).then(|| backend.load_table(source.head()?)).transpose()?,
        })
    }
}

struct Loader<'a, B: Backend> {
    backend: &'a mut B,
    source: &'a dyn WeightSource,
    config: &'a ModelConfig,
    progress: &'a mut dyn FnMut(usize, usize),
    /// Matrices packed so far.
    done: usize,
}

impl<B: Backend> Loader<'_, B> {
    fn layer(&mut self, index: usize) -> Result<Layer<B>, LoadError> {
        use Projection::{Down, Gate, Key, Output, Query, Up, Value};

        let row = self.config.family.row();
        let optional =
            |loader: &mut Self, there: bool, role| there.then(|| loader.norm(role)).transpose();
        Ok(Layer {
            attention_norm: self.norm(NormRole::Attention(index))?,
            qkv: self.linears(index, &[Query, Key, Value])?,
            query_norm: optional(self, row.head_norms, NormRole::QueryHead(index))?,
            key_norm: optional(self, row.head_norms, NormRole::KeyHead(index))?,
            output: self.linear(index, &[Output], 0)?,
            post_attention_norm: optional(self, row.post_norms, NormRole::PostAttention(index))?,
            ffn_norm: self.norm(NormRole::Ffn(index))?,
            gate_up: self.linears(index, &[Gate, Up])?,
            down: self.linear(index, &[Down], 0)?,
            post_ffn_norm: optional(self, row.post_norms, NormRole::PostFfn(index))?,
        })
    }

    /// Projections that write one row: one product, unless one of them norms its input for itself.
    fn linears(
        &mut self,
        layer: usize,
        projections: &[Projection],
    ) -> Result<Vec<Linear<B>>, LoadError> {
        if projections.iter().all(|&p| self.config.projection_norm(layer, p).is_none()) {
            return Ok(vec![self.linear(layer, projections, 0)?]);
        }
        let mut column = 0;
        let one = |projection: &Projection| {
            let linear = self.linear(layer, &[*projection], column)?;
            column += linear.features;
            Ok(linear)
        };
        projections.iter().map(one).collect()
    }

    fn linear(
        &mut self,
        layer: usize,
        projections: &[Projection],
        column: usize,
    ) -> Result<Linear<B>, LoadError> {
        let parts = projections
            .iter()
            .map(|&projection| self.source.ternary(layer, projection))
            .collect::<Result<Vec<_>, _>>()?;
        let parts: Vec<&dyn TernaryRows> = parts.iter().map(|part| &**part).collect();
        let matrix = self.backend.pack_ternary(&parts)?;
        self.done += projections.len();
        (self.progress)(self.done, self.config.layers * PROJECTIONS);
        let norm = self.config.projection_norm(layer, projections[0]);
        Ok(Linear {
            parts: projections.to_vec(),
            norm: norm.map(|role| self.norm(role)).transpose()?,
            matrix,
            width: self.config.shape(projections[0]).1,
            features: projections.iter().map(|&part| self.config.shape(part).0).sum(),
            column,
            adapters: self.adapters(layer, projections, column)?,
        })
    }

    fn adapters(
        &mut self,
        layer: usize,
        projections: &[Projection],
        mut column: usize,
    ) -> Result<Vec<Adapter<B>>, LoadError> {
        let mut adapters = Vec::new();
        for &projection in projections {
            let features = self.config.shape(projection).0;
            if let Some(matrices) = self.source.adapter(layer, projection)? {
                let AdapterMatrices { rank, down, up } = matrices;
                let (down, up) = (self.upload("adapter", &down)?, self.upload("adapter", &up)?);
                adapters.push(Adapter { rank, down, up, features, column });
            }
            column += features;
        }
        Ok(adapters)
    }

    fn norm(&mut self, role: NormRole) -> Result<B::Buffer<f32>, LoadError> {
        self.upload("norm", &self.source.norm(role)?)
    }

    fn upload(&mut self, name: &'static str, values: &[f32]) -> Result<B::Buffer<f32>, LoadError> {
        let mut buffer = self.backend.allocate(name, values.len())?;
        self.backend.write(&mut buffer, values)?;
        Ok(buffer)
    }
}
