//! A model whose logits a test chooses: after a token come that token's logits, to the bit, on any
//! backend whose arithmetic is exact on powers of two.

use trine::backend::ops::{Activation, Heads};
use trine::error::LoadError;
use trine::model::config::{Attention, Family, ModelConfig, NormRole, Projection};
use trine::model::weights::WeightSource;
use trine::tensor::{FloatType, HostTable};
use trine::ternary::{TernaryRows, TernaryTensor};

use super::model::host_table;

/// Tokens of the model, a square, so that the norm of a one-hot row is exact.
pub(crate) const TOKENS: usize = 16;

/// `logits[token]` are the logits after `token`.
///
/// The embedding of a token is one-hot and the layer adds nothing, so the final norm answers
/// `sqrt(16) = 4` at the token's place; the head holds the logits divided by 4.
#[derive(Debug, Clone)]
pub(crate) struct Markov {
    config: ModelConfig,
    logits: Vec<[f32; TOKENS]>,
    /// A token whose embedding is not a number.
    pub(crate) spoiled: Option<usize>,
}

impl Markov {
    /// The same logits after every token.
    pub(crate) fn constant(logits: [f32; TOKENS]) -> Self {
        Self::new(vec![logits; TOKENS])
    }

    pub(crate) fn new(logits: Vec<[f32; TOKENS]>) -> Self {
        let config = ModelConfig {
            family: Family::Llama,
            hidden: TOKENS,
            ffn: 2,
            layers: 1,
            heads: Heads { query: 1, kv: 1, dim: 2 },
            vocabulary: TOKENS,
            context: 64,
            // Vanishes beside 1/16 even in f64.
            rms_eps: 1e-30,
            rope_theta: 1e4,
            activation: Activation::Silu,
            tied_head: false,
            attention: Attention::default(),
        };
        Self { config, logits, spoiled: None }
    }
}

impl WeightSource for Markov {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn ternary(
        &self,
        _layer: usize,
        projection: Projection,
    ) -> Result<Box<dyn TernaryRows + '_>, LoadError> {
        let (rows, cols) = self.config.shape(projection);
        Ok(Box::new(TernaryTensor::from_weights(rows, cols, 1.0, &vec![0; rows * cols]).unwrap()))
    }

    fn norm(&self, _role: NormRole) -> Result<Vec<f32>, LoadError> {
        Ok(vec![1.0; TOKENS])
    }

    fn embedding(&self) -> Result<HostTable, LoadError> {
        let mut one_hot = vec![0.0; TOKENS * TOKENS];
        for token in 0..TOKENS {
            let spoiled = self.spoiled == Some(token);
            one_hot[token * TOKENS + token] = if spoiled { f32::NAN } else { 1.0 };
        }
        Ok(host_table(TOKENS, TOKENS, FloatType::F32, &one_hot))
    }

    fn head(&self) -> Result<HostTable, LoadError> {
        let values: Vec<f32> =
            (0..TOKENS * TOKENS).map(|i| self.logits[i % TOKENS][i / TOKENS] / 4.0).collect();
        Ok(host_table(TOKENS, TOKENS, FloatType::F32, &values))
    }
}
