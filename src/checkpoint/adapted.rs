//! A model with adapters: applied when it runs, or merged into its master weights.

use super::hf::weights::PROJECTIONS;
use super::lora::{Adapter, Pair};
use crate::error::LoadError;
use crate::model::config::{ModelConfig, NormRole, Projection};
use crate::model::weights::{AdapterMatrices, WeightSource};
use crate::tensor::HostTable;
use crate::ternary::{TernaryRows, TernaryTensor};

/// A model and the adapters that are applied to it when it runs; their sums add up. The ternary
/// weights are those of the model.
#[derive(Debug)]
pub struct Adapted<S> {
    base: S,
    adapters: Vec<Adapter>,
}

impl<S: WeightSource> Adapted<S> {
    /// A model without adapters.
    pub fn new(base: S) -> Self {
        Self { base, adapters: Vec::new() }
    }

    /// Adds an adapter.
    ///
    /// # Errors
    ///
    /// A sentence that names the tensor that does not fit the model.
    pub fn add(&mut self, adapter: Adapter) -> Result<(), LoadError> {
        adapter.check(self.base.config())?;
        self.adapters.push(adapter);
        Ok(())
    }

    /// The model itself.
    pub fn base(&self) -> &S {
        &self.base
    }

    /// The adapters, in the order in which they were added.
    pub fn adapters(&self) -> &[Adapter] {
        &self.adapters
    }

    /// The matrices of all adapters for a projection, each with its adapter's factor on `B`.
    fn pairs(
        &self,
        layer: usize,
        projection: Projection,
    ) -> impl Iterator<Item = Result<Scaled, LoadError>> {
        self.adapters.iter().filter_map(move |adapter| {
            let pair = adapter.pair(layer, projection)?;
            Some(Scaled::of(pair, adapter.strength()))
        })
    }
}

/// An adapter's matrices for a projection in f32.
struct Scaled {
    rank: usize,
    /// `[rank, width]`.
    down: Vec<f32>,
    /// `[features, rank]`, times the factor.
    up: Vec<f32>,
}

impl Scaled {
    fn of(pair: &Pair, strength: f32) -> Result<Self, LoadError> {
        let scale = (pair.scale * f64::from(strength)) as f32;
        let [down, mut up] = [&pair.down, &pair.up].map(|tensor| {
            let mut values = vec![0.0; tensor.shape.iter().product()];
            if let Some(float) = tensor.float() {
                float.decode(&tensor.bytes, &mut values);
            }
            values
        });
        up.iter_mut().for_each(|x| *x *= scale);
        if up.iter().any(|x| !x.is_finite()) {
            let expected = format!("numbers that are finite in f32 when multiplied by {scale}");
            return Err(pair.up.wrong(expected, "larger ones"));
        }
        Ok(Self { rank: pair.rank(), down, up })
    }
}

impl<S: WeightSource> WeightSource for Adapted<S> {
    fn config(&self) -> &ModelConfig {
        self.base.config()
    }
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        self.base.ternary(layer, projection)
    }
    fn master(&self, layer: usize, projection: Projection) -> Result<Option<HostTable>, LoadError> {
        self.base.master(layer, projection)
    }
    fn adapter_rank(&self, layer: usize, projection: Projection) -> usize {
        let pairs = self.adapters.iter().filter_map(|adapter| adapter.pair(layer, projection));
        pairs.map(Pair::rank).sum()
    }
    /// The matrices of all adapters below each other, so that one product serves them.
    fn adapter(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Option<AdapterMatrices>, LoadError> {
        let (features, _) = self.config().shape(projection);
        let mut all = AdapterMatrices { rank: 0, down: Vec::new(), up: Vec::new() };
        for scaled in self.pairs(layer, projection) {
            let Scaled { rank, down, up } = scaled?;
            all.rank += rank;
            all.down.extend(down);
            all.up.extend(
                (0..rank)
                    .flat_map(|j| (0..features).map(move |n| (n, j)))
                    .map(|(n, j)| up[n * rank + j]),
            );
        }
        Ok(Some(all).filter(|all| all.rank > 0))
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        self.base.norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.base.embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        self.base.head()
    }
}

