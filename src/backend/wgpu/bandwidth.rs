//! The rate at which a GPU copies its own memory: what the speed of decoding is held against.

use std::time::Instant;

use super::gpu::Gpu;
use crate::error::LoadError;

/// Bytes that are copied at a time: far more than any cache holds, where a binding may be as large.
const BYTES: u64 = 256 << 20;

/// The same for a software adapter, whose memory is the CPU's.
const SOFTWARE_BYTES: u64 = 64 << 20;

/// Measurements, of which the median counts.
const ROUNDS: usize = 7;

impl Gpu {
    /// Bytes read and written per second by copies within device memory, each from a piece of
    /// memory to another, many in a submission; the median of several rounds by the host's clock.
    /// Takes twice the memory of a copy while it measures.
    ///
    /// # Errors
    ///
    /// No memory for it, or a device that fails.
    pub fn copy_bandwidth(&self) -> Result<f64, LoadError> {
        let inner = &self.0;
        let software = self.adapter().is_software();
        let limits = &inner.limits;
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let bytes = (if software { SOFTWARE_BYTES } else { BYTES }).min(most) / 16 * 16;
        let copies = if software { 2 } else { 16 };
        let from = self.reserve("a measurement", bytes)?;
        let to = self.reserve("a measurement", bytes)?;
        let refuse = |reason| LoadError::Device { device: self.adapter().name(), reason };
        let mut rates = Vec::with_capacity(ROUNDS);
        // The first round also pays for the zeros that new memory holds.
        for round in 0..=ROUNDS {
            let mut encoder = inner.device.create_command_encoder(&Default::default());
            for copy in 0..copies {
                // Back and forth, so that no copy repeats the one before it.
                let (from, to) = if copy % 2 == 0 { (&from, &to) } else { (&to, &from) };
                let (from, to) = (&from.raw.buffer, &to.raw.buffer);
                encoder.copy_buffer_to_buffer(from, 0, to, 0, Some(bytes));
            }
            let commands = encoder.finish();
            let started = Instant::now();
            let index = inner.queue.submit([commands]);
            self.wait_for(&index, || true).map_err(refuse)?;
            let seconds = started.elapsed().as_secs_f64();
            if round > 0 {
                rates.push((2 * copies * bytes) as f64 / seconds);
            }
        }
        if let Some(reason) = inner.faults.get() {
            return Err(refuse(reason));
        }
        rates.sort_by(f64::total_cmp);
        Ok(rates[rates.len() / 2])
    }
}
