//! Models made of random numbers, in shapes that no kernel likes.

use std::num::NonZeroUsize;

use trine::backend::KvType;
use trine::backend::ops::{Activation, Heads};
use trine::error::LoadError;
use trine::model::activations::Reserve;
use trine::model::config::{Attention, Family, LocalLayers, ModelConfig, NormRole, Projection};
use trine::model::weights::WeightSource;
use trine::tensor::{FloatType, HostTable, SharedBytes};
use trine::ternary::{TernaryRows, TernaryTensor};

use super::rng::Rng;

/// A model of any shape. The same config and seed give the same weights.
#[derive(Debug, Clone)]
pub(crate) struct RandomModel {
    pub(crate) config: ModelConfig,
    pub(crate) seed: u64,
    pub(crate) embedding: FloatType,
    pub(crate) head: FloatType,
}

impl RandomModel {
    fn gain(&self, path: &[u64], width: usize) -> Vec<f32> {
        let mut rng = Rng::of(&[&[self.seed, 1], path].concat());
        (0..width)
            .map(|i| match i % 11 {
                // Gains of published checkpoints are of either sign, and some all but vanish.
                3 => -rng.range(0.2, 1.5),
                7 => rng.range(-1e-4, 1e-4),
                _ => rng.range(0.4, 1.6),
            })
            .collect()
    }

    fn table(&self, path: u64, float: FloatType) -> HostTable {
        let (rows, cols) = (self.config.vocabulary, self.config.hidden);
        let values = Rng::of(&[self.seed, 2, path]).normals(rows * cols, 0.5);
        host_table(rows, cols, float, &values)
    }
}

impl WeightSource for RandomModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (rows, cols) = self.config.shape(projection);
        let mut rng = Rng::of(&[self.seed, 3, layer as u64, projection as u64]);
        // Outputs of the order of 1, whatever the width; scales differ between the parts of a
        // matrix, so that a part that takes its neighbour's scale is seen.
        let scale = rng.range(0.4, 2.5) / (cols as f32).sqrt();
        let weights = rng.ternary(rows * cols);
        Ok(Box::new(TernaryTensor::from_weights(rows, cols, scale, &weights).unwrap()))
    }

    fn norm(&self, role: NormRole) -> Result<Vec<f32>, LoadError> {
        let path = match role {
            NormRole::Attention(layer) => [0, layer],
            NormRole::AttentionSub(layer) => [1, layer],
            NormRole::Ffn(layer) => [2, layer],
            NormRole::FfnSub(layer) => [3, layer],
            NormRole::Final => [4, 0],
            NormRole::QueryHead(layer) => [5, layer],
            NormRole::KeyHead(layer) => [6, layer],
            NormRole::PostAttention(layer) => [16, layer],
            NormRole::PostFfn(layer) => [17, layer],
            NormRole::Projection(layer, projection) => [8 + projection as usize, layer],
        };
        Ok(self.gain(&path.map(|part| part as u64), self.config.norm_width(role)))
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        Ok(self.table(0, self.embedding))
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        Ok(self.table(1, self.head))
    }
}

/// A table that starts at an odd address, which safetensors allows.
pub(crate) fn host_table(rows: usize, cols: usize, float: FloatType, values: &[f32]) -> HostTable {
    let mut bytes = vec![0];
    for &value in values {
        match float {
            FloatType::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
            FloatType::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
            FloatType::F32 => bytes.extend(value.to_le_bytes()),
        }
    }
    let len = bytes.len();
    HostTable { rows, cols, float, bytes: SharedBytes::new(bytes).slice(1..len).unwrap() }
}

/// Small models that between them have all families, all activations, tied and untied heads,
/// every float type, groups of 1 to 5 query heads, and widths that are a multiple of nothing.
pub(crate) fn awkward_models() -> Vec<RandomModel> {
    use Activation::{GeluTanh, Relu2, Silu};
    use Family::{BitNet, Gemma3, Llama, Qwen3};
    use FloatType::{Bf16, F16, F32};
    let model = |seed, family, [hidden, ffn, layers, vocabulary]: [usize; 4], heads: [usize; 3]| {
        move |activation, tied_head, embedding, head| RandomModel {
            config: ModelConfig {
                family,
                hidden,
                ffn,
                layers,
                heads: Heads { query: heads[0], kv: heads[1], dim: heads[2] },
                vocabulary,
                context: 512,
                rms_eps: 1e-5,
                rope_theta: 10_000.0,
                activation,
                tied_head,
                attention: Attention::default(),
            },
            seed,
            embedding,
            head,
        }
    };
    let mut gemma = model(8, Gemma3, [52, 35, 2, 71], [3, 1, 12])(GeluTanh, true, F16, F16);
    gemma.config.attention = Attention {
        scale: Some(0.4),
        local: Some(LocalLayers {
            window: NonZeroUsize::new(11).unwrap(),
            rope_theta: 50.0,
            layers: vec![true, false],
        }),
    };
    vec![
        model(1, BitNet, [36, 50, 2, 61], [4, 1, 6])(Relu2, true, Bf16, Bf16),
        model(2, Llama, [100, 133, 1, 257], [3, 3, 20])(Silu, false, F32, F16),
        model(3, BitNet, [260, 300, 1, 129], [5, 1, 20])(GeluTanh, false, F16, F32),
        model(4, Llama, [64, 97, 2, 97], [6, 2, 10])(Relu2, true, F32, F32),
        model(5, BitNet, [33, 7, 3, 31], [6, 2, 6])(Silu, true, F16, F16),
        model(6, Llama, [10, 3, 2, 5], [2, 1, 2])(GeluTanh, false, Bf16, F32),
        model(7, Qwen3, [44, 60, 2, 83], [4, 2, 14])(Silu, true, Bf16, Bf16),
        gemma,
        // The remainders of 1bitLLM's 3B: 3200 and 8640 by 256, and heads of 100.
        model(9, BitNet, [384, 448, 1, 67], [2, 2, 100])(Silu, true, F16, F16),
    ]
}

/// The first of [`awkward_models`]: for tests that need one model only.
pub(crate) fn small_model() -> RandomModel {
    awkward_models().swap_remove(0)
}

/// Enough of everything for the small models; tests change what they are about.
pub(crate) fn roomy() -> Reserve {
    Reserve { context: 128, sequences: 6, step_tokens: 80, kv_pages: 24, kv_type: KvType::F32 }
}