/// A model with its adapters added to its master weights, which are made ternary by
/// [`absmean`](crate::ternary::absmean) after that: what PEFT's `merge_and_unload` and a model that
/// quantises as it loads give. Projections without an adapter stay as they are.
#[derive(Debug)]
pub struct Merged<S>(Adapted<S>);

impl<S: WeightSource> Merged<S> {
    /// Merges the adapters of a model.
    ///
    /// # Errors
    ///
    /// A sentence that names the first projection that an adapter changes and that has no master
    /// weights: ternary weights have no room for what an adapter adds. Nor have weights behind a norm
    /// that the adapter comes before.
    pub fn new(adapted: Adapted<S>) -> Result<Self, LoadError> {
        let row = adapted.config().family.row();
        if let Some(adapter) = adapted.adapters().first().filter(|_| row.projection_norms) {
            // PEFT's merge_and_unload does it all the same, and the model then answers something else.
            return Err(LoadError::unsupported(
                adapter.folder(),
                "merging",
                format!("a base with a norm inside its projections, {},", row.name),
                "bases without; the adapter reads what that norm reads, so no weights behind it do the \
                 same: --lora applies it when the model runs",
            ));
        }
        for adapter in adapted.adapters() {
            for (projection, name) in PROJECTIONS {
                for layer in 0..adapted.config().layers {
                    let changed = adapter.pair(layer, projection).is_some();
                    if changed && adapted.master(layer, projection)?.is_none() {
                        return Err(LoadError::unsupported(
                            adapter.folder(),
                            "merging",
                            format!(
                                "a base without float master weights of {name} in layer {layer}"
                            ),
                            "a folder or a GGUF file with float master weights; an adapter of any \
                             other base is applied when the model runs, by --lora",
                        ));
                    }
                }
            }
        }
        Ok(Self(adapted))
    }

    /// The model with the adapters beside it.
    pub fn adapted(&self) -> &Adapted<S> {
        &self.0
    }
}

impl<S: WeightSource> WeightSource for Merged<S> {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }
    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let Some(master) = self.0.master(layer, projection)? else {
            return self.0.ternary(layer, projection);
        };
        if self.0.adapter_rank(layer, projection) == 0 {
            return self.0.ternary(layer, projection);
        }
        let (rows, cols) = (master.rows, master.cols);
        let mut weights = vec![0.0; rows * cols];
        for (row, weights) in weights.chunks_exact_mut(cols.max(1)).enumerate() {
            master.read_row(row, weights);
        }
        for scaled in self.0.pairs(layer, projection) {
            let Scaled { rank, down, up } = scaled?;
            for (weights, up) in weights.chunks_exact_mut(cols.max(1)).zip(up.chunks_exact(rank)) {
                let mut sums = vec![0.0f64; cols];
                for (&b, down) in up.iter().zip(down.chunks_exact(cols.max(1))) {
                    for (sum, &a) in sums.iter_mut().zip(down) {
                        *sum += f64::from(b) * f64::from(a);
                    }
                }
                for (weight, sum) in weights.iter_mut().zip(sums) {
                    *weight += sum as f32;
                }
            }
        }
        let (_, name) = PROJECTIONS[projection as usize];
        let merged = TernaryTensor::from_floats(rows, cols, &weights).ok_or_else(|| {
            let place = self.0.adapters().first().map_or("adapter".as_ref(), Adapter::folder);
            let field = format!("merged {name} of layer {layer}");
            LoadError::invalid(place, field, "numbers that are finite in f32", "larger ones")
        })?;
        Ok(Box::new(merged))
    }
    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        self.0.norm(role)
    }
    fn embedding(&self) -> Result<HostTable, LoadError> {
        self.0.embedding()
    }
    fn head(&self) -> Result<HostTable, LoadError> {
        self.0.head()
    }
}
