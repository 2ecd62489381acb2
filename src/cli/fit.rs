//! Whether a model fits on a device, with the numbers.

use serde_json::{Value, json};
use trine::backend::select::DeviceStatus;
use trine::backend::{KvLayout, PAGE_TOKENS};
use trine::engine::ModelFiles;
use trine::model::activations::Reserve;
use trine::model::weights::AdapterSizes;

use super::inspect::Bytes;
use super::output::bytes;

/// What a model needs when it is loaded.
pub(crate) struct Needed {
    pub(crate) model: u64,
    /// Weights and rows of adapters.
    pub(crate) adapters: u64,
    pub(crate) kv: u64,
    pub(crate) activations: u64,
    /// Tokens of the KV cache.
    tokens: usize,
    /// The largest piece that must be bound whole.
    piece: (&'static str, u64),
}

impl Needed {
    pub(crate) fn of(files: &ModelFiles, reserve: &Reserve) -> Self {
        let config = files.config();
        let bound = |bytes: Option<usize>| bytes.map_or(u64::MAX, |bytes| bytes as u64);
        let piece = reserve.largest_piece(config);
        let adapters = AdapterSizes::of(files.weights());
        Self {
            model: Bytes::of(files).model(),
            adapters: adapters.bytes(reserve.step_tokens).unwrap_or(u64::MAX),
            kv: bound(KvLayout::bytes(&reserve.kv_layout(config))),
            activations: bound(reserve.activation_bytes(config)),
            tokens: reserve.kv_pages * PAGE_TOKENS,
            piece: piece.map_or(("activations", u64::MAX), |(name, bytes)| (name, bytes as u64)),
        }
    }

    pub(crate) fn sum(&self) -> u64 {
        let parts = [self.adapters, self.kv, self.activations];
        parts.into_iter().fold(self.model, u64::saturating_add)
    }

    /// The sum and its parts.
    pub(crate) fn arithmetic(&self) -> String {
        let adapters = match self.adapters {
            0 => String::new(),
            some => format!(" + adapters {}", bytes(some)),
        };
        format!(
            "{} = model {}{adapters} + KV cache for {} tokens {} + activations {}",
            bytes(self.sum()),
            bytes(self.model),
            self.tokens,
            bytes(self.kv),
            bytes(self.activations)
        )
    }

    /// Whether a device can run it, and if not, why.
    pub(crate) fn fits(&self, device: &DeviceStatus) -> Result<(), String> {
        if let Err(reason) = &device.state {
            return Err(reason.clone());
        }
        if let Some(memory) = device.memory.filter(|&memory| self.sum() > memory) {
            let (needed, memory) = (bytes(self.sum()), bytes(memory));
            return Err(format!("it needs {needed} of memory, and there are {memory}"));
        }
        let most = device.gpu.as_ref().map(|gpu| gpu.binding_bytes.min(gpu.buffer_bytes));
        let (name, piece) = self.piece;
        if let Some(most) = most.filter(|&most| piece > most) {
            let (piece, most) = (bytes(piece), bytes(most));
            return Err(format!("{name} take {piece} in one piece, and it binds {most} at most"));
        }
        Ok(())
    }

    /// The same in words, with what the device is.
    pub(crate) fn verdict(&self, device: &DeviceStatus) -> String {
        let what = device.state.as_deref().unwrap_or_default();
        match (self.fits(device), &device.state) {
            (Ok(()), _) => format!("yes: {what}"),
            (Err(reason), Ok(what)) => format!("no: {reason}; {what}"),
            (Err(reason), Err(_)) => format!("no: {reason}"),
        }
    }

    /// The same as JSON.
    pub(crate) fn json(&self, device: &DeviceStatus) -> Value {
        let fits = self.fits(device);
        json!({
            "fits": fits.is_ok(),
            "reason": fits.err(),
            "needed_bytes": self.sum(),
            "largest_piece_bytes": self.piece.1,
        })
    }
}
