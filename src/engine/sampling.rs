//! Sampling options: how the next token is picked from the logits.
//!
//! Options apply in vLLM's order: logit bias; repetition penalty (prompt and answer), then
//! frequency and presence penalties (answer); temperature; min-p; top-k; top-p; then one token is
//! drawn from what is left. Temperature 0 is greedy: the highest logit after biases and penalties
//! wins, the lowest token among equals, and min-p, top-k and top-p change nothing. Log-probabilities
//! are those of the unmodified logits. [`ops::Sample`](crate::backend::ops::Sample) has the formulas.
//!
//! Draws are keyed by seed, position and choice: the same seed gives the same answer, alone or
//! among others.

use crate::backend::MAX_LOGPROBS;
use crate::backend::ops::SampleRow;
use crate::error::SubmitError;
use crate::model::activations::MAX_BIASES;
use crate::model::batch::RowOptions;

/// Options of one request. [`SamplingParams::default`] is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; the logits are divided by it.
    pub temperature: f32,
    /// Keep the k highest logits; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest tokens whose probabilities reach this share; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this fraction of the highest probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once per occurrence in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Subtracted once if the token occurs in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Added to the logits of tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws; a random one if absent.
    pub seed: Option<u64>,
    /// Which of several answers to one prompt this is; each draws differently.
    pub choice: u32,
    /// Report the log-probability of each token and of this many likeliest ones.
    pub logprobs: Option<u32>,
    /// The most tokens of an answer; without it the context is the limit.
    pub max_tokens: Option<usize>,
    /// Texts that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer and are not part of it.
    pub stop_tokens: Vec<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            choice: 0,
            logprobs: None,
            max_tokens: None,
            stop: Vec::new(),
            stop_tokens: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Checks every option against its range.
    pub fn validate(&self, vocabulary: usize) -> Result<(), SubmitError> {
        let range = |field: &str, value: f32, low: f32, high: f32, expected: &str| {
            if value.is_finite() && (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(SubmitError::invalid(field, expected, value))
            }
        };
        // Wide enough for every use, and narrow enough that no option makes a finite logit infinite.
        if self.temperature != 0.0 {
            range("temperature", self.temperature, 1e-3, 1e3, "0, or 0.001 to 1000")?;
        }
        range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, "more than 0, at most 1")?;
        range("min_p", self.min_p, 0.0, 1.0, "0 to 1")?;
        range("repetition_penalty", self.repetition_penalty, 0.01, 100.0, "0.01 to 100")?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0, "-2 to 2")?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0, "-2 to 2")?;
        if self.logit_bias.len() > MAX_BIASES {
            let expected = format!("at most {MAX_BIASES} tokens");
            return Err(SubmitError::invalid("logit_bias", expected, self.logit_bias.len()));
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocabulary {
                let expected = format!("tokens below the vocabulary, {vocabulary}");
                return Err(SubmitError::invalid("logit_bias", expected, token));
            }
            range("logit_bias", bias, -1e6, 1e6, "biases of -1000000 to 1000000")?;
        }
        if let Some(count) = self.logprobs.filter(|&count| count as usize > MAX_LOGPROBS) {
            let expected = format!("at most {MAX_LOGPROBS}");
            return Err(SubmitError::invalid("logprobs", expected, count));
        }
        if self.max_tokens == Some(0) {
            return Err(SubmitError::invalid("max_tokens", "1 or more", 0));
        }
        if self.stop.iter().any(String::is_empty) {
            return Err(SubmitError::invalid("stop", "texts that are not empty", "an empty one"));
        }
        Ok(())
    }

    /// The device's form of these options, for a prompt of `prompt` tokens.
    pub(crate) fn row_options(&self, seed: u64, prompt: usize) -> RowOptions {
        RowOptions {
            row: SampleRow {
                prompt: prompt as u32,
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                frequency_penalty: self.frequency_penalty,
                presence_penalty: self.presence_penalty,
                seed_low: seed as u32,
                seed_high: (seed >> 32) as u32,
                choice: self.choice,
                logprobs: self.logprobs.unwrap_or(0),
                ..SampleRow::default()
            },
            biases: self.logit_bias.clone(),
        }
    }
}

/// A seed that differs from call to call: the standard library's per-process random keys, stirred
/// by the clock.
pub(crate) fn random_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    if let Ok(time) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
        hasher.write_u128(time.as_nanos());
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_range_is_held() {
        let good = SamplingParams::default();
        assert_eq!(good.validate(10), Ok(()));
        type Spoil = fn(&mut SamplingParams);
        let bad: [(&str, Spoil); 12] = [
            ("temperature", |p| p.temperature = -0.1),
            ("temperature", |p| p.temperature = f32::NAN),
            ("top_p", |p| p.top_p = 0.0),
            ("top_p", |p| p.top_p = 1.5),
            ("min_p", |p| p.min_p = -1.0),
            ("repetition_penalty", |p| p.repetition_penalty = 0.0),
            ("frequency_penalty", |p| p.frequency_penalty = 3.0),
            ("presence_penalty", |p| p.presence_penalty = f32::INFINITY),
            ("logit_bias", |p| p.logit_bias = vec![(10, 1.0)]),
            ("logprobs", |p| p.logprobs = Some(21)),
            ("max_tokens", |p| p.max_tokens = Some(0)),
            ("stop", |p| p.stop = vec![String::new()]),
        ];
        for (field, spoil) in bad {
            let mut params = good.clone();
            spoil(&mut params);
            let error = params.validate(10).unwrap_err().to_string();
            assert!(error.starts_with(field), "{error}");
        }
    }
}
