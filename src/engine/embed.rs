//! Embeddings: a text as one vector. Several texts run as one ragged batch.

use super::session::Session;
use crate::backend::PAGE_TOKENS;
pub use crate::checkpoint::Pooling;
use crate::error::{RunError, SubmitError};
use crate::model::batch::{Batch, BatchSequence, LogitRow, Purpose, TokenSource};

/// A text on its way.
struct Live<'r> {
    ids: &'r [u32],
    lane: usize,
    pages: Vec<u32>,
    /// Tokens in the cache.
    done: usize,
    /// The sum of the pooled rows.
    sum: Vec<f64>,
}

impl Session {
    /// The embeddings of texts, each of `hidden` values and of length 1: `x / √Σx²` of the pooled row
    /// `x`. As many run at a time as lanes and pages allow; the answers are in the order of the
    /// texts, and bit for bit what each text would get alone.
    ///
    /// # Errors
    ///
    /// A text that is empty, too long or has tokens beyond the vocabulary, before any work is done; a
    /// failure of the device.
    pub fn embed(
        &mut self,
        texts: &[Vec<u32>],
        pooling: Pooling,
    ) -> Result<Vec<Vec<f32>>, RunError> {
        for ids in texts {
            self.check_text(ids)?;
        }
        self.reset();
        let mut embeddings = Vec::with_capacity(texts.len());
        while embeddings.len() < texts.len() {
            let mut live = self.admit_texts(&texts[embeddings.len()..])?;
            let mut result = Ok(());
            while result.is_ok() && live.iter().any(|text| text.done < text.ids.len()) {
                result = self.embed_step(&mut live, pooling);
            }
            for text in &mut live {
                self.pages.shrink(&mut text.pages, 0);
            }
            if result.is_err() {
                self.drain();
            }
            result?;
            embeddings.extend(live.iter().map(|text| unit(&text.sum)));
        }
        Ok(embeddings)
    }

    fn check_text(&self, ids: &[u32]) -> Result<(), SubmitError> {
        let (vocabulary, context) = (self.config().vocabulary, self.context());
        if ids.is_empty() {
            return Err(SubmitError::invalid("text", "at least one token", "none"));
        }
        if let Some(token) = ids.iter().find(|&&token| token as usize >= vocabulary) {
            let expected = format!("tokens below the vocabulary, {vocabulary}");
            return Err(SubmitError::invalid("text", expected, token));
        }
        if ids.len() > context {
            return Err(SubmitError::TooLong { prompt: ids.len(), context });
        }
        Ok(())
    }

    /// Takes as many of the first texts as there are lanes and pages for.
    fn admit_texts<'r>(&mut self, texts: &'r [Vec<u32>]) -> Result<Vec<Live<'r>>, RunError> {
        let mut live = Vec::new();
        for (lane, ids) in texts.iter().take(self.executor.reserve().sequences).enumerate() {
            if !live.is_empty() && ids.len().div_ceil(PAGE_TOKENS) > self.pages.free() {
                break;
            }
            let mut pages = Vec::new();
            self.pages.grow(&mut pages, ids.len())?;
            let sum = vec![0.0; self.config().hidden];
            live.push(Live { ids, lane, pages, done: 0, sum });
        }
        Ok(live)
    }

    /// One step over what is left of the texts: no more tokens than a step may bring, no more pooled
    /// rows than one pass of the head has.
    fn embed_step(&mut self, live: &mut [Live<'_>], pooling: Pooling) -> Result<(), RunError> {
        let reserve = *self.executor.reserve();
        let (mut tokens, mut rows) = (reserve.step_tokens, reserve.logit_rows(self.config()));
        let mut sequences = Vec::new();
        let mut taken = Vec::new();
        for (index, text) in live.iter().enumerate() {
            let mut count = (text.ids.len() - text.done).min(tokens);
            let mut pooled = match pooling {
                Pooling::Last if text.done + count < text.ids.len() => count..count,
                Pooling::Last => count.saturating_sub(1)..count,
                Pooling::Cls if text.done > 0 => 0..0,
                Pooling::Cls => 0..count.min(1),
                Pooling::Mean => 0..count,
            };
            if pooled.len() > rows {
                count = pooled.start + rows;
                pooled.end = count;
            }
            if count == 0 {
                continue;
            }
            (tokens, rows) = (tokens - count, rows - pooled.len());
            let pooled_rows = pooled.len();
            let logit = |index| LogitRow { index, target: None, sample: None };
            let part = &text.ids[text.done..text.done + count];
            sequences.push(BatchSequence {
                lane: text.lane,
                start: text.done,
                tokens: part.iter().map(|&token| TokenSource::Token(token)).collect(),
                pages: text.pages.clone(),
                logits: pooled.map(logit).collect(),
            });
            taken.push((index, count, pooled_rows));
        }
        self.executor.submit(&Batch { sequences, purpose: Purpose::Embed, hidden: true })?;
        let hidden = self.executor.collect()?.hidden;
        let mut pooled = hidden.chunks_exact(self.config().hidden);
        for (index, count, rows) in taken {
            let text = &mut live[index];
            text.done += count;
            for row in pooled.by_ref().take(rows) {
                text.sum.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
            }
        }
        Ok(())
    }
}

/// A vector of length 1 in the same direction; zeros stay zeros.
fn unit(x: &[f64]) -> Vec<f32> {
    let length = x.iter().map(|x| x * x).sum::<f64>().sqrt();
    x.iter().map(|x| if length > 0.0 { (x / length) as f32 } else { 0.0 }).collect()
}
